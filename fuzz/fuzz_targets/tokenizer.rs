//! `tokenizer.json`: built, then text goes through it both ways.
#![no_main]

use libfuzzer_sys::fuzz_target;
use unmask_text::{Specials, Tokenizer};

const TEXTS: [&str; 3] = ["", "ab  <|end|>a\n\t", "e\u{301}漢😀\u{130}\u{fdfa}\u{0} <|end|"];

fuzz_target!(|bytes: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_files(bytes, None, None) else { return };
    for text in TEXTS {
        for add_special in [false, true] {
            if let Ok(ids) = tokenizer.encode(text, Specials::Parse, add_special) {
                tokenizer.decode(&ids, false);
            }
        }
        if let Ok(ids) = tokenizer.encode(text, Specials::AsText, false) {
            assert!(!ids.iter().any(|&id| tokenizer.is_special(id)), "text gave a special token");
        }
    }
});
