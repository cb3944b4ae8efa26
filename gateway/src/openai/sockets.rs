//! HTTP/1.1 connections: how many, and how long they may say or take nothing.

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use hyper::body::Incoming as HyperBody;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceExt as _};
use unmask_proto::network::Incoming;

/// Open connections; others wait to be accepted.
const CONNECTIONS_MAX: usize = 4096;
/// Longest wait for all of a request's headers, also of the next request on a connection.
const HEADERS_LIMIT: Duration = Duration::from_secs(30);

/// Answers what comes in by `service` until `close`; then nothing is accepted any more, and connections end with what they
/// are answering. One on which nothing can be written for `stall_limit` is closed.
///
/// # Errors
/// Nothing can be accepted any more.
pub(super) async fn serve<S>(
    mut incoming: Incoming,
    service: S,
    stall_limit: Duration,
    close: CancellationToken,
) -> io::Result<()>
where
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let (places, graceful) = (Arc::new(Semaphore::new(CONNECTIONS_MAX)), GracefulShutdown::new());
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEADERS_LIMIT);
    let accepting = async {
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            let connection = match incoming.next().await {
                Some(Ok(connection)) => connection,
                Some(Err(error)) => {
                    tracing::warn!(%error, "accepting a connection");
                    continue;
                }
                None => return,
            };
            let service = service.clone().map_request(|request: hyper::Request<HyperBody>| request.map(Body::new));
            let mut connection = TimeoutStream::new(connection);
            connection.set_write_timeout(Some(stall_limit));
            let connection = TokioIo::new(Box::pin(connection));
            let served = server.serve_connection(connection, TowerToHyperService::new(service));
            let served = graceful.watch(served);
            tokio::spawn(async move {
                if let Err(error) = served.await {
                    tracing::debug!(%error, "a connection broke off");
                }
                drop(place);
            });
        }
    };
    tokio::select! {
        () = close.cancelled() => {}
        () = accepting => return Err(io::Error::other("the listener has ended")),
    }
    // Whoever comes now is refused instead of left to wait.
    drop(incoming);
    graceful.shutdown().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::net::{Ipv4Addr, SocketAddr};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::sync::mpsc;
    use tokio::time::{Instant, sleep, timeout};
    use tokio_stream::wrappers::ReceiverStream;
    use unmask_proto::network::Connection;

    struct Served {
        connections: mpsc::Sender<io::Result<Connection>>,
        close: CancellationToken,
        ended: tokio::task::JoinHandle<io::Result<()>>,
    }

    const STALL_LIMIT: Duration = Duration::from_secs(60);

    /// Answers `/large` with more than any buffer takes, `/slow` after a second, and all else at once.
    fn served() -> Served {
        let (connections, opened) = mpsc::channel(1);
        let (close, address) = (CancellationToken::new(), SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
        let service = tower::service_fn(async |request: Request| {
            Ok(Response::new(match request.uri().path() {
                "/large" => Body::from(vec![b'a'; 64 << 20]),
                "/slow" => {
                    sleep(Duration::from_secs(1)).await;
                    Body::from("well")
                }
                _ => Body::from("well"),
            }))
        });
        let incoming = Incoming::new(address, ReceiverStream::new(opened));
        let ended = tokio::spawn(serve(incoming, service, STALL_LIMIT, close.clone()));
        Served { connections, close, ended }
    }

    impl Served {
        async fn connect(&self) -> DuplexStream {
            let (ours, theirs) = duplex(1 << 16);
            self.connections.send(Ok(Connection::new(theirs))).await.unwrap();
            ours
        }
    }

    async fn rest(mut connection: DuplexStream) -> String {
        let mut text = String::new();
        connection.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_or_half_a_request_is_hung_up_on() {
        let served = served();
        for (said, answered) in [("", 0), ("GET / HTTP/1.1\r\nHost:", 0), ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 1)] {
            let (mut connection, began) = (served.connect().await, Instant::now());
            connection.write_all(said.as_bytes()).await.unwrap();
            let heard = rest(connection).await;
            assert_eq!(heard.matches("HTTP/1.1 200 OK").count(), answered, "{said:?}: {heard}");
            assert_eq!(began.elapsed().as_secs(), HEADERS_LIMIT.as_secs(), "{said:?}");
        }
        served.close.cancel();
        served.ended.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn more_connections_than_places_wait_for_one() {
        let served = served();
        let mut open = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            open.push(served.connect().await);
        }
        let mut late = served.connect().await;
        late.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
        let soon = timeout(HEADERS_LIMIT / 2, late.read_u8()).await;
        assert!(soon.is_err(), "there is no place");
        drop(open.pop());
        let heard = timeout(HEADERS_LIMIT / 4, rest(late)).await.expect("there is one now");
        assert!(heard.contains("HTTP/1.1 200 OK"), "{heard}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_is_hung_up_on() {
        let served = served();
        let mut connection = served.connect().await;
        connection.write_all(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        sleep(STALL_LIMIT + Duration::from_secs(1)).await;
        assert!(rest(connection).await.len() < 1 << 20);
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_end_answers_under_way_are_given_and_nobody_is_let_in() {
        let served = served();
        let mut connection = served.connect().await;
        connection.write_all(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        sleep(Duration::from_millis(500)).await;
        served.close.cancel();
        served.connections.closed().await;
        assert!(!served.ended.is_finished(), "an answer is under way");
        assert!(rest(connection).await.ends_with("well"));
        served.ended.await.unwrap().unwrap();
    }
}
