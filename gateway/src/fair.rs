//! Who is next: requests that wait, in a line per tenant. Pure.
//!
//! Lines are served by deficit round robin (Shreedhar, Varghese 1996), in rows: whenever a tenant's turn comes and what it
//! has saved does not cover its first request, it saves a quantum times its weight and the next one has its turn. While
//! tenants a and b both wait, the rows they get, divided by their weights, differ by at most
//! `3 * QUANTUM_ROWS + largest / weight_a + largest / weight_b`. Within a line: priority, then deadline, then arrival.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Instant;

/// What a tenant of weight 1 saves at its turn (rows). A request of a whole context takes some hundred turns at most.
const QUANTUM_ROWS: u64 = 1024;

/// What asks to be served.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    pub tenant: u64,
    /// Of the tenant, at least 1.
    pub weight: u32,
    pub rows: u64,
    /// Larger is sooner.
    pub priority: i32,
    pub deadline: Option<Instant>,
    /// Waits no longer than this.
    pub until: Instant,
}

/// Where a request waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    tenant: u64,
    rank: Rank,
}

/// The order of a line: lower is sooner; no deadline is later than any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    priority: Reverse<i32>,
    deadline: (bool, Option<Instant>),
    arrival: u64,
}

impl Rank {
    fn of(asked: &Asked, arrival: u64) -> Self {
        let deadline = (asked.deadline.is_none(), asked.deadline);
        Self { priority: Reverse(asked.priority), deadline, arrival }
    }
}

#[derive(Debug)]
struct Waiting<T> {
    rows: u64,
    until: Instant,
    what: T,
}

#[derive(Debug)]
struct Line<T> {
    weight: u32,
    /// Rows saved.
    deficit: u64,
    /// Rows that wait.
    rows: u64,
    waiting: BTreeMap<Rank, Waiting<T>>,
}

impl<T> Line<T> {
    fn remove(&mut self, rank: &Rank) -> Option<Waiting<T>> {
        let waiting = self.waiting.remove(rank)?;
        self.rows -= waiting.rows;
        Some(waiting)
    }
}

/// Everything that waits; none of its lines is empty.
#[derive(Debug)]
pub(crate) struct Fair<T> {
    lines: HashMap<u64, Line<T>>,
    /// Tenants in the order of their turns; the first one's turn is now.
    turns: VecDeque<u64>,
    arrivals: u64,
}

impl<T> Fair<T> {
    /// Nobody waits.
    pub(crate) fn new() -> Self {
        Self { lines: HashMap::new(), turns: VecDeque::new(), arrivals: 0 }
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.lines.values().map(|line| line.waiting.len()).sum()
    }

    /// Rows that wait.
    pub(crate) fn rows(&self) -> u64 {
        self.lines.values().map(|line| line.rows).sum()
    }

    /// Rows that would be served before a request: what is before it in its line, and what others get meanwhile.
    pub(crate) fn ahead(&self, asked: &Asked) -> u64 {
        let Some(line) = self.lines.get(&asked.tenant) else { return 0 };
        let before = line.waiting.range(..Rank::of(asked, self.arrivals));
        let own: u64 = before.map(|(_, waiting)| waiting.rows).sum();
        let others = self.lines.iter().filter(|(tenant, _)| **tenant != asked.tenant);
        let share = |other: &Line<T>| own.saturating_mul(other.weight.into()) / u64::from(asked.weight.max(1));
        own + others.map(|(_, other)| other.rows.min(share(other))).sum::<u64>()
    }

    /// Lines a request up.
    pub(crate) fn push(&mut self, asked: &Asked, what: T) -> Place {
        let rank = Rank::of(asked, self.arrivals);
        self.arrivals += 1;
        let line = self.lines.entry(asked.tenant).or_insert_with(|| {
            self.turns.push_back(asked.tenant);
            Line { weight: 1, deficit: 0, rows: 0, waiting: BTreeMap::new() }
        });
        line.weight = asked.weight.max(1);
        line.rows += asked.rows;
        line.waiting.insert(rank, Waiting { rows: asked.rows, until: asked.until, what });
        Place { tenant: asked.tenant, rank }
    }

    /// Takes the next one out, with its rows. Those that have waited too long are dropped on the way.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<(T, u64)> {
        loop {
            let tenant = *self.turns.front()?;
            let line = self.lines.get_mut(&tenant)?;
            let (&rank, first) = line.waiting.first_key_value()?;
            let late = first.until <= now;
            if !late && line.deficit < first.rows {
                line.deficit += QUANTUM_ROWS * u64::from(line.weight);
                self.turns.rotate_left(1);
                continue;
            }
            let first = self.take(Place { tenant, rank })?;
            if late {
                continue;
            }
            if let Some(line) = self.lines.get_mut(&tenant) {
                line.deficit -= first.rows;
            }
            return Some((first.what, first.rows));
        }
    }

    /// Takes one out that no longer wants to wait; `None` when it does not wait any more.
    pub(crate) fn cancel(&mut self, place: Place) -> Option<T> {
        self.take(place).map(|waiting| waiting.what)
    }

    /// Takes out whoever is last in the line with the most rows for its weight: a tenant that asks for more than its
    /// share crowds out only itself.
    pub(crate) fn shed(&mut self) -> Option<T> {
        let per_weight = |line: &Line<T>| line.rows as f64 / f64::from(line.weight);
        let longest = self.lines.iter().max_by(|(_, a), (_, b)| per_weight(a).total_cmp(&per_weight(b)));
        let (&tenant, line) = longest?;
        let (&rank, _) = line.waiting.last_key_value()?;
        self.cancel(Place { tenant, rank })
    }

    fn take(&mut self, place: Place) -> Option<Waiting<T>> {
        let line = self.lines.get_mut(&place.tenant)?;
        let waiting = line.remove(&place.rank)?;
        if line.waiting.is_empty() {
            // Whoever has nothing to ask for saves nothing.
            self.lines.remove(&place.tenant);
            self.turns.retain(|tenant| *tenant != place.tenant);
        }
        Some(waiting)
    }
}

#[cfg(test)]
mod tests;
