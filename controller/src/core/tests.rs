#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::settings::{Intent, Setting, Settings};
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const TTL: Duration = Duration::from_secs(5);

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn joining(worker: &str, epoch: u64) -> Box<Joining> {
    let model = ModelDescriptor { name: "m".into(), ..Default::default() };
    Box::new(Joining {
        worker_id: worker.into(),
        endpoint: format!("{worker}:1"),
        model,
        capacity: None,
        epoch,
        measured: None,
    })
}

fn beat(epoch: u64, readiness: Readiness, outstanding_rows: u64) -> Heartbeat {
    Heartbeat {
        epoch,
        readiness,
        outstanding_rows,
        requests: 1,
        active: 1,
        problem: String::new(),
        loaded_percent: 0,
        policy_revision: 0,
        pace: Pace::default(),
    }
}

fn epoch_of(actions: &[Action]) -> u64 {
    actions.iter().find_map(|a| if let Action::Assign { epoch, .. } = a { Some(*epoch) } else { None }).unwrap()
}

fn table(actions: &[Action]) -> Option<Vec<(String, u64)>> {
    actions.iter().find_map(|action| match action {
        Action::PublishRoutes { routes, .. } => Some(routes.iter().map(|r| (r.group_id.clone(), r.epoch)).collect()),
        _ => None,
    })
}

fn stored(worker: &str, epoch: u64) -> Group {
    Group { id: format!("group-{worker}"), epoch }
}

/// Joins on `stream` and reports READY; the epoch.
fn join(state: &mut State, stream: u64, worker: &str, now: Duration) -> u64 {
    let epoch = epoch_of(&decide(state, Event::Hello(StreamId(stream), joining(worker, 0)), now));
    decide(state, Event::Report(StreamId(stream), beat(epoch, Readiness::Ready, 0)), now);
    epoch
}

#[test]
fn the_epoch_is_stored_before_it_is_assigned_and_only_ready_workers_are_routed() {
    let mut state = State::new(TTL, 41, BTreeMap::new(), Settings::new());
    let actions = decide(&mut state, Event::Hello(StreamId(1), joining("a", 0)), at(0));
    let stored = actions.iter().position(|a| *a == Action::Persist(Fact::EpochFloor(42))).unwrap();
    let assigned = actions.iter().position(|a| matches!(a, Action::Assign { epoch: 42, .. })).unwrap();
    assert!(stored < assigned);
    assert_eq!(table(&actions), Some(vec![]));
    let report = |epoch, readiness| Event::Report(StreamId(1), beat(epoch, readiness, 0));
    assert_eq!(table(&decide(&mut state, report(42, Readiness::Loading), at(0))), None);
    // READY of an earlier epoch is not READY in this one.
    assert_eq!(table(&decide(&mut state, report(0, Readiness::Ready), at(0))), None);
    let ready = decide(&mut state, report(42, Readiness::Ready), at(0));
    assert_eq!(table(&ready), Some(vec![("group-a".into(), 42)]));
    let draining = decide(&mut state, report(42, Readiness::Draining), at(1));
    assert_eq!(table(&draining), Some(vec![]));
}

#[test]
fn a_silent_worker_leaves_the_routes_after_the_time_to_live_and_not_before() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    join(&mut state, 1, "a", at(0));
    decide(&mut state, Event::StreamClosed(StreamId(1)), at(1));
    assert_eq!(table(&decide(&mut state, Event::Tick, at(4))), None);
    let actions = decide(&mut state, Event::Tick, at(5));
    assert_eq!(table(&actions), Some(vec![]));
    assert!(actions.contains(&Action::Persist(Fact::NoGroup { worker_id: "a".into() })));
}

#[test]
fn a_worker_whose_stream_breaks_and_whose_endpoint_refuses_goes_at_once() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    join(&mut state, 1, "a", at(5));
    let probe = Action::Probe { stream: StreamId(1), endpoint: "a:1".into() };
    assert_eq!(decide(&mut state, Event::StreamClosed(StreamId(1)), at(6)), [probe]);
    let actions = decide(&mut state, Event::Refused(StreamId(1)), at(6));
    assert_eq!(table(&actions), Some(vec![]));
    assert!(actions.contains(&Action::Persist(Fact::NoGroup { worker_id: "a".into() })));
}

#[test]
fn a_worker_that_has_joined_again_is_not_taken_for_the_one_that_was_looked_for() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    let epoch = join(&mut state, 1, "a", at(5));
    assert_eq!(decide(&mut state, Event::Refused(StreamId(1)), at(6)), [], "its stream has not broken off");
    decide(&mut state, Event::StreamClosed(StreamId(1)), at(6));
    decide(&mut state, Event::Hello(StreamId(2), joining("a", epoch)), at(6));
    assert_eq!(decide(&mut state, Event::Refused(StreamId(1)), at(6)), []);
    assert_eq!((state.members()["a"].epoch, state.members()["a"].stream), (epoch, Some(StreamId(2))));
}

#[test]
fn nobody_is_declared_dead_before_the_grace_is_over_whoever_refuses() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    join(&mut state, 1, "a", at(3));
    decide(&mut state, Event::StreamClosed(StreamId(1)), at(3));
    assert_eq!(decide(&mut state, Event::Refused(StreamId(1)), at(3)), []);
    assert_eq!(decide(&mut state, Event::Tick, at(4)), []);
    assert!(state.members().contains_key("a"));
    // Heard of two seconds ago: without the refusal it would have three more.
    assert_eq!(table(&decide(&mut state, Event::Tick, at(5))), Some(vec![]));
}

#[test]
fn a_leaving_worker_goes_at_once() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    join(&mut state, 1, "a", at(0));
    let actions = decide(&mut state, Event::Leave(StreamId(1)), at(1));
    assert_eq!(table(&actions), Some(vec![]));
    assert!(actions.contains(&Action::Close(StreamId(1), Ending::Left)));
}

#[test]
fn joining_again_raises_the_epoch_above_what_the_worker_saw_and_ends_the_old_stream() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    let first = join(&mut state, 1, "a", at(0));
    let actions = decide(&mut state, Event::Hello(StreamId(2), joining("a", 90)), at(1));
    assert!(first < 90 && epoch_of(&actions) == 91);
    assert!(actions.contains(&Action::Close(StreamId(1), Ending::Superseded)));
    // Nothing the old stream says counts any more.
    decide(&mut state, Event::Report(StreamId(1), beat(91, Readiness::Ready, 0)), at(1));
    decide(&mut state, Event::Leave(StreamId(1)), at(1));
    decide(&mut state, Event::StreamClosed(StreamId(1)), at(1));
    let member = &state.members()["a"];
    assert_eq!((member.readiness, member.stream), (Readiness::Loading, Some(StreamId(2))));
}

#[test]
fn a_process_that_is_back_keeps_its_epoch_and_its_route() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    let epoch = join(&mut state, 1, "a", at(0));
    decide(&mut state, Event::StreamClosed(StreamId(1)), at(1));
    let actions = decide(&mut state, Event::Hello(StreamId(2), joining("a", epoch)), at(2));
    assert_eq!(actions, [Action::Assign { stream: StreamId(2), group_id: "group-a".into(), epoch, seat: None }]);
    // So it does with a controller that took over, which knows its group from the store.
    let mut state = State::new(TTL, epoch, BTreeMap::from([("a".to_owned(), stored("a", epoch))]), Settings::new());
    assert_eq!(epoch_of(&decide(&mut state, Event::Hello(StreamId(1), joining("a", epoch)), at(0))), epoch);
    let ready = decide(&mut state, Event::Report(StreamId(1), beat(epoch, Readiness::Ready, 0)), at(0));
    assert_eq!(table(&ready), Some(vec![("group-a".into(), epoch)]));
    // Another process under its name does not.
    assert!(epoch_of(&decide(&mut state, Event::Hello(StreamId(2), joining("a", 0)), at(1))) > epoch);
    // Nor does the first one, if it is still there.
    assert!(epoch_of(&decide(&mut state, Event::Hello(StreamId(3), joining("a", epoch)), at(1))) > epoch + 1);
}

#[test]
fn a_worker_at_the_endpoint_of_another_takes_its_place() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    join(&mut state, 1, "a", at(0));
    let newcomer = Box::new(Joining { endpoint: "a:1".into(), ..*joining("b", 0) });
    let actions = decide(&mut state, Event::Hello(StreamId(2), newcomer), at(0));
    assert!(actions.contains(&Action::Close(StreamId(1), Ending::Superseded)));
    assert_eq!(state.members().keys().collect::<Vec<_>>(), ["b"]);
}

#[test]
fn a_report_above_the_floor_moves_the_floor_above_it() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    join(&mut state, 1, "a", at(0));
    let actions = decide(&mut state, Event::Report(StreamId(1), beat(500, Readiness::Ready, 0)), at(0));
    assert_eq!(epoch_of(&actions), 501);
    assert_eq!(state.epoch_floor(), 501);
}

#[test]
fn after_a_start_no_table_is_published_before_the_groups_are_back_or_grace_is_over() {
    let groups: BTreeMap<String, Group> = ["a", "b"].map(|id| (id.to_owned(), stored(id, 7))).into();
    let mut state = State::new(TTL, 7, groups.clone(), Settings::new());
    assert_eq!(table(&decide(&mut state, Event::Tick, at(0))), None);
    let epoch = join(&mut state, 1, "a", at(1));
    assert_eq!(table(&decide(&mut state, Event::Tick, at(2))), None);
    // Back: both.
    let second = epoch_of(&decide(&mut state, Event::Hello(StreamId(2), joining("b", 0)), at(2)));
    let actions = decide(&mut state, Event::Report(StreamId(2), beat(second, Readiness::Ready, 0)), at(2));
    assert_eq!(table(&actions), Some(vec![("group-a".into(), epoch), ("group-b".into(), second)]));
    // Never back: grace ends.
    let mut state = State::new(TTL, 7, groups, Settings::new());
    let epoch = join(&mut state, 1, "a", at(1));
    let actions = decide(&mut state, Event::Tick, at(5));
    assert_eq!(table(&actions), Some(vec![("group-a".into(), epoch)]));
    assert!(actions.contains(&Action::Persist(Fact::NoGroup { worker_id: "b".into() })));
}

#[test]
fn loads_are_published_with_ticks_only() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    let epoch = join(&mut state, 1, "a", at(0));
    let report = Event::Report(StreamId(1), beat(epoch, Readiness::Ready, 9));
    assert_eq!(table(&decide(&mut state, report, at(1))), None);
    let actions = decide(&mut state, Event::Tick, at(1));
    assert!(matches!(&actions[..], [Action::PublishRoutes { routes, .. }] if routes[0].outstanding_rows == 9));
    assert_eq!(decide(&mut state, Event::Tick, at(1)), []);
}

#[test]
fn settings_are_stored_published_and_drains_told() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    let epoch = join(&mut state, 1, "a", at(0));
    let intent = Intent::Fixed(Setting { block_size: 8, threshold: Some(0.9), self_speculative: false });
    let actions = decide(&mut state, Event::SetPolicy("m".into(), intent.clone()), at(0));
    assert!(actions.contains(&Action::Persist(Fact::Settings { model: "m".into(), intent, revision: 1 })));
    let published = |actions: &[Action]| match actions.last() {
        Some(Action::PublishRoutes { settings, .. }) => settings["m"].current,
        _ => panic!("{actions:?}"),
    };
    assert_eq!(published(&actions), Some(Setting { block_size: 8, threshold: Some(0.9), self_speculative: false }));
    let actions = decide(&mut state, Event::SetPolicy("m".into(), Intent::ModelDefaults), at(0));
    assert_eq!(published(&actions), None);
    // Nothing new goes there from then on.
    let actions = decide(&mut state, Event::Drain("a".into()), at(0));
    assert_eq!((&actions[0], table(&actions)), (&Action::TellToDrain(StreamId(1)), Some(vec![])));
    assert_eq!(decide(&mut state, Event::Drain("b".into()), at(0)), []);
    // A worker whose stream broke before it heard is told again; a process that has started since serves.
    let actions = decide(&mut state, Event::Hello(StreamId(2), joining("a", epoch)), at(1));
    assert!(actions.contains(&Action::TellToDrain(StreamId(2))), "{actions:?}");
    let ready = Event::Report(StreamId(2), beat(epoch, Readiness::Ready, 0));
    assert_eq!(table(&decide(&mut state, ready, at(1))), None);
    let actions = decide(&mut state, Event::Hello(StreamId(3), joining("a", 0)), at(2));
    assert!(!actions.contains(&Action::TellToDrain(StreamId(3))), "{actions:?}");
    let epoch = epoch_of(&actions);
    let ready = Event::Report(StreamId(3), beat(epoch, Readiness::Ready, 0));
    assert_eq!(table(&decide(&mut state, ready, at(2))), Some(vec![("group-a".into(), epoch)]));
}

#[test]
fn members_are_bounded() {
    let mut state = State::new(TTL, 0, BTreeMap::new(), Settings::new());
    for i in 0..MEMBERS_MAX as u64 {
        join(&mut state, i, &format!("w{i}"), at(0));
    }
    let last = StreamId(MEMBERS_MAX as u64);
    let actions = decide(&mut state, Event::Hello(last, joining("one more", 0)), at(0));
    assert_eq!(actions, [Action::Close(last, Ending::Full)]);
    // Who is in may come back.
    let actions = decide(&mut state, Event::Hello(last, joining("w0", 0)), at(0));
    assert!(actions.iter().any(|a| matches!(a, Action::Assign { .. })));
}

#[derive(Debug, Clone)]
enum Drawn {
    Hello {
        stream: u64,
        worker: u8,
        seen: u64,
    },
    /// `ahead`: added to the epoch assigned on that stream.
    Report {
        stream: u64,
        readiness: Readiness,
        ahead: i64,
        rows: u64,
    },
    Leave {
        stream: u64,
    },
    Closed {
        stream: u64,
    },
    Refused {
        stream: u64,
    },
    Wait {
        millis: u64,
    },
}

fn drawn() -> impl Strategy<Value = Drawn> {
    let readiness = prop_oneof![Just(Readiness::Loading), Just(Readiness::Ready), Just(Readiness::Draining)];
    prop_oneof![
        (0..12u64, 0..4u8, 0..20u64).prop_map(|(stream, worker, seen)| Drawn::Hello { stream, worker, seen }),
        (0..12u64, readiness, -1..=1i64, 0..5u64).prop_map(|(stream, readiness, ahead, rows)| Drawn::Report {
            stream,
            readiness,
            ahead,
            rows
        }),
        (0..12u64).prop_map(|stream| Drawn::Leave { stream }),
        (0..12u64).prop_map(|stream| Drawn::Closed { stream }),
        (0..12u64).prop_map(|stream| Drawn::Refused { stream }),
        (0..3000u64).prop_map(|millis| Drawn::Wait { millis }),
    ]
}

/// What the outside knows, kept beside the state under test.
#[derive(Default)]
struct Model {
    opened: BTreeMap<u64, String>,
    assigned: BTreeMap<StreamId, u64>,
    /// Workers' epochs.
    held: BTreeMap<String, u64>,
    heard: BTreeMap<String, Duration>,
    floor: u64,
    stored_floor: u64,
    revision: u64,
}

impl Model {
    fn check(&mut self, actions: &[Action], now: Duration) -> Result<(), TestCaseError> {
        for action in actions {
            match action {
                Action::Persist(Fact::EpochFloor(epoch)) => self.stored_floor = *epoch,
                Action::Assign { stream, epoch, .. } => {
                    let worker = self.opened[&stream.0].clone();
                    let back = self.held.insert(worker, *epoch) == Some(*epoch);
                    prop_assert!(back || *epoch > self.floor, "epochs never fall nor repeat");
                    prop_assert!(self.stored_floor >= *epoch, "stored before it is handed out");
                    self.floor = self.floor.max(*epoch);
                    self.assigned.insert(*stream, *epoch);
                }
                Action::PublishRoutes { revision, routes, .. } => {
                    prop_assert!(*revision > self.revision);
                    self.revision = *revision;
                    for route in routes {
                        let worker = route.group_id.strip_prefix("group-").unwrap();
                        let silent = now.saturating_sub(self.heard[worker]);
                        // Silence is looked for at every tick; the test ticks after every wait.
                        prop_assert!(silent < TTL, "{worker} is routed after {silent:?} of silence");
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn epochs_never_fall_routes_hold_only_live_ready_workers_revisions_rise(
        floor in 0..10u64,
        events in prop::collection::vec(drawn(), 1..80),
    ) {
        let mut state = State::new(TTL, floor, BTreeMap::new(), Settings::new());
        let mut model = Model { floor, stored_floor: floor, ..Model::default() };
        let mut now = Duration::ZERO;
        for drawn in events {
            let event = match drawn {
                Drawn::Hello { stream, worker, seen } => {
                    if model.opened.contains_key(&stream) {
                        continue;
                    }
                    let worker = format!("w{worker}");
                    model.opened.insert(stream, worker.clone());
                    model.heard.insert(worker.clone(), now);
                    Event::Hello(StreamId(stream), joining(&worker, seen))
                }
                Drawn::Report { stream, readiness, ahead, rows } => {
                    let stream = StreamId(stream);
                    let epoch = model.assigned.get(&stream).map_or(0, |e| e.saturating_add_signed(ahead));
                    if let Some((worker, _)) = state.members().iter().find(|(_, m)| m.stream == Some(stream)) {
                        model.heard.insert(worker.clone(), now);
                    }
                    Event::Report(stream, beat(epoch, readiness, rows))
                }
                Drawn::Leave { stream } => Event::Leave(StreamId(stream)),
                Drawn::Closed { stream } => Event::StreamClosed(StreamId(stream)),
                Drawn::Refused { stream } => Event::Refused(StreamId(stream)),
                Drawn::Wait { millis } => {
                    now += Duration::from_millis(millis);
                    Event::Tick
                }
            };
            let actions = decide(&mut state, event, now);
            model.check(&actions, now)?;
            for member in state.members().values() {
                prop_assert!(member.epoch <= state.epoch_floor());
            }
            let table = actions.iter().rev().find_map(|a| match a {
                Action::PublishRoutes { routes, .. } => Some(routes),
                _ => None,
            });
            if let Some(routes) = table {
                let ready: Vec<_> = state
                    .members()
                    .values()
                    .filter(|m| m.readiness == Readiness::Ready)
                    .map(|m| (m.group_id.clone(), m.epoch))
                    .collect();
                let routed: Vec<_> = routes.iter().map(|r| (r.group_id.clone(), r.epoch)).collect();
                prop_assert_eq!(routed, ready);
            }
        }
    }
}
