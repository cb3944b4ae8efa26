//! Reading a JSON object key by key, remembering where each value came from and everything that is wrong.

use super::{Entry, LoadError};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::path::Path;

/// Reads a JSON object; `None` when the file is absent.
pub(super) fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, LoadError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LoadError::File { path: path.into(), error }),
    };
    serde_json::from_str(&text).map(Some).map_err(|error| LoadError::Json { path: path.into(), error })
}

/// Values resolved so far, and problems found.
pub(super) struct Reader<'a> {
    pub(super) object: &'a Map<String, Value>,
    /// Keys that are called otherwise here: the name here, then the usual one.
    names: &'static [(&'static str, &'static str)],
    pub(super) entries: Vec<Entry>,
    pub(super) problems: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(object: &'a Map<String, Value>, names: &'static [(&'static str, &'static str)]) -> Self {
        Self { object, names, entries: Vec::new(), problems: Vec::new() }
    }

    /// What the object calls `key`.
    pub(super) fn name<'k>(&self, key: &'k str) -> &'k str {
        self.names.iter().find(|(_, usual)| *usual == key).map_or(key, |(here, _)| here)
    }

    /// The value of `key`, absent when null.
    pub(super) fn value(&self, key: &str) -> Option<&'a Value> {
        self.object.get(self.name(key)).filter(|value| !value.is_null())
    }

    pub(super) fn note(&mut self, key: &str, value: impl ToString, origin: &'static str) {
        self.entries.push(Entry { key: key.into(), value: value.to_string(), origin });
    }

    pub(super) fn problem(&mut self, problem: impl Into<String>) {
        self.problems.push(problem.into());
    }

    /// A whole number from `min` to `max`, or the default with its origin; without default a missing key is a problem.
    pub(super) fn count(&mut self, key: &str, min: u64, max: u64, default: Option<(u64, &'static str)>) -> u64 {
        match (self.value(key), default) {
            (Some(value), _) => match value.as_u64().filter(|n| (min..=max).contains(n)) {
                Some(n) => {
                    self.note(key, n, "config.json");
                    n
                }
                None => {
                    self.problem(format!("{} must be a whole number from {min} to {max}, is {value}", self.name(key)));
                    min
                }
            },
            (None, Some((n, origin))) => {
                self.note(key, n, origin);
                n
            }
            (None, None) => {
                self.problem(format!("{} is missing", self.name(key)));
                min
            }
        }
    }

    /// A positive number.
    pub(super) fn number(&mut self, key: &str, value: Option<&Value>) -> f64 {
        match value.map(|value| (value, value.as_f64().filter(|x| *x > 0.0 && x.is_finite()))) {
            Some((_, Some(x))) => {
                self.note(key, x, "config.json");
                x
            }
            Some((value, None)) => {
                self.problem(format!("{} must be a number above 0, is {value}", self.name(key)));
                1.0
            }
            None => {
                self.problem(format!("{} is missing", self.name(key)));
                1.0
            }
        }
    }

    pub(super) fn flag(&mut self, key: &str, default: bool) -> bool {
        let found = self.value(key).map(|value| (value.as_bool(), value));
        match found {
            Some((Some(flag), _)) => {
                self.note(key, flag, "config.json");
                flag
            }
            Some((None, value)) => {
                self.problem(format!("{} must be true or false, is {value}", self.name(key)));
                default
            }
            None => {
                self.note(key, default, "family default");
                default
            }
        }
    }

    /// A token id; another value is a problem.
    pub(super) fn id(&mut self, key: &str) -> Option<u32> {
        let value = self.value(key)?;
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        if id.is_none() {
            self.problem(format!("{} must be a token id, is {value}", self.name(key)));
        }
        id
    }

    /// An object of our own format, checked key by key.
    pub(super) fn own<T: DeserializeOwned>(&mut self, key: &str) -> Option<T> {
        let value = self.value(key)?.clone();
        self.note(key, &value, "config.json");
        match serde_json::from_value(value) {
            Ok(parsed) => Some(parsed),
            Err(error) => {
                self.problem(format!("{key}: {error}"));
                None
            }
        }
    }
}

/// One id, or a list of ids.
pub(super) fn ids(value: &Value) -> Option<Vec<u32>> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().map(one).collect(),
        value => one(value).map(|id| vec![id]),
    }
}
