//! Read-only mapping of a file: checkpoints are read where they lie.

use memmap2::Mmap;
use std::{fs::File, io, ops::Deref, path::Path};

/// The bytes of a file. It must not be changed by others while it is mapped.
pub struct Mapped(Mmap);

/// Maps `path`.
///
/// # Errors
/// The file cannot be opened or mapped.
pub fn map_read_only(path: &Path) -> io::Result<Mapped> {
    let file = File::open(path)?;
    // SAFETY: the mapping is read-only. That nobody truncates a checkpoint in use is the operator's promise, as with
    // every program that maps weights; all offsets are checked against the length at the time of mapping.
    unsafe { Mmap::map(&file) }.map(Mapped)
}

impl Deref for Mapped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
