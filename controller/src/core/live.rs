//! What settings really give, beside what was measured of bare passes. Pure.
//!
//! A profile times passes alone, at another moment. Two things are held against what workers commit: how many times slower
//! passes are now, which holds for all settings alike, and for each setting that was in force what is left: events on their
//! way to clients, services that share the machine, tokens that fall otherwise than in `quality.json`. A setting that was
//! never in force counts as promised, so that a promise is tried once, and believed no longer than it holds.

use super::settings::Setting;
use super::state::Member;
use crate::policy::Prediction;
use std::collections::BTreeMap;

/// Time of steps that anything is taken from at least (seconds, of all groups).
const BUSY_S_MIN: f64 = 0.2;
/// Weight of the latest tick.
const LATEST: f64 = 0.3;
/// A factor is forgotten when its setting was not in force for so many ticks: loads and machines change.
const TICKS_MAX: u32 = 600;
/// Factors beyond this are not believed, nor those below its inverse.
const FACTOR_MAX: f64 = 30.0;

/// Sums that a worker reports: steps in which all its requests were of one revision.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pace {
    /// 0: there were none.
    pub revision: u64,
    /// Committed.
    pub tokens: u64,
    /// Steps.
    pub steps: u64,
    /// In steps (seconds).
    pub step_s: f64,
    /// From the end of a step to the end of the next (seconds).
    pub busy_s: f64,
    /// The same, times the requests that shared the steps.
    pub request_s: f64,
}

impl Pace {
    fn since(self, before: Pace) -> Pace {
        Pace {
            revision: self.revision,
            tokens: self.tokens - before.tokens,
            steps: self.steps.saturating_sub(before.steps),
            step_s: self.step_s - before.step_s,
            busy_s: self.busy_s - before.busy_s,
            request_s: self.request_s - before.request_s,
        }
    }

    fn add(&mut self, more: Pace) {
        self.tokens += more.tokens;
        self.steps += more.steps;
        self.step_s += more.step_s;
        self.busy_s += more.busy_s;
        self.request_s += more.request_s;
    }
}

/// What was seen of settings.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Live {
    /// Sums by group, as of the last tick.
    last: BTreeMap<String, Pace>,
    /// Time of a pass, seen over promised; `None` before any was seen.
    slowness: Option<f64>,
    factors: Vec<Factor>,
}

/// What a setting gives.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Factor {
    setting: Setting,
    /// Tokens per second, seen over promised by passes as slow as they are.
    value: f64,
    /// Ticks since it was last seen.
    age: u32,
}

impl Live {
    /// A tick with `current` in force since `revision`; `promised` is what was predicted of it for so many requests at a
    /// time.
    pub fn take(
        &mut self,
        current: Setting,
        revision: u64,
        members: &[&Member],
        promised: impl FnOnce(f64) -> Option<Prediction>,
    ) {
        self.factors.iter_mut().for_each(|factor| factor.age += 1);
        self.factors.retain(|factor| factor.age <= TICKS_MAX);
        let (mut seen, mut now) = (Pace::default(), BTreeMap::new());
        for member in members.iter().filter(|member| member.pace.revision == revision) {
            let before = self.last.get(&member.group_id).filter(|before| before.revision == revision);
            // A worker that began anew counts from nothing.
            let before = before.filter(|before| before.tokens <= member.pace.tokens).copied().unwrap_or_default();
            seen.add(member.pace.since(before));
            now.insert(member.group_id.clone(), member.pace);
        }
        if seen.busy_s < BUSY_S_MIN || seen.steps == 0 {
            return;
        }
        self.last = now;
        let Some(promised) = promised(seen.request_s / seen.busy_s) else { return };
        let believable = |factor: f64| factor.clamp(FACTOR_MAX.recip(), FACTOR_MAX);
        let follow = |before: f64, latest: f64| before + LATEST * (latest - before);
        // Simulated passes take no time inside the engine.
        let slower = if seen.step_s > 0.0 { seen.step_s * 1e3 / seen.steps as f64 / promised.step_ms } else { 1.0 };
        let slowness = self.slowness.map_or(believable(slower), |before| follow(before, believable(slower)));
        self.slowness = Some(slowness);
        let value = believable(seen.tokens as f64 / seen.busy_s / promised.tokens_per_s * slowness);
        match self.factors.iter_mut().find(|factor| factor.setting == current) {
            Some(factor) => (factor.value, factor.age) = (follow(factor.value, value), 0),
            None => self.factors.push(Factor { setting: current, value, age: 0 }),
        }
    }

    /// What to multiply a promise by; 1 as long as nothing was seen.
    pub fn factor(&self, setting: Setting) -> f64 {
        let own = self.factors.iter().find(|factor| factor.setting == setting).map_or(1.0, |factor| factor.value);
        own / self.slowness.unwrap_or(1.0)
    }
}
