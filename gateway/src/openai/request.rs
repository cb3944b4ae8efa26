//! Bodies to requests. What a field means is checked here; whether the model can do it, where gRPC's requests are checked.

use super::answer::Api;
use super::fields::Fields;
use crate::policy;
use crate::validate::MESSAGES_MAX;
use serde_json::{Map, Value, json};
use unmask_proto::rich::Violation;
use unmask_proto::v1::generate_request::Input;
use unmask_proto::v1::{ChatMessage, ChatMessages, Decoding, GenerateRequest, TokenIds};

/// A body's request, and how it is to be answered.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wanted {
    pub request: GenerateRequest,
    pub shape: Shape,
    /// The key that said how many tokens.
    pub max_tokens_key: &'static str,
}

/// Shape of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub api: Api,
    /// In chunks.
    pub stream: bool,
    /// A last chunk tells the usage.
    pub usage: bool,
}

const MAX_TOKENS: &str = "max_tokens";
const MAX_COMPLETION_TOKENS: &str = "max_completion_tokens";

/// Reads a body.
///
/// # Errors
/// Everything wrong with it.
pub(super) fn read(body: Value, api: Api) -> Result<Wanted, Vec<Violation>> {
    let mut fields = Fields::new(body, "");
    let model = fields.take("model").unwrap_or_default();
    let (input, suffix) = match api {
        Api::Chat => (messages(&mut fields), None),
        Api::Completion => (prompt(&mut fields), fields.take("suffix")),
    };
    let (max_tokens, max_tokens_key) = max_tokens(&mut fields, api);
    let shape = shape(&mut fields, api);
    let mut decoding = Decoding {
        max_tokens,
        temperature: fields.take("temperature"),
        top_p: fields.take("top_p"),
        top_k: fields.take("top_k"),
        seed: fields.take("seed"),
        stop: stop(&mut fields),
        ..Decoding::default()
    };
    let (mut stream_drafts, mut priority) = (false, None);
    if let Some(mut own) = fields.within("unmask") {
        decoding.block_size = own.take("block_size");
        decoding.nfe_cap = own.take("nfe_cap");
        decoding.time_limit_ms = own.take("time_limit_ms");
        decoding.stop_token_ids = own.take("stop_token_ids").unwrap_or_default();
        decoding.policy = match own.value("policy").map(policy::from_json).transpose() {
            Ok(policy) => policy,
            Err(problem) => {
                own.wrong("policy", problem);
                None
            }
        };
        priority = own.take("priority");
        stream_drafts = own.take("drafts").unwrap_or(false);
        if stream_drafts && !shape.stream {
            own.wrong("drafts", "come in a stream only: set stream or leave it out");
        }
        fields.close(own);
    }
    unsupported(&mut fields, api);
    let problems = fields.end();
    if !problems.is_empty() {
        return Err(problems);
    }
    let request =
        GenerateRequest { model, input, suffix, decoding: Some(decoding), stream_drafts, priority, resume: None };
    Ok(Wanted { request, shape, max_tokens_key })
}

fn max_tokens(fields: &mut Fields, api: Api) -> (Option<u32>, &'static str) {
    let said = fields.take(MAX_TOKENS);
    // Its newer name, of chats only.
    let newer = if api == Api::Chat { fields.take(MAX_COMPLETION_TOKENS) } else { None };
    match (said, newer) {
        (None, Some(newer)) => (Some(newer), MAX_COMPLETION_TOKENS),
        (Some(said), Some(newer)) if said != newer => {
            fields.wrong(MAX_COMPLETION_TOKENS, format!("is {newer}, but {MAX_TOKENS} is {said}: give one of them"));
            (None, MAX_TOKENS)
        }
        _ => (said, MAX_TOKENS),
    }
}

fn shape(fields: &mut Fields, api: Api) -> Shape {
    let stream = fields.take("stream").unwrap_or(false);
    let mut usage = false;
    if let Some(mut options) = fields.within("stream_options") {
        usage = options.take("include_usage").unwrap_or(false);
        options.only("include_obfuscation", &[json!(false)]);
        fields.close(options);
        if !stream {
            fields.wrong("stream_options", "goes with stream only: set stream or leave it out");
        }
    }
    Shape { api, stream, usage }
}

/// Keys of OpenAI's that are taken as long as they change nothing.
fn unsupported(fields: &mut Fields, api: Api) {
    // Labels for whoever keeps accounts.
    let _: (Option<String>, Option<Map<String, Value>>) = (fields.take("user"), fields.take("metadata"));
    fields.only("n", &[json!(1)]);
    fields.only("presence_penalty", &[json!(0)]);
    fields.only("frequency_penalty", &[json!(0)]);
    fields.only("logit_bias", &[json!({})]);
    match api {
        Api::Completion => {
            fields.only("best_of", &[json!(1)]);
            fields.only("echo", &[json!(false)]);
            // 0 would be the log probability of the token itself.
            fields.only("logprobs", &[]);
        }
        Api::Chat => {
            fields.only("logprobs", &[json!(false)]);
            fields.only("top_logprobs", &[json!(0)]);
            fields.only("response_format", &[json!({ "type": "text" })]);
            fields.only("modalities", &[json!(["text"])]);
            fields.only("store", &[json!(false)]);
            fields.only("service_tier", &[json!("auto"), json!("default")]);
            fields.only("tools", &[json!([])]);
            fields.only("functions", &[json!([])]);
            // Without tools these choose nothing.
            fields.only("tool_choice", &[json!("none"), json!("auto")]);
            fields.only("function_call", &[json!("none"), json!("auto")]);
            fields.only("parallel_tool_calls", &[json!(true), json!(false)]);
        }
    }
}

/// A text or a list of texts.
fn stop(fields: &mut Fields) -> Vec<String> {
    match fields.value("stop") {
        None => Vec::new(),
        Some(Value::String(one)) => vec![one],
        Some(list) => serde_json::from_value(list).unwrap_or_else(|_| {
            fields.wrong("stop", "must be a string or a list of strings");
            Vec::new()
        }),
    }
}

/// A text, a list with one text, or a list of token ids.
fn prompt(fields: &mut Fields) -> Option<Input> {
    let value = match fields.value("prompt") {
        Some(Value::Array(mut list)) if list.len() == 1 && !list[0].is_number() => list.remove(0),
        Some(value) => value,
        None => {
            fields.wrong("prompt", "is missing: give a string or a list of token ids");
            return None;
        }
    };
    match value {
        Value::String(text) => return Some(Input::Text(text)),
        Value::Array(list) if list.iter().all(Value::is_number) => {
            if let Ok(ids) = serde_json::from_value(Value::Array(list)) {
                return Some(Input::TokenIds(TokenIds { ids }));
            }
        }
        Value::Array(list) if list.len() > 1 && list.iter().all(|prompt| prompt.is_string() || prompt.is_array()) => {
            fields.wrong("prompt", format!("holds {} prompts: send a request for each", list.len()));
            return None;
        }
        _ => {}
    }
    fields.wrong("prompt", "must be a string, a list with one string, or a list of token ids");
    None
}

fn messages(fields: &mut Fields) -> Option<Input> {
    let list: Option<Vec<Value>> = match fields.value("messages") {
        Some(Value::Array(list)) => Some(list),
        Some(_) => {
            fields.wrong("messages", "must be a list of messages");
            None
        }
        None => {
            fields.wrong("messages", "is missing: give at least one message");
            None
        }
    };
    let list = list?;
    if list.len() > MESSAGES_MAX {
        fields.wrong("messages", format!("holds {} messages, at most {MESSAGES_MAX} are taken", list.len()));
        return None;
    }
    let mut messages = Vec::new();
    for (at, value) in list.into_iter().enumerate() {
        let mut message = Fields::new(value, &format!("messages[{at}]"));
        messages.push(ChatMessage { role: role(&mut message), content: content(&mut message) });
        // What OpenAI's clients send back of an answer.
        for key in ["refusal", "audio", "function_call"] {
            message.only(key, &[]);
        }
        message.only("tool_calls", &[json!([])]);
        message.only("annotations", &[json!([])]);
        fields.close(message);
    }
    Some(Input::Chat(ChatMessages { messages }))
}

fn role(message: &mut Fields) -> String {
    match message.value("role") {
        Some(Value::String(role)) if ["system", "user", "assistant"].contains(&role.as_str()) => return role,
        Some(Value::String(role)) if role == "developer" => return "system".into(),
        Some(role) => message.wrong("role", format!("must be system, developer, user or assistant, is {role}")),
        None => message.wrong("role", "is missing: give system, developer, user or assistant"),
    }
    String::new()
}

/// A text, or a list of parts that are texts.
fn content(message: &mut Fields) -> String {
    let parts = match message.value("content") {
        Some(Value::String(text)) => return text,
        Some(Value::Array(parts)) => parts,
        Some(_) => {
            message.wrong("content", "must be a string or a list of text parts");
            return String::new();
        }
        None => {
            message.wrong("content", "is missing: give a string or a list of text parts");
            return String::new();
        }
    };
    let mut all = String::new();
    for (at, value) in parts.into_iter().enumerate() {
        let name = format!("content[{at}]");
        let kind = value.get("type").cloned().unwrap_or_default();
        if kind != "text" {
            message.wrong(&name, format!("has type {kind}, which is not supported: only text is"));
            continue;
        }
        let mut part = message.part(value, &name);
        let _: Option<Value> = part.value("type");
        match part.value("text") {
            Some(Value::String(text)) => all += &text,
            _ => part.wrong("text", "must be a string"),
        }
        message.close(part);
    }
    all
}

#[cfg(test)]
mod tests;
