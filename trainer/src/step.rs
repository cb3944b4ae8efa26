//! One optimiser step: micro-batches spread over threads, gradients summed in a fixed order. Knows nothing of how the
//! examples were corrupted, so every stage uses it.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::Tensor;

use crate::{
    layout::{Batch, Counts, Example, micro_batches},
    model::Model,
};

/// Losses of a step or a measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// Sum over noisy targets, nats.
    pub noisy: f64,
    /// Sum over next-token targets, nats.
    pub next: f64,
    /// Number of targets.
    pub counts: Counts,
}

impl Losses {
    /// Mean over noisy targets.
    pub fn noisy_mean(&self) -> f64 {
        self.noisy / self.counts.noisy.max(1) as f64
    }

    /// Mean over next-token targets.
    pub fn next_mean(&self) -> f64 {
        self.next / self.counts.next.max(1) as f64
    }
}

/// Runs `task(0..count)` on `threads` threads and returns the results in order.
fn spread<T: Send>(
    count: usize,
    threads: usize,
    task: impl Fn(usize) -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<anyhow::Result<T>>>> = (0..count).map(|_| Mutex::new(None)).collect();
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(slot) = results.get(index) else { return };
            let result = task(index);
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(count) {
            scope.spawn(work);
        }
        work();
    });
    let take = |slot: Mutex<Option<anyhow::Result<T>>>| {
        let result = slot.into_inner().unwrap_or_else(PoisonError::into_inner);
        result.unwrap_or_else(|| Err(anyhow::anyhow!("a micro-batch was not computed")))
    };
    results.into_iter().map(take).collect()
}

fn add_up(parts: impl Iterator<Item = (Vec<f32>, usize)>, counts: Counts) -> Losses {
    let mut losses = Losses { counts, ..Losses::default() };
    for (values, noisy) in parts {
        let (first, second) = values.split_at(noisy);
        losses.noisy += first.iter().map(|&x| f64::from(x)).sum::<f64>();
        losses.next += second.iter().map(|&x| f64::from(x)).sum::<f64>();
    }
    losses
}

/// How a step is spread over the machine.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// Rows per micro-batch.
    pub micro_rows: usize,
    /// Threads.
    pub threads: usize,
}

/// Gradient of `mean(noisy) + lambda * mean(next)` over `examples`: one list of tensors per micro-batch, in parameter
/// order, to be added up; and the losses.
///
/// # Errors
/// When a token or position is out of range.
pub fn gradients(
    model: &Model,
    examples: &[Example],
    lambda: f32,
    spread_over: Spread,
) -> anyhow::Result<(Vec<Vec<Tensor>>, Losses)> {
    let counts = Counts::of(examples);
    let parts = micro_batches(examples, spread_over.micro_rows, spread_over.threads);
    let done = spread(parts.len(), spread_over.threads, |index| {
        let batch = Batch::new(parts[index], counts.weights(lambda));
        let scored = model.score(&batch, true)?;
        let mut store = scored.loss.backward()?;
        let gradient = |var: &candle_core::Var| store.remove(var).map_or_else(|| var.zeros_like(), Ok);
        let tensors: candle_core::Result<Vec<Tensor>> = model.parameters().iter().map(gradient).collect();
        Ok((tensors?, scored.losses, batch.noisy_targets))
    })?;
    let (mut tensors, mut losses) = (Vec::with_capacity(done.len()), Vec::with_capacity(done.len()));
    for (gradient, values, noisy) in done {
        tensors.push(gradient);
        losses.push((values, noisy));
    }
    Ok((tensors, add_up(losses.into_iter(), counts)))
}

/// Cross-entropy in nats of the scored noisy rows of each example, in order of position.
///
/// # Errors
/// When a token or position is out of range.
pub fn noisy_losses(model: &Model, examples: &[Example], spread_over: Spread) -> anyhow::Result<Vec<Vec<f32>>> {
    let parts = micro_batches(examples, spread_over.micro_rows, spread_over.threads);
    let done = spread(parts.len(), spread_over.threads, |index| {
        let losses = model.score(&Batch::new(parts[index], (1.0, 0.0)), false)?.losses;
        let mut rest = losses.as_slice();
        let mut take = |example: &Example| {
            let (own, others) = rest.split_at(example.scored.iter().filter(|&&scored| scored).count());
            rest = others;
            own.to_vec()
        };
        Ok(parts[index].iter().map(&mut take).collect::<Vec<_>>())
    })?;
    Ok(done.into_iter().flatten().collect())
}

/// Losses over `examples` without gradients.
///
/// # Errors
/// When a token or position is out of range.
pub fn losses(model: &Model, examples: &[Example], spread_over: Spread) -> anyhow::Result<Losses> {
    let parts = micro_batches(examples, spread_over.micro_rows, spread_over.threads);
    let done = spread(parts.len(), spread_over.threads, |index| {
        let batch = Batch::new(parts[index], (1.0, 1.0));
        Ok((model.score(&batch, false)?.losses, batch.noisy_targets))
    })?;
    Ok(add_up(done.into_iter(), Counts::of(examples)))
}
