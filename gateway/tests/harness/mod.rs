//! A controller and workers played by the test, around a real gateway.
#![allow(dead_code)]

pub mod http;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::codegen::tokio_stream::StreamExt as _;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};
use unmask_gateway::{Config, GatewayError, Listeners};
use unmask_proto::controllers::Controllers;
use unmask_proto::v1::controller_service_server::{ControllerService, ControllerServiceServer};
use unmask_proto::v1::generate_request::Input;
use unmask_proto::v1::generate_response::Event;
use unmask_proto::v1::inference_service_client::InferenceServiceClient;
use unmask_proto::v1::policy::{Kind, Threshold};
use unmask_proto::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use unmask_proto::v1::{
    Capabilities, Commit, Decoding, Defaults, Draft, FetchTokenizerRequest, FetchTokenizerResponse, Finish,
    FinishReason, GenerateRequest, GenerateResponse, InfillTokens, JoinRequest, JoinResponse, ListModelsRequest,
    ModelDescriptor, Policy, Route, RunRequest, RunResponse, Started, WatchRoutesRequest, WatchRoutesResponse,
    run_response,
};
use unmask_text::{Specials, Tokenizer};

/// Longest wait for anything.
pub const LIMIT: Duration = Duration::from_secs(20);
pub const CONTEXT: u32 = 32768;
pub const TEMPLATE: &str = r"{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}";

fn tokenizer_json() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/sdar/tokenizer.json")).unwrap()
}

pub static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_files(&tokenizer_json(), None, Some(TEMPLATE)).unwrap());

pub fn ids(text: &str) -> Vec<u32> {
    TOKENIZER.encode(text, Specials::AsText, false).unwrap()
}

pub async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, what).await.expect("nothing happened in time")
}

struct Controller(watch::Receiver<WatchRoutesResponse>);

#[tonic::async_trait]
impl ControllerService for Controller {
    type JoinStream = ReceiverStream<Result<JoinResponse, Status>>;
    type WatchRoutesStream =
        std::pin::Pin<Box<dyn tonic::codegen::tokio_stream::Stream<Item = Result<WatchRoutesResponse, Status>> + Send>>;

    async fn join(&self, _: Request<Streaming<JoinRequest>>) -> Result<Response<Self::JoinStream>, Status> {
        Err(Status::unimplemented("not part of this test"))
    }

    async fn watch_routes(&self, _: Request<WatchRoutesRequest>) -> Result<Response<Self::WatchRoutesStream>, Status> {
        Ok(Response::new(Box::pin(WatchStream::new(self.0.clone()).map(Ok))))
    }
}

/// One Run as a worker sees it; the test answers it.
pub struct Run {
    pub request: RunRequest,
    pub timeout: Option<String>,
    events: mpsc::Sender<Result<RunResponse, Status>>,
    next: u32,
}

impl Run {
    async fn send(&self, event: run_response::Event) -> bool {
        within(self.events.send(Ok(RunResponse { event: Some(event) }))).await.is_ok()
    }

    /// Commits `ids` after what was committed.
    pub async fn commit(&mut self, ids: &[u32]) -> bool {
        let first_position = self.next;
        self.next += ids.len() as u32;
        self.commit_at(first_position, ids).await
    }

    pub async fn commit_at(&self, first_position: u32, ids: &[u32]) -> bool {
        let commit = Commit { first_position, token_ids: ids.to_vec(), steps: 2, ..Commit::default() };
        self.send(run_response::Event::Commit(commit)).await
    }

    pub async fn draft(&self, draft: Draft) -> bool {
        self.send(run_response::Event::Draft(draft)).await
    }

    pub async fn finish(self, reason: FinishReason) {
        self.send(run_response::Event::Finish(Finish { reason: reason.into(), nfe: 9, ..Default::default() })).await;
    }

    pub async fn fail(self, status: Status) {
        let _ = self.events.send(Err(status)).await;
    }

    /// Until the gateway has let go of the stream.
    pub async fn cancelled(&self) {
        within(self.events.closed()).await;
    }

    /// How many events the gateway takes before it stops taking any for a while.
    pub async fn commits_until_full(&mut self, ids: &[u32]) -> usize {
        for sent in 0.. {
            let commit = Commit { first_position: self.next, token_ids: ids.to_vec(), steps: 1, ..Default::default() };
            let event = Ok(RunResponse { event: Some(run_response::Event::Commit(commit)) });
            match tokio::time::timeout(Duration::from_millis(300), self.events.send(event)).await {
                Ok(sent) => sent.unwrap(),
                Err(_) => return sent,
            }
            self.next += ids.len() as u32;
        }
        unreachable!()
    }
}

struct Working {
    runs: mpsc::Sender<Run>,
    refusal: Arc<std::sync::Mutex<Option<Status>>>,
}

#[tonic::async_trait]
impl WorkerService for Working {
    type RunStream = ReceiverStream<Result<RunResponse, Status>>;

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        if let Some(status) = self.refusal.lock().unwrap().clone() {
            return Err(status);
        }
        let timeout = request.metadata().get("grpc-timeout").map(|value| value.to_str().unwrap().to_owned());
        let request = request.into_inner();
        let (events, stream) = mpsc::channel(1);
        let next = (request.prompt_ids.len() + request.committed_ids.len()) as u32;
        self.runs.send(Run { request, timeout, events, next }).await.unwrap();
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn fetch_tokenizer(
        &self,
        _: Request<FetchTokenizerRequest>,
    ) -> Result<Response<FetchTokenizerResponse>, Status> {
        Ok(Response::new(FetchTokenizerResponse {
            tokenizer_json: tokenizer_json(),
            tokenizer_config_json: Vec::new(),
            chat_template: TEMPLATE.into(),
        }))
    }
}

pub struct Worker {
    pub address: SocketAddr,
    runs: mpsc::Receiver<Run>,
    /// What every Run gets instead of a stream.
    pub refusal: Arc<std::sync::Mutex<Option<Status>>>,
}

impl Worker {
    pub async fn start() -> Worker {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, runs) = mpsc::channel(1024);
        let refusal = Arc::default();
        let working = Working { runs: sender, refusal: Arc::clone(&refusal) };
        let server = Server::builder().add_service(WorkerServiceServer::new(working));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))));
        Worker { address, runs, refusal }
    }

    pub async fn run(&mut self) -> Run {
        within(self.runs.recv()).await.unwrap()
    }

    /// Answers every further Run with these ids, one commit each.
    pub fn answer_all(mut self, text: &'static str) {
        tokio::spawn(async move {
            while let Some(mut run) = self.runs.recv().await {
                tokio::spawn(async move {
                    for id in ids(text) {
                        run.commit(&[id]).await;
                    }
                    run.finish(FinishReason::Eos).await;
                });
            }
        });
    }

    pub fn route(&self, group: &str, epoch: u64) -> Route {
        Route {
            model: "tiny".into(),
            group_id: group.into(),
            epoch,
            endpoint: self.address.to_string(),
            descriptor: Some(descriptor()),
            outstanding_rows: 0,
        }
    }
}

pub fn descriptor() -> ModelDescriptor {
    let infill = Some(InfillTokens { prefix: 295, suffix: 296, middle: 297 });
    ModelDescriptor {
        name: "tiny".into(),
        tokenizer_digest: TOKENIZER.digest().into(),
        numerics_id: "n".into(),
        context_length: CONTEXT,
        block_sizes: vec![4],
        vocab_size: TOKENIZER.vocab_size(),
        capabilities: Some(Capabilities { diffusion: true, infill, chat: true, ..Default::default() }),
        defaults: Some(Defaults {
            block_size: 4,
            policy: Some(Policy { kind: Some(Kind::Threshold(Threshold { tau: 0.9 })) }),
            max_tokens: 256,
            temperature: 0.0,
        }),
        ..Default::default()
    }
}

/// What the harness itself asks with, where a gateway wants a key.
pub const KEY: &str = "the harness's own";

/// A gateway, and the controller it follows.
pub struct Gateway {
    pub address: SocketAddr,
    /// Of the HTTP interface.
    pub http: SocketAddr,
    tables: watch::Sender<WatchRoutesResponse>,
    controller: CancellationToken,
    stop: oneshot::Sender<()>,
    pub ended: JoinHandle<Result<(), GatewayError>>,
    pub client: InferenceServiceClient<Channel>,
}

impl Gateway {
    pub async fn start(routes: Vec<Route>) -> Gateway {
        Gateway::configured(routes, |_| {}).await
    }

    /// Runs, and has the routes.
    pub async fn configured(routes: Vec<Route>, change: impl FnOnce(&mut Config)) -> Gateway {
        let wanted = routes.len();
        let tables = watch::Sender::new(WatchRoutesResponse { term: 1, revision: 1, routes, policies: Vec::new() });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut config = Config::new(Controllers::one(listener.local_addr().unwrap()));
        change(&mut config);
        let controller = CancellationToken::new();
        let server = Server::builder().add_service(ControllerServiceServer::new(Controller(tables.subscribe())));
        let ended = controller.clone();
        tokio::spawn(server.serve_with_incoming_shutdown(TcpIncoming::from(listener), ended.cancelled_owned()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http_address = http.local_addr().unwrap();
        let listeners = Listeners { grpc: listener.into(), http: Some(http.into()) };
        let (stop, stopped) = oneshot::channel();
        let ended = tokio::spawn(unmask_gateway::run(config, listeners, async {
            let _ = stopped.await;
        }));
        let client = InferenceServiceClient::connect(format!("http://{address}")).await.unwrap();
        let gateway = Gateway { address, http: http_address, tables, controller, stop, ended, client };
        gateway.until_groups(wanted).await;
        gateway
    }

    pub async fn set_routes(&self, routes: Vec<Route>) {
        self.announce(routes);
        let wanted = self.tables.borrow().routes.len();
        self.until_groups(wanted).await;
    }

    /// Without waiting until the gateway has heard.
    pub fn announce(&self, routes: Vec<Route>) {
        self.tables.send_modify(|table| {
            table.revision += 1;
            table.routes = routes;
        });
    }

    async fn until_groups(&self, wanted: usize) {
        let mut client = self.client.clone();
        let list = || {
            let mut request = Request::new(ListModelsRequest {});
            request.metadata_mut().insert("authorization", format!("Bearer {KEY}").parse().unwrap());
            request
        };
        let reached = async {
            loop {
                let models = client.list_models(list()).await.unwrap().into_inner().models;
                if models.iter().map(|model| model.ready_groups as usize).sum::<usize>() == wanted {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        within(reached).await;
    }

    pub fn end_controller(&self) {
        self.controller.cancel();
    }

    /// With an API key.
    pub async fn generate_as(&self, key: &str, request: GenerateRequest) -> Result<Stream, Status> {
        let mut request = Request::new(request);
        request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        Ok(Stream { events: within(self.client.clone().generate(request)).await?.into_inner() })
    }

    pub async fn generate(&self, request: GenerateRequest) -> Result<Stream, Status> {
        let events = within(self.client.clone().generate(request)).await?.into_inner();
        Ok(Stream { events })
    }

    /// Over a connection of its own whose windows are small.
    pub async fn generate_narrow(&self, request: GenerateRequest) -> Stream {
        let endpoint = Channel::from_shared(format!("http://{}", self.address)).unwrap();
        let endpoint = endpoint.initial_stream_window_size(16 << 10).initial_connection_window_size(16 << 10);
        let mut client = InferenceServiceClient::new(endpoint.connect().await.unwrap());
        Stream { events: within(client.generate(request)).await.unwrap().into_inner() }
    }

    /// Tells the gateway to stop.
    pub fn stop(self) -> JoinHandle<Result<(), GatewayError>> {
        self.stop.send(()).unwrap();
        self.ended
    }
}

/// A stream as the client sees it.
#[derive(Debug)]
pub struct Stream {
    events: Streaming<GenerateResponse>,
}

/// Everything a stream gave.
#[derive(Debug, Default)]
pub struct Output {
    pub started: Option<Started>,
    pub drafts: Vec<Draft>,
    pub commits: Vec<Commit>,
    pub ids: Vec<u32>,
    pub text: String,
    pub finish: Option<Finish>,
}

impl Stream {
    pub async fn next(&mut self) -> Result<Option<Event>, Status> {
        Ok(within(self.events.message()).await?.map(|response| response.event.unwrap()))
    }

    pub async fn started(&mut self) -> Started {
        match self.next().await.unwrap() {
            Some(Event::Started(started)) => started,
            other => panic!("{other:?}"),
        }
    }

    pub async fn commit(&mut self) -> Commit {
        match self.next().await.unwrap() {
            Some(Event::Commit(commit)) => commit,
            other => panic!("{other:?}"),
        }
    }

    /// Reads to the end; positions are checked on the way.
    pub async fn all(mut self) -> Result<Output, Status> {
        let mut output = Output::default();
        while let Some(event) = self.next().await? {
            assert!(output.finish.is_none(), "something follows Finish");
            match event {
                Event::Started(started) => output.started = Some(started),
                Event::Draft(draft) => output.drafts.push(draft),
                Event::Commit(commit) => {
                    if let Some(last) = output.commits.last() {
                        assert_eq!(commit.first_position, last.first_position + last.token_ids.len() as u32);
                    }
                    output.ids.extend(&commit.token_ids);
                    output.text += &commit.text;
                    output.commits.push(commit);
                }
                Event::Finish(finish) => {
                    output.text += &finish.text;
                    output.finish = Some(finish);
                }
            }
        }
        Ok(output)
    }
}

pub fn text(prompt: &str) -> GenerateRequest {
    GenerateRequest { input: Some(Input::Text(prompt.into())), ..Default::default() }
}

pub fn with(prompt: &str, decoding: Decoding) -> GenerateRequest {
    GenerateRequest { decoding: Some(decoding), ..text(prompt) }
}
