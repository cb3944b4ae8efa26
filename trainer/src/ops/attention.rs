//! Attention over the doubled layout, forward and backward, exploiting that a row sees a prefix of the clean rows and,
//! if it is noisy, its own block. Rows are handled in tiles of positions with all query heads of one key head together.

use std::ops::Range;

use super::{Heads, math, matrix, product};

/// Positions per tile when blocks are not larger.
const TILE: usize = 32;

/// One document in a batch: its noisy rows at positions `prompt..length`, then its clean rows at `0..length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document {
    /// First noisy row in the batch.
    pub start: usize,
    /// Positions without a noisy row: the blocks begin after them.
    pub prompt: usize,
    /// Positions; those after the prompt are a multiple of `block`.
    pub length: usize,
    /// Positions per block.
    pub block: usize,
}

impl Document {
    /// Number of noisy rows, which is also where the clean ones begin.
    pub fn noisy(&self) -> usize {
        self.length - self.prompt
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.noisy() + self.length
    }
}

/// The rule: which rows a row of `document` attends to, as row ranges in the batch (clean prefix, own noisy block).
///
/// Clean row p: clean rows [0, p]. Noisy row p of block [s, e): clean rows [0, s) and noisy rows [s, e).
pub fn reach(document: &Document, clean: bool, position: usize) -> [Range<usize>; 2] {
    let first_clean = document.start + document.noisy();
    if clean {
        return [first_clean..first_clean + position + 1, 0..0];
    }
    let block = (position - document.prompt) / document.block * document.block;
    let own = document.start + block;
    [first_clean..first_clean + document.prompt + block, own..own + document.block]
}

/// Rows `start..start + rows` of one half: they see clean keys `0..prefix` and, if noisy, the tile's own keys.
struct Tile {
    clean: bool,
    start: usize,
    rows: usize,
    prefix: usize,
    own: usize,
}

impl Tile {
    /// What the row at `offset` sees: so many of the prefix, and which of the tile's own keys.
    #[inline(always)]
    fn columns(&self, document: &Document, offset: usize) -> (usize, Range<usize>) {
        let first = if self.clean { 0 } else { document.prompt };
        let [prefix, own] = reach(document, self.clean, first + self.start + offset);
        let shift = document.start + self.start;
        (prefix.len(), if self.clean { 0..0 } else { own.start - shift..own.end - shift })
    }

    /// Rows of the keys, among the document's rows: the prefix and the tile's own.
    fn keys(&self, document: &Document) -> [Range<usize>; 2] {
        [document.noisy()..document.noisy() + self.prefix, self.start..self.start + self.own]
    }

    /// First row in the batch.
    fn row(&self, document: &Document) -> usize {
        document.start + self.start + if self.clean { document.noisy() } else { 0 }
    }
}

fn tiles(document: &Document) -> impl Iterator<Item = Tile> + use<> {
    let document = *document;
    let block = document.block;
    let step = block * (TILE / block).max(1);
    [false, true].into_iter().flat_map(move |clean| {
        let half = if clean { document.length } else { document.noisy() };
        (0..half).step_by(step).map(move |start| {
            let rows = step.min(half - start);
            if clean {
                Tile { clean, start, rows, prefix: start + rows, own: 0 }
            } else {
                Tile { clean, start, rows, prefix: document.prompt + start + rows - block, own: rows }
            }
        })
    })
}

/// Copies columns `column..column + width` of `to.len() / width` rows of a (rows, stride) buffer, times `factor`.
fn gather(from: &[f32], stride: usize, first: usize, column: usize, width: usize, factor: f32, to: &mut [f32]) {
    for (offset, out) in to.chunks_exact_mut(width).enumerate() {
        let start = (first + offset) * stride + column;
        for (out, x) in out.iter_mut().zip(&from[start..start + width]) {
            *out = x * factor;
        }
    }
}

/// The reverse of [`gather`].
fn scatter(from: &[f32], factor: f32, to: &mut [f32], stride: usize, first: usize, column: usize, width: usize) {
    for (offset, x) in from.chunks_exact(width).enumerate() {
        let start = (first + offset) * stride + column;
        for (out, x) in to[start..start + width].iter_mut().zip(x) {
            *out = x * factor;
        }
    }
}

/// One document and one key head: its keys and values, (rows, head_dim) each.
struct Part<'a> {
    heads: &'a Heads,
    document: &'a Document,
    kv: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Buffers of one tile; scores and slopes are split into the prefix's and the tile's own columns.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    scores: [Vec<f32>; 2],
    slopes: [Vec<f32>; 2],
    result: Vec<f32>,
}

impl<'a> Part<'a> {
    fn all(heads: &'a Heads, documents: &'a [Document], qkv: &'a [f32]) -> impl Iterator<Item = Part<'a>> {
        let pairs = documents.iter().flat_map(|document| (0..heads.kv_heads).map(move |kv| (document, kv)));
        pairs.map(move |(document, kv)| {
            let copy = |head: usize| {
                let mut out = vec![0.0; document.rows() * heads.head_dim];
                let column = head * heads.head_dim;
                gather(qkv, heads.width(), document.start, column, heads.head_dim, 1.0, &mut out);
                out
            };
            let (keys, values) = (copy(heads.heads + kv), copy(heads.heads + heads.kv_heads + kv));
            Part { heads, document, kv, keys, values }
        })
    }

    fn dim(&self) -> usize {
        self.heads.head_dim
    }

    /// Query heads that share this key head.
    fn group(&self) -> Range<usize> {
        let size = self.heads.heads / self.heads.kv_heads;
        self.kv * size..(self.kv + 1) * size
    }

    /// The tile's rows of the group's heads, one head after the other, from a (rows, stride) buffer.
    fn gather(&self, tile: &Tile, from: &[f32], stride: usize, factor: f32, to: &mut Vec<f32>) {
        let size = tile.rows * self.dim();
        to.resize(self.group().len() * size, 0.0);
        for (head, to) in self.group().zip(to.chunks_exact_mut(size)) {
            gather(from, stride, tile.row(self.document), head * self.dim(), self.dim(), factor, to);
        }
    }

    fn scatter(&self, tile: &Tile, from: &[f32], factor: f32, to: &mut [f32], stride: usize) {
        for (head, from) in self.group().zip(from.chunks_exact(tile.rows * self.dim())) {
            scatter(from, factor, to, stride, tile.row(self.document), head * self.dim(), self.dim());
        }
    }

    /// `out = left . right^T` for the tile's two ranges of rows of `right` (keys or values).
    fn against(&self, tile: &Tile, left: &[f32], right: &[f32], out: &mut [Vec<f32>; 2]) {
        let dim = self.dim();
        for (keys, out) in tile.keys(self.document).into_iter().zip(out) {
            out.resize(left.len() / dim * keys.len(), 0.0);
            let right = matrix(&right[keys.start * dim..keys.end * dim], dim);
            product(matrix(left, dim), right.t(), out, false);
        }
    }

    /// `out = left . right` summed over the tile's two ranges of rows of `right`.
    fn over(&self, tile: &Tile, left: &[Vec<f32>; 2], right: &[f32], out: &mut Vec<f32>) {
        let dim = self.dim();
        out.resize(self.group().len() * tile.rows * dim, 0.0);
        out.fill(0.0);
        for (keys, left) in tile.keys(self.document).into_iter().zip(left).filter(|(keys, _)| !keys.is_empty()) {
            let right = matrix(&right[keys.start * dim..keys.end * dim], dim);
            product(matrix(left, keys.len()), right, out, true);
        }
    }

    /// Adds `left^T . right` to the tile's two ranges of rows of `out`.
    fn add(&self, tile: &Tile, left: &[Vec<f32>; 2], right: &[f32], out: &mut [f32]) {
        let dim = self.dim();
        for (keys, left) in tile.keys(self.document).into_iter().zip(left).filter(|(keys, _)| !keys.is_empty()) {
            let out = &mut out[keys.start * dim..keys.end * dim];
            product(matrix(left, keys.len()).t(), matrix(right, dim), out, true);
        }
    }

    /// Attention probabilities of the tile into `scratch.scores`, scaled queries into `scratch.queries`.
    fn probabilities(&self, tile: &Tile, qkv: &[f32], scratch: &mut Scratch) {
        let factor = (self.dim() as f32).sqrt().recip();
        self.gather(tile, qkv, self.heads.width(), factor, &mut scratch.queries);
        self.against(tile, &scratch.queries, &self.keys, &mut scratch.scores);
        let [prefix, own] = &mut scratch.scores;
        let (rows, document) = (self.group().len() * tile.rows, self.document);
        math::vectorized(
            #[inline(always)]
            || {
                for index in 0..rows {
                    let (end, seen) = tile.columns(document, index % tile.rows);
                    let prefix = &mut prefix[index * tile.prefix..][..tile.prefix];
                    let own = &mut own[index * tile.own..][..tile.own];
                    softmax(prefix, end, own, seen);
                }
            },
        );
    }
}

/// Softmax over `prefix[..end]` and `own[seen]` together; the rest becomes zero.
#[inline(always)]
fn softmax(prefix: &mut [f32], end: usize, own: &mut [f32], seen: Range<usize>) {
    let max = math::largest(&prefix[..end]).max(math::largest(&own[seen.clone()]));
    let total = math::exp_sum(&mut prefix[..end], max) + math::exp_sum(&mut own[seen.clone()], max);
    math::scale(&mut prefix[..end], total.recip());
    math::scale(&mut own[seen.clone()], total.recip());
    prefix[end..].fill(0.0);
    own[..seen.start].fill(0.0);
    own[seen.end..].fill(0.0);
}

/// Turns gradients of probabilities into gradients of scores: `p (d - sum(p d))` over both parts of each row.
fn softmax_backward(slopes: &mut [Vec<f32>; 2], scores: &[Vec<f32>; 2], rows: usize) {
    let [prefix, own] = slopes;
    let (widths, [p, q]) = ((prefix.len() / rows, own.len() / rows), scores);
    math::vectorized(
        #[inline(always)]
        || {
            for index in 0..rows {
                let (a, b) = (index * widths.0..(index + 1) * widths.0, index * widths.1..(index + 1) * widths.1);
                let mean = math::dot(&prefix[a.clone()], &p[a.clone()]) + math::dot(&own[b.clone()], &q[b.clone()]);
                for (slope, p) in prefix[a.clone()].iter_mut().zip(&p[a]) {
                    *slope = p * (*slope - mean);
                }
                for (slope, q) in own[b.clone()].iter_mut().zip(&q[b]) {
                    *slope = q * (*slope - mean);
                }
            }
        },
    );
}

/// `out(rows, heads * head_dim)` from queries, keys and values in `qkv(rows, heads.width())`.
pub fn attention(qkv: &[f32], heads: &Heads, documents: &[Document], out: &mut [f32]) {
    let mut scratch = Scratch::default();
    for part in Part::all(heads, documents, qkv) {
        for tile in tiles(part.document) {
            part.probabilities(&tile, qkv, &mut scratch);
            part.over(&tile, &scratch.scores, &part.values, &mut scratch.result);
            part.scatter(&tile, &scratch.result, 1.0, out, heads.heads * heads.head_dim);
        }
    }
}

/// Gradient of [`attention`]: all of `dqkv` is overwritten.
pub fn attention_backward(qkv: &[f32], heads: &Heads, documents: &[Document], dout: &[f32], dqkv: &mut [f32]) {
    let mut scratch = Scratch::default();
    let (dim, width) = (heads.head_dim, heads.width());
    let factor = (dim as f32).sqrt().recip();
    for part in Part::all(heads, documents, qkv) {
        let (mut dkeys, mut dvalues) = (vec![0.0; part.keys.len()], vec![0.0; part.values.len()]);
        for tile in tiles(part.document) {
            part.probabilities(&tile, qkv, &mut scratch);
            let Scratch { queries, scores, slopes, result } = &mut scratch;
            part.gather(&tile, dout, heads.heads * dim, 1.0, result);
            part.add(&tile, scores, result, &mut dvalues);
            part.against(&tile, result, &part.values, slopes);
            softmax_backward(slopes, scores, part.group().len() * tile.rows);
            part.add(&tile, slopes, queries, &mut dkeys);
            part.over(&tile, slopes, &part.keys, result);
            part.scatter(&tile, result, factor, dqkv, width);
        }
        let column = |head: usize| head * dim;
        let (key, value) = (column(heads.heads + part.kv), column(heads.heads + heads.kv_heads + part.kv));
        scatter(&dkeys, 1.0, dqkv, width, part.document.start, key, dim);
        scatter(&dvalues, 1.0, dqkv, width, part.document.start, value, dim);
    }
}
