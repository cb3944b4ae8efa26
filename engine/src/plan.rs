//! Which rows enter a step: a pure function of what the requests need.

use std::cmp::Reverse;

/// What one request could use in the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Larger is sooner.
    pub priority: i32,
    /// Number of the step that last carried rows of it.
    pub last_step: u64,
    /// Order of arrival.
    pub arrival: u64,
    /// Kept rows still to be computed before anything else: prompt, or a finished block.
    pub kept: u32,
    /// Kept rows come in multiples of this, but for the last.
    pub granule: u32,
    /// Rows of the open block (0 for autoregressive requests, whose last kept row is the one that scores).
    pub open: u32,
    /// Whether the kept rows are a prompt's, which may be split over steps.
    pub splits: bool,
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

/// Shares `rows_max` rows among the needs; one grant per need.
///
/// Order: priority, then the longest unserved, then arrival. While prompts wait, a quarter of the rows is
/// kept for them, and what they leave goes back to the open blocks: neither starves the other.
pub fn share(needs: &[Need], rows_max: u32) -> Vec<Grant> {
    let mut grants = vec![Grant::default(); needs.len()];
    let mut order: Vec<usize> = (0..needs.len()).collect();
    order.sort_by_key(|&i| (Reverse(needs[i].priority), needs[i].last_step, needs[i].arrival));
    let prompts_wait = needs.iter().any(|need| need.splits);
    let reserved = if prompts_wait { rows_max / 4 } else { 0 };
    let mut left = rows_max;
    grant_whole(needs, &order, rows_max - reserved, &mut left, &mut grants);
    for &i in order.iter().filter(|&&i| needs[i].splits) {
        let need = &needs[i];
        if need.kept + need.open <= left {
            grants[i] = Grant { kept: need.kept, open: true };
        } else {
            // Never the whole of it without the open rows: the last granule waits for a step that takes both.
            let most = need.kept.saturating_sub(1).min(left);
            grants[i] = Grant { kept: most - most % need.granule, open: false };
        }
        left -= grants[i].rows(need);
    }
    let limit = left;
    grant_whole(needs, &order, limit, &mut left, &mut grants);
    grants
}

/// Grants unsplittable needs that have nothing yet, in order, using at most `limit` rows.
fn grant_whole(needs: &[Need], order: &[usize], limit: u32, left: &mut u32, grants: &mut [Grant]) {
    let mut used = 0;
    for &i in order {
        let rows = needs[i].kept + needs[i].open;
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

    fn denoise(arrival: u64) -> Need {
        Need { priority: 0, last_step: 0, arrival, kept: 0, granule: 1, open: 16, splits: false }
    }

    fn prompt(arrival: u64, kept: u32) -> Need {
        Need { kept, splits: true, ..denoise(arrival) }
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
            raw in prop::collection::vec((0i32..3, 0u64..9, 0u32..300, any::<bool>(), 0usize..3), 1..30),
        ) {
            let rows_max = 256;
            let needs: Vec<Need> = raw.iter().enumerate().map(|(i, &(priority, last_step, kept, splits, b))| {
                let block = [8, 16, 32][b];
                Need {
                    priority, last_step, arrival: i as u64,
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
