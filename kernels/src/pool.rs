//! Own thread pool: a step is many short parallel loops, so threads spin briefly before they park.

use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Polls before a waiting thread, the caller included, parks (about 50 microseconds); none where threads exceed cores.
const SPINS_MAX: u32 = 2_000;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Runs the iterations of a loop on several threads; the caller takes part.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One loop at a time.
    turn: Mutex<()>,
}

/// What passes between threads for every loop, in one line of memory: a loop can be as short as its way there and back.
#[repr(align(64))]
struct Handover {
    /// The loop being run. Written by the caller before `generation` rises, read by workers after they saw it rise.
    job: UnsafeCell<Job>,
    generation: AtomicU64,
    /// Workers that have not finished the present generation.
    busy: AtomicUsize,
}

/// The next iteration to take, beyond each thread's first. Apart from what waiting threads look at.
#[repr(align(64))]
struct Next(AtomicUsize);

struct Shared {
    handover: Handover,
    next: Next,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Workers that park, or are about to.
    sleepers: AtomicUsize,
    sleeping: Mutex<()>,
    /// Tells parked workers of a new generation, or of the end.
    wake: Condvar,
    /// Set while the caller parks until `busy` is zero.
    caller_parked: AtomicBool,
    /// Tells the parked caller that `busy` is zero.
    done: Condvar,
    spins: u32,
}

#[derive(Clone, Copy)]
struct Job {
    task: Option<*const Task<'static>>,
    tasks: usize,
    /// That take part.
    threads: usize,
}

// SAFETY: `job` is written only while no worker is busy and read only while the writer waits for `busy` to fall to
// zero; the task it points to is `Sync` and outlives that wait. Everything else is atomic or locked.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

thread_local! {
    /// Set while this thread runs an iteration: a loop inside a loop runs inline.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool of `threads` threads, the caller's included; at least one.
    pub fn new(threads: usize) -> Pool {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let shared = Arc::new(Shared {
            handover: Handover {
                job: UnsafeCell::new(Job { task: None, tasks: 0, threads: 0 }),
                generation: AtomicU64::new(0),
                busy: AtomicUsize::new(0),
            },
            next: Next(AtomicUsize::new(0)),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleeping: Mutex::new(()),
            wake: Condvar::new(),
            caller_parked: AtomicBool::new(false),
            done: Condvar::new(),
            spins: if threads <= cores { SPINS_MAX } else { 0 },
        });
        let workers = (1..threads)
            .map_while(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new().name(format!("kernels-{i}")).spawn(move || shared.work(i)).ok()
            })
            .collect();
        Pool { shared, workers, turn: Mutex::new(()) }
    }

    /// Threads that take part in a loop, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` for each `i` in `0..tasks`; returns when all calls have returned. No allocation.
    ///
    /// From within a task, or without workers, it runs inline. A panic in a task is resumed here.
    pub fn run(&self, tasks: usize, task: &Task<'_>) {
        if tasks <= 1 || self.workers.is_empty() || INSIDE.get() {
            (0..tasks).for_each(task);
            return;
        }
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: the lifetime is erased only until the wait below: no worker reads the task after `busy` is zero.
        let task: *const Task<'static> = unsafe { std::mem::transmute::<&Task<'_>, &Task<'static>>(task) };
        // SAFETY: `busy` is zero, so no worker reads `job`, and `turn` keeps other callers out.
        unsafe { *shared.handover.job.get() = Job { task: Some(task), tasks, threads: self.threads() } };
        shared.next.0.store(self.threads(), Ordering::Relaxed);
        shared.handover.busy.store(self.workers.len(), Ordering::Relaxed);
        shared.handover.generation.fetch_add(1, Ordering::SeqCst);
        // A worker counts itself among the sleepers, then looks at `generation`; here it is the reverse. In one order of
        // all four at least one sees the other, and the lock keeps the notice until the worker waits for it.
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleeping));
            shared.wake.notify_all();
        }
        let caught = catch_unwind(AssertUnwindSafe(|| shared.take_iterations(0)));
        shared.wait_for_workers();
        let panicked = shared.panicked.swap(false, Ordering::Relaxed);
        drop(turn);
        match caught {
            Err(panic) => resume_unwind(panic),
            Ok(()) => assert!(!panicked, "a task of a parallel loop panicked"),
        }
    }
}

impl Shared {
    /// Takes iterations of the present loop until none is left: the one of thread `own` first, then whichever is next.
    fn take_iterations(&self, own: usize) {
        // SAFETY: called between the rise of `generation` and the fall of `busy`, while `job` is not written.
        let Job { task, tasks, threads } = unsafe { *self.handover.job.get() };
        let Some(task) = task else { return };
        // SAFETY: the caller of `run` keeps the task alive until `busy` is zero.
        let task = unsafe { &*task };
        let _inside = Inside::enter();
        let mut i = own;
        while i < tasks {
            task(i);
            if tasks <= threads {
                return;
            }
            i = self.next.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn work(&self, own: usize) {
        let mut seen = 0;
        while let Some(generation) = self.wait(seen) {
            seen = generation;
            if catch_unwind(AssertUnwindSafe(|| self.take_iterations(own))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            // The last worker lowers `busy`, then looks at `caller_parked`; the caller does the reverse. In one order
            // of all four at least one sees the other, and the lock keeps the notice until the caller waits for it.
            if self.handover.busy.fetch_sub(1, Ordering::SeqCst) == 1 && self.caller_parked.load(Ordering::SeqCst) {
                drop(lock(&self.sleeping));
                self.done.notify_one();
            }
        }
    }

    /// Returns when every worker has finished the present generation.
    fn wait_for_workers(&self) {
        for _ in 0..self.spins {
            if self.handover.busy.load(Ordering::Acquire) == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        let mut sleeping = lock(&self.sleeping);
        // A swap where a store would do: emulators of Arm are known to let a later load pass a store.
        self.caller_parked.swap(true, Ordering::SeqCst);
        while self.handover.busy.load(Ordering::SeqCst) > 0 {
            sleeping = self.done.wait(sleeping).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_parked.store(false, Ordering::SeqCst);
    }

    /// The next generation after `seen`, or `None` when the pool stops.
    fn wait(&self, seen: u64) -> Option<u64> {
        for _ in 0..self.spins {
            let now = self.handover.generation.load(Ordering::Acquire);
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
            let now = self.handover.generation.load(Ordering::SeqCst);
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
