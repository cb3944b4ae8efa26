#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::disk::{LOG, REWRITTEN};
use super::*;
use crate::store::log::MAGIC;
use crate::store::{Expected, KEY_BYTES_MAX, VALUE_BYTES_MAX};
use std::fs;
use tempfile::TempDir;

async fn put(store: &Embedded, key: &str, value: &str) -> Revision {
    let expected = match store.get(key).await.unwrap() {
        Some(entry) => Expected::Revision(entry.revision),
        None => Expected::Absent,
    };
    store.put(Put::new(key, expected, Some(value.into()))).await.unwrap()
}

async fn all(store: &Embedded) -> Vec<(String, Entry)> {
    store.range("").await.unwrap().entries
}

async fn open(folder: &TempDir) -> Embedded {
    Embedded::open(folder.path().join("store")).await.unwrap()
}

#[tokio::test]
async fn entries_and_revisions_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    put(&store, "a", "1").await;
    let gone = put(&store, "b", "2").await;
    let last = store.put(Put::new("b", Expected::Revision(gone), None)).await.unwrap();
    let before = all(&store).await;
    drop(store);
    let store = open(&folder).await;
    assert_eq!(all(&store).await, before);
    assert!(put(&store, "c", "3").await > last);
}

#[tokio::test]
async fn a_second_opener_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let second = Embedded::open(folder.path().join("store")).await;
    assert!(matches!(second, Err(StoreError::Locked(_))), "{second:?}");
    drop(store);
    open(&folder).await;
}

#[tokio::test]
async fn a_log_torn_at_any_byte_opens_with_every_whole_record() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let log = folder.path().join("store").join(LOG);
    // (length, entries) after each write
    let mut states = vec![(fs::metadata(&log).unwrap().len(), all(&store).await)];
    for (key, value) in [("a", "1"), ("b", "22"), ("a", "333"), ("c", "4")] {
        put(&store, key, value).await;
        states.push((fs::metadata(&log).unwrap().len(), all(&store).await));
    }
    drop(store);
    let whole = fs::read(&log).unwrap();
    for cut in 0..=whole.len() {
        for tail in [&[][..], &[0; 40][..]] {
            fs::write(&log, [&whole[..cut], tail].concat()).unwrap();
            let store = open(&folder).await;
            let expected = states.iter().rev().find(|(length, _)| *length <= cut as u64).map(|(_, e)| e.clone());
            assert_eq!(all(&store).await, expected.unwrap_or_default(), "cut at {cut}");
            // It goes on: a write after the cut survives.
            put(&store, "d", "4").await;
            let before = all(&store).await;
            drop(store);
            assert_eq!(all(&open(&folder).await).await, before, "cut at {cut}");
        }
    }
}

#[tokio::test]
async fn damage_before_the_end_is_an_error_not_a_loss() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let log = folder.path().join("store").join(LOG);
    put(&store, "a", "1").await;
    let first = fs::metadata(&log).unwrap().len() as usize;
    put(&store, "b", "2").await;
    drop(store);
    let whole = fs::read(&log).unwrap();
    for at in MAGIC.len()..first {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        fs::write(&log, bytes).unwrap();
        let opened = Embedded::open(folder.path().join("store")).await;
        assert!(matches!(opened, Err(StoreError::Damaged { .. })), "byte {at}: {opened:?}");
    }
    fs::write(&log, b"something else").unwrap();
    assert!(matches!(Embedded::open(folder.path().join("store")).await, Err(StoreError::Damaged { .. })));
}

#[tokio::test]
async fn a_long_log_is_rewritten_and_keeps_entries_and_revisions() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let store = Embedded::open_with(path.clone(), 2000).await.unwrap();
    put(&store, "kept", "x").await;
    let mut last = Revision(0);
    for i in 0..200 {
        last = put(&store, "counter", &i.to_string()).await;
    }
    last = last.max(store.put(Put::new("counter", Expected::Revision(last), None)).await.unwrap());
    assert!(fs::metadata(path.join(LOG)).unwrap().len() < 4000);
    drop(store);
    let store = Embedded::open_with(path.clone(), 2000).await.unwrap();
    assert_eq!(all(&store).await.len(), 1);
    assert!(put(&store, "next", "y").await > last);
    drop(store);
    // A rewrite that never reached its rename is dropped.
    fs::write(path.join(REWRITTEN), b"half").unwrap();
    let store = Embedded::open_with(path.clone(), 2000).await.unwrap();
    assert_eq!(all(&store).await.len(), 2);
    assert!(!path.join(REWRITTEN).exists());
}

#[tokio::test]
async fn keys_and_values_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder).await;
    let long = "k".repeat(KEY_BYTES_MAX + 1);
    assert!(matches!(
        store.put(Put::new(long.as_str(), Expected::Absent, None)).await,
        Err(StoreError::TooLarge { .. })
    ));
    let value = Some(vec![0; VALUE_BYTES_MAX + 1]);
    assert!(matches!(store.put(Put::new("a", Expected::Absent, value)).await, Err(StoreError::TooLarge { .. })));
    put(&store, "a", &"v".repeat(VALUE_BYTES_MAX)).await;
}
