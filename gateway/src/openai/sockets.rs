//! Connections as axum takes them.

use axum::serve::Listener;
use std::io;
use std::time::Duration;
use tokio_stream::StreamExt as _;
use unmask_proto::network::{Connection, Incoming};

/// Pause after an error that is not of one connection, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where the interface accepts connections.
pub(super) struct Sockets(pub Incoming);

impl Listener for Sockets {
    type Io = Connection;
    /// Nobody asks who the other side is.
    type Addr = ();

    async fn accept(&mut self) -> (Connection, ()) {
        loop {
            match self.0.next().await {
                Some(Ok(connection)) => return (connection, ()),
                Some(Err(error)) => {
                    tracing::warn!(%error, "accepting a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                None => std::future::pending().await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}
