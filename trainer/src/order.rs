//! Orders in which a text's masks may fall, sampled from the model and scored (Seed Diffusion, section 3.2).

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::{
    layout::Example,
    model::Model,
    step::{Spread, noisy_losses},
    trajectory::{Answer, Trajectory},
};

/// How orders are sampled.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Orders per text.
    pub orders: usize,
    /// Of the Gumbel noise on log-probabilities; 0 always reveals the likeliest.
    pub temperature: f32,
    /// Token of a masked position.
    pub mask: u32,
    /// Token that fills the last block.
    pub end: u32,
}

/// One order of one text being sampled.
struct Draft {
    text: usize,
    example: Example,
    reveal: Vec<u16>,
    /// Sum of the log-probabilities of the tokens at the moment they were revealed: the order's ELBO, in nats.
    elbo: f64,
}

/// Samples `orders` orders in which the answers to their prompts fall, all of one text with the same number of passes per
/// block, and returns the best of each with its ELBO per token: the sum of `log p(token | state before its pass)`.
///
/// # Errors
/// When a token or position is out of the model's range.
pub fn best_orders(
    model: &Model,
    texts: &[Answer],
    block: usize,
    sampling: Sampling,
    spread: Spread,
    rng: &mut ChaCha8Rng,
) -> anyhow::Result<Vec<(Trajectory, f64)>> {
    let passes: Vec<u16> = texts.iter().map(|_| rng.random_range(1..=block.min(u16::MAX as usize) as u16)).collect();
    let mut drafts: Vec<Draft> = (0..texts.len() * sampling.orders)
        .map(|index| Draft::new(index / sampling.orders, &texts[index / sampling.orders], block, sampling))
        .collect();
    for pass in 1..=block as u16 {
        let (indices, examples): (Vec<usize>, Vec<Example>) = drafts
            .iter()
            .enumerate()
            .filter(|(_, draft)| draft.example.scored.contains(&true))
            .map(|(index, draft)| (index, draft.example.clone()))
            .unzip();
        let losses = noisy_losses(model, &examples, spread)?;
        for (index, losses) in indices.into_iter().zip(losses) {
            let draft = &mut drafts[index];
            draft.reveal_some(pass, passes[draft.text], &losses, sampling.temperature, rng);
        }
    }
    let mut best: Vec<Option<Draft>> = texts.iter().map(|_| None).collect();
    for draft in drafts {
        let slot = &mut best[draft.text];
        if slot.as_ref().is_none_or(|other| draft.elbo > other.elbo) {
            *slot = Some(draft);
        }
    }
    let finish = |draft: Draft| {
        let Example { clean: tokens, length, .. } = draft.example;
        let fell = draft.reveal.iter().filter(|pass| **pass > 0).count();
        let per_token = draft.elbo / fell.max(1) as f64;
        (Trajectory { tokens, length, block, reveal: draft.reveal }, per_token)
    };
    Ok(best.into_iter().flatten().map(finish).collect())
}

impl Draft {
    fn new(index: usize, text: &Answer, block: usize, sampling: Sampling) -> Draft {
        let first = text.prompt / block * block;
        let mut clean = text.tokens.clone();
        clean.resize(text.tokens.len().next_multiple_of(block), sampling.end);
        let scored: Vec<bool> = (first..clean.len()).map(|at| at >= text.prompt).collect();
        let mut noisy = clean[first..].to_vec();
        noisy.iter_mut().zip(&scored).filter(|(_, scored)| **scored).for_each(|(token, _)| *token = sampling.mask);
        let reveal = vec![0; noisy.len()];
        Draft {
            text: index,
            example: Example { clean, noisy, scored, block, length: text.tokens.len() },
            reveal,
            elbo: 0.0,
        }
    }

    /// Reveals, in every block, an even share of what is masked, so that nothing is left after `passes` passes: the
    /// likeliest under Gumbel noise. `losses` belong to the masked positions in order.
    fn reveal_some(&mut self, pass: u16, passes: u16, losses: &[f32], temperature: f32, rng: &mut ChaCha8Rng) {
        let Example { clean, noisy, scored, block, .. } = &mut self.example;
        let clean = &clean[clean.len() - noisy.len()..];
        let mut losses = losses.iter();
        for start in (0..clean.len()).step_by(*block) {
            let mut masked: Vec<(f32, usize, f32)> = (start..start + *block)
                .filter(|&at| scored[at])
                .zip(&mut losses)
                .map(|(at, &loss)| (loss - temperature * gumbel(rng), at, loss))
                .collect();
            masked.sort_by(|a, b| a.0.total_cmp(&b.0));
            let quota = masked.len().div_ceil(usize::from(passes.saturating_sub(pass)) + 1);
            for &(_, at, loss) in &masked[..quota] {
                (noisy[at], scored[at], self.reveal[at]) = (clean[at], false, pass);
                self.elbo -= f64::from(loss);
            }
        }
    }
}

/// A draw from the standard Gumbel distribution.
fn gumbel(rng: &mut ChaCha8Rng) -> f32 {
    let uniform: f32 = rng.random_range(f32::MIN_POSITIVE..1.0);
    -(-uniform.ln()).ln()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use rand::SeedableRng;

    const SAMPLING: Sampling = Sampling { orders: 1, temperature: 0.0, mask: 1, end: 0 };

    #[test]
    fn every_position_falls_within_the_passes_and_the_score_is_the_sum() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let text = Answer { tokens: (10..25).collect(), prompt: 0 };
        let mut draft = Draft::new(0, &text, 8, SAMPLING);
        for pass in 1..=3 {
            let masked = draft.example.scored.iter().filter(|s| **s).count();
            draft.reveal_some(pass, 3, &vec![0.5; masked], 1.0, &mut rng);
        }
        assert!(draft.reveal.iter().all(|pass| (1..=3).contains(pass)), "{:?}", draft.reveal);
        assert_eq!(draft.example.noisy, draft.example.clean);
        assert_eq!((draft.example.clean[15], draft.example.length), (SAMPLING.end, 15));
        assert!((draft.elbo + 8.0).abs() < 1e-6);
    }

    #[test]
    fn prompts_are_given() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut draft = Draft::new(0, &Answer { tokens: (10..21).collect(), prompt: 6 }, 4, SAMPLING);
        assert_eq!(draft.example.prompt(), 4);
        assert_eq!(draft.example.noisy, [14, 15, 1, 1, 1, 1, 1, 1]);
        draft.reveal_some(1, 1, &[1.0; 6], 0.0, &mut rng);
        assert_eq!(draft.reveal, [0, 0, 1, 1, 1, 1, 1, 1]);
        assert_eq!(draft.example.noisy, [14, 15, 16, 17, 18, 19, 20, 0]);
    }

    #[test]
    fn without_noise_the_likeliest_fall_first() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut draft = Draft::new(0, &Answer { tokens: vec![10, 11, 12, 13], prompt: 0 }, 4, SAMPLING);
        draft.reveal_some(1, 2, &[3.0, 0.1, 2.0, 0.2], 0.0, &mut rng);
        assert_eq!(draft.reveal, [0, 1, 0, 1]);
    }
}
