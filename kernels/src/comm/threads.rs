//! Ranks as threads of one process: every rank has a slot that the others read between two barriers.

use super::{CommError, RANKS_MAX, check_ranks, tree};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

/// Polls before a waiting rank sleeps; none where ranks exceed cores.
const SPINS_MAX: u32 = 2_000;

/// One rank of a group of threads.
pub struct ThreadsRank {
    rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    slots: Vec<RwLock<Slot>>,
    barrier: Mutex<Barrier>,
    changed: Condvar,
    /// Counts barriers that everybody passed; written under the lock.
    generation: AtomicU64,
    spins: u32,
}

#[derive(Default)]
struct Slot {
    values: Vec<f32>,
    bytes: Vec<u8>,
}

struct Barrier {
    arrived: [bool; RANKS_MAX],
    /// Why the group is over.
    failed: Option<CommError>,
}

/// A group of `ranks` (1, 2, 4 or 8) threads; each takes one.
pub fn threads(ranks: usize) -> Vec<ThreadsRank> {
    check_ranks(ranks);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let shared = Arc::new(Shared {
        slots: (0..ranks).map(|_| RwLock::default()).collect(),
        barrier: Mutex::new(Barrier { arrived: [false; RANKS_MAX], failed: None }),
        changed: Condvar::new(),
        generation: AtomicU64::new(0),
        spins: if ranks <= cores { SPINS_MAX } else { 0 },
    });
    (0..ranks).map(|rank| ThreadsRank { rank, shared: Arc::clone(&shared) }).collect()
}

impl ThreadsRank {
    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn ranks(&self) -> usize {
        self.shared.slots.len()
    }

    pub(super) fn all_reduce(&mut self, values: &mut [f32], deadline: Instant) -> Result<(), CommError> {
        self.fill(|slot| {
            slot.values.clear();
            slot.values.extend_from_slice(values);
        });
        self.shared.wait(self.rank, deadline)?;
        let (ranks, shared) = (self.ranks(), &self.shared);
        let slots: [_; RANKS_MAX] = std::array::from_fn(|rank| shared.slots.get(rank).map(read));
        let others = || slots.iter().flatten().map(|slot| slot.values.as_slice());
        if let Some(rank) = others().position(|theirs| theirs.len() != values.len()) {
            return Err(self.shared.fail(CommError::Malformed { rank, what: "sums of another length" }));
        }
        for (i, value) in values.iter_mut().enumerate() {
            let mut parts = [0.0; RANKS_MAX];
            parts.iter_mut().zip(others()).for_each(|(part, theirs)| *part = theirs[i]);
            *value = tree(parts, ranks);
        }
        drop(slots);
        self.shared.wait(self.rank, deadline)
    }

    pub(super) fn all_gather(&mut self, mine: &[u8], all: &mut [u8], deadline: Instant) -> Result<(), CommError> {
        self.fill(|slot| {
            slot.bytes.clear();
            slot.bytes.extend_from_slice(mine);
        });
        self.shared.wait(self.rank, deadline)?;
        for (rank, out) in all.chunks_exact_mut(mine.len().max(1)).enumerate() {
            let slot = read(&self.shared.slots[rank]);
            if slot.bytes.len() != out.len() {
                drop(slot);
                return Err(self.shared.fail(CommError::Malformed { rank, what: "records of another length" }));
            }
            out.copy_from_slice(&slot.bytes);
        }
        self.shared.wait(self.rank, deadline)
    }

    pub(super) fn broadcast(&mut self, bytes: &mut Vec<u8>, deadline: Instant) -> Result<(), CommError> {
        if self.rank == 0 {
            self.fill(|slot| {
                slot.bytes.clear();
                slot.bytes.extend_from_slice(bytes);
            });
        }
        self.shared.wait(self.rank, deadline)?;
        if self.rank > 0 {
            bytes.clear();
            bytes.extend_from_slice(&read(&self.shared.slots[0]).bytes);
        }
        self.shared.wait(self.rank, deadline)
    }

    pub(super) fn abort_handle(&self) -> Abort {
        Abort(Arc::clone(&self.shared))
    }

    fn fill(&self, fill: impl FnOnce(&mut Slot)) {
        fill(&mut self.shared.slots[self.rank].write().unwrap_or_else(PoisonError::into_inner));
    }
}

fn read(slot: &RwLock<Slot>) -> RwLockReadGuard<'_, Slot> {
    slot.read().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for ThreadsRank {
    fn drop(&mut self) {
        self.shared.fail(CommError::PeerLost { rank: self.rank });
    }
}

impl Shared {
    /// Returns when every rank has come here.
    fn wait(&self, rank: usize, deadline: Instant) -> Result<(), CommError> {
        let begun = Instant::now();
        let mut barrier = self.lock();
        if let Some(failed) = &barrier.failed {
            return Err(failed.clone());
        }
        let generation = self.generation.load(Ordering::Relaxed);
        barrier.arrived[rank] = true;
        if barrier.arrived[..self.slots.len()].iter().all(|arrived| *arrived) {
            barrier.arrived = [false; RANKS_MAX];
            self.generation.fetch_add(1, Ordering::Release);
            self.changed.notify_all();
            return Ok(());
        }
        drop(barrier);
        for _ in 0..self.spins {
            if self.generation.load(Ordering::Acquire) != generation {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        let mut barrier = self.lock();
        loop {
            if self.generation.load(Ordering::Acquire) != generation {
                return Ok(());
            }
            if let Some(failed) = &barrier.failed {
                return Err(failed.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = barrier.arrived.iter().position(|arrived| !arrived).unwrap_or(0);
                drop(barrier);
                return Err(self.fail(CommError::TimedOut { rank: missing, after: begun.elapsed() }));
            }
            barrier = self.changed.wait_timeout(barrier, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the group, unless it is over; returns why it is.
    fn fail(&self, error: CommError) -> CommError {
        let mut barrier = self.lock();
        let failed = barrier.failed.get_or_insert(error).clone();
        self.changed.notify_all();
        failed
    }

    fn lock(&self) -> MutexGuard<'_, Barrier> {
        self.barrier.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the group.
pub struct Abort(Arc<Shared>);

impl Abort {
    pub(super) fn abort(&self) {
        self.0.fail(CommError::Aborted);
    }
}
