//! Stands in for etcd in a build without the cargo feature `etcd`: there is no value of it.

use super::{Changes, Entry, LeaseId, Listing, Put, Revision, Store, StoreError, StoreTls};
use std::convert::Infallible;
use std::time::Duration;

/// Never made.
#[derive(Debug, Clone)]
pub struct Etcd(Infallible);

impl Etcd {
    /// Says that this build has none.
    ///
    /// # Errors
    /// [`StoreError::NoEtcd`].
    pub async fn open(url: &str, _: Option<&StoreTls>) -> Result<Self, StoreError> {
        Err(StoreError::NoEtcd(url.to_owned()))
    }
}

impl Store for Etcd {
    fn exclusive(&self) -> bool {
        match self.0 {}
    }

    async fn get(&self, _: &str) -> Result<Option<Entry>, StoreError> {
        match self.0 {}
    }

    async fn range(&self, _: &str) -> Result<Listing, StoreError> {
        match self.0 {}
    }

    async fn put(&self, _: Put) -> Result<Revision, StoreError> {
        match self.0 {}
    }

    async fn grant(&self, _: Duration) -> Result<LeaseId, StoreError> {
        match self.0 {}
    }

    async fn renew(&self, _: LeaseId) -> Result<(), StoreError> {
        match self.0 {}
    }

    async fn revoke(&self, _: LeaseId) -> Result<(), StoreError> {
        match self.0 {}
    }

    fn watch(&self, _: &str, _: Revision) -> Changes {
        match self.0 {}
    }
}
