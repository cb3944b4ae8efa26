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
    assert_eq!(grants, [Grant { kept: 96, open: false }, Grant { kept: 0, open: true }, Grant { kept: 0, open: true }]);
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

/// A request as the planner sees it, with a device that is only a cost table.
#[derive(Debug, Clone)]
struct Simulated {
    need: Need,
    /// Step before which it has not arrived.
    arrives: u64,
    /// Prompt rows to come, then blocks of `steps` passes each.
    blocks: u32,
    steps: u32,
    step: u32,
    /// Steps, their time, and most equals since it last had rows or somebody of a larger priority could run.
    waited: u64,
    waited_us: u64,
    equals: u64,
}

impl Simulated {
    fn grant(&mut self, grant: Grant) {
        self.need.waited = 0;
        self.need.kept -= grant.kept;
        if !grant.open {
            return;
        }
        self.need.splits = false;
        self.step += 1;
        if self.step == self.steps {
            // The store of this block rides with the first pass of the next.
            (self.step, self.blocks, self.need.kept) = (0, self.blocks - 1, self.need.open);
        }
    }
}

const ROWS_MAX: u32 = 256;
/// Requests that run at once.
const PLACES: usize = 24;

/// Time of a step (microseconds) by its rows: flat while the weights are read, then linear.
fn cost_us(rows: u32, table: (u64, u64)) -> u64 {
    table.0.max(u64::from(rows) * table.1)
}

/// Who may run: the first `PLACES` in order that have arrived.
fn running(requests: &[Simulated], step: u64) -> Vec<usize> {
    let mut here: Vec<usize> =
        (0..requests.len()).filter(|&i| requests[i].arrives <= step && requests[i].blocks > 0).collect();
    here.sort_unstable_by_key(|&i| (Reverse(requests[i].need.priority), requests[i].need.deadline, i));
    here.truncate(PLACES);
    here
}

fn simulated(index: usize, drawn: (u64, i32, u32, u32, u32, u64)) -> Simulated {
    let (arrives, priority, prompt, block, work, deadline) = drawn;
    let open = [4, 16, 32][block as usize];
    let need = Need {
        priority,
        deadline: if deadline < 8 { deadline } else { u64::MAX },
        arrival: index as u64,
        waited: 0,
        kept: prompt,
        granule: if work % 2 == 0 { open } else { 1 },
        open,
        splits: prompt > 0,
    };
    let (blocks, steps) = (1 + work / 4, 1 + work % 7);
    Simulated { need, arrives, blocks, steps, step: 0, waited: 0, waited_us: 0, equals: 0 }
}

proptest! {
    /// The bound of the module's first lines, over drawn arrivals, for prompts and blocks alike.
    #[test]
    fn nobody_waits_longer_than_the_bound(
        drawn in prop::collection::vec((0u64..60, 0i32..2, 0u32..2000, 0u32..3, 0u32..60, 0u64..16), 1..80),
        table in (100u64..2000, 1u64..20),
    ) {
        let mut requests: Vec<Simulated> = drawn.into_iter().enumerate().map(|(i, d)| simulated(i, d)).collect();
        let mut plan = Plan::default();
        for step in 0u64.. {
            prop_assert!(step < 100_000, "no end");
            let here = running(&requests, step);
            if here.is_empty() && requests.iter().all(|request| request.arrives <= step) {
                break;
            }
            plan.clear();
            plan.needs.extend(here.iter().map(|&i| requests[i].need));
            plan.share(ROWS_MAX);
            let rows = plan.grants().iter().zip(&plan.needs).map(|(grant, need)| grant.rows(need)).sum();
            let top = plan.needs.iter().map(|need| need.priority).max();
            let equals = plan.needs.iter().filter(|need| Some(need.priority) == top).count() as u64;
            for prompts in [true, false] {
                let mut kind = (0..here.len()).filter(|&k| plan.needs[k].splits == prompts && Some(plan.needs[k].priority) == top).peekable();
                let any = kind.peek().is_some();
                prop_assert!(!any || kind.any(|k| plan.grants()[k].rows(&plan.needs[k]) > 0), "one kind starves the other");
            }
            for (k, &i) in here.iter().enumerate() {
                let (grant, need) = (plan.grants()[k], plan.needs[k]);
                let request = &mut requests[i];
                if grant.rows(&need) > 0 {
                    request.grant(grant);
                    (request.waited, request.waited_us, request.equals) = (0, 0, 0);
                    continue;
                }
                request.need.waited += 1;
                if Some(need.priority) != top {
                    (request.waited, request.waited_us, request.equals) = (0, 0, 0);
                    continue;
                }
                request.waited += 1;
                request.waited_us += cost_us(rows, table);
                request.equals = request.equals.max(equals);
                let bound = WAIT_STEPS_MAX + request.equals;
                prop_assert!(request.waited < bound, "waits {} steps, bound {bound}", request.waited);
                prop_assert!(request.waited_us <= bound * cost_us(ROWS_MAX, table));
            }
        }
    }
}
