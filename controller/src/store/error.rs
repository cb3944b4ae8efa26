//! What can go wrong with a store.

use super::{Expected, Revision};
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Why a store cannot be opened, read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The scheme is not known.
    #[error("unknown store `{0}`: give embedded:FOLDER or etcd://HOST:PORT")]
    UnknownUrl(String),
    /// The implementation is not part of this build.
    #[error("`{0}`: this build has no etcd support: build with --features etcd, or use embedded:FOLDER")]
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
    /// The lease has ended: what was written under it is gone.
    #[error("the lease has ended")]
    LeaseGone,
    /// The guard's key is not as it was: whoever writes leads no longer.
    #[error("`{0}` is not held any more")]
    Deposed(String),
    /// Changes up to this revision are not kept any more: list again, and watch from there.
    #[error("changes up to revision {} are not kept any more", .0.0)]
    Compacted(Revision),
    /// The store does not answer, or cannot at present.
    #[error("the store cannot be reached: {0}")]
    Unavailable(String),
    /// A value is not what the controller wrote.
    #[error("`{key}` holds a value this build does not understand: {why}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong.
        why: String,
    },
}

impl StoreError {
    /// Whether it may pass by itself, so that trying again later makes sense.
    pub fn passes(&self) -> bool {
        use StoreError::{Compacted, Conflict, Deposed, LeaseGone, Unavailable};
        matches!(self, Unavailable(_) | Conflict { .. } | Deposed(_) | LeaseGone | Compacted(_))
    }
}
