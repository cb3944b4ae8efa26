//! Tokenizers and templates that somebody made to do harm are read or refused, and nothing else happens. The seeds are
//! those of `/fuzz`.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use unmask_text::{Message, Specials, TextError, Tokenizer};

/// Longest that a seed may take: most take milliseconds, and the machine has others to serve.
const SECONDS_MAX: Duration = Duration::from_secs(20);

/// Name and bytes of every seed of a fuzz target.
fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    let mut seeds: Vec<_> =
        entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect();
    seeds.sort();
    assert!(seeds.len() > 10, "{target}");
    seeds
}

fn seed(target: &str, name: &str) -> Vec<u8> {
    seeds(target).into_iter().find(|seed| seed.0 == name).unwrap().1
}

static SMALL: LazyLock<Vec<u8>> = LazyLock::new(|| seed("tokenizer", "small.json"));

/// Builds the tokenizer and sends text through it both ways.
fn build(json: &[u8]) -> Result<Tokenizer, TextError> {
    let tokenizer = Tokenizer::from_files(json, None, None)?;
    let long = "ab".repeat(1000);
    for text in ["", "ab  <|end|>a\n\t", "e\u{301}漢😀\u{130}\u{fdfa}\u{0} <|end|", &long] {
        for add_special in [false, true] {
            if let Ok(ids) = tokenizer.encode(text, Specials::Parse, add_special) {
                tokenizer.decode(&ids, false);
            }
        }
        let ids = tokenizer.encode(text, Specials::AsText, false).unwrap_or_default();
        assert!(!ids.iter().any(|&id| tokenizer.is_special(id)), "{text:?} gave a special token");
    }
    Ok(tokenizer)
}

/// Encodes a conversation with a template of its own file, or in a `tokenizer_config.json`.
fn converse(template: &[u8]) -> Result<Vec<u32>, TextError> {
    let tokenizer = if template.starts_with(b"{\"") {
        Tokenizer::from_files(&SMALL, Some(template), None)?
    } else {
        Tokenizer::from_files(&SMALL, None, Some(&String::from_utf8_lossy(template)))?
    };
    let messages = [("system", "ab"), ("user", "a<|end|>b <|en"), ("assistant", "é\u{f8fe}0")];
    tokenizer.encode_chat(&messages.map(|(role, content)| Message { role: role.into(), content: content.into() }))
}

#[test]
fn hostile_tokenizers_are_refused_by_name() {
    let read = [
        "added_twice.json",
        "backreference.json",
        "backtracking.json",
        "empty_matches.json",
        "endless_padding.json",
        "llama.json",
        "lowercase_kelvin.json",
        "many_ways_at_every_place.json",
        "merge_in_a_circle.json",
        "merge_of_empty.json",
        "same_id_twice.json",
        "quadratic_pattern.json",
        "quadratic_without_looking.json",
        "sdar.json",
        "small.json",
        "unknown_token_is_missing.json",
        "untyped.json",
    ];
    for (name, bytes) in seeds("tokenizer") {
        match build(&bytes) {
            Ok(_) => assert!(read.contains(&name.as_str()), "{name} must be refused"),
            Err(error) => {
                assert!(error.to_string().starts_with("tokenizer.json: "), "{name}: {error}");
                assert!(!read.contains(&name.as_str()), "{name} must be read: {error}");
            }
        }
    }
}

#[test]
fn patterns_that_take_long_are_an_error_and_not_another_split() {
    for (name, why, text) in [
        ("backtracking.json", "gives up at byte 0", "a"),
        ("many_ways_at_every_place.json", "gives up at byte 0", "ab"),
        ("quadratic_pattern.json", "too long for this text", "ab"),
        ("quadratic_without_looking.json", "too long for this text", "ab"),
    ] {
        let long = text.repeat(100_000);
        let tokenizer = Tokenizer::from_files(&seed("tokenizer", name), None, None).unwrap();
        let started = Instant::now();
        let result = tokenizer.encode(&long, Specials::Parse, false).map(|ids| ids.len());
        assert!(result.clone().is_err_and(|error| error.to_string().contains(why)), "{name}: {result:?}");
        assert!(started.elapsed() < SECONDS_MAX, "{name} took {:?}", started.elapsed());
    }
}

#[test]
fn hostile_templates_end() {
    for (name, bytes) in seeds("chat_template") {
        let started = Instant::now();
        let result = std::panic::catch_unwind(|| converse(&bytes)).unwrap_or_else(|_| panic!("{name}"));
        let harmless = ["messages.jinja", "namespace.jinja", "macro.jinja", "config.json"].contains(&name.as_str());
        assert!(result.is_ok() || !harmless, "{name}: {result:?}");
        assert!(started.elapsed() < SECONDS_MAX, "{name} took {:?}", started.elapsed());
    }
}

#[test]
fn files_cut_at_any_byte_are_refused_or_read() {
    let config = seed("chat_template", "config.json");
    for length in 0..SMALL.len() {
        assert!(build(&SMALL[..length]).is_err(), "tokenizer.json cut at {length}");
    }
    // From two bytes on it counts as a config.
    for length in 2..config.len() {
        assert!(converse(&config[..length]).is_err(), "tokenizer_config.json cut at {length}");
    }
    let template = seed("chat_template", "messages.jinja");
    for length in 0..template.len() {
        let _ = converse(&template[..length]);
    }
}

/// What happens to a file: at a place, some bytes make way for others.
type Edits = Vec<(prop::sample::Index, usize, String)>;

fn edits(pieces: &'static [&'static str]) -> impl Strategy<Value = Edits> {
    let new = prop_oneof![prop::sample::select(pieces).prop_map(str::to_owned), ".{0,3}"];
    prop::collection::vec((any::<prop::sample::Index>(), 0usize..8, new), 1..5)
}

fn edited(mut bytes: Vec<u8>, edits: &Edits) -> Vec<u8> {
    for (at, removed, new) in edits {
        let at = at.index(bytes.len().max(1)).min(bytes.len());
        let end = (at + removed).min(bytes.len());
        bytes.splice(at..end, new.bytes());
    }
    bytes
}

const JSON: [&str; 14] =
    ["0", "3", "-1", "4294967295", "18446744073709551615", "null", "true", "[", "]", "{}", "\"\"", ",", "\"a\"", "é"];
const JINJA: [&str; 14] =
    ["{{", "}}", "{%", "%}", "|", "messages", "loop", "(", ")", "[0]", "'", " ~ ", "-1", "\u{f8fe}"];

proptest! {
    #[test]
    fn an_edited_tokenizer_is_read_or_refused(edits in edits(&JSON)) {
        let _ = build(&edited(SMALL.clone(), &edits));
    }

    #[test]
    fn an_edited_template_ends(edits in edits(&JINJA), which in 0usize..4) {
        let name = ["messages.jinja", "namespace.jinja", "macro.jinja", "config.json"][which];
        let _ = converse(&edited(seed("chat_template", name), &edits));
    }
}
