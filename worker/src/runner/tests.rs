#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;
use crate::delivery::UNREAD_MAX;
use std::path::Path;
use std::sync::OnceLock;
use tonic_types::StatusExt as _;
use unmask_engine::policy::{Comparison, Policy};
use unmask_engine::{Limits, LoadOptions, Manner, Model, Sampling, Settings};
use unmask_proto::v1::{FinishReason, RunResponse, run_response};

const LIMIT: Duration = Duration::from_secs(20);
const PROMPT: u32 = 6;
/// Tokens of a request that outlasts any test.
const ENDLESS: u32 = 30_000;

fn model() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    let load = || {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/sdar");
        Arc::new(Model::load(&dir, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap())
    };
    Arc::clone(MODEL.get_or_init(load))
}

struct Running {
    handle: Handle,
    thread: JoinHandle<()>,
}

fn running(limits: Limits, give_up: Duration) -> Running {
    running_with(limits, Patience { preempt: give_up, give_up })
}

fn running_with(limits: Limits, patience: Patience) -> Running {
    let (handle, thread) = start(Engine::new(model(), limits), patience).unwrap();
    Running { handle, thread }
}

impl Running {
    async fn submit_with(&self, max_tokens: u32, change: impl FnOnce(&mut Terms)) -> Result<Reading, Status> {
        let policy = Policy::Threshold { tau: 0.6, comparison: Comparison::Strict, quota_steps: None };
        let settings = Settings {
            max_tokens,
            block_size: 4,
            policy,
            sampling: Sampling::GREEDY,
            stop_ids: Vec::new(),
            nfe_cap: 0,
            manner: Manner::default(),
        };
        let request = Request::new(self.handle.next_id(), (0..PROMPT).map(|i| 20 + i).collect(), settings);
        let mut terms = Terms {
            arrived: Instant::now(),
            deadline: None,
            time_limit: None,
            begins: PROMPT,
            prompt_tokens: PROMPT,
            committed: 0,
            passes_used: 0,
            blocks_recomputed: 0,
            policy_revision: 0,
        };
        change(&mut terms);
        tokio::time::timeout(LIMIT, self.handle.submit(request, terms)).await.unwrap()
    }

    async fn submit(&self, max_tokens: u32) -> Result<Reading, Status> {
        self.submit_with(max_tokens, |_| {}).await
    }

    /// Waits until the engine's load is as wanted.
    async fn until(&self, wanted: impl FnMut(&Load) -> bool) {
        tokio::time::timeout(LIMIT, self.handle.watch_load().wait_for(wanted)).await.unwrap().unwrap();
    }

    async fn until_empty(&self) {
        self.until(|load| load.active + load.queued == 0 && load.free_pages == load.total_pages).await;
    }

    async fn stop(self) {
        self.handle.stop();
        tokio::task::spawn_blocking(|| self.thread.join().unwrap()).await.unwrap();
    }
}

async fn next(reading: &mut Reading) -> Option<RunResponse> {
    tokio::time::timeout(LIMIT, reading.events.recv()).await.unwrap()
}

async fn end(reading: Reading) -> Result<(), Status> {
    tokio::time::timeout(LIMIT, reading.end).await.unwrap().unwrap()
}

/// Reads to the end; the tokens, and why it ended.
async fn read(mut reading: Reading) -> (Vec<u32>, FinishReason) {
    let (mut tokens, mut reason) = (Vec::new(), None);
    while let Some(response) = next(&mut reading).await {
        assert_eq!(reason, None, "nothing follows Finish");
        match response.event.unwrap() {
            run_response::Event::Commit(commit) => {
                assert_eq!(commit.first_position, PROMPT + tokens.len() as u32, "no gap, no repeat");
                tokens.extend(commit.token_ids);
            }
            run_response::Event::Finish(finish) => {
                assert_eq!(finish.usage.unwrap().completion_tokens as usize, tokens.len());
                assert!(finish.total_time_us >= finish.time_to_first_block_us);
                reason = Some(finish.reason());
            }
            run_response::Event::Draft(_) => panic!("no drafts were asked for"),
        }
    }
    end(reading).await.unwrap();
    (tokens, reason.unwrap())
}

fn reason_of(status: &Status) -> String {
    status.get_details_error_info().unwrap().reason
}

#[tokio::test]
async fn commits_come_in_order_then_finish_and_nothing_is_held() {
    let running = running(Limits { pages: 64, ..Limits::default() }, LIMIT);
    let readings = futures::future::join_all((0..5).map(|_| running.submit(50))).await;
    let answers = futures::future::join_all(readings.into_iter().map(|reading| read(reading.unwrap()))).await;
    assert!(answers.iter().all(|(tokens, reason)| tokens.len() == 50 && *reason == FinishReason::Length));
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]));
    running.until_empty().await;
    running.stop().await;
}

#[tokio::test]
async fn a_dropped_reader_frees_its_pages() {
    let running = running(Limits { pages: 2000, ..Limits::default() }, LIMIT);
    let mut reading = running.submit(ENDLESS).await.unwrap();
    next(&mut reading).await.unwrap();
    assert!(running.handle.load().free_pages < 2000);
    drop(reading);
    running.handle.wake();
    running.until_empty().await;
    running.stop().await;
}

#[tokio::test]
async fn a_slow_reader_pauses_its_own_request_only() {
    let running = running(Limits { pages: 2000, ..Limits::default() }, LIMIT);
    let tokens = 4 * (UNREAD_MAX as u32 + 20);
    let slow = running.submit(tokens).await.unwrap();
    // The slow one fills its channel and stops (what is left of it stays the same) while others go on to their ends.
    let mut left = vec![u64::MAX];
    while left.len() < 3 || left[left.len() - 1] != left[left.len() - 3] {
        assert_eq!(read(running.submit(40).await.unwrap()).await.0.len(), 40);
        running.until(|load| load.active == 1).await;
        left.push(running.handle.load().outstanding_rows);
    }
    assert_eq!(slow.events.len(), UNREAD_MAX);
    assert!(left[left.len() - 1] > 0);
    // Once read again it goes on to its end.
    let (all, reason) = read(slow).await;
    assert_eq!((all.len() as u32, reason), (tokens, FinishReason::Length));
    running.until_empty().await;
    running.stop().await;
}

#[tokio::test]
async fn a_stalled_reader_is_given_up() {
    let running = running(Limits { pages: 2000, ..Limits::default() }, Duration::from_millis(30));
    let mut reading = running.submit(ENDLESS).await.unwrap();
    running.until(|load| load.active == 1).await;
    running.until_empty().await;
    let mut read = 0;
    while next(&mut reading).await.is_some() {
        read += 1;
    }
    assert_eq!(read, UNREAD_MAX);
    let status = end(reading).await.unwrap_err();
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::Aborted, "READER_STALLED"));
    running.stop().await;
}

#[tokio::test]
async fn a_stalled_reader_loses_its_pages_and_gets_them_again_when_it_goes_on() {
    let patience = Patience { preempt: Duration::from_millis(20), give_up: LIMIT };
    let running = running_with(Limits { pages: 2000, ..Limits::default() }, patience);
    let tokens = 4 * (UNREAD_MAX as u32 + 20);
    let slow = running.submit(tokens).await.unwrap();
    running.until(|load| load.preemptions == 1).await;
    running.until(|load| (load.active, load.queued, load.free_pages) == (0, 1, 2000)).await;
    assert_eq!(slow.events.len(), UNREAD_MAX);
    assert_eq!(read(running.submit(40).await.unwrap()).await.0.len(), 40);
    let (all, reason) = read(slow).await;
    assert_eq!((all.len() as u32, reason), (tokens, FinishReason::Length));
    running.until_empty().await;
    running.stop().await;
}

#[tokio::test]
async fn a_full_queue_refuses_and_says_when_to_try_again() {
    let running = running(Limits { pages: 2000, active_max: 1, queue_max: 1, ..Limits::default() }, LIMIT);
    let first = running.submit(ENDLESS).await.unwrap();
    running.until(|load| load.active == 1).await;
    let second = running.submit(10).await.unwrap();
    let status = running.submit(10).await.err().unwrap();
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::ResourceExhausted, "QUEUE_FULL"));
    assert!(status.get_details_retry_info().is_some());
    drop(first);
    running.handle.wake();
    assert_eq!(read(second).await.0.len(), 10);
    let status = running.submit(0).await.err().unwrap();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("settings.max_tokens"), "{}", status.message());
    running.stop().await;
}

#[tokio::test]
async fn a_time_limit_finishes_and_a_deadline_is_an_error() {
    let running = running(Limits { pages: 4000, ..Limits::default() }, LIMIT);
    let soon = Duration::from_millis(30);
    let limited = running.submit_with(ENDLESS, |terms| terms.time_limit = Some(terms.arrived + soon)).await.unwrap();
    let (_, reason) = read(limited).await;
    assert_eq!(reason, FinishReason::TimeLimit);
    let mut late = running.submit_with(ENDLESS, |terms| terms.deadline = Some(terms.arrived + soon)).await.unwrap();
    while next(&mut late).await.is_some() {}
    assert_eq!(end(late).await.unwrap_err().code(), Code::DeadlineExceeded);
    running.until_empty().await;
    running.stop().await;
}

#[tokio::test]
async fn a_panic_ends_what_was_running_and_nothing_after_it() {
    let running = running(Limits { pages: 2000, ..Limits::default() }, LIMIT);
    let mut reading = running.submit(ENDLESS).await.unwrap();
    running.handle.panic();
    while next(&mut reading).await.is_some() {}
    let status = end(reading).await.unwrap_err();
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::Internal, "STEP_PANICKED"));
    running.until_empty().await;
    assert_eq!(read(running.submit(10).await.unwrap()).await.0.len(), 10);
    running.stop().await;
}

#[tokio::test]
async fn stopping_ends_every_request_with_unavailable() {
    let running = running(Limits { pages: 2000, ..Limits::default() }, LIMIT);
    let mut reading = running.submit(ENDLESS).await.unwrap();
    next(&mut reading).await.unwrap();
    let handle = running.handle.clone();
    running.stop().await;
    while next(&mut reading).await.is_some() {}
    assert_eq!(end(reading).await.unwrap_err().code(), Code::Unavailable);
    let terms = Terms {
        arrived: Instant::now(),
        deadline: None,
        time_limit: None,
        begins: 1,
        prompt_tokens: 1,
        committed: 0,
        passes_used: 0,
        blocks_recomputed: 0,
        policy_revision: 0,
    };
    let settings = Settings::new(1, 4, Policy::Autoregressive);
    let request = Request::new(handle.next_id(), vec![1], settings);
    assert_eq!(handle.submit(request, terms).await.err().unwrap().code(), Code::Unavailable);
}
