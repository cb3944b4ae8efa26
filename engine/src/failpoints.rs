//! A bug that a simulation plants, to see that it finds it. Without the cargo feature `failpoints` there is none.

#[cfg(feature = "failpoints")]
thread_local! {
    static PAGES_FREED_TWICE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// From here on engines of this thread give a cancelled request's last page back twice, or not any more.
#[cfg(feature = "failpoints")]
pub fn plant(pages_freed_twice: bool) {
    PAGES_FREED_TWICE.set(pages_freed_twice);
}

/// Whether a page is given back twice.
#[cfg(feature = "failpoints")]
pub(crate) fn pages_freed_twice() -> bool {
    PAGES_FREED_TWICE.get()
}

/// Whether a page is given back twice: never.
#[cfg(not(feature = "failpoints"))]
pub(crate) const fn pages_freed_twice() -> bool {
    false
}
