//! Certificates and authorities that are in force, and following their files.

use super::accept::Protocol;
use super::material::{Files, Material};
use super::{TlsConfig, TlsError};
use rustls::{ClientConfig, ServerConfig};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

/// How often the files are looked at.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// What this process shows and whom it trusts, as of now. Clones share it.
///
/// New files take the place of everything at once: no session of before is resumed, so that whoever is no longer trusted does
/// not come back by one. Connections that are open stay.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    config: TlsConfig,
    current: RwLock<Current>,
}

struct Current {
    /// As last looked at, in force or not.
    seen: Files,
    material: Arc<Material>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// Every file that cannot be read, or is not what it should be.
    pub fn load(config: TlsConfig) -> Result<Self, Vec<TlsError>> {
        let seen = Files::read(&config)?;
        let material = Arc::new(Material::new(&config, &seen)?);
        Ok(Self(Arc::new(Inner { config, current: RwLock::new(Current { seen, material }) })))
    }

    /// Looks at the files, and takes what is new; whether there was something.
    ///
    /// # Errors
    /// As [`Tls::load`]; what was in force stays. Contents that cannot be used are an error once.
    pub fn reload(&self) -> Result<bool, Vec<TlsError>> {
        let files = Files::read(&self.0.config)?;
        if self.0.current.read().unwrap_or_else(PoisonError::into_inner).seen == files {
            return Ok(false);
        }
        let made = Material::new(&self.0.config, &files);
        let mut current = self.0.current.write().unwrap_or_else(PoisonError::into_inner);
        current.seen = files;
        current.material = Arc::new(made?);
        Ok(true)
    }

    /// Reloads every [`RELOAD_INTERVAL`] for as long as it is polled. It reads the files instead of asking for their
    /// times: they are small, and times say nothing of one that was moved there with an old one.
    pub async fn follow(self) {
        let mut ticks = interval(RELOAD_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let tls = self.clone();
            match tokio::task::spawn_blocking(move || tls.reload()).await {
                Ok(Ok(true)) => tracing::info!("took new certificates; open connections keep the old ones"),
                Ok(Ok(false)) => {}
                Ok(Err(errors)) => {
                    for error in errors {
                        tracing::error!(%error, "the certificates of before stay in force");
                    }
                }
                Err(error) => tracing::error!(%error, "looking at certificates"),
            }
        }
    }

    fn material(&self) -> Arc<Material> {
        Arc::clone(&self.0.current.read().unwrap_or_else(PoisonError::into_inner).material)
    }

    pub(super) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.material().client)
    }

    /// None without a certificate.
    pub(super) fn server(&self, protocol: Protocol) -> Option<Arc<ServerConfig>> {
        let material = self.material();
        match protocol {
            Protocol::Grpc => material.http_2.clone(),
            Protocol::Http => material.http_1.clone(),
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Tls").field(&self.0.config).finish()
    }
}
