//! Which groups serve which model: the controller's table, and the choice of a group for a request.

use crate::affinity::{Prefix, acceptable};
use crate::dice::Dice;
use crate::route::{Route, usual};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};
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
    /// The next table. Counts of own work carry over, so does what was learned of unchanged groups, and the names of models.
    fn next(&self, table: WatchRoutesResponse) -> Table {
        let known: HashMap<&str, &Arc<Route>> = self.routes.iter().map(|r| (r.group.as_str(), r)).collect();
        let read = |route: v1::Route| {
            let known = known.get(route.group_id.as_str()).map(|known| known.as_ref());
            Route::read(route, known).map(Arc::new)
        };
        let routes: Vec<_> = table.routes.into_iter().take(ROUTES_MAX).filter_map(read).collect();
        let mut known: BTreeSet<String> = routes.iter().map(|route: &Arc<Route>| route.model.name.clone()).collect();
        let room = KNOWN_MODELS_MAX.saturating_sub(known.len());
        let earlier: Vec<_> = self.known.difference(&known).take(room).cloned().collect();
        known.extend(earlier);
        let policies = table.policies.into_iter().map(|policy| (policy.model.clone(), policy)).collect();
        Table { routes, policies, known, dice: Arc::clone(&self.dice) }
    }

    /// Whether a model was served and is not at present; an empty name stands for the only model.
    pub(crate) fn had(&self, name: &str) -> bool {
        let named = |known: &str| known == name || (name.is_empty() && self.known.len() == 1);
        self.known.iter().any(|known| named(known)) && !self.routes.iter().any(|route| named(&route.model.name))
    }

    /// The controller's settings for a model; `None` leaves it to the model.
    pub(crate) fn policy(&self, model: &str) -> Option<&ModelPolicy> {
        self.policies.get(model)
    }

    /// Ready models by name, with the number of their groups that do not fail at present.
    pub(crate) fn models(&self) -> Vec<v1::Model> {
        let mut models: Vec<v1::Model> = Vec::new();
        for route in &self.routes {
            let ready = u32::from(route.circuit().is_closed());
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
    pub(crate) fn pick(
        &self,
        now: Instant,
        prefix: Option<Prefix>,
        wanted: impl Fn(&Route) -> bool,
    ) -> Option<Arc<Route>> {
        let probe = self.routes.iter().find(|route| wanted(route) && route.circuit().probe(now));
        probe.map(Arc::clone).or_else(|| self.choose(now, prefix, wanted))
    }

    /// Among groups that `wanted` admits the one with the lower score of two drawn among those with a closed circuit
    /// ("power of two choices", Mitzenmacher 2001), else of two drawn among all; or the one that likely has the prefix
    /// cached, if it is not much worse.
    fn choose(&self, now: Instant, prefix: Option<Prefix>, wanted: impl Fn(&Route) -> bool) -> Option<Arc<Route>> {
        let mut candidates: Vec<_> = self.routes.iter().filter(|route| wanted(route)).collect();
        if candidates.iter().any(|route| route.circuit().is_closed()) {
            candidates.retain(|route| route.circuit().is_closed());
        }
        let usual = usual(&candidates);
        let scored = |route: &Arc<Route>| (route.score(now, usual), Arc::clone(route));
        let draw = || candidates.get(self.dice.index(0..candidates.len())).map(|route| scored(route));
        let (first, second) = (draw()?, draw()?);
        let better = if second.0 < first.0 { second } else { first };
        let preferred = prefix.and_then(|prefix| candidates.iter().max_by_key(|route| prefix.weight(route.digest)));
        let preferred = preferred.map(|route| scored(route));
        let (_, route) = preferred.filter(|(score, _)| acceptable(*score, better.0, usual)).unwrap_or(better);
        Some(route)
    }

    /// A group for a request that begins here, of whatever numerics unless it names some: later it goes on only where tokens
    /// are the same. One that reads behind the output where `between` asks for it, if any does.
    ///
    /// # Errors
    /// As [`Table::model`]; UNAVAILABLE when no group of the model has these numerics.
    pub(crate) fn some_group(
        &self,
        name: &str,
        numerics: &str,
        between: bool,
        now: Instant,
    ) -> Result<Arc<Route>, Status> {
        let name = &self.model(name)?.model.name;
        let same =
            |route: &Route| route.model.name == *name && (numerics.is_empty() || route.model.numerics_id == numerics);
        let infills =
            |route: &Route| route.model.capabilities.is_some_and(|can| can.infill.is_some() || can.infill_by_masks);
        // While versions are mixed, not every group may.
        let chosen = between && self.routes.iter().any(|route| same(route) && infills(route));
        let wanted = |route: &Route| same(route) && (!chosen || infills(route));
        // Else numerics whose groups have all failed would never be asked again.
        let due = self.routes.iter().find(|route| wanted(route) && route.circuit().is_due(now));
        due.map(Arc::clone).or_else(|| self.choose(now, None, wanted)).ok_or_else(|| {
            not_ready(&format!("model `{name}` has no ready group with the numerics of this stream at present"))
        })
    }

    /// Some group of a model by name, one that works where there is one; an empty name stands for the only model.
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
        let mut groups = self.routes.iter().filter(|route| route.model.name == name);
        let first = groups.clone().next();
        if let Some(route) = groups.find(|route| route.circuit().is_closed()).or(first) {
            return Ok(Arc::clone(route));
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

    /// Says that reported loads are old. Nobody may look idle by an old report, and all reports are equally old: every
    /// group counts as loaded as the most loaded one, so that what this gateway knows by itself decides.
    pub(crate) fn doubt_loads(&self) {
        self.0.send_if_modified(|current| {
            let most = current.routes.iter().map(|route| route.reported).max().unwrap_or_default();
            let doubtful = current.routes.iter().any(|route| route.reported != most);
            if doubtful {
                let routes = current.routes.iter().map(|route| Arc::new(route.reporting(most)));
                let (routes, policies, known) = (routes.collect(), current.policies.clone(), current.known.clone());
                *current = Arc::new(Table { routes, policies, known, dice: Arc::clone(&current.dice) });
            }
            doubtful
        });
    }

    /// Takes a new table.
    pub(crate) fn replace(&self, table: WatchRoutesResponse) {
        self.0.send_modify(|current| *current = Arc::new(current.next(table)));
    }
}

#[cfg(test)]
mod tests;
