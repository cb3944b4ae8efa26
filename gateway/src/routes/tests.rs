#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;

/// A group drawn among those of a name.
fn drawn(routes: &Routes, group: &str) -> Arc<Route> {
    routes.table().choose(Instant::now(), None, |route| route.group == group).unwrap()
}

/// How many of 400 requests a group gets: of three with different scores 222, 133 and 44 on average, of two 300 and 100.
/// What tests allow is five standard deviations away.
fn count(routes: &Routes, now: Instant, group: &str) -> usize {
    (0..400).filter(|_| routes.table().choose(now, None, |_| true).is_some_and(|route| route.group == group)).count()
}

fn route(model: &str, group: &str, reported: u64) -> v1::Route {
    v1::Route {
        model: model.into(),
        group_id: group.into(),
        epoch: 1,
        endpoint: "127.0.0.1:1".into(),
        descriptor: Some(ModelDescriptor { name: model.into(), ..Default::default() }),
        outstanding_rows: reported,
    }
}

fn table(routes: Vec<v1::Route>) -> WatchRoutesResponse {
    WatchRoutesResponse { term: 1, revision: 1, routes, policies: Vec::new() }
}

#[test]
fn models_are_found_listed_remembered_and_refused() {
    let routes = Routes::new(Arc::default());
    assert_eq!(routes.table().model("a").unwrap_err().code(), Code::Unavailable);
    routes.replace(table(vec![route("a", "1", 0)]));
    assert_eq!(routes.table().model("").unwrap().model.name, "a");
    routes.replace(table(vec![route("a", "1", 0), route("b", "2", 0), route("b", "3", 0)]));
    assert_eq!(routes.table().model("").unwrap_err().code(), Code::InvalidArgument);
    let listed: Vec<_> = routes.table().models().into_iter().map(|m| (m.name, m.ready_groups)).collect();
    assert_eq!(listed, [("a".into(), 1), ("b".into(), 2)]);
    let unknown = routes.table().model("c").unwrap_err();
    assert_eq!((unknown.code(), unknown.message()), (Code::NotFound, "no model `c`; known models: a, b"));
    routes.replace(table(vec![]));
    assert_eq!(routes.table().model("b").unwrap_err().code(), Code::Unavailable);
    assert_eq!(routes.table().model("c").unwrap_err().code(), Code::NotFound);
}

#[test]
fn the_less_loaded_of_two_is_taken_and_own_work_counts_until_it_ends() {
    let (routes, now) = (Routes::new(Arc::default()), Instant::now());
    routes.replace(table(vec![route("a", "1", 5), route("a", "2", 0)]));
    let lease = drawn(&routes, "2").lease(100);
    // The counts carry over to later tables.
    routes.replace(table(vec![route("a", "2", 0), route("a", "1", 5)]));
    // The busier one is taken only when both draws give it.
    assert!((40..160).contains(&count(&routes, now, "2")));
    drop(lease);
    assert!(count(&routes, now, "2") > 240);
    assert!(routes.table().choose(now, None, |_| false).is_none());
}

#[test]
fn a_group_that_answers_slowly_gets_less_until_that_is_long_ago() {
    let (routes, now) = (Routes::new(Arc::default()), Instant::now());
    routes.replace(table(vec![route("a", "slow", 10), route("a", "quick", 30), route("a", "new", 31)]));
    assert!(count(&routes, now, "slow") > 170, "none is measured: rows decide");
    drawn(&routes, "slow").took(Duration::from_millis(100), now);
    drawn(&routes, "quick").took(Duration::from_millis(10), now);
    // One that was not measured counts as the quicker half.
    assert!(count(&routes, now, "quick") > 170 && count(&routes, now, "slow") < 90);
    assert!(count(&routes, now, "new") > count(&routes, now, "slow"));
    // What was measured carries over, and so much later counts no more.
    routes.replace(table(vec![route("a", "slow", 10), route("a", "quick", 30), route("a", "new", 31)]));
    assert!(count(&routes, now, "slow") < 90);
    assert!(count(&routes, now + Duration::from_secs(100), "slow") > 170);
}

#[test]
fn prompts_that_begin_alike_go_together_until_their_group_has_much_more_to_do() {
    let (routes, now) = (Routes::new(Arc::default()), Instant::now());
    routes.replace(table((0..5).map(|i| route("a", &i.to_string(), 0)).collect()));
    let prefix = Prefix::of(0, &[7; 40]);
    let chosen = |routes: &Routes| routes.table().choose(now, prefix, |_| true).unwrap();
    let first = chosen(&routes);
    let together = |routes: &Routes| (0..100).filter(|_| chosen(routes).group == first.group).count();
    assert_eq!(together(&routes), 100);
    let lease = first.lease(500);
    assert_eq!(together(&routes), 100, "a few requests ahead");
    let more = first.lease(500);
    assert!(together(&routes) < 20);
    drop((lease, more));
    first.took(Duration::from_millis(10), now);
    assert_eq!(together(&routes), 100);
    // Broken, it is passed over.
    first.broke();
    assert_eq!(together(&routes), 0);
}

#[test]
fn an_old_report_makes_nobody_look_idle() {
    let (routes, now) = (Routes::new(Arc::default()), Instant::now());
    routes.replace(table(vec![route("a", "1", 500), route("a", "2", 0)]));
    assert!(count(&routes, now, "2") > 240);
    routes.doubt_loads();
    assert!((140..260).contains(&count(&routes, now, "2")));
    let _lease = drawn(&routes, "2").lease(1);
    assert!((40..160).contains(&count(&routes, now, "2")), "own work counts as ever");
    routes.replace(table(vec![route("a", "1", 500), route("a", "2", 0)]));
    assert!(count(&routes, now, "2") > 240);
}

#[test]
fn a_group_that_broke_is_passed_over_until_its_next_epoch_or_when_there_is_no_other() {
    let (routes, now) = (Routes::new(Arc::default()), Instant::now());
    routes.replace(table(vec![route("a", "1", 0), route("a", "2", 0)]));
    drawn(&routes, "1").broke();
    assert_eq!(count(&routes, now, "1"), 0);
    assert_eq!(routes.table().models()[0].ready_groups, 1);
    // The same incarnation stays what it was, and is better than none.
    routes.replace(table(vec![route("a", "1", 0), route("a", "2", 0)]));
    assert_eq!(count(&routes, now, "1"), 0);
    assert_eq!(drawn(&routes, "1").group, "1");
    routes.replace(table(vec![v1::Route { epoch: 2, ..route("a", "1", 0) }, route("a", "2", 0)]));
    assert!(count(&routes, now, "1") > 0);
}

#[test]
fn new_requests_go_to_groups_of_any_numerics_and_later_ones_to_their_own() {
    let (routes, now) = (Routes::new(Arc::default()), Instant::now());
    let with = |group: &str, numerics: &str| v1::Route {
        descriptor: Some(ModelDescriptor { name: "a".into(), numerics_id: numerics.into(), ..Default::default() }),
        ..route("a", group, 0)
    };
    routes.replace(table(vec![with("1", "x"), with("2", "y"), with("3", "y")]));
    let drawn = |numerics| {
        let groups = (0..300).map(|_| routes.table().some_group("a", numerics, false, now).unwrap().group.clone());
        groups.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
    };
    assert_eq!(drawn(""), ["1", "2", "3"]);
    assert_eq!(drawn("y"), ["2", "3"]);
    let status = routes.table().some_group("a", "z", false, now).unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    // The only group of its numerics that has failed is asked again when it is due.
    let first = routes.table().routes.iter().find(|route| route.group == "1").cloned().unwrap();
    first.broke();
    assert_eq!(drawn(""), ["2", "3"]);
    let later = Instant::now() + Duration::from_secs(1);
    assert_eq!(routes.table().some_group("a", "", false, later).unwrap().group, "1");
}

#[test]
fn only_a_request_probes_a_group_that_broke() {
    let routes = Routes::new(Arc::default());
    routes.replace(table(vec![route("a", "1", 0), route("a", "2", 0)]));
    let table = routes.table();
    drawn(&routes, "1").broke();
    let later = Instant::now() + Duration::from_secs(1);
    // Whoever looks the model up sends nothing there.
    (0..100).for_each(|_| assert_eq!(table.model("a").unwrap().group, "2"));
    assert_eq!(table.pick(later, None, |_| true).unwrap().group, "1");
    (0..100).for_each(|_| assert_eq!(table.pick(later, None, |_| true).unwrap().group, "2"));
}
