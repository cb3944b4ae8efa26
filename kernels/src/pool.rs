//! Own thread pool: a step is many short parallel pieces, so threads spin briefly before they park.
//!
//! A piece of code runs on every thread as one member of a team. Members share out loops and meet where one needs what
//! another made; a meeting is one line of memory going from core to core.

use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Polls before a waiting thread, the caller included, parks (about 50 microseconds); none where threads exceed cores.
const SPINS_MAX: u32 = 2_000;

type Part<'a> = dyn Fn(&Member<'_>) + Sync + 'a;

/// Runs pieces of code on several threads; the caller takes part.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One team at a time.
    turn: Mutex<()>,
}

/// Something that has a line of memory to itself: what one thread writes does not disturb who looks at the next.
#[repr(align(64))]
struct Line<T>(T);

/// What wakes workers, all in one line: it goes to another core as one.
struct Start {
    /// Teams so far.
    generation: AtomicU64,
    /// What the team runs. Written by the caller before `generation` rises, read by workers after they saw it rise.
    part: UnsafeCell<Option<*const Part<'static>>>,
    /// Parts that workers have finished, of all teams.
    finished: AtomicU64,
}

struct Shared {
    start: Line<Start>,
    /// Arrivals at the team's meetings, of all members.
    arrived: Line<AtomicUsize>,
    /// The next iteration to take of even and of odd loops, beyond each member's first.
    next: Line<[AtomicUsize; 2]>,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Workers that park, or are about to.
    sleepers: AtomicUsize,
    sleeping: Mutex<()>,
    /// Tells parked workers of a new generation, or of the end.
    wake: Condvar,
    /// Members parked at a meeting, or about to.
    waiting: AtomicUsize,
    /// Tells them that all are there, or that one never will be.
    met: Condvar,
    /// Set while the caller parks until all parts are finished.
    caller_parked: AtomicBool,
    /// Tells the parked caller that they are.
    done: Condvar,
    /// Members of a team; set before the first one.
    threads: AtomicUsize,
    spins: u32,
}

// SAFETY: `part` is written only while no worker is between the rise of `generation` and its own count in `finished`;
// what it points to is `Sync` and outlives that time. Everything else is atomic or locked.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

thread_local! {
    /// Set while this thread is in a team: a team inside a team is this thread alone.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// One thread of a team.
pub(crate) struct Member<'a> {
    /// `None` for a team of one.
    shared: Option<&'a Shared>,
    index: usize,
    meetings: Cell<usize>,
    loops: Cell<usize>,
}

impl<'a> Member<'a> {
    fn new(shared: Option<&'a Shared>, index: usize) -> Self {
        Member { shared, index, meetings: Cell::new(0), loops: Cell::new(0) }
    }

    /// This member's number; the caller's is 0.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Members of the team.
    pub(crate) fn threads(&self) -> usize {
        self.shared.map_or(1, Shared::threads)
    }

    /// This member's part of `0..count`, where parts are as even as can be.
    pub(crate) fn share(&self, count: usize) -> std::ops::Range<usize> {
        let begin = |index| count * index / self.threads();
        begin(self.index)..begin(self.index + 1)
    }

    /// Returns when every member is here; each then sees what the others wrote before.
    pub(crate) fn meet(&self) {
        let Some(shared) = self.shared else { return };
        self.meetings.set(self.meetings.get() + 1);
        let all = self.meetings.get() * shared.threads();
        // Who comes last counts itself, then looks for parked members; those do the reverse. In one order of all four at
        // least one sees the other, and the lock keeps the notice until they wait for it.
        if shared.arrived.0.fetch_add(1, Ordering::SeqCst) + 1 == all {
            if shared.waiting.load(Ordering::SeqCst) > 0 {
                drop(lock(&shared.sleeping));
                shared.met.notify_all();
            }
            return;
        }
        let missing = || shared.arrived.0.load(Ordering::SeqCst) < all && !shared.panicked.load(Ordering::Relaxed);
        let mut polls = 0;
        while polls < shared.spins && missing() {
            std::hint::spin_loop();
            polls += 1;
        }
        if missing() {
            let mut sleeping = lock(&shared.sleeping);
            shared.waiting.fetch_add(1, Ordering::SeqCst);
            while missing() {
                sleeping = shared.met.wait(sleeping).unwrap_or_else(PoisonError::into_inner);
            }
            shared.waiting.fetch_sub(1, Ordering::SeqCst);
        }
        assert!(!shared.panicked.load(Ordering::Relaxed), "another thread of the team panicked");
    }

    /// Takes iterations of a loop that all members share out: its own first, then whichever is next. Members have to
    /// meet before their next loop.
    pub(crate) fn each(&self, tasks: usize, mut task: impl FnMut(usize)) {
        let Some(shared) = self.shared else { return (0..tasks).for_each(task) };
        let number = self.loops.replace(self.loops.get() + 1);
        if self.index == 0 {
            // Nobody is in the loop before this one, nor yet in the one after it.
            shared.next.0[(number + 1) % 2].store(shared.threads(), Ordering::Relaxed);
        }
        let mut i = self.index;
        while i < tasks {
            task(i);
            if tasks <= shared.threads() {
                return;
            }
            i = shared.next.0[number % 2].fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller's included; at least one.
    pub fn new(threads: usize) -> Pool {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let shared = Arc::new(Shared {
            start: Line(Start {
                generation: AtomicU64::new(0),
                part: UnsafeCell::new(None),
                finished: AtomicU64::new(0),
            }),
            arrived: Line(AtomicUsize::new(0)),
            next: Line([AtomicUsize::new(0), AtomicUsize::new(0)]),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleeping: Mutex::new(()),
            wake: Condvar::new(),
            waiting: AtomicUsize::new(0),
            met: Condvar::new(),
            caller_parked: AtomicBool::new(false),
            done: Condvar::new(),
            threads: AtomicUsize::new(1),
            spins: if threads <= cores { SPINS_MAX } else { 0 },
        });
        let workers: Vec<_> = (1..threads)
            .map_while(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new().name(format!("kernels-{i}")).spawn(move || shared.work(i)).ok()
            })
            .collect();
        shared.threads.store(workers.len() + 1, Ordering::Relaxed);
        Pool { shared, workers, turn: Mutex::new(()) }
    }

    /// Threads that take part in a loop, the caller's included.
    pub fn threads(&self) -> usize {
        self.shared.threads()
    }

    /// Calls `task(i)` for each `i` in `0..tasks`; returns when all calls have returned. No allocation.
    ///
    /// From within a task, or without workers, it runs inline. A panic in a task is resumed here.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 {
            return (0..tasks).for_each(task);
        }
        self.team(&|member| member.each(tasks, task));
    }

    /// Calls `part` once on every thread; returns when all calls have returned. No allocation. All members must come to
    /// the same meetings and loops.
    ///
    /// From within a part, or without workers, the caller is a team of one. A panic in a part is resumed here.
    pub(crate) fn team(&self, part: &Part<'_>) {
        if self.workers.is_empty() || INSIDE.get() {
            return part(&Member::new(None, 0));
        }
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        let generation = shared.start.0.generation.load(Ordering::Relaxed) + 1;
        shared.arrived.0.store(0, Ordering::Relaxed);
        shared.next.0[0].store(shared.threads(), Ordering::Relaxed);
        // SAFETY: the lifetime is erased only until the wait below: no worker reads the part after it has finished.
        let erased: *const Part<'static> = unsafe { std::mem::transmute::<&Part<'_>, &Part<'static>>(part) };
        // SAFETY: every worker has finished the part before, and `turn` keeps other callers out.
        unsafe { *shared.start.0.part.get() = Some(erased) };
        shared.start.0.generation.swap(generation, Ordering::SeqCst);
        // A worker counts itself among the sleepers, then looks at `generation`; here it is the reverse. In one order of
        // all four at least one sees the other, and the lock keeps the notice until the worker waits for it.
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleeping));
            shared.wake.notify_all();
        }
        let caught = shared.take_part(part, 0);
        shared.wait_for_workers(generation * self.workers.len() as u64);
        let panicked = shared.panicked.load(Ordering::Relaxed);
        if panicked {
            shared.panicked.store(false, Ordering::Relaxed);
        }
        drop(turn);
        match caught {
            Err(panic) => resume_unwind(panic),
            Ok(()) => assert!(!panicked, "a task of a parallel loop panicked"),
        }
    }
}

impl Shared {
    fn threads(&self) -> usize {
        self.threads.load(Ordering::Relaxed)
    }

    fn take_part(&self, part: &Part<'_>, index: usize) -> std::thread::Result<()> {
        let caught = catch_unwind(AssertUnwindSafe(|| {
            let _inside = Inside::enter();
            part(&Member::new(Some(self), index));
        }));
        if caught.is_err() {
            let _sleeping = lock(&self.sleeping);
            self.panicked.store(true, Ordering::Relaxed);
            self.met.notify_all();
        }
        caught
    }

    fn work(&self, index: usize) {
        let mut seen = 0;
        while let Some(generation) = self.wait(seen) {
            seen = generation;
            // SAFETY: between the rise of `generation` and the count below `part` is not written, and the caller of
            // `team` keeps what it points to alive.
            let part = unsafe { (*self.start.0.part.get()).map(|part| &*part) };
            if let Some(part) = part {
                let _ = self.take_part(part, index);
            }
            // A worker raises `finished`, then looks at `caller_parked`; the caller does the reverse. In one order of
            // all four at least one sees the other, and the lock keeps the notice until the caller waits for it.
            self.start.0.finished.fetch_add(1, Ordering::SeqCst);
            if self.caller_parked.load(Ordering::SeqCst) {
                drop(lock(&self.sleeping));
                self.done.notify_one();
            }
        }
    }

    /// Returns when workers have finished `parts` parts in all.
    fn wait_for_workers(&self, parts: u64) {
        for _ in 0..self.spins {
            if self.start.0.finished.load(Ordering::Acquire) >= parts {
                return;
            }
            std::hint::spin_loop();
        }
        let mut sleeping = lock(&self.sleeping);
        // A swap where a store would do: emulators of Arm are known to let a later load pass a store.
        self.caller_parked.swap(true, Ordering::SeqCst);
        while self.start.0.finished.load(Ordering::SeqCst) < parts {
            sleeping = self.done.wait(sleeping).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_parked.store(false, Ordering::SeqCst);
    }

    /// The next generation after `seen`, or `None` when the pool stops.
    fn wait(&self, seen: u64) -> Option<u64> {
        for _ in 0..self.spins {
            let now = self.start.0.generation.load(Ordering::Acquire);
            if now != seen {
                return Some(now);
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            std::hint::spin_loop();
        }
        let mut sleeping = lock(&self.sleeping);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        loop {
            let now = self.start.0.generation.load(Ordering::SeqCst);
            if now != seen || self.stop.load(Ordering::Relaxed) {
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
                return (now != seen).then_some(now);
            }
            sleeping = self.wake.wait(sleeping).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleeping));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// Marks this thread as inside a task, also when the task panics.
struct Inside;

impl Inside {
    fn enter() -> Inside {
        INSIDE.set(true);
        Inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(false);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_iteration_runs_once() {
        for threads in 1..=4 {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn loops_inside_loops_and_from_many_threads_end() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(5, &|_| {
                            pool.run(3, &|_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 200 * 15);
    }

    /// A caller whose own share ends long before the workers' parks, and is woken.
    #[test]
    fn a_caller_that_waits_for_slow_workers_wakes() {
        for threads in [2, 5] {
            let pool = Pool::new(threads);
            let caller = std::thread::current().id();
            let total = AtomicUsize::new(0);
            for _ in 0..50 {
                pool.run(threads, &|_| {
                    let rounds = if std::thread::current().id() == caller { 0 } else { 200_000 };
                    (0..rounds).for_each(|_| std::hint::spin_loop());
                    total.fetch_add(1, Ordering::Relaxed);
                });
            }
            assert_eq!(total.into_inner(), 50 * threads);
        }
    }

    /// What one member writes before a meeting, the others read after it; loops between meetings take every iteration once.
    #[test]
    fn members_meet_and_share_out_loops() {
        for threads in 1..=4 {
            let pool = Pool::new(threads);
            let places: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            let total = AtomicUsize::new(0);
            for _ in 0..20 {
                pool.team(&|member| {
                    assert_eq!(member.threads(), threads);
                    for round in 1..=50 {
                        places[member.index()].store(round, Ordering::Relaxed);
                        member.meet();
                        assert!(places.iter().all(|place| place.load(Ordering::Relaxed) == round));
                        member.each(round % 11, |_| _ = total.fetch_add(1, Ordering::Relaxed));
                        member.meet();
                    }
                });
            }
            assert_eq!(total.into_inner(), 20 * (0..=50).map(|round| round % 11).sum::<usize>());
        }
    }

    /// Members that wait long for the last one park, and are woken.
    #[test]
    fn members_that_wait_for_a_slow_one_wake() {
        for threads in [2, 5] {
            let pool = Pool::new(threads);
            for round in 0..50 {
                pool.team(&|member| {
                    if member.index() == round % threads {
                        (0..200_000).for_each(|_| std::hint::spin_loop());
                    }
                    member.meet();
                });
            }
        }
    }

    #[test]
    fn a_panic_before_a_meeting_ends_the_team() {
        let pool = Pool::new(3);
        for who in 0..3 {
            let ended = catch_unwind(AssertUnwindSafe(|| {
                pool.team(&|member| {
                    assert!(member.index() != who, "one of three");
                    member.meet();
                });
            }));
            assert!(ended.is_err());
        }
        pool.team(&|member| member.meet());
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let panic = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|i| assert!(i != 5, "five"))));
        assert!(panic.is_err());
        let count = AtomicUsize::new(0);
        pool.run(8, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 8);
    }
}
