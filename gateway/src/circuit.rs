//! Whether a group is worth asking: a circuit breaker with a single probe. Pure.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a group that broke is passed over, at first; each failed probe doubles it.
const REST_MIN: Duration = Duration::from_millis(250);
/// The longest rest between two probes.
const REST_MAX: Duration = Duration::from_secs(8);

/// What is known of a group's health. Only what breaks a connection or a group opens it: refusals and errors of one
/// request do not.
#[derive(Debug, Default)]
pub(crate) struct Circuit(Mutex<State>);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Closed,
    /// Passed over until `next`, then one request finds out; `rest` is what follows when that fails.
    Open { next: Instant, rest: Duration },
}

impl Circuit {
    /// Requests may go there.
    pub(crate) fn is_closed(&self) -> bool {
        *self.state() == State::Closed
    }

    /// It answered.
    pub(crate) fn close(&self) {
        *self.state() = State::Closed;
    }

    /// It broke. What broke together counts once: an open circuit rests longer only by a probe.
    pub(crate) fn open(&self, now: Instant) {
        let mut state = self.state();
        if *state == State::Closed {
            *state = State::Open { next: now + REST_MIN, rest: REST_MIN };
        }
    }

    /// Whether somebody should find out if it works again.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        matches!(*self.state(), State::Open { next, .. } if now >= next)
    }

    /// Whether this caller is the one to find out if it works again. Until it has, the circuit rests.
    pub(crate) fn probe(&self, now: Instant) -> bool {
        let mut state = self.state();
        match *state {
            State::Open { next, rest } if now >= next => {
                let rest = (2 * rest).min(REST_MAX);
                *state = State::Open { next: now + rest, rest };
                true
            }
            _ => false,
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_probe_at_a_time_with_longer_and_longer_rests_until_it_answers() {
        let (circuit, begin) = (Circuit::default(), Instant::now());
        let at = |ms| begin + Duration::from_millis(ms);
        assert!(circuit.is_closed() && !circuit.probe(begin));
        circuit.open(begin);
        circuit.open(at(200));
        assert!(!circuit.is_closed() && !circuit.probe(at(249)));
        assert!(!circuit.is_due(at(249)) && circuit.is_due(at(250)), "asking whether it is due probes nothing");
        assert!(circuit.probe(at(250)) && !circuit.probe(at(250)), "a single probe");
        circuit.open(at(251));
        assert!(!circuit.probe(at(749)) && circuit.probe(at(750)), "rests 500 ms");
        let mut now = at(750);
        for _ in 0..8 {
            now += REST_MAX;
            assert!(circuit.probe(now), "never rests longer than the limit");
        }
        circuit.close();
        assert!(circuit.is_closed() && !circuit.probe(now + REST_MAX));
    }
}
