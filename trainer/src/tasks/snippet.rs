//! Hand-written programs with names, constants and phrasing to draw. The format is described in `snippets.txt`.

use super::Function;
use anyhow::{Context, bail};
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use std::ops::RangeInclusive;

/// One program of the file.
#[derive(Debug, Clone, Default)]
pub struct Snippet {
    names: Vec<String>,
    arguments: Vec<Variable>,
    locals: Vec<Variable>,
    constants: Vec<(String, RangeInclusive<u32>)>,
    descriptions: Vec<String>,
    calls: Vec<String>,
    body: Vec<String>,
}

/// A name to draw: placeholder, type (arguments only), alternatives.
#[derive(Debug, Clone)]
struct Variable {
    placeholder: String,
    kind: String,
    alternatives: Vec<String>,
}

/// Reads every program.
///
/// # Errors
/// Names the line that cannot be read.
pub fn parse(text: &str) -> anyhow::Result<Vec<Snippet>> {
    let mut snippets: Vec<Snippet> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        parse_line(line, &mut snippets).with_context(|| format!("snippets.txt:{}: {line:?}", number + 1))?;
    }
    Ok(snippets)
}

fn parse_line(line: &str, snippets: &mut Vec<Snippet>) -> anyhow::Result<()> {
    if let Some(names) = line.strip_prefix("## ") {
        snippets.push(Snippet { names: split(names, '|'), ..Snippet::default() });
        return Ok(());
    }
    if line.is_empty() || line.starts_with("# ") {
        return Ok(());
    }
    let snippet = snippets.last_mut().context("stands before the first program")?;
    if let Some(code) = line.strip_prefix("    ") {
        snippet.body.push(code.to_owned());
        return Ok(());
    }
    let (key, value) = line.split_once(": ").context("is neither a header nor code")?;
    match key {
        "args" => snippet.arguments = split(value, ',').iter().map(|v| variable(v)).collect::<Result<_, _>>()?,
        "let" => snippet.locals = split(value, ',').iter().map(|v| variable(v)).collect::<Result<_, _>>()?,
        "const" => snippet.constants = split(value, ',').iter().map(|v| constant(v)).collect::<Result<_, _>>()?,
        "doc" => snippet.descriptions.push(value.to_owned()),
        "call" => snippet.calls.push(value.to_owned()),
        _ => bail!("{key} is unknown"),
    }
    Ok(())
}

fn split(text: &str, separator: char) -> Vec<String> {
    text.split(separator).map(|part| part.trim().to_owned()).collect()
}

/// `$a:int=x|y`
fn variable(text: &str) -> anyhow::Result<Variable> {
    let (name, alternatives) = text.split_once('=').context("has no alternatives")?;
    let (placeholder, kind) = name.split_once(':').unwrap_or((name, ""));
    Ok(Variable { placeholder: placeholder.into(), kind: kind.into(), alternatives: split(alternatives, '|') })
}

/// `$k=2..7`, both ends included
fn constant(text: &str) -> anyhow::Result<(String, RangeInclusive<u32>)> {
    let (name, range) = text.split_once('=').context("has no range")?;
    let (low, high) = range.split_once("..").context("has no range")?;
    Ok((name.into(), low.parse()?..=high.parse()?))
}

impl Snippet {
    /// Draws names, constants and phrasing.
    pub(super) fn draw(&self, rng: &mut ChaCha8Rng) -> Function {
        let mut values: Vec<(String, String)> = Vec::new();
        for variable in self.arguments.iter().chain(&self.locals) {
            let free: Vec<&String> =
                variable.alternatives.iter().filter(|name| values.iter().all(|(_, used)| used != *name)).collect();
            let name = free.choose(rng).map_or_else(|| variable.placeholder[1..].to_owned(), |name| (*name).clone());
            values.push((variable.placeholder.clone(), name));
        }
        for (placeholder, range) in &self.constants {
            values.push((placeholder.clone(), rng.random_range(range.clone()).to_string()));
        }
        let fill = |text: &str| substitute(text, &values);
        let name = fill(&pick(&self.names, rng));
        let recursive = [("$name".to_owned(), name.clone())];
        Function {
            arguments: self.arguments.iter().map(|v| (fill(&v.placeholder), v.kind.clone())).collect(),
            description: fill(&pick(&self.descriptions, rng)),
            body: self.body.iter().map(|line| fill(&substitute(line, &recursive))).collect(),
            calls: self.calls.iter().map(|call| fill(call)).collect(),
            needs_description: self
                .constants
                .iter()
                .any(|(k, _)| !self.names.iter().any(|name| name.contains(k.as_str()))),
            name,
        }
    }
}

fn pick(list: &[String], rng: &mut ChaCha8Rng) -> String {
    list.choose(rng).cloned().unwrap_or_default()
}

/// Replaces placeholders; a placeholder ends where its name does.
fn substitute(text: &str, values: &[(String, String)]) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let len = rest[at + 1..].find(|c: char| !c.is_ascii_lowercase()).map_or(rest.len() - at, |end| end + 1);
        let placeholder = &rest[at..at + len];
        let value = values.iter().find(|(name, _)| name == placeholder).map_or(placeholder, |(_, value)| value);
        out.push_str(value);
        rest = &rest[at + len..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use rand::SeedableRng;

    #[test]
    fn every_placeholder_is_filled() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for snippet in parse(include_str!("snippets.txt")).unwrap() {
            let function = snippet.draw(&mut rng);
            let all = format!("{function:?}");
            assert!(!all.contains('$'), "{all}");
            assert!(function.calls.len() >= 2 && !function.body.is_empty() && !function.description.is_empty());
        }
    }

    #[test]
    fn malformed_lines_are_named() {
        let error = parse("## a\nargs: $x").unwrap_err();
        assert!(format!("{error:#}").contains("snippets.txt:2"), "{error:#}");
    }
}
