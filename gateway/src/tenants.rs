//! Who asks, and how much at a time: tenants by API key. A gateway without tenants lets everybody in.
//!
//! Keys are kept as digests: a configuration that leaks opens nothing. A key has 256 random bits, so a plain SHA-256 suffices.

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tonic::codegen::http::HeaderMap;
use tonic::{Code, Status};
use unmask_proto::rich;

/// Most tenants, and most keys of one.
const TENANTS_MAX: usize = 10_000;
const KEYS_MAX: usize = 16;
/// Longest name of a tenant (bytes).
const NAME_BYTES_MAX: usize = 128;
/// Largest weight of a tenant.
const WEIGHT_MAX: u32 = 1000;
/// Before a digest in the configuration.
const PREFIX: &str = "sha256:";
/// A quota of rows may be spent ahead by so much.
const BURST: Duration = Duration::from_secs(10);
/// When a tenant at its limit of streams may try again.
const RETRY_AFTER: Duration = Duration::from_millis(500);

type KeyDigest = [u8; 32];

/// A tenant as written.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawTenant {
    /// For logs.
    pub name: String,
    /// Digests of its keys, as `unmask key` prints them.
    pub keys: Vec<String>,
    /// Streams at once; default: no limit of its own.
    pub streams_max: Option<usize>,
    /// Its part of the gateway's rows while others wait too, beside theirs; default: 1.
    pub weight: Option<u32>,
    /// Rows per second, prompts and the most they may generate counted; default: no limit.
    pub rows_per_second: Option<u32>,
}

/// Everybody who may ask.
#[derive(Debug, Clone, Default)]
pub struct Tenants {
    by_key: HashMap<KeyDigest, Arc<Tenant>>,
}

/// One who may ask.
#[derive(Debug)]
pub struct Tenant {
    name: String,
    /// Keeps its cached prefixes from others.
    salt: u64,
    weight: u32,
    streams: Option<Arc<Semaphore>>,
    rows: Option<Mutex<Bucket>>,
}

/// Digest of a key as the configuration has it.
pub fn digest(key: &str) -> String {
    let hex: String = Sha256::digest(key.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}{hex}")
}

fn read(digest: &str) -> Option<KeyDigest> {
    let hex = digest.strip_prefix(PREFIX).filter(|hex| hex.len() == 64 && hex.is_ascii())?;
    let byte = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok();
    let bytes: Option<Vec<u8>> = (0..32).map(byte).collect();
    bytes?.try_into().ok()
}

impl Tenants {
    /// Checks everything.
    ///
    /// # Errors
    /// Every problem, with its key.
    pub fn new(raw: Vec<RawTenant>) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        if raw.len() > TENANTS_MAX {
            problems.push(format!("tenants: at most {TENANTS_MAX}, are {}", raw.len()));
        }
        let (mut by_key, mut names) = (HashMap::new(), std::collections::HashSet::new());
        for (i, RawTenant { name, keys, streams_max, weight, rows_per_second }) in raw.into_iter().enumerate() {
            let mut require = |ok: bool, key: &str, what: &str| {
                if !ok {
                    problems.push(format!("tenants[{i}].{key}: {what}"));
                }
            };
            require(!name.is_empty() && name.len() <= NAME_BYTES_MAX, "name", "must have 1 to 128 bytes");
            require(names.insert(name.clone()), "name", "is another tenant's too");
            require((1..=KEYS_MAX).contains(&keys.len()), "keys", "must be 1 to 16");
            require(streams_max != Some(0), "streams_max", "must be at least 1");
            let weight = weight.unwrap_or(1);
            require((1..=WEIGHT_MAX).contains(&weight), "weight", "must be 1 to 1000");
            require(rows_per_second != Some(0), "rows_per_second", "must be at least 1");
            let tenant = Arc::new(Tenant::new(name, weight, streams_max, rows_per_second));
            for key in keys {
                let digest = read(&key);
                require(digest.is_some(), "keys", "must be digests as unmask key prints them: sha256: and 64 digits");
                let fresh = digest.is_none_or(|digest| by_key.insert(digest, Arc::clone(&tenant)).is_none());
                require(fresh, "keys", "one is another tenant's too");
            }
        }
        if problems.is_empty() { Ok(Self { by_key }) } else { Err(problems) }
    }

    /// Who asks with these headers.
    ///
    /// # Errors
    /// UNAUTHENTICATED without a key that is known, where there are tenants.
    pub(crate) fn find(&self, headers: &HeaderMap) -> Result<Arc<Tenant>, Status> {
        if self.by_key.is_empty() {
            return Ok(Arc::new(Tenant::new(String::new(), 1, None, None)));
        }
        let value = headers.get("authorization").and_then(|value| value.to_str().ok());
        let key = value.and_then(|value| value.strip_prefix("Bearer ")).map(str::trim);
        let refused = |message| rich::status(Code::Unauthenticated, "API_KEY", message);
        let key = key.ok_or_else(|| refused("give an API key: authorization: Bearer KEY"))?;
        let digest: KeyDigest = Sha256::digest(key.as_bytes()).into();
        self.by_key.get(&digest).cloned().ok_or_else(|| refused("the API key is not known here"))
    }
}

impl Tenant {
    fn new(name: String, weight: u32, streams_max: Option<usize>, rows_per_second: Option<u32>) -> Self {
        let digest: KeyDigest = Sha256::digest(name.as_bytes()).into();
        let salt = if name.is_empty() { 0 } else { u64::from_le_bytes(digest[..8].try_into().unwrap_or_default()) };
        Self {
            salt,
            weight,
            streams: streams_max.map(|max| Arc::new(Semaphore::new(max))),
            rows: rows_per_second.map(|rate| Mutex::new(Bucket::new(f64::from(rate), Instant::now()))),
            name,
        }
    }

    /// Keeps its cached prefixes from others; 0 where there are no tenants.
    pub(crate) fn salt(&self) -> u64 {
        self.salt
    }

    /// Its part while others wait too.
    pub(crate) fn weight(&self) -> u32 {
        self.weight
    }

    /// Takes a stream; it counts until the permit is dropped.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED with when to try again.
    pub(crate) fn stream(&self) -> Result<Option<OwnedSemaphorePermit>, Status> {
        let Some(streams) = &self.streams else { return Ok(None) };
        Arc::clone(streams).try_acquire_owned().map(Some).map_err(|_| {
            let message = format!("`{}` has as many streams as it may have", self.name);
            rich::retryable(Code::ResourceExhausted, "TENANT_STREAMS", message, RETRY_AFTER)
        })
    }

    /// Spends rows of the quota.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED with when there will be enough.
    pub(crate) fn spend(&self, rows: u64) -> Result<(), Status> {
        let Some(bucket) = &self.rows else { return Ok(()) };
        let spent = bucket.lock().unwrap_or_else(PoisonError::into_inner).take(rows as f64, Instant::now());
        spent.map_err(|wait| {
            let message = format!("`{}` has spent its rows per second", self.name);
            rich::retryable(Code::ResourceExhausted, "TENANT_ROWS", message, wait)
        })
    }

    /// Gives back what was spent for a request that was then refused.
    pub(crate) fn refund(&self, rows: u64) {
        let Some(bucket) = &self.rows else { return };
        bucket.lock().unwrap_or_else(PoisonError::into_inner).left += rows as f64;
    }
}

/// Rows that may be spent; they come back with time.
#[derive(Debug)]
struct Bucket {
    /// Rows per second.
    rate: f64,
    /// Left at `at`. Below zero after a request larger than the burst.
    left: f64,
    at: Instant,
}

impl Bucket {
    fn new(rate: f64, now: Instant) -> Self {
        Self { rate, left: rate * BURST.as_secs_f64(), at: now }
    }

    /// Takes rows while any are left, so that a request larger than the burst is not refused for ever; else says how long
    /// until some are.
    fn take(&mut self, rows: f64, now: Instant) -> Result<(), Duration> {
        let come = self.rate * now.saturating_duration_since(self.at).as_secs_f64();
        (self.left, self.at) = ((self.left + come).min(self.rate * BURST.as_secs_f64()), now);
        let enough = rows.min(self.rate * BURST.as_secs_f64());
        if self.left < enough {
            return Err(Duration::from_secs_f64((enough - self.left) / self.rate));
        }
        self.left -= rows;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn tenant(name: &str, keys: &[&str]) -> RawTenant {
        let keys = keys.iter().map(|key| digest(key)).collect();
        RawTenant { name: name.into(), keys, streams_max: Some(1), weight: None, rows_per_second: Some(100) }
    }

    fn asked_by(key: &str) -> HeaderMap {
        HeaderMap::from_iter([("authorization".parse().unwrap(), format!("Bearer {key}").parse().unwrap())])
    }

    #[test]
    fn keys_name_tenants_and_what_is_no_key_is_refused() {
        let tenants = Tenants::new(vec![tenant("a", &["one", "two"]), tenant("b", &["three"])]).unwrap();
        let name = |headers: &HeaderMap| tenants.find(headers).map(|tenant| tenant.name.clone());
        assert_eq!(name(&asked_by("two")).unwrap(), "a");
        assert_eq!(name(&asked_by("three")).unwrap(), "b");
        for headers in [HeaderMap::new(), asked_by("four"), asked_by(""), asked_by(&digest("one"))] {
            assert_eq!(name(&headers).unwrap_err().code(), Code::Unauthenticated);
        }
        let salts = ["one", "three"].map(|key| tenants.find(&asked_by(key)).unwrap().salt());
        assert!(salts[0] != salts[1] && salts[0] != 0);
        assert_eq!(Tenants::default().find(&HeaderMap::new()).unwrap().salt(), 0);
    }

    #[test]
    fn all_problems_come_at_once() {
        let bad = RawTenant {
            name: String::new(),
            keys: vec!["secret".into()],
            streams_max: Some(0),
            weight: Some(0),
            ..tenant("", &[])
        };
        let problems = Tenants::new(vec![tenant("a", &["one"]), tenant("a", &["one"]), bad]).unwrap_err();
        for key in ["tenants[1].name", "tenants[1].keys", "tenants[2].name", "tenants[2].keys", "tenants[2].weight"] {
            assert!(problems.iter().any(|problem| problem.starts_with(key)), "{key} in {problems:?}");
        }
        assert!(!problems.join(" ").contains("secret"), "a key is not repeated");
    }

    #[test]
    fn streams_and_rows_are_bounded_and_come_back() {
        let tenants = Tenants::new(vec![tenant("a", &["one"])]).unwrap();
        let tenant = tenants.find(&asked_by("one")).unwrap();
        let held = tenant.stream().unwrap();
        assert_eq!(tenant.stream().unwrap_err().code(), Code::ResourceExhausted);
        drop(held);
        tenant.stream().unwrap();

        let now = Instant::now();
        let mut bucket = Bucket::new(100.0, now);
        bucket.take(900.0, now).unwrap();
        let wait = bucket.take(300.0, now).unwrap_err();
        assert_eq!(wait, Duration::from_secs(2));
        bucket.take(300.0, now + wait).unwrap();
        // More than the burst: once, and then the debt is worked off.
        let later = now + Duration::from_secs(100);
        bucket.take(5000.0, later).unwrap();
        assert_eq!(bucket.take(1.0, later).unwrap_err(), Duration::from_secs_f64(40.01));
    }
}
