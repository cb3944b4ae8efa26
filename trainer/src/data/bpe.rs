//! Byte-level BPE: every byte has a token, so that any text can be written.

use anyhow::{Context, ensure};
use serde_json::json;
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

/// Special tokens in order of id.
pub const SPECIALS: [&str; 5] = ["<|endoftext|>", "<|mask|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"];
/// Id of the end of a document.
pub const END: u32 = 0;
/// Ids of the sentinels of prefix-suffix-middle order.
pub const FIM: [u32; 3] = [2, 3, 4];
/// Words with the space before them, digits one by one, runs of symbols, runs of blanks.
const PATTERN: &str = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?!\S)|\s+";
/// Fewest ids: the specials and every byte.
const VOCABULARY_MIN: usize = 256 + SPECIALS.len();

/// Trains a tokenizer of `vocabulary` ids on `texts` and writes `tokenizer.json` and `tokenizer_config.json`.
///
/// # Errors
/// The vocabulary is smaller than the bytes, or files cannot be written.
pub fn train(texts: &[String], vocabulary: usize, out: &Path) -> anyhow::Result<()> {
    ensure!(vocabulary >= VOCABULARY_MIN, "vocabulary: must be at least {VOCABULARY_MIN}, is {vocabulary}");
    let mut tokenizer = Tokenizer::new(BPE::default());
    let split = Split::new(SplitPattern::Regex(PATTERN.into()), SplitDelimiterBehavior::Isolated, false);
    let split = split.map_err(|error| anyhow::anyhow!("{error}"))?;
    let bytes = ByteLevel::new(false, false, false);
    let steps: Vec<PreTokenizerWrapper> = vec![split.into(), bytes.into()];
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(steps))));
    tokenizer.with_decoder(Some(DecoderWrapper::ByteLevel(bytes)));
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocabulary)
        .min_frequency(2)
        .special_tokens(SPECIALS.map(|text| AddedToken::from(text, true)).to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut model = BPE::default();
    let trained = train_model(&mut trainer, &mut model, &tokenizer, texts).map_err(|error| anyhow::anyhow!("{error}"));
    let specials = trained?;
    tokenizer.with_model(model);
    tokenizer.add_special_tokens(&specials);
    std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let path = out.join("tokenizer.json");
    tokenizer.save(&path, true).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    let config = json!({ "eos_token": SPECIALS[0], "mask_token": SPECIALS[1], "pad_token": SPECIALS[0] });
    std::fs::write(out.join("tokenizer_config.json"), format!("{config:#}\n"))?;
    Ok(())
}

fn train_model(
    trainer: &mut tokenizers::models::bpe::BpeTrainer,
    model: &mut BPE,
    tokenizer: &Tokenizer,
    texts: &[String],
) -> tokenizers::Result<Vec<AddedToken>> {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Trainer};
    let Some(splitter) = tokenizer.get_pre_tokenizer() else { return Ok(Vec::new()) };
    trainer.feed(texts.iter(), |text| {
        let mut pieces = PreTokenizedString::from(text);
        splitter.pre_tokenize(&mut pieces)?;
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(splits.into_iter().map(|(piece, _, _)| piece.to_owned()).collect())
    })?;
    trainer.train(model)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    static TRAINED: LazyLock<Tokenizer> = LazyLock::new(|| {
        let dir = tempfile::tempdir().unwrap();
        let texts: Vec<String> = (0..200).map(|i| format!("def f{i}(x):\n    return x + {i}\n")).collect();
        train(&texts, 300, dir.path()).unwrap();
        Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap()
    });

    #[test]
    fn specials_have_their_ids_and_common_words_are_one_token() {
        for (id, text) in SPECIALS.iter().enumerate() {
            assert_eq!(TRAINED.token_to_id(text), Some(id as u32));
        }
        assert_eq!(TRAINED.encode(" return", false).unwrap().get_ids().len(), 1);
        assert_eq!(TRAINED.encode("123", false).unwrap().get_ids().len(), 3);
        assert!(train(&[], 100, Path::new("/nowhere")).is_err());
    }

    proptest! {
        #[test]
        fn any_text_survives_the_round_trip(text in "\\PC{0,40}\\s{0,4}") {
            let ids = TRAINED.encode(text.as_str(), false).unwrap();
            prop_assert_eq!(TRAINED.decode(ids.get_ids(), false).unwrap(), text);
        }
    }
}
