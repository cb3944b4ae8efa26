//! What happened, in order: what the services log, what clients saw, and the faults. All of one seed on one thread.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber, span};

/// Lines kept for whoever reads about a failure.
const LINES_MAX: usize = 20_000;

/// One event.
#[derive(Debug, Clone)]
pub struct Seen {
    pub tick: u64,
    pub host: String,
    pub what: String,
    pub fields: Vec<(&'static str, String)>,
}

impl Seen {
    pub fn field(&self, name: &str) -> &str {
        self.fields.iter().find(|(known, _)| *known == name).map_or("", |(_, value)| value)
    }

    pub fn number(&self, name: &str) -> u64 {
        self.field(name).parse().unwrap_or(0)
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.tick as f64 * crate::host::TICK.as_secs_f64();
        write!(formatter, "{seconds:9.3} {:<12} {}", self.host, self.what)?;
        self.fields.iter().try_for_each(|(name, value)| write!(formatter, " {name}={value}"))
    }
}

#[derive(Default)]
struct Trace {
    lines: Vec<Seen>,
    /// Not yet looked at by the checks.
    fresh: Vec<Seen>,
    violations: Vec<String>,
    hash: u64,
}

thread_local! {
    static TICK: Cell<u64> = const { Cell::new(0) };
    static HOST: RefCell<String> = const { RefCell::new(String::new()) };
    static TRACE: RefCell<Trace> = RefCell::default();
}

/// Begins a trace on this thread.
pub fn begin() -> tracing::subscriber::DefaultGuard {
    TRACE.take();
    TICK.set(0);
    tracing::subscriber::set_default(Tap)
}

pub fn tick(now: u64) {
    TICK.set(now);
}

/// What follows happens on this host.
pub fn on(host: &str) {
    HOST.with_borrow_mut(|current| host.clone_into(current));
}

/// Adds an event.
pub fn add(what: impl Into<String>, fields: Vec<(&'static str, String)>) {
    let seen = Seen { tick: TICK.get(), host: HOST.with_borrow(String::clone), what: what.into(), fields };
    TRACE.with_borrow_mut(|trace| {
        let mut hasher = DefaultHasher::new();
        (trace.hash, seen.tick, &seen.host, &seen.what, &seen.fields).hash(&mut hasher);
        trace.hash = hasher.finish();
        if trace.lines.len() < LINES_MAX {
            trace.lines.push(seen.clone());
        }
        trace.fresh.push(seen);
    });
}

/// Something must not have happened.
pub fn violation(what: String) {
    add("VIOLATION", vec![("what", what.clone())]);
    TRACE.with_borrow_mut(|trace| trace.violations.push(what));
}

pub fn violations() -> Vec<String> {
    TRACE.with_borrow(|trace| trace.violations.clone())
}

pub fn is_clean() -> bool {
    TRACE.with_borrow(|trace| trace.violations.is_empty())
}

/// Events since the last call.
pub fn fresh() -> Vec<Seen> {
    TRACE.with_borrow_mut(|trace| std::mem::take(&mut trace.fresh))
}

/// Over all events.
pub fn hash() -> u64 {
    TRACE.with_borrow(|trace| trace.hash)
}

pub fn lines() -> Vec<Seen> {
    TRACE.with_borrow(|trace| trace.lines.clone())
}

/// Takes what our crates log.
struct Tap;

impl Subscriber for Tap {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && metadata.target().starts_with("unmask_")
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        add(fields.message, fields.others);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, String)>,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.others.push((field.name(), value.to_owned()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" { self.message = text } else { self.others.push((field.name(), text)) }
    }
}
