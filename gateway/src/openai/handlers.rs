//! One function per address.

use super::answer::{Answer, Api};
use super::failure::{Failure, json_header};
use super::request::{Shape, read};
use crate::service::{Caller, Service};
use crate::stack::{ANSWER_LIMIT, late};
use axum::body::{Body, to_bytes};
use axum::extract::{Path, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures::{Stream, StreamExt as _, stream};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use unmask_proto::rich;
use unmask_proto::v1::generate_response::Event;
use unmask_proto::v1::{GenerateResponse, Model};

/// Longest body of a request (bytes).
const BODY_BYTES_MAX: usize = 8 << 20;
/// How often a stream without news sends a comment, so that nobody on the way takes it for dead.
const COMMENT_INTERVAL: Duration = Duration::from_secs(15);
/// After the last chunk of a stream.
const DONE: &str = "[DONE]";

type Events = mpsc::Receiver<Result<GenerateResponse, Status>>;

/// `POST /v1/chat/completions`
pub(super) async fn chat(State(service): State<Arc<Service>>, request: Request) -> Result<Response, Failure> {
    generate(&service, request, Api::Chat).await
}

/// `POST /v1/completions`
pub(super) async fn completion(State(service): State<Arc<Service>>, request: Request) -> Result<Response, Failure> {
    generate(&service, request, Api::Completion).await
}

async fn generate(service: &Service, request: Request, api: Api) -> Result<Response, Failure> {
    let (parts, body) = request.into_parts();
    let caller = Caller::of(parts.extensions.get(), parts.extensions.get(), Instant::now())?;
    let begin = async {
        let body = json_body(&parts.headers, body).await?;
        let wanted = read(body, api).map_err(|found| rich::invalid(&found))?;
        let events = service.start(wanted.request, caller).await;
        let events = events.map_err(|status| Failure::of(&status, wanted.max_tokens_key))?;
        Ok::<_, Failure>((events, wanted.shape))
    };
    let (events, shape) = timeout(ANSWER_LIMIT, begin).await.map_err(|_| late())??;
    if !shape.stream {
        return Ok((json_header(), whole(events, shape).await?.to_string()).into_response());
    }
    let keep_alive = KeepAlive::new().interval(COMMENT_INTERVAL);
    Ok(Sse::new(chunks(events, shape)).keep_alive(keep_alive).into_response())
}

async fn json_body(headers: &HeaderMap, body: Body) -> Result<Value, Failure> {
    // Pages of other sites can make a browser send text, but not JSON.
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
        let message = format!("content-type must be application/json, is `{kind}`");
        return Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "content_type", message));
    }
    let bytes = to_bytes(body, BODY_BYTES_MAX).await.map_err(|error| {
        let message = format!("the body could not be read: {error}; at most {BODY_BYTES_MAX} bytes are taken");
        Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "body", message)
    })?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Failure::new(StatusCode::BAD_REQUEST, "bad_json", format!("the body is not JSON: {error}")))
}

/// Reads to the end. A client that goes away ends this, and with it the request.
async fn whole(mut events: Events, shape: Shape) -> Result<Value, Status> {
    let (mut answer, mut text) = (None, String::new());
    while let Some(event) = events.recv().await {
        match event?.event {
            Some(Event::Started(started)) => answer = Some(Answer::new(shape, started)),
            Some(Event::Commit(commit)) => text += &commit.text,
            Some(Event::Finish(finish)) => {
                text += &finish.text;
                return answer.map(|answer| answer.whole(&text, &finish)).ok_or_else(broken_off);
            }
            Some(Event::Draft(_)) | None => {}
        }
    }
    Err(broken_off())
}

/// Chunks as they come. An error is the last event, in place of the end.
fn chunks(events: Events, shape: Shape) -> impl Stream<Item = Result<sse::Event, Infallible>> {
    let mut answer = None;
    let lines = ReceiverStream::new(events).flat_map(move |event| {
        let lines = match event {
            Ok(GenerateResponse { event: Some(event) }) => lines(&mut answer, event, shape),
            Ok(GenerateResponse { event: None }) => Vec::new(),
            Err(status) => vec![Failure::from(status).json().to_string()],
        };
        stream::iter(lines)
    });
    lines.map(|line| Ok(sse::Event::default().data(line)))
}

fn lines(answer: &mut Option<Answer>, event: Event, shape: Shape) -> Vec<String> {
    if let Event::Started(started) = event {
        return vec![answer.insert(Answer::new(shape, started)).first().to_string()];
    }
    // Nothing comes before Started.
    let Some(answer) = answer else { return Vec::new() };
    // Text may be held back because it may yet change.
    let text = |text: &str| (!text.is_empty()).then(|| answer.text(text).to_string());
    match event {
        Event::Started(_) => Vec::new(),
        Event::Commit(commit) => text(&commit.text).into_iter().collect(),
        Event::Draft(draft) => vec![answer.draft(&draft).to_string()],
        Event::Finish(finish) => {
            let last = answer.last(&finish).into_iter().map(|chunk| chunk.to_string());
            text(&finish.text).into_iter().chain(last).chain([DONE.to_owned()]).collect()
        }
    }
}

fn broken_off() -> Status {
    rich::status(Code::Internal, "NO_FINISH", "the stream ended without a finish")
}

/// `GET /v1/models`
pub(super) async fn models(State(service): State<Arc<Service>>) -> Response {
    let models: Vec<Value> = service.models().iter().map(model_json).collect();
    (json_header(), json!({ "object": "list", "data": models }).to_string()).into_response()
}

/// `GET /v1/models/{model}`
pub(super) async fn model(State(service): State<Arc<Service>>, Path(name): Path<String>) -> Result<Response, Failure> {
    let model = service.model(&name)?.ok_or_else(|| Status::internal("a ready model is not listed"))?;
    Ok((json_header(), model_json(&model).to_string()).into_response())
}

fn model_json(model: &Model) -> Value {
    let descriptor = model.descriptor.clone().unwrap_or_default();
    let can = descriptor.capabilities.unwrap_or_default();
    json!({
        // When a model was made is not known here.
        "id": model.name, "object": "model", "created": 0, "owned_by": "unmask",
        "unmask": {
            "context_length": descriptor.context_length, "block_sizes": descriptor.block_sizes,
            "parameters": descriptor.parameters, "dtype": descriptor.dtype, "ready_groups": model.ready_groups,
            "diffusion": can.diffusion, "autoregressive": can.autoregressive, "infill": can.infill.is_some(),
            "edit": can.edit, "chat": can.chat, "heal": can.heal,
            "infill_by_masks": can.infill_by_masks,
        },
    })
}

/// `GET /health`
pub(super) async fn health(State(service): State<Arc<Service>>) -> Response {
    let (http, status) = match (service.serving(), service.draining.is_cancelled()) {
        (true, _) => (StatusCode::OK, "serving"),
        (false, true) => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        (false, false) => (StatusCode::SERVICE_UNAVAILABLE, "no model has a ready group"),
    };
    (http, json_header(), json!({ "status": status }).to_string()).into_response()
}

/// Every other address.
pub(super) async fn no_such_address(uri: Uri) -> Failure {
    Failure::new(StatusCode::NOT_FOUND, "unknown_url", format!("there is nothing at {}", uri.path()))
}

/// An address asked in another way.
pub(super) async fn no_such_method(method: Method, uri: Uri) -> Failure {
    let message = format!("{} does not take {method}", uri.path());
    Failure::new(StatusCode::METHOD_NOT_ALLOWED, "method", message)
}
