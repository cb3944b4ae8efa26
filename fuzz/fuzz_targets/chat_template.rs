//! A chat template of its own file or, where it begins with a brace and a quote, `tokenizer_config.json` with one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use unmask_text::{Message, Tokenizer};

const TOKENIZER: &[u8] = include_bytes!("../seeds/tokenizer/small.json");

fuzz_target!(|bytes: &[u8]| {
    let tokenizer = if bytes.starts_with(b"{\"") {
        Tokenizer::from_files(TOKENIZER, Some(bytes), None)
    } else {
        Tokenizer::from_files(TOKENIZER, None, Some(&String::from_utf8_lossy(bytes)))
    };
    let Ok(tokenizer) = tokenizer else { return };
    let messages = [("system", "ab"), ("user", "a<|end|>b <|en"), ("assistant", "é\u{f8fe}0")];
    let messages = messages.map(|(role, content)| Message { role: role.into(), content: content.into() });
    let _ = tokenizer.encode_chat(&messages);
});
