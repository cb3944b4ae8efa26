//! gRPC statuses with `google.rpc` details: a machine-readable reason, the fields at fault, when to retry.

use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Longest message, and most that all violations have together (bytes). They travel in headers, encoded up to threefold, of
/// which peers take 16 KiB as a rule and else close the connection with all its streams.
const TEXT_BYTES_MAX: usize = 2 << 10;

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
    Status::with_error_details(code, cut(message.into(), TEXT_BYTES_MAX), details)
}

/// `text`, or its beginning with an ellipsis.
fn cut(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        let end = (0..=bytes_max).rfind(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or(0));
        text.push('\u{2026}');
    }
    text
}

/// A status that carries `ErrorInfo` and `RetryInfo`.
pub fn retryable(code: Code, reason: &str, message: impl Into<String>, after: Duration) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, std::collections::HashMap::new());
    details.set_retry_info(Some(after));
    Status::with_error_details(code, cut(message.into(), TEXT_BYTES_MAX), details)
}

/// INVALID_ARGUMENT with every violation at once, in the message and as `BadRequest`; where they are too many or too long,
/// with as much as fits.
pub fn invalid(violations: &[Violation]) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info("INVALID_REQUEST", DOMAIN, std::collections::HashMap::new());
    let (mut listed, mut left) = (Vec::new(), TEXT_BYTES_MAX);
    for Violation { field, description } in violations {
        if left == 0 {
            listed.push(format!("and {} more", violations.len() - listed.len()));
            break;
        }
        let field = cut(field.clone(), left);
        left = left.saturating_sub(field.len());
        let description = cut(description.clone(), left);
        left = left.saturating_sub(description.len());
        listed.push(format!("{field}: {description}"));
        details.add_bad_request_violation(field, description);
    }
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

    #[test]
    fn what_clients_send_is_not_sent_back_without_limit() {
        let long = "\u{e9}".repeat(1 << 20);
        for status in [
            status(Code::NotFound, "R", &long),
            retryable(Code::Unavailable, "R", &long, Duration::ZERO),
            invalid(&[Violation::new("model", &long)]),
            invalid(&vec![Violation::new(&long, &long); 9]),
            invalid(&vec![Violation::new("messages[1].role", "is missing: give one"); 5000]),
        ] {
            let (message, details) = (status.message().len(), status.details().len());
            assert!(3 * message + details * 4 / 3 < 16 << 10, "{message} {details}");
        }
    }
}
