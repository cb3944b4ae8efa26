//! Source code from folders and JSONL files, without what does not teach: generated, minified, data-like, repeated.

use crate::tasks::Part;
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

/// One package in this many is held out.
const HELD_OUT_ONE_IN: usize = 12;

/// The documents of `part`. A twelfth of the packages is held out; where there are fewer than twelve, of the single texts.
pub fn of_part(documents: Vec<Document>, part: Part) -> Vec<Document> {
    let packages: HashSet<&str> = documents.iter().map(|document| document.package.as_str()).collect();
    let by_package = packages.len() >= HELD_OUT_ONE_IN;
    let key = |document: &Document| if by_package { document.package.clone() } else { document.text.clone() };
    let held_out = super::held_out(documents.iter().map(key), HELD_OUT_ONE_IN);
    documents.into_iter().filter(|document| held_out.contains(&key(document)) == (part == Part::HeldOut)).collect()
}

/// `text` in pieces of whole lines of at most `bytes` bytes (longer lines stay whole), cut before what begins at the margin
/// behind an empty line, as functions and classes do, where that is possible.
pub fn pieces(text: &str, bytes: usize) -> Vec<String> {
    let (mut pieces, mut piece) = (Vec::new(), String::new());
    for statement in statements(text) {
        for (index, line) in statement.split_inclusive('\n').enumerate() {
            let whole = if index == 0 { statement.len() } else { 0 };
            if piece.len() + line.len().max(whole) > bytes {
                pieces.push(std::mem::take(&mut piece));
            }
            piece.push_str(line);
        }
    }
    pieces.push(piece);
    pieces
        .into_iter()
        .filter(|piece| !piece.trim().is_empty())
        .map(|piece| format!("{}\n", piece.trim_matches('\n')))
        .collect()
}

/// `text` before each line that begins at the margin behind an empty one.
fn statements(text: &str) -> Vec<&str> {
    let at_margin = |at: usize| text[at..].starts_with(|first: char| !first.is_whitespace());
    let lines = text.match_indices('\n').map(|(at, _)| at + 1);
    let starts: Vec<usize> = lines.filter(|&at| text[..at].ends_with("\n\n") && at_margin(at)).collect();
    let ends = starts.iter().copied().chain([text.len()]);
    [0].into_iter().chain(starts.iter().copied()).zip(ends).map(|(from, to)| &text[from..to]).collect()
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
    fn pieces_are_whole_functions_where_they_fit() {
        let (f, g) = ("def f(x):\n    y = x\n\n    return y\n", "@once\ndef g(x):\n    return x\n");
        let text = format!("import os\n\n\n{f}\n\n{g}");
        assert_eq!(pieces(&text, 60), [format!("import os\n\n\n{f}"), g.to_owned()]);
        assert_eq!(pieces(&text, 40), ["import os\n", f, g]);
        assert_eq!(pieces(f, 22), ["def f(x):\n    y = x\n", "    return y\n"]);
        assert_eq!(pieces(&text, 1000), [text]);
        assert!(pieces("\n\n", 10).is_empty());
    }

    #[test]
    fn packages_are_held_out_whole_and_single_files_where_there_are_few() {
        let documents = |packages: usize| -> Vec<Document> {
            let document = |i| Document { text: format!("x = {i}\n"), package: format!("p{}", i % packages) };
            (0..60).map(document).collect()
        };
        for (packages, expected) in [(24, 2), (3, 60 / HELD_OUT_ONE_IN)] {
            let [training, held_out] = [Part::Training, Part::HeldOut].map(|part| of_part(documents(packages), part));
            assert_eq!(training.len() + held_out.len(), 60);
            let names = |part: &[Document]| part.iter().map(|d| d.package.clone()).collect::<HashSet<_>>();
            if packages == 24 {
                assert_eq!(names(&held_out).len(), expected);
                assert!(names(&held_out).is_disjoint(&names(&training)));
            } else {
                assert_eq!(held_out.len(), expected);
            }
        }
        assert_eq!(of_part(documents(1)[..1].to_vec(), Part::Training).len(), 1, "a single file is for training");
    }

    #[test]
    fn malformed_lines_are_numbered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        std::fs::write(&path, "{\"text\": \"abc = 1\"}\n{\"txt\": 1}\n").unwrap();
        assert!(format!("{:#}", read(&path, &[]).unwrap_err()).contains("x.jsonl:2"));
    }
}
