//! A worker without an engine: one thread commits blocks of drawn tokens at the times that a table of step times says.

use anyhow::Context;
use futures::channel::mpsc;
use futures::stream::{BoxStream, StreamExt as _};
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use unmask_controller::policy::Profile;
use unmask_proto::v1::run_response::Event;
use unmask_proto::v1::worker_service_server::WorkerService;
use unmask_proto::v1::{
    Commit, FetchTokenizerRequest, FetchTokenizerResponse, Finish, FinishReason, RunRequest, RunResponse,
};

/// Positions of a block.
pub const BLOCK: u32 = 16;
/// Passes of a block, on average; one block takes 1 to twice as many less one.
const PASSES: u64 = 4;
/// Positions of context of a request, as the table has it.
const CONTEXT: f64 = 256.0;
/// Streams at a time, at most.
pub const STREAMS_MAX: usize = 1024;
/// Blocks of a request, at most: what a stream holds unread.
pub const BLOCKS_MAX: u32 = 64;

/// Step times of an accelerator that nobody measured: 5 ms for one block of 16 rows, 50 ms for 512 of them.
const TABLE: &str = r#"{"format":"profile/1","model":"table","numerics_id":"","device":"none","isa":"none","threads":1,
    "dtype":"bf16","kv_type":"bf16","points":[{"rows":16,"context":0,"ms":5.0,"spread":0.0},
    {"rows":8192,"context":0,"ms":50.0,"spread":0.0}]}"#;

/// What a step takes.
pub enum Table {
    /// By rows.
    Times(Box<Profile>),
    /// Nothing: the worker commits as fast as it can.
    Zero,
}

impl Table {
    /// The built-in one.
    ///
    /// # Errors
    /// None: it parses.
    pub fn built_in() -> anyhow::Result<Self> {
        Ok(Table::Times(Profile::parse(TABLE).map(Box::new).context("the built-in table")?))
    }

    fn step(&self, requests: usize) -> Duration {
        let Table::Times(profile) = self else { return Duration::ZERO };
        let rows = requests as f64 * f64::from(BLOCK);
        Duration::try_from_secs_f64(profile.step_ms(rows, CONTEXT) / 1e3).unwrap_or_default()
    }
}

/// What is drawn for a request depends on its seed and on every token of its prompt: a prompt that reached the worker
/// changed gives other tokens.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    key: u64,
    vocabulary: u32,
}

impl Draws {
    /// Of a request.
    pub fn new(seed: u64, prompt: &[u32], vocabulary: u32) -> Self {
        let fold = |key: u64, &id: &u32| mix(key ^ u64::from(id));
        Self { key: prompt.iter().fold(mix(seed), fold), vocabulary: vocabulary.max(1) }
    }

    /// The token at a position.
    pub fn token(&self, position: u32) -> u32 {
        (mix(self.key.wrapping_add(u64::from(position))) % u64::from(self.vocabulary)) as u32
    }

    /// Passes of the block at a position.
    fn passes(&self, position: u32) -> u32 {
        1 + (mix(!self.key.wrapping_add(u64::from(position))) % (2 * PASSES - 1)) as u32
    }
}

/// `SplitMix64` (Steele, Lea, Flood 2014).
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// When the worker sent each block of a request that has finished, by request id.
type Sent = Arc<Mutex<HashMap<String, Vec<Instant>>>>;

/// A request in the worker.
struct Stream {
    id: String,
    draws: Draws,
    /// First position of the open block.
    next: u32,
    end: u32,
    block: u32,
    /// Passes of the open block that are done, and all of them.
    passes: (u32, u32),
    nfe: u32,
    sent: Vec<Instant>,
    events: mpsc::Sender<Result<RunResponse, Status>>,
}

impl Stream {
    /// One pass; whether there is more to do.
    fn pass(&mut self, all: &Sent) -> bool {
        self.passes.0 += 1;
        self.nfe += 1;
        if self.passes.0 < self.passes.1 {
            return true;
        }
        let end = self.end.min(self.next + self.block);
        let token_ids = (self.next..end).map(|position| self.draws.token(position)).collect();
        let commit = Commit { first_position: self.next, token_ids, steps: self.passes.1, ..Commit::default() };
        self.next = end;
        self.passes = (0, self.draws.passes(end));
        self.sent.push(Instant::now());
        let more = self.send(Event::Commit(commit));
        if more && self.next < self.end {
            return true;
        }
        all.lock().unwrap_or_else(PoisonError::into_inner).insert(self.id.clone(), std::mem::take(&mut self.sent));
        self.send(Event::Finish(Finish { reason: FinishReason::Length.into(), nfe: self.nfe, ..Finish::default() }));
        false
    }

    /// Whether somebody still reads. There is room for every event of a request.
    fn send(&mut self, event: Event) -> bool {
        self.events.try_send(Ok(RunResponse { event: Some(event) })).is_ok()
    }
}

/// The service; its clones share one thread, which ends with them.
#[derive(Clone)]
pub struct CostWorker {
    requests: SyncSender<Stream>,
    /// While true, requests start and get no step.
    held: watch::Sender<bool>,
    sent: Sent,
    tokenizer: Arc<FetchTokenizerResponse>,
    vocabulary: u32,
}

impl CostWorker {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(table: Table, tokenizer: FetchTokenizerResponse, vocabulary: u32) -> anyhow::Result<Self> {
        let (requests, queue) = sync_channel(STREAMS_MAX);
        let sent = Sent::default();
        let all = Arc::clone(&sent);
        std::thread::Builder::new().name("cost-table".into()).spawn(move || run(&queue, &table, &all))?;
        Ok(Self { requests, held: watch::Sender::new(false), sent, tokenizer: Arc::new(tokenizer), vocabulary })
    }

    /// Whether requests wait after they have started.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// When the blocks of a request that has finished were sent. Told once.
    pub fn take_sent(&self, request_id: &str) -> Option<Vec<Instant>> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).remove(request_id)
    }
}

/// Steps until nobody can ask any more.
fn run(queue: &Receiver<Stream>, table: &Table, sent: &Sent) {
    let mut active: Vec<Stream> = Vec::new();
    loop {
        if active.is_empty() {
            let Ok(first) = queue.recv() else { return };
            active.push(first);
        }
        let room = STREAMS_MAX.saturating_sub(active.len());
        active.extend(queue.try_iter().take(room));
        let step = table.step(active.len());
        if !step.is_zero() {
            std::thread::sleep(step);
        }
        active.retain_mut(|stream| stream.pass(sent));
    }
}

#[tonic::async_trait]
impl WorkerService for CostWorker {
    type RunStream = BoxStream<'static, Result<RunResponse, Status>>;

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let RunRequest { request_id, prompt_ids, settings, .. } = request.into_inner();
        let settings = settings.ok_or_else(|| Status::invalid_argument("settings: are missing"))?;
        let block = settings.block_size.max(1);
        if settings.max_tokens.div_ceil(block) > BLOCKS_MAX {
            return Err(Status::invalid_argument(format!("settings: more than {BLOCKS_MAX} blocks")));
        }
        let draws = Draws::new(settings.seed, &prompt_ids, self.vocabulary);
        let next = prompt_ids.len() as u32;
        let (events, reading) = mpsc::channel(BLOCKS_MAX as usize + 1);
        let stream = Stream {
            id: request_id,
            draws,
            next,
            end: next + settings.max_tokens,
            block,
            passes: (0, draws.passes(next)),
            nfe: 0,
            sent: Vec::new(),
            events,
        };
        if *self.held.borrow() {
            let (requests, mut held) = (self.requests.clone(), self.held.subscribe());
            tokio::spawn(async move {
                if held.wait_for(|held| !held).await.is_ok() {
                    // Without room or a thread the stream ends early, which its client reports.
                    let _ = requests.try_send(stream);
                }
            });
        } else {
            self.requests.try_send(stream).map_err(|error| match error {
                TrySendError::Full(_) => Status::resource_exhausted(format!("{STREAMS_MAX} requests wait")),
                TrySendError::Disconnected(_) => Status::internal("the thread of the table has ended"),
            })?;
        }
        Ok(Response::new(reading.boxed()))
    }

    async fn fetch_tokenizer(
        &self,
        _: Request<FetchTokenizerRequest>,
    ) -> Result<Response<FetchTokenizerResponse>, Status> {
        Ok(Response::new(FetchTokenizerResponse::clone(&self.tokenizer)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_table_is_linear_in_rows() {
        let table = Table::built_in().unwrap();
        assert_eq!(table.step(1), Duration::from_millis(5));
        assert_eq!(table.step(512), Duration::from_millis(50));
        assert!(table.step(100) < table.step(200));
        assert_eq!(Table::Zero.step(512), Duration::ZERO);
    }

    #[test]
    fn another_prompt_or_seed_gives_other_tokens() {
        let tokens = |seed, prompt: &[u32]| {
            let draws = Draws::new(seed, prompt, 1000);
            (0..16).map(|position| draws.token(position)).collect::<Vec<_>>()
        };
        assert_eq!(tokens(1, &[1, 2]), tokens(1, &[1, 2]));
        for other in [tokens(2, &[1, 2]), tokens(1, &[2, 1]), tokens(1, &[1, 2, 2])] {
            assert_ne!(tokens(1, &[1, 2]), other);
        }
        assert!(tokens(1, &[]).iter().all(|&id| id < 1000));
        let draws = Draws::new(1, &[], 1000);
        let passes: Vec<u32> = (0..1000).map(|position| draws.passes(position)).collect();
        assert!(passes.iter().all(|passes| (1..=7).contains(passes)));
        assert!((passes.iter().sum::<u32>() as f64 / 1e3 - PASSES as f64).abs() < 0.3);
    }
}
