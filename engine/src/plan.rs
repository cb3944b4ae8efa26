//! Which rows enter a step: a pure function of what the requests need.
//!
//! Within a priority the order is deadline, then age, so that what is nearly done is done soon; but whoever has waited
//! [`WAIT_STEPS_MAX`] steps comes first, the longest first. Larger priorities take what they can use before smaller
//! ones get any. Hence the bound on waiting: while `n` requests of one priority can run and none of a larger one can,
//! each has rows again after at most `WAIT_STEPS_MAX + n` steps, which take `(WAIT_STEPS_MAX + n) * T(rows_max)`.
//! (Behind the `WAIT_STEPS_MAX` steps the order is first come, first served; every step serves the first open block
//! and the first prompt of it, because a block and the block to be stored before it never exceed a quarter of the
//! rows.)

use std::cmp::Reverse;

/// Steps without rows after which a request goes before all others of its priority (steps).
pub const WAIT_STEPS_MAX: u64 = 16;
/// While prompts wait, one row in this many is kept for them.
pub(crate) const PROMPT_SHARE: u32 = 4;

/// What one request could use in the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Larger is sooner.
    pub priority: i32,
    /// Smaller is sooner; `u64::MAX` for none.
    pub deadline: u64,
    /// Order of arrival; no two are equal.
    pub arrival: u64,
    /// Steps it could have had rows in and had none, since it last had.
    pub waited: u64,
    /// Kept rows still to be computed before anything else: prompt, or a finished block.
    pub kept: u32,
    /// Kept rows come in multiples of this, but for the last.
    pub granule: u32,
    /// Rows of the open block, or of a draft and its masks (0 for autoregressive requests, whose last kept row is the one
    /// that scores).
    pub open: u32,
    /// Whether the kept rows are a prompt's, which may be split over steps.
    pub splits: bool,
}

impl Need {
    fn rows(&self) -> u32 {
        self.kept.saturating_add(self.open)
    }

    fn order(&self) -> (Reverse<i32>, Reverse<u64>, u64, u64) {
        let overdue = if self.waited >= WAIT_STEPS_MAX { self.waited } else { 0 };
        (Reverse(self.priority), Reverse(overdue), self.deadline, self.arrival)
    }
}

/// Rows a request gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Grant {
    /// Kept rows.
    pub kept: u32,
    /// The open block's rows too; only with all kept rows.
    pub open: bool,
}

impl Grant {
    /// Rows granted.
    pub fn rows(&self, need: &Need) -> u32 {
        self.kept + if self.open { need.open } else { 0 }
    }
}

/// The needs of a step and what they get. Buffers are kept between steps.
#[derive(Debug, Default)]
pub struct Plan {
    /// What requests could use, in any order.
    pub needs: Vec<Need>,
    grants: Vec<Grant>,
    order: Vec<usize>,
}

impl Plan {
    /// Forgets the needs.
    pub fn clear(&mut self) {
        self.needs.clear();
    }

    /// One grant per need, as of the last [`Plan::share`].
    pub fn grants(&self) -> &[Grant] {
        &self.grants
    }

    /// Shares `rows_max` rows among the needs.
    pub fn share(&mut self, rows_max: u32) {
        let Self { needs, grants, order } = self;
        grants.clear();
        grants.resize(needs.len(), Grant::default());
        order.clear();
        order.extend(0..needs.len());
        order.sort_unstable_by_key(|&i| needs[i].order());
        let mut left = rows_max;
        for class in order.chunk_by(|&a, &b| needs[a].priority == needs[b].priority) {
            share_class(needs, class, &mut left, grants);
        }
    }
}

/// Shares what is left among needs of one priority. While prompts wait, a part of it is kept for them, and what they
/// leave goes back to the open blocks: neither starves the other.
fn share_class(needs: &[Need], class: &[usize], left: &mut u32, grants: &mut [Grant]) {
    let prompts = class.iter().filter(|&&i| needs[i].splits);
    let wanted = prompts.clone().fold(0, |rows: u32, &i| rows.saturating_add(needs[i].rows()));
    grant_whole(needs, class, *left - wanted.min(*left / PROMPT_SHARE), left, grants);
    for &i in prompts {
        let need = &needs[i];
        if need.rows() <= *left {
            grants[i] = Grant { kept: need.kept, open: true };
        } else {
            // Never the whole of it without the open rows: the last granule waits for a step that takes both.
            let most = need.kept.saturating_sub(1).min(*left);
            grants[i] = Grant { kept: most - most % need.granule, open: false };
        }
        *left -= grants[i].rows(need);
    }
    grant_whole(needs, class, *left, left, grants);
}

/// Grants unsplittable needs that have nothing yet, in order, using at most `limit` rows.
fn grant_whole(needs: &[Need], class: &[usize], limit: u32, left: &mut u32, grants: &mut [Grant]) {
    let mut used = 0;
    for &i in class {
        let rows = needs[i].rows();
        if !needs[i].splits && !grants[i].open && used + rows <= limit {
            grants[i] = Grant { kept: needs[i].kept, open: true };
            used += rows;
            *left -= rows;
        }
    }
}

#[cfg(test)]
mod tests;
