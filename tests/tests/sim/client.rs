//! Clients: drawn requests, and what must hold for each whatever happens in between.

use crate::network::{self, HostId, Network};
use crate::trace;
use rand::{Rng as _, rngs::StdRng};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use unmask_engine::Reason;
use unmask_proto::v1::generate_request::Input;
use unmask_proto::v1::generate_response::Event;
use unmask_proto::v1::inference_service_client::InferenceServiceClient;
use unmask_proto::v1::policy::{Kind, Threshold};
use unmask_proto::v1::{
    Decoding, FinishReason, GenerateRequest, Policy, ResolvedSettings, Resume, RunRequest, Started, TokenIds,
};
use unmask_worker::simulated::Loaded;

/// A request is over at its deadline, or so much later: a gateway that hangs is noticed by pings.
const SLACK: Duration = Duration::from_secs(6);
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
const PING: Duration = Duration::from_secs(1);
/// Pause before a refused request is made again.
const PAUSE: Duration = Duration::from_millis(400);

/// What a client wants.
#[derive(Debug, Clone)]
pub struct Wish {
    pub number: usize,
    pub at: Duration,
    pub prompt: Vec<u32>,
    pub decoding: Decoding,
    pub priority: i32,
    pub drafts: bool,
    pub deadline: Duration,
    /// The client goes after so many tokens.
    pub leave_after: Option<usize>,
    /// Made while nothing is wrong, or with somewhere to go: its first stream must reach its end.
    pub sure: bool,
    /// It cannot be served.
    pub bad: bool,
    /// Draws of the client's own.
    pub dice: u64,
}

impl Wish {
    pub fn draw(number: usize, at: Duration, dice: &mut StdRng) -> Self {
        let prompt = (0..dice.random_range(1..24)).map(|_| dice.random_range(20..280)).collect();
        let tau = [0.2, 0.5, 0.8][dice.random_range(0..3)];
        let named = dice.random_bool(0.2).then_some(Policy { kind: Some(Kind::Threshold(Threshold { tau })) });
        let warm = dice.random_bool(0.6);
        let decoding = Decoding {
            max_tokens: Some(dice.random_range(1..100)),
            policy: named,
            temperature: Some(if warm { 0.9 } else { 0.0 }),
            seed: dice.random_bool(0.7).then(|| dice.random_range(0..1000)),
            ..Decoding::default()
        };
        let short = dice.random_bool(0.1);
        Self {
            number,
            at,
            prompt,
            decoding,
            priority: if dice.random_bool(0.2) { dice.random_range(-3..4) } else { 0 },
            drafts: dice.random_bool(0.2),
            deadline: Duration::from_millis(if short { dice.random_range(100..1500) } else { 30_000 }),
            leave_after: dice.random_bool(0.12).then(|| dice.random_range(0..40)),
            sure: false,
            bad: false,
            dice: dice.random(),
        }
    }
}

type Known = BTreeMap<String, Option<(Vec<u32>, Reason)>>;

/// What clients of one world share.
#[derive(Clone)]
pub struct Clients {
    pub loaded: Loaded,
    pub network: Network,
    pub host: HostId,
    pub gateways: Vec<HostId>,
    /// Undisturbed runs.
    known: Arc<Mutex<Known>>,
}

/// How one stream of a request ended; one that broke goes on in another.
enum End {
    Done(&'static str),
    Refused(Status),
    Broke(Status),
}

/// One request's state over all its streams.
struct Asking {
    clients: Clients,
    wish: Wish,
    name: String,
    settings: Option<ResolvedSettings>,
    tokens: Vec<u32>,
    passes: Vec<(usize, u32)>,
    expected: Option<(Vec<u32>, Reason)>,
    began: Instant,
    dice: StdRng,
}

impl Clients {
    pub fn new(loaded: Loaded, network: Network, host: HostId, gateways: Vec<HostId>) -> Self {
        Self { loaded, network, host, gateways, known: Arc::default() }
    }

    /// The undisturbed run of a request.
    fn alone(&self, prompt: &[u32], settings: &ResolvedSettings) -> Option<(Vec<u32>, Reason)> {
        let settings = ResolvedSettings { origins: Default::default(), policy_revision: 0, ..settings.clone() };
        let key = format!("{prompt:?} {settings:?}");
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let run = || {
            let settings = Some(ResolvedSettings { time_limit_ms: 0, ..settings });
            self.loaded.alone(RunRequest { prompt_ids: prompt.to_vec(), settings, ..RunRequest::default() })
        };
        known.entry(key).or_insert_with(run).clone()
    }

    /// Makes a request and sees it through.
    pub async fn ask(self, wish: Wish) {
        sleep(wish.at).await;
        use rand::SeedableRng as _;
        let dice = StdRng::seed_from_u64(wish.dice);
        let name = format!("request-{}", wish.number);
        trace::add("client asks", vec![("request", name.clone()), ("sure", wish.sure.to_string())]);
        let mut asking = Asking {
            clients: self,
            name: name.clone(),
            settings: None,
            tokens: Vec::new(),
            passes: Vec::new(),
            expected: None,
            began: Instant::now(),
            dice,
            wish,
        };
        let limit = asking.wish.deadline + SLACK;
        let how = match timeout(limit, asking.see_through()).await {
            Ok(how) => how,
            Err(_) => {
                trace::violation(format!("I6: {name} has no end {limit:?} after it was made"));
                "none"
            }
        };
        if asking.wish.sure && how != "finished" {
            trace::violation(format!("{} had to succeed, and did not: {how}", asking.name));
        }
        let tokens = asking.tokens.len().to_string();
        trace::add("client is done", vec![("request", name), ("how", how.into()), ("tokens", tokens)]);
    }
}

impl Asking {
    fn left(&self) -> Duration {
        self.wish.deadline.saturating_sub(self.began.elapsed())
    }

    async fn see_through(&mut self) -> &'static str {
        let gateways = self.clients.gateways.clone();
        let first = self.dice.random_range(0..gateways.len());
        for attempt in 0.. {
            let gateway = gateways[(first + attempt) % gateways.len()];
            let status = match self.stream(gateway).await {
                End::Done(how) => return how,
                End::Broke(status) | End::Refused(status) => status,
            };
            let fields = vec![("request", self.name.clone()), ("status", status.message().to_owned())];
            trace::add("client tries again", fields);
            if self.wish.sure {
                return "failed";
            }
            if self.left().is_zero() {
                return "deadline";
            }
            self.forget_some();
            sleep(PAUSE).await;
        }
        "never"
    }

    /// A client that went away may have lost the last it received.
    fn forget_some(&mut self) {
        if self.dice.random_bool(0.5) && !self.tokens.is_empty() {
            let kept = self.tokens.len() - self.dice.random_range(0..self.tokens.len().min(6));
            self.tokens.truncate(kept);
        }
    }

    fn request(&self) -> GenerateRequest {
        let received = self.tokens.len();
        let passes_used = self.passes.iter().filter(|(end, _)| *end <= received).map(|(_, steps)| steps).sum();
        let resume = self.settings.clone().map(|settings| Resume {
            request_id: self.name.clone(),
            received_token_ids: self.tokens.clone(),
            settings: Some(settings),
            passes_used,
            numerics_id: String::new(),
        });
        GenerateRequest {
            input: Some(Input::TokenIds(TokenIds { ids: self.wish.prompt.clone() })),
            decoding: resume.is_none().then(|| self.wish.decoding.clone()),
            stream_drafts: self.wish.drafts,
            priority: Some(self.wish.priority),
            resume,
            ..GenerateRequest::default()
        }
    }

    async fn stream(&mut self, gateway: HostId) -> End {
        let endpoint = Endpoint::from_shared(format!("http://{}", network::address(gateway)))
            .unwrap()
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            // Else a stream whose client has been dropped counts as idle, and a gateway that hangs is not noticed.
            .keep_alive_while_idle(true);
        let network = self.clients.network.of(self.clients.host);
        let channel = match timeout(CONNECT_LIMIT, network.connect(&endpoint)).await {
            Ok(Ok(channel)) => channel,
            _ => return End::Refused(Status::unavailable("no gateway there")),
        };
        let mut request = Request::new(self.request());
        request.set_timeout(self.left());
        let mut events = match InferenceServiceClient::new(channel).generate(request).await {
            Ok(events) => events.into_inner(),
            Err(status) => return self.judge(status, false),
        };
        let mut next = self.wish.prompt.len() + self.tokens.len();
        loop {
            match events.message().await {
                Ok(Some(response)) => match response.event {
                    Some(Event::Started(started)) => self.started(started),
                    Some(Event::Commit(commit)) => {
                        if commit.first_position as usize != next {
                            let (name, at) = (&self.name, commit.first_position);
                            trace::violation(format!("I5: {name} got position {at}, expected {next}"));
                        }
                        next = commit.first_position as usize + commit.token_ids.len();
                        self.tokens.extend(commit.token_ids);
                        self.passes.push((self.tokens.len(), commit.steps));
                        self.compare();
                        if self.wish.leave_after.is_some_and(|after| self.tokens.len() > after) {
                            return End::Done("left");
                        }
                    }
                    Some(Event::Finish(finish)) => return self.finished(finish.reason()),
                    Some(Event::Draft(_)) | None => {}
                },
                Ok(None) => {
                    trace::violation(format!("I6: the stream of {} ended without a Finish", self.name));
                    return End::Done("no finish");
                }
                Err(status) => return self.judge(status, true),
            }
        }
    }

    fn started(&mut self, started: Started) {
        let Some(settings) = started.settings else { return };
        let (block, number) = (settings.block_size.to_string(), self.wish.number.to_string());
        let request = started.request_id.clone();
        trace::add("client started", vec![("number", number), ("request_id", request), ("block", block)]);
        if let Some(before) = &self.settings
            && (before.policy != settings.policy || before.block_size != settings.block_size)
        {
            trace::violation(format!("{} got other settings when it was resumed", self.name));
        }
        self.name = started.request_id;
        self.expected = self.clients.alone(&self.wish.prompt, &settings);
        self.settings = Some(settings);
    }

    /// I1: what there is so far is what an engine alone would give.
    fn compare(&self) {
        let Some((expected, _)) = &self.expected else { return };
        if !expected.starts_with(&self.tokens) {
            let at = expected.iter().zip(&self.tokens).position(|(a, b)| a != b);
            let (had, wanted) = (self.tokens.len(), expected.len());
            trace::violation(format!("I1: {} has other tokens from {at:?} on ({had} of {wanted})", self.name));
        }
    }

    fn finished(&mut self, reason: FinishReason) -> End {
        let expected = self.expected.as_ref().map_or(0, |(tokens, _)| tokens.len());
        let whole = reason == FinishReason::TimeLimit || expected == self.tokens.len();
        if !whole {
            let (name, tokens) = (&self.name, self.tokens.len());
            trace::violation(format!("I1: {name} finished with {tokens} of {expected} tokens ({reason:?})"));
        }
        End::Done("finished")
    }

    /// Whether an error is one that may be.
    fn judge(&mut self, status: Status, begun: bool) -> End {
        let why = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
        let late = self.left() <= crate::host::TICK * 4;
        let named = !why.is_empty();
        trace::add(
            "client error",
            vec![("request", self.name.clone()), ("code", format!("{:?}", status.code())), ("why", why.clone())],
        );
        match status.code() {
            Code::DeadlineExceeded | Code::Cancelled if late => return End::Done("deadline"),
            Code::InvalidArgument | Code::NotFound | Code::ResourceExhausted if self.wish.bad => {
                return End::Done("refused");
            }
            Code::InvalidArgument | Code::Internal | Code::Aborted | Code::OutOfRange | Code::DeadlineExceeded
                if named =>
            {
                trace::violation(format!("{} failed ({begun}): {status}", self.name));
                return End::Done("failed");
            }
            _ => {}
        }
        if begun && named && matches!(why.as_str(), "GROUP_LOST" | "NO_GROUP") {
            trace::add("client lost its stream", vec![("request_id", self.name.clone()), ("why", why)]);
        }
        if begun || self.settings.is_some() { End::Broke(status) } else { End::Refused(status) }
    }
}
