//! The end that accepts connections.

use super::{HANDSHAKE_LIMIT, Tls};
use crate::network::Connection;
use std::collections::VecDeque;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

/// Handshakes under way; with more, the oldest gives way: one that is meant takes milliseconds.
pub(super) const HANDSHAKES_MAX: usize = 512;
/// Connections that wait to be served.
const READY_MAX: usize = 16;
/// Pause after an error that is not of one connection, such as too many open files.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// First byte of a client that speaks TLS: a record of its handshake.
const HANDSHAKE_RECORD: u8 = 22;
/// What is read, and thrown away, of a client that is refused, so that it gets to read why (bytes).
const UNREAD_BYTES_MAX: u64 = 64 << 10;
/// What a client of HTTP/2 begins with (RFC 9113, 3.4); its first three bytes tell it from one of HTTP/1.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Type of the frame that begins a request (6.2).
const HEADERS: u8 = 1;
/// Bytes of a frame before what it carries: length (3), type, flags, stream (4) (4.1).
const FRAME_HEADER_BYTES: usize = 9;
/// An empty SETTINGS (6.5).
const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
/// A GOAWAY of the last stream 0 with HTTP_1_1_REQUIRED and 31 bytes of debug data (6.8).
const GO_AWAY: &[u8] = b"\0\0\x27\x07\0\0\0\0\0\0\0\0\0\0\0\0\x0dthis port speaks TLS: use https";
const BAD_REQUEST: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 35\r\n\
    Connection: close\r\n\r\nthis port speaks TLS: use https://\n";

/// What is spoken over TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2.
    Grpc,
    /// HTTP/1.1.
    Http,
}

/// Accepts until nobody takes connections any more. Handshakes run beside each other; those that fail are logged.
pub(crate) fn accept(listener: TcpListener, tls: Tls, protocol: Protocol) -> mpsc::Receiver<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(READY_MAX);
    tokio::spawn(async move {
        let mut under_way = VecDeque::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (tls, ready) = (tls.clone(), ready.clone());
            let handshake = tokio::spawn(async move {
                let shaken = timeout(HANDSHAKE_LIMIT, shake(stream, &tls, protocol)).await;
                let late = || io::Error::new(io::ErrorKind::TimedOut, "no handshake in time");
                match shaken.unwrap_or_else(|_| Err(late())) {
                    Ok(connection) => drop(ready.send(Ok(connection)).await),
                    // Someone who only looks whether a port is open.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        tracing::debug!(%peer, %error, "a connection under TLS did not come about");
                    }
                    Err(error) => tracing::warn!(%peer, %error, "a connection under TLS did not come about"),
                }
            });
            admit(&mut under_way, handshake.abort_handle());
        }
    });
    connections
}

/// Counts a handshake in; the oldest makes room for it.
fn admit(under_way: &mut VecDeque<AbortHandle>, handshake: AbortHandle) {
    if under_way.len() >= HANDSHAKES_MAX {
        under_way.retain(|handshake| !handshake.is_finished());
    }
    if under_way.len() >= HANDSHAKES_MAX
        && let Some(oldest) = under_way.pop_front()
    {
        tracing::warn!(under_way = HANDSHAKES_MAX, "too many TLS handshakes; the oldest is given up");
        oldest.abort();
    }
    under_way.push_back(handshake);
}

async fn shake(mut stream: TcpStream, tls: &Tls, protocol: Protocol) -> io::Result<Connection> {
    // Of a peer that has gone already; reading will say so.
    let _ = stream.set_nodelay(true);
    let mut first = [0];
    if stream.peek(&mut first).await? == 1 && first[0] != HANDSHAKE_RECORD {
        refuse(&mut stream).await?;
        close(stream).await?;
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the client speaks no TLS"));
    }
    let config = tls.server(protocol).ok_or_else(|| io::Error::other("this process has no certificate"))?;
    match TlsAcceptor::from(config).accept(stream).into_fallible().await {
        Ok(stream) => Ok(Connection::new(stream)),
        Err((error, stream)) => {
            // What matters is why the handshake failed.
            let _ = close(stream).await;
            Err(error)
        }
    }
}

/// Tells a client in its own protocol that TLS is spoken here. One of HTTP/2 is told once it has asked for something: before, it
/// would learn only that the connection closed.
async fn refuse(stream: &mut TcpStream) -> io::Result<()> {
    let mut preface = [0; PREFACE.len()];
    let (begin, rest) = preface.split_at_mut(3);
    stream.read_exact(begin).await?;
    if begin != &PREFACE[..3] {
        return stream.write_all(BAD_REQUEST).await;
    }
    stream.read_exact(rest).await?;
    stream.write_all(SETTINGS).await?;
    let mut header = [0; FRAME_HEADER_BYTES];
    while header[3] != HEADERS {
        stream.read_exact(&mut header).await?;
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        tokio::io::copy(&mut (&mut *stream).take(length.into()), &mut tokio::io::sink()).await?;
    }
    stream.write_all(GO_AWAY).await
}

/// Closes once the client has closed too: bytes of it that nobody read would make the system take back what it was told.
async fn close(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(UNREAD_BYTES_MAX), &mut tokio::io::sink()).await?;
    Ok(())
}
