//! A small ordered store of keys with revisions: get, range, compare-and-put, leases, watch.
//!
//! A put names the revision it expects to replace, so two writers cannot overwrite each other unseen; with a guard it
//! also needs the writer to lead still. Revisions rise with each write and never start over. One test suite
//! (`tests/store/suite.rs`) holds every implementation to this.
//!
//! Implementations: [`Embedded`], a folder of this machine, and etcd (cargo feature `etcd`).

mod embedded;
mod error;
#[cfg_attr(feature = "etcd", path = "etcd.rs")]
#[cfg_attr(not(feature = "etcd"), path = "no_etcd.rs")]
mod etcd;
mod log;
mod tls;

pub use embedded::Embedded;
pub use error::StoreError;
pub use etcd::Etcd;
pub use tls::{RawStoreTls, StoreTls};

use futures::stream::BoxStream;
use std::future::Future;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Longest key (bytes).
pub const KEY_BYTES_MAX: usize = 1024;
/// Longest value (bytes).
pub const VALUE_BYTES_MAX: usize = 256 * 1024;
/// Shortest and longest time-to-live of a lease.
pub const LEASE_TTL: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// Number of a write; 0 is before the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

/// A stored value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Of the write that made it.
    pub revision: Revision,
    /// Of the write since which the key exists without a break.
    pub created: Revision,
    /// The bytes.
    pub value: Vec<u8>,
}

/// Entries of a prefix at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Of the store then: a watch from the next one misses nothing.
    pub revision: Revision,
    /// In order of key.
    pub entries: Vec<(String, Entry)>,
}

/// A key changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The key.
    pub key: String,
    /// Of the write.
    pub revision: Revision,
    /// What is there now; `None` when the key was deleted or its lease ended.
    pub entry: Option<Entry>,
}

/// What a put expects to replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// The key does not exist.
    Absent,
    /// The key's entry has this revision.
    Revision(Revision),
}

/// Keys written under a lease go when it ends: revoked, or not renewed for its time-to-live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// Holds while a key exists without a break since one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// The key.
    pub key: String,
    /// Since when.
    pub created: Revision,
}

/// A write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Put {
    /// Where.
    pub key: String,
    /// What it replaces.
    pub expected: Expected,
    /// What is written; `None` deletes.
    pub value: Option<Vec<u8>>,
    /// The key goes with this lease.
    pub lease: Option<LeaseId>,
    /// Nothing is written unless this holds.
    pub guard: Option<Guard>,
}

impl Put {
    /// A write for good, by whoever.
    pub fn new(key: impl Into<String>, expected: Expected, value: Option<Vec<u8>>) -> Self {
        Self { key: key.into(), expected, value, lease: None, guard: None }
    }

    /// The same under a lease.
    #[must_use]
    pub fn leased(self, lease: LeaseId) -> Self {
        Self { lease: Some(lease), ..self }
    }

    /// The same while `guard` holds.
    #[must_use]
    pub fn guarded(self, guard: &Guard) -> Self {
        Self { guard: Some(guard.clone()), ..self }
    }

    fn check_sizes(&self) -> Result<(), StoreError> {
        let value = self.value.as_ref().map_or(0, Vec::len);
        let sizes = [("the key", self.key.len(), KEY_BYTES_MAX), ("the value", value, VALUE_BYTES_MAX)];
        match sizes.into_iter().find(|(_, bytes, limit)| bytes > limit) {
            Some((what, bytes, limit)) => Err(StoreError::TooLarge { key: self.key.clone(), what, bytes, limit }),
            None => Ok(()),
        }
    }
}

/// Changes in order; an error ends them.
pub type Changes = BoxStream<'static, Result<Vec<Change>, StoreError>>;

/// A store. Implementations acknowledge a write only when it is durable.
pub trait Store: Clone + Send + Sync + 'static {
    /// Whether no other process can have it open.
    fn exclusive(&self) -> bool;

    /// The entry of a key.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot be read.
    fn get(&self, key: &str) -> impl Future<Output = Result<Option<Entry>, StoreError>> + Send;

    /// All entries whose key begins with `prefix`.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot be read.
    fn range(&self, prefix: &str) -> impl Future<Output = Result<Listing, StoreError>> + Send;

    /// Writes.
    ///
    /// # Errors
    /// [`StoreError::Conflict`], [`StoreError::Deposed`] or [`StoreError::LeaseGone`], with nothing changed.
    fn put(&self, put: Put) -> impl Future<Output = Result<Revision, StoreError>> + Send;

    /// Begins a lease; `ttl` is brought into [`LEASE_TTL`], and full seconds.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot be written.
    fn grant(&self, ttl: Duration) -> impl Future<Output = Result<LeaseId, StoreError>> + Send;

    /// Starts the lease's time anew.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`] when it has ended.
    fn renew(&self, lease: LeaseId) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Ends a lease; one that has ended is fine.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot be written.
    fn revoke(&self, lease: LeaseId) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Changes to keys that begin with `prefix`, from revision `from` on. Ends with [`StoreError::Compacted`] when some are
    /// not kept any more, with [`StoreError::Unavailable`] when the store is silent: then list again.
    fn watch(&self, prefix: &str, from: Revision) -> Changes;
}

/// Where a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// A folder on this machine.
    Embedded(PathBuf),
    /// An etcd cluster.
    Etcd(String),
}

impl FromStr for StoreUrl {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        if let Some(path) = text.strip_prefix("embedded:").filter(|path| !path.is_empty()) {
            return Ok(Self::Embedded(path.into()));
        }
        if text.strip_prefix("etcd://").is_some_and(|rest| !rest.is_empty()) {
            return Ok(Self::Etcd(text.to_owned()));
        }
        Err(StoreError::UnknownUrl(text.to_owned()))
    }
}

/// The store at a URL.
#[derive(Debug, Clone)]
pub enum AnyStore {
    /// A folder on this machine.
    Embedded(Embedded),
    /// An etcd cluster.
    Etcd(Etcd),
}

/// Opens the store at `url`; `tls` is for etcd.
///
/// # Errors
/// [`StoreError::NoEtcd`] in a build without it; else what [`Embedded::open`] or [`Etcd::open`] finds.
pub async fn open(url: &StoreUrl, tls: Option<&StoreTls>) -> Result<AnyStore, StoreError> {
    match url {
        StoreUrl::Embedded(path) => Ok(AnyStore::Embedded(Embedded::open(path.clone()).await?)),
        StoreUrl::Etcd(text) => Ok(AnyStore::Etcd(Etcd::open(text, tls).await?)),
    }
}

macro_rules! either {
    ($self:ident, $store:ident => $what:expr) => {
        match $self {
            AnyStore::Embedded($store) => $what,
            AnyStore::Etcd($store) => $what,
        }
    };
}

impl Store for AnyStore {
    fn exclusive(&self) -> bool {
        either!(self, store => store.exclusive())
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        either!(self, store => store.get(key).await)
    }

    async fn range(&self, prefix: &str) -> Result<Listing, StoreError> {
        either!(self, store => store.range(prefix).await)
    }

    async fn put(&self, put: Put) -> Result<Revision, StoreError> {
        either!(self, store => store.put(put).await)
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        either!(self, store => store.grant(ttl).await)
    }

    async fn renew(&self, lease: LeaseId) -> Result<(), StoreError> {
        either!(self, store => store.renew(lease).await)
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        either!(self, store => store.revoke(lease).await)
    }

    fn watch(&self, prefix: &str, from: Revision) -> Changes {
        either!(self, store => store.watch(prefix, from))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[tokio::test]
    async fn urls() {
        assert_eq!("embedded:/a/b".parse::<StoreUrl>().unwrap(), StoreUrl::Embedded("/a/b".into()));
        for bad in ["", "embedded:", "etcd://", "file:/a", "/a"] {
            assert!(matches!(bad.parse::<StoreUrl>(), Err(StoreError::UnknownUrl(_))), "{bad}");
        }
        let etcd = "etcd://127.0.0.1:1".parse::<StoreUrl>().unwrap();
        let error = open(&etcd, None).await.unwrap_err();
        let built_in = cfg!(feature = "etcd");
        assert!(matches!(error, StoreError::Unavailable(_)) == built_in, "{error}");
        assert!(matches!(error, StoreError::NoEtcd(_)) != built_in, "{error}");
    }
}
