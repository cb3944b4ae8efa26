//! The OpenAI-compatible HTTP interface: JSON in, JSON or server-sent events out, around the path that gRPC takes too.
//!
//! Modules in reading order:
//! - `handlers`: one function per address
//! - `request`, `fields`: a body to a [`GenerateRequest`](unmask_proto::v1::GenerateRequest), or everything wrong with it
//! - `answer`: events to answers, whole or in chunks
//! - `failure`: statuses to HTTP errors
//! - `sockets`: how many connections, and how long they may say or take nothing

mod answer;
mod failure;
mod fields;
mod handlers;
mod request;
mod sockets;

use crate::service::Service;
use crate::stack::{HEALTH_PATH, Layers};
use axum::Router;
use axum::error_handling::HandleError;
use axum::routing::{get, post};
use failure::Failure;
use std::io;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tower::{BoxError, Layer as _};
use unmask_proto::network::Incoming;

/// Serves until `close`; then open connections end with what they are answering.
///
/// # Errors
/// The listener fails.
pub(crate) async fn serve(
    incoming: Incoming,
    service: Arc<Service>,
    layers: Layers,
    close: CancellationToken,
) -> io::Result<()> {
    let stall_limit = service.stall_limit;
    let router = Router::new()
        .route("/v1/chat/completions", post(handlers::chat))
        .route("/v1/completions", post(handlers::completion))
        .route("/v1/models", get(handlers::models))
        .route("/v1/models/{*model}", get(handlers::model))
        .route(HEALTH_PATH, get(handlers::health))
        .fallback(handlers::no_such_address)
        .method_not_allowed_fallback(handlers::no_such_method)
        .with_state(service);
    let refused = async |error: BoxError| {
        let status = Status::try_from_error(error).unwrap_or_else(|error| Status::internal(error.to_string()));
        Failure::from(status)
    };
    let refusing = HandleError::new(layers.layer(router), refused);
    sockets::serve(incoming, refusing, stall_limit, close).await
}
