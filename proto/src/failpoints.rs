//! Bugs that a simulation plants, to see that it finds them. Without the cargo feature `failpoints` there are none, and
//! what asks for one compiles to nothing.

/// A check that can be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// The gateway passes on positions that the client has.
    NoDedupe,
    /// The worker takes requests of any epoch.
    NoEpochCheck,
    /// Workers and gateways listen to leaders of the past.
    NoTermCheck,
    /// A new leader gives groups that it has not heard of no time to come back.
    NoGrace,
    /// A request that goes on elsewhere gets the settings of then.
    UnpinnedPolicy,
}

#[cfg(feature = "failpoints")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug in everything that this thread runs, or takes it out.
#[cfg(feature = "failpoints")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether `bug` is planted.
#[cfg(feature = "failpoints")]
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether `bug` is planted: never.
#[cfg(not(feature = "failpoints"))]
pub const fn planted(_bug: Bug) -> bool {
    false
}
