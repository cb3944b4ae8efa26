//! Connections as axum takes them.

use axum::serve::Listener;
use std::io;
use tokio_stream::StreamExt as _;
use unmask_proto::network::{Connection, Incoming};

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
                Some(Err(error)) => tracing::warn!(%error, "accepting a connection"),
                None => std::future::pending().await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}
