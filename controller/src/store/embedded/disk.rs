//! The log on disk: opened and replayed, appended and synced, rewritten when it has grown.

use super::super::StoreError;
use super::super::log::{Change, MAGIC, Record, has_later_record};
use super::state::State;
use fs4::fs_std::FileExt as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use tokio::time::Instant;

pub(super) const LOG: &str = "store.log";
pub(super) const REWRITTEN: &str = "store.log.new";
const LOCK: &str = "lock";

/// The folder's log.
#[derive(Debug)]
pub(super) struct Disk {
    folder: PathBuf,
    file: File,
    /// Length of the log (bytes).
    length: u64,
    /// The log is rewritten when it is longer than this (bytes).
    compact_at: u64,
    compact_bytes: u64,
    failed: bool,
    /// Held, not read: the lock ends with it.
    _lock: File,
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io { action, path: path.to_owned(), source }
}

impl Disk {
    /// Opens the folder, which is made when it does not exist, and reads its log.
    pub(super) fn open(folder: PathBuf, compact_bytes: u64) -> Result<(Self, State), StoreError> {
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
        let (state, length) = replay(&path, &bytes)?;
        if length < bytes.len() as u64 {
            tracing::warn!(path = %path.display(), cut = bytes.len() as u64 - length, "cutting a torn record");
        }
        let mut disk =
            Self { folder, file, length, compact_at: compact_bytes, compact_bytes, failed: false, _lock: lock };
        if length != bytes.len() as u64 || length == 0 {
            disk.repair().map_err(io_error("repairing", &path))?;
        }
        Ok((disk, state))
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

    /// Appends records; durable when it returns.
    pub(super) fn append(&mut self, records: &[Record]) -> Result<(), StoreError> {
        let path = self.folder.join(LOG);
        if self.failed {
            return Err(StoreError::Failed(path));
        }
        let mut bytes = Vec::new();
        records.iter().for_each(|record| record.encode(&mut bytes));
        let mut write = || {
            self.file.seek(SeekFrom::Start(self.length))?;
            self.file.write_all(&bytes)?;
            self.file.sync_data()
        };
        if let Err(error) = write() {
            // After a failed write or sync nobody knows what is on disk; opening again finds out.
            self.failed = true;
            return Err(io_error("writing", &path)(error));
        }
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Rewrites the log with what is live, when it has grown past its limit.
    pub(super) fn compact(&mut self, state: &State) {
        if self.length <= self.compact_at {
            return;
        }
        if let Err(error) = self.rewrite(state) {
            // The old log is still whole and every write is in it.
            let path = self.folder.join(LOG);
            tracing::warn!(%error, path = %path.display(), "cannot rewrite the log; trying again later");
            self.compact_at = self.length.saturating_add(self.compact_bytes);
        }
    }

    fn rewrite(&mut self, state: &State) -> io::Result<()> {
        let mut bytes = MAGIC.to_vec();
        state.live().iter().for_each(|record| record.encode(&mut bytes));
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

/// The state that a log leads to, and the length of its whole records (bytes).
fn replay(path: &Path, bytes: &[u8]) -> Result<(State, u64), StoreError> {
    let damaged = |offset: usize, what| StoreError::Damaged { path: path.to_owned(), offset: offset as u64, what };
    let mut state = State::default();
    if !bytes.starts_with(MAGIC) {
        // The first bytes of a log may be torn too: some written, the others zero.
        let torn = bytes.iter().enumerate().all(|(i, byte)| *byte == 0 || MAGIC.get(i) == Some(byte));
        return if torn { Ok((state, 0)) } else { Err(damaged(0, "not a log of this version")) };
    }
    let now = Instant::now();
    let mut at = MAGIC.len();
    while let Some((record, size)) = Record::decode(&bytes[at..]) {
        let marks = matches!(record.change, Change::Mark) && record.revision == state.revision();
        if record.revision <= state.revision() && !marks {
            return Err(damaged(at, "revisions do not rise"));
        }
        state.apply(record, now);
        at += size;
    }
    if has_later_record(&bytes[at..], state.revision()) {
        return Err(damaged(at, "a record is damaged and whole ones follow it"));
    }
    state.forget_history();
    Ok((state, at as u64))
}
