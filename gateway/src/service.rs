//! The path of a request: validate, tokenize, resolve, route; then the stream has a task of its own. gRPC's side of it is
//! here too, HTTP's in `openai`.

use crate::admission::{Admission, Ask};
use crate::dice::Dice;
use crate::edit::{self, Changes};
use crate::prompt::Prompt;
use crate::relay::{Client, EVENTS_MAX, Job, Relay, stopping};
use crate::route::Route;
use crate::routes::Table;
use crate::settings;
use crate::stack::Deadline;
use crate::stream::Assembler;
use crate::tenants::Tenant;
use crate::tokenizers::Tokenizers;
use crate::upstream::{Method, Upstream};
use crate::validate::{Resumed, Valid, validate};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};
use unmask_proto::rich::{self, Violation};
use unmask_proto::v1::inference_service_server::InferenceService;
use unmask_proto::v1::{
    EditRequest, EditResponse, GenerateRequest, GenerateResponse, GetModelRequest, GetModelResponse, ListModelsRequest,
    ListModelsResponse, Model, TokenizeRequest, TokenizeResponse,
};
use unmask_text::{Specials, TextError, Tokenizer};

/// Text up to this length is encoded at once, longer text on a thread that may block (bytes).
const INLINE_TEXT_MAX: usize = 16 << 10;
/// Most long texts that are encoded at a time.
pub(crate) const LONG_TEXTS_MAX: usize = 4;

/// Longest wait of a request that has not begun for a group of its model: a rank that hangs is replaced within about four
/// seconds.
const BEGIN_WAIT: Duration = Duration::from_secs(5);

/// What the service serves.
pub(crate) struct Service {
    pub dice: Arc<Dice>,
    pub upstream: Arc<Upstream>,
    pub tokenizers: Tokenizers,
    pub admission: Arc<Admission>,
    pub long_texts: Arc<Semaphore>,
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
        let caller = Caller::of(request.extensions().get(), request.extensions().get(), arrived)?;
        Ok(Response::new(ReceiverStream::new(self.start(request.into_inner(), caller).await?)))
    }

    type EditStream = Pin<Box<dyn Stream<Item = Result<EditResponse, Status>> + Send>>;

    async fn edit(&self, request: Request<EditRequest>) -> Result<Response<Self::EditStream>, Status> {
        let caller = Caller::of(request.extensions().get(), request.extensions().get(), Instant::now())?;
        let (reading, mut changes) = self.start_edit(request.into_inner(), caller).await?;
        let events = ReceiverStream::new(reading).filter_map(move |event| match event {
            Ok(GenerateResponse { event }) => event.and_then(|event| changes.event(event)).map(Ok),
            Err(status) => Some(Err(status)),
        });
        Ok(Response::new(Box::pin(events)))
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
        Ok(Response::new(ListModelsResponse { models: self.models() }))
    }

    async fn get_model(&self, request: Request<GetModelRequest>) -> Result<Response<GetModelResponse>, Status> {
        Ok(Response::new(GetModelResponse { model: self.model(&request.into_inner().model)? }))
    }
}

/// Who asks, since when and until when.
pub(crate) struct Caller {
    tenant: Arc<Tenant>,
    arrived: Instant,
    deadline: Option<Instant>,
}

impl Caller {
    /// What the stack found out about a call.
    ///
    /// # Errors
    /// INTERNAL when it did not find out who asks.
    pub(crate) fn of(
        tenant: Option<&Arc<Tenant>>,
        deadline: Option<&Deadline>,
        arrived: Instant,
    ) -> Result<Self, Status> {
        let tenant = tenant.cloned();
        // The stack sees to it that there is one.
        let tenant = tenant.ok_or_else(|| rich::status(Code::Internal, "NO_TENANT", "nobody found out who asks"))?;
        Ok(Self { tenant, arrived, deadline: deadline.map(|deadline| deadline.0) })
    }
}

impl Service {
    /// Begins a generation: the way of every request, whatever protocol it came by. Events come until Finish or an error;
    /// dropping the receiver cancels.
    ///
    /// # Errors
    /// What keeps the stream from beginning.
    pub(crate) async fn start(
        &self,
        request: GenerateRequest,
        caller: Caller,
    ) -> Result<mpsc::Receiver<Result<GenerateResponse, Status>>, Status> {
        let tenant = self.admit(&caller)?;
        let numerics = request.resume.as_ref().map_or("", |resume| &resume.numerics_id);
        let wanted = (request.model.as_str(), numerics, request.suffix.is_some());
        let (table, route) = self.group(wanted, caller.deadline).await?;
        let chosen = table.policy(&route.model.name);
        let valid =
            validate(request, &route.model, chosen, self.dice.number()).map_err(|found| rich::invalid(&found))?;
        let tokenizer = self.tokenizers.get(&route, &self.upstream).await?;
        let (valid, prompt) = self.encode(valid, &tokenizer, &route).await?;
        let settings = settings::fit(&valid, &route.model, &prompt).map_err(|found| rich::invalid(&[found]))?;
        let begun = valid.resume.is_some();
        let resumed = valid.resume.unwrap_or_else(|| Resumed {
            request_id: self.dice.name(),
            received: Vec::new(),
            passes_used: 0,
        });
        let stops = settings.stop.clone();
        let mut assembler = Assembler::new(tokenizer, prompt.ids.len() as u32, prompt.typed(), stops);
        let Resumed { request_id, received, passes_used } = resumed;
        let bytes = received.len() * size_of::<u32>();
        let resume = move || {
            assembler.resume(&received, passes_used);
            assembler
        };
        let assembler = self.blocking(bytes, resume).await?;
        let job = Job {
            method: if begun { Method::Resume } else { Method::Generate },
            request_id,
            model: Arc::clone(&route.model),
            opening: prompt.opening(),
            prompt: prompt.ids,
            suffix: prompt.suffix,
            settings,
            draft: None,
            drafts: valid.drafts,
            priority: valid.priority,
            salt: caller.tenant.salt(),
            arrived: caller.arrived,
            deadline: caller.deadline,
        };
        self.begin(job, assembler, begun, &caller, tenant).await
    }

    /// Begins to edit a text; otherwise as [`Service::start`].
    ///
    /// # Errors
    /// What keeps the stream from beginning.
    async fn start_edit(
        &self,
        request: EditRequest,
        caller: Caller,
    ) -> Result<(mpsc::Receiver<Result<GenerateResponse, Status>>, Changes), Status> {
        let tenant = self.admit(&caller)?;
        let (_, route) = self.group((&request.model, "", false), caller.deadline).await?;
        let valid = edit::validate(request, &route.model).map_err(|found| rich::invalid(&found))?;
        let tokenizer = self.tokenizers.get(&route, &self.upstream).await?;
        let bytes = valid.text_bytes();
        let edit::Valid { pieces, mut settings, priority } = valid;
        let encoder = Arc::clone(&tokenizer);
        let draft = self.blocking(bytes, move || edit::encode(&encoder, &pieces)).await?;
        let draft = draft.map_err(|error| refused("spans", &error))?;
        let (tokens, most) = (draft.token_ids.len(), route.model.context_length);
        if tokens == 0 || tokens > most as usize {
            let description = format!("give {tokens} tokens, must be 1 to the model's context of {most}");
            return Err(rich::invalid(&[Violation::new("spans", description)]));
        }
        settings.max_tokens = tokens as u32;
        let job = Job {
            method: Method::Edit,
            request_id: self.dice.name(),
            model: Arc::clone(&route.model),
            prompt: Vec::new(),
            suffix: Vec::new(),
            opening: Vec::new(),
            settings,
            draft: Some(draft.clone()),
            drafts: false,
            priority,
            salt: caller.tenant.salt(),
            arrived: caller.arrived,
            deadline: caller.deadline,
        };
        let assembler = Assembler::new(tokenizer, 0, "", Vec::new());
        Ok((self.begin(job, assembler, false, &caller, tenant).await?, Changes::new(draft)))
    }

    /// Its tenant may have one more stream.
    fn admit(&self, caller: &Caller) -> Result<Option<OwnedSemaphorePermit>, Status> {
        if self.draining.is_cancelled() {
            return Err(stopping());
        }
        caller.tenant.stream()
    }

    /// Waits for its turn, then gives a job to a group; from then on its stream has a task of its own.
    async fn begin(
        &self,
        job: Job,
        assembler: Assembler,
        begun: bool,
        caller: &Caller,
        tenant: Option<OwnedSemaphorePermit>,
    ) -> Result<mpsc::Receiver<Result<GenerateResponse, Status>>, Status> {
        // What a resumed stream already has was paid for where it came from.
        let rows = job.positions().saturating_sub(assembler.ids().len() as u64);
        caller.tenant.spend(rows)?;
        let spent = Spent { tenant: &caller.tenant, rows };
        let ask = Ask {
            tenant: job.salt,
            weight: caller.tenant.weight(),
            rows,
            priority: job.priority,
            deadline: [job.deadline, job.time_limit()].into_iter().flatten().min(),
            begun,
        };
        let ticket = self.admission.enter(ask).await?;
        self.upstream.retries().deposit(Instant::now().into_std());
        let mut relay = Relay::new(Arc::clone(&self.upstream), job, assembler, self.begin_wait());
        let first = match relay.over() {
            Some(_) => None,
            None => Some(relay.open().await?),
        };
        spent.kept();
        let (events, reading) = mpsc::channel(EVENTS_MAX);
        // The channel is empty: the first event fits.
        let _ = events.try_send(Ok(GenerateResponse { event: Some(relay.started()) }));
        let Service { stall_limit, group_wait, .. } = *self;
        let client = Client { events, stall_limit, group_wait, stop: self.stop.clone(), _permits: (ticket, tenant) };
        tokio::spawn(relay.deliver(first, client));
        Ok(reading)
    }

    /// Some group of a model, and the table it is in; the numerics it must have and whether it has to read behind the output
    /// come with the name. Where a model that was served has
    /// none at present, waits a little: a group that lost a rank forms anew within seconds.
    ///
    /// # Errors
    /// As [`Table::some_group`](crate::routes::Table::some_group).
    async fn group(
        &self,
        (model, numerics, between): (&str, &str, bool),
        deadline: Option<Instant>,
    ) -> Result<(Arc<Table>, Arc<Route>), Status> {
        let patience = Instant::now() + self.begin_wait();
        let until = deadline.map_or(patience, |deadline| deadline.min(patience));
        let mut tables = self.upstream.routes.watch();
        loop {
            let table = Arc::clone(&tables.borrow_and_update());
            let status = match table.some_group(model, numerics, between, Instant::now().into_std()) {
                Ok(route) => return Ok((table, route)),
                Err(status) => status,
            };
            let comes = async {
                tokio::select! {
                    biased;
                    changed = tables.changed() => changed.is_ok(),
                    () = self.draining.cancelled() => false,
                }
            };
            if !table.had(model) || !tokio::time::timeout_at(until, comes).await.unwrap_or(false) {
                return Err(status);
            }
        }
    }

    /// How long a request that has not begun waits for a group.
    fn begin_wait(&self) -> Duration {
        BEGIN_WAIT.min(self.group_wait)
    }

    /// The ready models.
    pub(crate) fn models(&self) -> Vec<Model> {
        self.upstream.routes.table().models()
    }

    /// One of them by name; an empty name stands for the only one.
    ///
    /// # Errors
    /// It is not known, or has no ready group.
    pub(crate) fn model(&self, name: &str) -> Result<Option<Model>, Status> {
        let table = self.upstream.routes.table();
        let name = &table.model(name)?.model.name;
        Ok(table.models().into_iter().find(|model| model.name == *name))
    }

    /// Whether any model has a ready group and new requests are taken.
    pub(crate) fn serving(&self) -> bool {
        !self.upstream.routes.table().routes.is_empty() && !self.draining.is_cancelled()
    }

    async fn encode(&self, valid: Valid, tokenizer: &Arc<Tokenizer>, route: &Route) -> Result<(Valid, Prompt), Status> {
        let bytes = valid.input.text_bytes() + valid.suffix.as_ref().map_or(0, String::len);
        let capabilities = route.model.capabilities.unwrap_or_default();
        let (tokenizer, field) = (Arc::clone(tokenizer), valid.input.field());
        let encode = move || {
            let prompt = Prompt::of(&tokenizer, &valid, &capabilities);
            prompt.map(|prompt| (valid, prompt))
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
        let turn = Arc::clone(&self.long_texts).acquire_owned().await.map_err(|_| stopping())?;
        let work = move || {
            // Held until the work is done: it goes on when the client has gone.
            let _turn = turn;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(failed)
    }
}

/// Rows that a tenant has spent on a request; back when no group takes it, or its client goes before.
struct Spent<'a> {
    tenant: &'a Tenant,
    rows: u64,
}

impl Spent<'_> {
    /// A group works on them.
    fn kept(mut self) {
        self.rows = 0;
    }
}

impl Drop for Spent<'_> {
    fn drop(&mut self) {
        self.tenant.refund(self.rows);
    }
}

/// The tokenizer or the template did not take the input.
fn refused(field: &str, error: &TextError) -> Status {
    rich::invalid(&[Violation::new(field, error.to_string())])
}
