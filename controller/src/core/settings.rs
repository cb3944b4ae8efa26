//! Settings of models for requests that name none: what was asked for, and what is in force. Pure.
//!
//! Automatic settings follow the load with hysteresis: another choice must promise clearly more for some ticks in a row before it
//! replaces the one in force, unless that is no longer good or quick enough. Every change has a revision of its own.

use super::live::Live;
use super::state::{Measured, Member};
use super::{Action, Fact, Readiness};
use crate::policy::{Candidate, Choice, Load, Row, Verdict, choose_seen, predict};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Another choice must promise this many times the tokens per second of the one in force.
pub const GAIN_MIN: f64 = 1.1;
/// For so many ticks in a row.
pub const STEADY_TICKS: u32 = 3;
/// The load is the median of so many ticks: a moment's is none.
const LOAD_TICKS: usize = 5;
/// Positions of context of a request, where nobody says.
const TYPICAL_CONTEXT: u32 = 256;

/// A way to decode.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// Positions decoded together; 1 is autoregressive.
    pub block_size: u32,
    /// Confidence threshold; `None` is autoregressive.
    pub threshold: Option<f64>,
    /// Masks draft `block_size` positions ahead and causal rows decide; `threshold` is then how likely a draft must be right.
    #[serde(default)]
    pub self_speculative: bool,
}

impl Setting {
    /// That of a measured row.
    fn of_row(row: &Row) -> Setting {
        Setting { block_size: row.block_size, threshold: row.threshold, self_speculative: row.self_speculative }
    }

    /// That of a measured candidate.
    fn of(candidate: &Candidate) -> Setting {
        let &Candidate { block_size, threshold, self_speculative, .. } = candidate;
        Setting { block_size, threshold, self_speculative }
    }
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Intent {
    /// The model's own settings.
    #[default]
    ModelDefaults,
    /// These, whatever the load.
    Fixed(Setting),
    /// What commits most tokens per second under the present load.
    Automatic {
        /// Longest time from one committed block of a request to the next (milliseconds).
        latency_ms: Option<f64>,
        /// Least lower bound of the pass rate; `None`: a margin below the best.
        floor: Option<f64>,
        /// Block sizes that may be chosen; none named: all that were measured.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        block_sizes: Vec<u32>,
    },
}

/// One model's settings.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ModelSettings {
    /// What was asked for.
    pub intent: Intent,
    /// Rises with every change.
    pub revision: u64,
    /// In force; `None`: the model's own.
    pub current: Option<Setting>,
    /// Requests at a time per group, of late.
    pub concurrency: f64,
    /// Why it is in force.
    pub why: String,
    /// What may replace it, and for how many ticks it has promised more.
    contender: Option<(Setting, u32)>,
    /// Of the last ticks.
    loads: VecDeque<f64>,
    /// What settings really gave.
    live: Live,
}

impl ModelSettings {
    /// As the store has them.
    pub fn stored(intent: Intent, revision: u64) -> Self {
        let mut settings = Self { revision, ..Self::default() };
        settings.ask(intent);
        settings
    }

    fn ask(&mut self, intent: Intent) {
        self.contender = None;
        (self.current, self.why) = match &intent {
            Intent::ModelDefaults => (None, "the model's own settings".into()),
            Intent::Fixed(setting) => (Some(*setting), "fixed".into()),
            Intent::Automatic { .. } => (None, "no load has been seen yet".into()),
        };
        self.intent = intent;
    }

    /// Takes an intent; what has to be stored.
    pub(super) fn set(&mut self, model: &str, intent: Intent) -> Action {
        self.ask(intent);
        self.changed(model)
    }

    fn changed(&mut self, model: &str) -> Action {
        self.revision += 1;
        Action::Persist(Fact::Settings {
            model: model.to_owned(),
            intent: self.intent.clone(),
            revision: self.revision,
        })
    }

    /// A tick: follows the load of the model's `members`.
    pub(super) fn follow(&mut self, model: &str, members: &[&Member]) -> Option<Action> {
        let Intent::Automatic { latency_ms, floor, block_sizes } = self.intent.clone() else { return None };
        let ready: Vec<&Member> =
            members.iter().copied().filter(|member| member.readiness == Readiness::Ready).collect();
        // Those that wait share no step yet.
        let active: u64 = ready.iter().map(|member| u64::from(member.active)).sum();
        let now = active as f64 / ready.len().max(1) as f64;
        self.loads.push_back(now);
        if self.loads.len() > LOAD_TICKS {
            self.loads.pop_front();
        }
        let mut sorted: Vec<f64> = self.loads.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        self.concurrency = sorted[sorted.len() / 2];
        let Some(measured) = members.iter().find_map(|member| member.measured.clone()) else {
            self.why = "no worker has both step times and quality of the model".into();
            return self.adopt(model, None);
        };
        let load = Load {
            concurrency: self.concurrency.round().max(1.0) as u32,
            context: TYPICAL_CONTEXT,
            latency_ms,
            floor: floor.unwrap_or_else(|| measured.quality.default_floor()),
            block_sizes,
        };
        self.see(&ready, &measured);
        let seen = |row: &Row| self.live.factor(Setting::of_row(row));
        let choice = choose_seen(&measured.profile, &measured.quality, &load, seen);
        self.decide(model, &choice, load.concurrency)
    }

    /// Holds what the setting in force gives against what it promised.
    fn see(&mut self, ready: &[&Member], measured: &Measured) {
        let Some(current) = self.current else { return };
        let row = measured.quality.rows.iter().find(|row| Setting::of_row(row) == current);
        let promised = |requests: f64| {
            let at_once = requests.round().max(1.0) as u32;
            row.map(|row| predict(&measured.profile, row, at_once, TYPICAL_CONTEXT))
        };
        self.live.take(current, self.revision, ready, promised);
    }

    fn decide(&mut self, model: &str, choice: &Choice, concurrency: u32) -> Option<Action> {
        let Some(best) = choice.chosen() else {
            self.why = "nothing measured is good and quick enough".into();
            return self.adopt(model, None);
        };
        let rate = |candidate: &Candidate| candidate.prediction.tokens_per_s;
        let eligible = |verdict: &Verdict| matches!(verdict, Verdict::Chosen | Verdict::FewerTokens { .. });
        let current = choice.candidates.iter().find(|candidate| Some(Setting::of(candidate)) == self.current);
        let why =
            |promised: f64| format!("{promised:.0} tokens/s at {concurrency} at a time, the most of what was measured");
        match current.filter(|current| eligible(&current.verdict)) {
            Some(current) if rate(best) < GAIN_MIN * rate(current) => {
                self.contender = None;
                None
            }
            Some(_) => {
                let before = self.contender.filter(|(contender, _)| *contender == Setting::of(best));
                let ticks = before.map_or(0, |(_, ticks)| ticks) + 1;
                if ticks < STEADY_TICKS {
                    self.contender = Some((Setting::of(best), ticks));
                    return None;
                }
                self.why = why(rate(best));
                self.adopt(model, Some(Setting::of(best)))
            }
            None => {
                self.why = why(rate(best));
                self.adopt(model, Some(Setting::of(best)))
            }
        }
    }

    fn adopt(&mut self, model: &str, setting: Option<Setting>) -> Option<Action> {
        self.contender = None;
        let changes = self.current != setting;
        self.current = setting;
        changes.then(|| self.changed(model))
    }
}

/// Settings by model.
pub type Settings = BTreeMap<String, ModelSettings>;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::Pace;
    use super::*;
    use crate::policy::{Profile, Quality};
    use std::sync::Arc;
    use std::time::Duration;
    use unmask_proto::v1::ModelDescriptor;

    /// A device on which rows are free up to 16 and dear beyond: blocks win when few share a step, one row each when many.
    fn measured() -> Arc<Measured> {
        let point = |rows: u32| {
            let ms = 1.0 + f64::from(rows.saturating_sub(16)) / 4.0;
            format!(r#"{{"rows":{rows},"context":0,"ms":{ms},"spread":0.0}}"#)
        };
        let points: Vec<String> = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024].map(point).into();
        let profile = format!(
            r#"{{"format":"profile/1","model":"m","numerics_id":"n","device":"d","isa":"i","threads":1,"dtype":"bf16",
            "kv_type":"f32","points":[{}]}}"#,
            points.join(",")
        );
        let row = |policy: &str, block: u32, threshold: &str, tpf: f64| {
            format!(
                r#"{{"policy":"{policy}","block_size":{block},{threshold}"dtype":"bf16","n":1000,"pass_rate":0.98,
                "parse_rate":1.0,"pass_rate_low":0.97,"tpf":{tpf}}}"#
            )
        };
        let quality = format!(
            r#"{{"format":"unmask.quality/1","command":"c","rows":[{},{}]}}"#,
            row("autoregressive", 1, "", 1.0),
            row("threshold", 8, r#""threshold":0.9,"#, 3.0)
        );
        let (profile, quality) = (Profile::parse(&profile).unwrap(), Quality::parse(&quality).unwrap());
        Arc::new(Measured { profile, quality })
    }

    fn member(requests: u32, measured: Option<Arc<Measured>>) -> Member {
        Member {
            stream: None,
            broken: None,
            ended: false,
            group_id: "g".into(),
            epoch: 1,
            endpoint: "e:1".into(),
            model: ModelDescriptor::default(),
            measured,
            capacity: None,
            problem: String::new(),
            loaded_percent: 0,
            policy_revision: 0,
            pace: Pace::default(),
            readiness: Readiness::Ready,
            outstanding_rows: 0,
            requests,
            active: requests,
            heard: Duration::ZERO,
        }
    }

    const AUTOMATIC: Intent = Intent::Automatic { latency_ms: None, floor: None, block_sizes: Vec::new() };
    const BLOCKS: Setting = Setting { block_size: 8, threshold: Some(0.9), self_speculative: false };
    const ONE_BY_ONE: Setting = Setting { block_size: 1, threshold: None, self_speculative: false };

    #[test]
    fn the_choice_follows_the_load_and_does_not_swing() {
        let measured = measured();
        let mut settings = ModelSettings::default();
        settings.set("m", AUTOMATIC);
        let mut tick = |requests: u32| {
            let member = member(requests, Some(Arc::clone(&measured)));
            settings.follow("m", &[&member]);
            (settings.current, settings.revision)
        };
        // Nothing was in force: the first choice is taken at once.
        assert_eq!(tick(1), (Some(BLOCKS), 2));
        // A moment of load changes nothing.
        assert_eq!(tick(64), (Some(BLOCKS), 2));
        for _ in 0..10 {
            assert_eq!(tick(1), (Some(BLOCKS), 2));
        }
        let up: Vec<_> = (0..20).map(|_| tick(64)).collect();
        assert_eq!(up[19], (Some(ONE_BY_ONE), 3));
        let down: Vec<_> = (0..30).map(|_| tick(1)).collect();
        assert_eq!(down[29], (Some(BLOCKS), 4));
        // Load that swings about the point where both are equal settles on one.
        let swings: Vec<u64> = (0..200).map(|i| tick(if i % 2 == 0 { 1 } else { 8 }).1).collect();
        assert!(swings[199] - swings[20] <= 1, "{swings:?}");
    }

    /// A group whose passes take `slowness` times as long as measured, and whose tokens take as long again as `detour`
    /// says once they have left the model.
    struct Real {
        settings: ModelSettings,
        pace: Pace,
        slowness: f64,
    }

    impl Real {
        fn new(slowness: f64) -> Real {
            let mut settings = ModelSettings::default();
            settings.set("m", AUTOMATIC);
            Real { settings, pace: Pace::default(), slowness }
        }

        fn tick(&mut self, requests: u32, detour: fn(Setting) -> f64) -> (Setting, u64) {
            let measured = measured();
            if self.pace.revision != self.settings.revision {
                self.pace = Pace { revision: self.settings.revision, ..Pace::default() };
            }
            if let Some(current) = self.settings.current {
                let row = measured.quality.rows.iter().find(|row| Setting::of_row(row) == current).unwrap();
                let step_s = predict(&measured.profile, row, requests, TYPICAL_CONTEXT).step_ms / 1e3 * self.slowness;
                let steps = 1.0 / (step_s * (1.0 + detour(current)));
                self.pace.steps += steps as u64;
                self.pace.step_s += steps * step_s;
                self.pace.tokens += (steps * f64::from(requests) * row.tpf) as u64;
                self.pace.busy_s += 1.0;
                self.pace.request_s += f64::from(requests);
            }
            let member = Member { pace: self.pace, ..member(requests, Some(measured)) };
            self.settings.follow("m", &[&member]);
            (self.settings.current.unwrap(), self.settings.revision)
        }
    }

    /// At 64 at a time the profile promises most of one row each; where each pass costs more on its way than in the
    /// model, that is tried once and given up, and what holds is kept.
    #[test]
    fn a_promise_that_does_not_hold_is_tried_once() {
        let mut real = Real::new(1.0);
        let detour = |setting| if setting == ONE_BY_ONE { 9.0 } else { 0.1 };
        let ticks: Vec<_> = (0..200).map(|_| real.tick(64, detour)).collect();
        assert!(ticks.iter().any(|(setting, _)| *setting == ONE_BY_ONE), "what is promised is tried");
        assert_eq!(ticks[199].0, BLOCKS);
        assert_eq!(ticks[199].1, ticks[40].1, "and not again: {ticks:?}");
    }

    /// Everything being slower by the same factor, as on a machine busier than when it was measured, changes nothing.
    #[test]
    fn a_slower_machine_chooses_as_before() {
        let mut real = Real::new(7.0);
        for (requests, expected) in [(1, BLOCKS), (64, ONE_BY_ONE), (1, BLOCKS)] {
            let ticks: Vec<_> = (0..60).map(|_| real.tick(requests, |_| 0.0)).collect();
            assert_eq!(ticks[59].0, expected, "{requests} at a time");
            assert_eq!(ticks[59].1, ticks[20].1, "{ticks:?}");
        }
    }

    #[test]
    fn what_is_not_good_or_quick_enough_goes_at_once() {
        let measured = measured();
        let member = member(1, Some(measured));
        let mut settings =
            ModelSettings::stored(Intent::Automatic { latency_ms: Some(2.0), floor: None, block_sizes: vec![] }, 7);
        // A block of 8 takes 8/3 passes of 1 ms.
        assert!(settings.follow("m", &[&member]).is_some());
        assert_eq!((settings.current, settings.revision), (Some(ONE_BY_ONE), 8));
        settings.set("m", Intent::Automatic { latency_ms: None, floor: Some(0.999), block_sizes: vec![] });
        settings.follow("m", &[&member]);
        assert_eq!(settings.current, None);
        assert!(settings.why.contains("good and quick enough"));
    }

    #[test]
    fn without_measurements_the_model_keeps_its_own() {
        let mut settings = ModelSettings::stored(AUTOMATIC, 1);
        assert!(settings.follow("m", &[&member(4, None)]).is_none());
        assert_eq!(settings.current, None);
        assert!(settings.why.contains("no worker"));
        let mut fixed = ModelSettings::stored(Intent::Fixed(BLOCKS), 3);
        assert!(fixed.follow("m", &[&member(64, None)]).is_none());
        assert_eq!((fixed.current, fixed.revision), (Some(BLOCKS), 3));
    }
}
