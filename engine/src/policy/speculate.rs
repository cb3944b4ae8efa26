//! Drafts of masked rows, decided by causal ones ([`Policy::SelfSpeculative`](super::Policy::SelfSpeculative)).
//!
//! A pass holds, one after the other, the last token, a draft of what follows, and masks. The causal row of each
//! position says the token of the next one: the draft is right as far as it says the same. What masks propose is the
//! next pass's draft, if all of this one was right. So a pass gives at least one token, as an autoregressive one would.

use super::Candidate;

/// Leading tokens of `draft` that causal rows say too: `said[i]` is what they say in the place of `draft[i]`.
pub fn confirmed(draft: &[u32], said: &[Candidate]) -> usize {
    draft.iter().zip(said).take_while(|&(&token, said)| token == said.token).count()
}

/// Leading proposals that are worth to be checked: right as a whole with probability `tau`, as far as their confidences
/// are independent.
pub fn worth_checking(proposed: &[Candidate], tau: f32) -> usize {
    let mut right = 1.0;
    let likely = |candidate: &&Candidate| {
        right *= candidate.confidence;
        right >= tau
    };
    proposed.iter().take_while(likely).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidates(items: &[(u32, f32)]) -> Vec<Candidate> {
        items.iter().map(|&(token, confidence)| Candidate { token, confidence, ..Candidate::default() }).collect()
    }

    #[test]
    fn a_draft_is_right_up_to_the_first_difference() {
        let said = candidates(&[(1, 0.9), (2, 0.9), (3, 0.9)]);
        assert_eq!(confirmed(&[], &said), 0);
        assert_eq!(confirmed(&[1, 2], &said), 2);
        assert_eq!(confirmed(&[1, 5, 3], &said), 1);
    }

    #[test]
    fn a_draft_ends_where_it_is_likely_wrong() {
        let proposed = candidates(&[(1, 0.9), (2, 0.8), (3, 0.5), (4, 1.0)]);
        assert_eq!(worth_checking(&proposed, 0.7), 2);
        assert_eq!(worth_checking(&proposed, 0.35), 4);
        assert_eq!(worth_checking(&proposed, 0.95), 0);
    }

    proptest! {
        #[test]
        fn a_smaller_bound_checks_no_less(confidences in proptest::collection::vec(0.0f32..=1.0, 0..20), a in 0.01f32..1.0, b in 0.01f32..1.0) {
            let proposed: Vec<Candidate> =
                confidences.iter().map(|&confidence| Candidate { confidence, ..Candidate::default() }).collect();
            prop_assert!(worth_checking(&proposed, a.min(b)) >= worth_checking(&proposed, a.max(b)));
        }
    }
}
