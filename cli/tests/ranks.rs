//! One model over several processes: the same tokens, and an end in time when one of them dies or hangs.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use unmask::args::{Dtype, ModelArgs};
use unmask::local::{Cluster, Gateway, Listeners};
use unmask::tls::ClientTlsArgs;
use unmask_controller::store::StoreUrl;
use unmask_proto::controllers::Controllers;
use unmask_proto::v1::generate_request::Input;
use unmask_proto::v1::generate_response::Event;
use unmask_proto::v1::{Decoding, GenerateRequest, ListModelsRequest};
use unmask_worker::{Ranks, Role, WorkerError};

/// Bounds every wait: far beyond what anything takes.
const LIMIT: Duration = Duration::from_secs(120);
const RANKS: usize = 2;

type Client = Gateway;

fn model() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/python-tasks-3m")
}

/// A worker of two processes, and what serves it.
struct Group {
    other: Process,
    worker: JoinHandle<Result<(), WorkerError>>,
    services: Vec<JoinHandle<()>>,
    client: Client,
    _data: TempDir,
}

struct Process(Child);

impl Process {
    fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.0.id().to_string()]).status().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.services.iter().for_each(JoinHandle::abort);
    }
}

fn free_addresses() -> Vec<String> {
    let listeners: Vec<_> = (0..RANKS).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect()
}

async fn start() -> Group {
    let addresses = free_addresses();
    let other = Command::new(env!("CARGO_BIN_EXE_unmask"))
        .args(["rank", "--rank", "1", "--threads", "1", "--addresses", &addresses.join(","), "--model"])
        .arg(model())
        .spawn();
    let other = Process(other.unwrap());
    let data = tempfile::tempdir().unwrap();
    let listeners = Listeners::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), 0).await.unwrap();
    let Listeners { gateway, controller, worker, .. } = listeners;
    let (public, control) = (gateway.local_addr().unwrap(), Controllers::one(controller.local_addr().unwrap()));
    let never = std::future::pending;
    let config = unmask_controller::Config::new(StoreUrl::Embedded(data.path().to_owned()));
    let controlling = tokio::spawn(async move { unmask_controller::run(config, controller, never()).await.unwrap() });
    let config = unmask_gateway::Config::new(control.clone());
    let gating = tokio::spawn(async move { unmask_gateway::run(config, gateway, never()).await.unwrap() });
    let ranks = Ranks::Processes { addresses, epoch: 1 };
    let mut config = unmask_worker::Config::of(Role::Model { dir: model(), ranks }, control);
    config.load.dtype = Dtype::Bf16.weights();
    config.load.threads = 1;
    let worker = tokio::spawn(unmask_worker::run(config, worker, never()));
    let mut client = unmask::local::gateway(&public.to_string(), &ClientTlsArgs::default()).unwrap();
    let ready = async {
        while !client
            .list_models(ListModelsRequest {})
            .await
            .is_ok_and(|m| m.get_ref().models.iter().any(|m| m.ready_groups > 0))
        {
            assert!(!worker.is_finished(), "the worker ended before it served");
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, ready).await.unwrap();
    Group { other, worker, services: vec![controlling, gating], client, _data: data }
}

fn request(max_tokens: u32) -> GenerateRequest {
    let decoding =
        Decoding { max_tokens: Some(max_tokens), seed: Some(3), temperature: Some(0.8), ..Decoding::default() };
    let input = Some(Input::Text("def sum_of_squares(numbers):\n".into()));
    GenerateRequest { input, decoding: Some(decoding), ..GenerateRequest::default() }
}

async fn tokens(client: &mut Client) -> Vec<u32> {
    let mut stream = client.generate(request(64)).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Event::Commit(commit)) = message.event {
            all.extend(commit.token_ids);
        }
    }
    all
}

async fn end(worker: &mut JoinHandle<Result<(), WorkerError>>) -> WorkerError {
    tokio::time::timeout(LIMIT, worker).await.unwrap().unwrap().unwrap_err()
}

/// I11 over processes, and a killed rank: the worker ends with a typed error, and so does every stream.
#[tokio::test(flavor = "multi_thread")]
async fn two_processes_give_the_tokens_of_one_and_end_when_one_is_killed() {
    let data = tempfile::tempdir().unwrap();
    let listeners = Listeners::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), 0).await.unwrap();
    let one = ModelArgs {
        model: Some(model().to_str().unwrap().into()),
        dtype: Dtype::Bf16,
        threads: 1,
        overrides: Default::default(),
    };
    let mut cluster = Cluster::start(listeners, &one, data.path().to_owned()).unwrap();
    let mut alone = cluster.ready().await.unwrap();
    let expected = tokens(&mut alone).await;
    cluster.stop().await.unwrap();

    let mut group = start().await;
    assert!(!expected.is_empty() && tokens(&mut group.client).await == expected, "I11");
    group.other.signal("-KILL");
    let error = end(&mut group.worker).await;
    assert!(matches!(error, WorkerError::Group(_)), "{error}");
    let refused = tokio::time::timeout(LIMIT, group.client.generate(request(64))).await.unwrap();
    assert_eq!(refused.unwrap_err().code(), tonic::Code::Unavailable);
}

/// Nobody asks for anything: the canary finds the rank that hangs.
#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_hangs_is_found_by_the_canary() {
    let mut group = start().await;
    group.other.signal("-STOP");
    let error = end(&mut group.worker).await;
    assert!(error.to_string().contains("rank 1 did not answer"), "{error}");
}
