//! What is asked, and when an answer is right.

use super::answers::Outcome;
use super::ask::{Answer, Question};
use unmask_trainer::data::corpus::Document;
use unmask_trainer::tasks::Task;
use unmask_trainer::tasks::verify::{self, Limits, Program};

/// Longest prompt taken from real code (bytes).
const CODE_PROMPT_BYTES_MAX: usize = 400;

/// A question, and what is needed to judge the answer.
#[derive(Debug, Clone)]
pub struct Case {
    /// Unique in its part.
    pub id: String,
    prompt: String,
    suffix: Option<String>,
    /// Most tokens of the answer; absent: as for all.
    pub max_tokens: Option<u32>,
    judge: Judge,
}

#[derive(Debug, Clone)]
enum Judge {
    /// Its tests pass.
    Tests(Box<Task>),
    /// It is this text.
    Exactly(String),
    /// It parses.
    Parses,
}

/// Functions to write.
pub fn tasks(tasks: &[Task]) -> Vec<Case> {
    let case = |task: &Task| Case {
        id: task.task_id.clone(),
        prompt: task.prompt.clone(),
        suffix: None,
        max_tokens: None,
        judge: Judge::Tests(Box::new(task.clone())),
    };
    tasks.iter().map(case).collect()
}

/// The same functions, each with a line in the middle of its body taken out. Bodies of one line are left out.
pub fn infill(tasks: &[Task]) -> Vec<Case> {
    let case = |task: &Task| {
        let lines: Vec<&str> = task.canonical_solution.trim_end().split('\n').collect();
        let (before, rest) = lines.split_at((lines.len() - 1) / 2);
        let [line, after @ ..] = rest else { return None };
        if after.is_empty() || line.trim().is_empty() {
            return None;
        }
        let before: String = before.iter().map(|line| format!("{line}\n")).collect();
        let after: String = after.iter().map(|line| format!("\n{line}")).chain(["\n".into()]).collect();
        Some(Case {
            id: task.task_id.clone(),
            prompt: format!("{}{before}", task.prompt),
            suffix: Some(after),
            max_tokens: None,
            judge: Judge::Exactly((*line).to_owned()),
        })
    };
    tasks.iter().filter_map(case).collect()
}

/// First lines of the functions of real code, each to be completed to something that parses.
pub fn code(documents: &[Document]) -> Vec<Case> {
    let mut cases = Vec::new();
    for document in documents {
        for line in document.text.lines().filter(|line| line.starts_with("def ") && line.trim_end().ends_with(':')) {
            if line.len() <= CODE_PROMPT_BYTES_MAX {
                let id = format!("code/{}", cases.len());
                cases.push(Case {
                    id,
                    prompt: format!("{line}\n"),
                    suffix: None,
                    max_tokens: None,
                    judge: Judge::Parses,
                });
            }
        }
    }
    cases
}

impl Case {
    /// The one text that is right, where there is only one.
    pub fn expected(&self) -> Option<&str> {
        match &self.judge {
            Judge::Exactly(text) => Some(text),
            Judge::Tests(_) | Judge::Parses => None,
        }
    }

    /// What the model is asked.
    pub fn question(&self) -> Question {
        Question { prompt: self.prompt.clone(), suffix: self.suffix.clone(), max_tokens: self.max_tokens }
    }

    fn parsing(&self, answer: &str) -> Program {
        Program::parsing(&format!("{}{answer}{}", self.prompt, self.suffix.as_deref().unwrap_or_default()))
    }
}

/// Judges the answers to `cases`, in order.
///
/// # Errors
/// Python cannot be run.
pub fn judge(cases: &[Case], answers: Vec<Answer>) -> anyhow::Result<Vec<Outcome>> {
    let programs = |(case, answer): (&Case, &Answer)| {
        let parsing = case.parsing(&answer.text);
        match &case.judge {
            Judge::Tests(task) => [Program::of(task, &answer.text), parsing],
            Judge::Exactly(_) | Judge::Parses => [parsing.clone(), parsing],
        }
    };
    let programs: Vec<Program> = cases.iter().zip(&answers).flat_map(programs).collect();
    let ended = verify::run(&programs, &Limits::default())?;
    let outcome = |((case, answer), ended): ((&Case, Answer), &[verify::Outcome])| {
        let [ran, parsed] = [0, 1].map(|i| ended.get(i) == Some(&verify::Outcome::Passed));
        let passed = match &case.judge {
            Judge::Exactly(expected) => answer.text == *expected,
            Judge::Tests(_) | Judge::Parses => ran,
        };
        let answered = answer.refused.is_none();
        Outcome { id: case.id.clone(), answer, passed: passed && answered, parsed: parsed && answered }
    };
    Ok(cases.iter().zip(answers).zip(ended.chunks(2)).map(outcome).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn task() -> Task {
        Task {
            task_id: "t".into(),
            prompt: "def f(a):\n".into(),
            canonical_solution: "    b = a + 1\n    c = 2 * b\n    return c\n".into(),
            test: "def check(candidate):\n    assert candidate(1) == 4\n".into(),
            entry_point: "f".into(),
            skeleton: String::new(),
        }
    }

    fn judged(cases: &[Case], text: &str) -> (bool, bool) {
        let answer = Answer { text: text.into(), tokens: 1, passes: 1, refused: None };
        let outcome = judge(cases, vec![answer]).unwrap().remove(0);
        (outcome.passed, outcome.parsed)
    }

    #[test]
    fn answers_are_judged_by_tests_by_text_and_by_the_parser() {
        let cases = tasks(&[task()]);
        assert_eq!(judged(&cases, "    return 2 * (a + 1)\n"), (true, true));
        assert_eq!(judged(&cases, "    return a\n"), (false, true));
        assert_eq!(judged(&cases, "    return (\n"), (false, false));
        let cases = infill(&[task()]);
        assert_eq!(cases[0].suffix.as_deref(), Some("\n    return c\n"));
        assert_eq!(judged(&cases, "    c = 2 * b"), (true, true));
        assert_eq!(judged(&cases, "    c = b * 2"), (false, true));
        let documents = [Document {
            text: "import x\ndef g(a,\n    b):\n    pass\ndef h(a):\n    pass\n".into(),
            package: String::new(),
        }];
        let cases = code(&documents);
        assert_eq!(cases.len(), 1);
        assert_eq!(judged(&cases, "    return 1"), (true, true));
        assert_eq!(judged(&cases, ""), (false, false));
    }

    #[test]
    fn what_was_not_answered_is_not_right() {
        let whole = Document { text: "def g(a):\n    pass\n".into(), package: String::new() };
        let case = Case { prompt: "a = 1\n".into(), ..code(&[whole]).remove(0) };
        let outcome = |refused| {
            let answer = Answer { refused, ..Answer::default() };
            let outcome = judge(std::slice::from_ref(&case), vec![answer]).unwrap().remove(0);
            (outcome.passed, outcome.parsed)
        };
        assert_eq!(outcome(None), (true, true));
        assert_eq!(outcome(Some("too long".into())), (false, false));
    }

    #[test]
    fn bodies_of_one_line_have_no_middle() {
        let short = Task { canonical_solution: "    return 4\n".into(), ..task() };
        assert!(infill(&[short]).is_empty());
    }
}
