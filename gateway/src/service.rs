//! InferenceService: validate, tokenize, resolve, route; then the stream has a task of its own.

use crate::prompt;
use crate::relay::{Client, EVENTS_MAX, Job, Relay, stopping};
use crate::routes::Route;
use crate::settings;
use crate::stack::Deadline;
use crate::stream::Assembler;
use crate::tenants::Tenant;
use crate::tokenizers::Tokenizers;
use crate::upstream::Upstream;
use crate::validate::{Resumed, Valid, validate};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};
use unmask_proto::rich::{self, Violation};
use unmask_proto::v1::inference_service_server::InferenceService;
use unmask_proto::v1::{
    GenerateRequest, GenerateResponse, GetModelRequest, GetModelResponse, ListModelsRequest, ListModelsResponse,
    TokenizeRequest, TokenizeResponse,
};
use unmask_text::{Specials, TextError, Tokenizer};

/// When a stream refused for want of room may be tried again.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Text up to this length is encoded at once, longer text on a thread that may block (bytes).
const INLINE_TEXT_MAX: usize = 16 << 10;
/// Most long texts that are encoded at a time.
pub(crate) const LONG_TEXTS_MAX: usize = 4;

/// What the service serves.
pub(crate) struct Service {
    pub upstream: Arc<Upstream>,
    pub tokenizers: Tokenizers,
    pub streams: Arc<Semaphore>,
    pub streams_max: usize,
    pub long_texts: Semaphore,
    pub stall_limit: Duration,
    pub group_wait: Duration,
    /// Nothing new is taken.
    pub draining: CancellationToken,
    /// Everything ends.
    pub stop: CancellationToken,
}

#[tonic::async_trait]
impl InferenceService for Service {
    type GenerateStream = ReceiverStream<Result<GenerateResponse, Status>>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let arrived = Instant::now();
        let deadline = request.extensions().get::<Deadline>().map(|deadline| deadline.0);
        let permit = Arc::clone(&self.streams).try_acquire_owned().map_err(|_| self.full())?;
        if self.draining.is_cancelled() {
            return Err(stopping());
        }
        let tenant = request.extensions().get::<Arc<Tenant>>().cloned().ok_or_else(no_tenant)?;
        let own = tenant.stream()?;
        let request = request.into_inner();
        let table = self.upstream.routes.table();
        let route = table.model(&request.model)?;
        let chosen = table.policy(&route.model.name);
        let valid = validate(request, &route.model, chosen, rand::random()).map_err(|found| rich::invalid(&found))?;
        let tokenizer = self.tokenizers.get(&route, &self.upstream).await?;
        let (valid, prompt) = self.encode(valid, &tokenizer, &route).await?;
        let settings = settings::fit(&valid, &route.model, prompt.len()).map_err(|found| rich::invalid(&[found]))?;
        // What a resumed stream already has was paid for where it came from.
        let done = valid.resume.as_ref().map_or(0, |resumed| resumed.received.len());
        tenant.spend((prompt.len() as u64 + u64::from(settings.max_tokens)).saturating_sub(done as u64))?;
        let resumed = valid.resume.unwrap_or_else(|| Resumed {
            request_id: uuid::Uuid::new_v4().to_string(),
            received: Vec::new(),
            passes_used: 0,
        });
        let stops = settings.stop.clone();
        let prompt_tokens = prompt.len() as u32;
        let assembler = Assembler::new(tokenizer, prompt_tokens, stops, &resumed.received, resumed.passes_used);
        let job = Job {
            request_id: resumed.request_id,
            model: Arc::clone(&route.model),
            prompt,
            settings,
            drafts: valid.drafts,
            priority: valid.priority,
            salt: tenant.salt(),
            arrived,
            deadline,
        };
        let mut relay = Relay::new(Arc::clone(&self.upstream), job, assembler);
        let first = match relay.over() {
            Some(_) => None,
            None => Some(relay.open().await?),
        };
        let (events, reading) = mpsc::channel(EVENTS_MAX);
        // The channel is empty: the first event fits.
        let _ = events.try_send(Ok(GenerateResponse { event: Some(relay.started()) }));
        let Service { stall_limit, group_wait, .. } = *self;
        let client = Client { events, stall_limit, group_wait, stop: self.stop.clone(), _permits: (permit, own) };
        tokio::spawn(relay.deliver(first, client));
        Ok(Response::new(ReceiverStream::new(reading)))
    }

    async fn tokenize(&self, request: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        let TokenizeRequest { model, text, parse_special, add_special } = request.into_inner();
        let route = self.upstream.routes.table().model(&model)?;
        let tokenizer = self.tokenizers.get(&route, &self.upstream).await?;
        let specials = if parse_special { Specials::Parse } else { Specials::AsText };
        let ids = self.blocking(text.len(), move || tokenizer.encode(&text, specials, add_special)).await?;
        let ids = ids.map_err(|error| refused("text", &error))?;
        Ok(Response::new(TokenizeResponse { ids }))
    }

    async fn list_models(&self, _: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        Ok(Response::new(ListModelsResponse { models: self.upstream.routes.table().models() }))
    }

    async fn get_model(&self, request: Request<GetModelRequest>) -> Result<Response<GetModelResponse>, Status> {
        let table = self.upstream.routes.table();
        let name = &table.model(&request.into_inner().model)?.model.name;
        let model = table.models().into_iter().find(|model| model.name == *name);
        Ok(Response::new(GetModelResponse { model }))
    }
}

impl Service {
    fn full(&self) -> Status {
        let message = format!("the gateway serves {} streams, its limit: try again later", self.streams_max);
        rich::retryable(Code::ResourceExhausted, "TOO_MANY_STREAMS", message, RETRY_AFTER)
    }

    async fn encode(
        &self,
        valid: Valid,
        tokenizer: &Arc<Tokenizer>,
        route: &Route,
    ) -> Result<(Valid, Vec<u32>), Status> {
        let bytes = valid.input.text_bytes() + valid.suffix.as_ref().map_or(0, String::len);
        let infill = route.model.capabilities.and_then(|capabilities| capabilities.infill);
        let (tokenizer, field) = (Arc::clone(tokenizer), valid.input.field());
        let encode = move || {
            let ids = prompt::encode(&tokenizer, &valid.input, valid.suffix.as_deref(), infill);
            ids.map(|ids| (valid, ids))
        };
        self.blocking(bytes, encode).await?.map_err(|error| refused(field, &error))
    }

    /// Runs what takes time in proportion to `bytes`.
    async fn blocking<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Status> {
        if bytes <= INLINE_TEXT_MAX {
            return Ok(work());
        }
        let failed = |_| rich::status(Code::Internal, "ENCODING_FAILED", "the text could not be encoded");
        let _turn = self.long_texts.acquire().await.map_err(|_| stopping())?;
        tokio::task::spawn_blocking(work).await.map_err(failed)
    }
}

/// The stack sees to it that there is one.
fn no_tenant() -> Status {
    rich::status(Code::Internal, "NO_TENANT", "nobody found out who asks")
}

/// The tokenizer or the template did not take the input.
fn refused(field: &str, error: &TextError) -> Status {
    rich::invalid(&[Violation::new(field, error.to_string())])
}
