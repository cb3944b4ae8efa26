//! Settings of a controller, as written and as validated.

use crate::store::{RawStoreTls, StoreTls, StoreUrl};
use serde::Deserialize;
use std::time::Duration;
use thiserror::Error;
use unmask_proto::controllers::is_host_port;
use unmask_proto::network::Network;
use unmask_proto::tls::{Links, RawTls};

/// Members silent for this long are taken out of the routes.
pub const MEMBER_TTL: Duration = Duration::from_secs(5);
/// How often loads in the routes are refreshed and silence is looked for, at most; see [`Config::tick`].
pub const TICK: Duration = Duration::from_secs(1);
/// Shortest time-to-live that may be configured.
const MEMBER_TTL_MIN: Duration = Duration::from_millis(100);
/// Longest time-to-live that may be configured.
const MEMBER_TTL_MAX: Duration = Duration::from_secs(600);

/// Settings as written in a file. Unknown keys are errors.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    /// `embedded:FOLDER` or `etcd://HOST:PORT`.
    pub store: Option<String>,
    /// host:port at which workers, gateways and other replicas reach this one; default: the address it listens on.
    pub advertise: Option<String>,
    /// Milliseconds of silence after which a member leaves the routes; default 5000.
    pub member_ttl_ms: Option<u64>,
    /// How the link to etcd is protected; plain where absent.
    pub store_tls: Option<RawStoreTls>,
    /// Certificates; without them links are plain.
    pub tls: Option<RawTls>,
    /// Plain links may leave this machine: everybody on the network is trusted.
    pub insecure: Option<bool>,
}

/// Validated settings.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where epochs and groups are kept.
    pub store: StoreUrl,
    /// How the link to etcd is protected; plain where absent.
    pub store_tls: Option<StoreTls>,
    /// Certificates, for whoever binds the socket.
    pub links: Links,
    /// The way to workers.
    pub network: Network,
    /// host:port at which this replica is reached; `None` takes the address it listens on.
    pub advertise: Option<String>,
    /// Members silent for this long leave the routes; also the grace after a start.
    pub member_ttl: Duration,
}

/// Everything wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}", .0.join("; "))]
pub struct ConfigError(pub Vec<String>);

impl Config {
    /// The default settings over `store`.
    pub fn new(store: StoreUrl) -> Self {
        let (links, network) = (Links::default(), Network::default());
        Self { store, store_tls: None, links, network, advertise: None, member_ttl: MEMBER_TTL }
    }

    /// How often the state is looked over: often enough to notice silence soon after the time-to-live.
    pub fn tick(&self) -> Duration {
        TICK.min(self.member_ttl / 5)
    }
}

impl TryFrom<RawConfig> for Config {
    type Error = ConfigError;

    fn try_from(raw: RawConfig) -> Result<Self, ConfigError> {
        let mut errors = Vec::new();
        let store = match raw.store.as_deref().map(str::parse::<StoreUrl>) {
            Some(Ok(store)) => Some(store),
            Some(Err(error)) => {
                errors.push(format!("store: {error}"));
                None
            }
            None => {
                errors.push("store: is missing, give embedded:FOLDER".into());
                None
            }
        };
        if let Some(bad) = raw.advertise.as_deref().filter(|address| !is_host_port(address)) {
            errors.push(format!("advertise: must be host:port, is `{bad}`"));
        }
        let member_ttl = raw.member_ttl_ms.map_or(MEMBER_TTL, Duration::from_millis);
        if !(MEMBER_TTL_MIN..=MEMBER_TTL_MAX).contains(&member_ttl) {
            errors.push(format!(
                "member_ttl_ms: must be from {} to {}, is {}",
                MEMBER_TTL_MIN.as_millis(),
                MEMBER_TTL_MAX.as_millis(),
                member_ttl.as_millis()
            ));
        }
        let store_tls = raw.store_tls.map(StoreTls::read).transpose().unwrap_or_else(|problems| {
            errors.extend(problems);
            None
        });
        if store_tls.is_some() && !matches!(store, Some(StoreUrl::Etcd(_)) | None) {
            errors.push("store_tls: is for etcd, the store is a folder".into());
        }
        // Workers, gateways and those who steer have certificates.
        let links = Links::new(raw.tls, raw.insecure, true).unwrap_or_else(|problems| {
            errors.extend(problems);
            Links::default()
        });
        match store {
            Some(store) if errors.is_empty() => {
                Ok(Self { store, store_tls, network: links.network(), links, advertise: raw.advertise, member_ttl })
            }
            _ => Err(ConfigError(errors)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn all_errors_come_at_once_with_their_keys() {
        let json = r#"{"store": "consul:1", "member_ttl_ms": 1, "tls": {"cert": "a", "key": "b"},
            "store_tls": {"ca": "/nowhere", "key": "c"}}"#;
        let raw: RawConfig = serde_json::from_str(json).unwrap();
        let ConfigError(errors) = Config::try_from(raw).unwrap_err();
        let keys: Vec<_> = errors.iter().filter_map(|error| error.split(':').next()).collect();
        assert_eq!(keys, ["store", "member_ttl_ms", "store_tls.ca", "store_tls.key", "store_tls.cert", "tls.ca"]);
        let raw = r#"{"store": "embedded:/a", "store_tls": {}}"#;
        let ConfigError(errors) = Config::try_from(serde_json::from_str::<RawConfig>(raw).unwrap()).unwrap_err();
        assert!(errors.len() == 1 && errors[0].starts_with("store_tls: "), "{errors:?}");
    }

    #[test]
    fn unknown_keys_are_refused_by_name() {
        let error = serde_json::from_str::<RawConfig>(r#"{"ttl": 1}"#).unwrap_err();
        assert!(error.to_string().contains("ttl"), "{error}");
    }
}
