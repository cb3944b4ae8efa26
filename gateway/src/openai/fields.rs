//! A JSON object read key by key. Every problem is kept, and a key that nobody asked for is one.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use unmask_proto::rich::Violation;

/// Most problems of one body that are told.
const PROBLEMS_MAX: usize = 64;

/// What is left of an object, and what was wrong so far.
pub(super) struct Fields {
    /// Before each key's name in a problem.
    prefix: String,
    left: Map<String, Value>,
    problems: Vec<Violation>,
}

impl Fields {
    /// An object; `name` says where it is: empty, or a path.
    pub(super) fn new(value: Value, name: &str) -> Self {
        let prefix = if name.is_empty() { String::new() } else { format!("{name}.") };
        match value {
            Value::Object(left) => Self { prefix, left, problems: Vec::new() },
            _ => {
                let field = if name.is_empty() { "body" } else { name };
                let problems = vec![Violation::new(field, "must be a JSON object")];
                Self { prefix, left: Map::new(), problems }
            }
        }
    }

    /// A problem of `key`.
    pub(super) fn wrong(&mut self, key: &str, description: impl Into<String>) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(Violation::new(format!("{}{key}", self.prefix), description));
        }
    }

    /// The value of a key; null counts as absent.
    pub(super) fn value(&mut self, key: &str) -> Option<Value> {
        self.left.shift_remove(key).filter(|value| !value.is_null())
    }

    /// The value of a key as a `T`.
    pub(super) fn take<T: DeserializeOwned>(&mut self, key: &str) -> Option<T> {
        match serde_json::from_value(self.value(key)?) {
            Ok(value) => Some(value),
            Err(error) => {
                self.wrong(key, error.to_string());
                None
            }
        }
    }

    /// An object within this one; give it back to [`Fields::close`].
    pub(super) fn within(&mut self, key: &str) -> Option<Fields> {
        let value = self.value(key)?;
        Some(self.part(value, key))
    }

    /// An object that was found under `name` within this one; give it back to [`Fields::close`].
    pub(super) fn part(&self, value: Value, name: &str) -> Fields {
        Fields::new(value, &format!("{}{name}", self.prefix))
    }

    /// A key for what is not supported: only values that change nothing are taken.
    pub(super) fn only(&mut self, key: &str, off: &[Value]) {
        let Some(value) = self.value(key) else { return };
        // 0 and 0.0 are the same.
        let same = |a: &Value, b: &Value| a == b || a.as_f64().is_some_and(|a| b.as_f64() == Some(a));
        if !off.iter().any(|off| same(off, &value)) {
            let off: Vec<String> = off.iter().map(Value::to_string).collect();
            let or = if off.is_empty() { String::new() } else { format!(", or give {}", off.join(" or ")) };
            self.wrong(key, format!("is not supported: leave it out{or}"));
        }
    }

    /// Ends an object within this one.
    pub(super) fn close(&mut self, inner: Fields) {
        let room = PROBLEMS_MAX - self.problems.len();
        self.problems.extend(inner.end().into_iter().take(room));
    }

    /// Every problem; what was not asked for is not known.
    pub(super) fn end(mut self) -> Vec<Violation> {
        for key in std::mem::take(&mut self.left).keys() {
            self.wrong(key, "is not supported: leave it out");
        }
        self.problems
    }
}
