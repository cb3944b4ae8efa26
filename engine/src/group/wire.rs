//! What rank 0 tells the others, as little-endian words of 32 bits. Epoch and order are the collectives' business.

use std::time::Duration;
use thiserror::Error;
use unmask_kernels::{Draw, PAGE_SLOTS, Row};

/// Longest numerics id (bytes).
const NUMERICS_ID_MAX: usize = 256;

/// A message.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The group ends in order.
    Stop,
    /// The group begins.
    Start(Start),
    /// Compute a pass.
    Pass(OwnedPass),
}

/// What a rank needs to know before the first pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// Pages of the cache.
    pub pages: usize,
    /// Most rows of a pass.
    pub rows_max: usize,
    /// What rank 0 computes.
    pub numerics_id: String,
}

/// The contents of one pass.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// One id per row.
    pub ids: &'a [u32],
    /// Where the rows are and how far they attend.
    pub rows: &'a [Row],
    /// Pages of each sequence.
    pub tables: &'a [&'a [u32]],
    /// Rows whose logits are reduced, ascending.
    pub outputs: &'a [u32],
    /// One per output.
    pub draws: &'a [Draw],
    /// Indices of outputs whose logits are gathered, ascending.
    pub wanted: &'a [u32],
}

/// A pass as received.
#[derive(Debug, Clone, PartialEq, Default)]
#[allow(missing_docs)]
pub struct OwnedPass {
    pub limit: Duration,
    pub ids: Vec<u32>,
    pub rows: Vec<Row>,
    pub tables: Vec<Vec<u32>>,
    pub outputs: Vec<u32>,
    pub draws: Vec<Draw>,
    pub wanted: Vec<u32>,
}

/// Why a message cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// It ends early, or goes on after its end.
    #[error("it has another length than it says")]
    Length,
    /// It is of no known kind.
    #[error("it is of an unknown kind")]
    Kind,
    /// It names what does not exist, or more than may be.
    #[error("its {0} cannot be")]
    Content(&'static str),
    /// It comes at the wrong moment.
    #[error("it is out of order")]
    Order,
}

const STOP: u32 = 0;
const START: u32 = 1;
const PASS: u32 = 2;

/// Writes a message in place of what `out` held.
pub fn encode(message: &Message, out: &mut Vec<u8>) {
    out.clear();
    match message {
        Message::Stop => word(out, STOP),
        Message::Start(start) => {
            [START, start.pages as u32, start.rows_max as u32].into_iter().for_each(|value| word(out, value));
            list(out, start.numerics_id.bytes().map(u32::from));
        }
        Message::Pass(pass) => {
            let tables: Vec<&[u32]> = pass.tables.iter().map(Vec::as_slice).collect();
            encode_pass(&pass.borrow(&tables), pass.limit, out);
        }
    }
}

/// Writes a pass in place of what `out` held; it may take up to `limit`.
pub fn encode_pass(pass: &Pass<'_>, limit: Duration, out: &mut Vec<u8>) {
    out.clear();
    word(out, PASS);
    word(out, u32::try_from(limit.as_millis()).unwrap_or(u32::MAX));
    list(out, pass.ids.iter().copied());
    list(out, pass.rows.iter().flat_map(|row| [row.sequence, row.position, row.end]));
    word(out, pass.tables.len() as u32);
    pass.tables.iter().for_each(|table| list(out, table.iter().copied()));
    list(out, pass.outputs.iter().copied());
    list(out, pass.draws.iter().flat_map(|draw| [draw.temperature.to_bits(), draw.key[0], draw.key[1]]));
    list(out, pass.wanted.iter().copied());
}

fn word(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// A length and as many words.
fn list(out: &mut Vec<u8>, values: impl Iterator<Item = u32>) {
    let at = out.len();
    word(out, 0);
    values.for_each(|value| word(out, value));
    let count = ((out.len() - at) / 4 - 1) as u32;
    out[at..at + 4].copy_from_slice(&count.to_le_bytes());
}

/// Reads a message of at most `rows_max` rows.
///
/// # Errors
/// [`WireError`]; what it allocates never exceeds the message's own size by more than a constant factor.
pub fn decode(bytes: &[u8], rows_max: usize) -> Result<Message, WireError> {
    let mut words = Words(bytes);
    let message = match words.word()? {
        STOP => Message::Stop,
        START => {
            let (pages, rows_max) = (words.word()? as usize, words.word()? as usize);
            let id: Result<Vec<u8>, _> = words.list()?.into_iter().map(u8::try_from).collect();
            let id = id.ok().filter(|id| id.len() <= NUMERICS_ID_MAX).and_then(|id| String::from_utf8(id).ok());
            Message::Start(Start { pages, rows_max, numerics_id: id.ok_or(WireError::Content("numerics id"))? })
        }
        PASS => Message::Pass(words.pass(rows_max)?),
        _ => return Err(WireError::Kind),
    };
    if words.0.is_empty() { Ok(message) } else { Err(WireError::Length) }
}

struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn word(&mut self) -> Result<u32, WireError> {
        let (word, rest) = self.0.split_first_chunk::<4>().ok_or(WireError::Length)?;
        self.0 = rest;
        Ok(u32::from_le_bytes(*word))
    }

    fn list(&mut self) -> Result<Vec<u32>, WireError> {
        let count = self.word()? as usize;
        if count > self.0.len() / 4 {
            return Err(WireError::Length);
        }
        (0..count).map(|_| self.word()).collect()
    }

    fn pass(&mut self, rows_max: usize) -> Result<OwnedPass, WireError> {
        let limit = Duration::from_millis(u64::from(self.word()?));
        let ids = self.list()?;
        let rows = self.list()?;
        let tables = self.word()? as usize;
        if ids.len() > rows_max || rows.len() != 3 * ids.len() || tables > ids.len() {
            return Err(WireError::Content("rows"));
        }
        let tables = (0..tables).map(|_| self.list()).collect::<Result<_, _>>()?;
        let (outputs, draws, wanted) = (self.list()?, self.list()?, self.list()?);
        if draws.len() != 3 * outputs.len() {
            return Err(WireError::Content("draws"));
        }
        let row = |w: &[u32]| Row { sequence: w[0], position: w[1], end: w[2] };
        let draw = |w: &[u32]| Draw { temperature: f32::from_bits(w[0]), key: [w[1], w[2]] };
        let rows = rows.chunks_exact(3).map(row).collect();
        let draws = draws.chunks_exact(3).map(draw).collect();
        Ok(OwnedPass { limit, ids, rows, tables, outputs, draws, wanted })
    }
}

impl OwnedPass {
    /// Checks everything that the kernels would panic over.
    ///
    /// # Errors
    /// [`WireError::Content`] names the part.
    pub fn check(&self, pages: usize, vocab: u32) -> Result<(), WireError> {
        let require = |ok: bool, what| if ok { Ok(()) } else { Err(WireError::Content(what)) };
        require(self.ids.iter().all(|&id| id < vocab), "ids")?;
        require(self.tables.iter().flatten().all(|&page| (page as usize) < pages), "pages")?;
        let within = |row: &Row| {
            let table = self.tables.get(row.sequence as usize);
            let slots = table.map_or(0, |table| table.len() * PAGE_SLOTS) as u64;
            u64::from(row.position) < slots && row.end > 0 && u64::from(row.end) <= slots
        };
        require(self.rows.iter().all(within), "rows")?;
        let ascending = |values: &[u32], limit: usize| {
            values.is_sorted_by(|a, b| a < b) && values.last().is_none_or(|&last| (last as usize) < limit)
        };
        require(ascending(&self.outputs, self.ids.len()), "outputs")?;
        require(ascending(&self.wanted, self.outputs.len()), "wanted")
    }

    /// The same as slices; `tables` are its own.
    pub fn borrow<'a>(&'a self, tables: &'a [&'a [u32]]) -> Pass<'a> {
        let Self { ids, rows, outputs, draws, wanted, .. } = self;
        Pass { ids, rows, tables, outputs, draws, wanted }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn passes() -> impl Strategy<Value = OwnedPass> {
        let words = || prop::collection::vec(any::<u32>(), 0..20);
        (1usize..20, prop::collection::vec(words(), 0..3), words(), any::<u32>()).prop_map(
            |(rows, mut tables, wanted, x)| {
                tables.truncate(rows);
                OwnedPass {
                    limit: Duration::from_millis(u64::from(x)),
                    ids: (0..rows as u32).map(|i| i ^ x).collect(),
                    rows: (0..rows as u32).map(|i| Row { sequence: i, position: i ^ x, end: x }).collect(),
                    tables,
                    outputs: (0..rows as u32 / 2).collect(),
                    draws: (0..rows as u32 / 2).map(|i| Draw { temperature: 0.5, key: [i, x] }).collect(),
                    wanted,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(pass in passes()) {
            let mut bytes = Vec::new();
            encode(&Message::Pass(pass.clone()), &mut bytes);
            prop_assert_eq!(decode(&bytes, 64), Ok(Message::Pass(pass)));
            for end in 0..bytes.len() {
                prop_assert!(decode(&bytes[..end], 64).is_err());
            }
            bytes.push(0);
            prop_assert!(decode(&bytes, 64).is_err());
        }

        #[test]
        fn noise_is_refused_or_checked(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Message::Pass(pass)) = decode(&bytes, 8) {
                let _ = pass.check(4, 100);
            }
        }
    }

    #[test]
    fn other_messages_are_read_too() {
        let start = Start { pages: 9, rows_max: 64, numerics_id: "abc".into() };
        for message in [Message::Stop, Message::Start(start)] {
            let mut bytes = Vec::new();
            encode(&message, &mut bytes);
            assert_eq!(decode(&bytes, 0), Ok(message));
        }
        assert_eq!(decode(&[9, 0, 0, 0], 0), Err(WireError::Kind));
    }

    #[test]
    fn a_pass_that_names_what_is_not_there_is_refused() {
        let fine = OwnedPass {
            limit: Duration::ZERO,
            ids: vec![1],
            rows: vec![Row { sequence: 0, position: 3, end: 4 }],
            tables: vec![vec![2]],
            outputs: vec![0],
            draws: vec![Draw::default()],
            wanted: vec![0],
        };
        assert_eq!(fine.check(3, 2), Ok(()));
        let change = |change: &dyn Fn(&mut OwnedPass)| {
            let mut pass = fine.clone();
            change(&mut pass);
            pass.check(3, 2).unwrap_err()
        };
        assert_eq!(change(&|pass| pass.ids[0] = 2), WireError::Content("ids"));
        assert_eq!(change(&|pass| pass.tables[0][0] = 3), WireError::Content("pages"));
        assert_eq!(change(&|pass| pass.rows[0].end = 33), WireError::Content("rows"));
        assert_eq!(change(&|pass| pass.rows[0].sequence = 1), WireError::Content("rows"));
        assert_eq!(change(&|pass| pass.outputs[0] = 1), WireError::Content("outputs"));
        assert_eq!(change(&|pass| pass.wanted[0] = 1), WireError::Content("wanted"));
    }
}
