//! The gateway: the public front, gRPC and OpenAI-compatible HTTP. It validates, tokenizes, routes, streams, and continues
//! after a worker broke.
//!
//! It knows text, the wire, and which groups serve which model. It does not know how tokens are made: no engine is
//! linked, and a model is what its descriptor says.
//!
//! Modules in reading order:
//! - [`config`]: raw and validated settings
//! - `stack`: the layers every call passes
//! - [`tenants`]: who asks, and how much at a time
//! - `service`: the path of a request
//! - `admission`, `fair`: how much is under way at a time; whose turn is next among those who wait (pure)
//! - `validate`, `settings`, `prompt`: raw request to valid request, resolved settings, token ids
//! - `edit`: a text in pieces to a draft, and back to what changed (pure)
//! - `relay`: one stream from worker to client; continuation elsewhere
//! - `stream`: order, no position twice, stop strings, text (pure)
//! - `routes`, `route`, `watch`: which groups there are, and the choice of one; one of them; following the controller
//! - `circuit`, `latency`, `affinity`: whether a group breaks, how soon it answers, which prompts belong to it (pure)
//! - `budget`: how often requests are submitted again (pure)
//! - `dice`: what is drawn
//! - [`policy`]: policies as JSON
//! - `openai`: the same requests over HTTP, as OpenAI's clients make them
//! - `upstream`, `tokenizers`: connections to workers; tokenizers by digest

mod admission;
mod affinity;
mod budget;
mod circuit;
pub mod config;
mod dice;
mod edit;
mod fair;
mod latency;
mod openai;
pub mod policy;
mod prompt;
mod relay;
mod route;
mod routes;
mod service;
mod settings;
mod stack;
mod stream;
pub mod tenants;
mod tokenizers;
mod upstream;
mod validate;
mod watch;

pub use admission::Limits;
pub use config::{Config, ConfigError, RawConfig};

use crate::admission::Admission;
use crate::dice::Dice;
use crate::service::{LONG_TEXTS_MAX, Service};
use crate::tokenizers::Tokenizers;
use crate::upstream::Upstream;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use unmask_proto::network::Incoming;
use unmask_proto::v1::inference_service_server::{InferenceServiceServer, SERVICE_NAME};

/// Longest request (bytes).
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Streams of other kinds (health, reflection) and short calls that one connection may hold beside Generate.
const OTHER_CALLS_MAX: usize = 64;
/// How often idle connections are pinged, and how long an answer may take.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Longest wait at shutdown for ended streams to be read and for connections to close.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// Why a gateway did not start, or stopped.
#[derive(Debug, Error)]
pub enum GatewayError {
    /// The reflection service cannot be made of the descriptors.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The listener failed.
    #[error("serving gRPC: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// The listener failed.
    #[error("serving HTTP: {0}")]
    Http(#[source] std::io::Error),
}

/// Bound sockets of a gateway.
#[derive(Debug)]
pub struct Listeners {
    /// gRPC.
    pub grpc: Incoming,
    /// The OpenAI-compatible HTTP interface, where there is to be one.
    pub http: Option<Incoming>,
}

impl From<Incoming> for Listeners {
    fn from(grpc: Incoming) -> Self {
        Self { grpc, http: None }
    }
}

impl From<TcpListener> for Listeners {
    fn from(grpc: TcpListener) -> Self {
        Incoming::from(grpc).into()
    }
}

/// Serves until `shutdown` completes, then drains: it reports NOT_SERVING, refuses what is new, lets streams finish up
/// to the drain limit, and ends the rest with UNAVAILABLE. Health is SERVING while any model has a ready group.
///
/// # Errors
/// [`GatewayError`] when a listener fails.
pub async fn run(
    config: Config,
    listeners: impl Into<Listeners>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), GatewayError> {
    let Listeners { grpc, http } = listeners.into();
    let (reporter, health) = tonic_health::server::health_reporter();
    report(&reporter, false).await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(unmask_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let service = Arc::new(service(&config));
    let close = CancellationToken::new();
    let calls = stack::calls();
    let inference = InferenceServiceServer::from_arc(Arc::clone(&service));
    let Limits { streams_max, queue_max, .. } = config.admission;
    let server = Server::builder()
        .max_concurrent_streams((streams_max + queue_max + OTHER_CALLS_MAX) as u32)
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_INTERVAL))
        .layer(stack::layers(config.tenants.clone(), Arc::clone(&calls)))
        .layer(stack::answer_limit())
        .add_service(health)
        .add_service(reflection)
        .add_service(inference.max_decoding_message_size(MESSAGE_BYTES_MAX))
        .serve_with_incoming_shutdown(grpc, close.clone().cancelled_owned());
    let compatible = async {
        match http {
            Some(http) => {
                let layers = stack::layers(config.tenants, calls);
                openai::serve(http, Arc::clone(&service), layers, close.clone()).await.map_err(GatewayError::Http)
            }
            None => Ok(()),
        }
    };
    let serving = async { tokio::try_join!(async { server.await.map_err(GatewayError::Serve) }, compatible) };
    let watching =
        watch::run(config.controllers, config.network, config.gateway_id, Arc::clone(&service.upstream.routes));
    tokio::select! {
        biased;
        served = serving => served.map(|_| ()),
        () = watching => Ok(()),
        () = reporting(&service, &reporter) => Ok(()),
        () = ending(&service, &reporter, config.drain_limit, &close, shutdown) => Ok(()),
    }
}

fn service(config: &Config) -> Service {
    let dice = Arc::new(Dice::new(config.seed));
    Service {
        upstream: Arc::new(Upstream::new(config.network.clone(), Arc::clone(&dice))),
        dice,
        tokenizers: Tokenizers::default(),
        admission: Arc::new(Admission::new(config.admission)),
        long_texts: Arc::new(Semaphore::new(LONG_TEXTS_MAX)),
        stall_limit: config.stall_limit,
        group_wait: config.group_wait,
        draining: CancellationToken::new(),
        stop: CancellationToken::new(),
    }
}

/// Keeps the health of gRPC true.
async fn reporting(service: &Service, reporter: &HealthReporter) {
    let mut tables = service.upstream.routes.watch();
    loop {
        tables.mark_unchanged();
        report(reporter, service.serving()).await;
        if tables.changed().await.is_err() {
            return;
        }
    }
}

/// Drains once `shutdown` completes, and closes what is still open.
async fn ending(
    service: &Service,
    reporter: &HealthReporter,
    drain_limit: Duration,
    close: &CancellationToken,
    shutdown: impl Future<Output = ()>,
) {
    shutdown.await;
    tracing::info!("draining");
    service.draining.cancel();
    report(reporter, false).await;
    service.admission.close();
    if timeout(drain_limit, service.admission.emptied()).await.is_err() {
        tracing::warn!("the drain limit passed; ending the rest");
    }
    service.stop.cancel();
    // Connections that do not close in time are left behind.
    let _ = timeout(CLOSE_LIMIT, service.admission.emptied()).await;
    close.cancel();
    tokio::time::sleep(CLOSE_LIMIT).await;
}

async fn report(reporter: &HealthReporter, serving: bool) {
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    reporter.set_service_status("", status).await;
    reporter.set_service_status(SERVICE_NAME, status).await;
}
