//! A model's chat template, compiled and rendered within limits.
//!
//! Modules in reading order: `budget` (bytes that a rendering may make and read), `guards` (operators within it),
//! `operations` (filters, functions and methods within it).

mod budget;
mod guards;
mod operations;

use crate::tokenizer::spelling;
use crate::{Message, TextError};
use budget::{BUDGET, Budget, Said};
use minijinja::machinery::{Token, Vm, WhitespaceConfig, get_compiled_template, make_string_output, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error, Output, State};
use std::collections::BTreeMap;
use std::fmt::{self, Write};

/// Longest template (bytes).
const TEMPLATE_BYTES_MAX: usize = 256 << 10;
/// Steps a template may take; a guard is one, too.
const TEMPLATE_FUEL: u64 = 4_000_000;
/// Longest expression or statement (words and signs): the engine takes stack for each.
const TOKENS_MAX: usize = 512;
/// Most `elif` of a template, for the same reason.
const ELIF_MAX: usize = 128;

/// A compiled template and the special tokens it may name.
pub(crate) struct Template {
    environment: Environment<'static>,
    begin: String,
    end: String,
}

fn bad(error: &Error) -> TextError {
    TextError::Template(error.detail().map_or_else(|| error.to_string(), str::to_owned))
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
        check_source(source)?;
        // As transformers sets Jinja up.
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(TEMPLATE_FUEL));
        environment.set_formatter(print);
        guards::add_guards(&mut environment);
        operations::add_operations(&mut environment);
        environment.add_template_owned("chat", source.to_owned()).map_err(|e| TextError::Template(e.to_string()))?;
        let token = |key: &str| spelling(&config[key]).unwrap_or("").to_owned();
        let template = Template { environment, begin: token("bos_token"), end: token("eos_token") };
        let chat = template.environment.get_template("chat").map_err(|error| bad(&error))?;
        guards::guarded(&get_compiled_template(&chat).instructions).map_err(|error| bad(&error))?;
        drop(chat);
        Ok(Some(template))
    }

    pub(crate) fn render(&self, messages: &[Message]) -> Result<String, TextError> {
        let template = self.environment.get_template("chat").map_err(|error| bad(&error))?;
        let compiled = get_compiled_template(&template);
        let instructions = guards::guarded(&compiled.instructions).map_err(|error| bad(&error))?;
        let bytes: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        let text = |text: &String| Value::from(text.as_str());
        let said = |message: &Message| Said { role: text(&message.role), content: text(&message.content) };
        let messages: Vec<Value> = messages.iter().map(|message| Value::from_object(said(message))).collect();
        let values = [
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(true)),
            ("bos_token", Value::from(self.begin.as_str())),
            ("eos_token", Value::from(self.end.as_str())),
            (BUDGET, Value::from_object(Budget::new(bytes as u64))),
        ];
        let values = Value::from_iter(values);
        let (blocks, mut rendered) = (BTreeMap::new(), String::new());
        let mut output = make_string_output(&mut rendered);
        let result = Vm::new(&self.environment).eval(&instructions, values, &blocks, &mut output, AutoEscape::None);
        result.map(|_| ()).map_err(|error| bad(&error))?;
        drop(output);
        Ok(rendered)
    }
}

/// Refuses what would take too much stack, or memory, already when it is compiled.
fn check_source(source: &str) -> Result<(), TextError> {
    if source.len() > TEMPLATE_BYTES_MAX {
        return Err(TextError::Template(format!("is longer than {TEMPLATE_BYTES_MAX} bytes")));
    }
    let whitespace = WhitespaceConfig { trim_blocks: true, lstrip_blocks: true, keep_trailing_newline: false };
    let (mut length, mut elifs) = (0, 0);
    for token in tokenize(source, false, SyntaxConfig, whitespace) {
        // What cannot be read is for the compiler to name.
        let Ok((token, span)) = token else { break };
        length += 1;
        match token {
            Token::VariableStart | Token::BlockStart => length = 0,
            Token::Ident("elif") => elifs += 1,
            // Constants are multiplied when the template is compiled.
            Token::Mul => {
                let line = span.start_line;
                return Err(TextError::Template(format!(
                    "line {line} has a `*`, which chat templates have no use for"
                )));
            }
            _ => {}
        }
        if length > TOKENS_MAX || elifs > ELIF_MAX {
            let limits = format!("{TOKENS_MAX} words in an expression and {ELIF_MAX} elif are read at most");
            return Err(TextError::Template(format!("line {}: {limits}", span.start_line)));
        }
    }
    Ok(())
}

/// Writes a value, to the output or to what will be a value, as the engine does.
fn print(output: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    let mut counted = Counted { output, budget: &*Budget::of(state)?, refused: None };
    match write!(counted, "{value}") {
        Ok(()) => Ok(()),
        Err(error) => Err(counted.refused.unwrap_or_else(|| error.into())),
    }
}

struct Counted<'a, 'b> {
    output: &'a mut Output<'b>,
    budget: &'a Budget,
    refused: Option<Error>,
}

impl fmt::Write for Counted<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if let Err(error) = self.budget.make(text.len() as u64) {
            self.refused = Some(error);
            return Err(fmt::Error);
        }
        self.output.write_str(text)
    }
}
