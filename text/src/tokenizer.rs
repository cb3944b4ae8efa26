//! Byte-level BPE tokenizers as `tokenizer.json` describes them.

use crate::TextError;
use crate::outline;
use crate::split::Steps;
use crate::template::Template;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, OffsetReferential, OffsetType, PostProcessorWrapper,
    PreTokenizedString, PreTokenizer as _, TokenizerImpl,
};

/// The tokenizers crate's, with pre-tokenizers of our own.
type Inner = TokenizerImpl<ModelWrapper, NormalizerWrapper, Steps, PostProcessorWrapper, DecoderWrapper>;

/// What text that spells a special token means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// Just text: what users write.
    AsText,
    /// The token: what templates write.
    Parse,
}

/// A tokenizer, its chat template, and the bytes of every token.
pub struct Tokenizer {
    parsing: Inner,
    /// The same, with special tokens taken for text.
    literal: Inner,
    template: Option<Template>,
    bytes: Vec<Vec<u8>>,
    special: Vec<bool>,
    /// Ids that stand for one byte each, by byte.
    single: Box<[Option<u32>; 256]>,
    /// Ids that are not special by their first byte, ascending: a user's last word is not looked up in the whole vocabulary.
    by_first: Vec<Vec<u32>>,
    digest: String,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and a chat template of its own file. An empty file counts as none.
    /// Special are the added tokens that say so and those that `tokenizer_config.json` gives a role (`mask_token`, say).
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] names the file and what is wrong with it; [`TextError::Template`] for a broken template.
    pub fn from_files(
        tokenizer_json: &[u8],
        tokenizer_config_json: Option<&[u8]>,
        chat_template: Option<&str>,
    ) -> Result<Tokenizer, TextError> {
        let bad = |file, reason: String| TextError::Tokenizer { file, reason };
        let (config_json, own_template) = (tokenizer_config_json.unwrap_or(b""), chat_template.unwrap_or(""));
        let problems = outline::problems(tokenizer_json);
        if !problems.is_empty() {
            return Err(bad("tokenizer.json", problems.join("; ")));
        }
        let mut parsing =
            Inner::from_bytes(tokenizer_json).map_err(|error| bad("tokenizer.json", error.to_string()))?;
        if !matches!(parsing.get_model(), tokenizers::models::ModelWrapper::BPE(_)) {
            return Err(bad("tokenizer.json", "model.type must be BPE: others are not read".into()));
        }
        // Prompts are never cut or filled up here: their length is for whoever validates them to judge.
        parsing.with_padding(None).with_truncation(None).map_err(|error| bad("tokenizer.json", error.to_string()))?;
        let config: Value = if config_json.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(config_json).map_err(|error| bad("tokenizer_config.json", error.to_string()))?
        };
        let (bytes, special) = token_bytes(&parsing, &named_tokens(&config));
        let mut literal = parsing.clone();
        let specials =
            (0..).zip(&special).filter(|(_, special)| **special).filter_map(|(id, _)| parsing.id_to_token(id));
        literal.add_special_tokens(&specials.map(|token| AddedToken::from(token, true)).collect::<Vec<_>>());
        literal.set_encode_special_tokens(true);
        let (mut single, mut by_first) = (Box::new([None; 256]), vec![Vec::new(); 256]);
        for ((id, bytes), _) in (0..).zip(&bytes).zip(&special).filter(|(_, special)| !**special) {
            if let [byte] = bytes.as_slice() {
                single[usize::from(*byte)].get_or_insert(id);
            }
            if let Some(&first) = bytes.first() {
                by_first[usize::from(first)].push(id);
            }
        }
        let mut digest = Sha256::new();
        for part in [tokenizer_json, config_json, own_template.as_bytes()] {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        let digest = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let template = Template::find(own_template, &config)?;
        Ok(Tokenizer { parsing, literal, template, bytes, special, single, by_first, digest })
    }

    /// SHA-256, hexadecimal, of the three files, each after its length (8 bytes, little-endian).
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Token ids of `text`; `add_special` adds what the post-processor adds (a begin token, say).
    ///
    /// # Errors
    /// The tokenizer refuses the text.
    pub fn encode(&self, text: &str, specials: Specials, add_special: bool) -> Result<Vec<u32>, TextError> {
        let failed = |error: tokenizers::Error| TextError::Encode(error.to_string());
        match specials {
            Specials::Parse => Ok(self.parsing.encode_fast(text, add_special).map_err(failed)?.get_ids().to_vec()),
            Specials::AsText if add_special => {
                let encoding = self.literal.encode_fast(text, true).map_err(failed)?;
                let added = encoding.get_special_tokens_mask();
                let ids = encoding.get_ids().iter().zip(added);
                ids.map(|(&id, &added)| if added == 1 { Ok(vec![id]) } else { self.spelled(id) })
                    .collect::<Result<Vec<_>, _>>()
                    .map(|ids| ids.concat())
            }
            Specials::AsText => {
                let encoding = self.literal.encode_fast(text, false).map_err(failed)?;
                let ids = encoding.get_ids();
                if !ids.iter().any(|&id| self.is_special(id)) {
                    return Ok(ids.to_vec());
                }
                ids.iter().map(|&id| self.spelled(id)).collect::<Result<Vec<_>, _>>().map(|ids| ids.concat())
            }
        }
    }

    /// Where the last word of `text` begins (byte): merges do not cross it.
    pub(crate) fn last_word(&self, text: &str) -> Result<usize, TextError> {
        let failed = |error: tokenizers::Error| TextError::Encode(error.to_string());
        let mut words = PreTokenizedString::from(text);
        if let Some(pre_tokenizer) = self.literal.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut words).map_err(failed)?;
        }
        let last = words.get_splits(OffsetReferential::Original, OffsetType::Byte).pop();
        Ok(last.map_or(0, |(_, (start, _), _)| start))
    }

    /// The id itself, or the bytes of a special token one by one: some vocabularies let the model's own merges reach
    /// a special token.
    fn spelled(&self, id: u32) -> Result<Vec<u32>, TextError> {
        if !self.is_special(id) {
            return Ok(vec![id]);
        }
        let bytes = self.token_bytes(id).iter();
        let ids: Option<Vec<u32>> = bytes.map(|&byte| self.single[usize::from(byte)]).collect();
        ids.ok_or_else(|| TextError::Encode(format!("text spells the special token {id}, which has no other spelling")))
    }

    /// Text of `ids`; bytes that are no UTF-8 become U+FFFD, unknown ids nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let kept = ids.iter().filter(|&&id| !(skip_special && self.is_special(id)));
        let bytes: Vec<u8> = kept.flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Bytes that a token stands for, those of its spelling for a special one; none for unknown ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// Ids of the tokens whose first byte is `first`, without special ones, ascending.
    pub(crate) fn beginning_with(&self, first: u8) -> &[u32] {
        &self.by_first[usize::from(first)]
    }

    /// Whether a token is special.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).is_some_and(|special| *special)
    }

    /// Ids of the special tokens, ascending.
    pub fn special_ids(&self) -> Vec<u32> {
        (0..self.vocab_size()).filter(|&id| self.is_special(id)).collect()
    }

    /// Id of the token spelled `token`.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.parsing.token_to_id(token)
    }

    /// One past the highest id.
    pub fn vocab_size(&self) -> u32 {
        self.bytes.len() as u32
    }

    /// Whether messages can be encoded.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// The chat template.
    pub(crate) fn template(&self) -> Option<&Template> {
        self.template.as_ref()
    }
}

/// Tokens that `tokenizer_config.json` gives a role: `eos_token`, `mask_token`, ... as a string or an object.
fn named_tokens(config: &Value) -> Vec<String> {
    let entries = config.as_object().into_iter().flatten();
    let listed = config["additional_special_tokens"].as_array().into_iter().flatten();
    let named = entries.filter(|(key, _)| key.ends_with("_token")).map(|(_, value)| value);
    named.chain(listed).filter_map(spelling).map(str::to_owned).collect()
}

/// A token as configs write it: a string, or an object with its content.
pub(crate) fn spelling(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// Bytes of every id, and which ids are special.
fn token_bytes(tokenizer: &Inner, named: &[String]) -> (Vec<Vec<u8>>, Vec<bool>) {
    let unmap = byte_alphabet();
    let added = tokenizer.get_added_tokens_decoder();
    let vocab = tokenizer.get_vocab(true);
    let size = vocab.values().max().map_or(0, |id| *id as usize + 1);
    let mut bytes = vec![Vec::new(); size];
    let mut special = vec![false; size];
    for (token, id) in vocab {
        match added.get(&id) {
            // Added tokens are spelled as they are, not in the byte alphabet.
            Some(added) => {
                bytes[id as usize] = added.content.as_bytes().to_vec();
                special[id as usize] = added.special || named.contains(&added.content);
            }
            None => {
                let mapped: Option<Vec<u8>> = token.chars().map(|c| unmap.get(&c).copied()).collect();
                bytes[id as usize] = mapped.unwrap_or_else(|| token.into_bytes());
            }
        }
    }
    (bytes, special)
}

/// GPT-2's printable stand-ins for bytes, inverted.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256u32;
    (0..=255u8)
        .filter_map(|byte| {
            let code = if printable(byte) {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).map(|c| (c, byte))
        })
        .collect()
}
