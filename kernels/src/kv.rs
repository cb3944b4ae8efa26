//! Pages of keys and values, and the row table that says who reads and writes which slots.
//!
//! One page of one layer and key/value head holds keys as `[head_dim][PAGE_SLOTS]` (lanes run along slots, so scores
//! need no horizontal sums) and values as `[PAGE_SLOTS][stride]` (lanes run along dims; `stride` is `head_dim` rounded
//! up to a whole vector, the rest is zero).

use half::bf16;

use crate::lanes::Lanes;
use crate::lines::Lines;

/// Positions per key/value page.
pub const PAGE_SLOTS: usize = 32;

/// Largest head width that attention accepts, in elements; bounds its accumulators on the stack.
pub const HEAD_DIM_MAX: usize = 256;

/// Value rows are padded to this many elements, the widest vector of any ISA.
const VALUE_ALIGN: usize = 16;

/// Number format of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// 32-bit floats: exact.
    F32,
    /// bfloat16, rounded to nearest even when stored.
    Bf16,
}

impl KvType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::Bf16 => 2,
        }
    }
}

/// Heads of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Columns of a row of queries, keys and values side by side.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of a row of attention output.
    pub fn out_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Query heads that share one key/value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn check(&self) {
        assert!(self.kv_heads > 0 && self.heads > 0, "heads and kv_heads must be positive: {self:?}");
        assert!(self.heads.is_multiple_of(self.kv_heads), "heads must be a multiple of kv_heads: {self:?}");
        let fits = self.head_dim > 0 && self.head_dim <= HEAD_DIM_MAX;
        assert!(fits, "head_dim must be between 1 and {HEAD_DIM_MAX}: {self:?}");
    }

    fn value_stride(&self) -> usize {
        self.head_dim.next_multiple_of(VALUE_ALIGN)
    }
}

/// One position of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Index into [`RowTable::tables`].
    pub sequence: u32,
    /// Position within the sequence: where this row's key and value are stored.
    pub position: u32,
    /// The row attends to slots `[0, end)`; at least 1.
    pub end: u32,
}

/// The rows of a step and the pages of their sequences.
#[derive(Clone, Copy, Debug)]
pub struct RowTable<'a> {
    /// One entry per row, in the order of the activations.
    pub rows: &'a [Row],
    /// Per sequence its page ids: position `p` is slot `p % PAGE_SLOTS` of page `tables[s][p / PAGE_SLOTS]`.
    pub tables: &'a [&'a [u32]],
}

impl RowTable<'_> {
    pub(crate) fn check(&self, pages: usize) {
        let valid = self.tables.iter().all(|table| table.iter().all(|&page| (page as usize) < pages));
        assert!(valid, "a page table names a page outside the cache of {pages} pages");
        for row in self.rows {
            assert!((row.sequence as usize) < self.tables.len(), "no page table for the sequence of {row:?}");
            let slots = self.tables[row.sequence as usize].len() * PAGE_SLOTS;
            assert!((row.position as usize) < slots, "position of {row:?} is outside its {slots} slots");
            assert!(row.end > 0 && row.end as usize <= slots, "end of {row:?} is outside its {slots} slots");
        }
    }
}

/// Stored element of a cache or table: how it is rounded and loaded.
pub(crate) trait Element: Copy + Send + Sync {
    fn round(value: f32) -> Self;
    fn widen(self) -> f32;
    /// # Safety
    /// `from` must be readable for `L::WIDTH` elements and the ISA of `L` must be present.
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
}

impl Element for f32 {
    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's promise is that of `Lanes::load`.
        unsafe { L::load(from) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn round(value: f32) -> Self {
        // Nearest even without branches, so that loops vectorise; a NaN stays one.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let kept = if value.is_nan() { bits | 0x40_0000 } else { rounded };
        bf16::from_bits((kept >> 16) as u16)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's promise is that of `Lanes::load_bf16`; bf16 is a transparent u16.
        unsafe { L::load_bf16(from.cast::<u16>()) }
    }
}

/// Keys and values of every layer, in pages shared by all sequences.
pub struct KvCache {
    storage: Lines<u8>,
    layers: usize,
    pages: usize,
    shape: HeadShape,
    dtype: KvType,
}

impl KvCache {
    /// A zeroed cache of `pages` pages of [`PAGE_SLOTS`] positions in each of `layers` layers.
    pub fn new(layers: usize, shape: &HeadShape, pages: usize, dtype: KvType) -> KvCache {
        shape.check();
        let bytes = pages * Self::page_bytes(layers, shape, dtype);
        KvCache { storage: Lines::zeroed(bytes), layers, pages, shape: *shape, dtype }
    }

    /// Bytes of one page of [`PAGE_SLOTS`] positions over `layers` layers.
    pub fn page_bytes(layers: usize, shape: &HeadShape, dtype: KvType) -> usize {
        layers * shape.kv_heads * block_elements(shape) * dtype.bytes()
    }

    /// Pages per layer.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Layers that the cache serves.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Number format of the cached elements.
    pub fn dtype(&self) -> KvType {
        self.dtype
    }

    /// Bytes of storage over all layers.
    pub fn bytes(&self) -> usize {
        self.storage.as_slice().len()
    }

    /// The cached key and value of one slot, widened to f32. For comparisons, not for the hot path.
    pub fn read(&self, layer: usize, page: usize, kv_head: usize, slot: usize) -> (Vec<f32>, Vec<f32>) {
        assert!(slot < PAGE_SLOTS, "slot {slot} is outside a page of {PAGE_SLOTS}");
        match self.dtype {
            KvType::F32 => self.read_as::<f32>(layer, page, kv_head, slot),
            KvType::Bf16 => self.read_as::<bf16>(layer, page, kv_head, slot),
        }
    }

    fn read_as<E: Element>(&self, layer: usize, page: usize, kv_head: usize, slot: usize) -> (Vec<f32>, Vec<f32>) {
        let blocks = self.blocks::<E>().of(layer);
        // SAFETY: nobody writes: the cache is borrowed.
        let (keys, values) = unsafe { blocks.read(page, kv_head) };
        let (dims, stride) = (self.shape.head_dim, self.shape.value_stride());
        let key = (0..dims).map(|d| keys[d * PAGE_SLOTS + slot].widen()).collect();
        let value = values[slot * stride..][..dims].iter().map(|v| v.widen()).collect();
        (key, value)
    }

    pub(crate) fn check(&self, shape: &HeadShape, layer: usize) {
        shape.check();
        assert!(self.shape == *shape, "the cache was made for {:?}, not {shape:?}", self.shape);
        assert!(layer < self.layers, "layer {layer} is outside a cache of {} layers", self.layers);
    }

    /// The blocks of all layers, the first chosen, to be read. `E` must be the element of `dtype`.
    pub(crate) fn blocks<E: Element>(&self) -> Blocks<'_, E> {
        Blocks { base: self.storage.as_slice().as_ptr().cast_mut().cast(), cache: self, layer: 0 }
    }

    /// The same, to be read and written.
    pub(crate) fn blocks_mut<E: Element>(&mut self) -> Blocks<'_, E> {
        Blocks { base: self.storage.as_mut_slice().as_mut_ptr().cast(), cache: self, layer: 0 }
    }

    #[inline(always)]
    fn block_start<E: Element>(&self, layer: usize, page: usize, kv_head: usize) -> usize {
        assert!(size_of::<E>() == self.dtype.bytes());
        assert!(layer < self.layers && page < self.pages && kv_head < self.shape.kv_heads);
        ((layer * self.pages + page) * self.shape.kv_heads + kv_head) * block_elements(&self.shape)
    }
}

/// Elements of one page of one head: keys, then values.
fn block_elements(shape: &HeadShape) -> usize {
    PAGE_SLOTS * (shape.head_dim + shape.value_stride())
}

/// The pages of a layer, for threads that each own some key/value heads.
pub(crate) struct Blocks<'a, E> {
    base: *mut E,
    cache: &'a KvCache,
    layer: usize,
}

impl<E> Clone for Blocks<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for Blocks<'_, E> {}

// SAFETY: the pointer comes from a borrow of the cache that lives as long as the blocks; the methods are unsafe and
// demand that who writes a head is alone with it.
unsafe impl<E: Element> Sync for Blocks<'_, E> {}

impl<E: Element> Blocks<'_, E> {
    /// Those of one layer.
    pub(crate) fn of(self, layer: usize) -> Self {
        Blocks { layer, ..self }
    }

    /// Keys and values of one page and head.
    ///
    /// # Safety
    /// Nobody may write them while the slices are alive.
    #[inline(always)]
    pub(crate) unsafe fn read(&self, page: usize, kv_head: usize) -> (&[E], &[E]) {
        let shape = &self.cache.shape;
        let start = self.cache.block_start::<E>(self.layer, page, kv_head);
        // SAFETY: the index checks of `block_start` keep the range inside the storage, which is aligned and initialised;
        // any bit pattern is a valid f32 or bf16; the caller's promise.
        let block = unsafe { std::slice::from_raw_parts(self.base.add(start), block_elements(shape)) };
        block.split_at(shape.head_dim * PAGE_SLOTS)
    }

    /// Writes the key of one slot.
    ///
    /// # Safety
    /// The blocks are those of [`KvCache::blocks_mut`]; no other thread may use keys of `kv_head` at the same time.
    #[inline(always)]
    pub(crate) unsafe fn key(&self, page: usize, kv_head: usize, slot: usize, key: &[f32]) {
        assert!(slot < PAGE_SLOTS && key.len() == self.cache.shape.head_dim);
        let start = self.cache.block_start::<E>(self.layer, page, kv_head) + slot;
        for (d, &x) in key.iter().enumerate() {
            // SAFETY: `d < head_dim` and `slot < PAGE_SLOTS` stay inside the keys of the block.
            unsafe { self.base.add(start + d * PAGE_SLOTS).write(E::round(x)) };
        }
    }

    /// Writes the value of one slot.
    ///
    /// # Safety
    /// As [`Blocks::key`], for values.
    #[inline(always)]
    pub(crate) unsafe fn value(&self, page: usize, kv_head: usize, slot: usize, value: &[f32]) {
        let shape = &self.cache.shape;
        assert!(slot < PAGE_SLOTS && value.len() == shape.head_dim);
        let block = self.cache.block_start::<E>(self.layer, page, kv_head) + shape.head_dim * PAGE_SLOTS;
        let start = block + slot * shape.value_stride();
        for (d, &x) in value.iter().enumerate() {
            // SAFETY: `slot * stride + head_dim` stays inside the values of the block.
            unsafe { self.base.add(start + d).write(E::round(x)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_follow_the_shape() {
        let shape = HeadShape { heads: 6, kv_heads: 2, head_dim: 40 };
        let cache = KvCache::new(3, &shape, 5, KvType::Bf16);
        assert_eq!(cache.bytes(), 3 * 5 * 2 * 32 * (40 + 48) * 2);
        assert_eq!((cache.pages(), cache.layers()), (5, 3));
    }

    #[test]
    fn rounding_to_bf16_is_that_of_the_format() {
        let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-45];
        let drawn = (0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)));
        let halfway = (0..4096u32).map(|i| f32::from_bits(0x3f80_0000 + i * 0x4000));
        for value in special.into_iter().chain(drawn).chain(halfway) {
            let (ours, theirs) = (<bf16 as Element>::round(value), bf16::from_f32(value));
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{value:e}");
        }
    }

    #[test]
    fn slots_are_independent() {
        let shape = HeadShape { heads: 2, kv_heads: 2, head_dim: 8 };
        let mut cache = KvCache::new(2, &shape, 3, KvType::F32);
        let key: Vec<f32> = (0..8).map(|i| i as f32 + 1.0).collect();
        let writer = cache.blocks_mut::<f32>().of(1);
        // SAFETY: one thread writes.
        unsafe {
            writer.key(2, 1, 31, &key);
            writer.value(2, 1, 0, &key);
        }
        assert_eq!(cache.read(1, 2, 1, 31), (key.clone(), vec![0.0; 8]));
        assert_eq!(cache.read(1, 2, 1, 0), (vec![0.0; 8], key));
        let total: f32 =
            (0..3).flat_map(|p| (0..32).map(move |s| (p, s))).map(|(p, s)| cache.read(0, p, 1, s).0[0]).sum();
        assert_eq!(total, 0.0);
    }
}
