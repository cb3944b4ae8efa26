//! The rules of the tree: which crate may know which, where `unsafe` may stand, how long files may be.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const CRATES: [&str; 10] =
    ["proto", "kernels", "engine", "text", "worker", "gateway", "controller", "trainer", "cli", "tests"];
/// Lines of code a file may have before its tests.
const FILE_LINES_MAX: usize = 500;
/// Lines a function may have.
const FUNCTION_LINES_MAX: usize = 70;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = CRATES.iter().map(|name| root().join(name)).collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(found.len() > 50, "found only {} sources", found.len());
    found
}

/// Names of the packages that `package` links, itself excluded, in the plain build.
fn dependencies(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--package", package, "--edges", "normal", "--prefix", "none", "--format", "{p}"])
        .args(["--offline", "--locked"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter_map(|line| line.split(' ').next()).filter(|name| *name != package).map(Into::into).collect()
}

fn ours(package: &str) -> BTreeSet<String> {
    dependencies(package).into_iter().filter(|name| name.starts_with("unmask")).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| format!("unmask-{name}")).collect()
}

#[test]
fn crates_import_only_what_the_layout_allows() {
    assert_eq!(ours("unmask-kernels"), set(&[]));
    assert_eq!(ours("unmask-text"), set(&[]));
    assert_eq!(ours("unmask-proto"), set(&[]));
    assert_eq!(ours("unmask-engine"), set(&["kernels"]));
    assert_eq!(ours("unmask-trainer"), set(&["engine", "kernels", "text"]));
    assert_eq!(ours("unmask-worker"), set(&["engine", "kernels", "proto"]));
    assert_eq!(ours("unmask-gateway"), set(&["proto", "text"]));
    assert_eq!(ours("unmask-controller"), set(&["proto"]));
}

#[test]
fn the_engine_knows_no_network() {
    let engine = dependencies("unmask-engine");
    for name in ["tokio", "tonic", "prost"] {
        assert!(!engine.contains(name), "engine links {name}");
    }
}

#[test]
fn only_the_store_knows_etcd() {
    for path in sources() {
        let text = std::fs::read_to_string(&path).unwrap();
        let allowed = path.ends_with("store/etcd.rs") || path.ends_with("tests/tree.rs");
        assert!(allowed || !text.contains("etcd_client"), "{} names etcd_client", path.display());
    }
}

#[test]
fn unsafe_stands_only_in_kernels_and_gives_its_reason() {
    for path in sources() {
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            let block = code.contains("unsafe {") || code.contains("unsafe impl");
            if !block || path.ends_with("tests/tree.rs") {
                continue;
            }
            assert!(path.starts_with(root().join("kernels")), "{}:{} has unsafe code", path.display(), i + 1);
            let reason = line.contains("SAFETY") || lines[i.saturating_sub(8)..i].iter().any(|l| l.contains("SAFETY"));
            assert!(reason, "{}:{} has no SAFETY line", path.display(), i + 1);
        }
    }
}

#[test]
fn files_and_functions_stay_short() {
    let mut long = Vec::new();
    // What stands in a `tests` folder is tests from its first line.
    let is_code = |path: &PathBuf| !path.components().any(|part| part.as_os_str() == "tests");
    for path in sources().into_iter().filter(is_code) {
        let text = std::fs::read_to_string(&path).unwrap();
        let code: Vec<&str> = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).collect();
        if code.len() > FILE_LINES_MAX {
            long.push(format!("{} has {} lines", path.display(), code.len()));
        }
        long.extend(long_functions(&path, &code));
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

/// Functions as formatted code shows them: from the line with `fn` to the first brace at its indent.
fn long_functions(path: &Path, code: &[&str]) -> Vec<String> {
    let mut long = Vec::new();
    for (start, line) in code.iter().enumerate() {
        let trimmed = line.trim_start();
        let words = ["fn ", "pub fn ", "pub(super) fn ", "pub(crate) fn ", "async fn ", "pub async fn ", "unsafe fn "];
        if !words.iter().any(|word| trimmed.starts_with(word)) {
            continue;
        }
        // A method of a trait may have no body.
        let body = code[start..].iter().find(|l| l.ends_with('{') || l.ends_with(';') || l.ends_with('}'));
        if !body.is_some_and(|l| l.ends_with('{')) {
            continue;
        }
        let close = format!("{}}}", &line[..line.len() - trimmed.len()]);
        let length = code[start..].iter().position(|l| *l == close).unwrap_or(0);
        if length > FUNCTION_LINES_MAX {
            long.push(format!("{}:{} is a function of {length} lines", path.display(), start + 1));
        }
    }
    long
}

#[test]
fn every_crate_says_what_it_is_and_what_it_does_not_know() {
    for name in CRATES {
        let text = std::fs::read_to_string(root().join(name).join("src/lib.rs")).unwrap();
        assert!(text.starts_with("//! "), "{name}/src/lib.rs does not open with its purpose");
        let about: String = text.lines().take_while(|line| line.starts_with("//!")).collect();
        assert!(about.contains("not know") || name == "tests", "{name}/src/lib.rs does not say what it does not know");
    }
}
