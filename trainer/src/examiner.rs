//! Tasks put to the model in training: it is exported as it is, decodes their prompts in the engine, and their tests
//! are run.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use rand::{Rng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use unmask_engine::{LoadOptions, Model};
use unmask_text::{Specials, Tokenizer};

use crate::{
    config::MaskStage,
    data::held_out,
    measure::{self, Point},
    rollout::{self, Given, Prompt, Rollout, STREAMS, roll_out, verify},
    stream::{Purpose, generator},
    tasks::{Part, Task, Tasks, verify::with_expected_results},
    training::{Sources, Training},
    trajectory::{Answer, read, write},
};

/// Index of the first task that is watched: rounds draw from 0 on and never come this far.
const WATCHED_FIRST: u64 = 1 << 40;
/// Index of the first task that is answered autoregressively.
const ANSWERS_FIRST: u64 = 1 << 41;
/// One prompt of a file in this many is watched and not learnt.
const WATCHED_ONE_IN: usize = 5;
/// Tasks named in one complaint.
const NAMED_MAX: usize = 8;

/// A decoded and verified prompt.
pub(crate) struct Decoded {
    pub index: usize,
    pub prompt: Vec<u32>,
    pub rollout: Rollout,
    pub passed: bool,
}

/// Who asks.
pub(crate) struct Examiner<'a> {
    config: &'a MaskStage,
    sources: Sources<'a>,
    pub tokenizer: Tokenizer,
    origin: Origin,
    /// Share of prompts cut at a random character.
    cut_share: f64,
}

/// Where tasks come from.
enum Origin {
    Generated(Tasks),
    /// A file's: those to learn, and those that are only watched.
    File {
        learnt: Vec<Task>,
        watched: Vec<Task>,
    },
}

impl<'a> Examiner<'a> {
    /// Asks the tasks of `file`, in HumanEval's format, or generated ones.
    pub(crate) fn open(
        config: &'a MaskStage,
        sources: Sources<'a>,
        cut_share: f64,
        file: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let tokenizer = measure::tokenizer(sources.tokenizer)?;
        let origin = match file {
            Some(file) => {
                let longest = config.raw.model.max_position_embeddings.saturating_sub(rollout::MAX_TOKENS as usize);
                Origin::read(file, &tokenizer, longest).context("tasks")?
            }
            None => Origin::Generated(Tasks::new()?),
        };
        Ok(Self { config, sources, tokenizer, origin, cut_share })
    }

    /// `count` tasks to learn from number `first` on; of a file's at most all, and from its beginning again after its end.
    fn tasks(&self, first: u64, count: usize) -> anyhow::Result<Vec<Task>> {
        match &self.origin {
            Origin::Generated(tasks) => {
                let draw = |i| tasks.draw(self.config.raw.seed, Part::Training, i);
                with_expected_results(&(first..first + count as u64).map(draw).collect::<Vec<Task>>())
            }
            Origin::File { learnt, .. } => {
                let begin = (first % learnt.len() as u64) as usize;
                Ok(learnt.iter().cycle().skip(begin).take(count.min(learnt.len())).cloned().collect())
            }
        }
    }

    /// Up to `count` tasks that are never learnt.
    pub(crate) fn watched(&self, count: usize) -> anyhow::Result<Vec<Task>> {
        match &self.origin {
            Origin::Generated(_) => self.tasks(WATCHED_FIRST, count),
            Origin::File { watched, .. } => Ok(watched.iter().take(count).cloned().collect()),
        }
    }

    /// The autoregressive answers to `count` prompts that pass; asked once, and kept in `file`.
    ///
    /// # Errors
    /// None passes; the engine, Python or the file.
    pub(crate) fn answers(&self, training: &Training<'_>, count: usize, file: &Path) -> anyhow::Result<Vec<Answer>> {
        let answers = if file.exists() { read(file)? } else { self.answer(training, count, file)? };
        ensure!(!answers.is_empty(), "no answer passes: start from a model that solves some of its tasks");
        Ok(answers)
    }

    fn answer(&self, training: &Training<'_>, count: usize, file: &Path) -> anyhow::Result<Vec<Answer>> {
        let model = self.served(training)?;
        let mut rng = generator(self.config.raw.seed, Purpose::Prompts, ANSWERS_FIRST);
        let prompts = self.prompts(ANSWERS_FIRST, count, &mut rng)?;
        let all: Vec<usize> = (0..prompts.len()).collect();
        let decoded = self.decode(&model, &prompts, &all, Point::AUTOREGRESSIVE)?;
        let end = self.sources.vocabulary.end;
        let passed = decoded.into_iter().filter(|decoded| decoded.passed);
        let answers: Vec<Answer> = passed.filter_map(|decoded| decoded.rollout.answer(&decoded.prompt, end)).collect();
        write(&answers, file)?;
        Ok(answers)
    }

    pub(crate) fn load(&self, folder: &Path) -> anyhow::Result<Arc<Model>> {
        let options = LoadOptions { threads: self.config.threads, ..LoadOptions::default() };
        Ok(Arc::new(Model::load(folder, &options)?))
    }

    /// The model as it is, in the engine.
    pub(crate) fn served(&self, training: &Training<'_>) -> anyhow::Result<Arc<Model>> {
        let dir = tempfile::tempdir().context("a folder for the model")?;
        let folder = dir.path().join("model");
        training.export(&folder)?;
        self.load(&folder)
    }

    /// Decodes the prompts `taken` at `point` and verifies the answers.
    pub(crate) fn decode(
        &self,
        model: &Arc<Model>,
        prompts: &[Prompt],
        taken: &[usize],
        point: Point,
    ) -> anyhow::Result<Vec<Decoded>> {
        let encode = |&i: &usize| self.tokenizer.encode(&prompts[i].text, Specials::AsText, false).map(Given::from);
        let given: Vec<Given> = taken.iter().map(encode).collect::<Result<_, _>>()?;
        let rollouts = roll_out(model, &given, point, STREAMS, |_| {})?.rollouts;
        let answers: Vec<(&Prompt, String)> = taken
            .iter()
            .zip(&rollouts)
            .map(|(&i, rollout)| (&prompts[i], self.tokenizer.decode(&rollout.answer, true)))
            .collect();
        let passed = verify(&answers)?;
        let all = taken.iter().zip(given).zip(rollouts).zip(passed);
        Ok(all
            .map(|(((&index, given), rollout), passed)| Decoded { index, prompt: given.ids, rollout, passed })
            .collect())
    }

    /// Prompts of `count` tasks from number `first` on, some of them cut.
    pub(crate) fn prompts(&self, first: u64, count: usize, rng: &mut ChaCha8Rng) -> anyhow::Result<Vec<Prompt>> {
        let mut prompts: Vec<Prompt> = self
            .tasks(first, count)?
            .into_iter()
            .map(|task| {
                if !rng.random_bool(self.cut_share) {
                    return Prompt { text: task.prompt.clone(), task: Some(task) };
                }
                let ends: Vec<usize> = task.prompt.char_indices().map(|(at, _)| at).skip(1).collect();
                let end = if ends.is_empty() { task.prompt.len() } else { ends[rng.random_range(0..ends.len())] };
                Prompt { text: task.prompt[..end].to_owned(), task: None }
            })
            .collect();
        prompts.shuffle(rng);
        Ok(prompts)
    }
}

impl Origin {
    /// Tasks of a file whose prompts have at most `longest` tokens, a share of them watched.
    fn read(file: &Path, tokenizer: &Tokenizer, longest: usize) -> anyhow::Result<Origin> {
        let tasks = measure::read_tasks(file)?;
        let mut long = Vec::new();
        for task in &tasks {
            let tokens = tokenizer.encode(&task.prompt, Specials::AsText, false)?.len();
            if !(1..=longest).contains(&tokens) {
                long.push(format!("{} ({tokens} tokens)", task.task_id));
            }
        }
        let named = long.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
        ensure!(
            long.is_empty(),
            "{}: prompts must have 1 to {longest} tokens; take out {} of {} tasks: {named}",
            file.display(),
            long.len(),
            tasks.len()
        );
        let apart = held_out(tasks.iter().map(|task| task.prompt.clone()), WATCHED_ONE_IN);
        let (watched, learnt): (Vec<Task>, Vec<Task>) =
            tasks.into_iter().partition(|task| apart.contains(&task.prompt));
        ensure!(!watched.is_empty(), "{}: needs at least two different prompts", file.display());
        tracing::info!("{} tasks of {} are learnt, {} watched", learnt.len(), file.display(), watched.len());
        Ok(Origin::File { learnt, watched })
    }
}
