#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use futures::FutureExt as _;
use tonic_types::StatusExt as _;

const LIMITS: Limits = Limits { rows_max: 1000, streams_max: 10, queue_max: 4, queue_wait: Duration::from_secs(20) };

fn admission(limits: Limits) -> Arc<Admission> {
    Arc::new(Admission::new(limits))
}

fn ask(tenant: u64, rows: u64) -> Ask {
    Ask { tenant, weight: 1, rows, priority: 0, deadline: None, begun: false }
}

/// Begins at once.
fn now(admission: &Arc<Admission>, ask: Ask) -> Ticket {
    admission.enter(ask).now_or_never().expect("it waits").unwrap()
}

fn waiting(admission: &Arc<Admission>, ask: Ask) -> tokio::task::JoinHandle<Answer> {
    let admission = Arc::clone(admission);
    tokio::spawn(async move { admission.enter(ask).await })
}

async fn until_waiting(admission: &Admission, count: usize) {
    while admission.state().waiting.len() != count {
        tokio::task::yield_now().await;
    }
}

fn reason(status: &Status) -> (Code, String) {
    assert!(status.get_details_retry_info().is_some(), "{status:?}");
    (status.code(), status.get_details_error_info().unwrap().reason)
}

#[tokio::test]
async fn requests_wait_while_as_many_rows_are_under_way_as_may_be() {
    let admission = admission(LIMITS);
    let (first, second) = (now(&admission, ask(0, 900)), now(&admission, ask(0, 5000)));
    let low = waiting(&admission, Ask { priority: -1, ..ask(0, 1) });
    until_waiting(&admission, 1).await;
    let high = waiting(&admission, ask(0, 20_000));
    until_waiting(&admission, 2).await;
    // What began elsewhere does not wait.
    drop(now(&admission, Ask { begun: true, ..ask(0, 1) }));
    drop(first);
    assert!(admission.enter(ask(0, 1)).now_or_never().is_none(), "5000 are under way still");
    drop(second);
    let high = high.await.unwrap().unwrap();
    assert!(!low.is_finished());
    drop(high);
    low.await.unwrap().unwrap();
    admission.emptied().await;
}

#[tokio::test]
async fn who_goes_away_leaves_the_queue_and_a_turn_that_nobody_takes_passes_on() {
    let admission = admission(Limits { streams_max: 1, ..LIMITS });
    let held = now(&admission, ask(0, 1));
    let (first, second) = (waiting(&admission, ask(0, 1)), waiting(&admission, ask(0, 1)));
    until_waiting(&admission, 2).await;
    first.abort();
    until_waiting(&admission, 1).await;
    // Its turn has come, and it goes before it hears so.
    let mut third = Box::pin(admission.enter(Ask { priority: 1, ..ask(0, 1) }));
    assert!(third.as_mut().now_or_never().is_none());
    drop(held);
    drop(third);
    second.await.unwrap().unwrap();
    assert_eq!(admission.state().streams, 0);
}

#[tokio::test]
async fn a_full_queue_refuses_those_who_ask_for_most() {
    let admission = admission(LIMITS);
    let held = now(&admission, ask(0, 1000));
    let heavy: Vec<_> = (0..4).map(|_| waiting(&admission, ask(1, 100))).collect();
    until_waiting(&admission, 4).await;
    let refused = admission.enter(ask(1, 100)).now_or_never().unwrap().unwrap_err();
    assert_eq!(reason(&refused), (Code::ResourceExhausted, "QUEUE_FULL".into()));
    let light = waiting(&admission, ask(2, 100));
    // The light one has the place of a heavy one.
    while heavy.iter().filter(|heavy| heavy.is_finished()).count() != 1 {
        tokio::task::yield_now().await;
    }
    assert!(!light.is_finished());
    drop(held);
    light.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_turn_that_comes_after_the_deadline_is_refused_at_once() {
    let admission = admission(LIMITS);
    // A thousand rows took ten seconds.
    admission.state().begin(1000);
    admission.state().end(1000, Duration::from_secs(10));
    let _held = now(&admission, ask(0, 1000));
    let _waits = waiting(&admission, ask(0, 500));
    until_waiting(&admission, 1).await;
    let within = |seconds| Ask { deadline: Some(Instant::now() + Duration::from_secs(seconds)), ..ask(0, 1) };
    // An earlier deadline goes first, so it is none of the line's that makes it wait.
    let urgent = Ask { priority: -1, ..within(4) };
    let refused = admission.enter(urgent).now_or_never().unwrap().unwrap_err();
    assert_eq!(reason(&refused), (Code::ResourceExhausted, "DEADLINE_UNREACHABLE".into()));
    let after = refused.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert_eq!(after, Duration::from_secs(5));
    assert!(admission.enter(Ask { priority: -1, ..within(6) }).now_or_never().is_none(), "it waits");
    assert!(admission.enter(within(4)).now_or_never().is_none(), "it waits");
}

#[tokio::test]
async fn nobody_waits_longer_than_the_limit() {
    let limits = Limits { queue_wait: Duration::from_millis(30), ..LIMITS };
    let admission = admission(limits);
    let _held = now(&admission, ask(0, 1000));
    let began = Instant::now();
    let refused = admission.enter(ask(0, 1)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::ResourceExhausted, "QUEUE_TIMEOUT".into()));
    assert!(began.elapsed() >= limits.queue_wait && admission.state().waiting.len() == 0);
}

#[tokio::test]
async fn closing_refuses_who_waits_and_lets_finish_what_has_begun() {
    let admission = admission(Limits { streams_max: 1, ..LIMITS });
    let held = now(&admission, ask(0, 1));
    let refused = admission.enter(Ask { begun: true, ..ask(0, 1) }).now_or_never().unwrap().unwrap_err();
    assert_eq!(reason(&refused), (Code::ResourceExhausted, "TOO_MANY_STREAMS".into()));
    let waits = waiting(&admission, ask(0, 1));
    until_waiting(&admission, 1).await;
    admission.close();
    assert_eq!(reason(&waits.await.unwrap().unwrap_err()), (Code::Unavailable, "GATEWAY_STOPPING".into()));
    assert_eq!(admission.enter(ask(0, 1)).await.unwrap_err().code(), Code::Unavailable);
    assert!(admission.emptied().now_or_never().is_none());
    drop(held);
    admission.emptied().await;
}
