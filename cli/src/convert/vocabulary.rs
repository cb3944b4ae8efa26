//! Tokenizers in GGUF files and in `tokenizer.json`: byte-level BPE, the one kind that both know here.

use super::gguf::{Gguf, List, Value as Stored};
use super::pre::{Pre, byte_level};
use super::writer::Item;
use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value, json};
use std::path::Path;
use unmask_engine::model::ModelConfig;
use unmask_text::{Specials, Tokenizer};

/// Types of tokens in GGUF files.
mod kind {
    pub const NORMAL: i64 = 1;
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const UNUSED: i64 = 5;
}

/// Where both formats keep all of `tokenizer.json` (docs/gguf.md of ggml).
const WHOLE: &str = "tokenizer.huggingface.json";
/// Control tokens that end an output whatever the file's keys say, as in llama.cpp.
const ENDS: [&str; 5] = ["<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"];
/// Roles of tokens: key in GGUF files, key of `tokenizer_config.json`.
const ROLES: [(&str, &str); 4] = [
    ("tokenizer.ggml.bos_token_id", "bos_token"),
    ("tokenizer.ggml.eos_token_id", "eos_token"),
    ("tokenizer.ggml.unknown_token_id", "unk_token"),
    ("tokenizer.ggml.padding_token_id", "pad_token"),
];

/// A tokenizer on its way to a folder.
pub struct Vocabulary {
    /// `tokenizer.json`.
    pub tokenizer: String,
    /// `tokenizer_config.json`.
    pub config: Value,
    /// Tokens that end an output.
    pub ends: Vec<u32>,
    /// The token of padding.
    pub pad: Option<u32>,
}

/// Reads the tokenizer of a GGUF file.
///
/// # Errors
/// It is of another kind, or cuts text in a way that is not known.
pub fn read(gguf: &Gguf<'_>) -> anyhow::Result<Vocabulary> {
    let model = gguf.text("tokenizer.ggml.model").unwrap_or("none");
    let needs = "tokenizer.ggml.model must be gpt2 (byte-level BPE)";
    ensure!(model == "gpt2", "{needs}, is {model:?}: SentencePiece and other tokenizers are not read");
    let list = |key: &str| match gguf.value(key) {
        Some(Stored::List(list)) => Ok(list),
        _ => bail!("{key} must be a list"),
    };
    let tokens: Vec<&str> =
        list("tokenizer.ggml.tokens")?.texts().context("tokenizer.ggml.tokens must be texts")?.collect();
    let kinds = kinds(gguf, tokens.len())?;
    let id =
        |key: &str| gguf.whole(key).and_then(|id| u32::try_from(id).ok()).filter(|&id| (id as usize) < tokens.len());
    let mut config = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false });
    for (key, role) in ROLES {
        if let Some(id) = id(key) {
            config[role] = tokens[id as usize].into();
        }
    }
    if let Some(template) = gguf.text("tokenizer.chat_template") {
        config["chat_template"] = template.into();
    }
    let named = ["eos", "eot", "eom"].map(|name| id(&format!("tokenizer.ggml.{name}_token_id")));
    let mut ends: Vec<u32> = named.into_iter().flatten().collect();
    ends.extend(
        (0..)
            .zip(&tokens)
            .filter(|(id, token)| kinds[*id as usize] == kind::CONTROL && ENDS.contains(token))
            .map(|(id, _)| id),
    );
    // The first is the one that the file names.
    let mut seen = std::collections::BTreeSet::new();
    ends.retain(|id| seen.insert(*id));
    let tokenizer = match gguf.text(WHOLE) {
        Some(whole) => whole.to_owned(),
        None => built(gguf, &tokens, &kinds, list("tokenizer.ggml.merges")?, id(ROLES[0].0))?.to_string(),
    };
    Ok(Vocabulary { tokenizer, config, ends, pad: id(ROLES[3].0) })
}

fn kinds(gguf: &Gguf<'_>, tokens: usize) -> anyhow::Result<Vec<i64>> {
    let kinds: Vec<i64> = match gguf.value("tokenizer.ggml.token_type") {
        Some(Stored::List(list)) => list.whole().context("tokenizer.ggml.token_type must be whole numbers")?.collect(),
        _ => vec![kind::NORMAL; tokens],
    };
    ensure!(kinds.len() == tokens, "{tokens} tokens, but {} token types", kinds.len());
    Ok(kinds)
}

/// `tokenizer.json` from the lists of a GGUF file.
fn built(
    gguf: &Gguf<'_>,
    tokens: &[&str],
    kinds: &[i64],
    merges: List<'_>,
    begin: Option<u32>,
) -> anyhow::Result<Value> {
    let name = gguf.text("tokenizer.ggml.pre").context(
        "tokenizer.ggml.pre is missing: how this model cuts text is not known; convert it again with a newer llama.cpp",
    )?;
    let pre = Pre::named(name)
        .with_context(|| format!("tokenizer.ggml.pre {name:?} is not known; known are {}", Pre::known()))?;
    let mut vocab = Map::new();
    let mut added = Vec::new();
    for ((id, &token), &kind) in (0u32..).zip(tokens).zip(kinds) {
        // Rows that only fill up the matrix.
        if kind == kind::UNUSED {
            continue;
        }
        ensure!(vocab.insert(token.to_owned(), id.into()).is_none(), "token {token:?} is there twice");
        if matches!(kind, kind::UNKNOWN | kind::CONTROL | kind::USER_DEFINED) {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind != kind::USER_DEFINED,
            }));
        }
    }
    let merges = merges.texts().context("tokenizer.ggml.merges must be texts")?;
    let merges = merges.map(|merge| {
        let pair = merge.split_once(' ').with_context(|| format!("merge {merge:?} is no pair"))?;
        Ok(json!([pair.0, pair.1]))
    });
    let merges = merges.collect::<anyhow::Result<Vec<Value>>>()?;
    let begins = match gguf.value("tokenizer.ggml.add_bos_token") {
        Some(Stored::Bool(begins)) => begins,
        _ => pre.begins,
    };
    let post = begin.filter(|_| begins).map_or(Value::Null, |id| begin_first(tokens[id as usize], id));
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": if pre.composes { json!({ "type": "NFC" }) } else { Value::Null },
        "pre_tokenizer": pre.pre_tokenizer(),
        "post_processor": post,
        "decoder": byte_level(false),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre.ignores_merges, "vocab": vocab, "merges": merges,
        },
    }))
}

/// A post-processor that puts one token in front.
fn begin_first(token: &str, id: u32) -> Value {
    let first = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let part = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
    let mut special = Map::new();
    special.insert(token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] }));
    json!({
        "type": "TemplateProcessing", "single": [first, part("A")], "pair": [first, part("A"), part("B")],
        "special_tokens": special,
    })
}

/// The keys of a GGUF file that hold the tokenizer of a folder.
///
/// # Errors
/// The folder has none, or one of another kind.
pub fn items(dir: &Path, config: &ModelConfig) -> anyhow::Result<Vec<(String, Item)>> {
    let text = |name: &str| std::fs::read_to_string(dir.join(name));
    let whole = text("tokenizer.json").context("tokenizer.json: a GGUF file needs the model's tokenizer")?;
    let roles = text("tokenizer_config.json").unwrap_or_default();
    let template = text("chat_template.jinja").unwrap_or_default();
    let tokenizer = Tokenizer::from_files(whole.as_bytes(), Some(roles.as_bytes()), Some(&template))?;
    let json: Value = serde_json::from_str(&whole).context("tokenizer.json")?;
    let roles: Value = if roles.is_empty() { Value::Null } else { serde_json::from_str(&roles)? };
    let pre = Pre::name_of(&json["pre_tokenizer"]).filter(|_| json["model"]["type"] == "BPE");
    let pre = pre.context("tokenizer.json: llama.cpp has no name for how this tokenizer cuts text")?;
    let (tokens, kinds) = listed(&json, config.vocab_rows as usize)?;
    let merges = json["model"]["merges"].as_array().context("tokenizer.json has no merges")?;
    let mut items = vec![
        item("tokenizer.ggml.model", Item::Text("gpt2".into())),
        item("tokenizer.ggml.pre", Item::Text(pre.into())),
        item("tokenizer.ggml.tokens", Item::Texts(tokens)),
        item("tokenizer.ggml.token_type", Item::Whole(kinds)),
        item("tokenizer.ggml.merges", Item::Texts(merges.iter().map(merge).collect::<anyhow::Result<_>>()?)),
    ];
    let first = tokenizer.encode("", Specials::AsText, true)?;
    items.push(item("tokenizer.ggml.add_bos_token", Item::Bool(!first.is_empty())));
    let role = |name: &str| roles[name].as_str().or_else(|| roles[name]["content"].as_str());
    for (key, name) in ROLES {
        let id = if name == "eos_token" {
            config.eos_ids.first().copied()
        } else {
            role(name).and_then(|t| tokenizer.id_of(t))
        };
        items.extend(id.map(|id| item(key, Item::U32(id))));
    }
    for (name, id) in ["eot", "eom"].iter().zip(config.eos_ids.iter().skip(1)) {
        items.push(item(&format!("tokenizer.ggml.{name}_token_id"), Item::U32(*id)));
    }
    let template = Some(template.as_str()).filter(|text| !text.is_empty()).or_else(|| roles["chat_template"].as_str());
    items.extend(template.map(|text| item("tokenizer.chat_template", Item::Text(text.into()))));
    items.push(item(WHOLE, Item::Text(whole)));
    Ok(items)
}

fn item(key: &str, value: Item) -> (String, Item) {
    (key.to_owned(), value)
}

/// Every row's token, and its type.
fn listed(json: &Value, rows: usize) -> anyhow::Result<(Vec<String>, Vec<i32>)> {
    let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![kind::UNUSED as i32; rows];
    let mut put = |token: &str, id: &Value, kind: i64| {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|id| *id < rows);
        let id =
            id.with_context(|| format!("tokenizer.json: token {token:?} is outside the {rows} rows of the head"))?;
        token.clone_into(&mut tokens[id]);
        kinds[id] = kind as i32;
        anyhow::Ok(())
    };
    for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        put(token, id, kind::NORMAL)?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = if added["special"] == true { kind::CONTROL } else { kind::USER_DEFINED };
        put(added["content"].as_str().unwrap_or_default(), &added["id"], kind)?;
    }
    Ok((tokens, kinds))
}

/// A merge as one text: older `tokenizer.json` files have texts, newer ones pairs.
fn merge(merge: &Value) -> anyhow::Result<String> {
    let pair = (merge[0].as_str(), merge[1].as_str());
    match (merge.as_str(), pair) {
        (Some(text), _) => Ok(text.to_owned()),
        (None, (Some(left), Some(right))) => Ok(format!("{left} {right}")),
        _ => bail!("tokenizer.json: merge {merge} is no pair"),
    }
}
