//! What the controller keeps in the store: its term, the epoch floor, and the groups.
//!
//! Every write compares revisions, so a second controller on the same store makes this one's writes fail.

use crate::core::Fact;
use crate::store::{Entry, Expected, Put, Revision, Store, StoreError};
use std::collections::{BTreeMap, HashMap};

const TERM: &str = "controller/term";
const EPOCH_FLOOR: &str = "controller/epoch_floor";
const GROUPS: &str = "groups/";

/// What an earlier run left.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    /// No epoch up to this one may be handed out again.
    pub epoch_floor: u64,
    /// Worker to group.
    pub groups: BTreeMap<String, String>,
}

/// The store, with the revisions this controller last saw.
pub(crate) struct Ledger<S> {
    store: S,
    term: u64,
    revisions: HashMap<String, Revision>,
}

impl<S: Store> Ledger<S> {
    /// Reads what an earlier run left and begins a term above its.
    pub(crate) async fn open(store: S) -> Result<(Self, Recovered), StoreError> {
        let term = store.get(TERM).await?;
        let floor = store.get(EPOCH_FLOOR).await?;
        let groups = store.range(GROUPS).await?.entries;
        let mut ledger =
            Self { store, term: number(TERM, term.as_ref())?.saturating_add(1), revisions: HashMap::new() };
        let known = [(TERM, &term), (EPOCH_FLOOR, &floor)];
        for (key, entry) in known {
            if let Some(entry) = entry {
                ledger.revisions.insert(key.to_owned(), entry.revision);
            }
        }
        let mut recovered = Recovered { epoch_floor: number(EPOCH_FLOOR, floor.as_ref())?, groups: BTreeMap::new() };
        for (key, entry) in groups {
            let group = String::from_utf8(entry.value)
                .map_err(|error| StoreError::Value { key: key.clone(), why: error.to_string() })?;
            recovered.groups.insert(key[GROUPS.len()..].to_owned(), group);
            ledger.revisions.insert(key, entry.revision);
        }
        let term = ledger.term.to_string();
        ledger.write(TERM, Some(term)).await?;
        Ok((ledger, recovered))
    }

    /// Number of this controller's leadership.
    pub(crate) fn term(&self) -> u64 {
        self.term
    }

    /// Stores a fact durably.
    pub(crate) async fn record(&mut self, fact: &Fact) -> Result<(), StoreError> {
        match fact {
            Fact::EpochFloor(epoch) => self.write(EPOCH_FLOOR, Some(epoch.to_string())).await,
            Fact::Group { worker_id, group_id } => {
                self.write(&format!("{GROUPS}{worker_id}"), Some(group_id.clone())).await
            }
            Fact::NoGroup { worker_id } => {
                let key = format!("{GROUPS}{worker_id}");
                if self.revisions.contains_key(&key) { self.write(&key, None).await } else { Ok(()) }
            }
        }
    }

    async fn write(&mut self, key: &str, value: Option<String>) -> Result<(), StoreError> {
        let expected = self.revisions.get(key).map_or(Expected::Absent, |revision| Expected::Revision(*revision));
        let deletes = value.is_none();
        let revision = self.store.put(Put::new(key, expected, value.map(String::into_bytes))).await?;
        if deletes {
            self.revisions.remove(key);
        } else {
            self.revisions.insert(key.to_owned(), revision);
        }
        Ok(())
    }
}

fn number(key: &str, entry: Option<&Entry>) -> Result<u64, StoreError> {
    let Some(entry) = entry else { return Ok(0) };
    let text = String::from_utf8_lossy(&entry.value);
    text.parse().map_err(|_| StoreError::Value { key: key.to_owned(), why: format!("`{text}` is not a number") })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::store::Embedded;

    #[tokio::test]
    async fn terms_rise_and_facts_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let open = || async { Ledger::open(Embedded::open(folder.path().join("s")).await.unwrap()).await.unwrap() };
        let (mut ledger, recovered) = open().await;
        assert_eq!((ledger.term(), recovered.epoch_floor), (1, 0));
        let group = |id: &str| Fact::Group { worker_id: id.into(), group_id: format!("group-{id}") };
        for fact in [group("a"), group("b"), Fact::EpochFloor(1), Fact::EpochFloor(7)] {
            ledger.record(&fact).await.unwrap();
        }
        for _ in 0..2 {
            ledger.record(&Fact::NoGroup { worker_id: "b".into() }).await.unwrap();
        }
        drop(ledger);
        let (ledger, recovered) = open().await;
        assert_eq!((ledger.term(), recovered.epoch_floor), (2, 7));
        assert_eq!(recovered.groups, BTreeMap::from([("a".into(), "group-a".into())]));
    }

    #[tokio::test]
    async fn a_deposed_controller_cannot_write() {
        let folder = tempfile::tempdir().unwrap();
        let store = Embedded::open(folder.path().join("s")).await.unwrap();
        let (mut old, _) = Ledger::open(store.clone()).await.unwrap();
        old.record(&Fact::EpochFloor(1)).await.unwrap();
        let (mut new, _) = Ledger::open(store).await.unwrap();
        new.record(&Fact::EpochFloor(2)).await.unwrap();
        assert!(matches!(old.record(&Fact::EpochFloor(3)).await, Err(StoreError::Conflict { .. })));
    }
}
