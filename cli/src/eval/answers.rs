//! Answers so far, in a file that an interrupted evaluation goes on from: one header, then one line per batch.

use super::ask::Answer;
use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use unmask_trainer::measure::{Point, Rule};

/// What all answers of a file have in common. Others do not go into it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// "unmask.answers/1"
    pub format: String,
    /// Name of the model.
    pub model: String,
    /// Of the group that serves it.
    pub numerics_id: String,
    /// SHA-256 of the questions with their tests.
    pub questions: String,
    /// Of them, those to be filled in.
    pub infill: usize,
    /// What speed depends on: the machine, the build, threads, the endpoint.
    pub conditions: String,
    /// Requests at once.
    pub streams: usize,
    /// Strings that end an answer.
    pub stop: Vec<String>,
    /// Longest answer.
    pub max_tokens: Option<u32>,
}

/// Which questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Functions with tests.
    Tasks,
    /// A line taken out of a function.
    Infill,
    /// The first line of functions of real code.
    Code,
}

/// One question's outcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Of the question, unique in its part.
    pub id: String,
    /// What the model wrote.
    #[serde(flatten)]
    pub answer: Answer,
    /// Tests passed; for infill: exactly what was taken out.
    pub passed: bool,
    /// Python parses prompt and answer together.
    pub parsed: bool,
}

/// Questions that were asked together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// Which questions.
    pub part: Part,
    /// Positions decoded together; 1 is autoregressive.
    pub block_size: u32,
    /// Confidence threshold.
    pub threshold: f32,
    /// Masks draft, causal rows decide.
    #[serde(default)]
    pub self_speculative: bool,
    /// From the first question to the last answer.
    pub seconds: f64,
    /// In the order of the questions.
    pub outcomes: Vec<Outcome>,
}

/// The file.
pub struct Answers {
    path: PathBuf,
    file: File,
    batches: Vec<Batch>,
}

impl Answers {
    /// Opens `path`, or begins it. What was cut off in mid-line by a kill is dropped.
    ///
    /// # Errors
    /// The file has answers of another model, other questions or other settings, or cannot be used.
    pub fn open(path: PathBuf, header: &Header) -> anyhow::Result<Answers> {
        let text =
            if path.exists() { std::fs::read_to_string(&path).with_context(|| name(&path))? } else { String::new() };
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        let mut lines = whole.lines();
        let mut batches = Vec::new();
        if let Some(first) = lines.next() {
            let found: Header = serde_json::from_str(first).with_context(|| name(&path))?;
            ensure!(
                found == *header,
                "{} has answers to other questions, of another model or with other settings: use another --out, or \
                 delete it",
                path.display()
            );
            for (line, text) in lines.enumerate() {
                let batch: Result<Batch, _> = serde_json::from_str(text);
                let mut batch = batch.with_context(|| format!("{}:{}", path.display(), line + 2))?;
                // They are asked again: a server may have more room by now.
                batch.outcomes.retain(|outcome| outcome.answer.refused.is_none());
                batches.push(batch);
            }
        }
        let file = File::options().create(true).append(true).open(&path).with_context(|| name(&path))?;
        file.set_len(whole.len() as u64).with_context(|| name(&path))?;
        let mut answers = Answers { path, file, batches };
        if whole.is_empty() {
            answers.write(header)?;
        }
        Ok(answers)
    }

    fn write(&mut self, line: &impl Serialize) -> anyhow::Result<()> {
        let line = serde_json::to_string(line)? + "\n";
        self.file.write_all(line.as_bytes()).with_context(|| name(&self.path))
    }

    /// Keeps a batch.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&mut self, batch: Batch) -> anyhow::Result<()> {
        self.write(&batch)?;
        self.batches.push(batch);
        Ok(())
    }

    /// Batches of a part at a point.
    pub fn of(&self, part: Part, point: Point) -> impl Iterator<Item = &Batch> {
        let matches = move |batch: &&Batch| {
            let same = (batch.block_size, batch.threshold) == (point.block_size, point.threshold);
            batch.part == part && same && batch.self_speculative == (point.rule == Rule::SelfSpeculative)
        };
        self.batches.iter().filter(matches)
    }

    /// Questions that have an answer.
    pub fn done(&self, part: Part, point: Point) -> HashSet<&str> {
        self.of(part, point).flat_map(|batch| &batch.outcomes).map(|outcome| outcome.id.as_str()).collect()
    }
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_interrupted_file_goes_on_after_its_last_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("answers.jsonl");
        let header = Header {
            format: "unmask.answers/1".into(),
            model: "m".into(),
            numerics_id: "n".into(),
            questions: "q".into(),
            infill: 0,
            conditions: "c".into(),
            streams: 8,
            stop: Vec::new(),
            max_tokens: None,
        };
        let point = Point::threshold(8, 0.9);
        let answer = Answer { text: "    return 1".into(), tokens: 3, passes: 2, refused: None };
        let batch = |id: &str| {
            let outcomes = vec![Outcome { id: id.into(), answer: answer.clone(), passed: true, parsed: true }];
            Batch { part: Part::Tasks, block_size: 8, threshold: 0.9, self_speculative: false, seconds: 0.5, outcomes }
        };
        let mut answers = Answers::open(path.clone(), &header).unwrap();
        answers.add(batch("a")).unwrap();
        answers.add(batch("b")).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 10]).unwrap();
        let mut answers = Answers::open(path.clone(), &header).unwrap();
        assert_eq!(answers.done(Part::Tasks, point), HashSet::from(["a"]));
        assert!(answers.done(Part::Infill, point).is_empty());
        assert!(answers.done(Part::Tasks, Point::threshold(8, 0.8)).is_empty());
        answers.add(batch("b")).unwrap();
        let mut refused = batch("c");
        refused.outcomes[0].answer.refused = Some("too long".into());
        answers.add(refused).unwrap();
        assert_eq!(answers.done(Part::Tasks, point).len(), 3);
        assert_eq!(Answers::open(path.clone(), &header).unwrap().done(Part::Tasks, point), HashSet::from(["a", "b"]));
        let other = Header { numerics_id: "other".into(), ..header };
        let error = Answers::open(path, &other).err().unwrap().to_string();
        assert!(error.contains("--out"), "{error}");
    }
}
