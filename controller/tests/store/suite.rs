//! What every store must do.

use futures::StreamExt as _;
use std::collections::BTreeMap;
use std::time::Duration;
use unmask_controller::store::{
    Change, Changes, Entry, Expected, Guard, KEY_BYTES_MAX, LeaseId, Put, Revision, Store, StoreError, VALUE_BYTES_MAX,
};

/// Bounds every wait: far beyond what anything takes.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Of leases: the shortest that etcd grants with its default settings.
pub const TTL: Duration = Duration::from_secs(2);

/// Runs the suite; every part has keys of its own.
pub async fn all(store: &impl Store) {
    compare_and_put(store).await;
    ranges(store).await;
    keys_and_values_are_bounded(store).await;
    races_have_one_winner_each(store).await;
    guards(store).await;
    leases(store).await;
    watches(store).await;
    listing_and_watching_misses_nothing(store).await;
}

async fn value(store: &impl Store, key: &str) -> Option<Vec<u8>> {
    store.get(key).await.unwrap().map(|entry| entry.value)
}

/// Writes, whatever is there.
pub async fn put(store: &impl Store, key: &str, value: &str) -> Revision {
    let expected = match store.get(key).await.unwrap() {
        Some(entry) => Expected::Revision(entry.revision),
        None => Expected::Absent,
    };
    store.put(Put::new(key, expected, Some(value.into()))).await.unwrap()
}

async fn delete(store: &impl Store, key: &str) -> Revision {
    let entry = store.get(key).await.unwrap().unwrap();
    store.put(Put::new(key, Expected::Revision(entry.revision), None)).await.unwrap()
}

pub async fn put_leased(store: &impl Store, key: &str, lease: LeaseId) -> Revision {
    store.put(Put::new(key, Expected::Absent, Some(b"leased".to_vec())).leased(lease)).await.unwrap()
}

/// So many changes.
pub async fn read(changes: &mut Changes, count: usize) -> Vec<Change> {
    let mut seen = Vec::new();
    while seen.len() < count {
        seen.extend(tokio::time::timeout(LIMIT, changes.next()).await.expect("changes come").unwrap().unwrap());
    }
    assert_eq!(seen.len(), count, "{seen:?}");
    seen
}

/// Waits until the key is gone.
pub async fn gone(store: &impl Store, key: &str) {
    let listing = store.range(key).await.unwrap();
    let mut changes = store.watch(key, Revision(listing.revision.0 + 1));
    if store.get(key).await.unwrap().is_some() {
        let seen = read(&mut changes, 1).await;
        assert_eq!((seen[0].key.as_str(), &seen[0].entry), (key, &None));
    }
    assert_eq!(value(store, key).await, None);
}

/// A watch from `from` says that it cannot.
pub async fn compacted(store: &impl Store, from: Revision) {
    let first = tokio::time::timeout(LIMIT, store.watch("", from).next()).await.unwrap();
    assert!(matches!(first, Some(Err(StoreError::Compacted(_)))), "{first:?}");
}

async fn compare_and_put(store: &impl Store) {
    let write = |expected, value: Option<&str>| store.put(Put::new("cas", expected, value.map(Into::into)));
    let first = write(Expected::Absent, Some("1")).await.unwrap();
    let refused = write(Expected::Absent, Some("2")).await;
    assert!(matches!(refused, Err(StoreError::Conflict { found, .. }) if found == Some(first)), "{refused:?}");
    let second = write(Expected::Revision(first), Some("2")).await.unwrap();
    assert!(second > first);
    assert!(matches!(write(Expected::Revision(first), None).await, Err(StoreError::Conflict { .. })));
    let entry = store.get("cas").await.unwrap().unwrap();
    assert_eq!(entry, Entry { revision: second, created: first, value: b"2".to_vec() });
    write(Expected::Revision(second), None).await.unwrap();
    assert_eq!(store.get("cas").await.unwrap(), None);
    assert!(matches!(write(Expected::Revision(second), None).await, Err(StoreError::Conflict { found: None, .. })));
    let again = write(Expected::Absent, Some("3")).await.unwrap();
    assert_eq!(store.get("cas").await.unwrap().unwrap().created, again);
}

async fn ranges(store: &impl Store) {
    for key in ["range/b/2", "range/a/1", "range/b/1", "range/c", "range/b"] {
        put(store, key, key).await;
    }
    let listing = store.range("range/b/").await.unwrap();
    let keys: Vec<_> = listing.entries.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["range/b/1", "range/b/2"]);
    assert!(listing.entries.iter().all(|(_, entry)| entry.revision <= listing.revision));
    assert!(store.range("nothing").await.unwrap().entries.is_empty());
}

async fn keys_and_values_are_bounded(store: &impl Store) {
    let long = Put::new("k".repeat(KEY_BYTES_MAX + 1), Expected::Absent, None);
    assert!(matches!(store.put(long).await, Err(StoreError::TooLarge { .. })));
    let large = Put::new("large", Expected::Absent, Some(vec![0; VALUE_BYTES_MAX + 1]));
    assert!(matches!(store.put(large).await, Err(StoreError::TooLarge { .. })));
    put(store, "large", &"v".repeat(VALUE_BYTES_MAX)).await;
    assert_eq!(value(store, "large").await.unwrap().len(), VALUE_BYTES_MAX);
}

async fn races_have_one_winner_each(store: &impl Store) {
    const WRITERS: usize = 8;
    const ROUNDS: usize = 10;
    put(store, "race", "0").await;
    let count = async || {
        let mut won = 0;
        while won < ROUNDS {
            let entry = store.get("race").await.unwrap().unwrap();
            let next = String::from_utf8(entry.value).unwrap().parse::<usize>().unwrap() + 1;
            let write = Put::new("race", Expected::Revision(entry.revision), Some(next.to_string().into()));
            match store.put(write).await {
                Ok(_) => won += 1,
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    };
    futures::future::join_all((0..WRITERS).map(|_| count())).await;
    assert_eq!(value(store, "race").await.unwrap(), (WRITERS * ROUNDS).to_string().into_bytes());
}

async fn guards(store: &impl Store) {
    let created = put(store, "guard", "me").await;
    let guard = Guard { key: "guard".into(), created };
    let write = |value: &str| Put::new("guarded", Expected::Absent, Some(value.into())).guarded(&guard);
    let revision = store.put(write("1")).await.unwrap();
    // Another value of the key is the same holder.
    put(store, "guard", "still me").await;
    store.put(Put { expected: Expected::Revision(revision), ..write("2") }).await.unwrap();
    delete(store, "guard").await;
    assert!(matches!(store.put(write("3")).await, Err(StoreError::Deposed(key)) if key == "guard"));
    put(store, "guard", "somebody else").await;
    assert!(matches!(store.put(write("3")).await, Err(StoreError::Deposed(_))));
    assert_eq!(value(store, "guarded").await, Some(b"2".to_vec()));
}

async fn leases(store: &impl Store) {
    let (kept, lost, ended) =
        (store.grant(TTL).await.unwrap(), store.grant(TTL).await.unwrap(), store.grant(TTL).await.unwrap());
    for (key, lease) in [("lease/kept", kept), ("lease/lost", lost), ("lease/ended", ended)] {
        put_leased(store, key, lease).await;
    }
    store.revoke(ended).await.unwrap();
    assert_eq!(value(store, "lease/ended").await, None);
    store.revoke(ended).await.unwrap();
    let refused = store.put(Put::new("lease/late", Expected::Absent, Some(Vec::new())).leased(ended)).await;
    assert!(matches!(refused, Err(StoreError::LeaseGone)), "{refused:?}");
    // Renewed for longer than it would have lasted.
    let renewing = async {
        loop {
            store.renew(kept).await.unwrap();
            tokio::time::sleep(TTL / 4).await;
        }
    };
    tokio::select! {
        () = renewing => {}
        () = gone(store, "lease/lost") => {}
    }
    assert!(matches!(store.renew(lost).await, Err(StoreError::LeaseGone)));
    assert!(value(store, "lease/kept").await.is_some());
    gone(store, "lease/kept").await;
}

async fn watches(store: &impl Store) {
    let from = Revision(put(store, "watch/a", "1").await.0);
    let mut both = [store.watch("watch/", from), store.watch("watch/", Revision(from.0 + 1))];
    put(store, "elsewhere", "x").await;
    let second = put(store, "watch/a", "2").await;
    let third = delete(store, "watch/a").await;
    let seen = read(&mut both[0], 3).await;
    assert_eq!(seen.iter().map(|change| change.revision).collect::<Vec<_>>(), [from, second, third]);
    let entry = Entry { revision: second, created: from, value: b"2".to_vec() };
    assert_eq!(seen[1], Change { key: "watch/a".into(), revision: second, entry: Some(entry) });
    assert_eq!(seen[2].entry, None);
    assert_eq!(read(&mut both[1], 2).await, seen[1..]);
}

/// A view made of a listing and the changes after it is what the store has, whoever writes meanwhile.
async fn listing_and_watching_misses_nothing(store: &impl Store) {
    const WRITES: usize = 100;
    let writing = async {
        for number in 0..WRITES {
            put(store, &format!("view/{}", number % 7), &number.to_string()).await;
        }
        put(store, "view/last", "x").await;
    };
    let viewing = async {
        let listing = store.range("view/").await.unwrap();
        let mut view: BTreeMap<String, Entry> = listing.entries.into_iter().collect();
        let mut changes = store.watch("view/", Revision(listing.revision.0 + 1));
        let mut last = listing.revision;
        while !view.contains_key("view/last") {
            for change in tokio::time::timeout(LIMIT, changes.next()).await.unwrap().unwrap().unwrap() {
                assert!(change.revision > last, "in order, once");
                last = change.revision;
                view.insert(change.key, change.entry.unwrap());
            }
        }
        view
    };
    let ((), view) = futures::join!(writing, viewing);
    let now: BTreeMap<String, Entry> = store.range("view/").await.unwrap().entries.into_iter().collect();
    assert_eq!(view, now);
}
