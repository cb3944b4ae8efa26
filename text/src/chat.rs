//! Chat templates, in which what users wrote stays text.
//!
//! Where a message spells a special token, the spelling is replaced by a marker before the template sees it and encoded
//! as text afterwards. What the template writes around the messages is encoded with special tokens parsed. A message
//! without such spellings gives exactly what encoding the rendered text gives.

use crate::{Specials, TextError, Tokenizer};
use std::collections::HashSet;

/// Opens and closes a marker; a private-use character that no template writes.
const MARK: char = '\u{F8FE}';

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Tokenizer {
    /// Ids of a conversation, ready for the assistant's answer.
    ///
    /// # Errors
    /// [`TextError::NoChatTemplate`]; [`TextError::Template`] when the template refuses the messages.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>, TextError> {
        let template = self.template().ok_or(TextError::NoChatTemplate)?;
        let specials: Vec<String> = self.special_ids().iter().map(|&id| self.decode(&[id], false)).collect();
        let mut hidden = Vec::new();
        let marked: Vec<Message> = messages
            .iter()
            .map(|message| Message {
                role: message.role.clone(),
                content: hide(&message.content, &specials, &mut hidden),
            })
            .collect();
        let mut ids = Vec::new();
        for (i, span) in template.render(&marked)?.split(MARK).enumerate() {
            // Between a pair of marks stands the number of what is hidden.
            if i % 2 == 0 {
                ids.extend(self.encode(span, Specials::Parse, false)?);
            } else {
                let spelled = span.parse().ok().and_then(|index: usize| hidden.get(index));
                let spelled = spelled.ok_or_else(|| TextError::Template("changed a message's content".into()))?;
                ids.extend(self.encode(spelled, Specials::AsText, false)?);
            }
        }
        Ok(ids)
    }
}

/// `content` with every spelling of a special token replaced by a marker that gives its index in `hidden`. A spelling
/// that begins at the content's end counts too: what the template writes next might complete it.
fn hide(content: &str, specials: &[String], hidden: &mut Vec<String>) -> String {
    let content = content.replace(MARK, "\u{FFFD}");
    let kept_end = content.trim_end().len();
    let firsts: HashSet<u8> = specials.iter().filter_map(|token| token.bytes().next()).collect();
    let mut marked = String::with_capacity(content.len());
    let mut at = 0;
    while at < content.len() {
        let rest = &content[at..];
        if !firsts.contains(&rest.as_bytes()[0]) {
            let plain = rest.char_indices().find(|&(i, _)| firsts.contains(&rest.as_bytes()[i]));
            let length = plain.map_or(rest.len(), |(i, _)| i);
            marked.push_str(&rest[..length]);
            at += length;
            continue;
        }
        let spelled = specials.iter().filter(|token| !token.is_empty() && rest.starts_with(token.as_str()));
        let begun = || specials.iter().any(|token| at < kept_end && token.starts_with(&content[at..kept_end]));
        let length = match spelled.map(String::len).max() {
            Some(length) => length,
            None if begun() => kept_end - at,
            None => {
                let step = rest.chars().next().map_or(1, char::len_utf8);
                marked.push_str(&rest[..step]);
                at += step;
                continue;
            }
        };
        marked.push_str(&format!("{MARK}{}{MARK}", hidden.len()));
        hidden.push(rest[..length].to_owned());
        at += length;
    }
    marked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_and_beginnings_of_spellings_are_hidden() {
        let specials = vec!["<|im|>".to_owned(), "<|im|>x".to_owned(), "é>".to_owned()];
        let mut hidden = Vec::new();
        let marked = hide("a<|im|>xb <|im|> é>\u{F8FE}1 <|i \n", &specials, &mut hidden);
        assert_eq!(hidden, ["<|im|>x", "<|im|>", "é>", "<|i"]);
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| format!("{MARK}{i}{MARK}"));
        assert_eq!(marked, format!("a{a}b {b} {c}\u{FFFD}1 {d} \n"));
    }

    #[test]
    fn plain_content_is_left_alone() {
        let mut hidden = Vec::new();
        assert_eq!(hide("a < b, |x| > 1", &["<|im|>".to_owned()], &mut hidden), "a < b, |x| > 1");
        assert!(hidden.is_empty());
    }
}
