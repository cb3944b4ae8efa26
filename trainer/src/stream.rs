//! The order of training documents: a fresh permutation per epoch. What comes next depends only on the seed and on the
//! number of documents drawn, so a resumed run sees exactly what an uninterrupted one would.

use std::collections::VecDeque;

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::data::Documents;

/// Documents encoded ahead, in parallel.
const AHEAD: u64 = 64;

/// What a generator is for: generators of different purposes never share numbers.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// Fresh weights.
    Weights,
    /// Order of an epoch.
    Order,
    /// Cutting of one document.
    Document,
    /// Corruption of one step.
    Noise,
    /// Held-out measurement.
    HeldOut,
    /// Prompts of one round of on-policy training.
    Prompts,
}

/// The generator of `seed` for one purpose and one index within it.
pub fn generator(seed: u64, purpose: Purpose, index: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_mul(8).wrapping_add(purpose as u64));
    rng.set_stream(index);
    rng
}

/// Encodes document `index` and cuts it to `length` tokens: from its beginning half of the time, else from anywhere.
pub fn encode(documents: &dyn Documents, index: usize, length: usize, rng: &mut ChaCha8Rng) -> Vec<u32> {
    let mut tokens = documents.encode(index, rng);
    if tokens.len() > length {
        let start = if rng.random() { 0 } else { rng.random_range(0..=tokens.len() - length) };
        tokens.drain(..start);
        tokens.truncate(length);
    }
    tokens
}

/// An endless sequence of documents.
pub struct Stream<'a> {
    documents: &'a dyn Documents,
    seed: u64,
    length: usize,
    drawn: u64,
    order: (u64, Vec<u32>),
    ready: VecDeque<Vec<u32>>,
}

impl<'a> Stream<'a> {
    /// The sequence after `drawn` documents; each has at most `length` tokens. `documents` must not be empty.
    pub fn new(documents: &'a dyn Documents, seed: u64, length: usize, drawn: u64) -> Stream<'a> {
        Stream { documents, seed, length, drawn, order: (u64::MAX, Vec::new()), ready: VecDeque::new() }
    }

    /// Documents drawn so far.
    pub fn drawn(&self) -> u64 {
        self.drawn
    }

    fn index(&mut self, number: u64) -> usize {
        let count = self.documents.len() as u64;
        let epoch = number / count;
        if self.order.0 != epoch {
            let mut order: Vec<u32> = (0..count as u32).collect();
            order.shuffle(&mut generator(self.seed, Purpose::Order, epoch));
            self.order = (epoch, order);
        }
        self.order.1[(number % count) as usize] as usize
    }

    /// The next document.
    pub fn next_document(&mut self) -> Vec<u32> {
        if self.ready.is_empty() {
            let numbers: Vec<(u64, usize)> = (self.drawn..self.drawn + AHEAD).map(|n| (n, self.index(n))).collect();
            let (documents, seed, length) = (self.documents, self.seed, self.length);
            let encoded: Vec<Vec<u32>> = numbers
                .into_par_iter()
                .map(|(n, index)| encode(documents, index, length, &mut generator(seed, Purpose::Document, n)))
                .collect();
            self.ready = encoded.into();
        }
        self.drawn += 1;
        self.ready.pop_front().unwrap_or_default()
    }

    /// Documents with together at least `tokens` tokens.
    pub fn step(&mut self, tokens: usize) -> Vec<Vec<u32>> {
        let (mut drawn, mut seen) = (Vec::new(), 0);
        while seen < tokens {
            let document = self.next_document();
            seen += document.len().max(1);
            if !document.is_empty() {
                drawn.push(document);
            }
        }
        drawn
    }
}
