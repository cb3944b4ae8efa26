//! Which groups serve which model: the controller's table, and how much of our own work each group holds.

use crate::circuit::Circuit;
use crate::dice::Dice;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Code, Status};
use unmask_proto::rich::{self, Violation};
use unmask_proto::v1::{self, ModelDescriptor, ModelPolicy, WatchRoutesResponse};
use unmask_proto::watch;

/// Most routes that are taken from a table.
const ROUTES_MAX: usize = 4096;
/// Most models remembered after their last group left.
const KNOWN_MODELS_MAX: usize = 1024;
/// When a request for a model without a ready group may be tried again.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A group that is ready for requests.
#[derive(Debug)]
pub(crate) struct Route {
    pub group: String,
    pub epoch: u64,
    /// host:port of its worker.
    pub endpoint: String,
    pub model: Arc<ModelDescriptor>,
    /// Rows of work it reported.
    reported: u64,
    /// Rows of work this gateway has given it.
    own: Arc<AtomicU64>,
    circuit: Arc<Circuit>,
}

impl Route {
    /// It took a request.
    pub(crate) fn answered(&self) {
        self.circuit.close();
    }

    /// It broke, or the way to it did.
    pub(crate) fn broke(&self) {
        self.circuit.open(Instant::now());
    }

    /// Counts `rows` as outstanding until the lease is dropped.
    pub(crate) fn lease(&self, rows: u64) -> Lease {
        self.own.fetch_add(rows, Ordering::Relaxed);
        Lease { own: Arc::clone(&self.own), rows }
    }

    fn load(&self) -> u64 {
        self.own.load(Ordering::Relaxed).saturating_add(self.reported)
    }
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

/// The last table the controller sent.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub routes: Vec<Arc<Route>>,
    /// Settings of requests that name none, by model.
    policies: HashMap<String, ModelPolicy>,
    /// Models that have or had a ready group.
    known: BTreeSet<String>,
    dice: Arc<Dice>,
}

impl Table {
    /// The next table. Counts of own work carry over, so do the circuits of unchanged groups and the names of models.
    fn next(&self, table: WatchRoutesResponse) -> Table {
        let known: HashMap<&str, &Arc<Route>> = self.routes.iter().map(|r| (r.group.as_str(), r)).collect();
        let routes: Vec<_> =
            table.routes.into_iter().take(ROUTES_MAX).filter_map(|route| read(route, &known)).collect();
        let mut known: BTreeSet<String> = routes.iter().map(|route: &Arc<Route>| route.model.name.clone()).collect();
        let room = KNOWN_MODELS_MAX.saturating_sub(known.len());
        let earlier: Vec<_> = self.known.difference(&known).take(room).cloned().collect();
        known.extend(earlier);
        let policies = table.policies.into_iter().map(|policy| (policy.model.clone(), policy)).collect();
        Table { routes, policies, known, dice: Arc::clone(&self.dice) }
    }

    /// The controller's settings for a model; `None` leaves it to the model.
    pub(crate) fn policy(&self, model: &str) -> Option<&ModelPolicy> {
        self.policies.get(model)
    }

    /// Ready models by name, with the number of their groups that do not fail at present.
    pub(crate) fn models(&self) -> Vec<v1::Model> {
        let mut models: Vec<v1::Model> = Vec::new();
        for route in &self.routes {
            let ready = u32::from(route.circuit.is_closed());
            match models.iter_mut().find(|model| model.name == route.model.name) {
                Some(model) => model.ready_groups += ready,
                None => models.push(v1::Model {
                    name: route.model.name.clone(),
                    descriptor: Some(ModelDescriptor::clone(&route.model)),
                    ready_groups: ready,
                }),
            }
        }
        models.sort_by(|a, b| a.name.cmp(&b.name));
        models
    }

    /// A group for a request, among those that `wanted` admits: one whose circuit is due for a probe, which the request
    /// then is, else as [`Table::choose`].
    pub(crate) fn pick(&self, now: Instant, wanted: impl Fn(&Route) -> bool) -> Option<Arc<Route>> {
        let probe = self.routes.iter().find(|route| wanted(route) && route.circuit.probe(now));
        probe.map(Arc::clone).or_else(|| self.choose(wanted))
    }

    /// Among groups that `wanted` admits the less loaded of two drawn among those with a closed circuit ("power of two
    /// choices"), else of two drawn among all.
    fn choose(&self, wanted: impl Fn(&Route) -> bool) -> Option<Arc<Route>> {
        let mut candidates: Vec<_> = self.routes.iter().filter(|route| wanted(route)).collect();
        if candidates.iter().any(|route| route.circuit.is_closed()) {
            candidates.retain(|route| route.circuit.is_closed());
        }
        let draw = || candidates.get(self.dice.index(0..candidates.len()));
        let (first, second) = (draw()?, draw()?);
        Some(Arc::clone(if second.load() < first.load() { second } else { first }))
    }

    /// A group for a model by name; an empty name stands for the only model.
    ///
    /// # Errors
    /// NOT_FOUND with the known models; UNAVAILABLE when the model has no ready group at present;
    /// INVALID_ARGUMENT when the name is empty and there are several.
    pub(crate) fn model(&self, name: &str) -> Result<Arc<Route>, Status> {
        let mut ready: Vec<&str> = self.routes.iter().map(|route| route.model.name.as_str()).collect();
        ready.sort_unstable();
        ready.dedup();
        let name = match (name, ready.as_slice()) {
            ("", []) => return Err(not_ready("no model has a ready group")),
            ("", [only]) => only,
            ("", _) => {
                let description = format!("is empty, but several models are served: name one of {}", ready.join(", "));
                return Err(rich::invalid(&[Violation::new("model", description)]));
            }
            (name, _) => name,
        };
        if let Some(route) = self.choose(|route| route.model.name == name) {
            return Ok(route);
        }
        if self.known.contains(name) {
            return Err(not_ready(&format!("model `{name}` has no ready group at present")));
        }
        if self.known.is_empty() {
            return Err(not_ready("no model has a ready group"));
        }
        let known: Vec<_> = self.known.iter().map(String::as_str).collect();
        let message = format!("no model `{name}`; known models: {}", known.join(", "));
        Err(rich::status(Code::NotFound, "UNKNOWN_MODEL", message))
    }
}

fn not_ready(message: &str) -> Status {
    rich::retryable(Code::Unavailable, "NO_GROUP", message, RETRY_AFTER)
}

fn read(route: v1::Route, known: &HashMap<&str, &Arc<Route>>) -> Option<Arc<Route>> {
    let Some(descriptor) = route.descriptor else {
        tracing::warn!(group = route.group_id, "a route without a descriptor is left out");
        return None;
    };
    let known = known.get(route.group_id.as_str());
    let own = known.map_or_else(Default::default, |known| Arc::clone(&known.own));
    // Another epoch is another incarnation: what broke is gone.
    let same = known.filter(|known| known.epoch == route.epoch && known.endpoint == route.endpoint);
    let circuit = same.map_or_else(Default::default, |same| Arc::clone(&same.circuit));
    let name = if route.model.is_empty() { descriptor.name } else { route.model };
    Some(Arc::new(Route {
        group: route.group_id,
        epoch: route.epoch,
        endpoint: route.endpoint,
        model: Arc::new(ModelDescriptor { name, ..descriptor }),
        reported: route.outstanding_rows,
        own,
        circuit,
    }))
}

/// The current table, for everybody.
#[derive(Debug)]
pub(crate) struct Routes(watch::Sender<Arc<Table>>);

impl Routes {
    /// No routes yet.
    pub(crate) fn new(dice: Arc<Dice>) -> Self {
        Self(watch::Sender::new(Arc::new(Table { dice, ..Table::default() })))
    }

    /// The last table.
    pub(crate) fn table(&self) -> Arc<Table> {
        Arc::clone(&self.0.borrow())
    }

    /// Sees every table from now on.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Table>> {
        self.0.subscribe()
    }

    /// Takes a new table.
    pub(crate) fn replace(&self, table: WatchRoutesResponse) {
        self.0.send_modify(|current| *current = Arc::new(current.next(table)));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn route(model: &str, group: &str, reported: u64) -> v1::Route {
        v1::Route {
            model: model.into(),
            group_id: group.into(),
            epoch: 1,
            endpoint: "127.0.0.1:1".into(),
            descriptor: Some(ModelDescriptor { name: model.into(), ..Default::default() }),
            outstanding_rows: reported,
        }
    }

    fn table(routes: Vec<v1::Route>) -> WatchRoutesResponse {
        WatchRoutesResponse { term: 1, revision: 1, routes, policies: Vec::new() }
    }

    #[test]
    fn models_are_found_listed_remembered_and_refused() {
        let routes = Routes::new(Arc::default());
        assert_eq!(routes.table().model("a").unwrap_err().code(), Code::Unavailable);
        routes.replace(table(vec![route("a", "1", 0)]));
        assert_eq!(routes.table().model("").unwrap().model.name, "a");
        routes.replace(table(vec![route("a", "1", 0), route("b", "2", 0), route("b", "3", 0)]));
        assert_eq!(routes.table().model("").unwrap_err().code(), Code::InvalidArgument);
        let listed: Vec<_> = routes.table().models().into_iter().map(|m| (m.name, m.ready_groups)).collect();
        assert_eq!(listed, [("a".into(), 1), ("b".into(), 2)]);
        let unknown = routes.table().model("c").unwrap_err();
        assert_eq!((unknown.code(), unknown.message()), (Code::NotFound, "no model `c`; known models: a, b"));
        routes.replace(table(vec![]));
        assert_eq!(routes.table().model("b").unwrap_err().code(), Code::Unavailable);
        assert_eq!(routes.table().model("c").unwrap_err().code(), Code::NotFound);
    }

    #[test]
    fn the_less_loaded_of_two_is_taken_and_own_work_counts_until_it_ends() {
        let routes = Routes::new(Arc::default());
        routes.replace(table(vec![route("a", "1", 5), route("a", "2", 0)]));
        let busy = routes.table().choose(|route| route.group == "2").unwrap();
        let lease = busy.lease(100);
        // The counts carry over to later tables.
        routes.replace(table(vec![route("a", "2", 0), route("a", "1", 5)]));
        let count = |group: &str| {
            (0..400).filter(|_| routes.table().choose(|_| true).is_some_and(|route| route.group == group)).count()
        };
        // The busier one is taken only when both draws give it.
        assert!((40..160).contains(&count("2")));
        drop(lease);
        assert!(count("2") > 240);
        assert!(routes.table().choose(|_| false).is_none());
    }

    #[test]
    fn a_group_that_broke_is_passed_over_until_its_next_epoch_or_when_there_is_no_other() {
        let routes = Routes::new(Arc::default());
        routes.replace(table(vec![route("a", "1", 0), route("a", "2", 0)]));
        let taken = |group: &str| {
            (0..100).filter(|_| routes.table().choose(|_| true).is_some_and(|route| route.group == group)).count()
        };
        routes.table().choose(|route| route.group == "1").unwrap().broke();
        assert_eq!(taken("1"), 0);
        assert_eq!(routes.table().models()[0].ready_groups, 1);
        // The same incarnation stays what it was, and is better than none.
        routes.replace(table(vec![route("a", "1", 0), route("a", "2", 0)]));
        assert_eq!(taken("1"), 0);
        assert!(routes.table().choose(|route| route.group == "1").is_some());
        routes.replace(table(vec![v1::Route { epoch: 2, ..route("a", "1", 0) }, route("a", "2", 0)]));
        assert!(taken("1") > 0);
    }

    #[test]
    fn only_a_request_probes_a_group_that_broke() {
        let routes = Routes::new(Arc::default());
        routes.replace(table(vec![route("a", "1", 0), route("a", "2", 0)]));
        let table = routes.table();
        table.choose(|route| route.group == "1").unwrap().broke();
        let later = Instant::now() + Duration::from_secs(1);
        // Whoever looks the model up sends nothing there.
        (0..100).for_each(|_| assert_eq!(table.model("a").unwrap().group, "2"));
        assert_eq!(table.pick(later, |_| true).unwrap().group, "1");
        (0..100).for_each(|_| assert_eq!(table.pick(later, |_| true).unwrap().group, "2"));
    }
}
