//! How the link to etcd is protected.

use serde::Deserialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// The table `[store_tls]` of a controller's file. Unknown keys are errors.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawStoreTls {
    /// PEM file of the authorities that etcd's certificates are of; the system's where absent.
    pub ca: Option<PathBuf>,
    /// PEM file of the certificate to show etcd, where it wants one.
    pub cert: Option<PathBuf>,
    /// PEM file of its private key.
    pub key: Option<PathBuf>,
}

/// The contents of those files. etcd's client takes them once: a controller has to start anew for others.
#[derive(Clone)]
pub struct StoreTls {
    /// PEM of the authorities; the system's where absent.
    pub ca: Option<Vec<u8>>,
    /// PEM of the certificate to show, and of its private key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl StoreTls {
    /// Reads the files.
    ///
    /// # Errors
    /// All that is wrong, each with its key.
    pub fn read(raw: RawStoreTls) -> Result<Self, Vec<String>> {
        let mut errors = Vec::new();
        let mut read = |key: &str, path: Option<&Path>| {
            let path = path?;
            let read = std::fs::read(path);
            read.map_err(|error| errors.push(format!("store_tls.{key}: cannot read {}: {error}", path.display()))).ok()
        };
        let ca = read("ca", raw.ca.as_deref());
        let (cert, key) = (read("cert", raw.cert.as_deref()), read("key", raw.key.as_deref()));
        match (raw.cert, raw.key) {
            (None, Some(_)) => errors.push("store_tls.cert: is missing, there is a key".into()),
            (Some(_), None) => errors.push("store_tls.key: is missing, there is a cert".into()),
            _ => {}
        }
        if errors.is_empty() { Ok(Self { ca, identity: cert.zip(key) }) } else { Err(errors) }
    }
}

impl fmt::Debug for StoreTls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("StoreTls")
    }
}
