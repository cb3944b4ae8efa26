//! The tower stack: every call passes these layers, outermost first.

use crate::relay::deadline_passed;
use crate::tenants::Tenants;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::layer::util::{Identity, Stack};
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::load_shed::LoadShedLayer;
use tower::load_shed::error::Overloaded;
use tower::timeout::TimeoutLayer;
use tower::timeout::error::Elapsed;
use tower::util::MapErrLayer;
use tower::{BoxError, Layer, Service, ServiceBuilder};
use tracing::Instrument as _;
use unmask_proto::{rich, timeout};

/// Most calls that are being answered; a stream counts until it starts.
const CALLS_MAX: usize = 2048;
/// Longest time until a call is answered or its stream starts.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// When a refused call may be tried again.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Health over HTTP.
pub(crate) const HEALTH_PATH: &str = "/health";

type Errors = MapErrLayer<fn(BoxError) -> BoxError>;
/// The layers that calls of both kinds pass, innermost first.
pub(crate) type Layers = Stack<
    GlobalConcurrencyLimitLayer,
    Stack<LoadShedLayer, Stack<Errors, Stack<TenantLayer, Stack<DeadlineLayer, Stack<TraceLayer, Identity>>>>>,
>;

/// Counts the calls that are being answered, for [`layers`].
pub(crate) fn calls() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(CALLS_MAX))
}

/// The stack; gRPC and HTTP have one each, and share the count of calls.
pub(crate) fn layers(tenants: Tenants, calls: Arc<Semaphore>) -> Layers {
    ServiceBuilder::new()
        // Outermost, so that refusals are logged too.
        .layer(TraceLayer)
        // Before anything can wait: the time of the call runs from its arrival.
        .layer(DeadlineLayer)
        // Before anything is spent on it: who does not belong here is told so.
        .layer(TenantLayer(Arc::new(tenants)))
        // What the layers below say becomes a status; other errors would end the whole connection.
        .layer(Errors::new(named))
        // Over the limit a call is refused at once instead of waiting in line.
        .layer(LoadShedLayer::new())
        // Bounds what all connections together make the gateway do at a time.
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(calls))
        .into_inner()
}

/// The innermost layer of gRPC: nothing stays half answered for ever, whatever the client's deadline. HTTP has the same
/// limit for as long as a call has not begun (`openai`): there, a whole generation may be one answer.
pub(crate) fn answer_limit() -> TimeoutLayer {
    TimeoutLayer::new(ANSWER_LIMIT)
}

fn named(error: BoxError) -> BoxError {
    if error.is::<Overloaded>() {
        let message = format!("the gateway is answering {CALLS_MAX} calls");
        return rich::retryable(Code::ResourceExhausted, "TOO_MANY_CALLS", message, RETRY_AFTER).into();
    }
    if error.is::<Elapsed>() {
        return late().into();
    }
    error
}

/// A call was not answered within [`ANSWER_LIMIT`].
pub(crate) fn late() -> Status {
    let message = format!("no answer within {} s", ANSWER_LIMIT.as_secs());
    rich::retryable(Code::Unavailable, "ANSWER_TIMEOUT", message, RETRY_AFTER)
}

/// Gives every call a span and logs how it was answered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TraceLayer;

/// See [`TraceLayer`].
#[derive(Debug, Clone)]
pub(crate) struct Trace<S>(S);

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Trace<S> {
        Trace(inner)
    }
}

impl<S, In, Out> Service<Request<In>> for Trace<S>
where
    S: Service<Request<In>, Response = Response<Out>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
{
    type Response = Response<Out>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Out>, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<In>) -> Self::Future {
        let began = Instant::now();
        let span = tracing::debug_span!("call", path = request.uri().path());
        let answer = self.0.call(request);
        let logged = async move {
            let answer: Result<_, BoxError> = answer.await.map_err(Into::into);
            let code = match &answer {
                // A status among the headers: nothing but it follows.
                Ok(response) => Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code()),
                Err(error) => error.downcast_ref().map_or(Code::Unknown, Status::code),
            };
            let http = answer.as_ref().map_or(0, |response| response.status().as_u16());
            tracing::debug!(?code, http, elapsed_us = began.elapsed().as_micros() as u64, "answered");
            answer
        };
        Box::pin(logged.instrument(span))
    }
}

/// When a call has to be over; among its extensions where the client set one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(pub Instant);

/// Reads `grpc-timeout`, answers DEADLINE_EXCEEDED when it passes before the answer begins, and hands the deadline on to
/// those who stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeadlineLayer;

/// See [`DeadlineLayer`].
#[derive(Debug, Clone)]
pub(crate) struct Deadlines<S>(S);

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadlines<S>;

    fn layer(&self, inner: S) -> Deadlines<S> {
        Deadlines(inner)
    }
}

impl<S, In, Out> Service<Request<In>> for Deadlines<S>
where
    S: Service<Request<In>, Response = Response<Out>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    Out: Send + 'static,
{
    type Response = Response<Out>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Out>, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<In>) -> Self::Future {
        let deadline = match grpc_timeout(request.headers()) {
            Ok(timeout) => timeout.map(|timeout| Instant::now() + timeout),
            Err(status) => return Box::pin(std::future::ready(Err(status.into()))),
        };
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(Deadline(deadline));
        }
        let answer = self.0.call(request);
        Box::pin(async move {
            match deadline {
                None => answer.await.map_err(Into::into),
                Some(deadline) => match tokio::time::timeout_at(deadline, answer).await {
                    Ok(answer) => answer.map_err(Into::into),
                    Err(_) => Err(deadline_passed().into()),
                },
            }
        })
    }
}

/// Finds out who asks; the tenant is among the extensions of what goes on. Health and reflection are for everybody.
#[derive(Debug, Clone)]
pub(crate) struct TenantLayer(Arc<Tenants>);

/// See [`TenantLayer`].
#[derive(Debug, Clone)]
pub(crate) struct Identified<S>(S, Arc<Tenants>);

impl<S> Layer<S> for TenantLayer {
    type Service = Identified<S>;

    fn layer(&self, inner: S) -> Identified<S> {
        Identified(inner, Arc::clone(&self.0))
    }
}

impl<S, In, Out> Service<Request<In>> for Identified<S>
where
    S: Service<Request<In>, Response = Response<Out>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    Out: Send + 'static,
{
    type Response = Response<Out>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Out>, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<In>) -> Self::Future {
        let path = request.uri().path();
        if !path.starts_with("/grpc.") && path != HEALTH_PATH {
            match self.1.find(request.headers()) {
                Ok(tenant) => request.extensions_mut().insert(tenant),
                Err(status) => return Box::pin(std::future::ready(Err(status.into()))),
            };
        }
        let answer = self.0.call(request);
        Box::pin(async move { answer.await.map_err(Into::into) })
    }
}

/// The `grpc-timeout` of a call.
fn grpc_timeout(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    headers.get("grpc-timeout").map(|value| timeout::read(value.to_str().ok())).transpose()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use tower::ServiceExt as _;

    #[test]
    fn errors_of_layers_become_statuses() {
        let status = |error: BoxError| Status::try_from_error(named(error)).unwrap().code();
        assert_eq!(status(Overloaded::new().into()), Code::ResourceExhausted);
        assert_eq!(status(Elapsed::new().into()), Code::Unavailable);
        assert_eq!(status(Status::not_found("x").into()), Code::NotFound);
    }

    #[tokio::test]
    async fn a_passed_deadline_is_an_error_with_a_reason() {
        let stuck = tower::service_fn(|request: Request<()>| async move {
            assert!(request.extensions().get::<Deadline>().is_some());
            std::future::pending::<Result<Response<()>, BoxError>>().await
        });
        let request = Request::builder().header("grpc-timeout", "5m").body(()).unwrap();
        let error = layers(Tenants::default(), calls()).layer(stuck).oneshot(request).await.unwrap_err();
        assert_eq!(Status::try_from_error(error).unwrap().code(), Code::DeadlineExceeded);
    }
}
