//! Every tokenizer of the reference data and of the bundled models gives back the text it was given, and no text gives a
//! special token.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::Value;
use std::path::Path;
use std::sync::LazyLock;
use unmask_text::{Message, Specials, Tokenizer};

/// Families that put text into Unicode's composed form first (`tests/golden/README.md`: the Qwen line).
const COMPOSING: [&str; 7] = ["dream", "fast_dllm_v2", "qwen2", "qwen3", "qwen3_moe", "sdar", "sdar_moe"];

struct Model {
    name: String,
    tokenizer: Tokenizer,
    composes: bool,
    /// Spellings of its special tokens.
    specials: Vec<String>,
}

static MODELS: LazyLock<Vec<Model>> = LazyLock::new(|| {
    let mut models = Vec::new();
    for folder in ["../tests/golden", "../models"] {
        for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.join("tokenizer.json").exists() {
                models.push(model(&path));
            }
        }
    }
    models.sort_by(|a: &Model, b| a.name.cmp(&b.name));
    assert!(models.len() >= 12);
    models
});

fn model(folder: &Path) -> Model {
    let name = folder.file_name().unwrap().to_string_lossy().into_owned();
    let [json, config] =
        ["tokenizer.json", "tokenizer_config.json"].map(|file| std::fs::read(folder.join(file)).unwrap());
    let whole: Value = serde_json::from_slice(&json).unwrap();
    let specials: Vec<String> =
        whole["added_tokens"].as_array().unwrap().iter().map(|t| t["content"].as_str().unwrap().to_owned()).collect();
    // Two special tokens of the template's own around each message, and no trimming.
    let (first, last) = (&specials[0], &specials[1]);
    let template = format!("{{% for m in messages %}}{first}{{{{ m.content }}}}{last}{{% endfor %}}");
    let tokenizer = Tokenizer::from_files(&json, Some(&config), Some(&template)).unwrap();
    assert!(specials.iter().all(|special| tokenizer.is_special(tokenizer.id_of(special).unwrap())), "{name}");
    let composes = COMPOSING.contains(&name.as_str());
    assert_eq!(whole["normalizer"]["type"] == "NFC", composes, "{name}");
    Model { name, tokenizer, composes, specials }
}

impl Model {
    /// What the tokenizer makes of a text before it cuts it.
    fn normal(&self, text: &str) -> String {
        let mut text = tokenizers::NormalizedString::from(text);
        if self.composes { text.nfc().get().to_owned() } else { text.get().to_owned() }
    }

    fn special_ids(&self, ids: &[u32]) -> usize {
        ids.iter().filter(|&&id| self.tokenizer.is_special(id)).count()
    }
}

/// A piece of text; a number stands for a special token's spelling, whole or cut.
#[derive(Debug, Clone)]
enum Piece {
    Text(String),
    Special(prop::sample::Index, prop::sample::Index),
}

/// Any characters of Unicode, those whose order and composition matter, white space, and spellings of special tokens.
fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let any_text =
        prop::collection::vec(any::<char>(), 0..12).prop_map(|chars| Piece::Text(chars.into_iter().collect()));
    let marks = "[aeAE가각\u{1100}\u{1161}\u{11a8}\u{300}\u{301}\u{323}\u{327}\u{338}\u{212b}\u{2126}\u{fb01}\u{958}\u{1d15e}]{1,6}";
    let spaces = "[ \t\r\n\u{a0}\u{2028}\u{3000}\u{0}]{1,6}";
    let code = "[a-zA-Z0-9_'(){}<|>=:,. \n]{1,12}";
    let special = (any::<prop::sample::Index>(), any::<prop::sample::Index>());
    let piece = prop_oneof![
        any_text,
        marks.prop_map(Piece::Text),
        spaces.prop_map(Piece::Text),
        code.prop_map(Piece::Text),
        special.prop_map(|(which, cut)| Piece::Special(which, cut)),
    ];
    prop::collection::vec(piece, 0..8)
}

fn text(model: &Model, pieces: &[Piece]) -> String {
    let spell = |piece: &Piece| match piece {
        Piece::Text(text) => text.clone(),
        Piece::Special(which, cut) => {
            let spelling: Vec<char> = which.get(&model.specials).chars().collect();
            // Whole in half of all cases.
            let length = cut.index(2 * spelling.len()).min(spelling.len());
            spelling[..length].iter().collect()
        }
    };
    pieces.iter().map(spell).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn text_comes_back_and_gives_no_special_token(pieces in pieces()) {
        for model in &*MODELS {
            let text = text(model, &pieces);
            let ids = model.tokenizer.encode(&text, Specials::AsText, false).unwrap();
            prop_assert_eq!(model.special_ids(&ids), 0, "{}: {:?}", &model.name, &text);
            prop_assert_eq!(model.tokenizer.decode(&ids, true), model.normal(&text), "{}", &model.name);
            // What a post-processor adds is all that is special.
            let added = model.tokenizer.encode("", Specials::AsText, true).unwrap();
            let with = model.tokenizer.encode(&text, Specials::AsText, true).unwrap();
            prop_assert_eq!(model.special_ids(&with), added.len(), "{}: {:?}", &model.name, &text);
        }
    }

    #[test]
    fn messages_give_no_special_token_and_come_back(all in prop::collection::vec(pieces(), 0..4)) {
        for model in &*MODELS {
            let texts: Vec<String> = all.iter().map(|pieces| text(model, pieces)).collect();
            let messages: Vec<Message> =
                texts.iter().map(|text| Message { role: "user".into(), content: text.clone() }).collect();
            let ids = model.tokenizer.encode_chat(&messages).unwrap();
            // The template writes two for every message.
            prop_assert_eq!(model.special_ids(&ids), 2 * texts.len(), "{}: {:?}", &model.name, &texts);
            let ids: Vec<u32> = ids.into_iter().filter(|&id| !model.tokenizer.is_special(id)).collect();
            // Spans are composed one by one, so marks at their edges may stay apart until the whole is composed.
            let back = model.normal(&model.tokenizer.decode(&ids, false));
            prop_assert_eq!(back, model.normal(&texts.concat().replace('\u{f8fe}', "\u{fffd}")), "{}", &model.name);
        }
    }
}
