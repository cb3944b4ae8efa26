//! The binary as a user runs it: exit codes, messages, results.
#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(family)
}

fn unmask(args: &[&str]) -> Output {
    let cache = env!("CARGO_TARGET_TMPDIR");
    let command = &mut Command::new(env!("CARGO_BIN_EXE_unmask"));
    command.args(args).env("RUST_LOG", "error").env("XDG_CACHE_HOME", cache).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The one line of a failed command.
fn failure(args: &[&str], code: i32) -> String {
    let output = unmask(args);
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    assert!(code == 2 || text.lines().count() == 1, "{args:?}: {text}");
    text
}

fn verify(dir: &Path, out: &Path) -> (Option<i32>, Value) {
    let output = unmask(&["verify", dir.to_str().unwrap(), "--out", out.to_str().unwrap(), "--json"]);
    (output.status.code(), serde_json::from_str(&stdout(&output)).unwrap())
}

fn copy(family: &str, to: &Path) -> PathBuf {
    let dir = to.join(family);
    std::fs::create_dir(&dir).unwrap();
    for entry in std::fs::read_dir(golden(family)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
    }
    dir
}

#[test]
fn verify_reproduces_every_family_and_writes_what_it_computed() {
    for family in ["llama", "qwen3_moe", "stable_diffcoder", "sdar", "fast_dllm_v2", "llada2_moe", "llada", "dream"] {
        let out = tempfile::tempdir().unwrap();
        let (code, report) = verify(&golden(family), out.path());
        assert_eq!(code, Some(0), "{report:#}");
        let read = |path: &Path| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
        let actual = read(&out.path().join(family).join("actual.json"));
        let expected = read(&golden(family).join("expected.json"));
        for (a, e) in actual["decode"].as_array().unwrap().iter().zip(expected["decode"].as_array().unwrap()) {
            assert_eq!((&a["id"], &a["answer_ids"]), (&e["id"], &e["answer_ids"]));
            assert_eq!(a["commits"]["pass"], e["commits"]["pass"]);
        }
        let bytes = std::fs::read(out.path().join(family).join("actual.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for case in expected["logits"].as_array().unwrap() {
            let tensor = tensors.tensor(case["tensor"].as_str().unwrap()).unwrap();
            assert_eq!(serde_json::json!(tensor.shape()), case["shape"]);
        }
    }
}

/// I11 over every kind of layer: dense, with experts, fused projections, biases.
#[test]
fn verify_gives_the_same_over_two_and_four_ranks() {
    for (family, ranks) in [("sdar_moe", "2"), ("llada2_moe", "4"), ("fast_dllm_v2", "4"), ("llada", "2")] {
        let out = tempfile::tempdir().unwrap();
        let (dir, at) = (golden(family), out.path());
        let verify = ["verify", dir.to_str().unwrap(), "--out", at.to_str().unwrap(), "--ranks", ranks, "--json"];
        let output = unmask(&verify);
        assert_eq!(output.status.code(), Some(0), "{family} {ranks}: {}", stdout(&output));
    }
}

#[test]
fn verify_finds_differences_and_runs_without_answers() {
    let dir = tempfile::tempdir().unwrap();
    let sdar = copy("sdar", dir.path());
    let path = sdar.join("expected.json");
    let mut expected: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    expected["decode"][0]["commits"]["pass"][1] = 99.into();
    std::fs::write(&path, expected.to_string()).unwrap();
    let (code, report) = verify(&sdar, dir.path());
    assert_eq!(code, Some(1));
    assert!(report.to_string().contains("commits pass at 1"), "{report:#}");

    for case in expected["decode"].as_array_mut().unwrap() {
        let inputs = ["id", "loop", "strategy", "parameters", "prompt_length", "prompt_ids"];
        case.as_object_mut().unwrap().retain(|key, _| inputs.contains(&key.as_str()));
    }
    for case in expected["tokenizer"].as_array_mut().unwrap() {
        case.as_object_mut().unwrap().retain(|key, _| key == "text");
    }
    std::fs::write(&path, expected.to_string()).unwrap();
    std::fs::remove_file(sdar.join("expected.safetensors")).unwrap();
    let (code, report) = verify(&sdar, dir.path());
    assert_eq!(code, Some(0), "{report:#}");
    let cases = report["folders"][0]["cases"].as_array().unwrap();
    assert!(cases.iter().all(|case| case["verdict"] == "computed"));

    let config = sdar.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap().replace("SDARForCausalLM", "MysteryModel");
    std::fs::write(&config, text).unwrap();
    let (code, report) = verify(&sdar, dir.path());
    assert_eq!(code, Some(1));
    assert!(report["folders"][0]["unsupported"].as_str().unwrap().contains("MysteryModel"));
}

#[test]
fn logits_writes_one_row_per_id() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    let model = golden("sdar");
    let model = model.to_str().unwrap();
    let output = unmask(&["logits", "--model", model, "--ids", "1,2,3,4,5", "--out", out.to_str().unwrap()]);
    assert!(output.status.success());
    let bytes = std::fs::read(&out).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("logits").unwrap().shape(), [5, 305]);
    let out = out.to_str().unwrap();
    let error = failure(&["logits", "--model", model, "--ids", "1,99999", "--out", out], 1);
    assert!(error.contains("99999") && error.contains("out of range"), "{error}");
    failure(&["logits", "--model", model, "--ids", "1,x", "--out", out], 2);
}

#[test]
fn decode_gives_every_commit_and_refuses_unknown_parameters() {
    let model = golden("stable_diffcoder");
    let model = model.to_str().unwrap();
    let params = r#"{"gen_length": 16, "block_length": 4, "steps": 16, "eos_token_id": null}"#;
    let output = unmask(&["decode", "--model", model, "--ids", "20,30,40", "--params", params, "--json"]);
    let outcome: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(outcome["answer_ids"].as_array().unwrap().len(), 16);
    assert_eq!(outcome["commits"]["position"].as_array().unwrap().len(), 16);
    assert_eq!(outcome["totals"]["denoise"], 16);
    let bad = |params: &str| failure(&["decode", "--model", model, "--ids", "20", "--params", params], 1);
    assert!(bad(r#"{"gen_len": 4}"#).contains("gen_len"));
    assert!(bad(r#"{"policy": {"threshold": {"tau": 1.5}}}"#).contains("(0, 1]"));
    assert!(bad(r#"{"temperature": -1}"#).contains("temperature"));
    assert!(bad("{").contains("--params"));
    let error = failure(&["decode", "--model", model, "--ids", "20", "--loop", "drums"], 1);
    assert!(error.contains("drums") && error.contains("sdar"), "{error}");
}

#[test]
fn inspect_names_origins_and_missing_models_are_looked_for_in_named_places() {
    let model = golden("sdar");
    let output = unmask(&["inspect", model.to_str().unwrap(), "--json"]);
    let all: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let entries = all["entries"].as_array().unwrap();
    let origin = |key: &str| entries.iter().find(|e| e["key"] == key).map(|e| e["origin"].clone());
    assert_eq!(origin("hidden_size"), Some("config.json".into()));
    assert_eq!(origin("open_reach"), Some("family default".into()));
    let error = failure(&["inspect", "no-such-model"], 1);
    assert!(error.contains("no-such-model") && error.contains("models"), "{error}");
}

fn generate(more: &[&str]) -> Output {
    let model = golden("sdar");
    let base = ["generate", "--model", model.to_str().unwrap(), "--dtype", "f32", "--max-tokens", "20"];
    unmask(&[&base[..], more].concat())
}

#[test]
fn generate_streams_through_the_whole_path_and_repeats_itself() {
    let run = |seed: &str| stdout(&generate(&["--seed", seed, "--temperature", "1", "def f(x):"]));
    let first = run("1");
    assert!(first.starts_with("def f(x):") && first.len() > 12);
    assert_eq!(first, run("1"));
    assert_ne!(first, run("2"));
    let events = stdout(&generate(&["--json", "def f(x):"]));
    let kinds: Vec<String> = events
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap().as_object().unwrap().keys().next().unwrap().clone())
        .collect();
    assert_eq!((kinds[0].as_str(), kinds[kinds.len() - 1].as_str()), ("started", "finish"));
    assert!(kinds.iter().any(|kind| kind == "draft") && kinds.iter().any(|kind| kind == "commit"));
}

/// A prompt that ends inside a word goes on with the word, and its text stays as typed.
#[test]
fn generate_completes_a_word() {
    let prompt = "# Return True if the word is a palind";
    let output = stdout(&unmask(&["generate", prompt]));
    assert!(output.starts_with(&format!("{prompt}rome")) && output.contains("\ndef "), "{output}");
    let events = stdout(&unmask(&["generate", prompt, "--json"]));
    let text: String = events
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter_map(|event| event.pointer("/commit/text").and_then(Value::as_str).map(str::to_owned))
        .collect();
    assert!(text.starts_with("rome") && output.contains(&text), "{text}");
}

/// A model that reads everything at once fills a gap by what stands on both sides of it.
#[test]
fn generate_fills_a_gap_between_two_texts() {
    for family in ["llada", "dream"] {
        let model = golden(family);
        let finish = |suffix: &str| {
            let base = ["generate", "--model", model.to_str().unwrap(), "--dtype", "f32", "--json", "--seed", "1"];
            let output = unmask(&[&base[..], &["--max-tokens", "7", "def f(x):\n", "--suffix", suffix]].concat());
            let events: Vec<Value> = stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let ids = |event: &Value| event.pointer("/commit/token_ids").and_then(Value::as_array).cloned();
            let filled: Vec<Value> = events.iter().filter_map(ids).flatten().collect();
            let usage = events.last().unwrap().pointer("/finish/usage").unwrap().clone();
            assert_eq!((usage["completion_tokens"].as_u64(), filled.len()), (Some(filled.len() as u64), 7));
            (filled, usage["prompt_tokens"].as_u64().unwrap())
        };
        let (short, longer) = (finish("\n    return y"), finish("\n    return y if x else z"));
        assert!(short.0 != longer.0 && short.1 < longer.1, "{family}: {short:?} {longer:?}");
        assert_eq!(short, finish("\n    return y"));
    }
}

#[test]
fn generate_says_what_is_wrong() {
    let error = |more: &[&str]| {
        let output = generate(more);
        assert_eq!(output.status.code(), Some(1), "{more:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(error(&["--temperature=-1", "x"]).contains("temperature"));
    assert!(error(&["--block-size", "5", "x"]).contains("block_size"));
    assert!(error(&["--policy", "threshold=1.5", "x"]).contains("tau"));
    assert!(error(&[""]).contains("empty"));
    assert!(error(&["--suffix", "y", "x"]).contains("suffix"));
    assert!(error(&["--endpoint", "http://127.0.0.1:1", "x"]).contains("error:"));
    failure(&["generate", "--policy", "greedy", "x"], 2);
}

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let model = golden("sdar");
    let data = tempfile::tempdir().unwrap();
    let data = data.path().to_str().unwrap();
    let error = failure(&["up", "--model", model.to_str().unwrap(), "--port", &port, "--data-dir", data], 1);
    assert!(error.contains(&port) && error.contains("--port"), "{error}");
    let http = format!("127.0.0.1:{port}");
    let model = model.to_str().unwrap();
    let error = failure(&["up", "--model", model, "--port", "0", "--http", &http, "--data-dir", data], 1);
    assert!(error.contains(&port) && error.contains("--http"), "{error}");
}

/// Starts `up` on free ports and gives its first line of output, its endpoints as JSON.
fn up(data: &Path) -> (std::process::Child, Value) {
    use std::io::BufRead;
    let model = golden("sdar");
    let mut child = Command::new(env!("CARGO_BIN_EXE_unmask"))
        .args(["up", "--port", "0", "--json", "--model", model.to_str().unwrap(), "--data-dir", data.to_str().unwrap()])
        .env("XDG_CACHE_HOME", data.join("cache"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (child, serde_json::from_str(&line).unwrap())
}

#[test]
fn up_serves_a_client_and_ends_cleanly_on_a_signal() {
    for signal in ["-INT", "-TERM"] {
        let data = tempfile::tempdir().unwrap();
        let (mut child, endpoints) = up(data.path());
        let endpoint = endpoints["gateway"].as_str().unwrap();
        let output = unmask(&["generate", "--endpoint", endpoint, "--max-tokens", "8", "def f(x):"]);
        assert!(output.status.success());
        // One process per data folder.
        let error = failure(
            &[
                "up",
                "--port",
                "0",
                "--model",
                golden("sdar").to_str().unwrap(),
                "--data-dir",
                data.path().to_str().unwrap(),
            ],
            1,
        );
        assert!(error.contains("controller"), "{error}");
        assert_eq!(std::fs::read_dir(data.path().join("cache/unmask/profiles")).unwrap().count(), 1);
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn a_profile_is_measured_drawn_and_explained() {
    let out = tempfile::tempdir().unwrap();
    let model = golden("sdar");
    let quality = out.path().join("quality.json");
    let row = |policy: &str, block_size: u32, threshold: Option<f64>, tpf: f64| {
        serde_json::json!({ "policy": policy, "block_size": block_size, "threshold": threshold, "dtype": "bf16",
            "n": 500, "pass_rate": 0.9, "tpf": tpf })
    };
    let rows = [row("autoregressive", 1, None, 1.0), row("threshold", 4, Some(0.9), 2.0)];
    let file = serde_json::json!({ "format": "unmask.quality/1", "rows": rows });
    std::fs::write(&quality, file.to_string()).unwrap();
    let (model, quality, dir) =
        (model.to_str().unwrap(), quality.to_str().unwrap(), out.path().to_str().unwrap().to_owned());
    let output = unmask(&["profile", "--short", "--model", model, "--quality", quality, "--out", &dir, "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let all: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(all["throughput"]["curves"].as_array().unwrap().len(), 6);
    let chart = std::fs::read_to_string(out.path().join("profile.svg")).unwrap();
    assert!(chart.starts_with("<svg") && chart.contains("tokens per second"));

    let profile = format!("{dir}/profile.json");
    let asked = ["policy", "explain", "--profile", &profile, "--quality", quality, "--concurrency", "4"];
    let choice: Value = serde_json::from_str(&stdout(&unmask(&[&asked[..], &["--json"]].concat()))).unwrap();
    assert_eq!(choice["candidates"].as_array().unwrap().len(), 2);
    assert!(choice["chosen"]["prediction"]["tokens_per_s"].as_f64().unwrap() > 0.0);
    let text = stdout(&unmask(&[&asked[..], &["--latency-ms", "0.000001"]].concat()));
    assert!(text.contains("chosen: none") && text.contains("a block takes over"), "{text}");
    let error = failure(&["policy", "explain", "--profile", quality, "--quality", quality], 1);
    assert!(error.contains("profile"), "{error}");
}

#[test]
fn edit_repairs_a_file_and_keeps_what_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("broken.py");
    let broken = "def sum_of_squares(numbers):\n    total = 0\n    for number in numbers:\n        total += number * word\n    return total\n";
    std::fs::write(&path, broken).unwrap();
    let file = path.to_str().unwrap();
    let diff = stdout(&unmask(&["edit", file]));
    assert!(diff.contains("-        total += number * word\n+        total += number * number\n"), "{diff}");
    assert_eq!(stdout(&unmask(&["edit", file, "--keep", "4"])), "", "the broken line may not change");
    let report: Value = serde_json::from_str(&stdout(&unmask(&["edit", file, "--json"]))).unwrap();
    assert_eq!(report["changes"].as_array().unwrap().len(), 1);
    unmask(&["edit", file, "--write"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), broken.replace("word", "number"));
    std::fs::write(&path, broken.replace("word", "??")).unwrap();
    let filled: Value =
        serde_json::from_str(&stdout(&unmask(&["edit", file, "--json", "--hole", "??", "--hole-tokens", "1"])))
            .unwrap();
    assert!(filled["changes"].as_array().unwrap().iter().any(|change| change["old"].is_null()), "{filled}");
    let model = golden("sdar");
    let error = failure(&["edit", file, "--model", model.to_str().unwrap()], 1);
    assert!(error.contains("was not trained to edit"), "{error}");
}
