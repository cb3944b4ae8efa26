//! One buffer that several threads write, each its own ranges, or read.

use std::marker::PhantomData;

/// Hands out parts of a borrowed slice to concurrent threads.
pub(crate) struct RowsMut<'a, T> {
    data: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer stands for a borrow; `range` and `view` are unsafe and demand that what one thread writes, no other
// uses.
unsafe impl<T: Send + Sync> Sync for RowsMut<'_, T> {}

impl<'a, T> RowsMut<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        RowsMut { data: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    /// For what is only read, by [`RowsMut::view`].
    pub(crate) fn reading(data: &'a [T]) -> Self {
        RowsMut { data: data.as_ptr().cast_mut(), len: data.len(), borrow: PhantomData }
    }

    /// # Safety
    /// The buffer was not made by [`RowsMut::reading`], and no other part that is alive at the same time overlaps this one.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: inside the borrowed slice; the caller keeps ranges disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }

    /// # Safety
    /// Nobody may write any of it while the slice is alive.
    #[inline(always)]
    pub(crate) unsafe fn view(&self, start: usize, len: usize) -> &[T] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: inside the borrowed slice; the caller keeps writers away.
        unsafe { std::slice::from_raw_parts(self.data.add(start), len) }
    }
}
