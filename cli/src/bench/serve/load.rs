//! Puts load on a gateway and records what comes back.

use super::args::REQUESTS_MAX;
use super::observe::{Observation, Outcome, observe};
use super::progress::Progress;
use super::schedule::{Extent, Schedule};
use super::summary::{Ended, Load, Recording};
use super::target::Target;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

/// Committed blocks kept of one load point; it ends above that.
const BLOCKS_MAX: usize = 2_000_000;
/// Arrivals that wait for the loop below. When it is later than that the pacer waits too, and the lag is reported.
const ARRIVALS_QUEUED_MAX: usize = 1024;
/// From making a schedule to its time zero.
const LEAD: Duration = Duration::from_millis(10);
/// Longest sleep of the pacer before it looks whether anybody listens.
const LOOK: Duration = Duration::from_millis(100);
/// A stream of a closed loop waits so long after a failure: failures come back at once.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);

/// What is under way at one load point.
struct Run<'a> {
    target: &'a Target,
    begin: Instant,
    /// Ends every open request.
    cut: CancellationToken,
    open: JoinSet<Observation>,
    seen: Vec<Observation>,
    blocks: usize,
    shed: u64,
    ended: Ended,
    progress: Progress,
}

/// Starts every request of `schedule` when it is due. An arrival that finds `concurrency_max` open is shed.
pub async fn open(
    target: &Target,
    load: Load,
    schedule: &Schedule,
    concurrency_max: usize,
    stop: &CancellationToken,
    progress: Progress,
) -> Recording {
    let mut run = Run::new(target, Instant::now() + LEAD, progress);
    let mut due = pace(run.begin, schedule.starts.clone());
    let mut arriving = true;
    let mut span = schedule.span;
    while arriving || !run.open.is_empty() {
        tokio::select! {
            biased;
            () = stop.cancelled(), if run.ended == Ended::Complete => run.end(Ended::Interrupted),
            // Before arrivals: who has ended is no longer open.
            Some(done) = run.open.join_next(), if !run.open.is_empty() => run.record(done),
            arrival = due.recv(), if arriving => match arrival {
                Some((index, intended)) if run.open.len() < concurrency_max => run.launch(index, intended, Duration::ZERO),
                Some(_) => run.shed(),
                None => arriving = false,
            },
        }
        if arriving && run.ended != Ended::Complete {
            arriving = false;
            span = span.min(run.begin.elapsed());
        }
    }
    run.into_recording(load, span)
}

/// Keeps `streams` requests open until `extent` is reached; what is open at the end of a duration is cut off.
pub async fn closed(
    target: &Target,
    load: Load,
    streams: usize,
    extent: Extent,
    stop: &CancellationToken,
    progress: Progress,
) -> Recording {
    let mut run = Run::new(target, Instant::now(), progress);
    let (quota, window) = match extent {
        Extent::Requests(count) => (count, None),
        Extent::Duration(window) => (REQUESTS_MAX, Some(window)),
    };
    let over = tokio::time::sleep(window.unwrap_or_default());
    tokio::pin!(over);
    let mut next = 0;
    let mut asking = true;
    while asking || !run.open.is_empty() {
        while asking && run.open.len() < streams {
            run.launch(next, run.begin.elapsed(), FAILURE_PAUSE);
            next += 1;
            asking = next < quota;
        }
        tokio::select! {
            biased;
            () = stop.cancelled(), if run.ended == Ended::Complete => run.end(Ended::Interrupted),
            () = &mut over, if window.is_some() && !run.cut.is_cancelled() => run.end(Ended::Complete),
            Some(done) = run.open.join_next(), if !run.open.is_empty() => run.record(done),
        }
        asking &= !run.cut.is_cancelled();
    }
    let span = window.unwrap_or_default().min(run.begin.elapsed());
    if window.is_some() && next == quota {
        run.ended = Ended::SampleLimit;
    }
    run.into_recording(load, span)
}

/// Gives every index with its start when it is due. On a thread of its own: the runtime's timer counts in milliseconds.
fn pace(begin: Instant, starts: Vec<Duration>) -> mpsc::Receiver<(u64, Duration)> {
    let (send, receive) = mpsc::channel(ARRIVALS_QUEUED_MAX);
    tokio::task::spawn_blocking(move || {
        for (index, start) in (0u64..).zip(starts) {
            loop {
                let left = (begin + start).saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                if send.is_closed() {
                    return;
                }
                std::thread::sleep(left.min(LOOK));
            }
            if send.blocking_send((index, start)).is_err() {
                return;
            }
        }
    });
    receive
}

impl<'a> Run<'a> {
    fn new(target: &'a Target, begin: Instant, progress: Progress) -> Self {
        Self {
            target,
            begin,
            cut: CancellationToken::new(),
            open: JoinSet::new(),
            seen: Vec::new(),
            blocks: 0,
            shed: 0,
            ended: Ended::Complete,
            progress,
        }
    }

    fn launch(&mut self, index: u64, intended: Duration, failure_pause: Duration) {
        let asked = self.target.ask(index);
        let (begin, cut) = (self.begin, self.cut.clone());
        self.open.spawn(async move {
            let seen = observe(asked, begin, intended, cut).await;
            if matches!(seen.outcome, Outcome::Failed { .. }) {
                tokio::time::sleep(failure_pause).await;
            }
            seen
        });
        self.progress.sent(self.open.len());
    }

    fn shed(&mut self) {
        self.shed += 1;
        self.progress.shed();
    }

    fn record(&mut self, done: Result<Observation, JoinError>) {
        let seen = match done.map_err(JoinError::try_into_panic) {
            Ok(seen) => seen,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // Nobody aborts these tasks but the runtime at its end.
            Err(Err(_)) => return,
        };
        self.progress.ended(&seen.outcome, self.open.len());
        self.blocks += seen.blocks.len();
        self.seen.push(seen);
        if self.blocks > BLOCKS_MAX && !self.cut.is_cancelled() {
            self.end(Ended::SampleLimit);
        }
    }

    fn end(&mut self, why: Ended) {
        self.ended = why;
        self.cut.cancel();
    }

    fn into_recording(self, load: Load, span: Duration) -> Recording {
        self.progress.clear();
        Recording { load, observations: self.seen, shed: self.shed, span, ended: self.ended }
    }
}
