//! The `grpc-timeout` header: up to eight digits and a unit.

use crate::rich;
use std::time::Duration;
use tonic::{Code, Status};

/// Longest timeout that is kept (a longer one means the same).
pub const TIMEOUT_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// Reads a header's value; `None` where it cannot be shown as text.
///
/// # Errors
/// INVALID_ARGUMENT when it is not a number and a unit.
pub fn read(value: Option<&str>) -> Result<Duration, Status> {
    let parsed = value.and_then(parse).map(|timeout| timeout.min(TIMEOUT_MAX));
    parsed.ok_or_else(|| rich::status(Code::InvalidArgument, "BAD_TIMEOUT", "grpc-timeout is not a number and a unit"))
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        let cases = [
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("250m", Duration::from_millis(250)),
            ("7u", Duration::from_micros(7)),
            ("9n", Duration::from_nanos(9)),
            ("1H", Duration::from_secs(3600)),
            ("99999999H", TIMEOUT_MAX),
        ];
        for (text, expected) in cases {
            assert_eq!(read(Some(text)).unwrap(), expected, "{text}");
        }
        for text in ["", "S", "1", "123456789S", "-1S", "1\u{e9}", "1s"] {
            assert_eq!(read(Some(text)).unwrap_err().code(), Code::InvalidArgument, "{text}");
        }
        assert!(read(None).is_err());
    }
}
