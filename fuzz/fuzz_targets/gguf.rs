//! A GGUF file: everything that `unmask convert` does with one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use tempfile::TempDir;
use unmask::convert::import::import;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());

fuzz_target!(|bytes: &[u8]| {
    let _ = import(bytes, None, FOLDER.path());
});
