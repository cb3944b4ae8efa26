//! Source code from folders and JSONL files, without what does not teach: generated, minified, data-like, repeated.

use anyhow::{Context, bail};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Largest file (bytes).
const FILE_BYTES_MAX: u64 = 200 << 10;
/// Longest line, and longest mean line (characters).
const LINE_MAX: usize = 400;
const LINE_MEAN_MAX: usize = 100;
/// Smallest share of letters and digits.
const ALPHANUMERIC_SHARE_MIN: f64 = 0.25;
/// Most files of one folder.
const FILES_MAX: usize = 1_000_000;

/// One document and the package it comes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// Source.
    pub text: String,
    /// What it is split by.
    #[serde(default)]
    pub package: String,
}

/// Reads a JSONL file, or every file of a folder with one of the `extensions`.
///
/// # Errors
/// A path cannot be read; a JSONL line is malformed (with its number).
pub fn read(path: &Path, extensions: &[&str]) -> anyhow::Result<Vec<Document>> {
    let mut documents = if path.is_dir() { read_folder(path, extensions)? } else { read_jsonl(path)? };
    let mut seen = HashSet::new();
    documents.retain(|document| teaches(&document.text) && seen.insert(Sha256::digest(document.text.as_bytes())));
    Ok(documents)
}

fn read_jsonl(path: &Path) -> anyhow::Result<Vec<Document>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let parse = |(i, line)| serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), i + 1));
    text.lines().enumerate().filter(|(_, line)| !line.is_empty()).map(parse).collect()
}

fn read_folder(path: &Path, extensions: &[&str]) -> anyhow::Result<Vec<Document>> {
    let mut files: Vec<PathBuf> = Vec::new();
    let mut folders = vec![path.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let entry = entry?;
            // Links are not followed: they could lead in circles.
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if entry.file_type()?.is_file() {
                files.push(entry.path());
            }
        }
        if files.len() > FILES_MAX {
            bail!("{} holds more than {FILES_MAX} files", path.display());
        }
    }
    files.sort();
    let wanted = |file: &PathBuf| file.extension().is_some_and(|e| extensions.iter().any(|wanted| e == *wanted));
    let small = |file: &PathBuf| file.metadata().is_ok_and(|meta| meta.len() <= FILE_BYTES_MAX);
    let document = |file: &PathBuf| {
        let package = file.strip_prefix(path).ok()?.components().next()?.as_os_str().to_string_lossy().into_owned();
        // Files that are not UTF-8 are not source.
        std::fs::read_to_string(file).ok().map(|text| Document { text, package })
    };
    Ok(files.iter().filter(|file| wanted(file) && small(file)).filter_map(document).collect())
}

fn teaches(text: &str) -> bool {
    let chars = text.chars().count();
    let lines = text.lines().count().max(1);
    let alphanumeric = text.chars().filter(|c| c.is_alphanumeric()).count();
    chars > 0
        && text.lines().all(|line| line.chars().count() <= LINE_MAX)
        && chars / lines <= LINE_MEAN_MAX
        && alphanumeric as f64 >= ALPHANUMERIC_SHARE_MIN * chars as f64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn folders_give_files_that_teach_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("a/x.py", "def f(x):\n    return x\n");
        write("b/copy.py", "def f(x):\n    return x\n");
        write("b/minified.py", &"x=1;".repeat(200));
        write("b/symbols.py", "()()()()[][][]{}{}{}\n");
        write("b/other.txt", "def g(x):\n    return x\n");
        let found = read(dir.path(), &["py"]).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].package, "a");
    }

    #[test]
    fn malformed_lines_are_numbered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        std::fs::write(&path, "{\"text\": \"abc = 1\"}\n{\"txt\": 1}\n").unwrap();
        assert!(format!("{:#}", read(&path, &[]).unwrap_err()).contains("x.jsonl:2"));
    }
}
