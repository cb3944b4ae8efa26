//! Training as users run it: by the command line, and not always to its end.
#![cfg(feature = "train")]
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For a few steps of a small model, debug build and busy machine included.
const PATIENCE: Duration = Duration::from_secs(120);

fn train(config: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unmask"));
    command.args(["train", "mask", "--config"]).arg(config);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Writes the file of a run that leaves its checkpoints in `out`.
fn write_config(file: &Path, out: &Path) {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
    let tokenizer = models.join(std::fs::read_to_string(models.join("default")).unwrap().trim()).join("tokenizer.json");
    let text = format!(
        r#"
        [data]
        tokenizer = {tokenizer:?}
        seed = 1
        tasks = 1000
        [stage]
        out = {out:?}
        steps = 40
        [stage.model]
        hidden_size = 32
        intermediate_size = 64
        num_hidden_layers = 2
        num_attention_heads = 4
        num_key_value_heads = 2
        head_dim = 8
        [stage.batch]
        tokens = 256
        length = 64
        block_sizes = [4, 8]
        [stage.edits]
        share = 0.25
        [stage.optimizer]
        rule = "muon"
        rate = 1e-3
        warm_up = 2
        decay = "cosine"
        [stage.eval]
        every = 20
        documents = 2
        [stage.checkpoint]
        every = 10
        keep = 2
        [stage.decode]
        block_size = 8
        tau = 0.9
        max_tokens = 32
        "#
    );
    std::fs::write(file, text).unwrap();
}

/// Lines of a log, but for how fast they came.
fn curve(out: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
    let mut lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in lines.iter_mut().filter_map(|line| line.as_object_mut()) {
        line.remove("tokens_per_second");
        line.remove("gflops");
    }
    lines
}

/// `kill -9` in the middle, the same command again: the same curve and the same weights.
#[test]
fn a_killed_run_goes_on_to_the_same_curve() {
    let dir = tempfile::tempdir().unwrap();
    let [straight, killed] = ["straight", "killed"].map(|name| {
        let (config, out) = (dir.path().join(name).with_extension("toml"), dir.path().join(name));
        write_config(&config, &out);
        (config, out)
    });
    assert!(train(&straight.0).wait().unwrap().success());

    let mut child = train(&killed.0);
    let started = Instant::now();
    let steps = || std::fs::read_to_string(killed.1.join("log.jsonl")).map_or(0, |text| text.lines().count());
    while steps() < 14 {
        assert!(
            started.elapsed() < PATIENCE && child.try_wait().unwrap().is_none(),
            "the run got to {} steps",
            steps()
        );
        std::thread::yield_now();
    }
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success(), "it was killed before its end");
    assert!(train(&killed.0).wait().unwrap().success());

    assert_eq!(curve(&killed.1), curve(&straight.1));
    let weights = |out: &Path| std::fs::read(out.join("model/model.safetensors")).unwrap();
    assert!(weights(&killed.1) == weights(&straight.1));
}
