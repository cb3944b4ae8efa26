//! A small ordered store of keys with revisions: get, range, compare-and-put.
//!
//! A put names the revision it expects to replace, so two writers cannot overwrite each other unseen. Revisions
//! count the writes of a store, rise with each and never start over.

mod embedded;
mod log;

pub use embedded::Embedded;

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use thiserror::Error;

/// Longest key (bytes).
pub const KEY_BYTES_MAX: usize = 1024;
/// Longest value (bytes).
pub const VALUE_BYTES_MAX: usize = 256 * 1024;

/// Number of a write; 0 is before the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

/// A stored value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Of the write that made it.
    pub revision: Revision,
    /// The bytes.
    pub value: Vec<u8>,
}

/// What a put expects to replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// The key does not exist.
    Absent,
    /// The key's entry has this revision.
    Revision(Revision),
}

/// A store. Implementations acknowledge a write only when it is durable.
pub trait Store: Send + Sync + 'static {
    /// The entry of a key.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot be read.
    fn get(&self, key: &str) -> impl Future<Output = Result<Option<Entry>, StoreError>> + Send;

    /// All entries whose key begins with `prefix`, in order of key.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot be read.
    fn range(&self, prefix: &str) -> impl Future<Output = Result<Vec<(String, Entry)>, StoreError>> + Send;

    /// Writes `value` (`None` deletes) if the key is as `expected`.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when it is not, with nothing changed.
    fn put_if(
        &self,
        key: &str,
        expected: Expected,
        value: Option<Vec<u8>>,
    ) -> impl Future<Output = Result<Revision, StoreError>> + Send;
}

/// Why a store cannot be opened, read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The scheme is not known.
    #[error("unknown store `{0}`: give embedded:FOLDER or etcd://HOST:PORT")]
    UnknownUrl(String),
    /// The implementation is not part of this build.
    #[error("`{0}`: this build has no etcd support; use embedded:FOLDER")]
    NoEtcd(String),
    /// Another process has the folder open.
    #[error("{0} is in use by another process: stop it, or give another folder")]
    Locked(PathBuf),
    /// Bytes before the end of the log are not what was written.
    #[error("{path} is damaged at byte {offset}: {what}; restore the folder or remove it to start anew")]
    Damaged {
        /// The log.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What was found.
        what: &'static str,
    },
    /// The key is not as the put expected.
    #[error("`{key}` has revision {found:?}, expected {expected:?}")]
    Conflict {
        /// The key.
        key: String,
        /// What the put expected.
        expected: Expected,
        /// What is there.
        found: Option<Revision>,
    },
    /// Key or value exceeds [`KEY_BYTES_MAX`] or [`VALUE_BYTES_MAX`].
    #[error("`{key}`: {what} has {bytes} bytes, at most {limit}")]
    TooLarge {
        /// The key.
        key: String,
        /// Key or value.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The operating system refused.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// An earlier write failed, so what is on disk is not known.
    #[error("an earlier write to {0} failed: the store takes no more writes until it is opened again")]
    Failed(PathBuf),
    /// A value is not what the controller wrote.
    #[error("`{key}` holds a value this build does not understand: {why}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong.
        why: String,
    },
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

/// Opens the store at `url`.
///
/// # Errors
/// [`StoreError::NoEtcd`] for an etcd URL; else whatever [`Embedded::open`] finds.
pub async fn open(url: &StoreUrl) -> Result<Embedded, StoreError> {
    match url {
        StoreUrl::Embedded(path) => Embedded::open(path.clone()).await,
        StoreUrl::Etcd(text) => Err(StoreError::NoEtcd(text.clone())),
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
        let etcd = "etcd://localhost:2379".parse::<StoreUrl>().unwrap();
        assert!(matches!(open(&etcd).await, Err(StoreError::NoEtcd(_))));
    }
}
