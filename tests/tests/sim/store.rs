//! The controllers' store in memory, with latency, outages, lost answers, and leases by the world's time.

use crate::host::{TICK, ticks};
use crate::trace;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use unmask_controller::store::{
    Change, Changes, Entry, Expected, LeaseId, Listing, Put, Revision, Store as Trait, StoreError,
};

/// Longest answer where nothing is wrong (ticks).
const LATENCY_MAX: u64 = 2;
/// How long a controller waits for a store that is away.
const SILENCE: Duration = Duration::from_secs(2);
/// How often a watch looks.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Default)]
struct State {
    now: u64,
    revision: u64,
    entries: BTreeMap<String, (Entry, Option<LeaseId>)>,
    /// Until when, and for how long (ticks).
    leases: BTreeMap<LeaseId, (u64, u64)>,
    history: Vec<Change>,
    /// Hosts that do not reach it.
    away: BTreeSet<usize>,
    /// Of 100 answers, so many are lost.
    lost_percent: u32,
}

impl State {
    fn change(&mut self, key: &str, entry: Option<Entry>, lease: Option<LeaseId>) {
        match &entry {
            Some(entry) => self.entries.insert(key.to_owned(), (entry.clone(), lease)),
            None => self.entries.remove(key),
        };
        self.history.push(Change { key: key.to_owned(), revision: Revision(self.revision), entry });
    }

    fn end(&mut self, lease: LeaseId) {
        self.leases.remove(&lease);
        let keys = self.entries.iter().filter(|(_, (_, held))| *held == Some(lease)).map(|(key, _)| key.clone());
        for key in keys.collect::<Vec<_>>() {
            self.revision += 1;
            self.change(&key, None, None);
        }
    }

    fn put(&mut self, put: Put) -> Result<Revision, StoreError> {
        if let Some(guard) = &put.guard
            && self.entries.get(&guard.key).is_none_or(|(entry, _)| entry.created != guard.created)
        {
            return Err(StoreError::Deposed(guard.key.clone()));
        }
        if put.lease.is_some_and(|lease| !self.leases.contains_key(&lease)) {
            return Err(StoreError::LeaseGone);
        }
        let old = self.entries.get(&put.key).map(|(entry, _)| entry);
        let found = old.map(|entry| entry.revision);
        let expected = match put.expected {
            Expected::Absent => None,
            Expected::Revision(revision) => Some(revision),
        };
        if found != expected {
            return Err(StoreError::Conflict { key: put.key, expected: put.expected, found });
        }
        self.revision += 1;
        let revision = Revision(self.revision);
        let created = old.map_or(revision, |entry| entry.created);
        let entry = put.value.map(|value| Entry { revision, created, value });
        self.change(&put.key, entry, put.lease);
        Ok(revision)
    }
}

/// What all controllers share.
#[derive(Clone, Default)]
pub struct Shared(Arc<Mutex<State>>);

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn tick(&self, now: u64) {
        let mut state = self.state();
        state.now = now;
        let over: Vec<_> = state.leases.iter().filter(|(_, held)| held.0 <= now).map(|(lease, _)| *lease).collect();
        over.into_iter().for_each(|lease| state.end(lease));
    }

    /// Whether a host reaches the store.
    pub fn reach(&self, host: usize, reaches: bool) {
        let mut state = self.state();
        if reaches {
            state.away.remove(&host)
        } else {
            state.away.insert(host)
        };
    }

    /// Every host reaches it.
    pub fn reach_all(&self) {
        self.state().away.clear();
    }

    pub fn lose_answers(&self, percent: u32) {
        self.state().lost_percent = percent;
    }

    /// The host that holds the leader's key.
    pub fn leader(&self) -> Option<usize> {
        let state = self.state();
        let (entry, _) = state.entries.get("controller/leader")?;
        crate::network::host_of(std::str::from_utf8(&entry.value).ok()?)
    }

    /// The store as one run of a host sees it.
    pub fn of(&self, host: usize, seed: u64) -> Store {
        Store { shared: self.clone(), host, dice: Arc::new(Mutex::new(StdRng::seed_from_u64(seed ^ host as u64))) }
    }
}

#[derive(Clone)]
pub struct Store {
    shared: Shared,
    host: usize,
    dice: Arc<Mutex<StdRng>>,
}

impl Store {
    fn draw(&self, below: u64) -> u64 {
        self.dice.lock().unwrap_or_else(PoisonError::into_inner).random_range(0..below)
    }

    /// There and back; what is done may have been done although the answer is lost.
    async fn ask<T>(&self, what: impl FnOnce(&mut State) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let (there, back, lost) = (self.draw(LATENCY_MAX), self.draw(LATENCY_MAX), self.draw(100) as u32);
        tokio::time::sleep(TICK * (1 + there) as u32).await;
        let silent = || StoreError::Unavailable("as the simulation wants it".into());
        if self.shared.state().away.contains(&self.host) {
            tokio::time::sleep(SILENCE).await;
            return Err(silent());
        }
        let done = what(&mut self.shared.state());
        tokio::time::sleep(TICK * (1 + back) as u32).await;
        let state = self.shared.state();
        if state.away.contains(&self.host) || lost < state.lost_percent { Err(silent()) } else { done }
    }
}

impl Trait for Store {
    fn exclusive(&self) -> bool {
        false
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.ask(|state| Ok(state.entries.get(key).map(|(entry, _)| entry.clone()))).await
    }

    async fn range(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.ask(|state| {
            let mine = state.entries.iter().filter(|(key, _)| key.starts_with(prefix));
            let entries = mine.map(|(key, (entry, _))| (key.clone(), entry.clone())).collect();
            Ok(Listing { revision: Revision(state.revision), entries })
        })
        .await
    }

    async fn put(&self, put: Put) -> Result<Revision, StoreError> {
        let key = put.key.clone();
        let term = put.guard.as_ref().map_or(0, |guard| guard.created.0);
        self.ask(|state| {
            let done = state.put(put);
            if done.is_ok() {
                trace::add("store write", vec![("key", key), ("term", term.to_string())]);
            }
            done
        })
        .await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.ask(|state| {
            state.revision += 1;
            let (lease, ttl) = (LeaseId(state.revision), ticks(ttl));
            state.leases.insert(lease, (state.now + ttl, ttl));
            Ok(lease)
        })
        .await
    }

    async fn renew(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|state| {
            let now = state.now;
            let held = state.leases.get_mut(&lease).ok_or(StoreError::LeaseGone)?;
            held.0 = now + held.1;
            Ok(())
        })
        .await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|state| {
            state.end(lease);
            Ok(())
        })
        .await
    }

    fn watch(&self, prefix: &str, from: Revision) -> Changes {
        let (store, prefix) = (self.clone(), prefix.to_owned());
        Box::pin(futures::stream::unfold(from, move |from| {
            let (store, prefix) = (store.clone(), prefix.clone());
            async move {
                loop {
                    tokio::time::sleep(LOOK).await;
                    let state = store.shared.state();
                    if state.away.contains(&store.host) {
                        continue;
                    }
                    let mine = |change: &&Change| change.revision >= from && change.key.starts_with(&prefix);
                    let changes: Vec<_> = state.history.iter().filter(mine).cloned().collect();
                    if !changes.is_empty() {
                        return Some((Ok(changes), Revision(state.revision + 1)));
                    }
                }
            }
        }))
    }
}
