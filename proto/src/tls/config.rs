//! Settings of TLS, as written and as validated.

use serde::Deserialize;
use std::path::PathBuf;

/// The table `[tls]` of a service's file. Unknown keys are errors.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawTls {
    /// PEM file of the certificate that this process shows, as a server and as a client; intermediate ones follow it.
    pub cert: Option<PathBuf>,
    /// PEM file of its private key.
    pub key: Option<PathBuf>,
    /// PEM file of the authorities that this process trusts; the system's where absent.
    pub ca: Option<PathBuf>,
    /// Whether whoever connects must show a certificate of these authorities.
    pub require_client_cert: Option<bool>,
}

/// Validated settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// PEM files of the certificate that this process shows and of its private key; a service needs them.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// PEM file of the authorities that this process trusts; the system's where absent.
    pub ca: Option<PathBuf>,
    /// Whether whoever connects must show a certificate of these authorities.
    pub require_client_cert: bool,
}

impl RawTls {
    /// Checks the settings of a service; `require_client_cert` holds where the file says nothing.
    ///
    /// # Errors
    /// All that is wrong, each with its key.
    pub fn validate(self, require_client_cert: bool) -> Result<TlsConfig, Vec<String>> {
        let mut errors = Vec::new();
        if self.cert.is_none() {
            errors.push("tls.cert: is missing, give the PEM file of this service's certificate".into());
        }
        if self.key.is_none() {
            errors.push("tls.key: is missing, give the PEM file of the certificate's private key".into());
        }
        let require_client_cert = self.require_client_cert.unwrap_or(require_client_cert);
        if require_client_cert && self.ca.is_none() {
            errors.push(
                "tls.ca: is missing, give the PEM file of the authority whose certificates clients must show, or \
                 tls.require_client_cert = false"
                    .into(),
            );
        }
        match self.cert.zip(self.key) {
            Some(identity) if errors.is_empty() => {
                Ok(TlsConfig { identity: Some(identity), ca: self.ca, require_client_cert })
            }
            _ => Err(errors),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn all_errors_come_at_once_with_their_keys() {
        let errors = RawTls::default().validate(true).unwrap_err();
        let keys: Vec<_> = errors.iter().filter_map(|error| error.split(':').next()).collect();
        assert_eq!(keys, ["tls.cert", "tls.key", "tls.ca"]);
        let named = |name: &str| Some(PathBuf::from(name));
        let raw = RawTls { cert: named("c"), key: named("k"), ..RawTls::default() };
        assert_eq!(raw.clone().validate(true).unwrap_err().len(), 1);
        let config = raw.clone().validate(false).unwrap();
        assert_eq!(config.identity, Some(("c".into(), "k".into())));
        let mutual = RawTls { ca: named("a"), require_client_cert: Some(true), ..raw };
        assert!(mutual.validate(false).unwrap().require_client_cert);
    }
}
