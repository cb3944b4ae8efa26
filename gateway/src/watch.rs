//! Keeps the routes as the controller has them; in an outage the last known ones stay.

use crate::routes::Routes;
use crate::upstream::with_sources;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout};
use tonic::transport::Endpoint;
use tonic::{Code, Status, Streaming};
use unmask_proto::controllers::Controllers;
use unmask_proto::failpoints::{Bug, planted};
use unmask_proto::network::Network;
use unmask_proto::rich;
use unmask_proto::v1::controller_service_client::ControllerServiceClient;
use unmask_proto::v1::{WatchRoutesRequest, WatchRoutesResponse};

/// Longest wait for a connection and for the stream to open.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How often the controller is pinged.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// First pause before connecting again; doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest pause before connecting again.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// A stream that lasted this long starts the pauses anew.
const STABLE_AFTER: Duration = Duration::from_secs(5);
/// Loads as old as this are not believed.
const LOADS_STALE_AFTER: Duration = Duration::from_secs(5);
/// Largest table (bytes).
const TABLE_BYTES_MAX: usize = 32 << 20;

/// Watches for as long as it is polled.
pub(crate) async fn run(mut controllers: Controllers, network: Network, gateway_id: String, routes: Arc<Routes>) {
    let mut backoff = BACKOFF_MIN;
    // One redirect is followed at once; where replicas point to each other, the next waits its turn.
    let mut redirected = false;
    let (mut highest_term, mut lost) = (0, None);
    loop {
        let began = Instant::now();
        let Err(status) =
            follow(&network, controllers.current(), &gateway_id, &routes, &mut highest_term, &mut lost).await;
        // A table that does not change is not sent again: loads grow old from when nobody would tell.
        if lost.get_or_insert_with(Instant::now).elapsed() >= LOADS_STALE_AFTER {
            routes.doubt_loads();
        }
        let controller = controllers.current().to_owned();
        if controllers.failed(&status) && !std::mem::replace(&mut redirected, true) {
            tracing::info!(controller, leader = controllers.current(), "another replica leads");
            continue;
        }
        tracing::warn!(controller, %status, "routes are not watched; the last known ones stay");
        if began.elapsed() >= STABLE_AFTER {
            backoff = BACKOFF_MIN;
        }
        tokio::time::sleep(backoff).await;
        backoff = (2 * backoff).min(BACKOFF_MAX);
        redirected = false;
    }
}

/// One stream, to its end; while it lasts, it is not `lost`.
async fn follow(
    network: &Network,
    controller: &str,
    gateway_id: &str,
    routes: &Routes,
    highest_term: &mut u64,
    lost: &mut Option<Instant>,
) -> Result<std::convert::Infallible, Status> {
    let opened = timeout(CONNECT_LIMIT, open(network, controller, gateway_id)).await;
    let mut tables =
        opened.map_err(|_| rich::status(Code::Unavailable, "CONTROLLER_SILENT", "no answer in time"))??;
    let mut revision = 0;
    loop {
        let closed = || rich::status(Code::Unavailable, "CONTROLLER_CLOSED", "the controller ended the stream");
        let table = tables.message().await?.ok_or_else(closed)?;
        if table.term < *highest_term && !planted(Bug::NoTermCheck) {
            let message = format!("term {} after {highest_term}: a leader of the past", table.term);
            return Err(rich::status(Code::FailedPrecondition, "STALE_TERM", message));
        }
        if table.term == *highest_term && table.revision < revision {
            continue;
        }
        (*highest_term, revision) = (table.term, table.revision);
        tracing::debug!(term = table.term, revision, routes = table.routes.len(), "routes");
        routes.replace(table);
        *lost = None;
    }
}

async fn open(network: &Network, controller: &str, gateway_id: &str) -> Result<Streaming<WatchRoutesResponse>, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{controller}"))
        .map_err(|error| rich::status(Code::InvalidArgument, "BAD_CONTROLLER", error.to_string()))?
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(CONNECT_LIMIT)
        // Else a stream whose client has been dropped counts as idle, and a controller that hangs is not noticed.
        .keep_alive_while_idle(true);
    let channel = network
        .connect(&endpoint)
        .await
        .map_err(|error| rich::status(Code::Unavailable, "NO_CONTROLLER", with_sources(&error)))?;
    let mut client = ControllerServiceClient::new(channel).max_decoding_message_size(TABLE_BYTES_MAX);
    Ok(client.watch_routes(WatchRoutesRequest { gateway_id: gateway_id.to_owned() }).await?.into_inner())
}
