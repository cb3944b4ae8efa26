#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::super::settings::Settings;
use super::super::{Event, Heartbeat, Joining, Pace, decide};
use super::*;
use crate::policy::{Profile, Quality};
use unmask_proto::v1::{Capacity, Route};

const TTL: Duration = Duration::from_secs(5);

/// A controller and its workers, by hand.
struct Pooled {
    state: State,
    now: Duration,
    streams: BTreeMap<String, StreamId>,
    next_stream: u64,
    /// Last seat, epoch and group of every worker that was told.
    told: BTreeMap<String, (Option<Seat>, u64)>,
    routes: Vec<Route>,
    facts: Vec<Fact>,
}

impl Pooled {
    fn new() -> Self {
        Self::on(State::new(TTL, 0, BTreeMap::new(), Settings::new()))
    }

    fn on(state: State) -> Self {
        let (streams, told) = (BTreeMap::new(), BTreeMap::new());
        Self { state, now: Duration::ZERO, streams, next_stream: 1, told, routes: Vec::new(), facts: Vec::new() }
    }

    fn event(&mut self, event: Event) {
        for action in decide(&mut self.state, event, self.now) {
            match action {
                Action::Assign { stream, epoch, seat, .. } => {
                    let (worker, _) = self.streams.iter().find(|(_, known)| **known == stream).unwrap();
                    self.told.insert(worker.clone(), (seat, epoch));
                }
                Action::PublishRoutes { routes, .. } => self.routes = routes,
                Action::Persist(fact) => self.facts.push(fact),
                _ => {}
            }
        }
    }

    fn join(&mut self, worker: &str, epoch: u64) {
        let stream = StreamId(self.next_stream);
        self.next_stream += 1;
        self.streams.insert(worker.into(), stream);
        let capacity = Capacity { memory_bytes: 8, zone: "z".into(), rank_address: format!("{worker}:2") };
        let joining = Joining {
            worker_id: worker.into(),
            endpoint: format!("{worker}:1"),
            model: ModelDescriptor::default(),
            capacity: Some(capacity),
            epoch,
            measured: None,
        };
        self.event(Event::Hello(stream, Box::new(joining)));
    }

    fn report(&mut self, worker: &str, readiness: Readiness) {
        let epoch = self.told[worker].1;
        let problem = if readiness == Readiness::Fenced { "rank 1 is gone".into() } else { String::new() };
        let (outstanding_rows, requests, active, loaded_percent, policy_revision) = (0, 0, 0, 0, 0);
        let beat = Heartbeat {
            epoch,
            readiness,
            outstanding_rows,
            requests,
            active,
            problem,
            loaded_percent,
            policy_revision,
            pace: Pace::default(),
        };
        self.event(Event::Report(self.streams[worker], beat));
    }

    /// All that have a seat form their groups; rank 0 says what it serves.
    fn form(&mut self) {
        for (worker, (seat, epoch)) in self.told.clone() {
            let Some(seat) = seat else { continue };
            if seat.rank == 0 {
                let model = ModelDescriptor { name: seat.model.clone(), ..ModelDescriptor::default() };
                self.event(Event::Loaded(self.streams[&worker], epoch, Box::new(model), None));
            }
            self.report(&worker, Readiness::Ready);
        }
    }

    fn pass(&mut self, millis: u64) {
        self.now += Duration::from_millis(millis);
        self.event(Event::Tick);
    }

    fn apply(&mut self, replicas: u32, tensor_parallel: u32, spares: u32) {
        self.apply_from("/m", replicas, tensor_parallel, spares);
    }

    fn apply_from(&mut self, path: &str, replicas: u32, tensor_parallel: u32, spares: u32) {
        let source = Source { path: path.into(), dtype: "bf16".into() };
        let desired = Desired { source, replicas, tensor_parallel, spares, memory_bytes: 8, policy: None };
        self.event(Event::Apply("m".into(), desired));
    }

    fn rank(&self, worker: &str) -> Option<(u32, u64)> {
        let (seat, epoch) = self.told.get(worker)?;
        Some((seat.as_ref()?.rank, *epoch))
    }

    fn served(&self) -> Vec<(String, u64, String)> {
        self.routes.iter().map(|route| (route.group_id.clone(), route.epoch, route.endpoint.clone())).collect()
    }
}

/// Three workers, a group of two and a spare.
fn pair_and_spare() -> Pooled {
    let mut pooled = Pooled::new();
    pooled.apply(1, 2, 1);
    for worker in ["a", "b", "c"] {
        pooled.join(worker, 0);
    }
    pooled.form();
    pooled
}

#[test]
fn what_is_wanted_is_placed_as_soon_as_there_are_workers_and_routed_when_rank_0_is_ready() {
    let mut pooled = Pooled::new();
    pooled.apply(1, 2, 0);
    pooled.join("a", 0);
    assert!(pooled.state.pool().plan.pending.values().next().unwrap().contains("needs 2"));
    pooled.join("b", 0);
    let (seat, epoch) = pooled.told["b"].clone();
    let seat = seat.unwrap();
    assert_eq!((seat.rank, seat.rank_addresses.as_slice()), (1, ["a:2".to_owned(), "b:2".to_owned()].as_slice()));
    assert_eq!(pooled.rank("a"), Some((0, epoch)));
    assert!(pooled.facts.iter().any(|fact| matches!(fact, Fact::Placed { group: Some(_), .. })));
    pooled.report("b", Readiness::Ready);
    assert_eq!(pooled.served(), []);
    pooled.form();
    assert_eq!(pooled.served(), [("m/0".to_owned(), epoch, "a:1".to_owned())]);
}

#[test]
fn a_rank_that_is_killed_is_replaced_by_the_spare_in_a_higher_epoch() {
    let mut pooled = pair_and_spare();
    let before = pooled.rank("a").unwrap().1;
    // Its connection breaks; rank 0 notices that it is gone.
    pooled.event(Event::StreamClosed(pooled.streams["b"]));
    assert_eq!(pooled.rank("a"), Some((0, before)), "a connection alone says nothing: the group still computes");
    pooled.report("a", Readiness::Fenced);
    let (rank, epoch) = pooled.rank("c").unwrap();
    assert!(rank == 1 && epoch > before);
    assert_eq!(pooled.rank("a"), Some((0, epoch)));
    assert_eq!(pooled.served(), []);
    pooled.form();
    assert_eq!(pooled.served(), [("m/0".to_owned(), epoch, "a:1".to_owned())]);
    // It comes back as the spare.
    pooled.join("b", 0);
    assert_eq!(pooled.told["b"], (None, 0));
    assert_eq!(pooled.state.pool().plan.spares["m"], BTreeSet::from(["b".to_owned()]));
    // So it goes for rank 0: the others say that it is gone.
    pooled.event(Event::StreamClosed(pooled.streams["a"]));
    pooled.report("c", Readiness::Fenced);
    assert_eq!(pooled.rank("b").map(|(rank, _)| rank), Some(0));
    pooled.form();
    assert_eq!(pooled.served()[0].2, "b:1");
    pooled.join("a", epoch);
    assert_eq!(pooled.told["a"].0, None);
}

#[test]
fn a_group_of_one_is_placed_elsewhere_when_its_worker_is_gone_for_the_time_to_live() {
    let mut pooled = Pooled::new();
    pooled.apply(1, 1, 1);
    pooled.join("a", 0);
    pooled.join("b", 0);
    pooled.form();
    assert_eq!(pooled.served()[0].2, "a:1");
    for _ in 0..5 {
        pooled.pass(1000);
        pooled.report("b", Readiness::Spare);
    }
    pooled.pass(0);
    assert_eq!(pooled.rank("b").map(|(rank, _)| rank), Some(0));
}

#[test]
fn a_group_of_one_is_placed_elsewhere_at_once_when_its_worker_has_ended() {
    let mut pooled = Pooled::new();
    pooled.apply(1, 1, 1);
    pooled.join("a", 0);
    pooled.join("b", 0);
    pooled.form();
    for _ in 0..5 {
        pooled.pass(1000);
        pooled.report("a", Readiness::Ready);
        pooled.report("b", Readiness::Spare);
    }
    let before = pooled.rank("a").unwrap().1;
    pooled.event(Event::StreamClosed(pooled.streams["a"]));
    assert_eq!(pooled.served()[0].2, "a:1", "its stream alone says nothing");
    pooled.event(Event::Refused(pooled.streams["a"]));
    assert!(pooled.rank("b").is_some_and(|(rank, epoch)| rank == 0 && epoch > before));
    pooled.form();
    assert_eq!(pooled.served()[0].2, "b:1");
    pooled.join("a", 0);
    assert_eq!(pooled.told["a"].0, None, "it comes back as a spare");
}

#[test]
fn a_rank_that_has_ended_is_replaced_when_the_others_say_so() {
    let mut pooled = pair_and_spare();
    pooled.now = TTL;
    for (worker, readiness) in [("a", Readiness::Ready), ("b", Readiness::Ready), ("c", Readiness::Spare)] {
        pooled.report(worker, readiness);
    }
    let before = pooled.served();
    pooled.event(Event::StreamClosed(pooled.streams["b"]));
    pooled.event(Event::Refused(pooled.streams["b"]));
    assert_eq!(pooled.served(), before);
    pooled.report("a", Readiness::Fenced);
    assert!(pooled.rank("c").is_some_and(|(rank, epoch)| rank == 1 && epoch > before[0].1));
}

#[test]
fn a_rank_that_hangs_is_replaced_once_it_has_been_silent_for_long_enough() {
    let mut pooled = pair_and_spare();
    pooled.now += Duration::from_millis(2100);
    // Everybody but b has been heard of; b's last heartbeat is two seconds old.
    pooled.report("c", Readiness::Spare);
    pooled.report("a", Readiness::Fenced);
    let again = pooled.rank("b").unwrap();
    assert_eq!(pooled.rank("a"), Some((0, again.1)), "it forms anew with b, which may just have been late");
    pooled.report("c", Readiness::Spare);
    pooled.pass(500);
    assert!(pooled.rank("c").is_some_and(|(rank, epoch)| rank == 1 && epoch > again.1));
    assert_eq!(pooled.told["b"].0, None, "when it wakes up it hears that it is a spare");
}

#[test]
fn a_rank_that_only_the_controller_does_not_hear_stays() {
    let mut pooled = pair_and_spare();
    let before = pooled.served();
    for _ in 0..10 {
        pooled.pass(1000);
        for (worker, readiness) in [("a", Readiness::Ready), ("c", Readiness::Spare)] {
            pooled.report(worker, readiness);
        }
    }
    assert!(!pooled.state.members().contains_key("b"));
    assert_eq!(pooled.served(), before);
    let epoch = before[0].1;
    pooled.join("b", epoch);
    assert_eq!(pooled.rank("b"), Some((1, epoch)));
}

#[test]
fn a_group_that_cannot_form_is_tried_again_with_pauses_and_says_why() {
    let mut pooled = Pooled::new();
    pooled.apply(1, 1, 0);
    pooled.join("a", 0);
    let mut epochs = BTreeSet::new();
    for _ in 0..300 {
        pooled.report("a", Readiness::Fenced);
        pooled.pass(100);
        epochs.insert(pooled.rank("a").unwrap().1);
    }
    // At once, then after 1, 2, 4 and 8 seconds.
    assert_eq!(epochs.len(), 5, "{epochs:?}");
    let placed = pooled.state.pool().placed.values().next().unwrap();
    assert_eq!(placed.problem, "a: rank 1 is gone");
}

#[test]
fn a_worker_that_drains_gives_its_seat_to_a_spare() {
    let mut pooled = pair_and_spare();
    pooled.event(Event::Drain("a".into()));
    assert_eq!(pooled.rank("c").map(|(rank, _)| rank), Some(0));
    assert_eq!(pooled.rank("b").map(|(rank, _)| rank), Some(1));
    assert_eq!(pooled.served(), []);
}

#[test]
fn other_weights_replace_one_group_after_the_other() {
    let mut pooled = Pooled::new();
    pooled.apply(2, 1, 0);
    pooled.join("a", 0);
    pooled.join("b", 0);
    pooled.form();
    let before = pooled.served();
    assert_eq!(before.len(), 2);
    pooled.apply_from("/n", 2, 1, 0);
    assert_eq!(pooled.served().len(), 1, "one serves on while the other loads");
    pooled.form();
    pooled.form();
    let paths: BTreeSet<_> = pooled.told.values().map(|(seat, _)| seat.as_ref().unwrap().path.clone()).collect();
    assert_eq!((pooled.served().len(), paths), (2, BTreeSet::from(["/n".to_owned()])));
}

#[test]
fn what_is_not_wanted_any_more_is_released() {
    let mut pooled = pair_and_spare();
    pooled.apply(0, 2, 0);
    assert!(pooled.told.values().all(|(seat, _)| seat.is_none()));
    assert_eq!(pooled.served(), []);
    assert!(pooled.facts.iter().any(|fact| matches!(fact, Fact::Desired { desired: None, .. })));
}

#[test]
fn after_a_change_of_leader_groups_keep_their_places_and_epochs() {
    let before = pair_and_spare();
    let pool = before.state.pool();
    let state = State::new(TTL, before.state.epoch_floor(), BTreeMap::new(), Settings::new())
        .with_pool(pool.desired.clone(), pool.placed.clone());
    let mut after = Pooled::on(state);
    let epoch = before.rank("a").unwrap().1;
    // The spare comes first, and must not be taken for a rank that has not been heard of yet.
    after.join("c", 0);
    after.pass(1000);
    assert_eq!(after.told["c"].0, None);
    after.join("a", epoch);
    after.join("b", epoch);
    after.form();
    assert_eq!((after.rank("a"), after.rank("b")), (Some((0, epoch)), Some((1, epoch))));
    assert_eq!(after.served(), before.served());
}

fn measured() -> Arc<Measured> {
    let profile = r#"{"format":"profile/1","model":"m","numerics_id":"n","device":"d","isa":"i","threads":1,"ranks":2,
        "dtype":"bf16","kv_type":"f32","points":[{"rows":1,"context":0,"ms":1.0,"spread":0.0}]}"#;
    let quality = r#"{"format":"unmask.quality/1","command":"c","rows":[{"policy":"autoregressive","block_size":1,
        "dtype":"bf16","n":1000,"pass_rate":0.98,"parse_rate":1.0,"pass_rate_low":0.97,"tpf":1.0}]}"#;
    Arc::new(Measured { profile: Profile::parse(profile).unwrap(), quality: Quality::parse(quality).unwrap() })
}

#[test]
fn a_group_that_forms_anew_need_not_measure_again_unless_it_is_another() {
    let mut pooled = pair_and_spare();
    let loaded = |pooled: &mut Pooled, worker: &str, measured| {
        let (stream, epoch) = (pooled.streams[worker], pooled.told[worker].1);
        let model = ModelDescriptor { name: "m".into(), ..ModelDescriptor::default() };
        pooled.event(Event::Loaded(stream, epoch, Box::new(model), measured));
        pooled.state.members()[worker].measured.clone()
    };
    let known = |pooled: &Pooled, worker: &str| pooled.told[worker].0.as_ref().unwrap().profile_json.clone();
    assert_eq!(known(&pooled, "a"), "");
    assert_eq!(loaded(&mut pooled, "a", Some(measured())), Some(measured()));
    pooled.now = TTL;
    pooled.event(Event::StreamClosed(pooled.streams["a"]));
    pooled.report("c", Readiness::Spare);
    pooled.report("b", Readiness::Fenced);
    pooled.pass(0);
    let first = ["b", "c"].into_iter().find(|worker| pooled.rank(worker).is_some_and(|(rank, _)| rank == 0)).unwrap();
    assert_eq!(Profile::parse(&known(&pooled, first)).unwrap(), measured().profile);
    loaded(&mut pooled, first, Some(measured()));
    ["b", "c"].into_iter().for_each(|worker| pooled.report(worker, Readiness::Ready));
    pooled.apply_from("/other", 1, 2, 0);
    pooled.pass(100);
    assert_eq!(known(&pooled, first), "", "other weights");
}
