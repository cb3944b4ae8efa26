//! What a template may still make and look at, and how large one value gets.

use minijinja::value::{Enumerator, Object, ObjectRepr, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Values a template may make (bytes), however short the conversation.
pub(super) const VALUES_BYTES: u64 = 32 << 20;
/// And besides, per byte of the conversation.
const VALUES_PER_BYTE: u64 = 64;
/// Values a template may look at (bytes): comparing, searching and printing take time.
const READ_BYTES: u64 = 1 << 30;
/// And besides, per byte of the conversation.
const READ_PER_BYTE: u64 = 256;
/// What a number, a list's entry or a string's head count for (bytes).
pub(super) const VALUE_BYTES: u64 = 64;
/// Bytes that a byte of a value may become where it is printed: `\u{1}` in a list.
const PRINTED_PER_BYTE: u64 = 8;
/// Deepest nesting of lists and maps (levels): freeing and printing them takes stack.
const DEPTH_MAX: usize = 32;
/// Where templates cannot see it: no name has a percent sign.
pub(super) const BUDGET: &str = "%budget";

/// A message, as templates see it: a map of two entries in this order.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) role: Value,
    pub(super) content: Value,
}

impl Object for Said {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str()? {
            "role" => Some(self.role.clone()),
            "content" => Some(self.content.clone()),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Str(&["role", "content"])
    }
}

/// A map as the engine makes it.
type Map = BTreeMap<Value, Value>;

/// Bytes left of one rendering.
#[derive(Debug)]
pub(super) struct Budget {
    values: AtomicU64,
    read: AtomicU64,
    values_max: u64,
    read_max: u64,
}

impl Object for Budget {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }
}

pub(super) fn refused(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

impl Budget {
    /// For a conversation of so many bytes.
    pub(super) fn new(conversation: u64) -> Budget {
        let values_max = VALUES_BYTES.saturating_add(conversation.saturating_mul(VALUES_PER_BYTE));
        let read_max = READ_BYTES.saturating_add(conversation.saturating_mul(READ_PER_BYTE));
        Budget { values: AtomicU64::new(values_max), read: AtomicU64::new(read_max), values_max, read_max }
    }

    /// The one of a rendering.
    pub(super) fn of(state: &State) -> Result<Arc<Budget>, Error> {
        let found = state.lookup(BUDGET).and_then(|value| value.downcast_object::<Budget>());
        found.ok_or_else(|| refused("is rendered without a budget".into()))
    }

    /// Takes what a value is made of.
    pub(super) fn make(&self, bytes: u64) -> Result<(), Error> {
        take(&self.values, bytes).ok_or_else(|| refused(format!("makes more than {} bytes of values", self.values_max)))
    }

    /// Whether so much could still be made.
    pub(super) fn has_room(&self, bytes: u64) -> Result<(), Error> {
        if bytes <= self.values.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(refused(format!("makes more than {} bytes of values", self.values_max)))
    }

    /// Takes the reading of values, and checks that there is room for printing them.
    pub(super) fn read(&self, values: &[Value], times: u64) -> Result<u64, Error> {
        let mut bytes = 0;
        for value in values {
            bytes += self.size(value, DEPTH_MAX)?;
        }
        take(&self.read, bytes.saturating_mul(times))
            .ok_or_else(|| refused(format!("reads more than {} bytes of values", self.read_max)))?;
        self.has_room(bytes.saturating_mul(PRINTED_PER_BYTE))?;
        Ok(bytes)
    }

    /// Takes what finding an entry or an end reads: all of a text, nothing of a list, and the keys.
    pub(super) fn peek(&self, values: &[Value]) -> Result<(), Error> {
        let Some((value, keys)) = values.split_first() else { return Ok(()) };
        if value.as_str().is_some() {
            self.read(std::slice::from_ref(value), 1)?;
        }
        self.read(keys, 1).map(|_| ())
    }

    /// Bytes of a value as if nothing in it were shared: what printing or comparing it goes through.
    fn size(&self, value: &Value, depth: usize) -> Result<u64, Error> {
        if let Some(text) = value.as_str() {
            return Ok(VALUE_BYTES + text.len() as u64);
        }
        let mut bytes = VALUE_BYTES;
        if !matches!(value.kind(), ValueKind::Seq | ValueKind::Map) {
            return Ok(bytes);
        }
        let Some(depth) = depth.checked_sub(1) else {
            return Err(refused(format!("nests lists deeper than {DEPTH_MAX}")));
        };
        let Some(object) = value.as_object() else { return Ok(bytes) };
        for (key, inner) in object.try_iter_pairs().into_iter().flatten() {
            bytes += self.size(&key, depth)? + self.size(&inner, depth)?;
            if bytes > self.values_max {
                return Err(refused(format!("makes a value of more than {} bytes", self.values_max)));
            }
        }
        Ok(bytes)
    }

    /// A value that an operation made, taken from the budget. What is made while it is read becomes a list.
    pub(super) fn made(&self, value: Value) -> Result<Value, Error> {
        if value.kind() != ValueKind::Iterable {
            self.make(self.size(&value, DEPTH_MAX)?)?;
            return self.held(value);
        }
        let mut list = Vec::new();
        for entry in value.try_iter()? {
            self.make(self.size(&entry, DEPTH_MAX)?)?;
            list.push(self.held(entry)?);
        }
        self.made(Value::from(list))
    }

    /// A value that a list, a map or a namespace may hold. Others could hold themselves, which is never freed.
    pub(super) fn held(&self, value: Value) -> Result<Value, Error> {
        let held = match value.kind() {
            ValueKind::Seq => entries(&value).is_some_and(|entries| entries.iter().all(is_plain)),
            ValueKind::Map if value.is_kwargs() => true,
            ValueKind::Map if value.downcast_object_ref::<Said>().is_some() => true,
            ValueKind::Map => value.downcast_object_ref::<Map>().is_some_and(|map| map.values().all(is_plain)),
            _ => is_plain(&value),
        };
        if held {
            return Ok(value);
        }
        Err(refused("puts something else than text, numbers, lists and maps into a list, a map or a namespace".into()))
    }
}

/// Entries of a list as the engine makes it; `dictsort` makes pairs.
fn entries(value: &Value) -> Option<&[Value]> {
    let pair = || value.downcast_object_ref::<[Value; 2]>().map(<[Value; 2]>::as_slice);
    value.downcast_object_ref::<Vec<Value>>().map(Vec::as_slice).or_else(pair)
}

/// Of the containers only those that were checked when they were made.
fn is_plain(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Seq => entries(value).is_some(),
        ValueKind::Map => value.downcast_object_ref::<Map>().is_some() || value.downcast_object_ref::<Said>().is_some(),
        ValueKind::Plain | ValueKind::Iterable | ValueKind::Invalid => false,
        _ => true,
    }
}

fn take(left: &AtomicU64, bytes: u64) -> Option<()> {
    let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes));
    taken.ok().map(|_| ())
}
