//! How services reach each other: over TCP, with TLS or plain, or over whatever else dials and accepts (a test's own
//! network).

use crate::tls::{ACCEPT_PAUSE, Protocol, Tls, TlsDial, accept};
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::codegen::http::Uri;
use tonic::codegen::http::uri::Scheme;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Error};

trait Bytes: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Bytes for T {}

/// An open connection.
pub struct Connection(Pin<Box<dyn Bytes>>);

impl Connection {
    /// Of anything that carries bytes both ways.
    pub fn new(bytes: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        Self(Box::pin(bytes))
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_read(context, into)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.as_mut().poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.as_mut().poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

/// What [`Dial::dial`] gives.
pub type Dialling = Pin<Box<dyn Future<Output = io::Result<Connection>> + Send>>;

/// Opens connections.
pub trait Dial: Send + Sync {
    /// Connects to host:port.
    fn dial(&self, address: String) -> Dialling;
}

/// TCP without delay for small packets.
struct Tcp;

impl Dial for Tcp {
    fn dial(&self, address: String) -> Dialling {
        Box::pin(async move { Ok(Connection::new(tcp(&address).await?)) })
    }
}

pub(crate) async fn tcp(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The way to other services. Clones share it.
#[derive(Clone)]
pub struct Network {
    dial: Arc<dyn Dial>,
    /// Of what is dialled: tonic itself is told that all is http, since it would want to do TLS itself.
    scheme: Scheme,
}

impl Network {
    /// Over what `dial` opens.
    pub fn new(dial: impl Dial + 'static) -> Self {
        Self { dial: Arc::new(dial), scheme: Scheme::HTTP }
    }

    /// Over TCP and TLS.
    pub fn tls(tls: Tls) -> Self {
        Self { dial: Arc::new(TlsDial(tls)), scheme: Scheme::HTTPS }
    }

    /// A channel to an endpoint `http://HOST:PORT` that connects when it is first used, and again whenever it has to.
    pub fn channel(&self, endpoint: &Endpoint) -> Channel {
        self.marked(endpoint).connect_with_connector_lazy(self.connector())
    }

    /// A channel that is connected.
    ///
    /// # Errors
    /// Nobody answers there, or not in time.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, Error> {
        self.marked(endpoint).connect_with_connector(self.connector()).await
    }

    /// Whether nobody listens at host:port, and its machine says so. Silence is none of that.
    pub async fn refuses(&self, address: &str) -> bool {
        let opened = self.dial.dial(address.to_owned()).await;
        opened.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    }

    /// A bare connection to host:port.
    #[cfg(test)]
    pub(crate) fn dial(&self, address: String) -> Dialling {
        self.dial.dial(address)
    }

    /// With what requests over it call their scheme.
    fn marked(&self, endpoint: &Endpoint) -> Endpoint {
        let mut origin = endpoint.uri().clone().into_parts();
        origin.scheme = Some(self.scheme.clone());
        match Uri::from_parts(origin) {
            Ok(origin) => endpoint.clone().origin(origin),
            Err(_) => endpoint.clone(),
        }
    }

    fn connector(&self) -> Connector {
        let dial = Arc::clone(&self.dial);
        let default_port = if self.scheme == Scheme::HTTPS { 443 } else { 80 };
        tower::service_fn(Box::new(move |uri: Uri| {
            let (host, port) = (uri.host().unwrap_or_default(), uri.port_u16().unwrap_or(default_port));
            let dialling = dial.dial(format!("{host}:{port}"));
            Box::pin(async move { dialling.await.map(hyper_util::rt::TokioIo::new) }) as Opening
        }))
    }
}

type Opening = Pin<Box<dyn Future<Output = io::Result<hyper_util::rt::TokioIo<Connection>>> + Send>>;
type Connector = tower::util::ServiceFn<Box<dyn FnMut(Uri) -> Opening + Send>>;

impl Default for Network {
    fn default() -> Self {
        Self::new(Tcp)
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Network")
    }
}

/// Where a service accepts connections.
pub struct Incoming {
    address: io::Result<SocketAddr>,
    connections: Pin<Box<dyn Stream<Item = io::Result<Connection>> + Send>>,
}

impl Incoming {
    /// Of connections that arrive at `address`.
    pub fn new(address: SocketAddr, connections: impl Stream<Item = io::Result<Connection>> + Send + 'static) -> Self {
        Self { address: Ok(address), connections: Box::pin(connections) }
    }

    /// Of a socket, each once its TLS handshake is done.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn tls(listener: TcpListener, tls: Tls, protocol: Protocol) -> Self {
        let address = listener.local_addr();
        Self { address, connections: Box::pin(ReceiverStream::new(accept(listener, tls, protocol))) }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.address {
            Ok(address) => Ok(*address),
            Err(error) => Err(error.kind().into()),
        }
    }
}

impl From<TcpListener> for Incoming {
    fn from(listener: TcpListener) -> Self {
        let address = listener.local_addr();
        let connections = TcpListenerStream::new(listener).then(async |accepted| match accepted {
            Ok(stream) => {
                // Of a peer that has gone already; reading will say so.
                let _ = stream.set_nodelay(true);
                Ok(Connection::new(stream))
            }
            Err(error) => {
                // Servers ask again at once.
                tokio::time::sleep(ACCEPT_PAUSE).await;
                Err(error)
            }
        });
        Self { address, connections: Box::pin(connections) }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.connections.as_mut().poll_next(context)
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Incoming").field("address", &self.address).finish_non_exhaustive()
    }
}
