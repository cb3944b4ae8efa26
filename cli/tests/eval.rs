//! `unmask eval` as it is typed.
#![cfg(feature = "train")]
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn unmask(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_unmask")).current_dir(dir).args(arguments).output().unwrap()
}

fn eval(dir: &Path, more: &[&str]) -> Output {
    let arguments = ["eval", "--tasks", "tasks.jsonl", "--out", "out", "--block-sizes", "1,8", "--thresholds", "0.9"];
    unmask(dir, &[&arguments[..], more].concat())
}

#[test]
fn an_evaluation_reports_and_goes_on_from_its_answers() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let made = unmask(dir, &["train", "tasks", "--held-out", "--seed", "9", "--count", "12", "--out", "tasks.jsonl"]);
    assert!(made.status.success(), "{made:?}");
    std::fs::create_dir(dir.join("code")).unwrap();
    std::fs::write(dir.join("code/a.py"), "def double(x):\n    return 2 * x\n").unwrap();

    let first = eval(dir, &["--infill", "12", "--code", "code", "--json"]);
    assert!(first.status.success(), "{first:?}");
    let report: serde_json::Value = serde_json::from_slice(&first.stdout).unwrap();
    assert_eq!(report["format"], "unmask.eval/1");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| row["block_size"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 8]);
    let [autoregressive, blocks] = [0, 1].map(|i| rows[i]["tpf"].as_f64().unwrap());
    assert!(blocks > 1.5 * autoregressive, "{report:#}");
    assert!(rows.iter().all(|row| row["n"] == 12 && row["pass_rate"].as_f64().unwrap() > 0.5), "{report:#}");
    assert!(report["infill"][0]["n"].as_u64().unwrap() > 0 && report["code"][0]["n"] == 1, "{report:#}");
    let bits = report["bits"]["bits_per_byte"].as_f64().unwrap();
    assert!((0.1..8.0).contains(&bits), "{bits}");
    let page = std::fs::read_to_string(dir.join("out/report.html")).unwrap();
    assert!(page.contains("Quality against tokens per pass") && page.contains(r#""format":"unmask.eval/1""#));

    // What was answered is not asked again; what was cut off is.
    let answers = std::fs::read_to_string(dir.join("out/answers.jsonl")).unwrap();
    let again = eval(dir, &["--infill", "12", "--code", "code"]);
    assert!(again.status.success(), "{again:?}");
    assert_eq!(answers, std::fs::read_to_string(dir.join("out/answers.jsonl")).unwrap());
    let lines: Vec<&str> = answers.lines().collect();
    std::fs::write(dir.join("out/answers.jsonl"), format!("{}\n{}\n{}", lines[0], lines[1], &lines[2][..40])).unwrap();
    assert!(eval(dir, &["--infill", "12", "--code", "code"]).status.success());
    assert_eq!(lines.len(), std::fs::read_to_string(dir.join("out/answers.jsonl")).unwrap().lines().count());
}

#[test]
fn bad_arguments_name_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    unmask(dir, &["train", "tasks", "--held-out", "--count", "2", "--out", "tasks.jsonl"]);
    let failure = |more: &[&str]| {
        let output = eval(dir, more);
        assert!(!output.status.success(), "{more:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(failure(&["--code", "."]).contains("--code"));
    assert!(failure(&["--logs", "nowhere"]).contains("nowhere"));
    assert!(failure(&["--endpoint", "http://127.0.0.1:9"]).contains("cannot ask"));
    assert!(eval(dir, &[]).status.success());
    // The same folder with other questions.
    assert!(failure(&["--limit", "1"]).contains("use another --out"));
}

#[test]
fn a_question_that_is_refused_counts_as_wrong_and_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    unmask(dir, &["train", "tasks", "--held-out", "--seed", "9", "--count", "3", "--out", "tasks.jsonl"]);
    let tasks = std::fs::read_to_string(dir.join("tasks.jsonl")).unwrap();
    let mut long: serde_json::Value = serde_json::from_str(tasks.lines().next().unwrap()).unwrap();
    long["prompt"] = format!("{}{}", "x = 1\n".repeat(2000), long["prompt"].as_str().unwrap()).into();
    long["task_id"] = "long".into();
    std::fs::write(dir.join("tasks.jsonl"), format!("{long}\n{tasks}")).unwrap();
    let output = eval(dir, &["--json"]);
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for row in report["rows"].as_array().unwrap() {
        assert_eq!((row["n"].as_u64(), row["refused"].as_u64()), (Some(4), Some(1)), "{row}");
        assert!(row["pass_rate"].as_f64().unwrap() <= 0.75, "{row}");
    }
    assert!(String::from_utf8_lossy(&output.stderr).contains("long is refused, and counts as wrong: "), "{output:?}");

    std::fs::write(dir.join("tasks.jsonl"), format!("{long}\n")).unwrap();
    std::fs::remove_dir_all(dir.join("out")).unwrap();
    let output = eval(dir, &["--json"]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("all questions are refused: "), "{output:?}");
}

/// A server that is already there gives what this process gives by itself.
#[test]
fn a_server_is_evaluated_like_a_model_at_hand() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    unmask(dir, &["train", "tasks", "--held-out", "--seed", "9", "--count", "6", "--out", "tasks.jsonl"]);
    let mut server = Command::new(env!("CARGO_BIN_EXE_unmask"))
        .args(["up", "--port", "0", "--json", "--data-dir"])
        .arg(dir.join("data"))
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let endpoints: serde_json::Value = serde_json::from_str(&line).unwrap();
    let rows = |more: &[&str]| {
        let output = eval(dir, &[more, &["--json"]].concat());
        assert!(output.status.success(), "{output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let rows = report["rows"].as_array().unwrap().clone();
        rows.iter().map(|row| ["policy", "n", "pass_rate", "tpf"].map(|key| row[key].clone())).collect::<Vec<_>>()
    };
    let served = rows(&["--endpoint", endpoints["gateway"].as_str().unwrap()]);
    server.kill().unwrap();
    server.wait().unwrap();
    std::fs::remove_dir_all(dir.join("out")).unwrap();
    assert_eq!(served, rows(&[]));
}
