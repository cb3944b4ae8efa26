//! Statuses to HTTP errors, in OpenAI's form.

use axum::http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Names of OpenAI's for fields of gRPC's request; what is not here has the same.
const NAMES: [(&str, &str); 12] = [
    ("text", "prompt"),
    ("input", "prompt"),
    ("token_ids.ids", "prompt"),
    ("token_ids", "prompt"),
    ("chat", "messages"),
    ("decoding.temperature", "temperature"),
    ("decoding.top_p", "top_p"),
    ("decoding.top_k", "top_k"),
    ("decoding.seed", "seed"),
    ("decoding.stop", "stop"),
    ("priority", "unmask.priority"),
    ("decoding", "unmask"),
];

/// An answer that is an error.
#[derive(Debug)]
pub(super) struct Failure {
    http: StatusCode,
    /// `None` where no field is at fault.
    param: Option<String>,
    code: String,
    message: String,
    retry_after: Option<Duration>,
}

impl Failure {
    /// An error that only HTTP has.
    pub(super) fn new(http: StatusCode, code: &str, message: impl Into<String>) -> Self {
        Self { http, param: None, code: code.into(), message: message.into(), retry_after: None }
    }

    /// A status, its fields by the names that the body gave them.
    pub(super) fn of(status: &Status, max_tokens_key: &str) -> Self {
        let details = status.get_error_details();
        let reason = details.error_info().map_or_else(|| format!("{:?}", status.code()), |info| info.reason.clone());
        let fields = details.bad_request().map_or(&[][..], |bad| &bad.field_violations);
        let fields: Vec<(String, &str)> =
            fields.iter().map(|found| (name(&found.field, max_tokens_key), found.description.as_str())).collect();
        let listed: Vec<String> = fields.iter().map(|(name, what)| format!("{name}: {what}")).collect();
        Self {
            http: http(status.code()),
            param: fields.into_iter().next().map(|(name, _)| name),
            code: match reason.as_str() {
                // As OpenAI's clients know them.
                "API_KEY" => "invalid_api_key".into(),
                "UNKNOWN_MODEL" => "model_not_found".into(),
                reason => reason.to_lowercase(),
            },
            message: if listed.is_empty() { status.message().to_owned() } else { listed.join("; ") },
            retry_after: details.retry_info().and_then(|info| info.retry_delay),
        }
    }

    /// The body.
    pub(super) fn json(&self) -> Value {
        let kind = match self.http {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            http if http.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": self.code } })
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Failure::of(&status, "max_tokens")
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = self.json().to_string();
        let mut response = (self.http, json_header(), body).into_response();
        if let Some(after) = self.retry_after {
            // Whole seconds; none would mean at once.
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        response
    }
}

/// Header of every answer that is JSON.
pub(super) fn json_header() -> [(HeaderName, HeaderValue); 1] {
    [(CONTENT_TYPE, HeaderValue::from_static("application/json"))]
}

fn http(code: Code) -> StatusCode {
    match code {
        Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// A field of gRPC's request as OpenAI calls it.
fn name(field: &str, max_tokens_key: &str) -> String {
    if field == "decoding.max_tokens" {
        return max_tokens_key.to_owned();
    }
    // With the index or the part that follows.
    let known = NAMES.iter().find_map(|(ours, theirs)| {
        let rest = field.strip_prefix(ours).filter(|rest| rest.is_empty() || rest.starts_with(['[', '.']))?;
        Some((theirs, rest))
    });
    match known {
        Some((theirs, rest)) => format!("{theirs}{}", rest.strip_prefix(".messages").unwrap_or(rest)),
        None => field.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unmask_proto::rich::{self, Violation};

    #[test]
    fn fields_have_the_names_that_the_body_gave_them() {
        let cases = [
            ("text", "prompt"),
            ("token_ids.ids[3]", "prompt[3]"),
            ("chat", "messages"),
            ("chat.messages", "messages"),
            ("chat.messages[2].role", "messages[2].role"),
            ("decoding.max_tokens", "max_completion_tokens"),
            ("decoding.stop[1]", "stop[1]"),
            ("decoding.stop_token_ids", "unmask.stop_token_ids"),
            ("decoding.policy.threshold.tau", "unmask.policy.threshold.tau"),
            ("priority", "unmask.priority"),
            ("model", "model"),
            ("suffix", "suffix"),
            ("input", "prompt"),
            ("decoding.block_size", "unmask.block_size"),
        ];
        for (ours, theirs) in cases {
            assert_eq!(name(ours, "max_completion_tokens"), theirs);
        }
    }

    #[test]
    fn statuses_become_errors_of_openai_with_all_fields() {
        let found = [Violation::new("decoding.top_p", "is 2"), Violation::new("text", "is empty")];
        let failure = Failure::from(rich::invalid(&found));
        assert_eq!(failure.http, StatusCode::BAD_REQUEST);
        let expected = json!({ "error": {
            "message": "top_p: is 2; prompt: is empty", "type": "invalid_request_error", "param": "top_p",
            "code": "invalid_request",
        }});
        assert_eq!(failure.json(), expected);
    }

    #[test]
    fn codes_have_their_http_status_and_say_when_to_try_again() {
        let cases = [
            (Code::Unauthenticated, 401, "authentication_error"),
            (Code::NotFound, 404, "invalid_request_error"),
            (Code::ResourceExhausted, 429, "rate_limit_error"),
            (Code::Unavailable, 503, "server_error"),
            (Code::DeadlineExceeded, 504, "server_error"),
            (Code::Internal, 500, "server_error"),
            (Code::Aborted, 500, "server_error"),
        ];
        for (code, http, kind) in cases {
            let failure = Failure::from(rich::retryable(code, "WHY", "m", Duration::from_millis(1200)));
            let expected = json!({ "error": { "message": "m", "type": kind, "param": null, "code": "why" } });
            assert_eq!((failure.http.as_u16(), failure.json()), (http, expected));
            assert_eq!(failure.into_response().headers()[RETRY_AFTER], "2");
        }
        let plain = Failure::from(Status::internal("m"));
        assert_eq!(plain.json()["error"]["code"], "internal");
        assert!(!plain.into_response().headers().contains_key(RETRY_AFTER));
    }
}
