//! A toy language and a model for it.

use std::path::Path;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use unmask_trainer::{RawMaskStage, data::Documents};

/// A random word of seven letters and the same word again.
pub struct Copies;

impl Documents for Copies {
    fn len(&self) -> usize {
        50
    }

    fn encode(&self, _: usize, rng: &mut ChaCha8Rng) -> Vec<u32> {
        let word: Vec<u32> = (0..7).map(|_| rng.random_range(6..14)).collect();
        [word.clone(), word, vec![0]].concat()
    }
}

/// Settings of a small run; `more` are further keys.
pub fn stage(out: &Path, steps: usize, more: &str) -> RawMaskStage {
    let text = format!(
        r#"
        out = {:?}
        steps = {steps}
        threads = 2
        {more}
        [model]
        hidden_size = 32
        intermediate_size = 64
        num_hidden_layers = 2
        num_attention_heads = 4
        num_key_value_heads = 2
        head_dim = 8
        max_position_embeddings = 64
        [batch]
        tokens = 400
        length = 32
        micro_rows = 300
        block_sizes = [4, 8]
        [optimizer]
        rule = "muon"
        rate = 5e-3
        warm_up = 1
        decay = "cosine"
        average = 0.9
        [eval]
        every = 1000
        documents = 8
        [decode]
        block_size = 8
        tau = 0.9
        max_tokens = 32
        "#,
        out.display().to_string()
    );
    toml::from_str(&text).unwrap()
}
