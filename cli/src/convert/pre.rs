//! How text is cut before merges: llama.cpp's names for it (`tokenizer.ggml.pre`, src/llama-vocab.cpp) and what the
//! authors' `tokenizer.json` has instead.

use serde_json::{Value, json};

/// A way of cutting.
#[derive(Debug)]
pub struct Pre {
    /// llama.cpp's names; the first is written.
    names: &'static [&'static str],
    split: Split,
    /// Whether text is composed first (NFC).
    pub composes: bool,
    /// Whether a piece that is a token stays whole, whatever the merges say.
    pub ignores_merges: bool,
    /// Whether a begin token comes first unless the file says otherwise.
    pub begins: bool,
}

#[derive(Debug)]
enum Split {
    /// GPT-2's pattern.
    Gpt2,
    /// Digits one by one, then GPT-2's pattern.
    Digits,
    /// A pattern of its own.
    Pattern(&'static str),
}

const PLAIN: Pre = Pre { names: &[], split: Split::Gpt2, composes: false, ignores_merges: false, begins: false };
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Our own (`trainer/src/data/bpe.rs`).
const OWN: &str = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?!\S)|\s+";

const PRES: [Pre; 5] = [
    Pre { names: &["gpt-2"], ..PLAIN },
    Pre { names: &["smollm", "starcoder", "refact"], split: Split::Digits, ..PLAIN },
    Pre { names: &["qwen2"], split: Split::Pattern(QWEN2), composes: true, ..PLAIN },
    Pre { names: &["deepseek-r1-qwen"], split: Split::Pattern(QWEN2), ..PLAIN },
    Pre {
        names: &["llama-bpe", "llama-v3", "llama3"],
        split: Split::Pattern(LLAMA3),
        composes: false,
        ignores_merges: true,
        begins: true,
    },
];

impl Pre {
    /// The one of llama.cpp's name.
    pub fn named(name: &str) -> Option<&'static Pre> {
        PRES.iter().find(|pre| pre.names.contains(&name))
    }

    /// llama.cpp's name for what a `tokenizer.json` has. Our own way has none: `qwen2` differs from it only where a
    /// quote stands right before s, t, d, m, re, ve or ll.
    pub fn name_of(pre_tokenizer: &Value) -> Option<&'static str> {
        let wanted = plain(pre_tokenizer);
        let found = PRES.iter().find(|pre| plain(&pre.pre_tokenizer()) == wanted).map(|pre| pre.names[0]);
        found.or_else(|| (wanted == plain(&pattern(OWN))).then_some("qwen2"))
    }

    /// Names that are known.
    pub fn known() -> String {
        PRES.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", ")
    }

    /// As `tokenizer.json` has it.
    pub fn pre_tokenizer(&self) -> Value {
        match self.split {
            Split::Gpt2 => byte_level(true),
            Split::Digits => {
                json!({
                    "type": "Sequence",
                    "pretokenizers": [{ "type": "Digits", "individual_digits": true }, byte_level(true)],
                })
            }
            Split::Pattern(text) => pattern(text),
        }
    }
}

fn pattern(text: &str) -> Value {
    let split = json!({ "type": "Split", "pattern": { "Regex": text }, "behavior": "Isolated", "invert": false });
    json!({ "type": "Sequence", "pretokenizers": [split, byte_level(false)] })
}

/// The byte alphabet, after GPT-2's pattern or none.
pub fn byte_level(with_pattern: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": with_pattern })
}

/// Without what does not change tokens.
fn plain(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            let silent = |key: &str, value: &Value| key == "trim_offsets" || (key == "use_regex" && *value == true);
            let kept = object.iter().filter(|(key, value)| !silent(key, value));
            Value::Object(kept.map(|(key, value)| (key.clone(), plain(value))).collect())
        }
        Value::Array(values) => values.iter().map(plain).collect(),
        value => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_is_found_by_each_of_its_names_and_by_its_form() {
        for pre in &PRES {
            for name in pre.names {
                assert_eq!(Pre::named(name).map(|found| found.names), Some(pre.names));
            }
        }
        for name in ["gpt-2", "smollm", "qwen2", "llama-bpe"] {
            let form = Pre::named(name).map(Pre::pre_tokenizer).unwrap_or_default();
            assert_eq!(Pre::name_of(&form), Some(name));
        }
        assert_eq!(Pre::name_of(&json!({ "type": "Whitespace" })), None);
    }
}
