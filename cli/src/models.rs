//! Where models are found: a folder, or a name under a `models` folder.

use anyhow::{Context, bail};
use std::path::{Path, PathBuf};

/// Environment variable that names a folder of models.
pub const MODELS_VARIABLE: &str = "UNMASK_MODELS";
/// File in a folder of models that holds the name of the one to take.
const DEFAULT_FILE: &str = "default";

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
