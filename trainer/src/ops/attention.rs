//! Attention over the doubled layout, forward and backward, exploiting that a row sees a prefix of the clean rows and,
//! if it is noisy, its own block. Rows are handled in tiles of positions with all query heads of one key head together.

use super::{
    Heads,
    gemm::{Packing, View, gemm},
    math,
};

/// Positions per tile when blocks are not larger.
const TILE: usize = 32;

/// One document in a batch: its noisy rows, then as many clean rows, at positions `0..length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document {
    /// First noisy row in the batch; the clean rows start at `start + length`.
    pub start: usize,
    /// Positions, a multiple of `block`.
    pub length: usize,
    /// Positions per block.
    pub block: usize,
}

/// The rule: which rows a row of `document` attends to, as row ranges in the batch (clean prefix, own noisy block).
///
/// Clean row p: clean rows [0, p]. Noisy row p of block [s, e): clean rows [0, s) and noisy rows [s, e).
pub fn reach(document: &Document, clean: bool, position: usize) -> [std::ops::Range<usize>; 2] {
    let first_clean = document.start + document.length;
    if clean {
        return [first_clean..first_clean + position + 1, 0..0];
    }
    let block = position / document.block * document.block;
    let own = document.start + block;
    [first_clean..first_clean + block, own..own + document.block]
}

/// Positions `start..start + rows` of one half against `prefix` clean keys and the tile's own `own` noisy keys.
struct Tile {
    clean: bool,
    start: usize,
    rows: usize,
    prefix: usize,
    own: usize,
}

impl Tile {
    fn width(&self) -> usize {
        self.prefix + self.own
    }

    /// Score columns that the row at `offset` sees: `0..prefix` and a range of the own keys.
    #[inline(always)]
    fn columns(&self, document: &Document, offset: usize) -> (usize, std::ops::Range<usize>) {
        let [prefix, own] = reach(document, self.clean, self.start + offset);
        let shift = document.start + self.start;
        let own = if self.clean { 0..0 } else { own.start - shift + self.prefix..own.end - shift + self.prefix };
        (prefix.len(), own)
    }
}

fn tiles(document: &Document) -> impl Iterator<Item = Tile> + use<> {
    let Document { length, block, .. } = *document;
    let step = block * (TILE / block).max(1);
    [false, true].into_iter().flat_map(move |clean| {
        (0..length).step_by(step).map(move |start| {
            let rows = step.min(length - start);
            if clean {
                Tile { clean, start, rows, prefix: start + rows, own: 0 }
            } else {
                Tile { clean, start, rows, prefix: start + rows - block, own: rows }
            }
        })
    })
}

/// Buffers of one tile.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
    result: Vec<f32>,
    slopes: Vec<f32>,
    packing: Packing,
}

/// One document's rows in a (rows, width) buffer, for one key head.
struct Place<'a> {
    heads: &'a Heads,
    document: &'a Document,
    kv: usize,
}

impl Place<'_> {
    fn row(&self, tile: &Tile) -> usize {
        self.document.start + tile.start + if tile.clean { self.document.length } else { 0 }
    }

    fn group(&self) -> usize {
        self.heads.heads / self.heads.kv_heads
    }

    /// Offsets in qkv of the first clean key (or value) row and of the tile's own noisy ones.
    fn keys(&self, tile: &Tile, value: bool) -> (usize, usize) {
        let head = self.heads.heads + self.kv + if value { self.heads.kv_heads } else { 0 };
        let width = self.heads.width();
        let first = (self.document.start + self.document.length) * width + head * self.heads.head_dim;
        (first, self.row(tile) * width + head * self.heads.head_dim)
    }

    /// Copies the tile's rows of this group's heads from a (rows, width) buffer, times `factor`.
    fn gather(&self, tile: &Tile, from: &[f32], width: usize, factor: f32, to: &mut Vec<f32>) {
        let dim = self.heads.head_dim;
        to.resize(self.group() * tile.rows * dim, 0.0);
        for (index, out) in to.chunks_exact_mut(dim).enumerate() {
            let (head, offset) = (self.kv * self.group() + index / tile.rows, index % tile.rows);
            let start = (self.row(tile) + offset) * width + head * dim;
            for (out, x) in out.iter_mut().zip(&from[start..start + dim]) {
                *out = x * factor;
            }
        }
    }

    fn scatter(&self, tile: &Tile, from: &[f32], to: &mut [f32], width: usize, factor: f32) {
        let dim = self.heads.head_dim;
        for (index, x) in from.chunks_exact(dim).enumerate() {
            let (head, offset) = (self.kv * self.group() + index / tile.rows, index % tile.rows);
            let start = (self.row(tile) + offset) * width + head * dim;
            for (out, x) in to[start..start + dim].iter_mut().zip(x) {
                *out = x * factor;
            }
        }
    }

    /// `out(group rows, tile.width()) = left . right^T` where `right` are the tile's keys or values in `qkv`.
    fn against_keys(&self, tile: &Tile, left: &[f32], qkv: &[f32], value: bool, out: &mut Vec<f32>, p: &mut Packing) {
        let (m, dim, stride) = (self.group() * tile.rows, self.heads.head_dim, tile.width());
        let (clean, own) = self.keys(tile, value);
        out.resize(m * stride, 0.0);
        let right = |offset| View { data: &qkv[offset..], row: 1, column: self.heads.width() };
        gemm((m, tile.prefix, dim), View::rows(left, dim), right(clean), out, stride, false, p);
        if tile.own > 0 {
            let out = &mut out[tile.prefix..];
            gemm((m, tile.own, dim), View::rows(left, dim), right(own), out, stride, false, p);
        }
    }

    /// `out(group rows, head_dim) = left(group rows, tile.width()) . right`, `right` as in [`Place::against_keys`].
    fn over_keys(&self, tile: &Tile, left: &[f32], qkv: &[f32], value: bool, out: &mut Vec<f32>, p: &mut Packing) {
        let (m, dim, stride) = (self.group() * tile.rows, self.heads.head_dim, tile.width());
        let (clean, own) = self.keys(tile, value);
        out.resize(m * dim, 0.0);
        let right = |offset| View { data: &qkv[offset..], row: self.heads.width(), column: 1 };
        let part = |start: usize| View { data: &left[start..], row: stride, column: 1 };
        if tile.prefix == 0 {
            out.fill(0.0);
        }
        gemm((m, dim, tile.prefix), part(0), right(clean), out, dim, false, p);
        if tile.own > 0 {
            gemm((m, dim, tile.own), part(tile.prefix), right(own), out, dim, true, p);
        }
    }

    /// Adds `left^T . right` to the gradient rows of the tile's keys or values.
    fn add_to_keys(&self, tile: &Tile, left: &[f32], right: &[f32], dqkv: &mut [f32], value: bool, p: &mut Packing) {
        let (m, dim, stride) = (self.group() * tile.rows, self.heads.head_dim, tile.width());
        let (clean, own) = self.keys(tile, value);
        let width = self.heads.width();
        let part = |start: usize| View { data: &left[start..], row: 1, column: stride };
        gemm((tile.prefix, dim, m), part(0), View::rows(right, dim), &mut dqkv[clean..], width, true, p);
        if tile.own > 0 {
            gemm((tile.own, dim, m), part(tile.prefix), View::rows(right, dim), &mut dqkv[own..], width, true, p);
        }
    }

    /// Attention probabilities of the tile into `scratch.scores`, scaled queries into `scratch.queries`.
    fn probabilities(&self, tile: &Tile, qkv: &[f32], scratch: &mut Scratch) {
        let factor = (self.heads.head_dim as f32).sqrt().recip();
        self.gather(tile, qkv, self.heads.width(), factor, &mut scratch.queries);
        self.against_keys(tile, &scratch.queries, qkv, false, &mut scratch.scores, &mut scratch.packing);
        let (width, document) = (tile.width(), self.document);
        let scores = &mut scratch.scores;
        math::vectorized(#[inline(always)] || {
            for (index, row) in scores.chunks_exact_mut(width).enumerate() {
                let (prefix, own) = tile.columns(document, index % tile.rows);
                softmax(row, prefix, own);
            }
        });
    }
}

/// Softmax over `0..prefix` and `own`; zero elsewhere.
#[inline(always)]
fn softmax(row: &mut [f32], prefix: usize, own: std::ops::Range<usize>) {
    let max = math::largest(&row[..prefix]).max(math::largest(&row[own.clone()]));
    let total = math::exp_sum(&mut row[..prefix], max) + math::exp_sum(&mut row[own.clone()], max);
    let end = row.len();
    if own.is_empty() {
        row[prefix..end].fill(0.0);
    } else {
        row[prefix..own.start].fill(0.0);
        row[own.end..end].fill(0.0);
    }
    math::scale(row, total.recip());
}

/// `out(rows, heads * head_dim)` from queries, keys and values in `qkv(rows, heads.width())`.
pub fn attention(qkv: &[f32], heads: &Heads, documents: &[Document], out: &mut [f32]) {
    let mut scratch = Scratch::default();
    for (document, kv) in documents.iter().flat_map(|d| (0..heads.kv_heads).map(move |kv| (d, kv))) {
        let place = Place { heads, document, kv };
        for tile in tiles(document) {
            place.probabilities(&tile, qkv, &mut scratch);
            let Scratch { scores, result, packing, .. } = &mut scratch;
            place.over_keys(&tile, scores, qkv, true, result, packing);
            place.scatter(&tile, result, out, heads.heads * heads.head_dim, 1.0);
        }
    }
}

/// Gradient of [`attention`]: `dqkv` is overwritten.
pub fn attention_backward(qkv: &[f32], heads: &Heads, documents: &[Document], dout: &[f32], dqkv: &mut [f32]) {
    let mut scratch = Scratch::default();
    let factor = (heads.head_dim as f32).sqrt().recip();
    dqkv.fill(0.0);
    for (document, kv) in documents.iter().flat_map(|d| (0..heads.kv_heads).map(move |kv| (d, kv))) {
        let place = Place { heads, document, kv };
        for tile in tiles(document) {
            place.probabilities(&tile, qkv, &mut scratch);
            let Scratch { queries, scores, result, slopes, packing } = &mut scratch;
            place.gather(&tile, dout, heads.heads * heads.head_dim, 1.0, result);
            place.add_to_keys(&tile, scores, result, dqkv, true, packing);
            place.against_keys(&tile, result, qkv, true, slopes, packing);
            let width = tile.width();
            math::vectorized(#[inline(always)] || {
                for (slopes, scores) in slopes.chunks_exact_mut(width).zip(scores.chunks_exact(width)) {
                    let mean = math::dot(slopes, scores);
                    for (slope, p) in slopes.iter_mut().zip(scores) {
                        *slope = p * (*slope - mean);
                    }
                }
            });
            place.add_to_keys(&tile, slopes, queries, dqkv, false, packing);
            place.over_keys(&tile, slopes, qkv, false, result, packing);
            place.scatter(&tile, result, dqkv, heads.width(), factor);
        }
    }
}
