//! A process: a runtime with a clock of its own that only the driver moves.

use crate::trace;
use futures::future::BoxFuture;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;

/// Simulated time moves in steps of this.
pub const TICK: Duration = Duration::from_millis(5);

/// Ticks in a time.
pub const fn ticks(time: Duration) -> u64 {
    (time.as_millis() / TICK.as_millis()) as u64
}

/// What a process runs, made anew for every start.
pub type Main = Box<dyn FnMut() -> BoxFuture<'static, String>>;

pub struct Host {
    pub name: String,
    main: Main,
    running: Option<Running>,
    /// Its clock by the world's: 1 unless it drifts.
    pub rate: f64,
    /// Time that it missed while it was stopped.
    missed: Duration,
    pub paused: bool,
}

struct Running {
    runtime: Runtime,
    ended: tokio::task::JoinHandle<String>,
    /// Where its clock stands.
    now: Instant,
}

impl Host {
    pub fn new(name: String, main: Main) -> Self {
        Self { name, main, running: None, rate: 1.0, missed: Duration::ZERO, paused: false }
    }

    pub fn is_up(&self) -> bool {
        self.running.is_some()
    }

    /// Starts the process.
    pub fn start(&mut self) {
        // Which queue is looked at, and when clocks are, must not depend on how many polls there were before: a task that
        // polls its futures in a random order (tonic's do) may need one more.
        let mut builder = Builder::new_current_thread();
        builder.enable_time().start_paused(true).global_queue_interval(1).event_interval(10_000);
        let runtime = builder.build().unwrap();
        (self.paused, self.missed, self.rate) = (false, Duration::ZERO, 1.0);
        trace::on(&self.name);
        let main = (self.main)();
        let ended = runtime.spawn(main);
        let now = runtime.block_on(async { Instant::now() });
        self.running = Some(Running { runtime, ended, now });
    }

    /// The process is gone, with all it had open.
    pub fn kill(&mut self) {
        if let Some(running) = self.running.take() {
            trace::on(&self.name);
            drop(running);
        }
    }

    /// Lets one tick pass; how the process ended if it did.
    pub fn tick(&mut self) -> Option<String> {
        let running = self.running.as_mut()?;
        let tick = TICK.mul_f64(self.rate);
        if self.paused {
            self.missed += tick;
            return None;
        }
        trace::on(&self.name);
        let missed = std::mem::take(&mut self.missed);
        if !missed.is_zero() {
            running.now += missed;
            // Its timers are all due at once, as those of a process that was stopped.
            running.runtime.block_on(async move { tokio::time::advance(missed).await });
        }
        running.now += tick;
        let until = running.now;
        running.runtime.block_on(async move { tokio::time::sleep_until(until).await });
        if !running.ended.is_finished() {
            return None;
        }
        let why = running.runtime.block_on(&mut running.ended).unwrap_or_else(|error| error.to_string());
        self.running = None;
        Some(why)
    }
}
