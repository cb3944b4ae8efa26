//! The end that opens a connection.

use super::{HANDSHAKE_LIMIT, Tls};
use crate::network::{Connection, Dial, Dialling, tcp};
use rustls::InvalidMessage;
use rustls::pki_types::ServerName;
use std::io;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// TCP, then TLS with whoever the address names.
pub(crate) struct TlsDial(pub Tls);

impl Dial for TlsDial {
    fn dial(&self, address: String) -> Dialling {
        let config = self.0.client();
        Box::pin(async move {
            let name = server_name(&address)?;
            let handshake = TlsConnector::from(config).connect(name, tcp(&address).await?);
            match timeout(HANDSHAKE_LIMIT, handshake).await {
                Ok(Ok(stream)) => Ok(Connection::new(stream)),
                Ok(Err(error)) => Err(io::Error::new(error.kind(), format!("TLS with {address}: {}", explain(&error)))),
                Err(_) => {
                    Err(io::Error::new(io::ErrorKind::TimedOut, format!("TLS with {address}: no answer in time")))
                }
            }
        })
    }
}

/// The host of host:port, which may be an IP address, with brackets around one of version 6.
fn server_name(address: &str) -> io::Result<ServerName<'static>> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("`{host}` is no name that a certificate has")))
}

fn explain(error: &io::Error) -> String {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    match cause {
        Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            "the other side speaks no TLS".into()
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_of_servers_are_hosts_and_addresses() {
        for (address, name) in [("worker-3:7702", "worker-3"), ("10.0.0.1:1", "10.0.0.1"), ("[::1]:1", "::1")] {
            assert_eq!(server_name(address).unwrap().to_str(), name);
        }
        assert!(server_name("a b:1").is_err());
    }
}
