//! Collectives between the ranks of a tensor-parallel group: sums, gathered records, the step plan.
//!
//! Sums are added in one fixed binary tree over the ranks, `((0 + 1) + (2 + 3)) + ..`, the continuation of the tree over
//! pieces of k inside a rank (I4): every degree gives the same bits. Every wait has a deadline. After the first error a
//! communicator is poisoned: it and those of the other ranks fail at once, until a group is formed anew.

mod tcp;
mod threads;

pub use tcp::TcpRank;
pub use threads::{ThreadsRank, threads};

use std::time::{Duration, Instant};
use thiserror::Error;

/// Most ranks of a group.
pub const RANKS_MAX: usize = 8;

/// Largest message of one collective (bytes).
pub const MESSAGE_MAX: usize = 1 << 28;

/// Why a collective failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CommError {
    /// A rank did not come in time.
    #[error("rank {rank} did not answer within {} ms", .after.as_millis())]
    TimedOut {
        /// The one waited for.
        rank: usize,
        /// How long.
        after: Duration,
    },
    /// A rank has ended, or its connection has.
    #[error("rank {rank} is gone")]
    PeerLost {
        /// Which.
        rank: usize,
    },
    /// Somebody ended the group.
    #[error("the group was ended")]
    Aborted,
    /// A rank belongs to another incarnation of the group.
    #[error("a rank is of epoch {theirs}, this group of {mine}")]
    Epoch {
        /// This group's.
        mine: u64,
        /// The other's.
        theirs: u64,
    },
    /// A message is not what this step of the protocol expects.
    #[error("rank {rank} sent something else than expected: {what}")]
    Malformed {
        /// Whose message.
        rank: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// Sockets could not be had.
    #[error("{0}")]
    Io(String),
}

/// One rank's end of a group.
pub enum Comm {
    /// A group of one.
    Solo,
    /// Ranks are threads of this process.
    Threads(ThreadsRank),
    /// Ranks are processes, here or on other hosts.
    Tcp(TcpRank),
}

impl Comm {
    /// This rank.
    pub fn rank(&self) -> usize {
        match self {
            Comm::Solo => 0,
            Comm::Threads(rank) => rank.rank(),
            Comm::Tcp(rank) => rank.rank(),
        }
    }

    /// Ranks of the group: 1, 2, 4 or 8.
    pub fn ranks(&self) -> usize {
        match self {
            Comm::Solo => 1,
            Comm::Threads(rank) => rank.ranks(),
            Comm::Tcp(rank) => rank.ranks(),
        }
    }

    /// Every rank ends with the same sums of all ranks' `values`, which are equally long on all.
    ///
    /// # Errors
    /// [`CommError`]; the values are then undefined and the group is over.
    pub fn all_reduce(&mut self, values: &mut [f32], deadline: Instant) -> Result<(), CommError> {
        match self {
            Comm::Solo => Ok(()),
            Comm::Threads(rank) => rank.all_reduce(values, deadline),
            Comm::Tcp(rank) => rank.all_reduce(values, deadline),
        }
    }

    /// `all` ends with every rank's `mine`, in order of rank; `all` holds `ranks` times as many bytes.
    ///
    /// # Errors
    /// As [`Comm::all_reduce`].
    pub fn all_gather(&mut self, mine: &[u8], all: &mut [u8], deadline: Instant) -> Result<(), CommError> {
        assert_eq!(all.len(), mine.len() * self.ranks(), "all ranks send equally much");
        match self {
            Comm::Solo => {
                all.copy_from_slice(mine);
                Ok(())
            }
            Comm::Threads(rank) => rank.all_gather(mine, all, deadline),
            Comm::Tcp(rank) => rank.all_gather(mine, all, deadline),
        }
    }

    /// Rank 0's `bytes` (at most [`MESSAGE_MAX`]) replace those of the others.
    ///
    /// # Errors
    /// As [`Comm::all_reduce`].
    pub fn broadcast(&mut self, bytes: &mut Vec<u8>, deadline: Instant) -> Result<(), CommError> {
        assert!(bytes.len() <= MESSAGE_MAX, "a message has at most {MESSAGE_MAX} bytes");
        match self {
            Comm::Solo => Ok(()),
            Comm::Threads(rank) => rank.broadcast(bytes, deadline),
            Comm::Tcp(rank) => rank.broadcast(bytes, deadline),
        }
    }

    /// What ends this rank's collectives, now and later, from any thread.
    pub fn abort_handle(&self) -> AbortHandle {
        match self {
            Comm::Solo => AbortHandle::Solo,
            Comm::Threads(rank) => AbortHandle::Threads(rank.abort_handle()),
            Comm::Tcp(rank) => AbortHandle::Tcp(rank.abort_handle()),
        }
    }
}

/// Ends the collectives of a group.
pub enum AbortHandle {
    /// There are none.
    Solo,
    /// Of threads.
    Threads(threads::Abort),
    /// Of processes.
    Tcp(tcp::Abort),
}

impl AbortHandle {
    /// Everybody who waits, or will, gets an error.
    pub fn abort(&self) {
        match self {
            AbortHandle::Solo => {}
            AbortHandle::Threads(abort) => abort.abort(),
            AbortHandle::Tcp(abort) => abort.abort(),
        }
    }
}

fn check_ranks(ranks: usize) {
    let known = ranks.is_power_of_two() && (1..=RANKS_MAX).contains(&ranks);
    assert!(known, "a group has 1, 2, 4 or {RANKS_MAX} ranks, not {ranks}");
}

/// The fixed tree over one value of each rank; as many as a power of two up to [`RANKS_MAX`].
#[inline(always)]
fn tree(mut values: [f32; RANKS_MAX], ranks: usize) -> f32 {
    let mut width = ranks;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            values[i] = values[2 * i] + values[2 * i + 1];
        }
    }
    values[0]
}

#[cfg(test)]
mod tests;
