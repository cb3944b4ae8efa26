//! gRPC statuses with `google.rpc` details: a machine-readable reason, the fields at fault, when to retry.

use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Domain of every `ErrorInfo` this project sends.
pub const DOMAIN: &str = "unmask";

/// One field of a request and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field, as in the `.proto` file.
    pub field: String,
    /// What is wrong and what would be right.
    pub description: String,
}

impl Violation {
    /// A violation of `field`.
    pub fn new(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self { field: field.into(), description: description.into() }
    }
}

/// A status that carries `ErrorInfo { reason, domain }`.
pub fn status(code: Code, reason: &str, message: impl Into<String>) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, std::collections::HashMap::new());
    Status::with_error_details(code, message, details)
}

/// A status that carries `ErrorInfo` and `RetryInfo`.
pub fn retryable(code: Code, reason: &str, message: impl Into<String>, after: Duration) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, std::collections::HashMap::new());
    details.set_retry_info(Some(after));
    Status::with_error_details(code, message, details)
}

/// INVALID_ARGUMENT with every violation at once, in the message and as `BadRequest`.
pub fn invalid(violations: &[Violation]) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info("INVALID_REQUEST", DOMAIN, std::collections::HashMap::new());
    for violation in violations {
        details.add_bad_request_violation(&violation.field, &violation.description);
    }
    let listed: Vec<_> = violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect();
    Status::with_error_details(Code::InvalidArgument, listed.join("; "), details)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_lists_every_field_in_message_and_details() {
        let status = invalid(&[
            Violation::new("decoding.temperature", "must be at least 0"),
            Violation::new("model", "not found"),
        ]);
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "decoding.temperature: must be at least 0; model: not found");
        let details = status.get_error_details();
        assert_eq!(details.bad_request().map(|b| b.field_violations.len()), Some(2));
        assert_eq!(details.error_info().map(|i| i.domain.as_str()), Some(DOMAIN));
    }
}
