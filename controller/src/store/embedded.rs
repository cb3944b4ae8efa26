//! The embedded store: one append-only log in a folder of its own, read into memory when it is opened.
//!
//! A write is acknowledged after the log is synced. A record torn by a crash is cut when the log is opened; it was
//! never acknowledged. When the log grows past its limit it is rewritten beside itself and renamed into place.

use super::log::{Change, MAGIC, Record, has_later_record};
use super::{Entry, Expected, KEY_BYTES_MAX, Revision, Store, StoreError, VALUE_BYTES_MAX};
use fs4::fs_std::FileExt as _;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A log longer than this is rewritten (bytes), unless most of it is live.
pub const COMPACT_BYTES: u64 = 4 * 1024 * 1024;

const LOG: &str = "store.log";
const REWRITTEN: &str = "store.log.new";
const LOCK: &str = "lock";

/// A store in a folder of this machine, open in one process at a time.
#[derive(Debug, Clone)]
pub struct Embedded {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    file: File,
    /// Length of the log (bytes).
    length: u64,
    /// The log is rewritten when it is longer than this (bytes).
    compact_at: u64,
    compact_bytes: u64,
    entries: BTreeMap<String, Entry>,
    revision: u64,
    failed: bool,
    /// Held, not read: the lock ends with it.
    _lock: File,
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io { action, path: path.to_owned(), source }
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
        let inner = blocking(move || Inner::open(folder, compact_bytes)).await?;
        Ok(Self { inner: Arc::new(Mutex::new(inner)) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Memory changes only after the disk did, in one step: a panic leaves nothing half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

impl Store for Embedded {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(self.lock().entries.get(key).cloned())
    }

    async fn range(&self, prefix: &str) -> Result<Vec<(String, Entry)>, StoreError> {
        let inner = self.lock();
        let from = inner.entries.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        Ok(from.take_while(|(key, _)| key.starts_with(prefix)).map(|(k, e)| (k.clone(), e.clone())).collect())
    }

    async fn put_if(&self, key: &str, expected: Expected, value: Option<Vec<u8>>) -> Result<Revision, StoreError> {
        let (store, key) = (self.clone(), key.to_owned());
        blocking(move || store.lock().put_if(key, expected, value)).await
    }
}

impl Inner {
    fn open(folder: PathBuf, compact_bytes: u64) -> Result<Self, StoreError> {
        fs::create_dir_all(&folder).map_err(io_error("creating", &folder))?;
        let lock = lock(&folder)?;
        let path = folder.join(LOG);
        // A rewrite that did not reach its rename is worth nothing.
        match fs::remove_file(folder.join(REWRITTEN)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("removing", &folder.join(REWRITTEN))(error));
            }
            _ => {}
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io_error("opening", &path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io_error("reading", &path))?;
        let Replayed { entries, revision, length } = replay(&path, &bytes)?;
        if length < bytes.len() as u64 {
            tracing::warn!(path = %path.display(), cut = bytes.len() as u64 - length, "cutting a torn record");
        }
        let mut inner = Self {
            folder,
            file,
            length,
            compact_at: compact_bytes,
            compact_bytes,
            entries,
            revision,
            failed: false,
            _lock: lock,
        };
        if length != bytes.len() as u64 || length == 0 {
            inner.repair().map_err(io_error("repairing", &path))?;
        }
        Ok(inner)
    }

    /// Cuts what is torn and starts an empty log; durable when it returns.
    fn repair(&mut self) -> io::Result<()> {
        self.file.set_len(self.length)?;
        if self.length == 0 {
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(MAGIC)?;
            self.length = MAGIC.len() as u64;
        }
        self.file.sync_all()?;
        File::open(&self.folder)?.sync_all()
    }

    fn put_if(&mut self, key: String, expected: Expected, value: Option<Vec<u8>>) -> Result<Revision, StoreError> {
        let sizes = [("the key", key.len(), KEY_BYTES_MAX), ("the value", value_bytes(&value), VALUE_BYTES_MAX)];
        for (what, bytes, limit) in sizes {
            if bytes > limit {
                return Err(StoreError::TooLarge { key, what, bytes, limit });
            }
        }
        let found = self.entries.get(&key).map(|entry| entry.revision);
        let matches = match expected {
            Expected::Absent => found.is_none(),
            Expected::Revision(revision) => found == Some(revision),
        };
        if !matches {
            return Err(StoreError::Conflict { key, expected, found });
        }
        let path = self.folder.join(LOG);
        if self.failed {
            return Err(StoreError::Failed(path));
        }
        let revision = self.revision + 1;
        let change = match &value {
            Some(value) => Change::Put(key.clone(), value.clone()),
            None => Change::Delete(key.clone()),
        };
        let mut bytes = Vec::new();
        Record { revision, change }.encode(&mut bytes);
        if let Err(error) = self.append(&bytes) {
            // After a failed write or sync nobody knows what is on disk; opening again finds out.
            self.failed = true;
            return Err(io_error("writing", &path)(error));
        }
        self.revision = revision;
        match value {
            Some(value) => self.entries.insert(key, Entry { revision: Revision(revision), value }),
            None => self.entries.remove(&key),
        };
        if self.length > self.compact_at
            && let Err(error) = self.compact()
        {
            // The old log is still whole and the write is in it.
            tracing::warn!(%error, path = %path.display(), "cannot rewrite the log; trying again later");
            self.compact_at = self.length.saturating_add(self.compact_bytes);
        }
        Ok(Revision(revision))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.length))?;
        self.file.write_all(bytes)?;
        self.file.sync_data()?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Rewrites the log with live entries only.
    fn compact(&mut self) -> io::Result<()> {
        let mut bytes = MAGIC.to_vec();
        let mut live: Vec<_> = self.entries.iter().collect();
        live.sort_by_key(|(_, entry)| entry.revision);
        for (key, entry) in live {
            let change = Change::Put(key.clone(), entry.value.clone());
            Record { revision: entry.revision.0, change }.encode(&mut bytes);
        }
        // The newest revision may have been a deletion.
        Record { revision: self.revision, change: Change::Mark }.encode(&mut bytes);
        let rewritten = self.folder.join(REWRITTEN);
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&rewritten)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&rewritten, self.folder.join(LOG))?;
        // From here on the new file is the log, whatever the folder's sync says.
        self.file = file;
        self.length = bytes.len() as u64;
        // When most of the log is live, rewriting at every write would help nobody.
        self.compact_at = self.compact_bytes.max(2 * self.length);
        let synced = File::open(&self.folder).and_then(|folder| folder.sync_all());
        if synced.is_err() {
            self.failed = true;
        }
        synced
    }
}

fn value_bytes(value: &Option<Vec<u8>>) -> usize {
    value.as_ref().map_or(0, Vec::len)
}

fn lock(folder: &Path) -> Result<File, StoreError> {
    let path = folder.join(LOCK);
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(io_error("opening", &path))?;
    match file.try_lock_exclusive() {
        Ok(true) => Ok(file),
        Ok(false) => Err(StoreError::Locked(folder.to_owned())),
        Err(error) => Err(io_error("locking", &path)(error)),
    }
}

struct Replayed {
    entries: BTreeMap<String, Entry>,
    revision: u64,
    /// Length of the whole records (bytes).
    length: u64,
}

fn replay(path: &Path, bytes: &[u8]) -> Result<Replayed, StoreError> {
    let damaged = |offset: usize, what| StoreError::Damaged { path: path.to_owned(), offset: offset as u64, what };
    let mut replayed = Replayed { entries: BTreeMap::new(), revision: 0, length: 0 };
    if !bytes.starts_with(MAGIC) {
        // The first bytes of a log may be torn too: some written, the others zero.
        let torn = bytes.iter().enumerate().all(|(i, byte)| *byte == 0 || MAGIC.get(i) == Some(byte));
        return if torn { Ok(replayed) } else { Err(damaged(0, "not a log of this version")) };
    }
    let mut at = MAGIC.len();
    while let Some((record, size)) = Record::decode(&bytes[at..]) {
        let marks = matches!(record.change, Change::Mark) && record.revision == replayed.revision;
        if record.revision <= replayed.revision && !marks {
            return Err(damaged(at, "revisions do not rise"));
        }
        replayed.revision = record.revision;
        match record.change {
            Change::Put(key, value) => {
                replayed.entries.insert(key, Entry { revision: Revision(record.revision), value });
            }
            Change::Delete(key) => {
                replayed.entries.remove(&key);
            }
            Change::Mark => {}
        }
        at += size;
    }
    if has_later_record(&bytes[at..], replayed.revision) {
        return Err(damaged(at, "a record is damaged and whole ones follow it"));
    }
    replayed.length = at as u64;
    Ok(replayed)
}

#[cfg(test)]
mod tests;
