//! What clients and `status` saw of a run, and what of it may not be. Pure.

use crate::Seen;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// A group in one of its incarnations.
pub type Origin = (String, u64);

/// What happened to a stream.
#[derive(Debug, Clone)]
pub enum What {
    Asked { request: usize },
    Begun { prompt_tokens: u32, block_size: u32 },
    Committed { first_position: u32, tokens: Vec<u32>, text: String, origin: Origin },
    Finished { text: String },
    Failed { status: String },
}

/// What `status` said: the leader's term, and epochs by group.
#[derive(Debug, Clone)]
pub struct Standing {
    pub term: u64,
    pub epochs: BTreeMap<String, u64>,
}

/// A run, each list in the order in which it was seen.
#[derive(Debug, Default)]
pub struct History {
    /// Since the run began; the stream; what it saw.
    pub streams: Vec<(Duration, usize, What)>,
    pub standings: Vec<Standing>,
}

/// What may not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// Positions that came before, or that are missing before these.
    OutOfOrder {
        stream: usize,
        expected: u32,
        begins: u32,
    },
    /// A block of two groups, or of two incarnations of one.
    TwoOrigins {
        stream: usize,
        block: u32,
        first: Origin,
        second: Origin,
    },
    /// A commit that does not say who computed it.
    NoOrigin {
        stream: usize,
    },
    /// A stream went back to an incarnation of a group before one that it had been at.
    WentBack {
        stream: usize,
        group: String,
        from: u64,
        to: u64,
    },
    /// Neither a finish nor an error, in time.
    Hung {
        stream: usize,
    },
    /// Something came after the end, or before the beginning.
    OutsideOfStream {
        stream: usize,
    },
    /// Another token, or text, than without faults; the first such position, as counted from the first generated one.
    Differs {
        stream: usize,
        token: usize,
    },
    EpochFell {
        group: String,
        from: u64,
        to: u64,
    },
    TermFell {
        from: u64,
        to: u64,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfOrder { stream, expected, begins } => {
                write!(f, "stream {stream}: a commit begins at position {begins}, not at {expected}")
            }
            Self::TwoOrigins { stream, block, first, second } => {
                write!(f, "stream {stream}: block {block} comes from {first:?} and from {second:?}")
            }
            Self::NoOrigin { stream } => write!(f, "stream {stream}: a commit names no group and epoch"),
            Self::WentBack { stream, group, from, to } => {
                write!(f, "stream {stream}: at epoch {to} of {group} after epoch {from}")
            }
            Self::Hung { stream } => write!(f, "stream {stream} has not ended in time"),
            Self::OutsideOfStream { stream } => {
                write!(f, "stream {stream}: an event before its beginning or after its end")
            }
            Self::Differs { stream, token } => write!(f, "stream {stream} differs from token {token} on"),
            Self::EpochFell { group, from, to } => write!(f, "the epoch of {group} fell from {from} to {to}"),
            Self::TermFell { from, to } => write!(f, "the term fell from {from} to {to}"),
        }
    }
}

/// Everything in a history that may not be. `expected` is what each request gives without faults; a stream ends within
/// `limit`.
pub fn check(history: &History, expected: &[Seen], limit: Duration) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut streams: BTreeMap<usize, Stream> = BTreeMap::new();
    for (at, number, what) in &history.streams {
        streams.entry(*number).or_default().take(*number, *at, what, &mut found);
    }
    for (number, stream) in &streams {
        stream.end(*number, expected, limit, &mut found);
    }
    standings(&history.standings, &mut found);
    found
}

/// A stream as far as its events have been looked at.
#[derive(Default)]
struct Stream {
    asked: Option<(Duration, usize)>,
    /// Next position, and positions of a block.
    next: Option<(u32, u32)>,
    tokens: Vec<u32>,
    text: String,
    /// The last block, and who computed it.
    block: Option<(u32, Origin)>,
    /// Highest epoch by group.
    epochs: BTreeMap<String, u64>,
    /// When it ended, and whether with a finish.
    ended: Option<(Duration, bool)>,
}

impl Stream {
    fn take(&mut self, stream: usize, at: Duration, what: &What, found: &mut Vec<Violation>) {
        if self.ended.is_some() || (self.asked.is_some() == matches!(what, What::Asked { .. })) {
            return found.push(Violation::OutsideOfStream { stream });
        }
        match what {
            What::Asked { request } => self.asked = Some((at, *request)),
            What::Begun { prompt_tokens, block_size } => self.next = Some((*prompt_tokens, (*block_size).max(1))),
            What::Committed { first_position, tokens, text, origin } => {
                let Some((expected, block_size)) = self.next else {
                    return found.push(Violation::OutsideOfStream { stream });
                };
                if *first_position != expected {
                    found.push(Violation::OutOfOrder { stream, expected, begins: *first_position });
                }
                let end = first_position + tokens.len() as u32;
                self.computed(stream, first_position / block_size, end.saturating_sub(1) / block_size, origin, found);
                self.next = Some((end, block_size));
                self.tokens.extend(tokens);
                self.text += text;
            }
            What::Finished { text } => {
                self.text += text;
                self.ended = Some((at, true));
            }
            What::Failed { .. } => self.ended = Some((at, false)),
        }
    }

    /// Takes note of who computed blocks `first` to `last`.
    fn computed(&mut self, stream: usize, first: u32, last: u32, origin: &Origin, found: &mut Vec<Violation>) {
        if let Some((block, before)) = self.block.take()
            && block >= first
            && before != *origin
        {
            found.push(Violation::TwoOrigins { stream, block, first: before, second: origin.clone() });
        }
        self.block = Some((last, origin.clone()));
        let (group, to) = origin.clone();
        if group.is_empty() || to == 0 {
            found.push(Violation::NoOrigin { stream });
        }
        let highest = self.epochs.entry(group.clone()).or_default();
        if to < *highest {
            found.push(Violation::WentBack { stream, group, from: *highest, to });
        }
        *highest = to.max(*highest);
    }

    fn end(&self, stream: usize, expected: &[Seen], limit: Duration, found: &mut Vec<Violation>) {
        let Some((asked, request)) = self.asked else { return };
        if self.ended.is_none_or(|(at, _)| at.saturating_sub(asked) > limit) {
            found.push(Violation::Hung { stream });
        }
        let whole = self.ended.is_some_and(|(_, finished)| finished);
        let same = self.tokens.iter().zip(&expected[request].tokens).take_while(|(a, b)| a == b).count();
        let complete = self.tokens.len() == expected[request].tokens.len() && self.text == expected[request].text;
        if same < self.tokens.len() || (whole && !complete) {
            found.push(Violation::Differs { stream, token: same });
        }
    }
}

fn standings(standings: &[Standing], found: &mut Vec<Violation>) {
    let (mut term, mut epochs) = (0, BTreeMap::<&str, u64>::new());
    for standing in standings {
        if standing.term < term {
            found.push(Violation::TermFell { from: term, to: standing.term });
        }
        term = term.max(standing.term);
        for (group, &to) in &standing.epochs {
            let highest = epochs.entry(group).or_default();
            if to < *highest {
                found.push(Violation::EpochFell { group: group.clone(), from: *highest, to });
            }
            *highest = to.max(*highest);
        }
    }
}

/// Two blocks of four positions after a prompt of two, from another group each, as they should come.
fn example() -> Vec<What> {
    let commit = |first_position, tokens: &[u32], text: &str, group: &str, epoch| What::Committed {
        first_position,
        tokens: tokens.to_vec(),
        text: text.into(),
        origin: (group.into(), epoch),
    };
    vec![
        What::Asked { request: 0 },
        What::Begun { prompt_tokens: 2, block_size: 4 },
        commit(2, &[1, 2], "ab", "g", 7),
        commit(4, &[3, 4, 5, 6], "cde", "h", 3),
        commit(8, &[7], "g", "g", 9),
        What::Finished { text: "h".into() },
    ]
}

/// What is found in a stream that saw so.
fn found(events: Vec<What>) -> Vec<Violation> {
    let expected = [Seen { tokens: vec![1, 2, 3, 4, 5, 6, 7], text: "abcdegh".into() }];
    let streams = events.into_iter().enumerate().map(|(at, what)| (Duration::from_secs(at as u64), 5, what)).collect();
    check(&History { streams, ..History::default() }, &expected, Duration::from_secs(10))
}

/// The example with one commit changed.
fn with(number: usize, change: impl Fn(&mut u32, &mut Vec<u32>, &mut Origin)) -> Vec<Violation> {
    let mut events = example();
    let What::Committed { first_position, tokens, origin, .. } = &mut events[number] else { panic!("no commit") };
    change(first_position, tokens, origin);
    found(events)
}

#[test]
fn a_stream_that_changes_groups_between_blocks_is_well() {
    assert_eq!(found(example()), []);
}

#[test]
fn positions_twice_and_positions_left_out_are_found() {
    let mut twice = example();
    twice.insert(4, twice[3].clone());
    let again = found(twice);
    assert!(again.contains(&Violation::OutOfOrder { stream: 5, expected: 8, begins: 4 }), "{again:?}");
    let gap = with(4, |first, _, _| *first = 9);
    assert_eq!(gap, [Violation::OutOfOrder { stream: 5, expected: 8, begins: 9 }]);
}

#[test]
fn a_block_of_two_groups_or_two_epochs_is_found() {
    for second in [("h".to_owned(), 4), ("g".to_owned(), 9)] {
        let mut events = example();
        let split = |first_position, tokens: &[u32], text: &str, origin: Origin| What::Committed {
            first_position,
            tokens: tokens.to_vec(),
            text: text.into(),
            origin,
        };
        let halves = [split(4, &[3, 4], "c", ("h".into(), 3)), split(6, &[5, 6], "de", second.clone())];
        events.splice(3..4, halves);
        let expected = Violation::TwoOrigins { stream: 5, block: 1, first: ("h".into(), 3), second };
        assert_eq!(found(events), [expected]);
    }
}

#[test]
fn a_commit_without_origin_is_found() {
    assert_eq!(with(3, |_, _, origin| origin.1 = 0), [Violation::NoOrigin { stream: 5 }]);
    assert_eq!(with(3, |_, _, origin| origin.0.clear()), [Violation::NoOrigin { stream: 5 }]);
}

#[test]
fn a_stream_that_goes_back_to_an_earlier_epoch_is_found() {
    let back = with(4, |_, _, origin| origin.1 = 6);
    assert_eq!(back, [Violation::WentBack { stream: 5, group: "g".into(), from: 7, to: 6 }]);
}

#[test]
fn streams_that_do_not_end_and_what_comes_after_the_end_are_found() {
    let mut open = example();
    open.pop();
    assert_eq!(found(open.clone()), [Violation::Hung { stream: 5 }]);
    // An error is an end too.
    open.push(What::Failed { status: "UNAVAILABLE".into() });
    assert_eq!(found(open.clone()), []);
    open.push(What::Finished { text: String::new() });
    assert_eq!(found(open), [Violation::OutsideOfStream { stream: 5 }]);
    let mut late: Vec<_> = example();
    late.splice(1..1, vec![What::Begun { prompt_tokens: 2, block_size: 4 }; 10]);
    assert_eq!(found(late), [Violation::Hung { stream: 5 }]);
    let mut early = example();
    early.remove(1);
    assert!(found(early).contains(&Violation::OutsideOfStream { stream: 5 }));
}

#[test]
fn other_tokens_and_fewer_are_found() {
    assert_eq!(with(3, |_, tokens, _| tokens[1] = 9), [Violation::Differs { stream: 5, token: 3 }]);
    let mut fewer = example();
    fewer.remove(4);
    assert_eq!(found(fewer), [Violation::Differs { stream: 5, token: 6 }]);
    let mut text = example();
    text[5] = What::Finished { text: String::new() };
    assert_eq!(found(text), [Violation::Differs { stream: 5, token: 7 }]);
}

#[test]
fn epochs_and_terms_that_fall_are_found() {
    let standing = |term, g| Standing { term, epochs: [("g".to_owned(), g), ("h".to_owned(), 1)].into() };
    let seen = |standings| check(&History { standings, ..History::default() }, &[], Duration::ZERO);
    assert_eq!(seen(vec![standing(1, 4), standing(1, 4), standing(2, 5)]), []);
    let found = seen(vec![standing(2, 5), standing(1, 5), standing(2, 4)]);
    let fell = Violation::EpochFell { group: "g".into(), from: 5, to: 4 };
    assert_eq!(found, [Violation::TermFell { from: 2, to: 1 }, fell]);
}
