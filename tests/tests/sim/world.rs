//! A cluster of real services on simulated hosts.

use crate::client::{Clients, Wish};
use crate::host::{Host, Main, ticks};
use crate::network::{HostId, Network, address};
use crate::plan::Plan;
use crate::{operator, store, trace};
use futures::FutureExt as _;
use std::cell::RefCell;
use std::future::pending;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use unmask_engine::Load;
use unmask_proto::controllers::Controllers;
use unmask_worker::simulated::{self, Loaded, StepCost};

thread_local! {
    static LOADED: RefCell<Option<Loaded>> = const { RefCell::new(None) };
}

/// The model of all workers: loaded once on each thread.
pub fn loaded() -> Loaded {
    LOADED.with_borrow_mut(|loaded| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/sdar");
        loaded.get_or_insert_with(|| Loaded::read(&folder).unwrap()).clone()
    })
}

/// What a host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Controller,
    Worker,
    Gateway,
    Client,
}

pub struct World {
    pub network: Network,
    pub store: store::Shared,
    pub hosts: Vec<Host>,
    pub now: u64,
    /// Hosts to start again, and when.
    pub restarts: Vec<(u64, HostId)>,
}

impl World {
    pub fn new(plan: &Plan) -> Self {
        let network = Network::new(plan.seed, plan.latency_max);
        let store = store::Shared::default();
        let mut hosts = Vec::new();
        for id in 0..plan.hosts() {
            let (name, main) = match plan.role(id) {
                Role::Controller => ("controller", controller(plan, id, &network, &store)),
                Role::Worker => ("worker", worker(plan, id, &network)),
                Role::Gateway => ("gateway", gateway(plan, id, &network)),
                Role::Client => ("clients", clients(plan, id, &network)),
            };
            hosts.push(Host::new(format!("{name}-{id}"), main));
        }
        hosts.iter_mut().for_each(Host::start);
        Self { network, store, hosts, now: 0, restarts: Vec::new() }
    }

    /// One tick for everybody.
    pub fn tick(&mut self) {
        self.now += 1;
        trace::tick(self.now);
        trace::on("world");
        self.network.tick(self.now);
        self.store.tick(self.now);
        let due: Vec<_> = self.restarts.extract_if(.., |(at, _)| *at <= self.now).collect();
        for (_, host) in due {
            if self.hosts[host].is_up() {
                continue;
            }
            trace::add("starts", vec![("host", self.hosts[host].name.clone())]);
            self.hosts[host].start();
            trace::on("world");
        }
        for id in 0..self.hosts.len() {
            if let Some(why) = self.hosts[id].tick() {
                trace::add("ended", vec![("why", why)]);
                self.network.down(id, false);
                self.restarts.push((self.now + ticks(crate::plan::SUPERVISOR), id));
            }
        }
    }

    /// Ends everything.
    pub fn end(mut self) {
        self.hosts.iter_mut().for_each(Host::kill);
    }
}

fn controllers(plan: &Plan) -> Controllers {
    let all: Vec<_> = plan.of(Role::Controller).map(address).collect();
    Controllers::parse(&all.join(",")).unwrap()
}

fn controller(plan: &Plan, id: HostId, network: &Network, store: &store::Shared) -> Main {
    let (seed, network, store) = (plan.seed, network.clone(), store.clone());
    let starts = AtomicU64::new(0);
    Box::new(move || {
        let start = starts.fetch_add(1, Ordering::Relaxed);
        let mut config = unmask_controller::Config::new("embedded:nowhere".parse().unwrap());
        config.network = network.of(id);
        let store = store.of(id, seed ^ start << 32);
        let running = unmask_controller::run_on(store, config, network.up(id), pending());
        running.map(|ended| format!("{ended:?}")).boxed()
    })
}

fn worker(plan: &Plan, id: HostId, network: &Network) -> Main {
    let loaded = loaded();
    let mut config = unmask_worker::Config::new("nowhere".into(), controllers(plan));
    config.network = network.of(id);
    config.worker_id = Some(format!("w{id}"));
    config.kv_bytes = loaded.page_bytes() * plan.pages;
    config.active_max = plan.active_max;
    config.queue_max = 64;
    config.drain_limit = std::time::Duration::from_millis(plan.drain_ms);
    let cost = StepCost { base: plan.step_base, per_row: plan.step_row };
    let network = network.clone();
    Box::new(move || {
        let running = simulated::run(loaded.clone(), cost, pages_are_back, config.clone(), network.up(id), pending());
        running.map(|ended| format!("{ended:?}")).boxed()
    })
}

/// I7.
fn pages_are_back(load: Load) {
    let idle = load.active == 0;
    if load.free_pages > load.total_pages || (idle && load.free_pages != load.total_pages) {
        trace::violation(format!("I7: pages are lost or shared: {load:?}"));
    }
}

fn gateway(plan: &Plan, id: HostId, network: &Network) -> Main {
    let mut config = unmask_gateway::Config::new(controllers(plan));
    config.network = network.of(id);
    config.gateway_id = format!("g{id}");
    let (network, seed, starts) = (network.clone(), plan.seed, AtomicU64::new(0));
    Box::new(move || {
        config.seed = Some(seed ^ (id as u64) << 8 ^ starts.fetch_add(1, Ordering::Relaxed) << 16);
        let running = unmask_gateway::run(config.clone(), network.up(id), pending());
        running.map(|ended| format!("{ended:?}")).boxed()
    })
}

fn clients(plan: &Plan, id: HostId, network: &Network) -> Main {
    let gateways: Vec<_> = plan.of(Role::Gateway).collect();
    let clients = Clients::new(loaded(), network.clone(), id, gateways);
    let wishes: Arc<[Wish]> = plan.wishes.clone().into();
    let orders = operator::Operator { network: network.of(id), controllers: controllers(plan) };
    let wanted = plan.orders.clone();
    Box::new(move || {
        let (clients, wishes, orders, wanted) = (clients.clone(), wishes.clone(), orders.clone(), wanted.clone());
        async move {
            for wish in wishes.iter() {
                tokio::spawn(clients.clone().ask(wish.clone()));
            }
            for (at, order) in wanted {
                tokio::spawn(orders.clone().give(at, order));
            }
            pending().await
        }
        .boxed()
    })
}
