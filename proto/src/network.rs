//! How services reach each other: over TCP, or over whatever else dials and accepts (a test's own network).

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::codegen::http::Uri;
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
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(Connection::new(stream))
        })
    }
}

/// The way to other services. Clones share it.
#[derive(Clone)]
pub struct Network(Arc<dyn Dial>);

impl Network {
    /// Over what `dial` opens.
    pub fn new(dial: impl Dial + 'static) -> Self {
        Self(Arc::new(dial))
    }

    /// A channel that connects when it is first used, and again whenever it has to.
    pub fn channel(&self, endpoint: &Endpoint) -> Channel {
        endpoint.connect_with_connector_lazy(self.connector())
    }

    /// A channel that is connected.
    ///
    /// # Errors
    /// Nobody answers there, or not in time.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, Error> {
        endpoint.connect_with_connector(self.connector()).await
    }

    fn connector(&self) -> Connector {
        let dial = Arc::clone(&self.0);
        tower::service_fn(Box::new(move |uri: Uri| {
            let address = uri.authority().map_or_else(String::new, |authority| authority.as_str().to_owned());
            let dialling = dial.dial(address);
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
        let connections = TcpListenerStream::new(listener).map(|accepted| {
            let stream = accepted?;
            // Of a peer that has gone already; reading will say so.
            let _ = stream.set_nodelay(true);
            Ok(Connection::new(stream))
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
