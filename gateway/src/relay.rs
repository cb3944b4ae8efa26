//! One request's stream from a worker to its client; on to another group when the worker breaks.

use crate::admission::Ticket;
use crate::affinity::Prefix;
use crate::route::{Lease, Route};
use crate::routes::RETRY_AFTER;
use crate::stream::Assembler;
use crate::upstream::{Method, Upstream, Verdict, forward, judge};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};
use unmask_proto::failpoints::{Bug, planted};
use unmask_proto::rich;
use unmask_proto::v1::run_response::Event as WorkerEvent;
use unmask_proto::v1::{
    DraftText, Finish, FinishReason, GenerateResponse, ModelDescriptor, OpeningPlace, ResolvedSettings, RunRequest,
    RunResponse, Started, Usage, generate_response::Event,
};

/// Events a client may leave unread before its stream pauses.
pub(crate) const EVENTS_MAX: usize = 32;
/// Most groups that take one request and break without a new token in between: the request may be what breaks them.
const ATTEMPTS_MAX: u32 = 3;
/// Most groups that are asked before a stream begins, when the last one had no room. Where they break, time is the limit.
const OPENINGS_MAX: u32 = 3;
/// Longest wait for another group when none is left; then those that failed are tried again.
const REROUTE_WAIT: Duration = Duration::from_millis(500);

/// What timers may be early or late by.
const CLOCK_TICK: Duration = Duration::from_millis(1);
/// How much later than the time limit the gateway ends a stream whose worker has not.
const TIME_LIMIT_GRACE: Duration = Duration::from_millis(250);

/// What stays the same wherever a request runs.
pub(crate) struct Job {
    pub method: Method,
    pub request_id: String,
    pub model: Arc<ModelDescriptor>,
    pub prompt: Vec<u32>,
    /// What stands behind the output.
    pub suffix: Vec<u32>,
    /// How the output must begin.
    pub opening: Vec<OpeningPlace>,
    pub settings: ResolvedSettings,
    /// A text to edit.
    pub draft: Option<DraftText>,
    pub drafts: bool,
    pub priority: i32,
    pub salt: u64,
    pub arrived: Instant,
    pub deadline: Option<Instant>,
}

impl Job {
    /// Tokens that are read.
    fn prompt_tokens(&self) -> u32 {
        (self.prompt.len() + self.suffix.len()) as u32
    }

    /// When its time is over.
    pub(crate) fn time_limit(&self) -> Option<Instant> {
        let limit = self.settings.time_limit_ms;
        // A limit that no clock reaches is none.
        (limit > 0).then(|| self.arrived.checked_add(Duration::from_millis(limit))).flatten()
    }

    /// Positions in all.
    pub(crate) fn positions(&self) -> u64 {
        u64::from(self.prompt_tokens()) + u64::from(self.settings.max_tokens)
    }
}

/// The client's side of a stream.
pub(crate) struct Client {
    pub events: mpsc::Sender<Result<GenerateResponse, Status>>,
    /// A client that takes nothing for this long is given up.
    pub stall_limit: Duration,
    /// How long the stream waits for a group when it has none.
    pub group_wait: Duration,
    /// The gateway ends.
    pub stop: CancellationToken,
    /// Count the stream for as long as it lasts: the gateway's, and its tenant's where it has a limit.
    pub _permits: (Ticket, Option<OwnedSemaphorePermit>),
}

impl Client {
    async fn send(&self, event: Event) -> Result<(), Status> {
        let sent = timeout(self.stall_limit, self.events.send(Ok(GenerateResponse { event: Some(event) }))).await;
        // A closed channel is noticed by whoever drives the stream.
        sent.map(|_| ()).map_err(|_| {
            let message = format!("the client has taken nothing for {} s", self.stall_limit.as_secs());
            rich::status(Code::Aborted, "READER_STALLED", message)
        })
    }
}

/// A request on its way.
pub(crate) struct Relay {
    upstream: Arc<Upstream>,
    job: Job,
    assembler: Assembler,
    prefix: Option<Prefix>,
    /// Groups, with their epochs, that broke or were busy.
    failed: Vec<(String, u64)>,
    /// Groups that took the request since the last new token.
    attempts: u32,
    /// How long it waits for a group when it has none.
    patience: Duration,
    /// The client has heard of it.
    begun: bool,
    /// When it lost its group, until the next new token.
    lost: Option<Instant>,
    blocks_recomputed: u32,
    first_block: Option<Duration>,
    /// The work that the present group holds.
    lease: Option<Lease>,
    /// The present group.
    current: Option<Arc<Route>>,
}

impl Relay {
    /// A request that has not begun, and waits `patience` for a group that takes it.
    pub(crate) fn new(upstream: Arc<Upstream>, job: Job, assembler: Assembler, patience: Duration) -> Self {
        // A text to edit is cached nowhere.
        let prefix = Prefix::of(job.salt, &job.prompt);
        Self {
            prefix,
            upstream,
            job,
            assembler,
            failed: Vec::new(),
            attempts: 0,
            patience,
            begun: false,
            lost: None,
            blocks_recomputed: 0,
            first_block: None,
            lease: None,
            current: None,
        }
    }

    /// The first event of every stream.
    pub(crate) fn started(&self) -> Event {
        Event::Started(Started {
            request_id: self.job.request_id.clone(),
            model: self.job.model.name.clone(),
            prompt_tokens: self.job.prompt_tokens(),
            first_position: self.job.prompt.len() as u32,
            settings: Some(self.job.settings.clone()),
            numerics_id: self.job.model.numerics_id.clone(),
        })
    }

    /// Submits the request, with what the client already has, to a group; to others when that breaks.
    ///
    /// # Errors
    /// What the last group said, or UNAVAILABLE when there is none.
    pub(crate) async fn open(&mut self) -> Result<Streaming<RunResponse>, Status> {
        let mut last = None;
        for opening in 1.. {
            let route = self.route(last.as_ref()).await?;
            self.current = Some(Arc::clone(&route));
            let message = self.message(&route);
            self.lease = Some(route.lease(self.job.positions().saturating_sub(message.committed_ids.len() as u64)));
            let recomputed = message.committed_ids.len() as u32 / self.job.settings.block_size.max(1);
            let asked = Instant::now();
            let opened = self.upstream.workers.run(&route, &self.upstream.routes, message, self.job.deadline).await;
            let status = match opened {
                Ok(stream) => {
                    route.took(asked.elapsed(), Instant::now().into_std());
                    let (request_id, group, epoch) = (&self.job.request_id, &route.group, route.epoch);
                    tracing::debug!(request_id, group, epoch, tokens = self.assembler.ids().len(), "runs at");
                    self.blocks_recomputed += recomputed;
                    self.attempts += 1;
                    return Ok(stream);
                }
                Err(status) => status,
            };
            if self.job.deadline.is_some_and(|deadline| deadline <= Instant::now() + CLOCK_TICK) {
                // Its own deadline ended the call: nothing is known of the group.
                self.lease = None;
                return Err(deadline_passed());
            }
            let verdict = judge(&status);
            if verdict != Verdict::Broken {
                // A refusal is an answer.
                route.answered();
            }
            if verdict == Verdict::Final {
                return Err(forward(&status, self.job.method));
            }
            self.give_up_group(verdict, &status);
            if self.left().is_zero() || (!self.begun && verdict == Verdict::Busy && opening >= OPENINGS_MAX) {
                return Err(lost(verdict, &status, self.job.method));
            }
            self.spend_retry(&status)?;
            last = Some((verdict, status));
        }
        Err(lost(Verdict::Broken, &Status::unavailable("too many groups were asked"), self.job.method))
    }

    /// Submitting again spends from the gateway's budget. A stream that has begun goes on all the same.
    fn spend_retry(&self, last: &Status) -> Result<(), Status> {
        let spent = self.upstream.retries().withdraw(Instant::now().into_std());
        if spent || self.begun {
            return Ok(());
        }
        let message = format!("too many requests go elsewhere already; a group said: {}", last.message());
        Err(rich::retryable(Code::Unavailable, "RETRY_BUDGET", message, RETRY_AFTER))
    }

    fn give_up_group(&mut self, verdict: Verdict, status: &Status) {
        self.lease = None;
        self.lost.get_or_insert_with(Instant::now);
        let Some(route) = self.current.take() else { return };
        if verdict == Verdict::Broken {
            route.broke();
        }
        let (request_id, tokens, group, epoch) =
            (&self.job.request_id, self.assembler.ids().len(), &route.group, route.epoch);
        tracing::warn!(request_id, group, epoch, tokens, %status, "going on elsewhere");
        self.failed.push((group.clone(), epoch));
    }

    /// How much longer it waits for a group.
    fn left(&self) -> Duration {
        let waited = self.lost.map_or(Duration::ZERO, |since| since.elapsed());
        self.patience.saturating_sub(waited)
    }

    /// A group with the same tokens (numerics and tokenizer) that reads all of the request and has not failed yet. When
    /// there is none, waits for one, then forgives those that failed.
    async fn route(&mut self, last: Option<&(Verdict, Status)>) -> Result<Arc<Route>, Status> {
        let model = Arc::clone(&self.job.model);
        let between = !self.job.suffix.is_empty();
        let same = |route: &Route| {
            (!between || route.model.capabilities.is_some_and(|can| can.infill_by_masks))
                && route.model.name == model.name
                && route.model.numerics_id == model.numerics_id
                && route.model.tokenizer_digest == model.tokenizer_digest
        };
        let failed = std::mem::take(&mut self.failed);
        let fresh = |route: &Route| same(route) && !failed.iter().any(|(g, e)| *g == route.group && *e == route.epoch);
        let mut tables = self.upstream.routes.watch();
        let now = tables.borrow_and_update().pick(Instant::now().into_std(), self.prefix, fresh);
        let left = self.left();
        if let (None, Some((Verdict::Busy, status)), false) = (&now, last, self.begun) {
            return Err(forward(status, self.job.method));
        }
        if now.is_none() {
            let wait = tables.wait_for(|table| table.routes.iter().any(|route| fresh(route)));
            // Whether it came or not, the table is asked again.
            let _ = timeout(REROUTE_WAIT, wait).await;
        }
        if let Some(route) =
            now.or_else(|| self.upstream.routes.table().pick(Instant::now().into_std(), self.prefix, fresh))
        {
            self.failed = failed;
            return Ok(route);
        }
        let wait = tables.wait_for(|table| table.routes.iter().any(|route| same(route)));
        let _ = timeout(left, wait).await;
        self.upstream.routes.table().pick(Instant::now().into_std(), self.prefix, same).ok_or_else(|| {
            let message = format!("model `{}` has no ready group at present", model.name);
            rich::retryable(Code::Unavailable, "NO_GROUP", message, RETRY_AFTER)
        })
    }

    fn message(&self, route: &Route) -> RunRequest {
        let mut settings = self.job.settings.clone();
        if settings.time_limit_ms > 0 {
            let elapsed = self.job.arrived.elapsed().as_millis() as u64;
            settings.time_limit_ms = settings.time_limit_ms.saturating_sub(elapsed).max(1);
        }
        let goes_on = !self.assembler.ids().is_empty();
        if planted(Bug::UnpinnedPolicy)
            && goes_on
            && let Some(now) = self.upstream.routes.table().policy(&self.job.model.name)
        {
            (settings.block_size, settings.policy) = (now.block_size, now.policy);
        }
        RunRequest {
            request_id: self.job.request_id.clone(),
            model: self.job.model.name.clone(),
            epoch: route.epoch,
            prompt_ids: self.job.prompt.clone(),
            settings: Some(settings),
            stream_drafts: self.job.drafts,
            priority: self.job.priority,
            cache_salt: self.job.salt,
            committed_ids: self.assembler.ids().to_vec(),
            passes_used: self.assembler.passes(),
            draft: self.job.draft.clone(),
            opening: self.job.opening.clone(),
            suffix_ids: self.job.suffix.clone(),
        }
    }

    /// Why the stream is over already with what the client has, if it is.
    pub(crate) fn over(&self) -> Option<FinishReason> {
        if self.assembler.stopped() {
            return Some(FinishReason::Stop);
        }
        (self.assembler.ids().len() as u64 >= u64::from(self.job.settings.max_tokens)).then_some(FinishReason::Length)
    }

    /// Delivers events until the end, the deadline, the client's going or the gateway's end. Dropping the worker's
    /// stream cancels the request there.
    pub(crate) async fn deliver(mut self, first: Option<Streaming<RunResponse>>, client: Client) {
        let (deadline, request_id) = (self.job.deadline, self.job.request_id.clone());
        let time_limit = self.job.time_limit().map(|limit| limit + TIME_LIMIT_GRACE);
        (self.patience, self.begun) = (client.group_wait, true);
        let end = tokio::select! {
            biased;
            end = self.forward(first, &client) => end,
            () = client.events.closed() => {
                tracing::debug!(request_id, "the client has gone");
                return;
            }
            () = until(deadline) => Err(deadline_passed()),
            () = until(time_limit) => {
                let finish = self.finish(FinishReason::TimeLimit, 0);
                client.send(Event::Finish(finish)).await
            }
            () = client.stop.cancelled() => Err(stopping()),
        };
        tracing::debug!(request_id, tokens = self.assembler.ids().len(), ?end, "stream ended");
        if let Err(status) = end {
            // Fails when the client has gone or takes nothing.
            let _ = timeout(client.stall_limit, client.events.send(Err(status))).await;
        }
    }

    async fn forward(&mut self, first: Option<Streaming<RunResponse>>, client: &Client) -> Result<(), Status> {
        let Some(mut worker) = first else {
            let finish = self.finish(self.over().unwrap_or_default(), 0);
            return client.send(Event::Finish(finish)).await;
        };
        loop {
            let status = match worker.message().await {
                Ok(Some(RunResponse { event: Some(event) })) => match self.take(event, client).await? {
                    ControlFlow::Continue(()) => continue,
                    ControlFlow::Break(()) => return Ok(()),
                },
                // An event that this version does not know.
                Ok(Some(RunResponse { event: None })) => continue,
                Ok(None) => Status::unavailable("the worker ended its stream early"),
                Err(status) => status,
            };
            let verdict = judge(&status);
            if verdict == Verdict::Final {
                return Err(forward(&status, self.job.method));
            }
            self.give_up_group(verdict, &status);
            if let Some(reason) = self.over() {
                let finish = self.finish(reason, 0);
                return client.send(Event::Finish(finish)).await;
            }
            if self.attempts >= ATTEMPTS_MAX {
                return Err(lost(Verdict::Broken, &status, self.job.method));
            }
            self.spend_retry(&status)?;
            worker = self.open().await?;
        }
    }

    async fn take(&mut self, event: WorkerEvent, client: &Client) -> Result<ControlFlow<()>, Status> {
        match event {
            WorkerEvent::Draft(draft) => {
                if let (Some(draft), true) = (self.assembler.draft(draft), self.job.drafts) {
                    // Nothing in a draft is final: a client that lags misses some.
                    let event = Some(Event::Draft(draft));
                    let _ = client.events.try_send(Ok(GenerateResponse { event }));
                }
            }
            WorkerEvent::Commit(commit) => {
                let fresh = self.assembler.commit(commit);
                let fresh = fresh.map_err(|gap| rich::status(Code::Internal, "COMMIT_GAP", gap.to_string()))?;
                if let Some(mut commit) = fresh {
                    let (group, epoch) = self.current.as_ref().map_or(("", 0), |route| (&route.group, route.epoch));
                    (commit.group_id, commit.epoch) = (group.to_owned(), epoch);
                    let (request_id, first, tokens) =
                        (&self.job.request_id, commit.first_position, commit.token_ids.len());
                    tracing::trace!(request_id, group, epoch, first, tokens, "commit");
                    (self.attempts, self.lost) = (0, None);
                    self.first_block.get_or_insert_with(|| self.job.arrived.elapsed());
                    client.send(Event::Commit(commit)).await?;
                }
                if self.assembler.stopped() {
                    let finish = self.finish(FinishReason::Stop, 0);
                    client.send(Event::Finish(finish)).await?;
                    return Ok(ControlFlow::Break(()));
                }
            }
            WorkerEvent::Finish(finish) => {
                let finish = self.finish(finish.reason(), finish.nfe);
                client.send(Event::Finish(finish)).await?;
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The end, as the gateway saw it. Passes without a commit are known only to the worker, in `nfe`.
    fn finish(&mut self, reason: FinishReason, nfe: u32) -> Finish {
        let text = self.assembler.finish();
        let usage =
            Usage { prompt_tokens: self.job.prompt_tokens(), completion_tokens: self.assembler.ids().len() as u32 };
        let nfe = nfe.max(self.assembler.passes());
        Finish {
            reason: reason.into(),
            usage: Some(usage),
            nfe,
            tokens_per_forward: if nfe == 0 { 0.0 } else { usage.completion_tokens as f32 / nfe as f32 },
            time_to_first_block_us: self.first_block.unwrap_or_default().as_micros() as u64,
            total_time_us: self.job.arrived.elapsed().as_micros() as u64,
            blocks_recomputed: self.blocks_recomputed,
            policy_revision: self.job.settings.policy_revision,
            text,
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// No group took or kept the request.
fn lost(verdict: Verdict, status: &Status, method: Method) -> Status {
    if verdict == Verdict::Busy {
        return forward(status, method);
    }
    let message = format!("no group could go on with the request; the last one: {}", status.message());
    rich::retryable(Code::Unavailable, "GROUP_LOST", message, RETRY_AFTER)
}

/// The deadline of the call passed.
pub(crate) fn deadline_passed() -> Status {
    rich::status(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", "the deadline of the call passed")
}

/// The gateway ends. A client can resume through another one with what it has.
pub(crate) fn stopping() -> Status {
    let message = "the gateway is stopping: resume elsewhere with the settings of Started and the ids received";
    rich::retryable(Code::Unavailable, "GATEWAY_STOPPING", message, RETRY_AFTER)
}
