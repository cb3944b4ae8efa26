//! Events to answers: one JSON object, or chunks of one. Pure, but for the time of day.

use super::request::Shape;
use crate::policy;
use serde_json::{Map, Value, json};
use std::time::{SystemTime, UNIX_EPOCH};
use unmask_proto::v1::{Draft, Finish, FinishReason, Started, Usage};

/// Which of OpenAI's interfaces is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    Chat,
    Completion,
}

/// What all parts of an answer have in common.
pub(super) struct Answer {
    shape: Shape,
    id: String,
    /// Seconds since 1970.
    created: u64,
    model: String,
    numerics_id: String,
    settings: Map<String, Value>,
}

impl Answer {
    /// The answer of a request that has begun.
    pub(super) fn new(shape: Shape, started: Started) -> Self {
        let prefix = match shape.api {
            Api::Chat => "chatcmpl",
            Api::Completion => "cmpl",
        };
        let settings = started.settings.unwrap_or_default();
        let mut own = Map::new();
        own.insert("block_size".into(), settings.block_size.into());
        own.insert("policy".into(), settings.policy.map(policy::to_json).into());
        own.insert("seed".into(), settings.seed.into());
        Self {
            shape,
            id: format!("{prefix}-{}", started.request_id),
            created: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            model: started.model,
            numerics_id: started.numerics_id,
            settings: own,
        }
    }

    fn object(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": self.numerics_id, "choices": choices,
        })
    }

    /// All of it.
    pub(super) fn whole(self, text: &str, finish: &Finish) -> Value {
        let (object, mut choice) = match self.shape.api {
            Api::Chat => {
                let message = json!({ "role": "assistant", "content": text, "refusal": null });
                ("chat.completion", json!({ "index": 0, "message": message }))
            }
            Api::Completion => ("text_completion", json!({ "index": 0, "text": text })),
        };
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = finish_reason(finish).into();
        let mut answer = self.object(object, vec![choice]);
        answer["usage"] = usage(finish.usage);
        let mut own = self.settings;
        own.extend(account(finish));
        answer["unmask"] = own.into();
        answer
    }

    fn chunk(&self, choices: Vec<Value>) -> Value {
        let object = match self.shape.api {
            Api::Chat => "chat.completion.chunk",
            Api::Completion => "text_completion",
        };
        let mut chunk = self.object(object, choices);
        if self.shape.usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn choice(&self, delta: Value, text: &str, reason: Option<&str>) -> Value {
        match self.shape.api {
            Api::Chat => json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": reason }),
            Api::Completion => json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": reason }),
        }
    }

    /// The first chunk: no text, the settings in force.
    pub(super) fn first(&self) -> Value {
        let choice = self.choice(json!({ "role": "assistant", "content": "" }), "", None);
        let mut chunk = self.chunk(vec![choice]);
        chunk["unmask"] = self.settings.clone().into();
        chunk
    }

    /// Text that stays.
    pub(super) fn text(&self, text: &str) -> Value {
        self.chunk(vec![self.choice(json!({ "content": text }), text, None)])
    }

    /// The open block; nothing in it is final, so that it stands beside an empty delta.
    pub(super) fn draft(&self, draft: &Draft) -> Value {
        let mut chunk = self.chunk(vec![self.choice(json!({}), "", None)]);
        let Draft { first_position, token_ids, masked, step, text } = draft;
        chunk["unmask"] = json!({ "draft": {
            "first_position": first_position, "token_ids": token_ids, "masked": masked, "step": step, "text": text,
        }});
        chunk
    }

    /// The last chunks: why it ended, and the usage where it is wanted.
    pub(super) fn last(&self, finish: &Finish) -> Vec<Value> {
        let mut chunk = self.chunk(vec![self.choice(json!({}), "", Some(finish_reason(finish)))]);
        chunk["unmask"] = account(finish).into();
        let mut chunks = vec![chunk];
        if self.shape.usage {
            let mut chunk = self.chunk(Vec::new());
            chunk["usage"] = usage(finish.usage);
            chunks.push(chunk);
        }
        chunks
    }
}

/// OpenAI knows two reasons to end: the model's or the user's, and a limit.
fn finish_reason(finish: &Finish) -> &'static str {
    match finish.reason() {
        FinishReason::Eos | FinishReason::Stop | FinishReason::Unspecified => "stop",
        FinishReason::Length | FinishReason::NfeCap | FinishReason::TimeLimit => "length",
    }
}

fn account(finish: &Finish) -> Map<String, Value> {
    let pairs = [
        ("reason", reason(finish).into()),
        ("nfe", finish.nfe.into()),
        ("tokens_per_forward", policy::number(finish.tokens_per_forward)),
        ("time_to_first_block_us", finish.time_to_first_block_us.into()),
        ("total_time_us", finish.total_time_us.into()),
    ];
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// Why a stream ended, by its name in lower case.
fn reason(finish: &Finish) -> String {
    finish.reason().as_str_name().trim_start_matches("FINISH_REASON_").to_lowercase()
}

fn usage(usage: Option<Usage>) -> Value {
    let Usage { prompt_tokens, completion_tokens } = usage.unwrap_or_default();
    json!({
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    })
}
