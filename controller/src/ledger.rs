//! What the controller keeps in the store: the epoch floor, the groups, what is wanted of models, where their groups are, and
//! how models' settings come about. Fields that a later version wrote beside ours stay as they are.
//!
//! Every write needs leadership still: those of a controller that was paused or cut off for too long fail.

use crate::core::groups::{Desired, Placed, Source};
use crate::core::settings::{Intent, ModelSettings, Settings};
use crate::core::{Fact, Group};
use crate::placement::{Device, Slot};
use crate::store::{Entry, Expected, Guard, Put, Revision, Store, StoreError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

const EPOCH_FLOOR: &str = "controller/epoch_floor";
const GROUPS: &str = "groups/";
const SETTINGS: &str = "settings/";
const DESIRED: &str = "desired/";
const PLACED: &str = "placed/";

/// Tries of a write, and the pause after one that the store did not answer.
const WRITE_TRIES: usize = 3;
const WRITE_PAUSE: Duration = Duration::from_millis(50);

/// What an earlier run left.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    /// No epoch up to this one may be handed out again.
    pub epoch_floor: u64,
    /// By worker.
    pub groups: BTreeMap<String, Group>,
    /// By model.
    pub settings: Settings,
    /// What is wanted, by model, and of which revision.
    pub desired: BTreeMap<String, (Desired, u64)>,
    /// Where groups of the pool were.
    pub placed: BTreeMap<Slot, Placed>,
}

/// A group's value in the store.
#[derive(Serialize, Deserialize)]
struct StoredGroup {
    group_id: String,
    epoch: u64,
}

/// A model's value in the store.
#[derive(Serialize, Deserialize)]
struct StoredSettings {
    intent: Intent,
    revision: u64,
}

/// What is wanted of a model, in the store.
#[derive(Serialize, Deserialize)]
struct StoredDesired {
    #[serde(flatten)]
    desired: Desired,
    revision: u64,
}

/// A group of the pool in the store.
#[derive(Serialize, Deserialize)]
struct StoredPlaced {
    #[serde(flatten)]
    slot: Slot,
    #[serde(flatten)]
    source: Source,
    epoch: u64,
    /// Workers by rank, and what they had.
    ranks: Vec<(String, Device)>,
}

/// The store as its leader writes it, with the revisions it last saw.
pub(crate) struct Ledger<S> {
    store: S,
    leadership: Guard,
    revisions: HashMap<String, Revision>,
    /// Values as last read or written, by key.
    values: HashMap<String, Map<String, Value>>,
}

impl<S: Store> Ledger<S> {
    /// Reads what an earlier run left.
    pub(crate) async fn open(store: S, leadership: Guard) -> Result<(Self, Recovered), StoreError> {
        let floor = store.get(EPOCH_FLOOR).await?;
        let groups = store.range(GROUPS).await?.entries;
        let settings = store.range(SETTINGS).await?.entries;
        let desired = store.range(DESIRED).await?.entries;
        let placed = store.range(PLACED).await?.entries;
        let mut ledger = Self { store, leadership, revisions: HashMap::new(), values: HashMap::new() };
        for (key, entry) in groups.iter().chain(&settings).chain(&desired).chain(&placed) {
            if let Ok(Value::Object(fields)) = serde_json::from_slice(&entry.value) {
                ledger.values.insert(key.clone(), fields);
            }
        }
        if let Some(entry) = &floor {
            ledger.revisions.insert(EPOCH_FLOOR.to_owned(), entry.revision);
        }
        let mut recovered = Recovered { epoch_floor: number(EPOCH_FLOOR, floor.as_ref())?, ..Recovered::default() };
        for (key, entry) in groups {
            recovered.groups.insert(key[GROUPS.len()..].to_owned(), group(&key, &entry)?);
            ledger.revisions.insert(key, entry.revision);
        }
        for (key, entry) in settings {
            let stored: StoredSettings = value(&key, &entry)?;
            let settings = ModelSettings::stored(stored.intent, stored.revision);
            recovered.settings.insert(key[SETTINGS.len()..].to_owned(), settings);
            ledger.revisions.insert(key, entry.revision);
        }
        for (key, entry) in desired {
            let StoredDesired { desired, revision } = value(&key, &entry)?;
            recovered.desired.insert(key[DESIRED.len()..].to_owned(), (desired, revision));
            ledger.revisions.insert(key, entry.revision);
        }
        for (key, entry) in placed {
            let StoredPlaced { slot, source, epoch, ranks } = value(&key, &entry)?;
            recovered.placed.insert(slot, Placed::stored(epoch, ranks, source));
            ledger.revisions.insert(key, entry.revision);
        }
        Ok((ledger, recovered))
    }

    /// Number of this controller's leadership; rises from one leader to the next.
    pub(crate) fn term(&self) -> u64 {
        self.leadership.created.0
    }

    /// Stores a fact durably.
    pub(crate) async fn record(&mut self, fact: &Fact) -> Result<(), StoreError> {
        match fact {
            Fact::EpochFloor(epoch) => self.write(EPOCH_FLOOR, Some(epoch.to_string())).await,
            Fact::Group { worker_id, group: Group { id, epoch } } => {
                let stored = StoredGroup { group_id: id.clone(), epoch: *epoch };
                self.write_fields(&format!("{GROUPS}{worker_id}"), &stored).await
            }
            Fact::Settings { model, intent, revision } => {
                let stored = StoredSettings { intent: intent.clone(), revision: *revision };
                self.write_fields(&format!("{SETTINGS}{model}"), &stored).await
            }
            Fact::NoGroup { worker_id } => self.delete(&format!("{GROUPS}{worker_id}")).await,
            Fact::Desired { model, desired: None, .. } => self.delete(&format!("{DESIRED}{model}")).await,
            Fact::Desired { model, desired: Some(desired), revision } => {
                let stored = StoredDesired { desired: desired.clone(), revision: *revision };
                self.write_fields(&format!("{DESIRED}{model}"), &stored).await
            }
            Fact::Placed { slot, group: None } => self.delete(&placed_key(slot)).await,
            Fact::Placed { slot, group: Some(Placed { epoch, ranks, source, .. }) } => {
                let (slot, source, ranks) = (slot.clone(), source.clone(), ranks.clone());
                let key = placed_key(&slot);
                self.write_fields(&key, &StoredPlaced { slot, source, epoch: *epoch, ranks }).await
            }
        }
    }

    /// Writes a value's fields over those that are there.
    async fn write_fields(&mut self, key: &str, value: &impl Serialize) -> Result<(), StoreError> {
        let mut fields = self.values.remove(key).unwrap_or_default();
        if let Ok(Value::Object(ours)) = serde_json::to_value(value) {
            fields.extend(ours);
        }
        let text = Value::Object(fields.clone()).to_string();
        self.values.insert(key.to_owned(), fields);
        self.write(key, Some(text)).await
    }

    async fn delete(&mut self, key: &str) -> Result<(), StoreError> {
        self.values.remove(key);
        if self.revisions.contains_key(key) { self.write(key, None).await } else { Ok(()) }
    }

    /// Only a leader writes. So a write that failed in between may be made again, and what is then not as expected is
    /// that write, whose answer was lost.
    async fn write(&mut self, key: &str, value: Option<String>) -> Result<(), StoreError> {
        let value = value.map(String::into_bytes);
        let mut last = None;
        for _ in 0..WRITE_TRIES {
            match self.put(key, value.clone()).await {
                Ok(revision) => {
                    self.saw(key, value.is_some().then_some(revision));
                    return Ok(());
                }
                Err(error) => {
                    match &error {
                        StoreError::Conflict { found: None, .. } if value.is_none() => {
                            self.saw(key, None);
                            return Ok(());
                        }
                        StoreError::Conflict { found, .. } => self.saw(key, *found),
                        StoreError::Unavailable(_) => tokio::time::sleep(WRITE_PAUSE).await,
                        _ => return Err(error),
                    }
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| StoreError::Unavailable("not tried".into())))
    }

    async fn put(&self, key: &str, value: Option<Vec<u8>>) -> Result<Revision, StoreError> {
        let expected = self.revisions.get(key).map_or(Expected::Absent, |revision| Expected::Revision(*revision));
        self.store.put(Put::new(key, expected, value).guarded(&self.leadership)).await
    }

    fn saw(&mut self, key: &str, revision: Option<Revision>) {
        match revision {
            Some(revision) => self.revisions.insert(key.to_owned(), revision),
            None => self.revisions.remove(key),
        };
    }
}

fn placed_key(slot: &Slot) -> String {
    format!("{PLACED}{}/{}", slot.model, slot.replica)
}

fn value<T: DeserializeOwned>(key: &str, entry: &Entry) -> Result<T, StoreError> {
    serde_json::from_slice(&entry.value)
        .map_err(|error| StoreError::Value { key: key.to_owned(), why: error.to_string() })
}

/// The value of a group. Earlier versions stored its name alone.
fn group(key: &str, entry: &Entry) -> Result<Group, StoreError> {
    let wrong = |why: String| StoreError::Value { key: key.to_owned(), why };
    let text = std::str::from_utf8(&entry.value).map_err(|error| wrong(error.to_string()))?;
    if !text.starts_with('{') {
        return Ok(Group { id: text.to_owned(), epoch: 0 });
    }
    let StoredGroup { group_id, epoch } = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
    Ok(Group { id: group_id, epoch })
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
    use crate::lead;
    use crate::store::Embedded;

    async fn lead(store: &Embedded) -> (Ledger<Embedded>, Recovered) {
        let leadership = lead::seize(store, "me").await.unwrap();
        Ledger::open(store.clone(), leadership).await.unwrap()
    }

    #[tokio::test]
    async fn terms_rise_and_facts_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let open = || async { Embedded::open(folder.path().join("s")).await.unwrap() };
        let store = open().await;
        let (mut ledger, recovered) = lead(&store).await;
        let term = ledger.term();
        assert_eq!(recovered.epoch_floor, 0);
        let group = |id: &str| Group { id: format!("group-{id}"), epoch: 7 };
        let fact = |id: &str| Fact::Group { worker_id: id.into(), group: group(id) };
        let intent = Intent::Automatic { latency_ms: Some(20.0), floor: None, block_sizes: vec![4] };
        let settings = Fact::Settings { model: "m".into(), intent: intent.clone(), revision: 4 };
        let source = Source { path: "/m".into(), dtype: "bf16".into() };
        let wanted = Desired {
            source: source.clone(),
            replicas: 2,
            tensor_parallel: 1,
            spares: 1,
            memory_bytes: 5,
            policy: Some(intent.clone()),
        };
        let desired = Fact::Desired { model: "m".into(), desired: Some(wanted.clone()), revision: 3 };
        let slot = |replica| Slot { model: "m".into(), replica };
        let ranks = vec![("a".into(), Device { memory_bytes: 5, zone: "z".into() })];
        let group_of_pool = Placed::stored(6, ranks, source);
        let placed = |replica, group: Option<&Placed>| Fact::Placed { slot: slot(replica), group: group.cloned() };
        let pooled = [desired, placed(0, Some(&group_of_pool)), placed(1, Some(&group_of_pool)), placed(1, None)];
        let own = [fact("a"), fact("b"), Fact::EpochFloor(1), Fact::EpochFloor(7), settings];
        for fact in own.into_iter().chain(pooled) {
            ledger.record(&fact).await.unwrap();
        }
        for _ in 0..2 {
            ledger.record(&Fact::NoGroup { worker_id: "b".into() }).await.unwrap();
        }
        drop((ledger, store));
        let (ledger, recovered) = lead(&open().await).await;
        assert!(ledger.term() > term);
        assert_eq!(recovered.epoch_floor, 7);
        assert_eq!(recovered.groups, BTreeMap::from([("a".into(), group("a"))]));
        assert_eq!((&recovered.settings["m"].intent, recovered.settings["m"].revision), (&intent, 4));
        assert_eq!(recovered.desired, BTreeMap::from([("m".to_owned(), (wanted, 3))]));
        assert_eq!(recovered.placed, BTreeMap::from([(slot(0), group_of_pool)]));
    }

    #[tokio::test]
    async fn fields_of_a_later_version_stay() {
        let folder = tempfile::tempdir().unwrap();
        let store = Embedded::open(folder.path().join("s")).await.unwrap();
        let later = r#"{"intent": "model_defaults", "revision": 3, "weight": 7}"#;
        store.put(Put::new("settings/m", Expected::Absent, Some(later.into()))).await.unwrap();
        let (mut ledger, recovered) = lead(&store).await;
        assert_eq!(recovered.settings["m"].revision, 3);
        ledger.record(&Fact::Settings { model: "m".into(), intent: Intent::ModelDefaults, revision: 4 }).await.unwrap();
        let written = store.get("settings/m").await.unwrap().unwrap().value;
        let written: Value = serde_json::from_slice(&written).unwrap();
        assert_eq!(written, serde_json::json!({"intent": "model_defaults", "revision": 4, "weight": 7}));
    }

    #[test]
    fn groups_of_earlier_versions_are_read() {
        let entry = |value: &str| Entry { revision: Revision(1), created: Revision(1), value: value.into() };
        assert_eq!(group("k", &entry("group-a")).unwrap(), Group { id: "group-a".into(), epoch: 0 });
        assert!(matches!(group("k", &entry("{}")), Err(StoreError::Value { .. })));
    }

    #[tokio::test]
    async fn a_deposed_controller_cannot_write() {
        let folder = tempfile::tempdir().unwrap();
        let store = Embedded::open(folder.path().join("s")).await.unwrap();
        let (mut old, _) = lead(&store).await;
        old.record(&Fact::EpochFloor(1)).await.unwrap();
        let (mut new, _) = lead(&store).await;
        for fact in
            [Fact::EpochFloor(3), Fact::Group { worker_id: "a".into(), group: Group { id: "g".into(), epoch: 1 } }]
        {
            assert!(matches!(old.record(&fact).await, Err(StoreError::Deposed(_))));
        }
        new.record(&Fact::EpochFloor(2)).await.unwrap();
    }

    #[tokio::test]
    async fn a_write_whose_answer_was_lost_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let store = Embedded::open(folder.path().join("s")).await.unwrap();
        let (mut ledger, _) = lead(&store).await;
        let known = ledger.revisions.clone();
        ledger.record(&Fact::EpochFloor(1)).await.unwrap();
        ledger.revisions = known;
        ledger.record(&Fact::EpochFloor(2)).await.unwrap();
        assert_eq!(store.get(EPOCH_FLOOR).await.unwrap().unwrap().value, b"2");
    }
}
