//! What is asked.

use anyhow::{Context, bail, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use std::path::Path;

/// Largest file of prompts (bytes).
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Signatures that the bundled model completes in a few blocks each.
const BUILT_IN: [&str; 16] = [
    "def gcd(a, b):\n",
    "def factorial(n):\n",
    "def is_prime(n):\n",
    "def fibonacci(n):\n",
    "def sum_of_squares(numbers):\n",
    "def count_vowels(text):\n",
    "def reverse_string(text):\n",
    "def is_palindrome(text):\n",
    "def count_even(numbers):\n",
    "def average(numbers):\n",
    "def maximum(numbers):\n",
    "def power(base, exponent):\n",
    "def sum_digits(n):\n",
    "def remove_duplicates(items):\n",
    "def word_lengths(text: str) -> list[int]:\n    \"\"\"Return the length of every word of text.\"\"\"\n",
    "def positive_numbers(numbers: list[int]) -> list[int]:\n    \"\"\"Return the numbers that are above zero.\"\"\"\n",
];

/// A list of prompts, never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompts(Vec<String>);

/// A line of a file; its other fields are for other uses.
#[derive(Deserialize)]
struct Line {
    prompt: String,
}

impl Prompts {
    /// The built-in list.
    pub fn built_in() -> Self {
        Self(BUILT_IN.map(str::to_owned).to_vec())
    }

    /// Those of a file: a JSON object with a `prompt` on each line that is not blank.
    ///
    /// # Errors
    /// The file cannot be read, is too large or holds no prompt; a line is not such an object.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let name = path.display();
        let size = std::fs::metadata(path).with_context(|| format!("--prompts: cannot read {name}"))?.len();
        ensure!(size <= FILE_BYTES_MAX, "--prompts: {name} has {size} bytes; at most {FILE_BYTES_MAX} are read");
        let text = std::fs::read_to_string(path).with_context(|| format!("--prompts: cannot read {name}"))?;
        Self::parse(&text).with_context(|| format!("--prompts: {name}"))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let mut prompts = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let line: Line = serde_json::from_str(line).with_context(|| format!("line {}", number + 1))?;
            prompts.push(line.prompt);
        }
        if prompts.is_empty() {
            bail!("no prompts");
        }
        Ok(Self(prompts))
    }

    /// The prompt and the seed of request `index`: functions of both numbers and of nothing else, so that runs at
    /// other rates ask the same.
    pub fn pick(&self, seed: u64, index: u64) -> (&str, u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Stream 0 is the schedule's.
        rng.set_stream(index.wrapping_add(1));
        (&self.0[rng.random_range(0..self.0.len())], rng.random())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn picks_depend_on_seed_and_index_and_reach_every_prompt() {
        let prompts = Prompts::built_in();
        let all = |seed: u64| (0..500).map(|index| prompts.pick(seed, index)).collect::<Vec<_>>();
        assert_eq!(all(1), all(1));
        assert_ne!(all(1), all(2));
        let reached: BTreeSet<&str> = all(1).into_iter().map(|(prompt, _)| prompt).collect();
        assert_eq!(reached.len(), BUILT_IN.len());
    }

    #[test]
    fn files_are_humanevals_and_bad_lines_are_named() {
        let text = "{\"task_id\": \"a/0\", \"prompt\": \"def f():\"}\n\n{\"prompt\": \"def g():\", \"test\": \"\"}\n";
        assert_eq!(Prompts::parse(text).unwrap(), Prompts(vec!["def f():".into(), "def g():".into()]));
        assert_eq!(Prompts::parse("\n").unwrap_err().to_string(), "no prompts");
        assert_eq!(Prompts::parse("{\"prompt\": \"\"}\n{\"text\": 1}").unwrap_err().to_string(), "line 2");
    }
}
