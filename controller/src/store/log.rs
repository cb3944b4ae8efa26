//! Records of the embedded store's log, in bytes.
//!
//! A log is [`MAGIC`], then records: length of the body (u32), CRC-32 of length and body (u32), body. A body is
//! revision (u64), kind (u8), length of the key (u32), key, value. All numbers are little-endian. The value of a put begins
//! with the revision that created the key and with its lease (0: none); puts of kind 0, from before there were leases,
//! have neither.

use super::{KEY_BYTES_MAX, VALUE_BYTES_MAX};

/// First bytes of a log: format and version.
pub(super) const MAGIC: &[u8; 8] = b"UNMASK\x00\x01";

const HEADER_BYTES: usize = 8;
const FIXED_BODY_BYTES: usize = 8 + 1 + 4;
/// Created and lease, before a value.
const PREFIX_BYTES: usize = 16;
const BODY_BYTES_MAX: usize = FIXED_BODY_BYTES + KEY_BYTES_MAX + PREFIX_BYTES + VALUE_BYTES_MAX;

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// Its number.
    pub revision: u64,
    /// What it does.
    pub change: Change,
}

/// What a record does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// Writes a value, as of before there were leases.
    OldPut(String, Vec<u8>),
    /// Writes a value.
    Put {
        key: String,
        value: Vec<u8>,
        /// Revision since which the key exists.
        created: u64,
        /// 0: none.
        lease: u64,
    },
    /// Deletes a key.
    Delete(String),
    /// Nothing: keeps the highest revision through a compaction.
    Mark,
    /// Begins a lease.
    Grant { lease: u64, ttl_ms: u64 },
    /// Ends a lease, after its keys were deleted.
    Revoke(u64),
}

impl Record {
    /// Appends the record's bytes.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let pair = |a: u64, b: u64| [a.to_le_bytes(), b.to_le_bytes()].concat();
        let (kind, key, prefix, value): (u8, &str, Vec<u8>, &[u8]) = match &self.change {
            Change::OldPut(key, value) => (0, key, Vec::new(), value),
            Change::Delete(key) => (1, key, Vec::new(), &[]),
            Change::Mark => (2, "", Vec::new(), &[]),
            Change::Put { key, value, created, lease } => (3, key, pair(*created, *lease), value),
            Change::Grant { lease, ttl_ms } => (4, "", pair(*lease, *ttl_ms), &[]),
            Change::Revoke(lease) => (5, "", lease.to_le_bytes().to_vec(), &[]),
        };
        let mut body = Vec::with_capacity(FIXED_BODY_BYTES + key.len() + prefix.len() + value.len());
        body.extend_from_slice(&self.revision.to_le_bytes());
        body.push(kind);
        body.extend_from_slice(&(key.len() as u32).to_le_bytes());
        body.extend_from_slice(key.as_bytes());
        body.extend_from_slice(&prefix);
        body.extend_from_slice(value);
        let length = (body.len() as u32).to_le_bytes();
        out.extend_from_slice(&length);
        out.extend_from_slice(&checksum(length, &body).to_le_bytes());
        out.extend_from_slice(&body);
    }

    /// The record at the start of `bytes` and its size; `None` when there is no whole, undamaged one.
    pub(super) fn decode(bytes: &[u8]) -> Option<(Record, usize)> {
        let length: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
        let size = u32::from_le_bytes(length) as usize;
        if !(FIXED_BODY_BYTES..=BODY_BYTES_MAX).contains(&size) {
            return None;
        }
        let stored = u32::from_le_bytes(bytes.get(4..HEADER_BYTES)?.try_into().ok()?);
        let body = bytes.get(HEADER_BYTES..HEADER_BYTES + size)?;
        if checksum(length, body) != stored {
            return None;
        }
        let revision = u64::from_le_bytes(body.get(..8)?.try_into().ok()?);
        let key_bytes = u32::from_le_bytes(body.get(9..13)?.try_into().ok()?) as usize;
        let rest = &body[FIXED_BODY_BYTES..];
        let key = String::from_utf8(rest.get(..key_bytes)?.to_vec()).ok()?;
        let value = &rest[key_bytes..];
        let number = |at: usize| Some(u64::from_le_bytes(value.get(at..at + 8)?.try_into().ok()?));
        let change = match body[8] {
            0 => Change::OldPut(key, value.to_vec()),
            1 => Change::Delete(key),
            2 => Change::Mark,
            3 => {
                Change::Put { key, value: value.get(PREFIX_BYTES..)?.to_vec(), created: number(0)?, lease: number(8)? }
            }
            4 => Change::Grant { lease: number(0)?, ttl_ms: number(8)? },
            5 => Change::Revoke(number(0)?),
            _ => return None,
        };
        Some((Record { revision, change }, HEADER_BYTES + size))
    }
}

fn checksum(length: [u8; 4], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length);
    hasher.update(body);
    hasher.finalize()
}

/// Whether a whole record of a later revision begins anywhere in `bytes` (after the first): then what comes before
/// it was once whole too, and is damaged, not torn.
pub(super) fn has_later_record(bytes: &[u8], revision: u64) -> bool {
    (1..bytes.len()).any(|at| Record::decode(&bytes[at..]).is_some_and(|(record, _)| record.revision > revision))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use proptest::prelude::*;

    fn record() -> impl Strategy<Value = Record> {
        let change = prop_oneof![
            (".{0,20}", prop::collection::vec(any::<u8>(), 0..64)).prop_map(|(key, value)| Change::OldPut(key, value)),
            (".{0,20}", prop::collection::vec(any::<u8>(), 0..64), any::<u64>(), any::<u64>())
                .prop_map(|(key, value, created, lease)| Change::Put { key, value, created, lease }),
            (any::<u64>(), any::<u64>()).prop_map(|(lease, ttl_ms)| Change::Grant { lease, ttl_ms }),
            any::<u64>().prop_map(Change::Revoke),
            ".{0,20}".prop_map(Change::Delete),
            Just(Change::Mark),
        ];
        (any::<u64>(), change).prop_map(|(revision, change)| Record { revision, change })
    }

    proptest! {
        #[test]
        fn records_come_back_and_no_bit_flip_passes(record in record(), bit in any::<prop::sample::Index>()) {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            prop_assert_eq!(Record::decode(&bytes), Some((record.clone(), bytes.len())));
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Record::decode(&bytes), None);
        }

        #[test]
        fn any_bytes_are_decoded_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Record::decode(&bytes);
            let _ = has_later_record(&bytes, 0);
        }
    }
}
