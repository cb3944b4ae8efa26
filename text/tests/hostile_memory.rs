//! No tokenizer or template takes more memory than its size warrants. One test, so that the count is its own.
#![allow(clippy::unwrap_used)]

use cap::Cap;
use std::alloc::System;
use std::path::{Path, PathBuf};
use unmask_text::{Message, Specials, Tokenizer};

/// Memory a file may take at its peak, per byte of it.
const PER_BYTE: usize = 128;
/// And besides (bytes): compiled patterns.
const BESIDES: usize = 128 << 20;
/// What a template may take besides (bytes), whatever it does.
const TEMPLATE_BESIDES: usize = 64 << 20;

/// What asks for more than this is stopped.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 1 << 30);

/// Every seed with its target, templates first, then the shortest: a peak can only be seen where it is the highest so far.
fn seeds() -> Vec<(&'static str, PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
    let mut all = Vec::new();
    for target in ["tokenizer", "chat_template"] {
        for entry in std::fs::read_dir(folder.join(target)).unwrap().map(Result::unwrap) {
            all.push((target, entry.path(), std::fs::read(entry.path()).unwrap()));
        }
    }
    // As long as a file gets, with the most expensive content that is read: nothing but ids, or nothing but brackets.
    let vocabulary: Vec<String> = (0..100_000).map(|id| format!("\"{id:x}\":{id}")).collect();
    let vocabulary = format!(r#"{{"model":{{"type":"BPE","vocab":{{{}}},"merges":[]}}}}"#, vocabulary.join(","));
    all.push(("tokenizer", "many ids".into(), vocabulary.into_bytes()));
    let brackets = format!(r#"{{"model":{{"type":"BPE","vocab":{{}},"merges":[{}[]]}}}}"#, "[],".repeat(300_000));
    all.push(("tokenizer", "many brackets".into(), brackets.into_bytes()));
    let added: Vec<String> =
        (0..100).map(|id| format!(r#"{{"id":{id},"content":"{:0256}","special":true}}"#, id * 7919)).collect();
    let added =
        format!(r#"{{"model":{{"type":"BPE","vocab":{{}},"merges":[]}},"added_tokens":[{}]}}"#, added.join(","));
    all.push(("tokenizer", "long added tokens".into(), added.into_bytes()));
    all.sort_by_key(|seed| (seed.0 == "tokenizer", seed.2.len()));
    all
}

#[test]
fn no_file_takes_more_memory_than_its_size_warrants() {
    let small =
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/tokenizer/small.json")).unwrap();
    let messages = [Message { role: "user".into(), content: "a<|end|>b".into() }];
    for (target, path, bytes) in seeds() {
        let before = ALLOCATOR.allocated();
        if target == "tokenizer" {
            if let Ok(tokenizer) = Tokenizer::from_files(&bytes, None, None) {
                let _ = tokenizer.encode("ab <|end|> é", Specials::AsText, true);
            }
        } else {
            let template = String::from_utf8_lossy(&bytes);
            if let Ok(tokenizer) = Tokenizer::from_files(&small, None, Some(&template)) {
                let _ = tokenizer.encode_chat(&messages);
            }
        }
        let peak = ALLOCATOR.max_allocated().saturating_sub(before);
        let besides = if target == "tokenizer" { BESIDES } else { TEMPLATE_BESIDES };
        let most = PER_BYTE * bytes.len() + besides;
        assert!(peak <= most, "{}: {peak} bytes for {}", path.display(), bytes.len());
    }
}
