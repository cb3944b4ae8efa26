//! Documents of training: generated tasks and real code, cut where a user may stop typing.

use super::Documents;
use super::bpe::{END, FIM};
use super::corpus;
use crate::tasks::{Part, Tasks};
use anyhow::{Context, ensure};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// Most lines of a gap of whole lines.
const LINES_MAX: usize = 3;
/// Most cuts of one document.
const CUTS_MAX: usize = 3;

/// What to draw from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureConfig {
    /// `tokenizer.json`.
    pub tokenizer: PathBuf,
    /// Seed of the generated tasks.
    pub seed: u64,
    /// Generated tasks, at least 1; a larger number repeats less.
    pub tasks: usize,
    /// Real code, JSONL or a folder of Python.
    #[serde(default)]
    pub real: Option<PathBuf>,
    /// Share of real code.
    #[serde(default)]
    pub real_share: f64,
    /// Longest document made of it (bytes): files are cut into pieces of whole functions and classes where these fit.
    #[serde(default = "default_real_bytes")]
    pub real_bytes: usize,
    /// Share of documents in prefix-suffix-middle order.
    #[serde(default = "default_infill_share")]
    pub infill_share: f64,
    /// Of their gaps, the share that is whole lines, as editors leave them.
    #[serde(default)]
    pub line_share: f64,
    /// Of the texts behind a gap, the share without the line break at their end: not every caller sends it.
    #[serde(default)]
    pub bare_share: f64,
    /// Share of documents cut at random characters.
    #[serde(default = "default_cut_share")]
    pub cut_share: f64,
}

impl MixtureConfig {
    /// Whole generated programs, as they are.
    pub fn plain(tokenizer: PathBuf, tasks: usize) -> Self {
        Self {
            tokenizer,
            seed: 1,
            tasks,
            real: None,
            real_share: 0.0,
            real_bytes: default_real_bytes(),
            infill_share: 0.0,
            line_share: 0.0,
            bare_share: 0.0,
            cut_share: 0.0,
        }
    }
}

fn default_real_bytes() -> usize {
    600
}

fn default_infill_share() -> f64 {
    0.25
}

fn default_cut_share() -> f64 {
    0.6
}

/// Draws documents; training or held-out ones.
pub struct Mixture {
    config: MixtureConfig,
    part: Part,
    tasks: Tasks,
    tokenizer: Tokenizer,
    real: Vec<String>,
}

impl Mixture {
    /// Opens tokenizer and real code. Held-out documents have real code among them where enough is there to hold some out.
    ///
    /// # Errors
    /// Settings out of range, all at once; files that cannot be read.
    pub fn open(config: &MixtureConfig, part: Part) -> anyhow::Result<Self> {
        let shares = [
            ("real_share", config.real_share),
            ("infill_share", config.infill_share),
            ("line_share", config.line_share),
            ("bare_share", config.bare_share),
            ("cut_share", config.cut_share),
        ];
        let mut problems: Vec<String> = shares
            .iter()
            .filter(|(_, share)| !(0.0..=1.0).contains(share))
            .map(|(key, share)| format!("{key}: must be in [0, 1], is {share}"))
            .collect();
        let counts = [("tasks", config.tasks), ("real_bytes", config.real_bytes)];
        let few = counts.into_iter().filter(|(_, count)| *count == 0);
        problems.extend(few.map(|(key, _)| format!("{key}: must be at least 1")));
        if config.real_share > 0.0 && config.real.is_none() {
            problems.push("real: is missing, but real_share is above 0".into());
        }
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        let tokenizer = Tokenizer::from_file(&config.tokenizer)
            .map_err(|error| anyhow::anyhow!("{}: {error}", config.tokenizer.display()))?;
        let real = config.real.as_deref().map_or(Ok(Vec::new()), |path| real(path, config.real_bytes, part))?;
        let mut config = config.clone();
        if real.is_empty() {
            config.real_share = 0.0;
        }
        Ok(Self { config, part, tasks: Tasks::new()?, tokenizer, real })
    }

    /// Ids of the tokenizer.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Source of document `index`.
    pub fn text(&self, index: usize, rng: &mut ChaCha8Rng) -> String {
        if rng.random_bool(self.config.real_share) {
            return self.real[rng.random_range(0..self.real.len())].clone();
        }
        self.tasks.draw(self.config.seed, self.part, index as u64).program()
    }

    /// Ids of `text` cut at `cuts` random characters, each piece encoded by itself.
    fn encode_cut(&self, text: &str, cuts: usize, rng: &mut ChaCha8Rng) -> Vec<u32> {
        let mut ends: Vec<usize> = (0..cuts).map(|_| boundary(text, rng)).chain([0, text.len()]).collect();
        ends.sort_unstable();
        ends.windows(2).flat_map(|pair| self.ids(&text[pair[0]..pair[1]])).collect()
    }

    fn ids(&self, text: &str) -> Vec<u32> {
        // Byte-level BPE encodes any text; a failure would be a broken tokenizer file.
        self.tokenizer.encode_fast(text, false).map(|e| e.get_ids().to_vec()).unwrap_or_default()
    }
}

/// What `part` has of the code in `path`, in pieces.
fn real(path: &Path, bytes: usize, part: Part) -> anyhow::Result<Vec<String>> {
    let documents = corpus::read(path, &["py"]).context("real")?;
    ensure!(!documents.is_empty(), "real: {} holds no Python that is worth learning", path.display());
    let all = documents.len();
    let own = corpus::of_part(documents, part);
    let pieces: Vec<String> = own.iter().flat_map(|document| corpus::pieces(&document.text, bytes)).collect();
    let whose = if part == Part::HeldOut { "are held out" } else { "are learnt" };
    tracing::info!("{} of {all} files in {} {whose}, as {} pieces", own.len(), path.display(), pieces.len());
    Ok(pieces)
}

/// Draws nothing where the share is 0: documents without what it stands for stay as they were before there was such a share.
fn falls(share: f64, rng: &mut ChaCha8Rng) -> bool {
    share > 0.0 && rng.random_bool(share)
}

/// Where some whole lines begin and end, without the line break behind them.
fn lines(text: &str, rng: &mut ChaCha8Rng) -> (usize, usize) {
    let starts: Vec<usize> = [0].into_iter().chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
    let first = rng.random_range(0..starts.len());
    let last = (first + rng.random_range(0..LINES_MAX)).min(starts.len() - 1);
    let end = starts.get(last + 1).map_or(text.len(), |next| next - 1);
    (starts[first], end)
}

/// A random character boundary.
fn boundary(text: &str, rng: &mut ChaCha8Rng) -> usize {
    let mut at = rng.random_range(0..=text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

impl Documents for Mixture {
    fn len(&self) -> usize {
        self.config.tasks
    }

    fn settings(&self) -> String {
        serde_json::to_string(&self.config).unwrap_or_default()
    }

    fn encode(&self, index: usize, rng: &mut ChaCha8Rng) -> Vec<u32> {
        let text = self.text(index, rng);
        let mut ids = Vec::new();
        if rng.random_bool(self.config.infill_share) {
            let (a, b) = if falls(self.config.line_share, rng) {
                lines(&text, rng)
            } else {
                let (a, b) = (boundary(&text, rng), boundary(&text, rng));
                (a.min(b), a.max(b))
            };
            let suffix = &text[b..];
            let bare = falls(self.config.bare_share, rng);
            let suffix = if bare { suffix.strip_suffix('\n').unwrap_or(suffix) } else { suffix };
            for (sentinel, piece) in FIM.into_iter().zip([&text[..a], suffix, &text[a..b]]) {
                ids.push(sentinel);
                ids.extend(self.ids(piece));
            }
        } else {
            let cuts = if rng.random_bool(self.config.cut_share) { rng.random_range(1..=CUTS_MAX) } else { 0 };
            ids = self.encode_cut(&text, cuts, rng);
        }
        ids.push(END);
        ids
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::data::bpe;
    use rand::SeedableRng;

    #[test]
    fn whole_lines_are_taken_out() {
        let text = "def f(x):\n    y = x\n\n    return y\n";
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..500 {
            let (a, b) = lines(text, &mut rng);
            assert!(
                a <= b && (a == 0 || text[..a].ends_with('\n')) && (b == text.len() || text[b..].starts_with('\n'))
            );
            assert!(text[a..b].matches('\n').count() < LINES_MAX);
            seen.insert((a, b));
        }
        assert!(seen.contains(&(10, 19)) && seen.contains(&(0, 19)) && seen.contains(&(20, 20)), "{seen:?}");
        assert_eq!(lines("", &mut rng), (0, 0));
    }

    #[test]
    fn documents_decode_to_their_source_however_they_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let tasks = Tasks::new().unwrap();
        let texts: Vec<String> = (0..100).map(|i| tasks.draw(1, Part::Training, i).program()).collect();
        bpe::train(&texts, 400, dir.path()).unwrap();
        let config = MixtureConfig {
            tokenizer: dir.path().join("tokenizer.json"),
            seed: 1,
            tasks: 100,
            real: None,
            real_share: 0.0,
            real_bytes: 600,
            infill_share: 0.5,
            line_share: 0.5,
            bare_share: 0.5,
            cut_share: 0.5,
        };
        let mixture = Mixture::open(&config, Part::Training).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut infills = 0;
        for (index, text) in texts.iter().enumerate() {
            let ids = mixture.encode(index, &mut rng);
            let decode = |ids: &[u32]| mixture.tokenizer.decode(ids, true).unwrap();
            assert_eq!(ids.last(), Some(&END));
            let at: Vec<usize> = FIM.iter().filter_map(|id| ids.iter().position(|x| x == id)).collect();
            let source = if at.len() == 3 {
                infills += 1;
                assert!(at[0] == 0 && at[0] < at[1] && at[1] < at[2]);
                let (prefix, suffix) = (decode(&ids[1..at[1]]), decode(&ids[at[1] + 1..at[2]]));
                format!("{prefix}{}{suffix}", decode(&ids[at[2] + 1..]))
            } else {
                decode(&ids)
            };
            let whole = |text: &str| text.strip_suffix('\n').unwrap_or(text).to_owned();
            assert_eq!(whole(&source), whole(text));
        }
        assert!((25..75).contains(&infills));
        assert!(Mixture::open(&MixtureConfig { real_share: 2.0, tasks: 0, ..config }, Part::Training).is_err());
    }
}
