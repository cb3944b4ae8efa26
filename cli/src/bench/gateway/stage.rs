//! What stands around the gateway: the worker of the table, a controller that knows one route, and the gateway itself in a
//! process of its own.

use super::worker::{BLOCK, CostWorker, STREAMS_MAX, Table};
use crate::local;
use crate::models;
use crate::tls::ClientTlsArgs;
use anyhow::{Context, anyhow, ensure};
use futures::stream::{BoxStream, StreamExt as _};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use unmask_proto::v1::controller_service_server::{ControllerService, ControllerServiceServer};
use unmask_proto::v1::policy::{Kind, Threshold};
use unmask_proto::v1::worker_service_server::WorkerServiceServer;
use unmask_proto::v1::{
    Capabilities, Defaults, FetchTokenizerResponse, JoinRequest, JoinResponse, ListModelsRequest, ModelDescriptor,
    Policy, Route, WatchRoutesRequest, WatchRoutesResponse,
};
use unmask_text::Tokenizer;

/// Longest time from the start of a gateway to a model that it serves.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// Between looks whether it serves.
const READY_POLL: Duration = Duration::from_millis(10);
/// Largest file of a tokenizer (bytes).
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Context of the model that the table plays (positions).
const CONTEXT: u32 = 4096;
const MODEL: &str = "table";
const LOCAL: &str = "127.0.0.1:0";

/// The tokenizer of a model, and its files.
pub fn tokenizer(model: Option<&str>) -> anyhow::Result<(Arc<Tokenizer>, FetchTokenizerResponse)> {
    let folder = models::find(model)?;
    let tokenizer_json = read(&folder.join("tokenizer.json"))?;
    let tokenizer = Tokenizer::from_files(&tokenizer_json, Some(&[]), Some(""))
        .with_context(|| format!("{}/tokenizer.json", folder.display()))?;
    let files = FetchTokenizerResponse { tokenizer_json, ..FetchTokenizerResponse::default() };
    Ok((Arc::new(tokenizer), files))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let bytes = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    ensure!(bytes <= FILE_BYTES_MAX, "{} has {bytes} bytes; at most {FILE_BYTES_MAX} are read", path.display());
    Ok(std::fs::read(path)?)
}

/// A worker that answers, and a controller with a route to it.
pub struct Stage {
    /// The worker.
    pub worker: CostWorker,
    /// Address of its service.
    pub worker_address: SocketAddr,
    controller: SocketAddr,
}

impl Stage {
    /// Starts both in this process, on free ports.
    ///
    /// # Errors
    /// No port or thread is to be had.
    pub async fn start(table: Table, tokenizer: &Tokenizer, files: &FetchTokenizerResponse) -> anyhow::Result<Self> {
        let worker = CostWorker::start(table, files.clone(), tokenizer.vocab_size())?;
        let listener = TcpListener::bind(LOCAL).await?;
        let worker_address = listener.local_addr()?;
        let service = WorkerServiceServer::new(worker.clone());
        let server = Server::builder().max_concurrent_streams(2 * STREAMS_MAX as u32).add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))));
        let listener = TcpListener::bind(LOCAL).await?;
        let controller = listener.local_addr()?;
        let service = ControllerServiceServer::new(OneRoute(route(worker_address, tokenizer)));
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener)));
        Ok(Self { worker, worker_address, controller })
    }

    /// Starts a gateway in a process of its own and waits until it serves.
    ///
    /// # Errors
    /// It does not start, or does not serve in time.
    pub async fn gateway(&self) -> anyhow::Result<GatewayProcess> {
        let gateway = GatewayProcess::start(&self.controller.to_string())?;
        let mut client = local::gateway(&gateway.address, &ClientTlsArgs::default())?;
        let serving = async {
            loop {
                let listed = client.list_models(ListModelsRequest {}).await;
                if listed.is_ok_and(|models| !models.get_ref().models.is_empty()) {
                    return;
                }
                tokio::time::sleep(READY_POLL).await;
            }
        };
        let late = || anyhow!("the gateway serves no model after {} s", READY_LIMIT.as_secs());
        tokio::time::timeout(READY_LIMIT, serving).await.map_err(|_| late())?;
        Ok(gateway)
    }
}

fn route(worker: SocketAddr, tokenizer: &Tokenizer) -> Route {
    let policy = Policy { kind: Some(Kind::Threshold(Threshold { tau: 0.9 })) };
    let descriptor = ModelDescriptor {
        name: MODEL.into(),
        tokenizer_digest: tokenizer.digest().into(),
        numerics_id: MODEL.into(),
        context_length: CONTEXT,
        block_sizes: vec![BLOCK],
        vocab_size: tokenizer.vocab_size(),
        capabilities: Some(Capabilities { diffusion: true, ..Capabilities::default() }),
        defaults: Some(Defaults { block_size: BLOCK, policy: Some(policy), max_tokens: BLOCK, temperature: 0.0 }),
        ..ModelDescriptor::default()
    };
    Route {
        model: MODEL.into(),
        group_id: MODEL.into(),
        epoch: 1,
        endpoint: worker.to_string(),
        descriptor: Some(descriptor),
        outstanding_rows: 0,
    }
}

/// A controller that says one thing.
struct OneRoute(Route);

#[tonic::async_trait]
impl ControllerService for OneRoute {
    type JoinStream = BoxStream<'static, Result<JoinResponse, Status>>;
    type WatchRoutesStream = BoxStream<'static, Result<WatchRoutesResponse, Status>>;

    async fn join(&self, _: Request<Streaming<JoinRequest>>) -> Result<Response<Self::JoinStream>, Status> {
        Err(Status::unimplemented("this controller has one worker, by itself"))
    }

    async fn watch_routes(&self, _: Request<WatchRoutesRequest>) -> Result<Response<Self::WatchRoutesStream>, Status> {
        let table = WatchRoutesResponse { term: 1, revision: 1, routes: vec![self.0.clone()], policies: Vec::new() };
        let once = futures::stream::once(std::future::ready(Ok(table)));
        Ok(Response::new(once.chain(futures::stream::pending()).boxed()))
    }
}

/// A gateway in a process of its own, killed when dropped.
pub struct GatewayProcess {
    child: Child,
    /// host:port of its gRPC.
    pub address: String,
    _config: tempfile::NamedTempFile,
}

impl GatewayProcess {
    /// Starts it and waits until it says where it listens.
    fn start(controller: &str) -> anyhow::Result<Self> {
        let mut config = tempfile::NamedTempFile::new()?;
        writeln!(config, "streams_max = {STREAMS_MAX}")?;
        let binary = std::env::current_exe().context("cannot find this binary")?;
        let mut child = Command::new(binary)
            .args(["gateway", "--listen", LOCAL, "--controller", controller, "--config"])
            .arg(config.path())
            .env("RUST_LOG", "error")
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start a gateway")?;
        let stderr = child.stderr.take();
        // From here on it is killed whatever happens.
        let mut gateway = Self { child, address: String::new(), _config: config };
        let mut lines = BufReader::new(stderr.context("the gateway has no standard error")?).lines();
        loop {
            let line = lines.next().context("the gateway ended at once")??;
            if let Some((_, address)) = line.split_once(" listens on ") {
                gateway.address = address.to_owned();
                break;
            }
        }
        // Somebody must read on, or it stops when the pipe is full.
        std::thread::spawn(move || for _ in lines.map_while(Result::ok) {});
        Ok(gateway)
    }

    /// Resident bytes.
    ///
    /// # Errors
    /// The system does not tell, or the process has ended.
    pub fn resident_bytes(&self) -> anyhow::Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kib.with_context(|| format!("{path} has no VmRSS"))? << 10)
    }

    /// Time on a processor so far, all threads that still run together.
    ///
    /// # Errors
    /// As [`Self::resident_bytes`].
    pub fn cpu(&self) -> anyhow::Result<Duration> {
        let folder = format!("/proc/{}/task", self.child.id());
        let mut nanos = 0;
        for task in std::fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))? {
            // A thread may end between the two.
            let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else { continue };
            nanos += text.split_whitespace().next().and_then(|nanos| nanos.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(Duration::from_nanos(nanos))
    }
}

impl Drop for GatewayProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
