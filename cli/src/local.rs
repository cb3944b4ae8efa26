//! All services in this process, over loopback sockets: the path of `generate` and `up`.

use crate::args::ModelArgs;
use crate::models;
use crate::tls::ClientTlsArgs;
use anyhow::{Context, anyhow, bail};
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use unmask_controller::store::StoreUrl;
use unmask_proto::controllers::Controllers;
use unmask_proto::network::{Incoming, Network};
use unmask_proto::v1::ListModelsRequest;
use unmask_proto::v1::inference_service_client::InferenceServiceClient;

/// Longest time from start to a model that serves.
const READY_LIMIT: Duration = Duration::from_secs(300);
/// Between looks whether the model serves.
const READY_POLL: Duration = Duration::from_millis(10);
/// Longest stop of a service after it has drained.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for a connection to open.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How often an open connection is pinged.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Longest answer to a ping; then the connection counts as broken.
const PING_LIMIT: Duration = Duration::from_secs(4);
/// Name of the only worker; stable, so that a restart finds its group again.
const WORKER_ID: &str = "local";

/// Port of the HTTP interface, where nobody says another.
const HTTP_PORT: u16 = 7780;

/// Sockets of the three services.
pub struct Listeners {
    /// Public.
    pub gateway: TcpListener,
    /// The gateway's HTTP interface, where there is to be one.
    pub http: Option<TcpListener>,
    /// Between the services.
    pub controller: TcpListener,
    /// Between the services.
    pub worker: TcpListener,
}

impl Listeners {
    /// Binds `port` and the two after it, or three free ports when it is 0.
    ///
    /// # Errors
    /// Names the port that is in use.
    pub async fn bind(host: IpAddr, port: u16) -> anyhow::Result<Self> {
        let bind = async |offset: u16, what: &str| {
            let port = if port == 0 { 0 } else { port.checked_add(offset).context("--port: too high")? };
            let address = SocketAddr::new(host, port);
            let advice = "choose another with --port, or 0 for free ones";
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address} ({what}): {advice}"))
        };
        Ok(Self {
            gateway: bind(0, "gateway").await?,
            http: None,
            controller: bind(1, "controller").await?,
            worker: bind(2, "worker").await?,
        })
    }

    /// Where they listen.
    ///
    /// # Errors
    /// The system does not say.
    pub fn addresses(&self) -> std::io::Result<Vec<SocketAddr>> {
        let all = [Some(&self.gateway), self.http.as_ref(), Some(&self.controller), Some(&self.worker)];
        all.into_iter().flatten().map(TcpListener::local_addr).collect()
    }

    /// Binds the HTTP interface too: at `address`, else at its own port of `host`, or a free one when `port` is 0.
    ///
    /// # Errors
    /// Names the address that is in use.
    pub async fn with_http(mut self, address: Option<&str>, host: IpAddr, port: u16) -> anyhow::Result<Self> {
        let default = SocketAddr::new(host, if port == 0 { 0 } else { HTTP_PORT }).to_string();
        self.http = Some(bind_http(address.unwrap_or(&default)).await?);
        Ok(self)
    }
}

/// Binds the socket of a gateway's HTTP interface.
///
/// # Errors
/// Names the address that is in use, or is none.
pub async fn bind_http(address: &str) -> anyhow::Result<TcpListener> {
    let advice = "choose another with --http";
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address} (HTTP): {advice}"))
}

/// The running services.
pub struct Cluster {
    /// Address of the gateway.
    pub gateway: SocketAddr,
    /// Address of its HTTP interface, where there is one.
    pub http: Option<SocketAddr>,
    /// Address of the controller.
    pub controller: SocketAddr,
    /// Address of the worker.
    pub worker: SocketAddr,
    services: JoinSet<anyhow::Result<()>>,
    /// In the order in which services stop: the gateway first, so that nobody misses what is gone.
    stops: [CancellationToken; 3],
}

impl Cluster {
    /// Starts controller, worker and gateway; the controller's state goes to `data_dir`.
    ///
    /// # Errors
    /// The model is not found.
    pub fn start(listeners: Listeners, model: &ModelArgs, data_dir: PathBuf) -> anyhow::Result<Self> {
        Self::start_profiled(listeners, model, data_dir, None)
    }

    /// As [`Cluster::start`], with step times measured before the worker serves, and kept in `profile_dir`.
    ///
    /// # Errors
    /// The model is not found.
    pub fn start_profiled(
        listeners: Listeners,
        model: &ModelArgs,
        data_dir: PathBuf,
        profile_dir: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        let dir = models::find(model.model.as_deref())?;
        let Listeners { gateway, http, controller, worker } = listeners;
        let http_address = http.as_ref().map(TcpListener::local_addr).transpose()?;
        let addresses = (gateway.local_addr()?, controller.local_addr()?, worker.local_addr()?);
        let stops = [CancellationToken::new(), CancellationToken::new(), CancellationToken::new()];
        let mut services = JoinSet::new();
        let store = StoreUrl::Embedded(data_dir);
        let config = unmask_controller::Config::new(store);
        let ended = stops[2].clone().cancelled_owned();
        services.spawn(named("controller", unmask_controller::run(config, controller, ended)));
        let mut config = unmask_worker::Config::new(dir, Controllers::one(addresses.1));
        config.load = model.overrides.load_options(model.dtype, model.threads);
        config.worker_id = Some(WORKER_ID.into());
        config.profile_dir = profile_dir;
        let ended = stops[1].clone().cancelled_owned();
        services.spawn(named("worker", unmask_worker::run(config, worker, ended)));
        let config = unmask_gateway::Config::new(Controllers::one(addresses.1));
        let sockets = unmask_gateway::Listeners { grpc: gateway.into(), http: http.map(Incoming::from) };
        let ended = stops[0].clone().cancelled_owned();
        services.spawn(named("gateway", unmask_gateway::run(config, sockets, ended)));
        let (gateway, controller, worker) = addresses;
        Ok(Self { gateway, http: http_address, controller, worker, services, stops })
    }

    /// Waits until the gateway serves a model.
    ///
    /// # Errors
    /// A service failed, or nothing serves within the limit.
    pub async fn ready(&mut self) -> anyhow::Result<Gateway> {
        let mut client = gateway(&self.gateway.to_string(), &ClientTlsArgs::default())?;
        let serving = async {
            loop {
                let listed = client.list_models(ListModelsRequest {}).await;
                if listed.is_ok_and(|models| models.get_ref().models.iter().any(|model| model.ready_groups > 0)) {
                    return;
                }
                tokio::time::sleep(READY_POLL).await;
            }
        };
        tokio::select! {
            () = serving => Ok(client),
            ended = self.services.join_next() => Err(failure(ended)),
            () = tokio::time::sleep(READY_LIMIT) => bail!("no model serves after {} s", READY_LIMIT.as_secs()),
        }
    }

    /// Waits until a service ends by itself, which none should.
    pub async fn failed(&mut self) -> anyhow::Error {
        failure(self.services.join_next().await)
    }

    /// Drains and stops all services.
    ///
    /// # Errors
    /// A service failed, or did not stop in time.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let all = async {
            for stop in &self.stops {
                stop.cancel();
                if let Some(ended) = self.services.join_next().await {
                    ended.map_err(|panic| anyhow!("a service panicked: {panic}"))??;
                }
            }
            Ok(())
        };
        tokio::time::timeout(STOP_LIMIT, all).await.unwrap_or_else(|_| bail!("services did not stop in time"))
    }
}

/// Runs `work` with a client of a cluster in this process that stops afterwards.
///
/// # Errors
/// The model is not found, a service fails, or `work` does.
pub async fn with_gateway<T>(
    model: &ModelArgs,
    work: impl AsyncFnOnce(Gateway) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let data = tempfile::tempdir().context("cannot make a temporary folder for the controller's state")?;
    let listeners = Listeners::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), 0).await?;
    let mut cluster = Cluster::start(listeners, model, data.path().to_owned())?;
    let client = cluster.ready().await?;
    let done = tokio::select! {
        done = work(client) => done?,
        failure = cluster.failed() => return Err(failure),
    };
    cluster.stop().await?;
    Ok(done)
}

/// Environment variable with the API key for gateways that want one. Not a flag: others see command lines.
pub const API_KEY_VARIABLE: &str = "UNMASK_API_KEY";

/// Puts the API key, where there is one, on every call.
#[derive(Clone, Default)]
pub struct ApiKey(Option<MetadataValue<Ascii>>);

impl Interceptor for ApiKey {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(key) = &self.0 {
            request.metadata_mut().insert("authorization", key.clone());
        }
        Ok(request)
    }
}

/// A client of a gateway.
pub type Gateway = InferenceServiceClient<InterceptedService<Channel, ApiKey>>;

/// A client of the gateway at `endpoint`, connected when it is first used.
///
/// # Errors
/// The address is malformed, the API key in the environment is, or certificates cannot be used.
pub fn gateway(endpoint: &str, tls: &ClientTlsArgs) -> anyhow::Result<Gateway> {
    let key = match std::env::var(API_KEY_VARIABLE) {
        Ok(key) => Some(format!("Bearer {key}").parse().with_context(|| format!("{API_KEY_VARIABLE} is no key"))?),
        Err(_) => None,
    };
    Ok(InferenceServiceClient::with_interceptor(connect(endpoint, tls)?, ApiKey(key)))
}

/// A lazy connection: under TLS to `https://`, and to an address without a scheme where certificates are given.
///
/// # Errors
/// The address is malformed, or certificates cannot be used.
pub fn connect(endpoint: &str, tls: &ClientTlsArgs) -> anyhow::Result<Channel> {
    let (under_tls, address) = match endpoint.split_once("://") {
        Some(("https", address)) => (true, address),
        Some(("http", _)) if tls.given() => {
            bail!("{endpoint:?} is plain: say https://, or give no --tls-ca and no --tls-cert")
        }
        Some(("http", address)) => (false, address),
        Some(_) => bail!("--endpoint {endpoint:?} is no address: give http://HOST:PORT or https://HOST:PORT"),
        None => (tls.given(), endpoint),
    };
    let network = if under_tls { tls.network()? } else { Network::default() };
    let dialled = Endpoint::from_shared(format!("http://{address}"));
    let dialled = dialled.with_context(|| format!("--endpoint {endpoint:?} is no address"))?;
    // A machine that falls silent closes nothing: without pings a stream would wait for it for ever.
    let dialled = dialled
        .connect_timeout(CONNECT_LIMIT)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_LIMIT)
        .keep_alive_while_idle(true);
    Ok(network.channel(&dialled))
}

async fn named<E: std::error::Error + Send + Sync + 'static>(
    name: &'static str,
    service: impl Future<Output = Result<(), E>>,
) -> anyhow::Result<()> {
    service.await.with_context(|| name)
}

fn failure(ended: Option<Result<anyhow::Result<()>, tokio::task::JoinError>>) -> anyhow::Error {
    match ended {
        Some(Ok(Err(error))) => error,
        Some(Err(panic)) => anyhow!("a service panicked: {panic}"),
        Some(Ok(Ok(()))) | None => anyhow!("a service ended before it was told to"),
    }
}
