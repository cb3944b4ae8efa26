//! Stop strings over a stream: hold back only what may be the beginning of one.

/// Releases text up to the stop string that is complete first (of several complete at once, the longest).
///
/// So the result does not depend on the pieces in which text comes.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    found: bool,
}

impl StopMatcher {
    /// Empty stop strings are ignored.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { stops, held: String::new(), found: false }
    }

    /// Text that may be released, and whether a stop string has been found; nothing is released after it.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.found {
            return (String::new(), true);
        }
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = found.min() {
            self.held.truncate(at);
            self.found = true;
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, when the stream ended without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that are a proper beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|&len| text.as_bytes().ends_with(&stop.as_bytes()[..len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_complete_stop_wins_and_nothing_follows_it() {
        let mut matcher = StopMatcher::new(vec!["END".into(), "\n\n".into()]);
        assert_eq!(matcher.push("a E"), ("a ".into(), false));
        assert_eq!(matcher.push("N"), (String::new(), false));
        assert_eq!(matcher.push("x\n"), ("ENx".into(), false));
        assert_eq!(matcher.push("\nEND"), (String::new(), true));
        assert_eq!(matcher.push("more"), (String::new(), true));
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn a_stop_may_begin_inside_its_own_beginning() {
        let mut matcher = StopMatcher::new(vec!["aab".into()]);
        assert_eq!(matcher.push("aa"), (String::new(), false));
        assert_eq!(matcher.push("a"), ("a".into(), false));
        assert_eq!(matcher.push("b"), (String::new(), true));
    }

    proptest! {
        #[test]
        fn pieces_give_what_the_whole_gives(
            pieces in prop::collection::vec("[abé]{0,4}", 0..8), stops in prop::collection::vec("[abé]{1,4}", 1..4),
        ) {
            let whole: String = pieces.concat();
            let first = stops.iter().filter_map(|stop| whole.find(stop.as_str()).map(|at| (at + stop.len(), at))).min();
            let expected = first.map_or(whole.as_str(), |(_, at)| &whole[..at]);
            let mut matcher = StopMatcher::new(stops);
            let mut released = String::new();
            for piece in pieces {
                let (text, found) = matcher.push(&piece);
                released += &text;
                prop_assert!(expected.starts_with(&released));
                prop_assert!(!found || released == expected);
            }
            released += &matcher.finish();
            prop_assert_eq!(released, expected);
        }
    }
}
