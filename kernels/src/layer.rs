//! The halves of transformer layers, any number of them as one piece of code that all threads run side by side: they meet
//! where one needs what another made, which takes less time than to begin anew with every operation.

use crate::attention::{Attention, Runs, TILE_ROWS};
use crate::gemm::Desk;
use crate::kv::{Blocks, Element, HeadShape, KvCache, KvType, RowTable};
use crate::norm::Norm;
use crate::pool::Member;
use crate::rope::Append;
use crate::rows::RowsMut;
use crate::{Cpu, Epilogue, Expert, Packed, QkNorm, Rotary};
use half::bf16;

/// Half a layer: what is added to the residual stream at once.
pub enum Half {
    /// Norm, product to queries, keys and values, their norms and rotation, append to the cache, attention, product back.
    Attention(AttentionWeights),
    /// Norm, product to gates and ups, activation, product back.
    FeedForward(FeedForwardWeights),
}

/// Weights of attention.
pub struct AttentionWeights {
    /// Layer of the cache.
    pub layer: usize,
    /// Of the stream, before the product.
    pub norm: Norm,
    /// To queries, keys and values, (`qkv_width`, hidden).
    pub qkv: Packed,
    /// One per column of `qkv`.
    pub bias: Option<Vec<f32>>,
    /// Weights of the norm of every query, and of that of every key; their `eps` is that of `norm`.
    pub qk_norm: Option<[Vec<f32>; 2]>,
    /// Back to the stream, (hidden, `out_width`).
    pub out: Packed,
}

/// Weights of a feed-forward part.
pub struct FeedForwardWeights {
    /// Of the stream, before the product.
    pub norm: Norm,
    /// Its two products.
    pub expert: Expert,
}

impl AttentionWeights {
    fn qk_norm(&self) -> Option<QkNorm<'_>> {
        self.qk_norm.as_ref().map(|[q, k]| QkNorm { q, k, eps: self.norm.eps })
    }
}

/// The rows of a step.
#[derive(Clone, Copy)]
pub struct StepRows<'a> {
    /// Heads that are attended with.
    pub shape: HeadShape,
    /// Angles of the positions.
    pub rotary: &'a Rotary,
    /// Who reads and writes which slots.
    pub table: RowTable<'a>,
    /// Rows (ascending) that go on after the attention of the cache's last layer: they move to the front of the stream.
    pub outputs: &'a [u32],
}

/// Buffers of the rows of a step: as many as the table has, or as are left of them.
pub struct StepBuffers<'a> {
    /// Residual stream (rows, hidden). What a half makes is added to it, unless it goes to `partial`.
    pub stream: &'a mut [f32],
    /// Takes what a single half makes (rows, hidden), where ranks have to add theirs first.
    pub partial: Option<&'a mut [f32]>,
    /// Work space (rows, `qkv_width`).
    pub qkv: &'a mut [f32],
    /// Work space (rows, `out_width`).
    pub mixed: &'a mut [f32],
    /// Work space (rows, widest feed-forward part).
    pub gated: &'a mut [f32],
}

/// What the members of a team share.
struct Step<'a, E> {
    rows: StepRows<'a>,
    hidden: usize,
    layers: usize,
    kv: Blocks<'a, E>,
    stream: RowsMut<'a, f32>,
    partial: Option<RowsMut<'a, f32>>,
    qkv: RowsMut<'a, f32>,
    mixed: RowsMut<'a, f32>,
    gated: RowsMut<'a, f32>,
    desk: &'a Desk<'a>,
    runs: &'a Runs<'a>,
}

impl<'a, E> Step<'a, E> {
    /// Where a half's result goes.
    fn out(&self) -> (&RowsMut<'a, f32>, Epilogue<'static>) {
        self.partial.as_ref().map_or((&self.stream, Epilogue::Add), |partial| (partial, Epilogue::Store))
    }
}

impl Half {
    /// Its two products.
    pub fn products(&self) -> [&Packed; 2] {
        match self {
            Half::Attention(weights) => [&weights.qkv, &weights.out],
            Half::FeedForward(weights) => [&weights.expert.gate_up, &weights.expert.down],
        }
    }

    /// Makes sure that the half fits the step; returns how many of `count` rows go on after it.
    fn check(
        &self,
        rows: &StepRows<'_>,
        kv: &KvCache,
        buffers: &StepBuffers<'_>,
        hidden: usize,
        count: usize,
    ) -> usize {
        let products = self.products().map(|w| (w.n(), w.k(), w.shape().gated));
        match self {
            Half::Attention(weights) => {
                let (qkv, out) = (rows.shape.qkv_width(), rows.shape.out_width());
                kv.check(&rows.shape, weights.layer);
                rows.rotary.check(&rows.shape, weights.qk_norm().as_ref(), &rows.table);
                let fit = [(qkv, hidden, false), (hidden, out, false)];
                assert_eq!(products, fit, "the products of attention do not fit the heads");
                assert_eq!(weights.norm.weight.len(), hidden, "a norm must have one weight per column");
                let bias = weights.bias.as_ref();
                assert!(bias.is_none_or(|bias| bias.len() == qkv), "bias must have one element per column");
                assert_eq!(rows.table.rows.len(), count, "the stream must hold one row per entry of the table");
                let (qkv, out) = (count * qkv, count * out);
                assert!(
                    buffers.qkv.len() >= qkv && buffers.mixed.len() >= out,
                    "work space must hold the table's rows"
                );
                rows.left(weights.layer, kv.layers(), count)
            }
            Half::FeedForward(FeedForwardWeights { norm, expert }) => {
                let width = expert.down.k();
                let fit = [(2 * width, hidden, true), (hidden, width, false)];
                assert_eq!(products, fit, "the products of a feed-forward part do not fit each other");
                assert_eq!(norm.weight.len(), hidden, "a norm must have one weight per column");
                assert!(buffers.gated.len() >= count * width, "work space must hold the rows");
                count
            }
        }
    }
}

impl StepRows<'_> {
    /// How many of `count` rows go on after the attention of one of `layers` layers.
    fn left(&self, layer: usize, layers: usize, count: usize) -> usize {
        if layer + 1 == layers { self.outputs.len() } else { count }
    }
}

impl Cpu {
    /// Runs halves of layers, one or more, on the rows of the stream. Returns how many rows are left.
    ///
    /// # Panics
    /// There is no half, lengths do not fit each other, or the rows name what the cache or the angles do not have.
    pub fn halves(&self, halves: &[Half], rows: &StepRows<'_>, kv: &mut KvCache, buffers: StepBuffers<'_>) -> usize {
        let hidden = halves.first().map_or(0, |half| half.products()[0].k());
        assert!(hidden > 0, "a step must have a half");
        let count = buffers.stream.len() / hidden;
        rows.table.check(kv.pages());
        assert_eq!(buffers.stream.len(), count * hidden, "the stream must be (rows, {hidden})");
        let within = rows.outputs.last().is_none_or(|&row| (row as usize) < rows.table.rows.len());
        assert!(within && rows.outputs.is_sorted_by(|a, b| a < b), "outputs must be rows of the table, ascending");
        if let Some(partial) = &buffers.partial {
            assert!(halves.len() == 1 && partial.len() == buffers.stream.len(), "ranks add one half at a time");
        }
        let left = halves.iter().fold(count, |count, half| half.check(rows, kv, &buffers, hidden, count));
        match kv.dtype() {
            KvType::F32 => self.run_halves::<f32>(halves, rows, kv, buffers, (hidden, count)),
            KvType::Bf16 => self.run_halves::<bf16>(halves, rows, kv, buffers, (hidden, count)),
        }
        left
    }

    fn run_halves<E: Element>(
        &self,
        halves: &[Half],
        rows: &StepRows<'_>,
        kv: &mut KvCache,
        buffers: StepBuffers<'_>,
        (hidden, count): (usize, usize),
    ) {
        let StepBuffers { stream, partial, qkv, mixed, gated } = buffers;
        let products = halves.iter().flat_map(|half| half.products().into_iter().zip([true, false]));
        let layers = kv.layers();
        self.with_desk(count, products, |desk| {
            self.with_runs(&rows.shape, &rows.table, |runs| {
                let step = Step {
                    rows: *rows,
                    hidden,
                    layers,
                    kv: kv.blocks_mut::<E>(),
                    stream: RowsMut::new(stream),
                    partial: partial.map(RowsMut::new),
                    qkv: RowsMut::new(qkv),
                    mixed: RowsMut::new(mixed),
                    gated: RowsMut::new(gated),
                    desk,
                    runs,
                };
                self.pool().team(&|member| {
                    let mut count = count;
                    for (i, half) in halves.iter().enumerate() {
                        if i > 0 {
                            member.meet();
                        }
                        // SAFETY: nobody else uses what the step borrows, and members have met since the half before.
                        count = unsafe { self.half(member, &step, half, count) };
                    }
                });
            });
        });
    }

    /// What one member does of a half; returns how many rows are left.
    ///
    /// # Safety
    /// All members, and nobody else, work on the half; they meet before the next one.
    unsafe fn half<E: Element>(&self, member: &Member<'_>, step: &Step<'_, E>, half: &Half, count: usize) -> usize {
        let (out, epilogue) = step.out();
        // SAFETY: between two meetings each buffer is read by all, or written by all in parts of their own.
        unsafe {
            let stream = step.stream.view(0, count * step.hidden);
            match half {
                Half::Attention(weights) => {
                    let input = self.input(member, step.desk, stream, Some(&weights.norm), &weights.qkv);
                    let bias = weights.bias.as_deref().map_or(Epilogue::Store, Epilogue::Bias);
                    self.product(member, input, count, &weights.qkv, bias, &step.qkv);
                    member.meet();
                    self.attend_rows(member, step, weights);
                    member.meet();
                    let left = step.rows.left(weights.layer, step.layers, count);
                    if left < count {
                        keep_outputs(member, step, count);
                    }
                    let mixed = step.mixed.view(0, left * weights.out.k());
                    let input = self.input(member, step.desk, mixed, None, &weights.out);
                    self.product(member, input, left, &weights.out, epilogue, out);
                    left
                }
                Half::FeedForward(FeedForwardWeights { norm, expert: Expert { gate_up, down } }) => {
                    let input = self.input(member, step.desk, stream, Some(norm), gate_up);
                    self.product(member, input, count, gate_up, Epilogue::SiluMul, &step.gated);
                    member.meet();
                    let gated = step.gated.view(0, count * down.k());
                    let input = self.input(member, step.desk, gated, None, down);
                    self.product(member, input, count, down, epilogue, out);
                    count
                }
            }
        }
    }

    /// From queries, keys and values to what heads make of them, through the cache.
    ///
    /// # Safety
    /// All members, and nobody else, work on the half.
    unsafe fn attend_rows<E: Element>(&self, member: &Member<'_>, step: &Step<'_, E>, weights: &AttentionWeights) {
        let StepRows { shape, rotary, table: rows, .. } = step.rows;
        let (kv, qkv, norms) = (step.kv.of(weights.layer), &step.qkv, weights.qk_norm());
        let append = Append { qkv, shape, rotary, norms, rows, kv };
        let attention = Attention { qkv, shape, rows, kv, out: &step.mixed };
        // SAFETY: a head's columns and cache belong to one member until they have met.
        unsafe {
            if rows.rows.len() > TILE_ROWS || step.runs.apart().is_some() {
                self.append(member, &append);
                member.meet();
                return self.attend(member, &attention, step.runs);
            }
            // Who has a head to itself need not wait for the keys of others.
            member.each(shape.kv_heads, |head| {
                self.append_head(&append, head);
                self.attend_tile(&attention, 0, head);
            });
        }
    }
}

/// Moves the outputs among `count` rows to the front, of the stream and of what attention made.
///
/// # Safety
/// All members, and nobody else, work on the step, and they have met.
unsafe fn keep_outputs<E>(member: &Member<'_>, step: &Step<'_, E>, count: usize) {
    if member.index() == 0 {
        for (buffer, width) in [(&step.stream, step.hidden), (&step.mixed, step.rows.shape.out_width())] {
            // SAFETY: the others wait.
            let values = unsafe { buffer.range(0, count * width) };
            for (to, &from) in step.rows.outputs.iter().enumerate() {
                values.copy_within(from as usize * width..(from as usize + 1) * width, to * width);
            }
        }
    }
    member.meet();
}
