//! `unmask convert` as a user runs it; where they are installed, other programs read what it writes.
#![cfg(feature = "train")]
#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Beginnings of what the bundled models were trained to write.
const PROMPTS: [&str; 2] = ["def is_prime(n):\n", "def sum_of_squares(numbers):\n    \"\"\"Return"];
/// Tokens to generate.
const MOST: usize = 48;

fn tree(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path).to_str().unwrap().to_owned()
}

fn unmask(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_unmask")).args(args).env("RUST_LOG", "error").output().unwrap()
}

fn success(args: &[&str]) -> String {
    let output = unmask(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The one line of a failed command.
fn failure(args: &[&str]) -> String {
    let output = unmask(args);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{args:?}: {text}");
    text
}

fn prompt_ids(model: &str, text: &str) -> String {
    let read = |name: &str| std::fs::read(Path::new(model).join(name)).unwrap();
    let roles = read("tokenizer_config.json");
    let tokenizer = unmask_text::Tokenizer::from_files(&read("tokenizer.json"), Some(&roles), None).unwrap();
    let ids = tokenizer.encode(text, unmask_text::Specials::AsText, true).unwrap();
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// Greedy tokens, one per pass, with f32 weights; without the token that ends them.
fn greedy(model: &str, ids: &str) -> Vec<u64> {
    let params = format!(r#"{{"max_new_tokens": {MOST}, "temperature": 0.0, "stop_token_ids": [0]}}"#);
    let said = success(&["decode", "--model", model, "--ids", ids, "--loop", "ar", "--params", &params, "--json"]);
    until_end(&serde_json::from_str::<Value>(&said).unwrap()["answer_ids"])
}

fn until_end(ids: &Value) -> Vec<u64> {
    ids.as_array().unwrap().iter().filter_map(Value::as_u64).take_while(|id| *id != 0).collect()
}

/// Greedy tokens by another program: `variable` names a Python that has it.
fn by_others(variable: &str, script: &str, model: &Path, ids: &str) -> Option<Vec<u64>> {
    let python = std::env::var(variable).ok()?;
    let script = tree("tests/python") + "/" + script;
    let output = Command::new(python).arg(script).arg(model).arg(ids).arg(MOST.to_string()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    Some(until_end(&serde_json::from_str(text.lines().last().unwrap()).unwrap()))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn our_models_decode_alike_as_qwen3_folders_and_through_gguf_files() {
    let out = tempfile::tempdir().unwrap();
    for name in ["python-tasks-3m", "python-tasks-3m-twin"] {
        let model = tree("models") + "/" + name;
        let at = |suffix: &str| -> PathBuf { out.path().join(format!("{name}{suffix}")) };
        let (folder, file, back) = (at("-qwen3"), at(".gguf"), at("-back"));
        success(&["convert", "--to", "qwen3", &model, text(&folder)]);
        // f32, so that other programs do the same arithmetic.
        let said = success(&["convert", "--to", "gguf", "--dtype", "f32", "--json", &model, text(&file)]);
        let said: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((&said["architecture"], &said["tensors"]), (&"qwen3".into(), &68.into()));
        success(&["convert", text(&file), text(&back)]);
        for prompt in PROMPTS {
            let ids = prompt_ids(&model, prompt);
            let tokens = greedy(&model, &ids);
            assert!(!tokens.is_empty());
            for path in [&folder, &back] {
                assert_eq!(ids, prompt_ids(text(path), prompt));
                assert_eq!(greedy(text(path), &ids), tokens, "{}", path.display());
            }
            for (variable, script, path) in [
                ("UNMASK_TEST_TRANSFORMERS", "transformers_greedy.py", &folder),
                ("UNMASK_TEST_TRANSFORMERS", "transformers_greedy.py", &back),
                ("UNMASK_TEST_LLAMA_CPP", "llama_cpp_greedy.py", &file),
            ] {
                if let Some(others) = by_others(variable, script, path, &ids) {
                    assert_eq!(others, tokens, "{}: {prompt:?}", path.display());
                }
            }
        }
    }
}

#[test]
fn nothing_is_replaced_unasked_and_nothing_that_is_no_model() {
    let out = tempfile::tempdir().unwrap();
    let model = tree("tests/golden/llama");
    let (file, folder) = (out.path().join("llama.gguf"), out.path().join("made/llama"));
    let (file, folder) = (text(&file), text(&folder));
    success(&["convert", "--to", "gguf", &model, file]);
    assert!(failure(&["convert", "--to", "gguf", &model, file]).contains("--force replaces it"));
    success(&["convert", "--to", "gguf", &model, file, "--force"]);
    let said = success(&["convert", file, folder]);
    assert!(said.contains("LlamaForCausalLM") && said.contains("tensors (30 F32)"), "{said}");
    assert!(failure(&["convert", file, folder]).contains("--force replaces it"));
    success(&["convert", file, folder, "--force"]);
    let parent = out.path().to_str().unwrap();
    assert!(failure(&["convert", file, parent, "--force"]).contains("is no model's folder"));
    // A failure leaves nothing behind.
    let cut = out.path().join("cut.gguf");
    let bytes = std::fs::read(file).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() - 1000]).unwrap();
    let refused = failure(&["convert", text(&cut), text(&out.path().join("cut"))]);
    assert!(refused.contains("cut.gguf") && refused.contains("more than the file has left"), "{refused}");
    let mut left: Vec<_> = std::fs::read_dir(out.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["cut.gguf", "llama.gguf", "made"]);
}

#[test]
fn what_cannot_be_converted_is_refused_in_one_line() {
    let out = tempfile::tempdir().unwrap();
    let result = out.path().join("out");
    let refused = |args: &[&str]| failure(&[&["convert"], args, &[text(&result)]].concat());
    assert!(refused(&[&tree("tests/golden/llama")]).contains("say --to qwen3 or --to gguf"));
    assert!(refused(&["--to", "qwen3", &tree("tests/golden/llama")]).contains("other layers than Qwen3's"));
    assert!(refused(&["--to", "gguf", &tree("tests/golden/sdar")]).contains("block_causal"));
    assert!(refused(&["nowhere.gguf"]).contains("no such file"));
    assert!(refused(&[&tree("README.md")]).contains("is no GGUF file"));
    assert!(!result.exists());
}
