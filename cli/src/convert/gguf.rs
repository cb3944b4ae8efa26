//! GGUF headers, read without trusting them (format: docs/gguf.md of ggml). Every count and length is checked against
//! the bytes that are there before anything is made of it; texts and lists stay in the mapped file.

use super::quants;
use anyhow::{Context, bail, ensure};
use candle_core::quantized::GgmlDType;
use std::collections::BTreeMap;

/// Most keys of a file.
const KEYS_MAX: u64 = 1 << 16;
/// Most tensors of a file.
const TENSORS_MAX: u64 = 1 << 16;
/// Longest name of a key or a tensor (bytes).
const NAME_BYTES_MAX: usize = 1024;
/// Most dimensions of a tensor, as in ggml.
const DIMENSIONS_MAX: u32 = 4;
/// Distance of tensors (bytes) where the file names none.
pub const ALIGNMENT: usize = 32;
/// Distances that a file may name (bytes): blocks of every type lie at even addresses then.
const ALIGNMENTS: std::ops::RangeInclusive<u64> = 8..=1 << 16;

/// What every file begins with.
pub const MAGIC: &[u8; 4] = b"GGUF";
/// Version that is written; 2 differs in nothing that is read here.
pub const VERSION: u32 = 3;

/// Codes of value types.
pub(super) mod code {
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const TEXT: u32 = 8;
    pub const LIST: u32 = 9;
}

/// A value of a key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Whole, unsigned, of any width.
    Unsigned(u64),
    /// Whole, signed, of any width.
    Signed(i64),
    /// Of either width.
    Float(f64),
    /// true or false.
    Bool(bool),
    /// UTF-8.
    Text(&'a str),
    /// Values of one type.
    List(List<'a>),
}

/// A list, still as bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct List<'a> {
    kind: u32,
    len: u64,
    bytes: &'a [u8],
}

impl<'a> List<'a> {
    /// Its texts, where it holds texts.
    pub fn texts(self) -> Option<impl Iterator<Item = &'a str>> {
        let mut cursor = Cursor { file: self.bytes, at: 0 };
        // The lengths were walked when the header was read.
        (self.kind == code::TEXT).then(move || (0..self.len).map_while(move |_| cursor.text().ok()))
    }

    /// Its whole numbers, where it holds such.
    pub fn whole(self) -> Option<impl Iterator<Item = i64>> {
        let mut cursor = Cursor { file: self.bytes, at: 0 };
        let whole = matches!(self.kind, 0..=5 | 10 | 11);
        whole.then(move || {
            (0..self.len).map_while(move |_| match cursor.value(self.kind).ok()? {
                Value::Unsigned(value) => Some(i64::try_from(value).unwrap_or(i64::MAX)),
                Value::Signed(value) => Some(value),
                _ => None,
            })
        })
    }
}

/// A tensor as it lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored<'a> {
    /// How its values are stored.
    pub kind: GgmlDType,
    /// Rows first.
    pub shape: Vec<usize>,
    /// As many as type and shape say.
    pub bytes: &'a [u8],
}

/// A file's keys and tensors.
#[derive(Debug)]
pub struct Gguf<'a> {
    values: BTreeMap<&'a str, Value<'a>>,
    tensors: BTreeMap<&'a str, Stored<'a>>,
}

impl<'a> Gguf<'a> {
    /// Reads the header of a whole file.
    ///
    /// # Errors
    /// It is no GGUF file of version 2 or 3, says more than it holds, or holds what no reader takes.
    pub fn parse(file: &'a [u8]) -> anyhow::Result<Gguf<'a>> {
        let mut cursor = Cursor { file, at: 0 };
        ensure!(cursor.take(4)? == MAGIC, "not a GGUF file: it does not begin with the letters GGUF");
        let version = cursor.u32()?;
        ensure!((2..=VERSION).contains(&version), "GGUF version {version} is not read; 2 and 3 are, little-endian");
        let tensors = cursor.u64()?;
        let keys = cursor.u64()?;
        ensure!(tensors <= TENSORS_MAX, "it says it has {tensors} tensors; at most {TENSORS_MAX} are read");
        ensure!(keys <= KEYS_MAX, "it says it has {keys} keys; at most {KEYS_MAX} are read");
        let mut values = BTreeMap::new();
        for _ in 0..keys {
            let key = cursor.name()?;
            let kind = cursor.u32()?;
            let value = cursor.value(kind).with_context(|| format!("key {key}"))?;
            ensure!(values.insert(key, value).is_none(), "key {key} is there twice");
        }
        let infos = (0..tensors).map(|_| cursor.info()).collect::<anyhow::Result<Vec<Info<'a>>>>()?;
        let tensors = place(file, cursor.at, alignment(&values)?, infos)?;
        Ok(Gguf { values, tensors })
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<Value<'a>> {
        self.values.get(key).copied()
    }

    /// The text of a key.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        match self.value(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// The whole number of a key.
    pub fn whole(&self, key: &str) -> Option<u64> {
        match self.value(key)? {
            Value::Unsigned(value) => Some(value),
            Value::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    /// Every tensor, by name.
    pub fn tensors(&self) -> &BTreeMap<&'a str, Stored<'a>> {
        &self.tensors
    }
}

/// What the header says of a tensor.
struct Info<'a> {
    name: &'a str,
    kind: GgmlDType,
    shape: Vec<usize>,
    offset: u64,
}

fn alignment(values: &BTreeMap<&str, Value<'_>>) -> anyhow::Result<usize> {
    match values.get("general.alignment") {
        None => Ok(ALIGNMENT),
        Some(Value::Unsigned(value)) if value.is_power_of_two() && ALIGNMENTS.contains(value) => Ok(*value as usize),
        Some(value) => {
            bail!(
                "general.alignment must be a power of two from {} to {}, is {value:?}",
                ALIGNMENTS.start(),
                ALIGNMENTS.end()
            )
        }
    }
}

/// Finds the bytes of every tensor. They lie in the order of the header without gaps, as ggml demands too: nothing is
/// read twice, so what comes out is bounded by the file's size.
fn place<'a>(
    file: &'a [u8],
    header: usize,
    alignment: usize,
    infos: Vec<Info<'a>>,
) -> anyhow::Result<BTreeMap<&'a str, Stored<'a>>> {
    let mut tensors = BTreeMap::new();
    let data = file.get(header.next_multiple_of(alignment)..).unwrap_or_default();
    let mut next = 0usize;
    for Info { name, kind, shape, offset } in infos {
        ensure!(offset == next as u64, "tensor {name} begins at {offset} of the data, after the last one is {next}");
        let len = quants::bytes(kind, &shape).with_context(|| format!("tensor {name}"))?;
        let end = next.checked_add(len).filter(|end| *end <= data.len());
        let end = end.with_context(|| format!("tensor {name} needs {len} bytes, more than the file has left"))?;
        let stored = Stored { kind, shape, bytes: &data[next..end] };
        ensure!(tensors.insert(name, stored).is_none(), "tensor {name} is there twice");
        next = end.next_multiple_of(alignment);
    }
    Ok(tensors)
}

/// A position in the file.
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> anyhow::Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.file.len());
        let end = end.with_context(|| format!("the file ends inside its header, at byte {}", self.file.len()))?;
        let bytes = &self.file[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn bytes<const N: usize>(&mut self) -> anyhow::Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> anyhow::Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> anyhow::Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn text(&mut self) -> anyhow::Result<&'a str> {
        let len = usize::try_from(self.u64()?)?;
        std::str::from_utf8(self.take(len)?).context("a text is not UTF-8")
    }

    fn name(&mut self) -> anyhow::Result<&'a str> {
        let name = self.text()?;
        ensure!(name.len() <= NAME_BYTES_MAX, "a name has {} bytes; at most {NAME_BYTES_MAX} are read", name.len());
        // Names stand in messages.
        ensure!(!name.contains(char::is_control), "name {name:?} has control characters");
        Ok(name)
    }

    fn value(&mut self, kind: u32) -> anyhow::Result<Value<'a>> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.bytes()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.bytes()?).into()),
            code::U32 => Value::Unsigned(self.u32()?.into()),
            code::I32 => Value::Signed(i32::from_le_bytes(self.bytes()?).into()),
            code::F32 => Value::Float(f32::from_le_bytes(self.bytes()?).into()),
            code::BOOL => Value::Bool(self.bytes::<1>()? != [0]),
            code::TEXT => Value::Text(self.text()?),
            code::LIST => Value::List(self.list()?),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            _ => bail!("value type {kind} is unknown"),
        })
    }

    fn list(&mut self) -> anyhow::Result<List<'a>> {
        let kind = self.u32()?;
        let len = self.u64()?;
        let start = self.at;
        match width(kind) {
            Some(width) => {
                let bytes = len.checked_mul(width).and_then(|bytes| usize::try_from(bytes).ok());
                self.take(bytes.context("a list is longer than the file")?)?;
            }
            None if kind == code::TEXT => {
                for _ in 0..len {
                    self.text()?;
                }
            }
            None => bail!("lists of type {kind} are not read"),
        }
        Ok(List { kind, len, bytes: &self.file[start..self.at] })
    }

    fn info(&mut self) -> anyhow::Result<Info<'a>> {
        let name = self.name()?;
        let dimensions = self.u32()?;
        let few = (1..=DIMENSIONS_MAX).contains(&dimensions);
        ensure!(few, "tensor {name} has {dimensions} dimensions; 1 to {DIMENSIONS_MAX} are read");
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(usize::try_from(self.u64()?)?);
        }
        // The file has the length of a row first.
        shape.reverse();
        let kind = quants::kind(self.u32()?).with_context(|| format!("tensor {name}"))?;
        Ok(Info { name, kind, shape, offset: self.u64()? })
    }
}

/// Bytes of a value, where all of its type have as many.
fn width(kind: u32) -> Option<u64> {
    Some(match kind {
        0 | 1 | code::BOOL => 1,
        2 | 3 => 2,
        code::U32 | code::I32 | code::F32 => 4,
        10..=12 => 8,
        _ => return None,
    })
}
