//! Leadership: of several controllers on one store, the one that holds the leader's key decides; the others point to it.
//!
//! The key goes with a lease. A leader counts the lease's end by its own clock, from when it sent the last renewal that
//! was answered, and steps down by then, whether it hears of the store or not. Its term is the revision that created its key:
//! every write of a term is made only while that key is there, and whoever is told something by a lower term refuses it.

use crate::config::Config;
use crate::ledger::Ledger;
use crate::shell::{Handle, Shell};
use crate::store::{Changes, Entry, Expected, Guard, LeaseId, Put, Revision, Store, StoreError};
use futures::StreamExt as _;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use unmask_proto::watch;

/// The leader's key; its value is the leader's address.
const KEY: &str = "controller/leader";
/// Time-to-live of the leader's lease; renewed every third.
pub const LEASE: Duration = Duration::from_secs(5);
/// Longest wait of a follower before it looks again, whatever its watch says.
const LOOK: Duration = Duration::from_secs(2);
/// Pause after an error of the store.
const ERROR_PAUSE: Duration = Duration::from_millis(500);

/// Where a replica stands.
#[derive(Clone)]
pub(crate) enum Standing {
    /// Another one leads, where that is known.
    Following(Option<String>),
    /// This one does.
    Leading(Handle),
}

/// Follows and leads in turns until `stop`; the store's key is left to others then.
///
/// # Errors
/// What the store says and will go on saying.
pub(crate) async fn run<S: Store>(
    store: S,
    config: Config,
    address: String,
    standing: watch::Sender<Standing>,
    stop: CancellationToken,
) -> Result<(), StoreError> {
    while !stop.is_cancelled() {
        let turn = async {
            let wait = async {
                match campaign(&store, &address).await? {
                    Campaign::Won(tenure) => Ok(Some(tenure)),
                    Campaign::Lost(leader) => {
                        standing.send_replace(Standing::Following(Some(text(&leader))));
                        until_changed(&store, leader.revision).await.map(|()| None)
                    }
                }
            };
            let won = tokio::select! {
                biased;
                won = wait => won?,
                () = stop.cancelled() => None,
            };
            match won {
                Some(tenure) => {
                    // Whoever led before does not any more.
                    standing.send_replace(Standing::Following(None));
                    let lease = tenure.lease;
                    let led = lead(&store, &config, tenure, &standing, &stop).await;
                    // So that another one need not wait for the lease to end; where the store is away it ends by itself.
                    let _ = timeout(ERROR_PAUSE, store.revoke(lease)).await;
                    led
                }
                None => Ok(()),
            }
        };
        if let Err(error) = turn.await {
            standing.send_replace(Standing::Following(None));
            if !error.passes() {
                return Err(error);
            }
            tracing::warn!(%error, "cannot find out who leads");
            sleep(ERROR_PAUSE).await;
        }
    }
    Ok(())
}

fn text(entry: &Entry) -> String {
    String::from_utf8_lossy(&entry.value).into_owned()
}

/// How a campaign ended.
enum Campaign {
    Won(Tenure),
    Lost(Entry),
}

/// A leadership, and until when it surely holds.
struct Tenure {
    lease: LeaseId,
    guard: Guard,
    until: Instant,
}

async fn campaign(store: &impl Store, address: &str) -> Result<Campaign, StoreError> {
    let there = store.get(KEY).await?;
    match there {
        // Nobody else can have the store open: it was an earlier run of this one.
        Some(entry) if store.exclusive() => {
            store.put(Put::new(KEY, Expected::Revision(entry.revision), None)).await?;
        }
        Some(entry) => return Ok(Campaign::Lost(entry)),
        None => {}
    }
    let sent = Instant::now();
    let lease = store.grant(LEASE).await?;
    let put = Put::new(KEY, Expected::Absent, Some(address.into())).leased(lease);
    match store.put(put).await {
        Ok(created) => {
            Ok(Campaign::Won(Tenure { lease, guard: Guard { key: KEY.into(), created }, until: sent + LEASE }))
        }
        Err(error) => {
            // Lost, or not known: either way the key must not stay without somebody who renews it.
            store.revoke(lease).await?;
            match (error, store.get(KEY).await?) {
                (StoreError::Conflict { .. }, Some(entry)) => Ok(Campaign::Lost(entry)),
                (error, _) => Err(error),
            }
        }
    }
}

/// Leads until the lease is lost or `stop`.
async fn lead<S: Store>(
    store: &S,
    config: &Config,
    tenure: Tenure,
    standing: &watch::Sender<Standing>,
    stop: &CancellationToken,
) -> Result<(), StoreError> {
    let over = stop.child_token();
    let (until, holding) = tokio::sync::watch::channel(tenure.until);
    let opened = timeout(LEASE, Ledger::open(store.clone(), tenure.guard.clone())).await;
    let (ledger, recovered) =
        opened.map_err(|_| StoreError::Unavailable("its state was not read in time".into()))??;
    tracing::info!(term = ledger.term(), groups = recovered.groups.len(), "leads");
    let (shell, handle) = Shell::new(config, ledger, recovered, holding, over.clone());
    let shell = tokio::spawn(shell.run());
    standing.send_replace(Standing::Leading(handle));
    let lost = tokio::select! {
        biased;
        lost = hold(store, tenure.lease, until) => Some(lost),
        () = over.cancelled() => None,
    };
    standing.send_replace(Standing::Following(None));
    over.cancel();
    if let Err(error) = shell.await {
        tracing::error!(%error, "the controller's task ended badly");
    }
    if let Some(why) = lost {
        tracing::warn!(why, term = tenure.guard.created.0, "leads no longer");
    }
    Ok(())
}

/// Renews the lease until it is lost; says why it was.
async fn hold(store: &impl Store, lease: LeaseId, until: tokio::sync::watch::Sender<Instant>) -> &'static str {
    let mut renewals = interval(LEASE / 3);
    renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let end = *until.borrow();
        if timeout(end.saturating_duration_since(Instant::now()), renewals.tick()).await.is_err() {
            return "the lease is not renewed";
        }
        let sent = Instant::now();
        if sent >= end {
            return "the lease ended while this process was not running";
        }
        match timeout(end - sent, store.renew(lease)).await {
            Ok(Ok(())) => {
                until.send_replace(sent + LEASE);
            }
            Ok(Err(StoreError::LeaseGone)) => return "the lease has ended",
            Ok(Err(error)) => tracing::warn!(%error, "the lease is not renewed"),
            Err(_) => return "the store does not answer",
        }
    }
}

/// Waits until the leader's key is another than at `revision`, or for [`LOOK`].
async fn until_changed(store: &impl Store, revision: Revision) -> Result<(), StoreError> {
    let mut changes: Changes = store.watch(KEY, Revision(revision.0 + 1));
    match timeout(LOOK, changes.next()).await {
        Ok(Some(Err(error))) if !matches!(error, StoreError::Compacted(_)) => Err(error),
        _ => Ok(()),
    }
}

/// Becomes the leader of an embedded store.
#[cfg(test)]
pub(crate) async fn seize(store: &impl Store, address: &str) -> Result<Guard, StoreError> {
    match campaign(store, address).await? {
        Campaign::Won(tenure) => Ok(tenure.guard),
        Campaign::Lost(entry) => Err(StoreError::Value { key: KEY.into(), why: text(&entry) }),
    }
}
