//! All links of a service: under TLS, or plain where that is safe or wanted.

use super::{Protocol, RawTls, Tls};
use crate::network::{Incoming, Network};
use std::io;
use std::net::SocketAddr;
use thiserror::Error;
use tokio::net::TcpListener;

/// How a service is connected.
#[derive(Debug, Clone, Default)]
pub struct Links {
    /// Certificates; without them links are plain.
    pub tls: Option<Tls>,
    /// Plain links may leave this machine: everybody on the network is trusted.
    pub insecure: bool,
}

/// Why a service does not listen.
#[derive(Debug, Error)]
pub enum PlainError {
    /// The listener has no address.
    #[error("listening: {0}")]
    Address(#[from] io::Error),
    /// Others than this machine's would read and write plain bytes.
    #[error(
        "{0} is reached from other machines, and links would be plain: give --tls-cert, --tls-key and --tls-ca, or \
         --insecure when everybody on the network can be trusted"
    )]
    NotLoopback(SocketAddr),
}

impl Links {
    /// Of a file's `[tls]` and `insecure`, with the certificates read; `require_client_cert` holds where the file says
    /// nothing.
    ///
    /// # Errors
    /// All that is wrong, each with its key.
    pub fn new(tls: Option<RawTls>, insecure: Option<bool>, require_client_cert: bool) -> Result<Self, Vec<String>> {
        let insecure = insecure.unwrap_or(false);
        let Some(raw) = tls else { return Ok(Self { tls: None, insecure }) };
        let mut errors = Vec::new();
        if insecure {
            errors.push("insecure: cannot be given with tls".into());
        }
        let loaded = raw.validate(require_client_cert).and_then(|config| {
            Tls::load(config).map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>())
        });
        match loaded {
            Ok(tls) if errors.is_empty() => Ok(Self { tls: Some(tls), insecure }),
            loaded => {
                errors.extend(loaded.err().into_iter().flatten());
                Err(errors)
            }
        }
    }

    /// The way to other services.
    pub fn network(&self) -> Network {
        self.tls.clone().map_or_else(Network::default, Network::tls)
    }

    /// The connections of a bound socket.
    ///
    /// # Errors
    /// They would be plain and come from other machines, which nobody said is wanted.
    pub fn incoming(&self, listener: TcpListener, protocol: Protocol) -> Result<Incoming, PlainError> {
        match &self.tls {
            Some(tls) => Ok(Incoming::tls(listener, tls.clone(), protocol)),
            None => {
                let address = listener.local_addr()?;
                if address.ip().is_loopback() || self.insecure {
                    Ok(listener.into())
                } else {
                    Err(PlainError::NotLoopback(address))
                }
            }
        }
    }

    /// Follows the certificates' files for as long as it is polled.
    pub async fn follow(&self) {
        match &self.tls {
            Some(tls) => tls.clone().follow().await,
            None => std::future::pending().await,
        }
    }
}
