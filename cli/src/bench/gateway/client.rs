//! Asks over real sockets, through a gateway or the worker itself, and holds every token against what must come.

use super::worker::{BLOCK, CostWorker, Draws};
use crate::bench::serve::prompts::Prompts;
use crate::bench::serve::schedule::Extent;
use crate::local::{Gateway, connect, gateway};
use crate::tls::ClientTlsArgs;
use anyhow::{Context, bail, ensure};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use unmask_proto::v1::generate_request::Input;
use unmask_proto::v1::generate_response::Event;
use unmask_proto::v1::worker_service_client::WorkerServiceClient;
use unmask_proto::v1::{
    Decoding, FinishReason, GenerateRequest, GenerateResponse, ResolvedSettings, RunRequest, RunResponse, run_response,
};
use unmask_text::{Specials, Tokenizer};

/// Streams of one connection, as in `bench serve`.
const STREAMS_PER_CONNECTION: usize = 64;
/// Longest wait for the next event of a stream.
const EVENT_LIMIT: Duration = Duration::from_secs(60);

/// What is asked.
pub struct Questions {
    /// To choose from.
    pub prompts: Prompts,
    /// Of the choice and of the requests' draws.
    pub seed: u64,
    /// Tokens of an answer.
    pub tokens: u32,
    /// Encodes the prompts for the worker, and for what must come.
    pub tokenizer: Arc<Tokenizer>,
}

/// One request.
struct Question {
    text: String,
    ids: Vec<u32>,
    seed: u64,
}

impl Questions {
    fn at(&self, index: u64) -> anyhow::Result<Question> {
        let (text, seed) = self.prompts.pick(self.seed, index);
        let ids = self.tokenizer.encode(text, Specials::AsText, false)?;
        Ok(Question { text: text.to_owned(), ids, seed })
    }
}

/// Where requests go; connections are shared in turn.
#[derive(Clone)]
pub enum Way {
    /// To the worker itself.
    Direct(Vec<WorkerServiceClient<Channel>>),
    /// Through a gateway.
    Gateway(Vec<Gateway>),
}

impl Way {
    /// To a worker, with connections for so many streams.
    ///
    /// # Errors
    /// The address is malformed.
    pub fn direct(address: &str, streams: usize) -> anyhow::Result<Self> {
        let client = |_| Ok(WorkerServiceClient::new(connect(address, &ClientTlsArgs::default())?));
        Ok(Way::Direct(connections(streams).map(client).collect::<anyhow::Result<_>>()?))
    }

    /// Through a gateway, with connections for so many streams.
    ///
    /// # Errors
    /// The address is malformed, or the API key in the environment is.
    pub fn gateway(address: &str, streams: usize) -> anyhow::Result<Self> {
        Ok(Way::Gateway(
            connections(streams).map(|_| gateway(address, &ClientTlsArgs::default())).collect::<anyhow::Result<_>>()?,
        ))
    }
}

fn connections(streams: usize) -> std::ops::Range<usize> {
    0..streams.div_ceil(STREAMS_PER_CONNECTION).max(1)
}

/// A client: where it asks and what.
#[derive(Clone)]
pub struct Client {
    /// Where.
    pub way: Way,
    /// What.
    pub questions: Arc<Questions>,
    /// Knows when it sent each block.
    pub worker: CostWorker,
}

/// A request that was answered with the tokens that must come.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Which request it was.
    pub index: u64,
    /// From sending it until the stream began: Started from a gateway, the answer's headers from a worker.
    pub first_event: Duration,
    /// Of each block, from when the worker sent it.
    pub blocks: Vec<Duration>,
}

/// A stream that has begun.
pub struct Open {
    index: u64,
    events: Events,
    request_id: String,
    draws: Draws,
    next: u32,
    first_event: Duration,
    end: u32,
}

enum Events {
    Direct(Box<Streaming<RunResponse>>),
    Gateway(Box<Streaming<GenerateResponse>>),
}

impl Events {
    async fn next(&mut self) -> Result<Option<Event>, Status> {
        Ok(match self {
            Events::Direct(events) => {
                events.message().await?.and_then(|message| message.event).map(|event| match event {
                    run_response::Event::Draft(draft) => Event::Draft(draft),
                    run_response::Event::Commit(commit) => Event::Commit(commit),
                    run_response::Event::Finish(finish) => Event::Finish(finish),
                })
            }
            Events::Gateway(events) => events.message().await?.and_then(|message| message.event),
        })
    }

    async fn expect(&mut self) -> anyhow::Result<Event> {
        let next = tokio::time::timeout(EVENT_LIMIT, self.next()).await;
        let next = next.with_context(|| format!("nothing came for {} s", EVENT_LIMIT.as_secs()))?;
        next?.context("the stream ended without a finish")
    }
}

impl Client {
    /// Sends request `index` and waits until its stream begins.
    ///
    /// # Errors
    /// It is refused.
    pub async fn begin(&self, index: u64) -> anyhow::Result<Open> {
        let question = self.questions.at(index)?;
        let draws = Draws::new(question.seed, &question.ids, self.questions.tokenizer.vocab_size());
        let (begins, tokens) = (question.ids.len() as u32, self.questions.tokens);
        let begin = Instant::now();
        let (events, request_id) = match &self.way {
            Way::Direct(clients) => {
                let request = direct(index, question, tokens);
                let id = request.request_id.clone();
                let mut client = clients[index as usize % clients.len()].clone();
                (Events::Direct(Box::new(client.run(request).await?.into_inner())), id)
            }
            Way::Gateway(clients) => {
                let mut client = clients[index as usize % clients.len()].clone();
                let request = through_gateway(question, tokens);
                let mut events = Events::Gateway(Box::new(client.generate(request).await?.into_inner()));
                let Event::Started(started) = events.expect().await? else { bail!("a stream began without Started") };
                ensure!(started.prompt_tokens == begins, "a prompt of {begins} has {} tokens", started.prompt_tokens);
                (events, started.request_id)
            }
        };
        let first_event = begin.elapsed();
        Ok(Open { index, events, request_id, draws, next: begins, first_event, end: begins + tokens })
    }

    /// Reads a stream to its end.
    ///
    /// # Errors
    /// A token, a position or the end is not what it must be.
    pub async fn finish(&self, mut open: Open) -> anyhow::Result<Seen> {
        let mut came = Vec::new();
        let reason = loop {
            match open.events.expect().await? {
                Event::Commit(commit) => {
                    came.push(Instant::now());
                    ensure!(commit.first_position == open.next, "a block begins at {}", commit.first_position);
                    for id in commit.token_ids {
                        ensure!(id == open.draws.token(open.next), "a wrong token at position {}", open.next);
                        open.next += 1;
                    }
                }
                Event::Finish(finish) => {
                    // The stream is read to its end: h2 counts what comes for a stream that was dropped, and ends the
                    // connection after 1024 such.
                    ensure!(open.events.next().await?.is_none(), "something follows the finish");
                    break finish.reason();
                }
                Event::Started(_) | Event::Draft(_) => bail!("an event that nobody asked for"),
            }
        };
        ensure!(open.next == open.end, "the stream ended at position {}", open.next);
        ensure!(reason == FinishReason::Length, "the stream ended with {}", reason.as_str_name());
        let sent = self.worker.take_sent(&open.request_id).context("the worker does not know the request")?;
        ensure!(sent.len() == came.len(), "{} blocks came of {}", came.len(), sent.len());
        let blocks = came.iter().zip(sent).map(|(came, sent)| came.saturating_duration_since(sent)).collect();
        Ok(Seen { index: open.index, first_event: open.first_event, blocks })
    }

    /// Asks from so many streams at a time, each again when it is answered; with the time that it took.
    ///
    /// # Errors
    /// Those of the first request that fails.
    pub async fn closed(&self, streams: u64, extent: Extent) -> anyhow::Result<(Vec<Seen>, Duration)> {
        let begin = Instant::now();
        let mut open = JoinSet::new();
        for stream in 0..streams {
            let client = self.clone();
            open.spawn(async move {
                let mut seen = Vec::new();
                let mut index = stream;
                while match extent {
                    Extent::Requests(count) => index < count,
                    Extent::Duration(limit) => begin.elapsed() < limit,
                } {
                    let one = async { client.finish(client.begin(index).await?).await };
                    seen.push(one.await.with_context(|| format!("request {index}"))?);
                    index += streams;
                }
                anyhow::Ok(seen)
            });
        }
        let mut all = Vec::new();
        while let Some(seen) = open.join_next().await {
            all.extend(seen.context("a client panicked")??);
        }
        Ok((all, begin.elapsed()))
    }
}

fn direct(index: u64, question: Question, tokens: u32) -> RunRequest {
    let settings =
        ResolvedSettings { max_tokens: tokens, block_size: BLOCK, seed: question.seed, ..ResolvedSettings::default() };
    RunRequest {
        request_id: format!("direct-{index}"),
        prompt_ids: question.ids,
        settings: Some(settings),
        ..RunRequest::default()
    }
}

fn through_gateway(question: Question, tokens: u32) -> GenerateRequest {
    let decoding = Decoding { max_tokens: Some(tokens), seed: Some(question.seed), ..Decoding::default() };
    let input = Some(Input::Text(question.text));
    GenerateRequest { input, decoding: Some(decoding), ..GenerateRequest::default() }
}
