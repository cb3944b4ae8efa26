//! Programs with names and constants normalised: two tasks with one skeleton differ in nothing a model must work out.

use super::Function;
use sha2::{Digest, Sha256};

/// Words of the language and its built-in functions, which stay; so does what follows a dot.
const WORDS: [&str; 46] = [
    "False",
    "None",
    "True",
    "abs",
    "all",
    "and",
    "any",
    "bool",
    "break",
    "chr",
    "continue",
    "def",
    "dict",
    "divmod",
    "elif",
    "else",
    "enumerate",
    "float",
    "for",
    "if",
    "in",
    "int",
    "is",
    "isinstance",
    "lambda",
    "len",
    "list",
    "map",
    "max",
    "min",
    "not",
    "or",
    "ord",
    "range",
    "return",
    "reverse",
    "reversed",
    "round",
    "set",
    "sorted",
    "str",
    "sum",
    "tuple",
    "while",
    "zip",
    "default",
];

/// The function's body and arity, normalised.
pub fn of(function: &Function) -> String {
    let mut names: Vec<String> = Vec::new();
    let arguments: Vec<String> = function.arguments.iter().map(|(name, _)| name.clone()).collect();
    let source = format!("{}({})\n{}", function.name, arguments.join(","), function.body.join("\n"));
    normalise(&source, &mut names)
}

/// Replaces names by `v0`, `v1`, .. in order of appearance, numbers by `N`, strings by `S`.
fn normalise(source: &str, names: &mut Vec<String>) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut out = String::new();
    let mut i = 0;
    while i < chars.len() {
        let c = chars[i];
        let end = |from: usize, part: &dyn Fn(char) -> bool| {
            chars[from..].iter().position(|&c| !part(c)).map_or(chars.len(), |len| from + len)
        };
        if c.is_alphabetic() || c == '_' {
            let to = end(i, &|c| c.is_alphanumeric() || c == '_');
            let word: String = chars[i..to].iter().collect();
            if WORDS.contains(&word.as_str()) || (i > 0 && chars[i - 1] == '.') {
                out.push_str(&word);
            } else {
                let index = names.iter().position(|name| *name == word).unwrap_or_else(|| {
                    names.push(word);
                    names.len() - 1
                });
                out.push_str(&format!("v{index}"));
            }
            i = to;
        } else if c.is_ascii_digit() {
            out.push('N');
            i = end(i, &|c| c.is_ascii_digit());
        } else if c == '\'' || c == '"' {
            out.push('S');
            i = (end(i + 1, &|other| other != c) + 1).min(chars.len());
        } else {
            out.push(c);
            i += 1;
        }
    }
    out
}

/// First 64 bits of SHA-256.
pub(super) fn hash(skeleton: &str) -> u64 {
    let digest = Sha256::digest(skeleton.as_bytes());
    digest.iter().take(8).fold(0, |hash, &byte| hash << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_numbers_and_strings_do_not_matter() {
        let a = normalise("total = 0\nfor x in items:\n    total += x * 12", &mut Vec::new());
        let b = normalise("s = 7\nfor value in numbers:\n    s += value * 3", &mut Vec::new());
        assert_eq!(a, b);
        assert_eq!(a, "v0 = N\nfor v1 in v2:\n    v0 += v1 * N");
        assert_eq!(normalise("c in 'aeiou'", &mut Vec::new()), "v0 in S");
        assert_ne!(a, normalise("s = 7\nfor v in n:\n    s -= v * 3", &mut Vec::new()));
    }
}
