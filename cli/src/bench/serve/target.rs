//! Whom to ask, and what.

use super::prompts::Prompts;
use crate::local::{Gateway, gateway};
use crate::tls::ClientTlsArgs;
use anyhow::{Context, bail};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use unmask_proto::v1::generate_request::Input;
use unmask_proto::v1::{Decoding, GenerateRequest, ListModelsRequest, Model, ResolvedSettings};

/// Streams of one connection. A server bounds them; what waits for one would wait unseen in this process.
const STREAMS_PER_CONNECTION: u64 = 64;
/// Longest answer to the first call on a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Largest message of a stream (bytes).
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// What every request has in common.
pub struct Questions {
    /// Of the choice of prompts and the requests' own draws.
    pub seed: u64,
    /// To choose from.
    pub prompts: Prompts,
    /// Settings of every request; the seed is each request's own.
    pub decoding: Decoding,
    /// From sending a request to giving it up.
    pub timeout: Duration,
}

/// A gateway and what is asked of it.
pub struct Target {
    connections: Vec<Gateway>,
    /// The model that is asked.
    pub model: Model,
    questions: Questions,
    resolved: Arc<OnceLock<ResolvedSettings>>,
}

/// One request and the connection it goes over.
pub struct Asked {
    /// The connection.
    pub client: Gateway,
    /// The request.
    pub request: GenerateRequest,
    /// From sending it to giving it up.
    pub timeout: Duration,
    /// Set by the first request that learns them.
    pub resolved: Arc<OnceLock<ResolvedSettings>>,
}

impl Target {
    /// Opens as many connections as `streams` need and finds the model: the named one, or the only one.
    ///
    /// # Errors
    /// The gateway does not answer, or does not serve the model.
    pub async fn connect(
        endpoint: &str,
        tls: &ClientTlsArgs,
        model: Option<&str>,
        streams: u64,
        questions: Questions,
    ) -> anyhow::Result<Self> {
        let mut connections = Vec::new();
        let mut models = Vec::new();
        for _ in 0..streams.div_ceil(STREAMS_PER_CONNECTION).max(1) {
            let mut client = gateway(endpoint, tls)?.max_decoding_message_size(MESSAGE_BYTES_MAX);
            let listed = tokio::time::timeout(CONNECT_LIMIT, client.list_models(ListModelsRequest {})).await;
            let listed = listed.with_context(|| format!("{endpoint} does not answer"))?;
            models = listed.with_context(|| format!("cannot ask {endpoint} for its models"))?.into_inner().models;
            connections.push(client);
        }
        let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        let found = match (model, names.as_slice()) {
            (Some(name), _) => names.iter().position(|known| *known == name),
            (None, [_]) => Some(0),
            (None, _) => None,
        };
        let Some(found) = found else {
            let served = if names.is_empty() { "no model".to_owned() } else { names.join(", ") };
            bail!("--model must name a model that is served: {endpoint} serves {served}");
        };
        Ok(Self { connections, model: models.swap_remove(found), questions, resolved: Arc::default() })
    }

    /// Request `index`.
    pub fn ask(&self, index: u64) -> Asked {
        let (prompt, seed) = self.questions.prompts.pick(self.questions.seed, index);
        let request = GenerateRequest {
            model: self.model.name.clone(),
            input: Some(Input::Text(prompt.to_owned())),
            decoding: Some(Decoding { seed: Some(seed), ..self.questions.decoding.clone() }),
            ..GenerateRequest::default()
        };
        let connection = (index % self.connections.len() as u64) as usize;
        Asked {
            client: self.connections[connection].clone(),
            request,
            timeout: self.questions.timeout,
            resolved: self.resolved.clone(),
        }
    }

    /// Settings that a request was served with, once one was.
    pub fn resolved(&self) -> Option<&ResolvedSettings> {
        self.resolved.get()
    }
}
