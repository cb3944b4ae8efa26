//! Where models are found: a folder, or a name under a `models` folder.

use crate::args::Dtype;
use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use unmask_engine::LoadOptions;
use unmask_engine::model::{Overrides, Progress};

/// Environment variable that names a folder of models.
pub const MODELS_VARIABLE: &str = "UNMASK_MODELS";
/// File in a folder of models that holds the name of the one to take.
const DEFAULT_FILE: &str = "default";

/// Loads that take no longer than this show no bar.
const QUIET_LOAD: Duration = Duration::from_millis(500);

/// What a checkpoint does not say of itself.
#[derive(Debug, Clone, Default, Args)]
pub struct OverrideArgs {
    /// Family of the model, where its config names another: open_dcoder, a2d_qwen3_block, ..
    #[arg(long, value_name = "NAME")]
    pub family: Option<String>,
    /// Id of the mask token, where neither config nor tokenizer has it
    #[arg(long, value_name = "ID")]
    pub mask_id: Option<u32>,
}

impl OverrideArgs {
    /// For the engine.
    pub fn overrides(&self) -> Overrides {
        Overrides { family: self.family.clone(), mask_id: self.mask_id, block_size: None }
    }

    /// How to load a model, with a bar when that takes long.
    pub fn load_options(&self, dtype: Dtype, threads: usize) -> LoadOptions {
        let (dtype, overrides, progress) = (dtype.weights(), self.overrides(), Some(bar()));
        LoadOptions { dtype, threads, overrides, progress, ..LoadOptions::default() }
    }
}

/// A bar over the layers of a model, on standard error when that is a terminal.
fn bar() -> Progress {
    let shown: Mutex<Option<(Instant, ProgressBar)>> = Mutex::new(None);
    Progress(Arc::new(move |done, all| {
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, bar) = shown.get_or_insert_with(|| (Instant::now(), ProgressBar::hidden()));
        if since.elapsed() > QUIET_LOAD && bar.is_hidden() && done < all {
            *bar = ProgressBar::new(u64::from(all));
            if let Ok(style) = ProgressStyle::with_template("loading {wide_bar} {pos}/{len} layers {eta}") {
                bar.set_style(style);
            }
        }
        bar.set_position(u64::from(done));
        if done == all {
            bar.finish_and_clear();
        }
    }))
}

/// The folder of a model: `name` itself when it is one, else that name (or the default) under the folders of models.
///
/// # Errors
/// Lists where it was looked for.
pub fn find(name: Option<&str>) -> anyhow::Result<PathBuf> {
    if let Some(dir) = name.map(Path::new).filter(|dir| dir.join("config.json").is_file()) {
        return Ok(dir.to_owned());
    }
    let folders = folders();
    for folder in &folders {
        let chosen = match name {
            Some(name) => name.to_owned(),
            None => match std::fs::read_to_string(folder.join(DEFAULT_FILE)) {
                Ok(text) => text.trim().to_owned(),
                Err(_) => continue,
            },
        };
        let dir = folder.join(&chosen);
        if dir.join("config.json").is_file() {
            return Ok(dir);
        }
    }
    let tried: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    let wanted = name.map_or_else(|| "a bundled model".to_owned(), |name| format!("model {name:?}"));
    bail!("{wanted} was not found: it is no folder with a config.json, and not under {}", tried.join(", "))
}

/// Folders of models, the first to look in first.
fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = std::env::var_os(MODELS_VARIABLE).map(PathBuf::from).into_iter().collect();
    let mut beside = |start: Option<PathBuf>| {
        for dir in start.iter().flat_map(|start| start.ancestors()) {
            let models = dir.join("models");
            if models.is_dir() && !folders.contains(&models) {
                folders.push(models);
            }
        }
    };
    beside(std::env::current_dir().ok());
    beside(std::env::current_exe().ok());
    beside(Some(PathBuf::from(env!("CARGO_MANIFEST_DIR"))));
    folders
}

/// Absolute form of a path that must exist.
///
/// # Errors
/// It does not exist.
pub fn existing(path: &Path) -> anyhow::Result<PathBuf> {
    path.canonicalize().with_context(|| format!("cannot read {}", path.display()))
}
