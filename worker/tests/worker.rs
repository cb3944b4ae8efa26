//! A worker over real sockets, with a controller played by the test.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use unmask_proto::controllers::Controllers;
use unmask_proto::v1::controller_service_server::{ControllerService, ControllerServiceServer};
use unmask_proto::v1::join_request::Message;
use unmask_proto::v1::run_response::Event;
use unmask_proto::v1::worker_service_client::WorkerServiceClient;
use unmask_proto::v1::{
    Assignment, FetchTokenizerRequest, Finish, FinishReason, Hello, JoinRequest, JoinResponse, Policy, Report,
    ResolvedSettings, RunRequest, RunResponse, WatchRoutesRequest, WatchRoutesResponse, WorkerState, policy,
};
use unmask_worker::{Config, Ranks, Role, WorkerError, run};

const LIMIT: Duration = Duration::from_secs(30);
/// Tokens of a request that outlasts any test.
const ENDLESS: u32 = 30_000;
const PROMPT: [u32; 6] = [20, 21, 22, 23, 24, 25];

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/sdar")
}

/// One Join stream as the controller sees it.
struct Joined {
    requests: Streaming<JoinRequest>,
    answers: mpsc::Sender<Result<JoinResponse, Status>>,
    hello: Hello,
}

struct Joins(mpsc::Sender<Joined>);

#[tonic::async_trait]
impl ControllerService for Joins {
    type JoinStream = ReceiverStream<Result<JoinResponse, Status>>;
    type WatchRoutesStream = ReceiverStream<Result<WatchRoutesResponse, Status>>;

    async fn join(&self, request: Request<Streaming<JoinRequest>>) -> Result<Response<Self::JoinStream>, Status> {
        let mut requests = request.into_inner();
        let (answers, stream) = mpsc::channel(8);
        let joins = self.0.clone();
        tokio::spawn(async move {
            let Ok(Some(JoinRequest { message: Some(Message::Hello(hello)) })) = requests.message().await else {
                panic!("Hello comes first");
            };
            let _ = joins.send(Joined { requests, answers, hello }).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn watch_routes(&self, _: Request<WatchRoutesRequest>) -> Result<Response<Self::WatchRoutesStream>, Status> {
        Err(Status::unimplemented("not part of this test"))
    }
}

struct Controller {
    address: SocketAddr,
    joins: mpsc::Receiver<Joined>,
}

async fn controller() -> Controller {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, joins) = mpsc::channel(8);
    let server = Server::builder().add_service(ControllerServiceServer::new(Joins(sender)));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    Controller { address, joins }
}

impl Controller {
    async fn joined(&mut self) -> Joined {
        tokio::time::timeout(LIMIT, self.joins.recv()).await.unwrap().unwrap()
    }
}

impl Joined {
    async fn assign(&self, term: u64, epoch: u64) {
        let assignment = Some(Assignment { group_id: "g".into(), epoch, seat: None });
        self.answers.send(Ok(JoinResponse { term, assignment, drain: false })).await.unwrap();
    }

    async fn until(&mut self, wanted: impl Fn(&Message) -> bool) -> Message {
        loop {
            let request = tokio::time::timeout(LIMIT, self.requests.message()).await.unwrap().unwrap();
            let message = request.expect("the stream goes on").message.unwrap();
            if wanted(&message) {
                return message;
            }
        }
    }

    async fn until_report(&mut self, wanted: impl Fn(&Report) -> bool) {
        self.until(|message| matches!(message, Message::Report(report) if wanted(report))).await;
    }
}

struct Worker {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<(), WorkerError>>,
}

async fn start(controller: &Controller, change: impl FnOnce(&mut Config)) -> Worker {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut config = Config::new(model(), Controllers::one(controller.address));
    config.load.threads = 1;
    config.kv_bytes = 64 << 20;
    change(&mut config);
    let (stop, stopped) = oneshot::channel();
    let ended = tokio::spawn(run(config, listener, async {
        let _ = stopped.await;
    }));
    Worker { address, stop, ended }
}

impl Worker {
    async fn client(&self) -> WorkerServiceClient<Channel> {
        WorkerServiceClient::connect(format!("http://{}", self.address)).await.unwrap()
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        ended(self.ended).await;
    }
}

async fn ended(task: JoinHandle<Result<(), WorkerError>>) {
    tokio::time::timeout(LIMIT, task).await.unwrap().unwrap().unwrap();
}

fn request(max_tokens: u32) -> RunRequest {
    let kind = policy::Kind::Threshold(policy::Threshold { tau: 0.6 });
    let settings = ResolvedSettings {
        max_tokens,
        block_size: 4,
        policy: Some(Policy { kind: Some(kind) }),
        top_p: 1.0,
        ..Default::default()
    };
    RunRequest { request_id: "r".into(), prompt_ids: PROMPT.to_vec(), settings: Some(settings), ..Default::default() }
}

async fn next(stream: &mut Streaming<RunResponse>) -> Result<Option<Event>, Status> {
    let response = tokio::time::timeout(LIMIT, stream.message()).await.expect("an event in time")?;
    Ok(response.and_then(|response| response.event))
}

async fn read(mut stream: Streaming<RunResponse>) -> (Vec<u32>, usize, Finish) {
    let (mut tokens, mut drafts, mut finish) = (Vec::new(), 0, None);
    while let Some(event) = next(&mut stream).await.unwrap() {
        match event {
            Event::Draft(_) => drafts += 1,
            Event::Commit(commit) => {
                assert_eq!(commit.first_position as usize, PROMPT.len() + tokens.len());
                tokens.extend(commit.token_ids);
            }
            Event::Finish(last) => finish = Some(last),
        }
    }
    (tokens, drafts, finish.unwrap())
}

#[tokio::test]
async fn a_worker_joins_serves_and_reports() {
    let mut controller = controller().await;
    let worker = start(&controller, |config| config.worker_id = Some("w".into())).await;
    let mut joined = controller.joined().await;
    let model = joined.hello.model.clone().unwrap();
    assert_eq!((joined.hello.worker_id.as_str(), joined.hello.epoch), ("w", 0));
    assert_eq!(joined.hello.endpoint, worker.address.to_string());
    assert!(model.block_sizes.contains(&4) && model.capabilities.unwrap().diffusion && model.parameters > 0);
    joined.assign(1, 7).await;
    joined.until_report(|report| report.epoch == 7 && report.state() == WorkerState::Ready).await;

    let mut client = worker.client().await;
    let files = client.fetch_tokenizer(FetchTokenizerRequest { digest: model.tokenizer_digest }).await.unwrap();
    assert_eq!(files.into_inner().tokenizer_json, std::fs::read(self::model().join("tokenizer.json")).unwrap());
    let other = client.fetch_tokenizer(FetchTokenizerRequest { digest: "0".into() }).await.unwrap_err();
    assert_eq!(other.code(), Code::NotFound);

    let wanted = RunRequest { epoch: 7, model: model.name, stream_drafts: true, ..request(50) };
    let (tokens, drafts, finish) = read(client.run(wanted).await.unwrap().into_inner()).await;
    assert_eq!((tokens.len(), finish.reason()), (50, FinishReason::Length));
    assert!(drafts > 0 && finish.nfe > 0 && finish.time_to_first_block_us > 0 && finish.tokens_per_forward > 0.0);
    // The same tokens alone, from any epoch, beside 199 others.
    let streams = futures::future::join_all((0..200).map(|_| {
        let mut client = client.clone();
        async move { read(client.run(request(50)).await.unwrap().into_inner()).await.0 }
    }));
    assert!(streams.await.iter().all(|answer| *answer == tokens));
    joined.until_report(|report| report.outstanding_rows == 0 && report.active_requests == 0).await;
    worker.stop().await;
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_with_its_reason() {
    let controller = controller().await;
    let worker = start(&controller, |_| {}).await;
    let mut client = worker.client().await;
    let settings = |change: fn(&mut ResolvedSettings)| {
        let mut request = request(5);
        change(request.settings.as_mut().unwrap());
        request
    };
    for (message, code, needle) in [
        (RunRequest { epoch: 3, ..request(5) }, Code::FailedPrecondition, "epoch 3"),
        // By a route of a group that the worker no longer is.
        (RunRequest { epoch: 3, model: "no".into(), ..request(5) }, Code::FailedPrecondition, "epoch 3"),
        (RunRequest { model: "no".into(), ..request(5) }, Code::NotFound, "`no`"),
        (RunRequest { settings: None, ..request(5) }, Code::InvalidArgument, "settings: is missing"),
        (RunRequest { prompt_ids: vec![], ..request(5) }, Code::InvalidArgument, "prompt_ids: "),
        (RunRequest { prompt_ids: vec![4_000_000], ..request(5) }, Code::InvalidArgument, "prompt_ids: "),
        (RunRequest { suffix_ids: vec![1], ..request(5) }, Code::InvalidArgument, "suffix_ids: "),
        (settings(|s| s.policy = None), Code::InvalidArgument, "settings.policy: "),
        (settings(|s| s.max_tokens = 0), Code::InvalidArgument, "settings.max_tokens: "),
        (settings(|s| s.max_tokens = u32::MAX), Code::InvalidArgument, "settings.max_tokens: "),
        (settings(|s| s.block_size = 5), Code::InvalidArgument, "settings.block_size: "),
        (settings(|s| s.temperature = -1.0), Code::InvalidArgument, "settings.temperature: "),
    ] {
        let status = client.run(message).await.unwrap_err();
        assert_eq!(status.code(), code, "{needle}: {status}");
        assert!(status.message().contains(needle), "{needle}: {status}");
    }
    worker.stop().await;
}

#[tokio::test]
async fn a_client_that_goes_frees_its_rows_and_a_deadline_ends_the_stream() {
    let mut controller = controller().await;
    let worker = start(&controller, |_| {}).await;
    let mut joined = controller.joined().await;
    joined.assign(1, 1).await;
    let mut client = worker.client().await;
    let mut stream = client.run(request(ENDLESS)).await.unwrap().into_inner();
    next(&mut stream).await.unwrap();
    joined.until_report(|report| report.active_requests == 1 && report.outstanding_rows > 0).await;
    drop(stream);
    joined.until_report(|report| report.active_requests == 0 && report.outstanding_rows == 0).await;

    let mut late = Request::new(request(ENDLESS));
    late.set_timeout(Duration::from_millis(100));
    let mut stream = client.run(late).await.unwrap().into_inner();
    let status = loop {
        match next(&mut stream).await {
            Ok(event) => assert!(event.is_some(), "a deadline is an error, not an end"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded);
    worker.stop().await;
}

#[tokio::test]
async fn a_draining_worker_leaves_refuses_what_is_new_and_finishes_what_it_holds() {
    let mut controller = controller().await;
    let worker = start(&controller, |_| {}).await;
    let mut joined = controller.joined().await;
    joined.assign(1, 1).await;
    let mut client = worker.client().await;
    let mut stream = client.run(request(2000)).await.unwrap().into_inner();
    // Unread but for one event: the reader's pace keeps the request alive through the drain.
    next(&mut stream).await.unwrap();
    worker.stop.send(()).unwrap();
    joined.until_report(|report| report.state() == WorkerState::Draining).await;
    joined.until(|message| matches!(message, Message::Leave(_))).await;
    let refused = client.run(request(5)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    let channel = Channel::from_shared(format!("http://{}", worker.address)).unwrap().connect().await.unwrap();
    let health = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(health.status(), ServingStatus::NotServing);
    let mut last = None;
    while let Some(event) = next(&mut stream).await.unwrap() {
        last = Some(event);
    }
    assert!(matches!(last, Some(Event::Finish(finish)) if finish.usage.unwrap().completion_tokens == 2000));
    ended(worker.ended).await;
}

#[tokio::test]
async fn what_outlasts_the_drain_limit_ends_with_unavailable() {
    let controller = controller().await;
    let worker = start(&controller, |config| config.drain_limit = Duration::from_millis(50)).await;
    let mut stream = worker.client().await.run(request(ENDLESS)).await.unwrap().into_inner();
    next(&mut stream).await.unwrap();
    worker.stop.send(()).unwrap();
    let status = loop {
        match next(&mut stream).await {
            Ok(event) => assert!(event.is_some()),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable);
    ended(worker.ended).await;
}

#[tokio::test]
async fn a_worker_joins_again_with_the_epoch_it_saw_and_ignores_leaders_of_the_past() {
    let mut controller = controller().await;
    let worker = start(&controller, |_| {}).await;
    let mut first = controller.joined().await;
    first.assign(5, 40).await;
    first.until_report(|report| report.epoch == 40).await;
    drop(first);
    let stale = controller.joined().await;
    assert_eq!(stale.hello.epoch, 40);
    stale.assign(4, 41).await;
    let mut third = controller.joined().await;
    assert_eq!(third.hello.epoch, 40, "nothing of a lower term counts");
    third.assign(6, 42).await;
    third.until_report(|report| report.epoch == 42 && report.state() == WorkerState::Ready).await;
    worker.stop().await;
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_is_a_clear_error() {
    let controller = controller().await;
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().to_owned();
    let worker = start(&controller, |config| config.role = Role::Model { dir: broken, ranks: Ranks::One }).await;
    let error = worker.ended.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    for file in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
        std::fs::copy(model().join(file), folder.path().join(file)).unwrap();
    }
    let broken = folder.path().to_owned();
    let worker = start(&controller, |config| config.role = Role::Model { dir: broken, ranks: Ranks::One }).await;
    let error = worker.ended.await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::Load { .. }), "{error}");
}
