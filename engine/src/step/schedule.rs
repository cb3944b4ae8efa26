//! Who holds a place and pages: admission, growth, pre-emption.
//!
//! One order decides all three: priority, then deadline, then age, and whoever is paused behind all who can run.
//! Pages are taken as blocks need them. When they run out, the last in that order gives up its own and waits at its
//! last committed block. So the first that can run always gets what it needs, up to the whole cache, and since
//! [`Engine::submit`] refuses what the whole cache cannot hold, it always comes to its end.

use super::Engine;
use super::life::Rank;

/// Pages left free for each active request when another is admitted, so that it is not soon sent back (pages).
const SPARE_PAGES_PER_ACTIVE: usize = 1;

impl Engine {
    /// Moves requests from the queue to the active ones, the first in order first, and none past one that must wait.
    pub(super) fn admit(&mut self) {
        loop {
            let waiting = (0..self.queue.len()).filter(|&i| !self.queue[i].paused);
            let Some(best) = waiting.min_by_key(|&i| self.queue[i].rank()) else { return };
            if !self.make_room(best) {
                return;
            }
            let mut life = self.queue.swap_remove(best);
            life.last_step = self.step;
            let place = self.active.partition_point(|other| other.rank() < life.rank());
            self.active.insert(place, life);
        }
    }

    /// Gives a queued request its first pages, sending back whoever ranks behind it when that helps.
    fn make_room(&mut self, best: usize) -> bool {
        loop {
            let rank = self.queue[best].rank();
            let spare = SPARE_PAGES_PER_ACTIVE * self.active.len();
            let missing = if self.active.len() < self.limits.active_max {
                self.queue[best].attach(&mut self.pages, spare)
            } else {
                Err(0)
            };
            let Err(missing) = missing else { return true };
            let behind = self.active.iter().filter(|life| life.paused || life.rank() > rank);
            let (count, pages) = behind.fold((0, 0), |(count, pages), life| (count + 1, pages + life.pages.len()));
            let still_spare = SPARE_PAGES_PER_ACTIVE * (self.active.len() - count);
            if self.pages.free() + pages < missing + still_spare {
                return false;
            }
            let Some(victim) = self.victim(rank) else { return false };
            self.send_back(victim);
        }
    }

    /// Gives requests that can run the pages their next rows fall into, in order. Who gets none waits and keeps its
    /// own, until somebody before it needs them.
    pub(super) fn grow(&mut self) {
        let mut at = 0;
        while let Some(life) = self.active.get_mut(at) {
            if life.paused || life.grow(&mut self.pages) {
                at += 1;
                continue;
            }
            let rank = life.rank();
            match self.victim(rank) {
                Some(victim) => {
                    self.send_back(victim);
                    at -= usize::from(victim < at);
                }
                None => at += 1,
            }
        }
    }

    /// Whose pages a request of this rank may have: the last that is paused, else the last of all if it is behind.
    fn victim(&self, rank: Rank) -> Option<usize> {
        let paused = self.active.iter().rposition(|life| life.paused);
        let last = || self.active.len().checked_sub(1).filter(|&last| self.active[last].rank() > rank);
        paused.or_else(last)
    }

    /// Pre-empts an active request: what is provisional is dropped, what is committed stays.
    pub(super) fn send_back(&mut self, index: usize) {
        let mut life = self.active.remove(index);
        life.detach(&mut self.pages);
        self.queue.push(life);
        self.preemptions += 1;
    }
}
