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
const PROMPT_SHARE: u32 = 4;

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
    /// Rows of the open block (0 for autoregressive requests, whose last kept row is the one that scores).
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn share(needs: &[Need], rows_max: u32) -> Vec<Grant> {
        let mut plan = Plan { needs: needs.to_vec(), ..Plan::default() };
        plan.share(rows_max);
        plan.grants
    }

    fn denoise(arrival: u64) -> Need {
        Need { priority: 0, deadline: u64::MAX, arrival, waited: 0, kept: 0, granule: 1, open: 16, splits: false }
    }

    fn prompt(arrival: u64, kept: u32) -> Need {
        Need { kept, splits: true, ..denoise(arrival) }
    }

    /// Which of the needs get their open rows when 8 of them fit.
    fn served(needs: &[Need]) -> Vec<u64> {
        let grants = share(needs, 128);
        needs.iter().zip(grants).filter(|(_, grant)| grant.open).map(|(need, _)| need.arrival).collect()
    }

    #[test]
    fn the_order_is_priority_deadline_age_and_who_waits_too_long_goes_first() {
        let mut needs: Vec<Need> = (0..12).map(denoise).collect();
        assert_eq!(served(&needs), [0, 1, 2, 3, 4, 5, 6, 7]);
        needs[11].priority = 1;
        needs[10].deadline = 5;
        assert_eq!(served(&needs), [0, 1, 2, 3, 4, 5, 10, 11]);
        needs[8].waited = WAIT_STEPS_MAX;
        needs[9].waited = WAIT_STEPS_MAX - 1;
        assert_eq!(served(&needs), [0, 1, 2, 3, 4, 8, 10, 11]);
    }

    #[test]
    fn a_prompt_of_small_priority_takes_nothing_from_those_above_it() {
        let mut needs: Vec<Need> = (0..16).map(|i| Need { priority: 1, ..denoise(i) }).collect();
        needs.push(prompt(16, 5000));
        let grants = share(&needs, 256);
        assert!(grants[..16].iter().all(|grant| grant.open));
        assert_eq!(grants[16], Grant::default());
    }

    #[test]
    fn a_prompt_that_fits_brings_its_first_block() {
        assert_eq!(share(&[prompt(0, 48)], 256), [Grant { kept: 48, open: true }]);
    }

    #[test]
    fn a_long_prompt_comes_in_chunks_and_does_not_stop_the_others() {
        let needs = [prompt(0, 5000), denoise(1), denoise(2)];
        let grants = share(&needs, 128);
        assert_eq!(
            grants,
            [Grant { kept: 96, open: false }, Grant { kept: 0, open: true }, Grant { kept: 0, open: true }]
        );
    }

    #[test]
    fn open_blocks_do_not_starve_a_prompt() {
        let mut needs: Vec<Need> = (0..40).map(denoise).collect();
        needs.push(prompt(40, 5000));
        let grants = share(&needs, 256);
        assert_eq!(grants[40].kept, 64);
        assert_eq!(grants.iter().filter(|g| g.open).count(), 12);
    }

    #[test]
    fn chunks_end_at_block_boundaries() {
        let need = Need { granule: 32, ..prompt(0, 1000) };
        assert_eq!(share(&[need], 250)[0].kept, 224);
    }

    proptest! {
        #[test]
        fn grants_fit_and_somebody_moves(
            raw in prop::collection::vec((0i32..3, 0u64..40, 0u32..300, any::<bool>(), 0usize..3), 1..30),
        ) {
            let rows_max = 256;
            let needs: Vec<Need> = raw.iter().enumerate().map(|(i, &(priority, waited, kept, splits, b))| {
                let block = [8, 16, 32][b];
                Need {
                    priority, waited, deadline: waited % 3, arrival: i as u64,
                    kept: if splits { kept.max(1) } else { kept % (block + 1) },
                    granule: block, open: block, splits,
                }
            }).collect();
            let grants = share(&needs, rows_max);
            let total: u32 = grants.iter().zip(&needs).map(|(g, n)| g.rows(n)).sum();
            prop_assert!(total <= rows_max && total > 0);
            for (grant, need) in grants.iter().zip(&needs) {
                prop_assert!(grant.kept <= need.kept);
                prop_assert!(!grant.open || grant.kept == need.kept);
                prop_assert!(grant.open || grant.kept % need.granule == 0);
            }
        }
    }
}
