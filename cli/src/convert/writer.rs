//! Writes GGUF files, one tensor in memory at a time.

use super::gguf::{ALIGNMENT, MAGIC, VERSION, code};
use super::quants;
use super::tensors::Tensor;
use indicatif::ProgressBar;
use std::io::{self, Write};

/// A value of a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Item {
    /// Whole.
    U32(u32),
    /// Not whole.
    F32(f32),
    /// true or false.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of whole numbers.
    Whole(Vec<i32>),
}

impl Item {
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        match self {
            Item::U32(value) => tagged(out, code::U32, &value.to_le_bytes()),
            Item::F32(value) => tagged(out, code::F32, &value.to_le_bytes()),
            Item::Bool(value) => tagged(out, code::BOOL, &[u8::from(*value)]),
            Item::Text(value) => {
                tagged(out, code::TEXT, &[])?;
                text(out, value)
            }
            Item::Texts(values) => {
                list(out, code::TEXT, values.len())?;
                values.iter().try_for_each(|value| text(out, value))
            }
            Item::Whole(values) => {
                list(out, code::I32, values.len())?;
                values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
            }
        }
    }
}

fn tagged(out: &mut impl Write, code: u32, bytes: &[u8]) -> io::Result<()> {
    out.write_all(&code.to_le_bytes())?;
    out.write_all(bytes)
}

fn list(out: &mut impl Write, code: u32, len: usize) -> io::Result<()> {
    tagged(out, code::LIST, &code.to_le_bytes())?;
    out.write_all(&(len as u64).to_le_bytes())
}

fn text(out: &mut impl Write, value: &str) -> io::Result<()> {
    out.write_all(&(value.len() as u64).to_le_bytes())?;
    out.write_all(value.as_bytes())
}

/// Writes keys and tensors, in their order.
///
/// # Errors
/// A tensor cannot be read, or `out` fails.
pub fn write(
    items: &[(String, Item)],
    tensors: &[Tensor<'_>],
    out: &mut impl Write,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let mut header = Vec::new();
    header.write_all(MAGIC)?;
    header.write_all(&VERSION.to_le_bytes())?;
    for count in [tensors.len(), items.len()] {
        header.write_all(&(count as u64).to_le_bytes())?;
    }
    for (key, item) in items {
        text(&mut header, key)?;
        item.write(&mut header)?;
    }
    let mut offset = 0;
    for tensor in tensors {
        text(&mut header, &tensor.name)?;
        header.write_all(&(tensor.shape.len() as u32).to_le_bytes())?;
        for size in tensor.shape.iter().rev() {
            header.write_all(&(*size as u64).to_le_bytes())?;
        }
        header.write_all(&quants::code(tensor.target.kind()).to_le_bytes())?;
        header.write_all(&(offset as u64).to_le_bytes())?;
        offset += tensor.size().next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    out.write_all(&header)?;
    for tensor in tensors {
        let mut data = tensor.encode()?;
        bar.inc(data.len() as u64);
        data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        out.write_all(&data)?;
    }
    Ok(())
}
