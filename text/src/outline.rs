//! What `tokenizer.json` may hold, checked before the tokenizers crate builds anything from it.
//!
//! A file cannot make that crate panic, nor take much more memory or time than its length warrants: steps that multiply
//! text, patterns that grow when compiled, and ids far beyond the file's tokens are refused by name.

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use std::fmt;

/// Most tokens beside the vocabulary.
const ADDED_MAX: usize = 8192;
/// Longest of them (bytes): what finds them in text may take a table row per byte.
const ADDED_BYTES_MAX: usize = 256;
/// Most steps of one part: normaliser, pre-tokenizer, post-processor or decoder.
const STEPS_MAX: usize = 16;
/// Longest patterns of a file, together (bytes).
const PATTERN_BYTES_MAX: usize = 4096;
/// Most counted repetitions (`{1,3}`) in a file's patterns: each may compile to megabytes.
const REPETITIONS_MAX: usize = 8;
/// Largest number of a counted repetition: those of nested ones are multiplied, and must not overflow.
const REPEATED_MAX: u64 = 64;
/// Largest id.
const ID_MAX: u64 = 1 << 24;
/// Longest list of problems.
const PROBLEMS_MAX: usize = 20;

/// Each changes a text's length by a constant factor, however often it runs.
const NORMALIZERS: [&str; 8] = ["Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents"];
const PRE_TOKENIZERS: [&str; 7] =
    ["Sequence", "ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"];
const POST_PROCESSORS: [&str; 4] = ["Sequence", "ByteLevel", "TemplateProcessing", "RobertaProcessing"];
/// Those that may stand only once: two of them multiply.
const ONCE: [&str; 2] = ["ByteLevel", "TemplateProcessing"];

#[derive(Deserialize)]
struct Outline {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HighestId,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
struct Added {
    id: u64,
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
}

/// The highest id of a vocabulary, of which nothing else is kept.
struct HighestId(u64);

impl<'de> Deserialize<'de> for HighestId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Ids;
        impl<'de> Visitor<'de> for Ids {
            type Value = HighestId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tokens and ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<HighestId, A::Error> {
                let mut highest = 0;
                while let Some((_, id)) = map.next_entry::<IgnoredAny, u64>()? {
                    highest = highest.max(id);
                }
                Ok(HighestId(highest))
            }
        }
        deserializer.deserialize_map(Ids)
    }
}

/// Everything in a `tokenizer.json` that keeps it from being built.
pub(crate) fn problems(json: &[u8]) -> Vec<String> {
    let outline: Outline = match serde_json::from_slice(json) {
        Ok(outline) => outline,
        Err(error) => return vec![error.to_string()],
    };
    let mut found = model_problems(&outline.model);
    found.extend(added_problems(&outline.added_tokens, &outline.normalizer));
    // Every token takes more than one byte of the file, so ids past that are gaps that only cost memory.
    let bound = (json.len() as u64).min(ID_MAX);
    let highest = outline.added_tokens.iter().map(|added| added.id).fold(outline.model.vocab.0, u64::max);
    if highest >= bound {
        found.push(format!("a token's id is {highest}: a file of {} bytes has ids below {bound}", json.len()));
    }
    step_problems("normalizer", &outline.normalizer, Some(&NORMALIZERS), &mut found);
    step_problems("pre_tokenizer", &outline.pre_tokenizer, Some(&PRE_TOKENIZERS), &mut found);
    step_problems("post_processor", &outline.post_processor, Some(&POST_PROCESSORS), &mut found);
    step_problems("decoder", &outline.decoder, None, &mut found);
    let parts = [&outline.normalizer, &outline.pre_tokenizer, &outline.post_processor, &outline.decoder];
    let mut patterns = Vec::new();
    parts.iter().for_each(|part| collect_patterns(part, &mut patterns));
    found.extend(pattern_problems(&patterns));
    found.truncate(PROBLEMS_MAX);
    found
}

fn model_problems(model: &Model) -> Vec<String> {
    let mut found = Vec::new();
    if model.kind.as_deref().is_some_and(|kind| kind != "BPE") {
        found.push("model.type must be BPE: others are not read".into());
    }
    let affixes = [
        ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ];
    for (key, affix) in affixes {
        if affix.as_ref().is_some_and(|affix| !affix.is_empty()) {
            found.push(format!("model.{key} must be null: byte-level tokens have none"));
        }
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        found.push("model.dropout must be null: the same text must give the same ids".into());
    }
    found
}

fn added_problems(added: &[Added], normalizer: &Value) -> Vec<String> {
    let mut found = Vec::new();
    if added.len() > ADDED_MAX {
        found.push(format!("added_tokens holds {} tokens, at most {ADDED_MAX} are read", added.len()));
    }
    let long = added.iter().filter(|token| token.content.len() > ADDED_BYTES_MAX);
    found.extend(long.map(|token| format!("added token {} is longer than {ADDED_BYTES_MAX} bytes", token.id)));
    // What finds these tokens in text would find two at one place, or one of no length.
    let edge = |token: &&Added| token.content.trim() != token.content || token.content.is_empty();
    if let Some(token) = added.iter().find(edge).filter(|_| added.iter().any(|token| token.lstrip || token.rstrip)) {
        found.push(format!("added token {} has white space at its edge, which another token takes", token.id));
    }
    let vanishes = has_step(normalizer, &["Strip", "StripAccents"]);
    if let Some(token) = added.iter().find(|token| token.normalized && vanishes) {
        found.push(format!("added token {} is normalized, and the normalizer strips", token.id));
    }
    found
}

/// Whether a part has a step of these kinds.
fn has_step(part: &Value, kinds: &[&str]) -> bool {
    let mut steps = Vec::new();
    collect_steps(part, &mut steps);
    steps.iter().any(|step| step["type"].as_str().is_some_and(|kind| kinds.contains(&kind)))
}

/// Kinds and number of a part's steps; `None` allows every kind.
fn step_problems(part: &str, value: &Value, allowed: Option<&[&str]>, found: &mut Vec<String>) {
    let mut steps = Vec::new();
    collect_steps(value, &mut steps);
    if steps.len() > STEPS_MAX {
        found.push(format!("{part} has {} steps, at most {STEPS_MAX} are read", steps.len()));
    }
    let Some(allowed) = allowed else { return };
    for (i, step) in steps.iter().enumerate() {
        let kind = step["type"].as_str().unwrap_or("(none)");
        if !allowed.contains(&kind) {
            found.push(format!("{part}: {kind} is not read, only {}", allowed.join(", ")));
        }
        if ONCE.contains(&kind) && steps[..i].iter().any(|other| other["type"] == kind) {
            found.push(format!("{part}: {kind} stands there twice"));
        }
        let pieces = step["single"].as_array().into_iter().flatten();
        let texts: Vec<&Value> = pieces.clone().filter_map(|piece| piece.get("Sequence")).collect();
        if texts.len() > 1 {
            found.push(format!("{part}: {kind} repeats the text"));
        }
        if texts.iter().any(|text| text["id"] != "A") {
            found.push(format!("{part}: {kind} wants a second text, and there is one"));
        }
        // The crate takes it for granted that each is there, with as many ids as tokens.
        let named = pieces.filter_map(|piece| piece.get("SpecialToken")?.get("id")?.as_str());
        let known = |token: &&str| {
            let list = |key: &str| step["special_tokens"][token][key].as_array().map(Vec::len);
            list("ids").is_some_and(|ids| list("tokens") == Some(ids))
        };
        found.extend(named.filter(|token| !known(token)).map(|token| {
            let token: String = token.chars().take(40).collect();
            format!("{part}: {kind} adds {token:?}, which special_tokens does not have")
        }));
    }
}

/// A step and those inside it; what is nested deeper than JSON may be has been refused by its parser.
fn collect_steps<'a>(value: &'a Value, steps: &mut Vec<&'a Value>) {
    if value.is_object() {
        steps.push(value);
    }
    for key in ["normalizers", "pretokenizers", "processors", "decoders"] {
        value[key].as_array().into_iter().flatten().for_each(|inner| collect_steps(inner, steps));
    }
}

fn collect_patterns<'a>(value: &'a Value, patterns: &mut Vec<&'a str>) {
    match value {
        Value::Object(object) => {
            patterns.extend(object.get("Regex").and_then(Value::as_str));
            object.values().for_each(|inner| collect_patterns(inner, patterns));
        }
        Value::Array(list) => list.iter().for_each(|inner| collect_patterns(inner, patterns)),
        _ => {}
    }
}

fn pattern_problems(patterns: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    let bytes: usize = patterns.iter().map(|pattern| pattern.len()).sum();
    if bytes > PATTERN_BYTES_MAX {
        found.push(format!("patterns take {bytes} bytes, at most {PATTERN_BYTES_MAX} are compiled"));
    }
    let counted: Vec<&str> = patterns.iter().flat_map(|pattern| counts(pattern)).collect();
    let large = |count: &&&str| {
        let mut numbers = count.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty());
        numbers.any(|number| number.parse::<u64>().map_or(true, |number| number > REPEATED_MAX))
    };
    if let Some(count) = counted.iter().find(large) {
        let count: String = count.chars().take(20).collect();
        found.push(format!("a pattern repeats {count} times, at most {REPEATED_MAX} are compiled"));
    }
    let repetitions = counted.len();
    if repetitions > REPETITIONS_MAX {
        found.push(format!("patterns have {repetitions} counted repetitions, at most {REPETITIONS_MAX} are compiled"));
    }
    found
}

/// What stands in the braces of counted repetitions: those with a digit at their beginning. `\x{3040}` is a character.
fn counts(pattern: &str) -> Vec<&str> {
    let bytes = pattern.as_bytes();
    let starts =
        bytes.windows(2).enumerate().filter(|(_, pair)| pair[0] == b'{' && matches!(pair[1], b'0'..=b'9' | b','));
    let repeats = starts.filter(|(i, _)| !matches!(bytes[..*i], [.., b'\\', b'x' | b'u' | b'U']));
    repeats.map(|(i, _)| pattern[i + 1..].split('}').next().unwrap_or("")).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use serde_json::json;

    fn file(change: Value) -> Vec<u8> {
        let mut whole = json!({
            "model": { "type": "BPE", "vocab": { "a": 0 }, "merges": [] }, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": { "type": "ByteLevel" }, "post_processor": null, "decoder": null,
        });
        whole.as_object_mut().unwrap().extend(change.as_object().cloned().unwrap_or_default());
        whole.to_string().into_bytes()
    }

    fn model(change: Value) -> Vec<u8> {
        let mut model = json!({ "type": "BPE", "vocab": { "a": 0 }, "merges": [] });
        model.as_object_mut().unwrap().extend(change.as_object().cloned().unwrap_or_default());
        file(json!({ "model": model }))
    }

    #[test]
    fn what_would_break_or_blow_up_is_refused_by_name() {
        assert_eq!(problems(&file(json!({}))), [""; 0]);
        let byte_level = json!({ "type": "ByteLevel" });
        let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        let second = json!({ "Sequence": { "id": "B", "type_id": 0 } });
        let begin = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
        let adds = |tokens: Value| {
            let single = [&begin, &text];
            json!({ "post_processor": { "type": "TemplateProcessing", "single": single, "special_tokens": tokens } })
        };
        let pattern = |regex: &str| json!({ "pre_tokenizer": { "type": "Split", "pattern": { "Regex": regex } } });
        for (json, part) in [
            (model(json!({ "type": "Unigram" })), "model.type"),
            (model(json!({ "continuing_subword_prefix": "é" })), "continuing_subword_prefix"),
            (model(json!({ "dropout": 0.5 })), "dropout"),
            (model(json!({ "vocab": { "a": u32::MAX } })), "id is 4294967295"),
            (model(json!({ "vocab": { "a": -1 } })), "invalid value"),
            (file(json!({ "added_tokens": [{ "id": 1 << 23, "content": "x" }] })), "id is 8388608"),
            (file(json!({ "added_tokens": [{ "id": 1, "content": "x".repeat(257) }] })), "longer than 256"),
            (file(json!({ "normalizer": { "type": "Precompiled" } })), "Precompiled is not read"),
            (file(json!({ "normalizer": { "type": "Replace" } })), "Replace is not read"),
            (
                file(json!({ "pre_tokenizer": { "type": "Sequence", "pretokenizers": [byte_level, byte_level] } })),
                "twice",
            ),
            (file(json!({ "post_processor": { "type": "TemplateProcessing", "single": [text, text] } })), "repeats"),
            (file(json!({ "post_processor": { "type": "TemplateProcessing", "single": [second] } })), "a second text"),
            (file(adds(json!({}))), "adds \"<s>\""),
            (file(adds(json!({ "<s>": { "id": "<s>", "ids": [1, 2], "tokens": ["<s>"] } }))), "adds \"<s>\""),
            (file(json!({ "decoder": { "decoders": vec![json!({}); 17] } })), "18 steps"),
            (file(pattern(&r"\w".repeat(3000))), "6000 bytes"),
            (file(pattern(&r"\w{9}(?!x)".repeat(9))), "9 counted repetitions"),
            (file(pattern(r"\w{2,65}")), "repeats 2,65 times"),
            (file(pattern(r"\w{18446744073709551616}")), "repeats 18446744073709551616 times"),
        ] {
            let found = problems(&json);
            assert!(found.len() == 1 && found[0].contains(part), "{part}: {found:?}");
        }
        assert_eq!(problems(&file(pattern(&r"\x{3040}".repeat(9)))), [""; 0]);
    }

    #[test]
    fn deep_nesting_and_long_lists_are_refused() {
        let deep = format!(r#"{{"model":{{"vocab":{{}}}},"normalizer":{}"#, "[".repeat(100_000));
        assert!(problems(deep.as_bytes())[0].contains("recursion limit"));
        let many: Vec<Value> = (0..9000).map(|id| json!({ "id": id, "content": "x".repeat(300) })).collect();
        let found = problems(&file(json!({ "added_tokens": many })));
        assert!(found.len() == PROBLEMS_MAX && found[0].contains("9000 tokens"), "{found:?}");
    }
}
