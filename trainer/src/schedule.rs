//! Learning rate over the steps of a stage.

use serde::{Deserialize, Serialize};

/// Shape of the schedule after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Half a cosine down to the floor.
    Cosine,
    /// Constant, then linear to the floor over the last share of the steps (warm-up, stable, decay).
    Linear {
        /// Share of the steps spent decaying, in (0, 1].
        share: f64,
    },
}

/// A learning rate schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Largest rate.
    pub peak: f64,
    /// Steps of linear warm-up.
    pub warm_up: usize,
    /// Steps in all.
    pub steps: usize,
    /// What follows the warm-up.
    pub decay: Decay,
    /// Final rate as a share of the peak.
    pub floor: f64,
}

impl Schedule {
    /// Rate of step `step`, counted from 0.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warm_up {
            return self.peak * (step + 1) as f64 / self.warm_up as f64;
        }
        let left =
            |from: f64| ((self.steps as f64 - step as f64) / (self.steps as f64 - from).max(1.0)).clamp(0.0, 1.0);
        let share = match self.decay {
            Decay::Cosine => 0.5 - 0.5 * (std::f64::consts::PI * left(self.warm_up as f64)).cos(),
            Decay::Linear { share } => left(self.steps as f64 * (1.0 - share)),
        };
        self.peak * (self.floor + (1.0 - self.floor) * share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_holds_and_decays() {
        let schedule = Schedule { peak: 1.0, warm_up: 10, steps: 100, decay: Decay::Linear { share: 0.2 }, floor: 0.1 };
        assert!((schedule.rate(0) - 0.1).abs() < 1e-9);
        assert!((schedule.rate(10) - 1.0).abs() < 1e-9);
        assert!((schedule.rate(79) - 1.0).abs() < 1e-9);
        assert!(schedule.rate(99) < 0.2);
        let cosine = Schedule { decay: Decay::Cosine, floor: 0.0, ..schedule };
        assert!((cosine.rate(55) - 0.5).abs() < 1e-2);
        assert!((0..99).skip(10).all(|s| cosine.rate(s) >= cosine.rate(s + 1)));
    }
}
