//! The end of a prompt that a model is to spell itself ("token healing").
//!
//! A tokenizer merges across the place where a text ends: `# the words that are palind` has other tokens at its end than
//! the same text with `rome` behind it, and a model hardly ever saw them before `rome`.

use crate::TextError;
use crate::tokenizer::{Specials, Tokenizer};

/// Longest text that is taken back (bytes), as many as a worker takes places.
const TYPED_BYTES_MAX: usize = 64;
/// Most choices of all places together, as many as a worker takes.
const CHOICES_MAX: usize = 1 << 16;

/// Text that the ids of a prompt leave out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tail {
    /// As it was typed.
    pub typed: String,
    /// Per byte of it: each token that agrees with what was typed from there on, and the byte behind it; its length, where
    /// a token reaches the end or beyond.
    pub ways: Vec<Vec<(u32, u32)>>,
}

impl Tokenizer {
    /// Ids of a user's text, with a begin token where the tokenizer adds one, and without its last word where that may
    /// not be over: where the text ends with a letter, a digit or a blank. It is in the tail then.
    ///
    /// A word is what the tokenizer never merges with what stands before it: letters with a blank before them, say.
    /// Where nothing would be left, or the word is longer than 64 bytes or can be spelled in too many ways, there is no tail.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_but_last_word(&self, text: &str) -> Result<(Vec<u32>, Option<Tail>), TextError> {
        let mut ids = self.encode(text, Specials::AsText, true)?;
        if !text.ends_with(|c: char| c.is_alphanumeric() || c == ' ') {
            return Ok((ids, None));
        }
        let typed = &text[self.last_word(text)?..];
        let kept = self.tokens_before(&ids, typed.len()).filter(|&kept| kept > 0);
        let tail = kept.and_then(|kept| Some((kept, self.tail(typed)?)));
        Ok(match tail {
            Some((kept, tail)) => {
                ids.truncate(kept);
                (ids, Some(tail))
            }
            None => (ids, None),
        })
    }

    /// How many of `ids` stand for what is before their last `left` bytes; `None` where a token stands for both.
    fn tokens_before(&self, ids: &[u32], mut left: usize) -> Option<usize> {
        for (kept, &id) in ids.iter().enumerate().rev() {
            left = left.checked_sub(self.token_bytes(id).len())?;
            if left == 0 {
                return Some(kept);
            }
        }
        None
    }

    fn tail(&self, typed: &str) -> Option<Tail> {
        let bytes = typed.as_bytes();
        if bytes.is_empty() || bytes.len() > TYPED_BYTES_MAX {
            return None;
        }
        let mut ways = vec![Vec::new(); bytes.len()];
        let mut choices = 0;
        for (at, ways) in ways.iter_mut().enumerate() {
            let rest = &bytes[at..];
            let agrees = |token: &[u8]| rest.starts_with(token) || token.starts_with(rest);
            let tokens = self.beginning_with(rest[0]).iter().map(|&id| (id, self.token_bytes(id)));
            let next = |token: &[u8]| (at + token.len()).min(bytes.len()) as u32;
            ways.extend(tokens.filter(|(_, token)| agrees(token)).map(|(id, token)| (id, next(token))));
            choices += ways.len();
        }
        // A byte that no token spells would leave nothing to choose.
        let open = ways.iter().all(|ways| !ways.is_empty());
        (open && choices <= CHOICES_MAX).then(|| Tail { typed: typed.to_owned(), ways })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;
    use std::sync::LazyLock;

    fn read(path: &str) -> Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
        Tokenizer::from_files(&std::fs::read(path).unwrap(), None, None).unwrap()
    }

    static OURS: LazyLock<Tokenizer> = LazyLock::new(|| read("models/python-tasks-3m/tokenizer.json"));

    #[test]
    fn the_last_word_is_left_out_with_its_blank() {
        for (text, left, typed) in [
            ("# words that are palind", "# words that are", " palind"),
            ("def is_pal", "def is_", "pal"),
            ("def f(words: ", "def f(words:", " "),
            ("x = 12", "x = 1", "2"),
            ("def f(x):\n    ", "def f(x):\n", "    "),
        ] {
            let (ids, tail) = OURS.encode_but_last_word(text).unwrap();
            let tail = tail.unwrap();
            assert_eq!((OURS.decode(&ids, false).as_str(), tail.typed.as_str()), (left, typed));
            assert_eq!(ids, OURS.encode(left, Specials::AsText, false).unwrap());
        }
        for whole in ["def", " x", "", "a (", "def f(x):\n"] {
            let (ids, tail) = OURS.encode_but_last_word(whole).unwrap();
            assert_eq!((ids, tail), (OURS.encode(whole, Specials::AsText, true).unwrap(), None));
        }
    }

    #[test]
    fn a_begin_token_is_enough_before_a_word() {
        let llama = read("tests/golden/llama/tokenizer.json");
        let (ids, tail) = llama.encode_but_last_word("hello").unwrap();
        assert_eq!((ids, tail.unwrap().typed.as_str()), (vec![llama.id_of("<|begin_of_text|>").unwrap()], "hello"));
    }

    proptest! {
        /// Every way through the tail spells it, and the tokenizer's own way is among them.
        #[test]
        fn ways_spell_what_was_typed(text in "[a-z_ (:\n]{1,24}|[ -~é漢😀]{1,12}", picks in prop::collection::vec(0usize..999, 64)) {
            let (ids, tail) = OURS.encode_but_last_word(&text).unwrap();
            let whole = OURS.encode(&text, Specials::AsText, false).unwrap();
            let Some(Tail { typed, ways }) = tail else {
                prop_assert_eq!(ids, whole);
                return Ok(());
            };
            prop_assert_eq!(format!("{}{typed}", OURS.decode(&ids, false)), text);
            prop_assert_eq!(&whole[..ids.len()], &ids[..]);
            let mut at = 0;
            for &id in &whole[ids.len()..] {
                at = ways[at].iter().find(|way| way.0 == id).unwrap().1 as usize;
            }
            prop_assert_eq!(at, typed.len());
            let (mut at, mut spelled) = (0, Vec::new());
            for pick in picks {
                let Some(ways) = ways.get(at) else { break };
                let (id, next) = ways[pick % ways.len()];
                spelled.extend_from_slice(OURS.token_bytes(id));
                at = next as usize;
            }
            prop_assert!(spelled.starts_with(typed.as_bytes()));
        }
    }
}
