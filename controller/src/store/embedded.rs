//! The embedded store: one append-only log in a folder of its own, read into memory when it is opened.
//!
//! A write is acknowledged after the log is synced. A record torn by a crash is cut when the log is opened; it was
//! never acknowledged. When the log grows past its limit it is rewritten beside itself and renamed into place. Leases get a
//! full time-to-live when the log is opened. (A kept library that did all of this was not found: docs/decisions.)

mod disk;
mod state;

use super::log::{Change, Record};
use super::{Changes, Entry, LEASE_TTL, LeaseId, Listing, Put, Revision, Store, StoreError};
use disk::{Disk, LOG};
use futures::stream::{self, StreamExt as _};
use state::State;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// A log longer than this is rewritten (bytes), unless most of it is live.
pub const COMPACT_BYTES: u64 = 4 * 1024 * 1024;
/// How often leases are looked over.
const LEASE_LOOK: Duration = Duration::from_millis(200);

/// A store in a folder of this machine, open in one process at a time.
#[derive(Debug, Clone)]
pub struct Embedded {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    disk: Disk,
    state: State,
    /// Tells watches of the last revision.
    news: watch::Sender<u64>,
}

impl Embedded {
    /// Opens the folder, which is made when it does not exist.
    ///
    /// # Errors
    /// [`StoreError::Locked`], [`StoreError::Damaged`] or [`StoreError::Io`].
    pub async fn open(folder: PathBuf) -> Result<Self, StoreError> {
        Self::open_with(folder, COMPACT_BYTES).await
    }

    /// As [`Embedded::open`], with another limit for the log.
    ///
    /// # Errors
    /// As [`Embedded::open`].
    pub async fn open_with(folder: PathBuf, compact_bytes: u64) -> Result<Self, StoreError> {
        let (disk, state) = blocking(move || Disk::open(folder, compact_bytes)).await?;
        let news = watch::Sender::new(state.revision());
        let inner = Arc::new(Mutex::new(Inner { disk, state, news }));
        tokio::spawn(end_leases(Arc::downgrade(&inner)));
        Ok(Self { inner })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        blocking(move || work(&mut store.lock())).await
    }
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    // Memory changes only after the disk did, in one step: a panic leaves nothing half done.
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs file work away from the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StoreError::Io {
            action: "running the store's work on",
            path: PathBuf::from(LOG),
            source: io::Error::other(error),
        }),
    }
}

/// Ends leases whose time is over, for as long as the store is open.
async fn end_leases(inner: Weak<Mutex<Inner>>) {
    loop {
        tokio::time::sleep(LEASE_LOOK).await;
        let Some(inner) = inner.upgrade() else { return };
        let Some(lease) = lock(&inner).state.expired(Instant::now()) else { continue };
        let ended = blocking(move || {
            let mut inner = lock(&inner);
            // It may have been renewed meanwhile.
            if inner.state.expired(Instant::now()) == Some(lease) { inner.end(lease) } else { Ok(()) }
        });
        if let Err(error) = ended.await {
            tracing::warn!(%error, lease, "cannot end a lease");
        }
    }
}

impl Inner {
    /// Makes records durable, then takes them.
    fn commit(&mut self, records: Vec<Record>) -> Result<Revision, StoreError> {
        self.disk.append(&records)?;
        let now = Instant::now();
        records.into_iter().for_each(|record| self.state.apply(record, now));
        self.disk.compact(&self.state);
        self.news.send_replace(self.state.revision());
        Ok(Revision(self.state.revision()))
    }

    fn end(&mut self, lease: u64) -> Result<(), StoreError> {
        let records = self.state.ending(lease);
        if records.is_empty() { Ok(()) } else { self.commit(records).map(drop) }
    }
}

impl Store for Embedded {
    fn exclusive(&self) -> bool {
        true
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(self.lock().state.get(key).cloned())
    }

    async fn range(&self, prefix: &str) -> Result<Listing, StoreError> {
        let inner = self.lock();
        Ok(Listing { revision: Revision(inner.state.revision()), entries: inner.state.range(prefix) })
    }

    async fn put(&self, put: Put) -> Result<Revision, StoreError> {
        put.check_sizes()?;
        self.write(move |inner| {
            inner.state.check(&put, Instant::now())?;
            let record = inner.state.record(put);
            inner.commit(vec![record])
        })
        .await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let ttl = Duration::from_secs(ttl.clamp(*LEASE_TTL.start(), *LEASE_TTL.end()).as_secs());
        self.write(move |inner| {
            // The revision of its beginning names it: no other lease has the same.
            let lease = inner.state.revision() + 1;
            let change = Change::Grant { lease, ttl_ms: ttl.as_millis() as u64 };
            inner.commit(vec![Record { revision: lease, change }])?;
            Ok(LeaseId(lease))
        })
        .await
    }

    async fn renew(&self, lease: LeaseId) -> Result<(), StoreError> {
        if self.lock().state.renew(lease.0, Instant::now()) { Ok(()) } else { Err(StoreError::LeaseGone) }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.write(move |inner| inner.end(lease.0)).await
    }

    fn watch(&self, prefix: &str, from: Revision) -> Changes {
        // A watch does not keep the store open.
        let (inner, news, prefix) = (Arc::downgrade(&self.inner), self.lock().news.subscribe(), prefix.to_owned());
        let next = |(inner, mut news, prefix, from): (Weak<Mutex<Inner>>, watch::Receiver<u64>, String, Revision)| async move {
            loop {
                let last = *news.borrow_and_update();
                let changes = lock(&*inner.upgrade()?).state.since(&prefix, from);
                match changes {
                    Ok(changes) if changes.is_empty() => news.changed().await.ok()?,
                    Ok(changes) => {
                        let from = Revision(changes.last().map_or(last, |change| change.revision.0) + 1);
                        return Some((Ok(changes), (inner, news, prefix, from)));
                    }
                    Err(error) => return Some((Err(error), (Weak::new(), news, prefix, from))),
                }
            }
        };
        stream::unfold((inner, news, prefix, from), next).boxed()
    }
}

#[cfg(test)]
mod tests;
