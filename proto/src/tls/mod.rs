//! TLS on the links between services and to their clients, by rustls: version 1.3, with certificates in PEM files that
//! are read again when they change.
//!
//! Modules in reading order:
//! - `config`: raw and validated settings
//! - `material`: files to what rustls takes
//! - `reload`: what is in force now
//! - `dial`, `accept`: the two ends of a connection
//! - `links`: all links of a service, plain ones too

mod accept;
mod config;
mod dial;
mod links;
mod material;
mod reload;
#[cfg(test)]
mod tests;

pub use accept::Protocol;
pub(crate) use accept::{ACCEPT_PAUSE, accept};
pub use config::{RawTls, TlsConfig};
pub(crate) use dial::TlsDial;
pub use links::{Links, PlainError};
pub use material::TlsError;
pub use reload::{RELOAD_INTERVAL, Tls};

use std::time::Duration;

/// Longest TLS handshake, of either end.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
