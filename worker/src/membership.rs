//! What this worker is to its controller: where it stands, in which epoch.

use std::sync::atomic::{AtomicU64, Ordering};
use unmask_proto::watch;

/// Where a worker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// Serves.
    Ready,
    /// Finishes what it holds.
    Draining,
}

/// Shared by the service, which checks, and the join thread, which learns and reports.
#[derive(Debug)]
pub(crate) struct Membership {
    epoch: AtomicU64,
    readiness: watch::Sender<Readiness>,
}

impl Membership {
    /// Ready, and assigned to nothing yet.
    pub(crate) fn new() -> Self {
        Self { epoch: AtomicU64::new(0), readiness: watch::Sender::new(Readiness::Ready) }
    }

    /// The group's epoch; 0 before the first assignment.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Takes an epoch unless it is below the present one; whether it was taken.
    pub(crate) fn raise_epoch(&self, epoch: u64) -> bool {
        self.epoch.fetch_max(epoch, Ordering::AcqRel) <= epoch
    }

    /// Where the worker stands.
    pub(crate) fn readiness(&self) -> Readiness {
        *self.readiness.borrow()
    }

    /// From here on nothing new is taken.
    pub(crate) fn drain(&self) {
        self.readiness.send_replace(Readiness::Draining);
    }

    /// Changes of readiness.
    pub(crate) fn watch(&self) -> watch::Receiver<Readiness> {
        self.readiness.subscribe()
    }
}
