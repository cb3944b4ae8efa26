//! Generated Python tasks with tests: a function to complete, from its name or description.
//!
//! Two sources: [`snippet`] draws names, constants and phrasing for hand-written programs (`snippets.txt`);
//! [`pipeline`] composes collections, conditions, transformations and results into programs of its own.
//! [`skeleton`] normalises names and constants, the key by which tasks are split; [`verify`] runs programs.

pub mod pipeline;
mod render;
pub mod skeleton;
pub mod snippet;
pub mod verify;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// One skeleton in this many is held out.
const HELD_OUT_ONE_IN: u64 = 12;
/// Draws before a task of the wanted part must have been found.
const DRAWS_MAX: usize = 10_000;
/// Share of tasks drawn from the hand-written programs.
const SNIPPET_SHARE: f64 = 0.5;

/// Which side of the split a task is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Seen in training.
    Training,
    /// Its skeleton is never seen in training.
    HeldOut,
}

/// A function to write. Field names follow HumanEval's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// Unique within a file.
    pub task_id: String,
    /// Source up to where the body begins.
    pub prompt: String,
    /// The body; not needed to run tests.
    #[serde(default)]
    pub canonical_solution: String,
    /// Source that defines `check(candidate)`.
    pub test: String,
    /// Name of the function.
    pub entry_point: String,
    /// The program with names and constants normalised.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub skeleton: String,
}

impl Task {
    /// The whole function.
    pub fn program(&self) -> String {
        format!("{}{}", self.prompt, self.canonical_solution)
    }
}

/// A function before it is put into words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Name and type of each argument.
    pub arguments: Vec<(String, String)>,
    /// What it does, one sentence.
    pub description: String,
    /// Body lines without the function's own indent.
    pub body: Vec<String>,
    /// Argument lists for the tests.
    pub calls: Vec<String>,
    /// Whether the name alone does not say what to do.
    pub needs_description: bool,
}

/// Draws tasks of one part; the same seed gives the same tasks.
pub struct Tasks {
    snippets: Vec<snippet::Snippet>,
}

impl Tasks {
    /// Reads the hand-written programs.
    ///
    /// # Errors
    /// The embedded file is malformed.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self { snippets: snippet::parse(include_str!("snippets.txt"))? })
    }

    /// Task number `index` of `part`.
    pub fn draw(&self, seed: u64, part: Part, index: u64) -> Task {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        rng.set_stream(part as u64);
        let mut task = self.draw_any(part, &mut rng);
        for _ in 0..DRAWS_MAX {
            if part_of(&task.skeleton) == part {
                break;
            }
            task = self.draw_any(part, &mut rng);
        }
        task.task_id = format!("{}/{index}", if part == Part::Training { "train" } else { "held-out" });
        task
    }

    /// Held-out tasks are composed ones: a composition of known parts can be worked out, a hand-written program that was
    /// never seen can only be known.
    fn draw_any(&self, part: Part, rng: &mut ChaCha8Rng) -> Task {
        let function = if rng.random_bool(SNIPPET_SHARE) && part == Part::Training {
            self.snippets[rng.random_range(0..self.snippets.len())].draw(rng)
        } else {
            pipeline::draw(rng)
        };
        render::task(&function, rng)
    }
}

/// The side of the split a skeleton is on, by its hash.
pub fn part_of(skeleton: &str) -> Part {
    if skeleton::hash(skeleton).is_multiple_of(HELD_OUT_ONE_IN) { Part::HeldOut } else { Part::Training }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_same_seed_gives_the_same_tasks() {
        let tasks = Tasks::new().unwrap();
        for index in 0..50 {
            assert_eq!(tasks.draw(7, Part::Training, index), tasks.draw(7, Part::Training, index));
        }
        assert_ne!(tasks.draw(7, Part::Training, 1), tasks.draw(8, Part::Training, 1));
    }

    #[test]
    fn no_held_out_skeleton_is_in_training() {
        let tasks = Tasks::new().unwrap();
        let skeletons = |part| (0..2000).map(|i| tasks.draw(1, part, i).skeleton).collect::<HashSet<_>>();
        let (training, held_out) = (skeletons(Part::Training), skeletons(Part::HeldOut));
        assert!(training.is_disjoint(&held_out));
        assert!(training.len() > 400 && held_out.len() > 40, "{} {}", training.len(), held_out.len());
    }

    #[test]
    fn drawn_programs_run_and_pass_their_own_tests() {
        let tasks = Tasks::new().unwrap();
        let drawn: Vec<Task> = (0..300).map(|i| tasks.draw(3, Part::Training, i)).collect();
        let solved = verify::with_expected_results(&drawn).unwrap();
        assert_eq!(solved.len(), drawn.len(), "a drawn program does not run");
        let programs: Vec<_> = solved.iter().map(|task| verify::Program::of(task, &task.canonical_solution)).collect();
        for (task, outcome) in solved.iter().zip(verify::run(&programs, &verify::Limits::default()).unwrap()) {
            assert_eq!(outcome, verify::Outcome::Passed, "{}", task.program());
        }
    }
}
