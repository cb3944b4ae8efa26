//! Filters, tests, functions and methods that templates may use, each within the budget.

use super::budget::{Budget, VALUE_BYTES, refused};
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, functions};
use minijinja_contrib::pycompat;

/// Widest indent of `tojson` (spaces).
const INDENT_MAX: usize = 16;
/// Longest text whose characters become a list (bytes).
const CHARACTERS_MAX: usize = 64 << 10;
/// Longest range (numbers).
const RANGE_MAX: usize = 10_000;
/// How often sorting reads each entry.
const SORT_READS: u64 = 32;
/// Filters that make more of a number or of many values than they read.
const REMOVED: [&str; 10] =
    ["batch", "slice", "indent", "format", "wordwrap", "pprint", "groupby", "zip", "chain", "sum"];
/// Python's methods, but for `format`, whose widths make as much text as they say.
const METHODS: [&str; 28] = [
    "capitalize",
    "count",
    "endswith",
    "find",
    "get",
    "isalnum",
    "isalpha",
    "isascii",
    "isdigit",
    "islower",
    "isnumeric",
    "isspace",
    "isupper",
    "items",
    "join",
    "keys",
    "lower",
    "lstrip",
    "replace",
    "rfind",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "title",
    "upper",
    "values",
];

/// A built-in filter under a name that templates cannot write, and one within the budget under its own.
macro_rules! filters {
    ($environment:ident: $($name:ident),*) => {$(
        $environment.add_filter(concat!("%", stringify!($name)), minijinja::filters::$name);
        $environment.add_filter(stringify!($name), |state: &State, values: Rest<Value>| {
            filter(state, stringify!($name), concat!("%", stringify!($name)), &values)
        });
    )*};
}

pub(super) fn add_operations(environment: &mut Environment<'static>) {
    REMOVED.iter().for_each(|filter| environment.remove_filter(filter));
    filters!(environment: abs, attr, bool, capitalize, default, dictsort, escape, first, float, int, items, join, last);
    filters!(environment: length, lines, list, lower, map, max, min, reject, rejectattr, replace, reverse, round, safe);
    filters!(environment: select, selectattr, sort, split, string, title, tojson, trim, unique, upper);
    for (alias, name) in [("count", "length"), ("d", "default"), ("e", "escape")] {
        environment.add_filter(alias, move |state: &State, values: Rest<Value>| state.apply_filter(name, &values));
    }
    environment.remove_global("debug");
    environment.add_function("range", range);
    environment.add_function("dict", |state: &State, value: Option<Value>, entries: Kwargs| {
        Budget::of(state)?.made(functions::dict(value, entries)?)
    });
    environment.add_function("namespace", |state: &State, values: Rest<Value>| -> Result<Value, Error> {
        let [first, ..] = values.0.as_slice() else { return functions::namespace(None) };
        let budget = Budget::of(state)?;
        let bytes = budget.read(std::slice::from_ref(first), 1)?;
        budget.make(bytes)?;
        for key in first.try_iter()? {
            budget.held(first.get_item(&key)?)?;
        }
        functions::namespace(Some(first.clone()))
    });
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.set_unknown_method_callback(method);
}

fn range(state: &State, lower: isize, upper: Option<isize>, step: Option<isize>) -> Result<Value, Error> {
    let (from, to) = upper.map_or((0, lower), |upper| (lower, upper));
    let steps = to.abs_diff(from) / step.unwrap_or(1).unsigned_abs().max(1);
    if steps > RANGE_MAX {
        return Err(refused(format!("range makes {RANGE_MAX} numbers at most")));
    }
    Budget::of(state)?.made(functions::range(lower, upper, step)?)
}

fn filter(state: &State, name: &str, hidden: &str, values: &[Value]) -> Result<Value, Error> {
    let budget = Budget::of(state)?;
    let (value, rest) = values.split_first().map_or((None, values), |(value, rest)| (Some(value), rest));
    let text = value.and_then(Value::as_str);
    match name {
        "map" if rest.iter().any(|name| name.as_str().is_some_and(|name| name.starts_with('%'))) => {
            return Err(refused("map names a filter that does not exist".into()));
        }
        "list" | "sort" | "unique" | "map" | "select" | "reject" | "min" | "max" | "first" | "last"
            if text.is_some_and(|text| text.len() > CHARACTERS_MAX) =>
        {
            return Err(refused(format!("{name} reads {CHARACTERS_MAX} characters of text at most")));
        }
        "tojson" => check_indent(rest)?,
        _ => {}
    }
    if let Some(value) = value {
        check_growth(&budget, name, value, rest)?;
    }
    match name {
        "length" | "first" | "last" | "default" => budget.peek(values)?,
        "sort" | "unique" | "dictsort" => drop(budget.read(values, SORT_READS)?),
        _ => drop(budget.read(values, 1)?),
    }
    if matches!(name, "select" | "reject" | "selectattr" | "rejectattr" | "map") {
        // Each entry meets the arguments.
        budget.read(rest, value.and_then(Value::len).unwrap_or(0) as u64)?;
    }
    let result = state.apply_filter(hidden, values)?;
    // What was there already stays as it is, whatever it is.
    if matches!(name, "default" | "attr" | "first" | "last") && result.kind() != ValueKind::Iterable {
        return Ok(result);
    }
    budget.made(result)
}

/// Refuses operations that make more than a multiple of what they read.
fn check_growth(budget: &Budget, name: &str, value: &Value, rest: &[Value]) -> Result<(), Error> {
    let length = |value: &Value| value.as_str().map_or(VALUE_BYTES, |text| text.len() as u64);
    let text = value.as_str().unwrap_or("");
    let first = rest.first().and_then(Value::as_str);
    match name {
        "replace" => {
            let found = text.matches(first.unwrap_or("")).count() as u64;
            budget.has_room(found.saturating_mul(rest.get(1).map_or(0, length)))
        }
        // The filter has the separator behind the list, the method has it before.
        "join" => {
            let (list, separator) = match value.as_str() {
                Some(_) if rest.first().is_some_and(|list| list.as_str().is_none()) => (rest.first(), Some(value)),
                _ => (Some(value), rest.first()),
            };
            let entries = list.and_then(|list| list.try_iter().ok()).map_or(0, |entries| entries.count() as u64);
            budget.has_room(entries.saturating_mul(separator.map_or(0, length)))
        }
        "split" => {
            let pieces = first.map_or(text.len() / 2, |separator| text.matches(separator).count());
            budget.has_room((pieces as u64 + 2) * VALUE_BYTES)
        }
        "lines" | "splitlines" => budget.has_room((text.matches('\n').count() as u64 + 2) * VALUE_BYTES),
        // Every character meets all of them.
        "trim" | "strip" | "lstrip" | "rstrip" => {
            budget.read(std::slice::from_ref(value), first.map_or(1, |set| set.len().max(1) as u64)).map(|_| ())
        }
        _ => Ok(()),
    }
}

/// An indent takes as much memory as it says.
fn check_indent(arguments: &[Value]) -> Result<(), Error> {
    let wide = |indent: &Value| indent.as_usize().is_some_and(|indent| indent > INDENT_MAX);
    let named = arguments.iter().filter(|value| value.is_kwargs()).filter_map(|named| named.get_attr("indent").ok());
    if arguments.iter().cloned().chain(named).any(|indent| wide(&indent)) {
        return Err(refused(format!("tojson indents by {INDENT_MAX} at most")));
    }
    Ok(())
}

/// Python's methods. What they read and made is counted around the call.
fn method(state: &State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    if !METHODS.contains(&name) {
        return Err(Error::new(ErrorKind::UnknownMethod, format!("has no method {name}")));
    }
    if name == "count" && arguments.first().and_then(Value::as_str) == Some("") {
        // Which does not end.
        return Err(refused("counts an empty text".into()));
    }
    check_growth(&*Budget::of(state)?, name, value, arguments)?;
    pycompat::unknown_method_callback(state, value, name, arguments)
}
