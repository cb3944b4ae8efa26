//! One group as requests see it: whether it works, what it holds, how soon it answers.

use crate::affinity;
use crate::circuit::Circuit;
use crate::latency::PeakEwma;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use unmask_proto::v1::{self, ModelDescriptor};

/// What a group takes to answer where none has been measured (seconds). They are then all alike, so any number does.
const LATENCY_DEFAULT: f64 = 0.01;

/// A group that is ready for requests.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    pub group: String,
    /// Of the group's name: see [`Prefix::weight`](crate::affinity::Prefix::weight).
    pub digest: u64,
    pub epoch: u64,
    /// host:port of its worker.
    pub endpoint: String,
    pub model: Arc<ModelDescriptor>,
    /// Rows of work it reported.
    pub reported: u64,
    /// Rows of work this gateway has given it.
    own: Arc<AtomicU64>,
    incarnation: Arc<Incarnation>,
}

/// What was learned of one process of a group.
#[derive(Debug, Default)]
struct Incarnation {
    circuit: Circuit,
    latency: Mutex<PeakEwma>,
}

impl Route {
    /// A route as the controller has it; what was `known` of its group carries over.
    pub(crate) fn read(route: v1::Route, known: Option<&Route>) -> Option<Self> {
        let Some(descriptor) = route.descriptor else {
            tracing::warn!(group = route.group_id, "a route without a descriptor is left out");
            return None;
        };
        let own = known.map_or_else(Default::default, |known| Arc::clone(&known.own));
        // Another epoch is another incarnation: what broke is gone.
        let same = known.filter(|known| known.epoch == route.epoch && known.endpoint == route.endpoint);
        let incarnation = same.map_or_else(Default::default, |same| Arc::clone(&same.incarnation));
        let name = if route.model.is_empty() { descriptor.name } else { route.model };
        Some(Self {
            digest: affinity::digest(route.group_id.as_bytes()),
            group: route.group_id,
            epoch: route.epoch,
            endpoint: route.endpoint,
            model: Arc::new(ModelDescriptor { name, ..descriptor }),
            reported: route.outstanding_rows,
            own,
            incarnation,
        })
    }

    /// The same with another report.
    pub(crate) fn reporting(&self, rows: u64) -> Self {
        Self { reported: rows, ..self.clone() }
    }

    /// Whether it works, as far as is known.
    pub(crate) fn circuit(&self) -> &Circuit {
        &self.incarnation.circuit
    }

    /// It took a request after so long. A worker does so between two steps: the time says how quick its steps and the
    /// way to it are, and does not depend on the request.
    pub(crate) fn took(&self, after: Duration, now: Instant) {
        self.latency().observe(after, now);
        self.answered();
    }

    /// It answered, be it with a refusal; those come quickly and say nothing of its speed.
    pub(crate) fn answered(&self) {
        self.circuit().close();
    }

    /// It broke, or the way to it did.
    pub(crate) fn broke(&self) {
        self.circuit().open(tokio::time::Instant::now().into_std());
    }

    /// Counts `rows` as outstanding until the lease is dropped.
    pub(crate) fn lease(&self, rows: u64) -> Lease {
        self.own.fetch_add(rows, Ordering::Relaxed);
        Lease { own: Arc::clone(&self.own), rows }
    }

    /// What one more row costs here (row-seconds): outstanding rows times the response time, as
    /// `tower::load::PeakEwma` has it for requests. `usual` is that of [`usual`].
    pub(crate) fn score(&self, now: Instant, usual: f64) -> f64 {
        let rows = self.own.load(Ordering::Relaxed).saturating_add(self.reported);
        (rows as f64 + 1.0) * self.latency().estimate(now, usual)
    }

    fn latency(&self) -> MutexGuard<'_, PeakEwma> {
        self.incarnation.latency.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What groups like these take to answer (seconds): the median of those that have been measured, the lower one of two.
pub(crate) fn usual(routes: &[&Arc<Route>]) -> f64 {
    let mut measured: Vec<f64> = routes.iter().filter_map(|route| route.latency().measured()).collect();
    if measured.is_empty() {
        return LATENCY_DEFAULT;
    }
    let middle = (measured.len() - 1) / 2;
    *measured.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// Work that a group holds for this gateway.
#[derive(Debug)]
pub(crate) struct Lease {
    own: Arc<AtomicU64>,
    rows: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.own.fetch_sub(self.rows, Ordering::Relaxed);
    }
}
