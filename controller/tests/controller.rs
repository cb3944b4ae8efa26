//! A controller over real sockets: members join, report, leave and fall silent; gateways watch.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use unmask_controller::{Config, ControllerError, StoreUrl, run};
use unmask_proto::v1::controller_service_client::ControllerServiceClient;
use unmask_proto::v1::{
    Hello, JoinRequest, JoinResponse, Leave, ModelDescriptor, Report, WatchRoutesRequest, WatchRoutesResponse,
    WorkerState, join_request::Message,
};

const LIMIT: Duration = Duration::from_secs(10);

struct Controller {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<(), ControllerError>>,
}

async fn start(folder: &Path, ttl: Duration) -> Controller {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = Config { member_ttl: ttl, ..Config::new(StoreUrl::Embedded(folder.join("store"))) };
    let (stop, stopped) = oneshot::channel();
    let ended = tokio::spawn(run(config, listener, async {
        let _ = stopped.await;
    }));
    Controller { address, stop, ended }
}

impl Controller {
    async fn client(&self) -> ControllerServiceClient<Channel> {
        ControllerServiceClient::connect(format!("http://{}", self.address)).await.unwrap()
    }

    async fn watch(&self) -> Streaming<WatchRoutesResponse> {
        self.client().await.watch_routes(WatchRoutesRequest { gateway_id: "g".into() }).await.unwrap().into_inner()
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        tokio::time::timeout(LIMIT, self.ended).await.unwrap().unwrap().unwrap();
    }
}

struct Member {
    out: mpsc::Sender<JoinRequest>,
    answers: Streaming<JoinResponse>,
    epoch: u64,
    term: u64,
}

fn hello(worker: &str) -> Hello {
    let model = ModelDescriptor { name: "tiny".into(), ..Default::default() };
    Hello { worker_id: worker.into(), endpoint: format!("{worker}:7000"), model: Some(model), ..Hello::default() }
}

async fn open(controller: &Controller) -> (mpsc::Sender<JoinRequest>, Streaming<JoinResponse>) {
    let (out, requests) = mpsc::channel(16);
    let answers = controller.client().await.join(ReceiverStream::new(requests)).await.unwrap().into_inner();
    (out, answers)
}

async fn join(controller: &Controller, worker: &str) -> Member {
    let (out, mut answers) = open(controller).await;
    out.send(JoinRequest { message: Some(Message::Hello(hello(worker))) }).await.unwrap();
    let JoinResponse { term, assignment, .. } = next(&mut answers).await.unwrap().unwrap();
    Member { out, answers, epoch: assignment.unwrap().epoch, term }
}

impl Member {
    async fn report(&self, state: WorkerState, outstanding_rows: u64) {
        let report = Report { epoch: self.epoch, state: state.into(), outstanding_rows, ..Default::default() };
        self.out.send(JoinRequest { message: Some(Message::Report(report)) }).await.unwrap();
    }
}

async fn next<T>(stream: &mut Streaming<T>) -> Result<Option<T>, Status> {
    tokio::time::timeout(LIMIT, stream.message()).await.expect("an answer in time")
}

async fn until(
    watch: &mut Streaming<WatchRoutesResponse>,
    wanted: impl Fn(&WatchRoutesResponse) -> bool,
) -> WatchRoutesResponse {
    loop {
        let table = next(watch).await.unwrap().expect("the stream goes on");
        if wanted(&table) {
            return table;
        }
    }
}

fn workers(table: &WatchRoutesResponse) -> Vec<&str> {
    table.routes.iter().map(|route| route.endpoint.as_str()).collect()
}

#[tokio::test]
async fn a_worker_joins_is_routed_and_leaves() {
    let folder = TempDir::new().unwrap();
    let controller = start(folder.path(), Duration::from_secs(5)).await;
    let mut watch = controller.watch().await;
    let empty = until(&mut watch, |_| true).await;
    assert!(empty.term > 0 && empty.routes.is_empty());
    let mut member = join(&controller, "a").await;
    assert_eq!(member.term, empty.term);
    member.report(WorkerState::Loading, 0).await;
    member.report(WorkerState::Ready, 0).await;
    let ready = until(&mut watch, |table| !table.routes.is_empty()).await;
    assert!(ready.revision > empty.revision);
    let route = &ready.routes[0];
    assert_eq!((route.model.as_str(), route.endpoint.as_str(), route.epoch), ("tiny", "a:7000", member.epoch));
    assert_eq!(route.descriptor.as_ref().unwrap().name, "tiny");
    // A watcher that comes later starts with the table as it is.
    assert_eq!(workers(&until(&mut controller.watch().await, |_| true).await), ["a:7000"]);
    // Loads reach the table too.
    member.report(WorkerState::Ready, 123).await;
    until(&mut watch, |table| table.routes.iter().any(|route| route.outstanding_rows == 123)).await;
    member.out.send(JoinRequest { message: Some(Message::Leave(Leave {})) }).await.unwrap();
    until(&mut watch, |table| table.routes.is_empty()).await;
    assert!(next(&mut member.answers).await.unwrap().is_none());
    controller.stop().await;
}

#[tokio::test]
async fn a_silent_worker_is_removed_while_a_reporting_one_stays() {
    let folder = TempDir::new().unwrap();
    let controller = start(folder.path(), Duration::from_millis(400)).await;
    let mut watch = controller.watch().await;
    let mut silent = join(&controller, "silent").await;
    let alive = join(&controller, "alive").await;
    silent.report(WorkerState::Ready, 0).await;
    let beats = tokio::spawn(async move {
        loop {
            alive.report(WorkerState::Ready, 0).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    until(&mut watch, |table| table.routes.len() == 2).await;
    let table = until(&mut watch, |table| table.routes.len() == 1).await;
    assert_eq!(workers(&table), ["alive:7000"]);
    let status = next(&mut silent.answers).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    beats.abort();
    controller.stop().await;
}

#[tokio::test]
async fn a_restart_raises_term_and_epochs_and_keeps_quiet_until_groups_are_back() {
    let folder = TempDir::new().unwrap();
    let controller = start(folder.path(), Duration::from_secs(5)).await;
    let mut watch = controller.watch().await;
    let (a, b) = (join(&controller, "a").await, join(&controller, "b").await);
    a.report(WorkerState::Ready, 0).await;
    b.report(WorkerState::Ready, 0).await;
    until(&mut watch, |table| table.routes.len() == 2).await;
    controller.stop().await;
    let ended = loop {
        if let Err(status) = next(&mut watch).await {
            break status;
        }
    };
    assert_eq!(ended.code(), Code::Unavailable);

    let controller = start(folder.path(), Duration::from_secs(5)).await;
    let mut watch = controller.watch().await;
    let second_b = join(&controller, "b").await;
    assert!(second_b.term > b.term && second_b.epoch > a.epoch.max(b.epoch));
    second_b.report(WorkerState::Ready, 0).await;
    let second_a = join(&controller, "a").await;
    second_a.report(WorkerState::Ready, 0).await;
    let first = until(&mut watch, |_| true).await;
    assert_eq!(workers(&first), ["a:7000", "b:7000"], "nobody is declared dead at a start");
    controller.stop().await;
}

#[tokio::test]
async fn bad_first_messages_are_refused_by_field() {
    let folder = TempDir::new().unwrap();
    let controller = start(folder.path(), Duration::from_secs(5)).await;
    let bad = Hello { endpoint: "nowhere".into(), worker_id: String::new(), ..hello("a") };
    for (message, needle) in [
        (Message::Hello(bad), "hello.worker_id: is missing; hello.endpoint: must be host:port"),
        (Message::Leave(Leave {}), "must be a Hello"),
    ] {
        let (out, mut answers) = open(&controller).await;
        out.send(JoinRequest { message: Some(message) }).await.unwrap();
        let status = next(&mut answers).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(needle), "{}", status.message());
    }
    // A second Hello of the same worker supersedes its first stream.
    let mut first = join(&controller, "a").await;
    let second = join(&controller, "a").await;
    assert!(second.epoch > first.epoch);
    assert_eq!(next(&mut first.answers).await.unwrap_err().code(), Code::Aborted);
    controller.stop().await;
}

#[tokio::test]
async fn a_second_controller_on_the_same_store_is_refused() {
    let folder = TempDir::new().unwrap();
    let controller = start(folder.path(), Duration::from_secs(5)).await;
    until(&mut controller.watch().await, |_| true).await;
    let second = start(folder.path(), Duration::from_secs(5)).await;
    let error = second.ended.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("in use by another process"), "{error}");
    controller.stop().await;
}
