//! What a log leads to: entries, leases, and the last changes. Pure; times are the caller's.

use super::super::log::{self, Record};
use super::super::{Change, Entry, Expected, Put, Revision, StoreError};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::time::Duration;
use tokio::time::Instant;

/// Changes that are kept for watches.
pub(super) const HISTORY_MAX: usize = 4096;

#[derive(Debug)]
struct Kept {
    entry: Entry,
    /// 0: none.
    lease: u64,
}

#[derive(Debug)]
struct Held {
    ttl: Duration,
    until: Instant,
}

/// Everything in memory.
#[derive(Debug, Default)]
pub(super) struct State {
    entries: BTreeMap<String, Kept>,
    leases: BTreeMap<u64, Held>,
    revision: u64,
    history: VecDeque<Change>,
    /// Changes up to this revision are not in the history.
    forgotten: u64,
}

impl State {
    /// Of the last record.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.get(key).map(|kept| &kept.entry)
    }

    /// Entries whose key begins with `prefix`, in order of key.
    pub(super) fn range(&self, prefix: &str) -> Vec<(String, Entry)> {
        let from = self.entries.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        let mine = from.take_while(|(key, _)| key.starts_with(prefix));
        mine.map(|(key, kept)| (key.clone(), kept.entry.clone())).collect()
    }

    /// Whether a put may be made now.
    pub(super) fn check(&self, put: &Put, now: Instant) -> Result<(), StoreError> {
        if let Some(guard) = &put.guard
            && self.get(&guard.key).is_none_or(|entry| entry.created != guard.created)
        {
            return Err(StoreError::Deposed(guard.key.clone()));
        }
        if put.lease.is_some_and(|lease| !self.holds(lease.0, now)) {
            return Err(StoreError::LeaseGone);
        }
        let found = self.get(&put.key).map(|entry| entry.revision);
        let matches = match put.expected {
            Expected::Absent => found.is_none(),
            Expected::Revision(revision) => found == Some(revision),
        };
        if matches { Ok(()) } else { Err(StoreError::Conflict { key: put.key.clone(), expected: put.expected, found }) }
    }

    /// The record of a put that may be made.
    pub(super) fn record(&self, put: Put) -> Record {
        let revision = self.revision + 1;
        let created = self.get(&put.key).map_or(revision, |entry| entry.created.0);
        let change = match put.value {
            Some(value) => {
                log::Change::Put { key: put.key, value, created, lease: put.lease.map_or(0, |lease| lease.0) }
            }
            None => log::Change::Delete(put.key),
        };
        Record { revision, change }
    }

    fn holds(&self, lease: u64, now: Instant) -> bool {
        self.leases.get(&lease).is_some_and(|held| now < held.until)
    }

    /// Starts a lease's time anew; whether it was there.
    pub(super) fn renew(&mut self, lease: u64, now: Instant) -> bool {
        let holds = self.holds(lease, now);
        if let Some(held) = self.leases.get_mut(&lease).filter(|_| holds) {
            held.until = now + held.ttl;
        }
        holds
    }

    /// Records that end a lease and delete its keys.
    pub(super) fn ending(&self, lease: u64) -> Vec<Record> {
        if !self.leases.contains_key(&lease) {
            return Vec::new();
        }
        let keys = self.entries.iter().filter(|(_, kept)| kept.lease == lease).map(|(key, _)| key.clone());
        let changes = keys.map(log::Change::Delete).chain([log::Change::Revoke(lease)]);
        changes.zip(self.revision + 1..).map(|(change, revision)| Record { revision, change }).collect()
    }

    /// A lease whose time is over.
    pub(super) fn expired(&self, now: Instant) -> Option<u64> {
        self.leases.iter().find(|(_, held)| held.until <= now).map(|(lease, _)| *lease)
    }

    /// Takes a record. Leases of an earlier run begin their time anew.
    pub(super) fn apply(&mut self, record: Record, now: Instant) {
        let revision = record.revision;
        self.revision = revision;
        match record.change {
            log::Change::OldPut(key, value) => {
                let created = self.get(&key).map_or(revision, |entry| entry.created.0);
                self.put(key, value, created, 0);
            }
            log::Change::Put { key, value, created, lease } => self.put(key, value, created, lease),
            log::Change::Delete(key) => {
                if self.entries.remove(&key).is_some() {
                    self.remember(Change { key, revision: Revision(revision), entry: None });
                }
            }
            log::Change::Mark => {}
            log::Change::Grant { lease, ttl_ms } => {
                let ttl = Duration::from_millis(ttl_ms);
                self.leases.insert(lease, Held { ttl, until: now + ttl });
            }
            log::Change::Revoke(lease) => {
                self.leases.remove(&lease);
            }
        }
    }

    fn put(&mut self, key: String, value: Vec<u8>, created: u64, lease: u64) {
        let entry = Entry { revision: Revision(self.revision), created: Revision(created), value };
        self.remember(Change { key: key.clone(), revision: entry.revision, entry: Some(entry.clone()) });
        self.entries.insert(key, Kept { entry, lease });
    }

    fn remember(&mut self, change: Change) {
        self.history.push_back(change);
        if self.history.len() > HISTORY_MAX
            && let Some(oldest) = self.history.pop_front()
        {
            self.forgotten = oldest.revision.0;
        }
    }

    /// What was before the log was opened is nobody's news.
    pub(super) fn forget_history(&mut self) {
        self.history.clear();
        self.forgotten = self.revision;
    }

    /// Changes to keys that begin with `prefix`, from revision `from` on.
    pub(super) fn since(&self, prefix: &str, from: Revision) -> Result<Vec<Change>, StoreError> {
        if from.0 <= self.forgotten {
            return Err(StoreError::Compacted(Revision(self.forgotten)));
        }
        let mine = self.history.iter().filter(|change| change.revision >= from && change.key.starts_with(prefix));
        Ok(mine.cloned().collect())
    }

    /// The records of a log that leads here.
    pub(super) fn live(&self) -> Vec<Record> {
        let grant = |(&lease, held): (&u64, &Held)| Record {
            revision: lease,
            change: log::Change::Grant { lease, ttl_ms: held.ttl.as_millis() as u64 },
        };
        let put = |(key, kept): (&String, &Kept)| Record {
            revision: kept.entry.revision.0,
            change: log::Change::Put {
                key: key.clone(),
                value: kept.entry.value.clone(),
                created: kept.entry.created.0,
                lease: kept.lease,
            },
        };
        let mut live: Vec<Record> = self.leases.iter().map(grant).chain(self.entries.iter().map(put)).collect();
        live.sort_by_key(|record| record.revision);
        // The newest revision may have been a deletion.
        live.push(Record { revision: self.revision, change: log::Change::Mark });
        live
    }
}
