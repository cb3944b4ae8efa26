//! Step times of the model on this device, or on those of its group: measured when a worker first loads it, and kept on disk
//! for the next start where all ranks are of this process. What cannot be read is measured again, what cannot be written is
//! warned of: neither keeps a worker from serving.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;
use unmask_engine::Engine;
use unmask_engine::group::CommError;
use unmask_engine::profile::{Grid, Profile, device, measure};

/// Profiles kept in a folder; the oldest make place (about 2 KiB each).
const FILES_MAX: usize = 64;

/// The profile of an engine without requests: from `dir` where it is there, else measured now and kept there.
pub(crate) fn obtain(engine: &mut Engine, dir: &Path) -> Result<Profile, CommError> {
    let (device, model, ranks) = (device(), engine.model(), engine.ranks());
    let path = dir.join(file_name(model.numerics_id(), &device, model.threads(), ranks));
    if let Some(profile) = read(&path).filter(|profile| {
        (profile.numerics_id.as_str(), &profile.device) == (model.numerics_id(), &device)
            && (profile.threads, profile.ranks) == (model.threads(), ranks)
    }) {
        tracing::info!(path = %path.display(), "step times are known");
        return Ok(profile);
    }
    let profile = measured(engine)?;
    if let Err(error) = write(dir, &path, &profile) {
        tracing::warn!(path = %path.display(), %error, "step times cannot be kept and will be measured again");
    }
    Ok(profile)
}

/// Measures an engine without requests.
pub(crate) fn measured(engine: &mut Engine) -> Result<Profile, CommError> {
    let start = Instant::now();
    let grid = Grid::short(engine.model().config().context_length);
    let profile = measure(engine, &grid, &mut || start.elapsed(), &mut |_, _| {})?;
    tracing::info!(
        device = profile.device,
        isa = profile.isa,
        threads = profile.threads,
        ranks = profile.ranks,
        took_ms = start.elapsed().as_millis(),
        one_row_ms = profile.step_ms(1.0, 0.0),
        rows_64_ms = profile.step_ms(64.0, 0.0),
        "measured step times"
    );
    Ok(profile)
}

/// One file per model, device, number of threads and of ranks.
fn file_name(numerics_id: &str, device: &str, threads: usize, ranks: usize) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let device = device.chars().map(plain).collect::<String>();
    let ranks = if ranks == 1 { String::new() } else { format!("x{ranks}") };
    format!("{numerics_id}-{device}-{threads}{ranks}.json")
}

/// A file that is absent, damaged or of another format is as good as none.
fn read(path: &Path) -> Option<Profile> {
    let text = std::fs::read_to_string(path).ok()?;
    Profile::parse(&text)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "step times cannot be read"))
        .ok()
}

/// Writes beside and renames: another worker may read or write the same file.
fn write(dir: &Path, path: &Path, profile: &Profile) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let beside = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&beside, serde_json::to_vec_pretty(profile)?)?;
    std::fs::rename(&beside, path)?;
    make_place(dir)
}

fn make_place(dir: &Path) -> io::Result<()> {
    let mut kept: Vec<(std::time::SystemTime, PathBuf)> = std::fs::read_dir(dir)?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let path = entry.path();
            let is_profile = path.extension().is_some_and(|extension| extension == "json");
            is_profile.then_some((entry.metadata().ok()?.modified().ok()?, path))
        })
        .collect();
    kept.sort();
    let surplus = kept.len().saturating_sub(FILES_MAX);
    kept[..surplus].iter().try_for_each(|(_, path)| std::fs::remove_file(path))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::sync::Arc;
    use unmask_engine::{Limits, LoadOptions, Model};

    fn engine() -> Engine {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/sdar");
        let model = Model::load(&dir, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap();
        Engine::new(Arc::new(model), Limits { pages: 200, ..Limits::default() })
    }

    fn only_file(dir: &Path) -> PathBuf {
        let files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }

    #[test]
    fn a_profile_is_measured_once_and_again_when_its_file_is_damaged() {
        let (mut engine, dir) = (engine(), tempfile::tempdir().unwrap());
        let dir = dir.path().join("made/as/needed");
        let measured = obtain(&mut engine, &dir).unwrap();
        let path = only_file(&dir);
        assert_eq!(Profile::parse(&std::fs::read_to_string(&path).unwrap()).unwrap(), measured);
        // A time that no measurement gives shows where the second comes from.
        let mut json = serde_json::to_value(&measured).unwrap();
        json["points"][0]["ms"] = 1e9.into();
        std::fs::write(&path, json.to_string()).unwrap();
        assert_eq!(obtain(&mut engine, &dir).unwrap().points()[0].ms, 1e9);
        for damage in ["{".to_owned(), json.to_string().replace(engine.model().numerics_id(), "another")] {
            std::fs::write(&path, damage).unwrap();
            assert!(obtain(&mut engine, &dir).unwrap().points()[0].ms < 1e9);
            assert_eq!(only_file(&dir), path);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_keeps_nobody_from_serving() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(obtain(&mut engine(), &file.join("folder")).unwrap().threads, 1);
    }

    #[test]
    fn the_oldest_make_place() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..FILES_MAX + 3 {
            let file = std::fs::File::create(dir.path().join(format!("{i}.json"))).unwrap();
            let age = std::time::Duration::from_secs(1_000_000 + i as u64);
            file.set_modified(std::time::SystemTime::UNIX_EPOCH + age).unwrap();
        }
        make_place(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), FILES_MAX);
        assert!(!dir.path().join("2.json").exists() && dir.path().join("3.json").exists());
    }

    #[test]
    fn names_of_devices_are_names_of_files() {
        assert_eq!(file_name("ab", "Some(R) CPU/2.0", 4, 1), "ab-some-r--cpu-2-0-4.json");
        assert_eq!(file_name("ab", "Some(R) CPU/2.0", 4, 2), "ab-some-r--cpu-2-0-4x2.json");
    }
}
