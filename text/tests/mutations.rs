//! Thousands of changed tokenizers and templates, under a cap of memory. More: `UNMASK_FUZZ_ROUNDS=1000000`.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../fuzz/mutate.rs"]
mod mutate;

use cap::Cap;
use std::alloc::System;
use std::path::Path;
use unmask_text::{Message, Specials, Tokenizer};

/// What asks for more than this ends the test.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 512 << 20);

fn seeds(target: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target)
}

#[test]
fn changed_templates_end() {
    let small = std::fs::read(seeds("tokenizer").join("small.json")).unwrap();
    let said = [("system", "ab"), ("user", "a<|end|>b <|en"), ("assistant", "é\u{f8fe}0")];
    let messages = said.map(|(role, content)| Message { role: role.into(), content: content.into() });
    mutate::fuzz(&seeds("chat_template"), 1, 2000, |bytes| {
        let template = String::from_utf8_lossy(bytes);
        if let Ok(tokenizer) = Tokenizer::from_files(&small, None, Some(&template)) {
            let _ = tokenizer.encode_chat(&messages);
        }
    });
}

#[test]
fn changed_tokenizers_are_read_or_refused() {
    let long = "ab1 ".repeat(2000);
    mutate::fuzz(&seeds("tokenizer"), 2, 2000, |bytes| {
        let Ok(tokenizer) = Tokenizer::from_files(bytes, None, None) else { return };
        for text in ["", "ab  <|end|>a\n\t", "e\u{301}漢😀\u{130}\u{fdfa}\u{0} <|end|", &long] {
            if let Ok(ids) = tokenizer.encode(text, Specials::Parse, true) {
                tokenizer.decode(&ids, false);
            }
            let ids = tokenizer.encode(text, Specials::AsText, false).unwrap_or_default();
            assert!(!ids.iter().any(|&id| tokenizer.is_special(id)), "text gave a special token");
        }
    });
}
