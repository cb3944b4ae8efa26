//! Settings of a worker, as written and as validated.

use serde::Deserialize;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;
use unmask_engine::{Limits, LoadOptions};
use unmask_proto::controllers::{Controllers, is_host_port};
use unmask_proto::network::Network;
use unmask_proto::tls::{Links, RawTls};

/// Longest wait at shutdown for requests to finish, when nothing else is configured.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// A reader that takes nothing for this long loses its request's pages until it goes on, when nothing else is
/// configured.
pub const PREEMPT_LIMIT: Duration = Duration::from_secs(5);
/// A reader that takes nothing for this long is given up, when nothing else is configured.
pub const STALL_LIMIT: Duration = Duration::from_secs(60);
/// Memory for keys and values, when nothing else is configured (bytes).
pub const KV_BYTES: u64 = 1 << 30;
/// Longest drain or stall limit that may be configured.
const LIMIT_MAX: Duration = Duration::from_secs(24 * 3600);

/// Settings as written in a file. Unknown keys are errors.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    /// Folder of the model, for a worker that is a group of its own.
    pub model: Option<PathBuf>,
    /// What a worker of the pool offers; it serves what it is assigned.
    pub pool: Option<RawPool>,
    /// host:port of the controller, or of its replicas with commas between.
    pub controller: Option<String>,
    /// Stable name of this worker; default: its endpoint.
    pub worker_id: Option<String>,
    /// host:port under which gateways reach it; default: the address it listens on.
    pub advertise: Option<String>,
    /// Threads of the forward pass; default: all cores.
    pub threads: Option<usize>,
    /// Most rows of one step.
    pub rows_max: Option<u32>,
    /// Most requests that hold key/value pages.
    pub active_max: Option<usize>,
    /// Most requests that wait for them.
    pub queue_max: Option<usize>,
    /// Memory for keys and values (bytes).
    pub kv_bytes: Option<u64>,
    /// Longest wait at shutdown for requests to finish (milliseconds).
    pub drain_limit_ms: Option<u64>,
    /// A reader that takes nothing for this long loses its request's pages until it goes on (milliseconds).
    pub preempt_limit_ms: Option<u64>,
    /// A reader that takes nothing for this long is given up (milliseconds).
    pub stall_limit_ms: Option<u64>,
    /// Folder to keep measured step times in; default: unmask/profiles under the user's cache folder.
    pub profile_dir: Option<PathBuf>,
    /// Ranks that share the model as threads of this worker: 1, 2, 4 or 8.
    pub tensor_parallel: Option<usize>,
    /// host:port of every rank that shares the model as a process of its own; this worker's comes first.
    pub rank_addresses: Option<Vec<String>>,
    /// Incarnation of the group of processes; default 1.
    pub epoch: Option<u64>,
    /// Certificates; without them links are plain.
    pub tls: Option<RawTls>,
    /// Plain links may leave this machine: everybody on the network is trusted.
    pub insecure: Option<bool>,
}

/// What a worker of the pool offers, as written.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPool {
    /// Memory for weights, keys and values (bytes); default: this machine's.
    pub memory_bytes: Option<u64>,
    /// Ranks of a group share a zone; default: the empty one.
    pub zone: Option<String>,
    /// host:port to listen on for other ranks; default: a free port of the address the worker listens on.
    pub rank_listen: Option<String>,
    /// host:port at which other ranks reach it; default: the address it listens on for them.
    pub rank_advertise: Option<String>,
}

/// What a worker of the pool offers: place for one rank.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pool {
    /// Memory for weights, keys and values (bytes).
    pub memory_bytes: u64,
    /// Ranks of a group share a zone.
    pub zone: String,
    /// host:port to listen on for other ranks; `None` takes a free port of the address the worker listens on.
    pub rank_listen: Option<String>,
    /// host:port at which other ranks reach it; `None` takes the address it listens on for them.
    pub rank_advertise: Option<String>,
}

/// What a worker is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// A group of its own, with the model it brings.
    Model {
        /// The model's folder.
        dir: PathBuf,
        /// The ranks that share it.
        ranks: Ranks,
    },
    /// One rank of whatever it is assigned.
    Pool(Pool),
}

/// The ranks that share a worker's model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ranks {
    /// This worker alone.
    One,
    /// So many threads of it.
    Threads(usize),
    /// Processes.
    Processes {
        /// host:port of every rank, this worker's first.
        addresses: Vec<String>,
        /// Incarnation of the group.
        epoch: u64,
    },
}

/// Validated settings.
#[derive(Debug, Clone)]
pub struct Config {
    /// What it is.
    pub role: Role,
    /// How to load a model; of the pool, all but type and share.
    pub load: LoadOptions,
    /// The controller's replicas.
    pub controllers: Controllers,
    /// The way to them.
    pub network: Network,
    /// Certificates, for whoever binds the socket.
    pub links: Links,
    /// Stable name of this worker; `None` takes its endpoint.
    pub worker_id: Option<String>,
    /// host:port under which gateways reach it; `None` takes the address it listens on.
    pub advertise: Option<String>,
    /// Most rows of one step.
    pub rows_max: u32,
    /// Most requests that hold key/value pages.
    pub active_max: usize,
    /// Most requests that wait for them.
    pub queue_max: usize,
    /// Memory for keys and values (bytes); at least one page and at most what `active_max` full contexts can use
    /// is taken.
    pub kv_bytes: u64,
    /// Longest wait at shutdown for requests to finish.
    pub drain_limit: Duration,
    /// A reader that takes nothing for this long loses its request's pages until it goes on.
    pub preempt_limit: Duration,
    /// A reader that takes nothing for this long is given up.
    pub stall_limit: Duration,
    /// Folder to keep measured step times in; `None` measures none.
    pub profile_dir: Option<PathBuf>,
}

/// Everything wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}", .0.join("; "))]
pub struct ConfigError(pub Vec<String>);

impl Config {
    /// The default settings for a worker with a model of its own.
    pub fn new(dir: PathBuf, controllers: Controllers) -> Self {
        Self::of(Role::Model { dir, ranks: Ranks::One }, controllers)
    }

    /// The default settings of a role.
    pub fn of(role: Role, controllers: Controllers) -> Self {
        let limits = Limits::default();
        Self {
            role,
            load: LoadOptions::default(),
            controllers,
            network: Network::default(),
            links: Links::default(),
            worker_id: None,
            advertise: None,
            rows_max: limits.rows_max,
            active_max: limits.active_max,
            queue_max: limits.queue_max,
            kv_bytes: KV_BYTES,
            drain_limit: DRAIN_LIMIT,
            preempt_limit: PREEMPT_LIMIT,
            stall_limit: STALL_LIMIT,
            profile_dir: None,
        }
    }

    /// The endpoint to tell the controller, for a worker that listens on `listening`.
    ///
    /// # Errors
    /// When it listens on every address, none of which says how it is reached, and `advertise` is not set.
    pub fn endpoint(&self, listening: SocketAddr) -> Result<String, ConfigError> {
        match &self.advertise {
            Some(endpoint) => Ok(endpoint.clone()),
            None if listening.ip().is_unspecified() => Err(ConfigError(vec![format!(
                "advertise: is needed when listening on {listening}: give the host:port gateways reach this worker at"
            )])),
            None => Ok(listening.to_string()),
        }
    }
}

impl TryFrom<RawConfig> for Config {
    type Error = ConfigError;

    fn try_from(raw: RawConfig) -> Result<Self, ConfigError> {
        let mut errors = Vec::new();
        let mut require = |ok: bool, message: String| {
            if !ok {
                errors.push(message);
            }
        };
        let controllers = Controllers::parse(&raw.controller.unwrap_or_default());
        let wrong = controllers.as_ref().err().map(|error| format!("controller: {error}"));
        require(wrong.is_none(), wrong.unwrap_or_default());
        let (role, problems) = role(raw.model, raw.pool, (raw.tensor_parallel, raw.rank_addresses, raw.epoch));
        problems.into_iter().for_each(|problem| require(false, problem));
        let mut config = Self::of(role, controllers.unwrap_or_default());
        if let Some(advertise) = &raw.advertise {
            require(is_host_port(advertise), format!("advertise: must be host:port, is `{advertise}`"));
        }
        config.advertise = raw.advertise;
        require(raw.worker_id.as_deref() != Some(""), "worker_id: must not be empty".into());
        config.worker_id = raw.worker_id;
        if let Some(threads) = raw.threads {
            require(threads > 0, "threads: must be at least 1".into());
            config.load.threads = threads;
        }
        config.rows_max = raw.rows_max.unwrap_or(config.rows_max);
        require(config.rows_max >= 8, format!("rows_max: must be at least 8, is {}", config.rows_max));
        config.active_max = raw.active_max.unwrap_or(config.active_max);
        require(config.active_max > 0, "active_max: must be at least 1".into());
        config.queue_max = raw.queue_max.unwrap_or(config.queue_max);
        require(config.queue_max > 0, "queue_max: must be at least 1".into());
        config.kv_bytes = raw.kv_bytes.unwrap_or(config.kv_bytes);
        require(config.kv_bytes > 0, "kv_bytes: must be at least 1".into());
        let drain = raw.drain_limit_ms.map_or(config.drain_limit, Duration::from_millis);
        let preempt = raw.preempt_limit_ms.map_or(config.preempt_limit, Duration::from_millis);
        let stall = raw.stall_limit_ms.map_or(config.stall_limit, Duration::from_millis);
        for (key, limit) in [("drain_limit_ms", drain), ("preempt_limit_ms", preempt), ("stall_limit_ms", stall)] {
            require(limit <= LIMIT_MAX, format!("{key}: must be at most {}", LIMIT_MAX.as_millis()));
        }
        // Only gateways ask a worker, and they have certificates.
        match Links::new(raw.tls, raw.insecure, true) {
            Ok(links) => (config.network, config.links) = (links.network(), links),
            Err(problems) => problems.into_iter().for_each(|problem| require(false, problem)),
        }
        config.profile_dir = raw.profile_dir.or_else(default_profile_dir);
        (config.drain_limit, config.preempt_limit, config.stall_limit) = (drain, preempt, stall);
        if errors.is_empty() { Ok(config) } else { Err(ConfigError(errors)) }
    }
}

type RawRanks = (Option<usize>, Option<Vec<String>>, Option<u64>);

/// Checks what the worker is; all that is wrong.
fn role(model: Option<PathBuf>, pool: Option<RawPool>, raw: RawRanks) -> (Role, Vec<String>) {
    let mut problems = Vec::new();
    let shared = raw.0.is_some() || raw.1.is_some();
    let ranks = ranks(raw).unwrap_or_else(|problem| {
        problems.push(problem);
        Ranks::One
    });
    let Some(raw) = pool else {
        if model.is_none() {
            problems.push("model: is missing, give the model's folder, or pool".into());
        }
        return (Role::Model { dir: model.unwrap_or_default(), ranks }, problems);
    };
    if model.is_some() {
        problems.push("model: cannot be given with pool: a worker of the pool serves what it is assigned".into());
    }
    if shared {
        problems.push("tensor_parallel: cannot be given with pool: say it of the model (unmask apply)".into());
    }
    for (key, address) in [("rank_listen", &raw.rank_listen), ("rank_advertise", &raw.rank_advertise)] {
        let listens = key == "rank_listen";
        let ok = |text: &str| is_host_port(text) || (listens && text.ends_with(":0") && text.len() > 2);
        if let Some(bad) = address.as_deref().filter(|address| !ok(address)) {
            problems.push(format!("pool.{key}: must be host:port, is `{bad}`"));
        }
    }
    let memory_bytes = raw.memory_bytes.unwrap_or_else(total_memory);
    let zone = raw.zone.unwrap_or_default();
    let RawPool { rank_listen, rank_advertise, .. } = raw;
    (Role::Pool(Pool { memory_bytes, zone, rank_listen, rank_advertise }), problems)
}

/// This machine's memory (bytes); 0 where the system does not say.
fn total_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).map_or(0, |kib| kib << 10)
}

/// Checks how the model is shared.
fn ranks((threads, addresses, epoch): RawRanks) -> Result<Ranks, String> {
    let known = |count: usize| [1, 2, 4, 8].contains(&count);
    match (threads, addresses) {
        (Some(_), Some(_)) => Err("tensor_parallel: cannot be given with rank_addresses".into()),
        (Some(count), None) if !known(count) => Err(format!("tensor_parallel: must be 1, 2, 4 or 8, is {count}")),
        (Some(1) | None, None) => Ok(Ranks::One),
        (Some(count), None) => Ok(Ranks::Threads(count)),
        (None, Some(addresses)) if !known(addresses.len()) => {
            Err(format!("rank_addresses: must be 1, 2, 4 or 8, are {}", addresses.len()))
        }
        (None, Some(addresses)) => match addresses.iter().find(|address| !is_host_port(address)) {
            Some(bad) => Err(format!("rank_addresses: must be host:port, one is `{bad}`")),
            None => Ok(Ranks::Processes { addresses, epoch: epoch.unwrap_or(1) }),
        },
    }
}

/// unmask/profiles under the user's cache folder; `None` where there is no such folder.
pub fn default_profile_dir() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    Some(cache.or_else(home)?.join("unmask/profiles"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn all_errors_come_at_once_with_their_keys() {
        let raw: RawConfig = serde_json::from_str(
            r#"{"controller": "here", "threads": 0, "rows_max": 1, "kv_bytes": 0,
            "tensor_parallel": 3, "tls": {"cert": "a", "key": "b"}}"#,
        )
        .unwrap();
        let ConfigError(errors) = Config::try_from(raw).unwrap_err();
        let keys: Vec<_> = errors.iter().filter_map(|error| error.split(':').next()).collect();
        assert_eq!(keys, ["controller", "tensor_parallel", "model", "threads", "rows_max", "kv_bytes", "tls.ca"]);
        assert!(serde_json::from_str::<RawConfig>(r#"{"modle": "x"}"#).unwrap_err().to_string().contains("modle"));
    }

    #[test]
    fn a_worker_of_the_pool_brings_no_model() {
        let parse = |json: &str| Config::try_from(serde_json::from_str::<RawConfig>(json).unwrap());
        let config = parse(r#"{"controller": "c:1", "pool": {"memory_bytes": 7, "zone": "a", "rank_listen": "h:0"}}"#);
        let pool = Pool { memory_bytes: 7, zone: "a".into(), rank_listen: Some("h:0".into()), rank_advertise: None };
        assert_eq!(config.unwrap().role, Role::Pool(pool));
        let both =
            parse(r#"{"controller": "c:1", "model": "m", "tensor_parallel": 2, "pool": {"rank_advertise": "h"}}"#);
        let ConfigError(errors) = both.unwrap_err();
        let keys: Vec<_> = errors.iter().filter_map(|error| error.split(':').next()).collect();
        assert_eq!(keys, ["model", "tensor_parallel", "pool.rank_advertise"]);
    }

    #[test]
    fn an_unspecified_address_needs_an_advertised_one() {
        let mut config = Config::new("m".into(), Controllers::parse("c:1").unwrap());
        assert_eq!(config.endpoint("127.0.0.1:70".parse().unwrap()).unwrap(), "127.0.0.1:70");
        assert!(config.endpoint("0.0.0.0:70".parse().unwrap()).is_err());
        config.advertise = Some("worker-3:70".into());
        assert_eq!(config.endpoint("0.0.0.0:70".parse().unwrap()).unwrap(), "worker-3:70");
    }
}
