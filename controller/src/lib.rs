//! The controller: who is a member, in which epoch, and where gateways may send requests.
//!
//! It knows workers, groups, epochs and routes. It does not know what a model computes, never sees a request, and
//! is not on a request's path: while it is away, ready groups keep serving the last known routes.
//!
//! Modules in reading order:
//! - [`core`]: `decide(state, event, now) -> actions`, pure
//! - [`placement`]: which worker is which rank of which group, pure
//! - [`policy`]: block size and threshold from measured step times and quality, pure
//! - [`config`]: raw and validated settings
//! - [`store`]: the store trait, a folder, etcd
//! - `lead`: which of several controllers on one store decides
//! - `ledger`: what the controller keeps in the store
//! - `shell`: the one task that owns the state and carries out actions
//! - `admin`: what people ask of it
//! - `service`: gRPC

mod admin;
pub mod config;
pub mod core;
mod lead;
mod ledger;
pub mod placement;
pub mod policy;
mod service;
mod shell;
pub mod store;

pub use config::{Config, ConfigError, RawConfig};
pub use store::{StoreError, StoreUrl};

use crate::lead::Standing;
use crate::service::Service;
use crate::store::Store;
use std::future::Future;
use std::time::Duration;
use thiserror::Error;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use unmask_proto::network::Incoming;
use unmask_proto::v1::admin_service_server::AdminServiceServer;
use unmask_proto::v1::controller_service_server::ControllerServiceServer;
use unmask_proto::watch;

/// Longest message a member or gateway may send (bytes): a descriptor of 4 KiB, and measurements of a few times 10 KiB.
const MESSAGE_BYTES_MAX: usize = 512 * 1024;
/// A connection that does not answer a ping for this long is closed.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How often idle connections are pinged.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Open streams per connection.
const STREAMS_PER_CONNECTION_MAX: u32 = 256;
/// Pause before a store that cannot be reached is opened again.
const OPEN_PAUSE: Duration = Duration::from_millis(500);
/// Longest wait at shutdown for connections to close.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(2);

/// Why a controller did not start, or stopped.
#[derive(Debug, Error)]
pub enum ControllerError {
    /// The store cannot be opened or read.
    #[error("store: {0}")]
    Store(#[from] StoreError),
    /// The listener has no address.
    #[error("listening: {0}")]
    Address(std::io::Error),
    /// It listens on every address, none of which says how it is reached.
    #[error("advertise: is needed when listening on {0}: give the host:port at which the others reach this controller")]
    NoAddress(std::net::SocketAddr),
    /// The listener failed.
    #[error("serving gRPC: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Serves until `shutdown` completes, then ends every stream with UNAVAILABLE and returns. While the store cannot be
/// reached it serves as one that does not lead.
///
/// # Errors
/// [`ControllerError`] when the store cannot be opened (held by another process, damaged, not built in) or the
/// listener fails.
pub async fn run(
    config: Config,
    incoming: impl Into<Incoming>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ControllerError> {
    serve(open(config.clone()), config, incoming.into(), shutdown).await
}

/// Opens the store, as soon as it can be reached.
async fn open(config: Config) -> Result<impl Store, StoreError> {
    loop {
        match store::open(&config.store, config.store_tls.as_ref()).await {
            Err(error) if error.passes() => tracing::warn!(%error, "cannot open the store; trying again"),
            opened => return opened,
        }
        tokio::time::sleep(OPEN_PAUSE).await;
    }
}

/// The same on a store that is open already; the one that the settings name is not looked at.
///
/// # Errors
/// As [`run`].
pub async fn run_on(
    store: impl Store,
    config: Config,
    incoming: impl Into<Incoming>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ControllerError> {
    serve(std::future::ready(Ok(store)), config, incoming.into(), shutdown).await
}

async fn serve<S: Store>(
    opening: impl Future<Output = Result<S, StoreError>> + Send + 'static,
    config: Config,
    incoming: Incoming,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ControllerError> {
    let address = match &config.advertise {
        Some(address) => address.clone(),
        None => match incoming.local_addr().map_err(ControllerError::Address)? {
            address if address.ip().is_unspecified() => return Err(ControllerError::NoAddress(address)),
            address => address.to_string(),
        },
    };
    let stop = CancellationToken::new();
    let standing = watch::Sender::new(Standing::Following(None));
    let service = Service::new(standing.subscribe());
    let leading = tokio::spawn({
        let stop = stop.clone();
        async move {
            let store = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                opened = opening => opened?,
            };
            lead::run(store, config, address, standing, stop).await
        }
    });

    let (reporter, health) = tonic_health::server::health_reporter();
    let admin = AdminServiceServer::new(service.clone());
    let service = ControllerServiceServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX);
    reporter.set_serving::<ControllerServiceServer<Service>>().await;
    let server = Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(PING_INTERVAL))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .add_service(health)
        .add_service(service)
        .add_service(admin)
        .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    tokio::pin!(server, shutdown, leading);
    let mut led = None;
    let served = tokio::select! {
        biased;
        served = &mut server => served,
        ended = &mut leading => {
            led = Some(ended);
            Ok(())
        }
        () = &mut shutdown => {
            reporter.set_not_serving::<ControllerServiceServer<Service>>().await;
            stop.cancel();
            tokio::time::timeout(SHUTDOWN_LIMIT, server).await.unwrap_or(Ok(()))
        }
    };
    stop.cancel();
    let led = match led {
        Some(led) => led,
        None => leading.await,
    };
    match led {
        Ok(led) => led?,
        Err(error) => tracing::error!(%error, "the controller's task ended badly"),
    }
    Ok(served?)
}
