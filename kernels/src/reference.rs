//! The definition of every operation: f64, sequential, obvious. Each backend is compared with these.
//!
//! Inputs are the same f32 buffers that the kernels take (round weights to their stored format first); outputs are f64.

use crate::Epilogue;
use crate::experts::{Router, Score};
use crate::kv::{HeadShape, PAGE_SLOTS, Row};
use crate::vocab::{Bans, Draw, gumbel};

/// `epilogue(x(m,k) * W^T)` with `weights` row-major `(n, k)`. `before` holds what `out` held for [`Epilogue::Add`].
pub fn gemm(x: &[f32], weights: &[f32], k: usize, epilogue: &Epilogue<'_>, before: &[f32]) -> Vec<f64> {
    let n = weights.len() / k;
    let mut out = Vec::new();
    for (m, row) in x.chunks_exact(k).enumerate() {
        let y: Vec<f64> = weights.chunks_exact(k).map(|w| dot(row, w)).collect();
        match epilogue {
            Epilogue::Store => out.extend(y),
            Epilogue::Bias(bias) => out.extend(y.iter().zip(*bias).map(|(y, &b)| y + f64::from(b))),
            Epilogue::Add => out.extend(y.iter().zip(&before[m * n..]).map(|(y, &b)| y + f64::from(b))),
            Epilogue::SiluMul => out.extend(y.chunks_exact(2).map(|gu| gu[0] / (1.0 + (-gu[0]).exp()) * gu[1])),
        }
    }
    out
}

/// Experts of one row with their weights, ascending by number (DeepSeek-V3, section 2.1.2; Qwen3-MoE without groups
/// and bias): the highest scores among the best groups, where a group counts by its two best.
pub fn choose(router: &Router, logits: &[f32], bias: &[f32]) -> Vec<(usize, f64)> {
    let logits = widen(logits);
    let total: f64 = logits.iter().map(|x| x.exp()).sum();
    let score = |x: f64| match router.score {
        Score::Softmax => x.exp() / total,
        Score::Sigmoid => 1.0 / (1.0 + (-x).exp()),
    };
    let scores: Vec<f64> = logits.iter().map(|&x| score(x)).collect();
    let rank = |i: usize| scores[i] + bias.get(i).map_or(0.0, |&b| f64::from(b));
    let descending = |a: &f64, b: &f64| b.total_cmp(a);
    let size = router.experts / router.groups;
    let worth = |group: usize| {
        let mut ranks: Vec<f64> = (group * size..(group + 1) * size).map(rank).collect();
        ranks.sort_by(descending);
        ranks.iter().take(2).sum::<f64>()
    };
    let mut groups: Vec<usize> = (0..router.groups).collect();
    groups.sort_by(|&a, &b| worth(b).total_cmp(&worth(a)));
    groups.truncate(router.groups_chosen);
    let mut all: Vec<usize> = (0..router.experts).filter(|i| groups.contains(&(i / size))).collect();
    all.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)));
    all.truncate(router.chosen);
    all.sort_unstable();
    let sum: f64 = if router.renormalise { all.iter().map(|&i| scores[i]).sum() } else { 1.0 };
    all.into_iter().map(|i| (i, scores[i] / sum * f64::from(router.scale))).collect()
}

/// Rows of `table(vocab, width)` for each id.
pub fn embed(ids: &[u32], table: &[f32], width: usize) -> Vec<f64> {
    ids.iter().flat_map(|&id| &table[id as usize * width..][..width]).map(|&v| f64::from(v)).collect()
}

/// `x / sqrt(mean(x^2) + eps) * weight` per row (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization").
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    x.chunks_exact(weight.len()).flat_map(|row| normalise(&widen(row), weight, eps)).collect()
}

/// Keys and values of one sequence, `(positions, kv_heads, head_dim)`.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// One key per position and head.
    pub keys: Vec<f64>,
    /// One value per position and head.
    pub values: Vec<f64>,
}

/// Rotary embedding of the first `dims` elements of a head (Su et al. 2021, "RoFormer"), halves paired: `(i, i + dims/2)`.
#[derive(Clone, Copy, Debug)]
pub struct RotaryRule {
    /// Rotated elements of a head.
    pub dims: usize,
    /// Base of the frequencies.
    pub theta: f64,
}

/// Optional per-head norm of queries and keys `(query weight, key weight, eps)`, then rotary. Returns the new rows of
/// queries, keys and values; [`append`] stores them.
pub fn rope(
    qkv: &[f32],
    shape: &HeadShape,
    rotary: RotaryRule,
    norms: Option<(&[f32], &[f32], f32)>,
    rows: &[Row],
) -> Vec<f64> {
    let mut out = Vec::new();
    for (row, columns) in rows.iter().zip(qkv.chunks_exact(shape.qkv_width())) {
        for (h, head) in columns.chunks_exact(shape.head_dim).enumerate() {
            let mut head = widen(head);
            if h < shape.heads + shape.kv_heads {
                if let Some((q, k, eps)) = norms {
                    head = normalise(&head, if h < shape.heads { q } else { k }, eps);
                }
                rotate(&mut head, rotary, row.position);
            }
            out.extend(head);
        }
    }
    out
}

/// Stores the keys and values of `qkv` at the positions of the rows.
pub fn append(qkv: &[f64], shape: &HeadShape, rows: &[Row], histories: &mut [History]) {
    let width = shape.kv_heads * shape.head_dim;
    for (row, columns) in rows.iter().zip(qkv.chunks_exact(shape.qkv_width())) {
        let history = &mut histories[row.sequence as usize];
        let (start, end) = (row.position as usize * width, (row.position as usize + 1) * width);
        history.keys.resize(history.keys.len().max(end), 0.0);
        history.values.resize(history.values.len().max(end), 0.0);
        let keys = shape.heads * shape.head_dim;
        history.keys[start..end].copy_from_slice(&columns[keys..][..width]);
        history.values[start..end].copy_from_slice(&columns[keys + width..][..width]);
    }
}

/// Softmax attention of each row over positions `[0, end)` of its sequence, scores scaled by `1 / sqrt(head_dim)`.
pub fn attention(qkv: &[f32], shape: &HeadShape, rows: &[Row], histories: &[History]) -> Vec<f64> {
    let dims = shape.head_dim;
    let mut out = Vec::new();
    for (row, columns) in rows.iter().zip(qkv.chunks_exact(shape.qkv_width())) {
        let history = &histories[row.sequence as usize];
        for h in 0..shape.heads {
            let query = widen(&columns[h * dims..][..dims]);
            let at = |position: usize| (position * shape.kv_heads + h / shape.group()) * dims;
            let scores: Vec<f64> = (0..row.end as usize)
                .map(|p| {
                    query.iter().zip(&history.keys[at(p)..]).map(|(q, k)| q * k).sum::<f64>() / (dims as f64).sqrt()
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for d in 0..dims {
                let value: f64 =
                    scores.iter().enumerate().map(|(p, s)| (s - max).exp() * history.values[at(p) + d]).sum();
                out.push(value / total);
            }
        }
    }
    out
}

/// Reduction of one row of logits; fields as in [`crate::Record`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Reduced {
    pub max: f64,
    pub argmax: u32,
    pub best: f64,
    pub second: f64,
    pub sum_exp: f64,
    pub sum_x_exp: f64,
    pub chosen: u32,
    pub chosen_logit: f64,
}

/// Reduces one row of logits.
pub fn reduce(logits: &[f64], bans: &Bans, draw: &Draw) -> Reduced {
    let in_softmax = |id: &usize| !bans.softmax.contains(&(*id as u32));
    let allowed = |id: &usize| in_softmax(id) && *id < bans.vocab && !bans.argmax.contains(&(*id as u32));
    let mut ranked: Vec<usize> = (0..logits.len()).filter(allowed).collect();
    ranked.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let score = |id: usize| match draw.temperature > 0.0 {
        true => logits[id] / f64::from(draw.temperature) + f64::from(gumbel(draw.key, id as u32)),
        false => logits[id],
    };
    let chosen = ranked.iter().copied().reduce(|a, b| if score(b) > score(a) { b } else { a }).unwrap_or(0);
    let softmax: Vec<f64> = (0..logits.len()).filter(in_softmax).map(|id| logits[id]).collect();
    let max = softmax.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    Reduced {
        max,
        argmax: ranked[0] as u32,
        best: logits[ranked[0]],
        second: ranked.get(1).map_or(f64::NEG_INFINITY, |&id| logits[id]),
        sum_exp: softmax.iter().map(|x| (x - max).exp()).sum(),
        sum_x_exp: softmax.iter().map(|x| (x - max) * (x - max).exp()).sum(),
        chosen: chosen as u32,
        chosen_logit: logits[chosen],
    }
}

/// Page and slot of a position.
pub fn slot(table: &[u32], position: usize) -> (usize, usize) {
    (table[position / PAGE_SLOTS] as usize, position % PAGE_SLOTS)
}

fn widen(row: &[f32]) -> Vec<f64> {
    row.iter().map(|&v| f64::from(v)).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn normalise(row: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    row.iter().zip(weight).map(|(v, &w)| v * scale * f64::from(w)).collect()
}

fn rotate(head: &mut [f64], rotary: RotaryRule, position: u32) {
    let half = rotary.dims / 2;
    for i in 0..half {
        let angle = f64::from(position) * rotary.theta.powf(-2.0 * i as f64 / rotary.dims as f64);
        let (sin, cos) = angle.sin_cos();
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}
