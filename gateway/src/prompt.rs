//! A valid request's prompt in token ids.

use crate::validate::Input;
use unmask_proto::v1::InfillTokens;
use unmask_text::{Specials, TextError, Tokenizer};

/// Token ids of a prompt. What users write never gives a special token; the begin token (where the tokenizer adds one),
/// the chat template and the infill sentinels do.
///
/// With a suffix the order is prefix, suffix, middle: the model continues with what belongs between.
///
/// # Errors
/// The tokenizer or the chat template refuses the input.
pub(crate) fn encode(
    tokenizer: &Tokenizer,
    input: &Input,
    suffix: Option<&str>,
    infill: Option<InfillTokens>,
) -> Result<Vec<u32>, TextError> {
    let (Some(suffix), Some(sentinels)) = (suffix, infill) else {
        return match input {
            Input::Text(text) => tokenizer.encode(text, Specials::AsText, true),
            Input::Ids(ids) => Ok(ids.clone()),
            Input::Chat(messages) => tokenizer.encode_chat(messages),
        };
    };
    let mut ids = match input {
        // Ids are taken as they are: whoever gives them gives the begin token too.
        Input::Ids(_) => Vec::new(),
        _ => tokenizer.encode("", Specials::AsText, true)?,
    };
    ids.push(sentinels.prefix);
    match input {
        Input::Text(text) => ids.extend(tokenizer.encode(text, Specials::AsText, false)?),
        Input::Ids(prefix) => ids.extend(prefix),
        Input::Chat(messages) => ids.extend(tokenizer.encode_chat(messages)?),
    }
    ids.push(sentinels.suffix);
    ids.extend(tokenizer.encode(suffix, Specials::AsText, false)?);
    ids.push(sentinels.middle);
    Ok(ids)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::path::Path;

    fn tokenizer(family: &str) -> Tokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(family);
        Tokenizer::from_files(&std::fs::read(folder.join("tokenizer.json")).unwrap(), None, None).unwrap()
    }

    #[test]
    fn infill_is_prefix_suffix_middle_and_specials_in_text_are_text() {
        let tokenizer = tokenizer("stable_diffcoder");
        let sentinels = Some(InfillTokens { prefix: 6, suffix: 7, middle: 8 });
        let plain = |text: &str| tokenizer.encode(text, Specials::AsText, false).unwrap();
        let text = Input::Text("def <[fim-middle]>".into());
        let ids = encode(&tokenizer, &text, Some("x\n"), sentinels).unwrap();
        let expected: Vec<u32> = [&[6], &plain("def <[fim-middle]>")[..], &[7], &plain("x\n"), &[8]].concat();
        assert_eq!(ids, expected);
        assert_eq!(ids.iter().filter(|&&id| id == 8).count(), 1);
        let ids = encode(&tokenizer, &Input::Ids(vec![50, 51]), Some("x\n"), sentinels).unwrap();
        assert_eq!(ids, [&[6, 50, 51, 7], &plain("x\n")[..], &[8]].concat());
    }

    #[test]
    fn a_begin_token_comes_first() {
        let tokenizer = tokenizer("llama");
        let begin = tokenizer.id_of("<|begin_of_text|>").unwrap();
        let ids = encode(&tokenizer, &Input::Text("a".into()), None, None).unwrap();
        assert_eq!(ids[0], begin);
        let sentinels = Some(InfillTokens { prefix: 1, suffix: 2, middle: 3 });
        let ids = encode(&tokenizer, &Input::Text("a".into()), Some("b"), sentinels).unwrap();
        assert_eq!((ids[0], ids[1], ids.last()), (begin, 1, Some(&3)));
    }
}
