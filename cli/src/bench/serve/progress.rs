//! A progress bar on standard error, where that is a terminal.

use super::observe::Outcome;
use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

/// Between redraws without news.
const TICK: Duration = Duration::from_millis(200);
const COUNTED: &str = "{prefix} [{bar:30}] {pos}/{len} {msg} {elapsed}";
const UNCOUNTED: &str = "{prefix} {spinner} {pos} {msg} {elapsed}";

/// Counts of one load point, as they come.
pub struct Progress {
    bar: ProgressBar,
    ok: u64,
    failed: u64,
    shed: u64,
}

impl Progress {
    /// Of a load point with a name, and the number of its requests where that is known.
    pub fn new(name: String, requests: Option<u64>) -> Self {
        // A bar hides itself where standard error is no terminal.
        let bar = requests.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        let template = if requests.is_some() { COUNTED } else { UNCOUNTED };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(name);
        bar.enable_steady_tick(TICK);
        Self { bar, ok: 0, failed: 0, shed: 0 }
    }

    /// A request was sent; `open` are.
    pub fn sent(&mut self, open: usize) {
        self.bar.inc(1);
        self.show(open);
    }

    /// An arrival was shed.
    pub fn shed(&mut self) {
        self.shed += 1;
        self.bar.inc(1);
    }

    /// A request ended; `open` are left.
    pub fn ended(&mut self, outcome: &Outcome, open: usize) {
        match outcome {
            Outcome::Finished { .. } => self.ok += 1,
            Outcome::Failed { .. } => self.failed += 1,
            Outcome::CutOff => {}
        }
        self.show(open);
    }

    /// Leaves the line empty.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }

    fn show(&self, open: usize) {
        if !self.bar.is_hidden() {
            let Self { ok, failed, shed, .. } = self;
            self.bar.set_message(format!("open {open}, ok {ok}, failed {failed}, shed {shed}"));
        }
    }
}
