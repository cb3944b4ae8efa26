//! The gateway: the public gRPC front. It validates, tokenizes, routes, streams, and continues after a worker broke.
//!
//! It knows text, the wire, and which groups serve which model. It does not know how tokens are made: no engine is
//! linked, and a model is what its descriptor says.
//!
//! Modules in reading order:
//! - [`config`]: raw and validated settings
//! - `stack`: the layers every call passes
//! - [`tenants`]: who asks, and how much at a time
//! - `service`: the path of a request
//! - `validate`, `settings`, `prompt`: raw request to valid request, resolved settings, token ids
//! - `relay`: one stream from worker to client; continuation elsewhere
//! - `stream`: order, no position twice, stop strings, text (pure)
//! - `routes`, `circuit`, `watch`: which groups there are; which of them break; following the controller
//! - `upstream`, `tokenizers`: connections to workers; tokenizers by digest

mod circuit;
pub mod config;
mod prompt;
mod relay;
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

pub use config::{Config, ConfigError, RawConfig};

use crate::routes::Routes;
use crate::service::{LONG_TEXTS_MAX, Service};
use crate::tokenizers::Tokenizers;
use crate::upstream::{Upstream, Workers};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
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
}

/// Serves until `shutdown` completes, then drains: it reports NOT_SERVING, refuses what is new, lets streams finish up
/// to the drain limit, and ends the rest with UNAVAILABLE. Health is SERVING while any model has a ready group.
///
/// # Errors
/// [`GatewayError`] when the listener fails.
pub async fn run(
    config: Config,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), GatewayError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    report(&reporter, false).await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(unmask_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let upstream = Arc::new(Upstream { routes: Arc::new(Routes::new()), workers: Workers::default() });
    let streams = Arc::new(Semaphore::new(config.streams_max));
    let (draining, stop, close) = (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
    let service = Service {
        upstream: Arc::clone(&upstream),
        tokenizers: Tokenizers::default(),
        streams: Arc::clone(&streams),
        streams_max: config.streams_max,
        long_texts: Semaphore::new(LONG_TEXTS_MAX),
        stall_limit: config.stall_limit,
        group_wait: config.group_wait,
        draining: draining.clone(),
        stop: stop.clone(),
    };
    let server = Server::builder()
        .max_concurrent_streams((config.streams_max + OTHER_CALLS_MAX) as u32)
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_INTERVAL))
        .layer(stack::layers(config.tenants))
        .add_service(health)
        .add_service(reflection)
        .add_service(InferenceServiceServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX))
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            close.clone().cancelled_owned(),
        );
    let routes = Arc::clone(&upstream.routes);
    let watching = watch::run(config.controllers, config.gateway_id, Arc::clone(&routes));
    let reporting = async {
        let mut tables = routes.watch();
        loop {
            let any = !tables.borrow_and_update().routes.is_empty();
            report(&reporter, any && !draining.is_cancelled()).await;
            if tables.changed().await.is_err() {
                return;
            }
        }
    };
    let ending = async {
        shutdown.await;
        tracing::info!("draining");
        draining.cancel();
        report(&reporter, false).await;
        let all = config.streams_max as u32;
        if timeout(config.drain_limit, streams.acquire_many(all)).await.is_err() {
            tracing::warn!("the drain limit passed; ending the rest");
        }
        stop.cancel();
        // Connections that do not close in time are left behind.
        let _ = timeout(CLOSE_LIMIT, streams.acquire_many(all)).await;
        close.cancel();
        tokio::time::sleep(CLOSE_LIMIT).await;
    };
    tokio::select! {
        served = server => Ok(served?),
        () = watching => Ok(()),
        () = reporting => Ok(()),
        () = ending => Ok(()),
    }
}

async fn report(reporter: &HealthReporter, serving: bool) {
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    reporter.set_service_status("", status).await;
    reporter.set_service_status(SERVICE_NAME, status).await;
}
