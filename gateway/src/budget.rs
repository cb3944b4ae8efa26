//! How often requests may be submitted again: a token bucket. Pure.
//!
//! As Finagle's and tower's retry budgets, so that a cluster in trouble gets little more than the load it already has. Own,
//! because `tower::retry::budget::TpsBudget` reads the clock by itself: no test could hold it to its bound.

use std::time::Instant;

/// Re-submissions that every request brings: at most a fifth more load.
const PER_REQUEST: f64 = 0.2;
/// Re-submissions that come back every second, for when there are few requests.
const PER_SECOND: f64 = 10.0;
/// Most that are saved up: ten seconds without requests.
const SAVED_MAX: f64 = 100.0;

/// Re-submissions that may be made.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    /// Left at `at`.
    left: f64,
    at: Instant,
}

impl RetryBudget {
    /// As many as can be saved up.
    pub(crate) fn new(now: Instant) -> Self {
        Self { left: SAVED_MAX, at: now }
    }

    /// A request comes, and brings its part.
    pub(crate) fn deposit(&mut self, now: Instant) {
        self.earn(PER_REQUEST, now);
    }

    /// Takes one re-submission, if there is one.
    pub(crate) fn withdraw(&mut self, now: Instant) -> bool {
        self.earn(0.0, now);
        let enough = self.left >= 1.0;
        self.left -= f64::from(u8::from(enough));
        enough
    }

    fn earn(&mut self, more: f64, now: Instant) {
        let come = PER_SECOND * now.saturating_duration_since(self.at).as_secs_f64();
        (self.left, self.at) = ((self.left + come + more).min(SAVED_MAX), now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    #[test]
    fn time_and_requests_fill_it_again() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        assert!((0..100).all(|_| budget.withdraw(now)) && !budget.withdraw(now));
        let later = now + Duration::from_millis(100);
        assert!(budget.withdraw(later) && !budget.withdraw(later));
        (0..5).for_each(|_| budget.deposit(later));
        assert!(budget.withdraw(later) && !budget.withdraw(later));
    }

    proptest! {
        #[test]
        fn there_are_never_more_than_a_fifth_of_the_requests_and_ten_per_second_besides(
            steps in prop::collection::vec((any::<bool>(), 0u64..100), 1..400),
        ) {
            let begin = Instant::now();
            let (mut budget, mut now) = (RetryBudget::new(begin), begin);
            let (mut requests, mut again) = (0.0, 0.0);
            for (request, pause) in steps {
                now += Duration::from_millis(pause);
                if request {
                    budget.deposit(now);
                    requests += 1.0;
                } else if budget.withdraw(now) {
                    again += 1.0;
                }
                let most = SAVED_MAX + PER_REQUEST * requests + PER_SECOND * (now - begin).as_secs_f64();
                prop_assert!(again <= most + 1e-6, "{again} of {most}");
            }
        }
    }
}
