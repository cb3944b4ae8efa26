#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

struct Block {
    tokens: Vec<u32>,
    masked: Vec<bool>,
    immutable: Vec<bool>,
    candidates: Vec<Candidate>,
    random: Vec<u32>,
    step: u32,
    masks_at_start: u32,
}

impl Block {
    fn masks(confidences: &[f32]) -> Self {
        let n = confidences.len();
        let candidates = confidences
            .iter()
            .enumerate()
            .map(|(i, &confidence)| Candidate {
                token: 100 + i as u32,
                confidence,
                margin: confidence,
                entropy: 1.0 - confidence,
            })
            .collect();
        Block {
            tokens: vec![0; n],
            masked: vec![true; n],
            immutable: vec![false; n],
            candidates,
            random: (0..n as u32).rev().collect(),
            step: 0,
            masks_at_start: n as u32,
        }
    }

    fn chosen(&self, policy: Policy) -> Vec<usize> {
        let mut out = Vec::new();
        let view = View {
            tokens: &self.tokens,
            masked: &self.masked,
            immutable: &self.immutable,
            candidates: &self.candidates,
            step: self.step,
            masks_at_start: self.masks_at_start,
            block_size: self.tokens.len() as u32,
            random: &self.random,
        };
        decide(&policy, &view, &mut out);
        for change in &out {
            assert_eq!(change.token, self.candidates[change.index].token);
        }
        out.into_iter().map(|change| change.index).collect()
    }
}

fn fixed(steps: u32, order: Order) -> Policy {
    Policy::Fixed { steps, order, quota: Quota::Masks }
}

fn strict(tau: f32) -> Policy {
    Policy::Threshold { tau, comparison: Comparison::Strict, quota_steps: None }
}

#[test]
fn fixed_splits_quotas_with_the_remainder_first() {
    let mut block = Block::masks(&[0.1, 0.5, 0.3, 0.4, 0.2]);
    assert_eq!(block.chosen(fixed(2, Order::Confidence)), [1, 2, 3]);
    block.step = 1;
    assert_eq!(block.chosen(fixed(2, Order::Confidence)), [1, 3]);
    assert_eq!(block.chosen(fixed(5, Order::Sequential)), [0]);
    assert_eq!(block.chosen(fixed(5, Order::Random)), [4]);
    assert_eq!(block.chosen(fixed(5, Order::Entropy)), [1]);
}

#[test]
fn threshold_takes_all_above_or_the_best_one() {
    let block = Block::masks(&[0.5, 0.9, 0.91, 0.95]);
    assert_eq!(block.chosen(strict(0.9)), [2, 3]);
    assert_eq!(block.chosen(strict(0.99)), [3]);
    let inclusive = Policy::Threshold { tau: 0.9, comparison: Comparison::Inclusive, quota_steps: None };
    assert_eq!(block.chosen(inclusive), [1, 2, 3]);
    let quota = Policy::Threshold { tau: 0.99, comparison: Comparison::Strict, quota_steps: Some(2) };
    assert_eq!(block.chosen(quota), [2, 3]);
}

#[test]
fn equal_confidences_fall_from_the_left() {
    assert_eq!(Block::masks(&[0.4, 0.4, 0.4]).chosen(strict(0.9)), [0]);
}

#[test]
fn factor_accepts_the_longest_prefix() {
    // Bounds for factor 1: always, 1 - 1/3, 1 - 1/4.
    assert_eq!(Block::masks(&[0.2, 0.7, 0.8]).chosen(Policy::Factor { factor: 1.0, last_falls: false }), [1, 2]);
    assert_eq!(Block::masks(&[0.6, 0.5, 0.8]).chosen(Policy::Factor { factor: 1.0, last_falls: false }), [2]);
}

#[test]
fn entropy_bounds_differ_by_the_largest() {
    let block = Block::masks(&[0.9, 0.8, 0.5]); // entropies 0.1, 0.2, 0.5
    let bounded = |gamma, bound| Policy::EntropyBounded { gamma, bound };
    assert_eq!(block.chosen(bounded(0.15, Bound::AllButLargest)), [0, 1]);
    assert_eq!(block.chosen(bounded(0.15, Bound::Cumulative)), [0]);
    assert_eq!(block.chosen(bounded(0.0, Bound::Cumulative)), [0]);
    assert_eq!(block.chosen(bounded(0.35, Bound::AllButLargest)), [0, 1, 2]);
}

#[test]
fn hierarchical_takes_the_best_of_each_run() {
    let mut block = Block::masks(&[0.5, 0.6, 0.0, 0.3, 0.45, 0.95]);
    block.masked[2] = false;
    assert_eq!(block.chosen(Policy::Hierarchical { low: 0.4, high: 0.9 }), [1, 5]);
    assert_eq!(block.chosen(Policy::Hierarchical { low: 0.97, high: 0.99 }), [5]);
}

#[test]
fn joint_edit_fills_masks_and_replaces_what_the_model_doubts() {
    let mut block = Block::masks(&[0.95, 0.95, 0.95, 0.2]);
    block.masked = vec![false, false, false, true];
    block.immutable = vec![true, false, false, false];
    block.tokens = vec![7, 7, 102, 0];
    let policy = Policy::JointEdit { tau: 0.5, tau_edit: 0.9, max_post_steps: 4, at_least: 1 };
    assert_eq!(block.chosen(policy), [1, 3]);
}

#[test]
fn every_bad_number_is_named() {
    assert!(strict(f32::NAN).violations(8)[0].message.contains("NaN"));
    assert_eq!(fixed(9, Order::Confidence).violations(8)[0].field, "policy.fixed.steps");
    assert_eq!(Policy::JointEdit { tau: 0.0, tau_edit: 2.0, max_post_steps: 99, at_least: 1 }.violations(8).len(), 3);
    assert!(Policy::Hierarchical { low: 0.2, high: 0.9 }.violations(8).is_empty());
}

#[test]
fn json_form_is_closed() {
    let policy: Policy = serde_json::from_str(r#"{"threshold": {"tau": 0.9}}"#).unwrap();
    assert_eq!(policy, strict(0.9));
    assert!(serde_json::from_str::<Policy>(r#"{"threshold": {"tau": 0.9, "beta": 1}}"#).is_err());
    assert_eq!(serde_json::from_str::<Policy>(r#""autoregressive""#).unwrap(), Policy::Autoregressive);
}

fn any_policy() -> impl Strategy<Value = Policy> {
    let unit = 0.01f32..=1.0;
    prop_oneof![
        (1u32..=8, 0usize..5).prop_map(|(steps, order)| fixed(
            steps,
            [Order::Confidence, Order::Margin, Order::Entropy, Order::Sequential, Order::Random][order]
        )),
        unit.clone().prop_map(strict),
        (0.1f32..8.0).prop_map(|factor| Policy::Factor { factor, last_falls: false }),
        (0.0f32..4.0).prop_map(|gamma| Policy::EntropyBounded { gamma, bound: Bound::AllButLargest }),
        (unit.clone(), unit.clone()).prop_map(|(a, b)| Policy::Hierarchical { low: a.min(b), high: a.max(b) }),
        (unit.clone(), unit).prop_map(|(tau, tau_edit)| Policy::JointEdit {
            tau,
            tau_edit,
            max_post_steps: 4,
            at_least: 1
        }),
        Just(Policy::Autoregressive),
    ]
}

proptest! {
    #[test]
    fn a_mask_falls_in_every_step_and_the_prompt_stays(
        policy in any_policy(),
        rows in prop::collection::vec((0.0f32..=1.0, any::<bool>(), any::<bool>()), 8),
        step in 0u32..8,
    ) {
        let mut block = Block::masks(&rows.iter().map(|r| r.0).collect::<Vec<_>>());
        block.masked = rows.iter().map(|r| r.1).collect();
        block.immutable = rows.iter().map(|r| r.2 && !r.1).collect();
        block.step = step;
        let chosen = block.chosen(policy);
        let masks = block.masked.iter().filter(|m| **m).count();
        prop_assert!(chosen.windows(2).all(|w| w[0] < w[1]));
        prop_assert!(masks == 0 || chosen.iter().any(|&i| block.masked[i]));
        prop_assert!(chosen.iter().all(|&i| !block.immutable[i]));
        prop_assert!(policy.edits() || chosen.iter().all(|&i| block.masked[i]));
    }
}
