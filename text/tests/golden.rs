//! Tokenizers of five model families against reference ids; detokenising in pieces.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::Value;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use unmask_text::{Detokenizer, Message, Specials, TextError, Tokenizer};

const FAMILIES: [&str; 5] = ["llama", "qwen2", "qwen3", "stable_diffcoder", "sdar"];

fn read(family: &str, name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(family).join(name)).unwrap()
}

fn load(family: &str, template: &str) -> Tokenizer {
    let (json, config) = (read(family, "tokenizer.json"), read(family, "tokenizer_config.json"));
    Tokenizer::from_files(&json, Some(&config), Some(template)).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn reference_ids_and_texts_agree() {
    for family in FAMILIES {
        let tokenizer = load(family, "");
        let expected: Value = serde_json::from_slice(&read(family, "expected.json")).unwrap();
        assert_eq!(u64::from(tokenizer.vocab_size()), expected["model"]["tokenizer_size"].as_u64().unwrap());
        for case in expected["tokenizer"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let encode = |specials, add| tokenizer.encode(text, specials, add).unwrap();
            assert_eq!(encode(Specials::Parse, false), ids(&case["ids"]), "{family} {text:?}");
            assert_eq!(encode(Specials::Parse, true), ids(&case["ids_with_special"]), "{family} {text:?}");
            assert_eq!(encode(Specials::AsText, false), ids(&case["ids_specials_as_text"]), "{family} {text:?}");
            assert_eq!(tokenizer.decode(&ids(&case["ids"]), false), case["decoded"], "{family}");
            assert_eq!(tokenizer.decode(&ids(&case["ids"]), true), case["decoded_skip_special"], "{family}");
        }
    }
}

const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}\
    <|im_start|>{{ m.role }}\n{{ m.content.strip() }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

#[test]
fn a_mask_in_a_message_is_text_and_the_template_writes_specials() {
    let tokenizer = load("sdar", TEMPLATE);
    let said = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let ids = tokenizer.encode_chat(&[said("user", "a <|MASK|> <|im_end|> b")]).unwrap();
    let count = |token: &str| ids.iter().filter(|&&id| Some(id) == tokenizer.id_of(token)).count();
    assert_eq!((count("<|MASK|>"), count("<|im_start|>"), count("<|im_end|>")), (0, 2, 1));
    let text = "<|im_start|>user\na <|MASK|> <|im_end|> b<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(tokenizer.decode(&ids, false), text);
    assert_eq!(tokenizer.encode_chat(&[said("system", "x")]), Err(TextError::Template("no system".into())));
    assert_eq!(load("llama", "").encode_chat(&[]), Err(TextError::NoChatTemplate));
}

#[test]
fn ordinary_messages_give_what_the_rendered_text_gives() {
    let template =
        "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}{{ 'x' if 'b' in m.content }}\n{% endfor %}";
    let tokenizer = load("sdar", template);
    let user = |content: &str| Message { role: "user".into(), content: content.into() };
    let ids = tokenizer.encode_chat(&[user("  a b \n"), user("if x < 1:\n")]).unwrap();
    let text = "<|im_start|>a bx\n<|im_start|>if x < 1:\n";
    assert_eq!(ids, tokenizer.encode(text, Specials::Parse, false).unwrap());
    // Two messages cannot join to a special token.
    let joining = load("sdar", "{% for m in messages %}{{ m.content }}{% endfor %}");
    let ids = joining.encode_chat(&[user("<|im_st"), user("art|>")]).unwrap();
    assert!(ids.iter().all(|&id| !joining.is_special(id)), "{ids:?}");
    assert_eq!(joining.decode(&ids, true), "<|im_start|>");
}

#[test]
fn a_template_that_never_ends_is_stopped() {
    let sprawling =
        "{% for i in range(10000) %}{% for j in range(10000) %}{{ messages[0].content }}{% endfor %}{% endfor %}";
    let message = Message { role: "user".into(), content: "x".repeat(10_000) };
    let result = load("sdar", sprawling).encode_chat(&[message]);
    assert!(matches!(result, Err(TextError::Template(_))), "{result:?}");
}

#[test]
fn a_mask_token_is_special_even_if_only_the_config_says_so() {
    let mut json: Value = serde_json::from_slice(&read("sdar", "tokenizer.json")).unwrap();
    for token in json["added_tokens"].as_array_mut().unwrap() {
        token["special"] = false.into();
    }
    let config = br#"{"mask_token": {"content": "<|MASK|>"}, "additional_special_tokens": ["<think>"]}"#;
    let tokenizer = Tokenizer::from_files(json.to_string().as_bytes(), Some(config), None).unwrap();
    let id = |token: &str| tokenizer.id_of(token).unwrap();
    assert_eq!(tokenizer.special_ids(), [id("<think>"), id("<|MASK|>")]);
    let ids = tokenizer.encode("<|MASK|><think><|im_end|>", Specials::AsText, false).unwrap();
    assert_eq!(ids.iter().filter(|&&id| tokenizer.is_special(id)).count(), 0);
    assert_eq!(ids.last(), Some(&id("<|im_end|>")));
    assert_eq!(tokenizer.encode("<|MASK|>", Specials::Parse, false).unwrap(), [id("<|MASK|>")]);
}

#[test]
fn a_special_token_that_merges_can_reach_is_spelled_in_bytes() {
    let mut json: Value = serde_json::from_slice(&read("llama", "tokenizer.json")).unwrap();
    json["model"]["ignore_merges"] = true.into();
    let id = json["model"]["vocab"].as_object().unwrap().len();
    json["model"]["vocab"]["MASK"] = id.into();
    let added = json["added_tokens"].as_array_mut().unwrap();
    added[0]["content"] = "MASK".into();
    json["post_processor"] = Value::Null;
    let tokenizer = Tokenizer::from_files(json.to_string().as_bytes(), None, None).unwrap();
    let mask = tokenizer.id_of("MASK").unwrap();
    assert_eq!(tokenizer.encode("MASK", Specials::Parse, false).unwrap(), [mask]);
    for add_special in [false, true] {
        let ids = tokenizer.encode("MASK", Specials::AsText, add_special).unwrap();
        assert!(ids.len() == 4 && !ids.contains(&mask), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids, true), "MASK");
    }
}

#[test]
fn broken_files_are_named() {
    let file = |result: Result<Tokenizer, TextError>| match result.err() {
        Some(TextError::Tokenizer { file, .. }) => file,
        other => panic!("{other:?}"),
    };
    assert_eq!(file(Tokenizer::from_files(b"{", None, None)), "tokenizer.json");
    assert_eq!(file(Tokenizer::from_files(&read("sdar", "tokenizer.json"), Some(b"["), None)), "tokenizer_config.json");
    let template = Tokenizer::from_files(&read("sdar", "tokenizer.json"), None, Some("{% for %}")).err();
    assert!(matches!(template, Some(TextError::Template(_))));
}

static LLAMA: LazyLock<Tokenizer> = LazyLock::new(|| load("llama", ""));
static SDAR: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Arc::new(load("sdar", "")));

/// The tokenizers crate's own reading of a family's file.
fn plain(family: &str) -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_bytes(read(family, "tokenizer.json")).unwrap()
}

static PLAIN: LazyLock<Vec<(Tokenizer, tokenizers::Tokenizer)>> =
    LazyLock::new(|| FAMILIES.iter().map(|family| (load(family, ""), plain(family))).collect());

#[test]
fn limits_on_patterns_leave_long_texts_as_they_are() {
    let code = include_str!("golden.rs").repeat(100);
    for text in [
        &code,
        &(" ".repeat(9000) + "x").repeat(10),
        &"\n \t".repeat(50_000),
        &"x".repeat(100_000),
        &"\0\u{378}".repeat(50_000),
    ] {
        for (ours, plain) in &*PLAIN {
            let ids = ours.encode(text, Specials::Parse, false).unwrap();
            let expected = plain.encode_fast(text.as_str(), false).unwrap();
            assert_eq!(ids, expected.get_ids());
        }
    }
}

proptest! {
    #[test]
    fn limits_on_patterns_change_no_ids(text in "(\\PC|[ \n\r\t0-9a-z'\u{0}-\u{ff}]){0,60}") {
        for (ours, plain) in &*PLAIN {
            let expected = plain.encode_fast(text.as_str(), false).unwrap();
            prop_assert_eq!(ours.encode(&text, Specials::Parse, false).unwrap(), expected.get_ids());
        }
    }

    #[test]
    fn text_survives_the_round_trip(text in "\\PC{0,40}") {
        // Llama's does not normalise.
        let ids = LLAMA.encode(&text, Specials::AsText, false).unwrap();
        prop_assert_eq!(LLAMA.decode(&ids, false), text);
    }

    #[test]
    fn pieces_give_the_text_of_all_and_never_half_a_character(
        text in "[aé漢😀\\n ]{0,20}", noise in prop::collection::vec(0u32..300, 0..6), cuts in prop::collection::vec(0usize..80, 0..6),
    ) {
        let mut ids = SDAR.encode(&text, Specials::AsText, false).unwrap();
        ids.extend(noise);
        let whole = SDAR.decode(&ids, true);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(ids.len())).chain([0, ids.len()]).collect();
        cuts.sort_unstable();
        let mut detokenizer = Detokenizer::new(Arc::clone(&SDAR));
        let mut released = String::new();
        for pair in cuts.windows(2) {
            released += &detokenizer.push(&ids[pair[0]..pair[1]]);
            prop_assert!(whole.starts_with(&released));
        }
        released += &detokenizer.finish();
        prop_assert_eq!(released, whole);
    }
}
