//! A valid request's prompt in token ids, and how the output must begin where they leave its last word out.

use crate::validate::{Input, Valid};
use unmask_proto::v1::policy::Kind;
use unmask_proto::v1::{Capabilities, InfillTokens, OpeningPlace};
use unmask_text::{Specials, Tail, TextError, Tokenizer};

/// A prompt as a worker takes it.
#[derive(Debug, Default)]
pub(crate) struct Prompt {
    pub ids: Vec<u32>,
    /// What stands behind the output, for models that read both sides of a gap.
    pub suffix: Vec<u32>,
    /// What of the prompt the ids leave out: the output begins with it.
    pub tail: Option<Tail>,
}

impl Prompt {
    /// The prompt of a valid request. Its last word is left out where the model takes that and causal rows decide, unless
    /// an earlier run began behind it, as what was received of it tells.
    ///
    /// # Errors
    /// As [`encode`].
    pub(crate) fn of(tokenizer: &Tokenizer, valid: &Valid, capabilities: &Capabilities) -> Result<Self, TextError> {
        let Valid { input, suffix, settings, resume, .. } = valid;
        let kind = settings.policy.and_then(|policy| policy.kind);
        let causal = matches!(kind, Some(Kind::Autoregressive(_) | Kind::SelfSpeculative(_)));
        if let (Input::Text(text), None, true) = (input, suffix, capabilities.heal && causal) {
            let (ids, tail) = tokenizer.encode_but_last_word(text)?;
            let received = resume.iter().flat_map(|resume| &resume.received);
            let spelled = received.flat_map(|&id| tokenizer.token_bytes(id));
            if tail.as_ref().is_none_or(|tail| spelled.zip(tail.typed.as_bytes()).all(|(a, b)| a == b)) {
                return Ok(Self { ids, tail, ..Self::default() });
            }
        }
        let ids = encode(tokenizer, input, suffix.as_deref(), capabilities.infill)?;
        let suffix = match suffix {
            Some(suffix) if capabilities.infill.is_none() => tokenizer.encode(suffix, Specials::AsText, false)?,
            _ => Vec::new(),
        };
        Ok(Self { ids, suffix, tail: None })
    }

    /// Tokens to be read.
    pub(crate) fn tokens(&self) -> usize {
        self.ids.len() + self.suffix.len()
    }

    /// The tail as workers take it.
    pub(crate) fn opening(&self) -> Vec<OpeningPlace> {
        let place = |ways: &Vec<(u32, u32)>| {
            let (token_ids, next) = ways.iter().copied().unzip();
            OpeningPlace { token_ids, next }
        };
        self.tail.iter().flat_map(|tail| &tail.ways).map(place).collect()
    }

    /// Text that the output begins with, and that its user has.
    pub(crate) fn typed(&self) -> &str {
        self.tail.as_ref().map_or("", |tail| &tail.typed)
    }
}

/// Token ids of a prompt. What users write never gives a special token; the begin token (where the tokenizer adds one),
/// the chat template and the infill sentinels do.
///
/// With a suffix and sentinels the order is prefix, suffix, middle: the model continues with what belongs between.
///
/// # Errors
/// The tokenizer or the chat template refuses the input.
fn encode(
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
    use crate::validate::Resumed;
    use std::path::Path;
    use unmask_proto::v1::policy::{SelfSpeculative, Threshold};
    use unmask_proto::v1::{Policy, ResolvedSettings};

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
    fn the_last_word_is_left_out_where_the_model_takes_that() {
        let tokenizer = tokenizer("stable_diffcoder");
        let plain = |text: &str| tokenizer.encode(text, Specials::AsText, true).unwrap();
        let policy = |kind| Some(Policy { kind: Some(kind) });
        let causal = policy(Kind::SelfSpeculative(SelfSpeculative { tau: 0.5 }));
        let ask = |policy, received: Option<&str>, heal| {
            let valid = Valid {
                input: Input::Text("def pal".into()),
                suffix: None,
                settings: ResolvedSettings { policy, ..Default::default() },
                max_tokens: None,
                drafts: false,
                priority: 0,
                resume: received.map(|text| Resumed {
                    request_id: "r".into(),
                    received: tokenizer.encode(text, Specials::AsText, false).unwrap(),
                    passes_used: 0,
                }),
            };
            Prompt::of(&tokenizer, &valid, &Capabilities { heal, ..Default::default() }).unwrap()
        };
        for received in [None, Some(""), Some(" p"), Some(" palindrome(s)")] {
            let healed = ask(causal, received, true);
            assert_eq!((healed.ids, healed.tail.unwrap().typed), (plain("def"), " pal".into()));
        }
        // It began elsewhere, where nothing was left out.
        for (policy, received, heal) in [
            (causal, Some("indrome(s)"), true),
            (causal, None, false),
            (policy(Kind::Threshold(Threshold { tau: 0.9 })), None, true),
        ] {
            let whole = ask(policy, received, heal);
            assert_eq!((whole.ids, whole.tail), (plain("def pal"), None));
        }
    }

    #[test]
    fn a_gap_for_masks_has_the_suffix_behind_it() {
        let tokenizer = tokenizer("llada");
        let plain = |text: &str, begins| tokenizer.encode(text, Specials::AsText, begins).unwrap();
        let valid = Valid {
            input: Input::Text("def f(".into()),
            suffix: Some(" return x".into()),
            settings: ResolvedSettings::default(),
            max_tokens: None,
            drafts: false,
            priority: 0,
            resume: None,
        };
        let by_masks = Capabilities { infill_by_masks: true, ..Default::default() };
        let prompt = Prompt::of(&tokenizer, &valid, &by_masks).unwrap();
        assert_eq!((&prompt.ids, &prompt.suffix), (&plain("def f(", true), &plain(" return x", false)));
        assert_eq!(prompt.tokens(), prompt.ids.len() + prompt.suffix.len());
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
