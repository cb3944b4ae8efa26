//! Settings of a gateway, as written and as validated.

use crate::admission::Limits;
use crate::stack::ANSWER_LIMIT;
use crate::tenants::{RawTenant, Tenants};
use serde::Deserialize;
use std::time::Duration;
use thiserror::Error;
use unmask_proto::controllers::Controllers;
use unmask_proto::network::Network;
use unmask_proto::tls::{Links, RawTls};

/// What may be under way and wait, when nothing else is configured: as many rows as 512 streams of 16384 have.
pub const ADMISSION: Limits =
    Limits { rows_max: 8 << 20, streams_max: 512, queue_max: 512, queue_wait: Duration::from_secs(30) };
/// Longest wait at shutdown for streams to finish, when nothing else is configured.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// A client that takes nothing for this long is given up, when nothing else is configured.
pub const STALL_LIMIT: Duration = Duration::from_secs(60);
/// A stream whose group is lost waits this long for one, when nothing else is configured.
pub const GROUP_WAIT: Duration = Duration::from_secs(30);
/// Most streams that may be configured: what workers take on one connection.
const STREAMS_LIMIT: usize = 1024;
/// Most rows that may be under way, and most requests that may wait.
const ROWS_LIMIT: u64 = 1 << 40;
const QUEUE_LIMIT: usize = 1024;
/// Longest of these limits that may be configured.
const LIMIT_MAX: Duration = Duration::from_secs(24 * 3600);

/// Settings as written in a file. Unknown keys are errors.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    /// host:port of the controller, or of its replicas with commas between.
    pub controller: Option<String>,
    /// host:port of the OpenAI-compatible HTTP interface; none when absent.
    pub http: Option<String>,
    /// Name of this gateway in the controller's logs; drawn when absent.
    pub gateway_id: Option<String>,
    /// Most streams under way; more wait.
    pub streams_max: Option<usize>,
    /// Rows of work under way from which on requests wait: prompts and the most they may generate counted.
    pub rows_max: Option<u64>,
    /// Most requests that wait; 0 refuses at once.
    pub queue_max: Option<usize>,
    /// Longest wait of a request (milliseconds).
    pub queue_wait_ms: Option<u64>,
    /// Longest wait at shutdown for streams to finish (milliseconds).
    pub drain_limit_ms: Option<u64>,
    /// A client that takes nothing for this long is given up (milliseconds).
    pub stall_limit_ms: Option<u64>,
    /// A stream whose group is lost waits this long for one (milliseconds).
    pub group_wait_ms: Option<u64>,
    /// Certificates; without them links are plain.
    pub tls: Option<RawTls>,
    /// Plain links may leave this machine: everybody on the network is trusted.
    pub insecure: Option<bool>,
    /// Who may ask, with which keys and how much; everybody where there are none.
    #[serde(default)]
    pub tenants: Vec<RawTenant>,
}

/// Validated settings.
#[derive(Debug, Clone)]
pub struct Config {
    /// The controller's replicas.
    pub controllers: Controllers,
    /// The way to them and to workers.
    pub network: Network,
    /// Certificates, for whoever binds the sockets.
    pub links: Links,
    /// host:port of the HTTP interface, for whoever binds its socket: see [`crate::Listeners`].
    pub http: Option<String>,
    /// Name of this gateway in the controller's logs.
    pub gateway_id: String,
    /// What may be under way and wait.
    pub admission: Limits,
    /// Longest wait at shutdown for streams to finish.
    pub drain_limit: Duration,
    /// A client that takes nothing for this long is given up.
    pub stall_limit: Duration,
    /// A stream whose group is lost waits this long for one, or until its deadline.
    pub group_wait: Duration,
    /// Who may ask.
    pub tenants: Tenants,
    /// What is drawn follows from it; `None` draws from the system's randomness.
    pub seed: Option<u64>,
}

/// Everything wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}", .0.join("; "))]
pub struct ConfigError(pub Vec<String>);

impl Config {
    /// The default settings for a controller.
    pub fn new(controllers: Controllers) -> Self {
        Self {
            controllers,
            network: Network::default(),
            links: Links::default(),
            http: None,
            gateway_id: uuid::Uuid::new_v4().to_string(),
            admission: ADMISSION,
            drain_limit: DRAIN_LIMIT,
            stall_limit: STALL_LIMIT,
            group_wait: GROUP_WAIT,
            tenants: Tenants::default(),
            seed: None,
        }
    }
}

impl TryFrom<RawConfig> for Config {
    type Error = ConfigError;

    fn try_from(raw: RawConfig) -> Result<Self, ConfigError> {
        let mut errors = Vec::new();
        let controllers = Controllers::parse(&raw.controller.unwrap_or_default());
        if let Err(error) = &controllers {
            errors.push(format!("controller: {error}"));
        }
        let mut config = Config::new(controllers.unwrap_or_default());
        if let Some(http) = raw.http {
            // Port 0 takes a free one.
            if !http.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) {
                errors.push(format!("http: must be host:port, is `{http}`"));
            }
            config.http = Some(http);
        }
        if let Some(id) = raw.gateway_id {
            if id.is_empty() {
                errors.push("gateway_id: is empty: give a name or leave it out".into());
            }
            config.gateway_id = id;
        }
        let admission = &mut config.admission;
        let mut within = |key: &str, value: u64, least: u64, most: u64| {
            if !(least..=most).contains(&value) {
                errors.push(format!("{key}: must be from {least} to {most}, is {value}"));
            }
        };
        if let Some(streams) = raw.streams_max {
            within("streams_max", streams as u64, 1, STREAMS_LIMIT as u64);
            admission.streams_max = streams;
        }
        if let Some(rows) = raw.rows_max {
            within("rows_max", rows, 1, ROWS_LIMIT);
            admission.rows_max = rows;
        }
        if let Some(queue) = raw.queue_max {
            within("queue_max", queue as u64, 0, QUEUE_LIMIT as u64);
            admission.queue_max = queue;
        }
        if let Some(millis) = raw.queue_wait_ms {
            // By then the call is given up anyway.
            within("queue_wait_ms", millis, 1, ANSWER_LIMIT.as_millis() as u64);
            admission.queue_wait = Duration::from_millis(millis);
        }
        let limits = [
            ("drain_limit_ms", raw.drain_limit_ms, &mut config.drain_limit),
            ("stall_limit_ms", raw.stall_limit_ms, &mut config.stall_limit),
            ("group_wait_ms", raw.group_wait_ms, &mut config.group_wait),
        ];
        for (key, millis, limit) in limits {
            let Some(millis) = millis else { continue };
            *limit = Duration::from_millis(millis);
            if *limit > LIMIT_MAX {
                errors.push(format!("{key}: must be at most {}, is {millis}", LIMIT_MAX.as_millis()));
            }
        }
        if config.stall_limit.is_zero() {
            errors.push("stall_limit_ms: must be at least 1, is 0".into());
        }
        // Clients have keys (tenants), seldom certificates.
        match Links::new(raw.tls, raw.insecure, false) {
            Ok(links) => (config.network, config.links) = (links.network(), links),
            Err(problems) => errors.extend(problems),
        }
        match Tenants::new(raw.tenants) {
            Ok(tenants) => config.tenants = tenants,
            Err(problems) => errors.extend(problems),
        }
        if errors.is_empty() { Ok(config) } else { Err(ConfigError(errors)) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn parse(json: &str) -> Result<Config, ConfigError> {
        Config::try_from(serde_json::from_str::<RawConfig>(json).unwrap())
    }

    #[test]
    fn all_errors_come_at_once_with_their_keys() {
        let json = r#"{"controller": "host", "http": "7780", "gateway_id": "", "streams_max": 0, "rows_max": 0,
            "queue_max": 9999, "queue_wait_ms": 0, "drain_limit_ms": 1000000000000,
            "stall_limit_ms": 0, "tls": {"cert": "a"}}"#;
        let errors = parse(json).unwrap_err().0;
        let keys: Vec<_> = errors.iter().map(|error| error.split(':').next().unwrap()).collect();
        let admission = ["streams_max", "rows_max", "queue_max", "queue_wait_ms"];
        assert_eq!(keys[..3], ["controller", "http", "gateway_id"]);
        assert_eq!(keys[3..7], admission);
        assert_eq!(keys[7..], ["drain_limit_ms", "stall_limit_ms", "tls.key"]);
    }

    #[test]
    fn what_is_not_said_is_the_default() {
        let config = parse(r#"{"controller": "localhost:7", "gateway_id": "g"}"#).unwrap();
        let default = Config::new(Controllers::parse("localhost:7").unwrap());
        assert_eq!((config.controllers, config.gateway_id.as_str()), (default.controllers, "g"));
        assert_eq!((config.admission, config.group_wait), (default.admission, default.group_wait));
        let error = serde_json::from_str::<RawConfig>(r#"{"port": 1}"#).unwrap_err();
        assert!(error.to_string().contains("port"), "{error}");
    }
}
