//! One request's way back to its reader: a bounded channel, what did not fit, and the clock's part of the report.

use crate::mapping;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tonic::Status;
use unmask_engine::Event;
use unmask_proto::v1::{Commit, Draft, Finish, FinishReason, RunResponse, Usage, run_response};

/// Events one reader may leave unread before its request is paused.
pub(crate) const UNREAD_MAX: usize = 64;

/// The reader's end of a delivery.
pub(crate) struct Reading {
    /// Events in order; closed after the last.
    pub events: mpsc::Receiver<RunResponse>,
    /// How it ended. Without a word, the runner is gone.
    pub end: oneshot::Receiver<Result<(), Status>>,
}

/// What the clock and the wire need to know of a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Terms {
    /// When it came in.
    pub arrived: Instant,
    /// The caller gives up then: DEADLINE_EXCEEDED.
    pub deadline: Option<Instant>,
    /// The request ends then, with what it has: Finish TIME_LIMIT.
    pub time_limit: Option<Instant>,
    /// Position of the first generated token.
    pub begins: u32,
    /// Tokens of prompt and suffix.
    pub prompt_tokens: u32,
    /// Tokens and passes of an earlier run.
    pub committed: u32,
    /// Passes of an earlier run.
    pub passes_used: u32,
    /// Finished blocks of an earlier run, whose keys and values are computed anew.
    pub blocks_recomputed: u32,
    /// Echoed.
    pub policy_revision: u64,
}

/// Whether a reader keeps up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Everything is in the channel.
    Open,
    /// Something does not fit, since then.
    Full(Instant),
}

/// The runner's end of a delivery.
pub(crate) struct Delivery {
    pub terms: Terms,
    events: mpsc::Sender<RunResponse>,
    end: oneshot::Sender<Result<(), Status>>,
    /// What did not fit: at most what one pass causes, since a paused request gets no further pass.
    waiting: VecDeque<RunResponse>,
    flow: Flow,
    first_block: Option<Duration>,
    /// Tokens committed in this run, by their last position.
    last_position: Option<u32>,
    passes: u32,
    /// The last event is in `waiting` or sent.
    finished: bool,
}

impl Delivery {
    /// Both ends.
    pub(crate) fn new(terms: Terms) -> (Self, Reading) {
        let (events, reading) = mpsc::channel(UNREAD_MAX);
        let (end, ended) = oneshot::channel();
        let passes = terms.passes_used;
        let delivery = Self {
            terms,
            events,
            end,
            waiting: VecDeque::new(),
            flow: Flow::Open,
            first_block: None,
            last_position: None,
            passes,
            finished: false,
        };
        (delivery, Reading { events: reading, end: ended })
    }

    /// Whether the reader has gone.
    pub(crate) fn abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Whether the engine has nothing more to say; what waits is still to be read.
    pub(crate) fn finished(&self) -> bool {
        self.finished
    }

    /// Whether everything, the end included, is in the reader's hands.
    pub(crate) fn complete(&self) -> bool {
        self.finished && self.waiting.is_empty()
    }

    /// Whether the reader keeps up.
    pub(crate) fn flow(&self) -> Flow {
        self.flow
    }

    /// Takes an event of the engine.
    pub(crate) fn take(&mut self, event: Event, now: Instant) {
        match event {
            Event::Draft { first_position, tokens, masked, step, .. } => {
                // Nothing in a draft is final: a reader that lags misses some.
                if self.waiting.is_empty() {
                    let draft = Draft { first_position, token_ids: tokens, masked, step, text: String::new() };
                    let _ = self.events.try_send(response(run_response::Event::Draft(draft)));
                }
            }
            Event::Commit { first_position, tokens, steps, .. } => {
                self.first_block.get_or_insert(now - self.terms.arrived);
                self.last_position = (first_position + tokens.len() as u32).checked_sub(1).or(self.last_position);
                self.passes += steps;
                let commit = Commit { first_position, token_ids: tokens, steps, ..Commit::default() };
                self.send(run_response::Event::Commit(commit), now);
            }
            Event::Finished { reason, nfe, prompt_tokens, completion_tokens, .. } => {
                let usage = Usage { prompt_tokens, completion_tokens };
                self.finish(mapping::reason_to(reason), usage, nfe, now);
            }
            // Nobody asks for traces, and what has failed is ended by the runner.
            Event::Trace { .. } | Event::Failed { .. } => {}
        }
    }

    /// Ends the request with what is committed, because its time is over.
    pub(crate) fn time_over(&mut self, now: Instant) {
        let Terms { begins, prompt_tokens, .. } = self.terms;
        let reached = self.last_position.map_or(0, |last| (last + 1).saturating_sub(begins));
        let usage = Usage { prompt_tokens, completion_tokens: reached.max(self.terms.committed) };
        self.finish(FinishReason::TimeLimit, usage, self.passes, now);
    }

    fn finish(&mut self, reason: FinishReason, usage: Usage, nfe: u32, now: Instant) {
        let total = now - self.terms.arrived;
        let finish = Finish {
            reason: reason.into(),
            usage: Some(usage),
            nfe,
            tokens_per_forward: if nfe == 0 { 0.0 } else { usage.completion_tokens as f32 / nfe as f32 },
            time_to_first_block_us: self.first_block.unwrap_or_default().as_micros() as u64,
            total_time_us: total.as_micros() as u64,
            blocks_recomputed: self.terms.blocks_recomputed,
            policy_revision: self.terms.policy_revision,
            text: String::new(),
        };
        self.send(run_response::Event::Finish(finish), now);
        self.finished = true;
    }

    fn send(&mut self, event: run_response::Event, now: Instant) {
        self.waiting.push_back(response(event));
        self.flush(now);
    }

    /// Hands over what fits by now.
    pub(crate) fn flush(&mut self, now: Instant) {
        let before = self.waiting.len();
        while let Some(event) = self.waiting.pop_front() {
            if let Err(refused) = self.events.try_send(event) {
                self.waiting.push_front(refused.into_inner());
                break;
            }
        }
        self.flow = match self.flow {
            _ if self.waiting.is_empty() => Flow::Open,
            // A reader that takes something is slow, not stalled.
            Flow::Full(since) if self.waiting.len() == before => Flow::Full(since),
            _ => Flow::Full(now),
        };
    }

    /// Ends the delivery; `Err` says why nothing more comes.
    pub(crate) fn end(self, result: Result<(), Status>) {
        // A reader that has gone does not care.
        let _ = self.end.send(result);
    }
}

fn response(event: run_response::Event) -> RunResponse {
    RunResponse { event: Some(event) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use unmask_engine::{Reason, RequestId};

    fn terms(now: Instant) -> Terms {
        Terms {
            arrived: now,
            deadline: None,
            time_limit: None,
            begins: 3,
            prompt_tokens: 3,
            committed: 0,
            passes_used: 0,
            blocks_recomputed: 0,
            policy_revision: 7,
        }
    }

    fn commit(first_position: u32) -> Event {
        Event::Commit { id: RequestId(1), first_position, tokens: vec![5; 2], steps: 2 }
    }

    #[test]
    fn what_does_not_fit_waits_in_order_and_the_stall_begins_with_it() {
        let now = Instant::now();
        let (mut delivery, mut reading) = Delivery::new(terms(now));
        for i in 0..UNREAD_MAX as u32 {
            delivery.take(commit(3 + 2 * i), now);
        }
        assert_eq!(delivery.flow(), Flow::Open);
        let later = now + Duration::from_secs(1);
        delivery.take(commit(3 + 2 * UNREAD_MAX as u32), later);
        let end = Event::Finished {
            id: RequestId(1),
            reason: Reason::Length,
            nfe: 130,
            prompt_tokens: 3,
            completion_tokens: 130,
        };
        delivery.take(end, later);
        delivery.flush(later + Duration::from_secs(1));
        assert_eq!(delivery.flow(), Flow::Full(later));
        assert!(delivery.finished() && !delivery.complete());
        let mut seen = Vec::new();
        while let Ok(event) = reading.events.try_recv() {
            seen.push(event);
            delivery.flush(later);
        }
        assert!(delivery.complete());
        assert_eq!(seen.len(), UNREAD_MAX + 2);
        let Some(run_response::Event::Finish(finish)) = seen.pop().unwrap().event else { panic!("Finish comes last") };
        assert_eq!((finish.nfe, finish.policy_revision, finish.tokens_per_forward), (130, 7, 1.0));
        assert_eq!(finish.total_time_us, 1_000_000);
    }

    #[test]
    fn drafts_are_dropped_when_the_reader_lags() {
        let now = Instant::now();
        let (mut delivery, reading) = Delivery::new(terms(now));
        let draft =
            Event::Draft { id: RequestId(1), first_position: 3, tokens: vec![0; 2], masked: vec![true; 2], step: 1 };
        for _ in 0..3 * UNREAD_MAX {
            delivery.take(draft.clone(), now);
        }
        assert_eq!((reading.events.len(), delivery.flow()), (UNREAD_MAX, Flow::Open));
    }

    #[test]
    fn a_passed_time_limit_reports_what_is_committed() {
        let now = Instant::now();
        // Four more tokens stand behind the output.
        let (mut delivery, mut reading) = Delivery::new(Terms { prompt_tokens: 7, ..terms(now) });
        delivery.take(commit(3), now + Duration::from_micros(50));
        delivery.time_over(now + Duration::from_micros(90));
        reading.events.try_recv().unwrap();
        let Some(run_response::Event::Finish(finish)) = reading.events.try_recv().unwrap().event else { panic!() };
        assert_eq!(finish.reason(), FinishReason::TimeLimit);
        assert_eq!(finish.usage.unwrap(), Usage { prompt_tokens: 7, completion_tokens: 2 });
        assert_eq!((finish.time_to_first_block_us, finish.total_time_us, finish.nfe), (50, 90, 2));
    }
}
