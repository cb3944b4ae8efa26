//! A function in words: signature, description, tests.

use super::{Function, Task, skeleton};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Share of tasks with types in the signature.
const TYPED_SHARE: f64 = 0.3;
/// Shares of tasks with a docstring, and of those without one that have a comment.
const DOCSTRING_SHARE: f64 = 0.6;
const COMMENT_SHARE: f64 = 0.35;

/// The function as a task: prompt, body, tests whose expected results are still to be computed.
pub(super) fn task(function: &Function, rng: &mut ChaCha8Rng) -> Task {
    let typed = rng.random_bool(TYPED_SHARE);
    let arguments: Vec<String> = function
        .arguments
        .iter()
        .map(|(name, kind)| if typed && !kind.is_empty() { format!("{name}: {kind}") } else { name.clone() })
        .collect();
    let signature = format!("def {}({}):\n", function.name, arguments.join(", "));
    let prompt = if rng.random_bool(DOCSTRING_SHARE) {
        format!("{signature}    \"\"\"{}\"\"\"\n", function.description)
    } else if function.needs_description || rng.random_bool(COMMENT_SHARE) {
        format!("# {}\n{signature}", function.description)
    } else {
        signature
    };
    let canonical_solution: String = function.body.iter().map(|line| format!("    {line}\n")).collect();
    let calls: String = function.calls.iter().map(|call| format!("    candidate({call})\n")).collect();
    Task {
        task_id: String::new(),
        prompt,
        skeleton: skeleton::of(function),
        canonical_solution,
        test: format!("def check(candidate):\n{calls}"),
        entry_point: function.name.clone(),
    }
}
