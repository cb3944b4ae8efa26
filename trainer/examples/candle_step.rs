//! One step of Qwen3-0.6B's shape with candle's own operations (f32, drawn weights), for docs/side-by-side.sh.
//!
//! `cargo run --release -p unmask-trainer --example candle_step -- ROWS CONTEXT` prints the median time in milliseconds.
//! It does what a step does: products, norms, attention over the cached keys of each block of 16 rows, logits of all
//! rows. Rotary angles and the cache's appends are left out, to candle's favour.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::{rms_norm, silu, softmax};
use std::time::Instant;

const LAYERS: usize = 28;
const HIDDEN: usize = 1024;
const FFN: usize = 3072;
const HEADS: usize = 16;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const VOCAB: usize = 151_936;
const BLOCK: usize = 16;
const STEPS: usize = 7;

struct Layer {
    norm: Tensor,
    qkv: Tensor,
    out: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    /// (KV_HEADS, HEAD_DIM, context) and (KV_HEADS, context, HEAD_DIM)
    keys: Tensor,
    values: Tensor,
}

fn drawn(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 0.02, shape, &Device::Cpu)
}

impl Layer {
    fn new(context: usize) -> Result<Layer> {
        Ok(Layer {
            norm: Tensor::ones(HIDDEN, DType::F32, &Device::Cpu)?,
            qkv: drawn(&[(HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN])?,
            out: drawn(&[HIDDEN, HEADS * HEAD_DIM])?,
            gate: drawn(&[FFN, HIDDEN])?,
            up: drawn(&[FFN, HIDDEN])?,
            down: drawn(&[HIDDEN, FFN])?,
            keys: drawn(&[KV_HEADS, HEAD_DIM, context])?,
            values: drawn(&[KV_HEADS, context, HEAD_DIM])?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let qkv = rms_norm(x, &self.norm, 1e-6)?.matmul(&self.qkv.t()?)?;
        let mixed = Tensor::cat(&self.attend(&qkv.narrow(1, 0, HEADS * HEAD_DIM)?)?, 0)?;
        let x = (x + mixed.matmul(&self.out.t()?)?)?;
        let normed = rms_norm(&x, &self.norm, 1e-6)?;
        let gated = (silu(&normed.matmul(&self.gate.t()?)?)? * normed.matmul(&self.up.t()?)?)?;
        x + gated.matmul(&self.down.t()?)?
    }

    /// Each block of rows over a context of its own.
    fn attend(&self, q: &Tensor) -> Result<Vec<Tensor>> {
        let (rows, group) = (q.dim(0)?, HEADS / KV_HEADS);
        let block = |first: usize| {
            let count = BLOCK.min(rows - first);
            let q = q.narrow(0, first, count)?.reshape((count, KV_HEADS, group * HEAD_DIM))?.transpose(0, 1)?;
            let q = q.reshape((KV_HEADS, count * group, HEAD_DIM))?;
            let scores = (q.matmul(&self.keys)? * (HEAD_DIM as f64).powf(-0.5))?;
            let mixed = softmax(&scores, D::Minus1)?.matmul(&self.values)?;
            mixed.reshape((KV_HEADS, count, group * HEAD_DIM))?.transpose(0, 1)?.reshape((count, HEADS * HEAD_DIM))
        };
        (0..rows).step_by(BLOCK).map(block).collect()
    }
}

fn main() -> Result<()> {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<usize>());
    let mut next = |default| numbers.next().unwrap_or(Ok(default)).map_err(candle_core::Error::wrap);
    let (rows, context) = (next(16)?, next(128)?);
    let layers = (0..LAYERS).map(|_| Layer::new(context)).collect::<Result<Vec<_>>>()?;
    let (head, x) = (drawn(&[VOCAB, HIDDEN])?, drawn(&[rows, HIDDEN])?);
    let mut times = Vec::new();
    for _ in 0..STEPS {
        let start = Instant::now();
        let last = layers.iter().try_fold(x.clone(), |x, layer| layer.forward(&x))?;
        last.matmul(&head.t()?)?.argmax(D::Minus1)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    #[allow(clippy::print_stdout, reason = "the result of an example")]
    {
        println!("{:.1}", times[STEPS / 2]);
    }
    Ok(())
}
