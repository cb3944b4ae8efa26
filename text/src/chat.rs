//! Chat templates, in which what users wrote stays text.
//!
//! Where a message spells a special token, the spelling is replaced by a marker before the template sees it and encoded
//! as text afterwards. What the template writes around the messages is encoded with special tokens parsed. A message
//! without such spellings gives exactly what encoding the rendered text gives.

use crate::tokenizer::spelling;
use crate::{Specials, TextError, Tokenizer};
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, context};
use std::collections::HashSet;
use std::io;

/// Longest template (bytes).
const TEMPLATE_BYTES_MAX: usize = 1 << 20;
/// Steps a template may take.
const TEMPLATE_FUEL: u64 = 10_000_000;
/// Longest text a template may make of a conversation (bytes).
const RENDERED_BYTES_MAX: usize = 32 << 20;
/// Widest indent of `tojson` (spaces).
const INDENT_MAX: usize = 16;
/// Filters that make as much text or as many items as a number says.
const OVERSIZED: [&str; 5] = ["batch", "slice", "indent", "format", "wordwrap"];
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

/// A compiled template and the special tokens it may name.
pub(crate) struct Template {
    environment: Environment<'static>,
    begin: String,
    end: String,
}

impl Template {
    /// The template of its own file, else of `tokenizer_config.json` (a string, or a list with one named "default").
    pub(crate) fn find(own: &str, config: &serde_json::Value) -> Result<Option<Template>, TextError> {
        let configured = match config.get("chat_template") {
            Some(serde_json::Value::String(text)) => text.as_str(),
            Some(serde_json::Value::Array(list)) => {
                let default = list.iter().find(|entry| entry["name"] == "default");
                default.and_then(|entry| entry["template"].as_str()).unwrap_or("")
            }
            _ => "",
        };
        let source = if own.is_empty() { configured } else { own };
        if source.is_empty() {
            return Ok(None);
        }
        if source.len() > TEMPLATE_BYTES_MAX {
            return Err(TextError::Template(format!("is longer than {TEMPLATE_BYTES_MAX} bytes")));
        }
        // As transformers sets Jinja up.
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(TEMPLATE_FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        OVERSIZED.iter().for_each(|filter| environment.remove_filter(filter));
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned("chat", source.to_owned()).map_err(|e| TextError::Template(e.to_string()))?;
        let token = |key: &str| spelling(&config[key]).unwrap_or("").to_owned();
        Ok(Some(Template { environment, begin: token("bos_token"), end: token("eos_token") }))
    }

    fn render(&self, messages: &[Message]) -> Result<String, TextError> {
        let template = self.environment.get_template("chat").map_err(|e| TextError::Template(e.to_string()))?;
        let mut rendered = Rendered(Vec::new());
        let values = context! {
            messages => messages,
            add_generation_prompt => true,
            bos_token => self.begin,
            eos_token => self.end,
        };
        let result = template.render_captured_to(values, &mut rendered).map(|_| ());
        result.map_err(|e| TextError::Template(e.detail().map_or_else(|| e.to_string(), str::to_owned)))?;
        String::from_utf8(rendered.0).map_err(|e| TextError::Template(e.to_string()))
    }
}

/// The built-in filter with a limit: an indent takes as much memory as it says.
fn to_json(value: &Value, indent: Option<Value>, args: Kwargs) -> Result<Value, minijinja::Error> {
    let named: Option<Value> = if args.has("indent") { args.peek("indent")? } else { None };
    let wide = |indent: &Value| indent.as_usize().is_some_and(|indent| indent > INDENT_MAX);
    if indent.iter().chain(&named).any(wide) {
        let reason = format!("tojson indents by {INDENT_MAX} at most");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason));
    }
    minijinja::filters::tojson(value, indent, args)
}

/// Output with a limit: a template may loop.
struct Rendered(Vec<u8>);

impl io::Write for Rendered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > RENDERED_BYTES_MAX {
            return Err(io::Error::other(format!("writes more than {RENDERED_BYTES_MAX} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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
