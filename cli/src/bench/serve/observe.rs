//! One request, as its client saw it.

use super::target::Asked;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use unmask_proto::v1::Finish;
use unmask_proto::v1::generate_response::Event;

/// Characters kept of an error's message.
const MESSAGE_CHARS_MAX: usize = 200;

/// A committed block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// When it came, after the beginning of the run.
    pub at: Duration,
    /// Tokens in it.
    pub tokens: u32,
    /// Denoise passes it took.
    pub steps: u32,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// With a finish.
    Finished {
        /// Tokens it generated.
        tokens: u32,
        /// Forward passes it took, prefill excluded.
        passes: u32,
    },
    /// With an error status.
    Failed {
        /// The status as gRPC spells it, or `NO_FINISH` for a stream that just ended.
        code: &'static str,
        /// What the gateway said.
        message: String,
    },
    /// The run ended first.
    CutOff,
}

/// One request. All times are after the beginning of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    /// When it was meant to start; every latency counts from here.
    pub intended: Duration,
    /// When it was sent.
    pub sent: Duration,
    /// What was committed.
    pub blocks: Vec<Block>,
    /// Positions of a block.
    pub block_size: u32,
    /// When it ended.
    pub end: Duration,
    /// How it ended.
    pub outcome: Outcome,
}

impl Observation {
    /// When the first output came: the first block, or a finish without one.
    pub fn first_output(&self) -> Option<Duration> {
        let finish = matches!(self.outcome, Outcome::Finished { .. }).then_some(self.end);
        self.blocks.first().map(|block| block.at).or(finish)
    }

    /// Times between blocks.
    pub fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.blocks.windows(2).map(|pair| pair[1].at.saturating_sub(pair[0].at))
    }
}

/// Sends a request and watches it to its end, to its time limit, or until `cut`.
pub async fn observe(asked: Asked, begin: Instant, intended: Duration, cut: CancellationToken) -> Observation {
    let mut seen = Observation {
        intended,
        sent: begin.elapsed(),
        blocks: Vec::new(),
        block_size: 0,
        end: intended,
        outcome: Outcome::CutOff,
    };
    let late = || failed(code_name(Code::DeadlineExceeded), "no finish in time");
    let followed = tokio::time::timeout(asked.timeout, follow(asked, begin, &mut seen));
    let outcome = tokio::select! {
        followed = followed => followed.unwrap_or_else(|_| late()),
        () = cut.cancelled() => Outcome::CutOff,
    };
    seen.end = begin.elapsed();
    seen.outcome = outcome;
    seen
}

async fn follow(mut asked: Asked, begin: Instant, seen: &mut Observation) -> Outcome {
    let mut request = tonic::Request::new(asked.request);
    request.set_timeout(asked.timeout);
    let mut events = match asked.client.generate(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return failed(code_name(status.code()), status.message()),
    };
    loop {
        match events.message().await {
            Ok(Some(message)) => match message.event {
                Some(Event::Started(started)) => {
                    let settings = started.settings.unwrap_or_default();
                    seen.block_size = settings.block_size;
                    asked.resolved.get_or_init(|| settings);
                }
                Some(Event::Commit(commit)) => {
                    let tokens = commit.token_ids.len() as u32;
                    seen.blocks.push(Block { at: begin.elapsed(), tokens, steps: commit.steps });
                }
                Some(Event::Finish(finish)) => return finished(&finish),
                Some(Event::Draft(_)) | None => {}
            },
            Ok(None) => return failed("NO_FINISH", "the stream ended without a finish"),
            Err(status) => return failed(code_name(status.code()), status.message()),
        }
    }
}

fn finished(finish: &Finish) -> Outcome {
    let tokens = finish.usage.map_or(0, |usage| usage.completion_tokens);
    Outcome::Finished { tokens, passes: finish.nfe }
}

fn failed(code: &'static str, message: &str) -> Outcome {
    let message = message.chars().take(MESSAGE_CHARS_MAX).collect();
    Outcome::Failed { code, message }
}

/// A status as gRPC spells it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
