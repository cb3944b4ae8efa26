//! One suite for every implementation of the store: a folder, and a real etcd.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[cfg(feature = "etcd")]
mod etcd;
#[cfg(feature = "etcd")]
mod etcd_tls;
mod suite;

use unmask_controller::store::{Embedded, Revision, Store, StoreError};

#[tokio::test]
async fn embedded() {
    let folder = tempfile::tempdir().unwrap();
    suite::all(&Embedded::open(folder.path().join("store")).await.unwrap()).await;
}

#[tokio::test]
async fn embedded_leases_get_a_full_time_to_live_when_it_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let store = Embedded::open(path.clone()).await.unwrap();
    let lease = store.grant(suite::TTL).await.unwrap();
    suite::put_leased(&store, "key", lease).await;
    let kept = store.get("key").await.unwrap();
    drop(store);
    let store = Embedded::open(path).await.unwrap();
    assert_eq!(store.get("key").await.unwrap(), kept);
    store.renew(lease).await.unwrap();
    suite::gone(&store, "key").await;
    assert!(matches!(store.renew(lease).await, Err(StoreError::LeaseGone)));
}

#[tokio::test]
async fn embedded_forgets_changes_when_it_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    suite::put(&Embedded::open(path.clone()).await.unwrap(), "a", "1").await;
    let store = Embedded::open(path).await.unwrap();
    suite::compacted(&store, Revision(1)).await;
    let listing = store.range("").await.unwrap();
    suite::put(&store, "b", "2").await;
    let seen = suite::read(&mut store.watch("", Revision(listing.revision.0 + 1)), 1).await;
    assert_eq!(seen[0].key, "b");
}
