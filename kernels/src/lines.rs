//! Large buffers of plain numbers: zeroed, beginning on a cache line, and on huge pages where the system has them.
//!
//! A step reads every weight once. With pages of 4 KiB the translation of addresses costs a good part of that.

use memmap2::{MmapMut, MmapOptions};
use std::marker::PhantomData;

/// Bytes of a huge page; larger buffers begin on one.
const HUGE_PAGE: usize = 2 << 20;

/// A zeroed buffer of plain numbers.
pub(crate) struct Lines<T> {
    memory: MmapMut,
    /// Bytes before the first element.
    skipped: usize,
    len: usize,
    element: PhantomData<T>,
}

/// Types for which any bits are a value.
///
/// # Safety
/// Every bit pattern must be valid, zero included, and the alignment at most 64 bytes.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: plain numbers.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}

impl<T: Plain> Default for Lines<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Plain> Lines<T> {
    /// `len` zeros. Memory is taken when it is first written.
    ///
    /// # Panics
    /// The system has no room for them.
    pub(crate) fn zeroed(len: usize) -> Self {
        let bytes = len * size_of::<T>();
        let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let memory = MmapOptions::new().len((bytes + slack).max(1)).map_anon();
        let memory = memory.unwrap_or_else(|error| panic!("no memory for a buffer of {bytes} bytes: {error}"));
        // Where huge pages are not to be had, small ones serve.
        #[cfg(target_os = "linux")]
        if slack > 0 {
            let _ = memory.advise(memmap2::Advice::HugePage);
        }
        let skipped = if slack > 0 { memory.as_ptr().align_offset(HUGE_PAGE) } else { 0 };
        Lines { memory, skipped, len, element: PhantomData }
    }

    /// Grows to at least `len` elements; what was in it is lost when it does.
    pub(crate) fn reserve(&mut self, len: usize) {
        if len > self.len {
            *self = Self::zeroed(len);
        }
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        let bytes = &self.memory[self.skipped..][..self.len * size_of::<T>()];
        // SAFETY: the bytes are initialised and aligned, and any bits are a value of a plain type.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        let bytes = &mut self.memory[self.skipped..][..self.len * size_of::<T>()];
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_aligned_and_of_their_length() {
        for (len, alignment) in [(0, 64), (1, 64), (1000, 64), (HUGE_PAGE, HUGE_PAGE), (HUGE_PAGE + 5, HUGE_PAGE)] {
            let mut lines = Lines::<u32>::zeroed(len);
            assert_eq!(lines.as_slice().len(), len);
            assert!(lines.as_slice().iter().all(|&x| x == 0));
            assert!((lines.as_slice().as_ptr() as usize).is_multiple_of(alignment), "{len}");
            lines.as_mut_slice().fill(7);
            assert!(lines.as_slice().iter().all(|&x| x == 7));
        }
    }
}
