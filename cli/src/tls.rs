//! Certificates on the command line: of those who ask, and of services.

use anyhow::Context;
use clap::Args;
use std::path::PathBuf;
use unmask_proto::network::Network;
use unmask_proto::tls::{RawTls, Tls, TlsConfig};

/// Whom a client trusts, and what it shows.
#[derive(Debug, Clone, Default, Args)]
pub struct ClientTlsArgs {
    /// PEM file of the authorities to trust under TLS; the system's where absent
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// PEM file of the certificate to show, where one is wanted
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file of its private key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
}

impl ClientTlsArgs {
    /// Whether TLS is meant where an address has no scheme.
    pub fn given(&self) -> bool {
        self.tls_ca.is_some() || self.tls_cert.is_some()
    }

    /// The way to services under TLS.
    ///
    /// # Errors
    /// Files that cannot be read, or are not what they should be.
    pub fn network(&self) -> anyhow::Result<Network> {
        let identity = self.tls_cert.clone().zip(self.tls_key.clone());
        let config = TlsConfig { identity, ca: self.tls_ca.clone(), require_client_cert: false };
        let loaded = Tls::load(config).map_err(|errors| {
            anyhow::anyhow!("{}", errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        });
        Ok(Network::tls(loaded.context("--tls-ca, --tls-cert, --tls-key")?))
    }
}

/// How a service's links are protected.
#[derive(Debug, Clone, Default, Args)]
pub struct ServiceTlsArgs {
    /// PEM file of the certificate to show: all links are under TLS then
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file of its private key
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// PEM file of the authorities to trust; the system's where absent
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// Without certificates: listen where other machines reach it too. Everybody on the network must be trusted: they
    /// can read everything, and pass for any service
    #[arg(long)]
    pub insecure: bool,
}

impl ServiceTlsArgs {
    /// Puts the flags in place of what a file says.
    pub fn over(self, tls: &mut Option<RawTls>, insecure: &mut Option<bool>) {
        if self.tls_cert.is_some() || self.tls_key.is_some() || self.tls_ca.is_some() {
            let raw = tls.get_or_insert_default();
            raw.cert = self.tls_cert.or(raw.cert.take());
            raw.key = self.tls_key.or(raw.key.take());
            raw.ca = self.tls_ca.or(raw.ca.take());
        }
        if self.insecure {
            *insecure = Some(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_go_before_the_file() {
        let named = |name: &str| Some(PathBuf::from(name));
        let flags = ServiceTlsArgs { tls_cert: named("flag"), insecure: true, ..ServiceTlsArgs::default() };
        let file = RawTls { cert: named("file"), key: named("key"), require_client_cert: Some(false), ca: None };
        let (mut tls, mut insecure) = (Some(file.clone()), None);
        ServiceTlsArgs::default().over(&mut tls, &mut insecure);
        assert_eq!((tls.as_ref(), insecure), (Some(&file), None));
        flags.over(&mut tls, &mut insecure);
        assert_eq!((tls, insecure), (Some(RawTls { cert: named("flag"), ..file }), Some(true)));
    }
}
