//! The end that opens a connection.

use super::{HANDSHAKE_LIMIT, Tls};
use crate::network::{Connection, Dial, Dialling, tcp};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, InvalidMessage};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Longest wait for the first bytes of a server.
const FIRST_BYTES_LIMIT: Duration = Duration::from_millis(200);

/// TCP, then TLS with whoever the address names.
pub(crate) struct TlsDial(pub Tls);

impl Dial for TlsDial {
    fn dial(&self, address: String) -> Dialling {
        let config = self.0.client();
        Box::pin(async move {
            let name = server_name(&address)?;
            let handshake = TlsConnector::from(config).connect(name, tcp(&address).await?);
            let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
            let opened = match timeout(HANDSHAKE_LIMIT, handshake).await.map_err(late).flatten() {
                Ok(stream) => listen(stream).await,
                Err(error) => Err(error),
            };
            let named =
                |error: io::Error| io::Error::new(error.kind(), format!("TLS with {address}: {}", explain(&error)));
            opened.map(Connection::new).map_err(named)
        })
    }
}

/// Waits for what the server says first. In TLS 1.3 it judges our certificate after our part of the handshake, and a refusal
/// that comes once the connection is in use reaches nobody: its requests only learn that it closed. A server of HTTP/2 has
/// something to say as soon as it is content; one that waits for us costs [`FIRST_BYTES_LIMIT`].
async fn listen(stream: TlsStream<TcpStream>) -> io::Result<BufReader<TlsStream<TcpStream>>> {
    let mut stream = BufReader::new(stream);
    if let Ok(Err(error)) = timeout(FIRST_BYTES_LIMIT, stream.fill_buf()).await {
        return Err(error);
    }
    Ok(stream)
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
        Some(rustls::Error::AlertReceived(AlertDescription::CertificateRequired)) => {
            "the other side wants a certificate (CertificateRequired)".into()
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
