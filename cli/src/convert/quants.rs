//! How tensors are stored, and their values as f32. The block formats are candle's.

use anyhow::{Context, ensure};
use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::{bf16, f16};
use std::borrow::Cow;

/// Types that are read, with their codes in files.
const KINDS: [(u32, GgmlDType, &str); 13] = [
    (0, GgmlDType::F32, "F32"),
    (1, GgmlDType::F16, "F16"),
    (30, GgmlDType::BF16, "BF16"),
    (2, GgmlDType::Q4_0, "Q4_0"),
    (3, GgmlDType::Q4_1, "Q4_1"),
    (6, GgmlDType::Q5_0, "Q5_0"),
    (7, GgmlDType::Q5_1, "Q5_1"),
    (8, GgmlDType::Q8_0, "Q8_0"),
    (10, GgmlDType::Q2K, "Q2_K"),
    (11, GgmlDType::Q3K, "Q3_K"),
    (12, GgmlDType::Q4K, "Q4_K"),
    (13, GgmlDType::Q5K, "Q5_K"),
    (14, GgmlDType::Q6K, "Q6_K"),
];

/// The type of a code.
///
/// # Errors
/// It is none of those that are read.
pub fn kind(code: u32) -> anyhow::Result<GgmlDType> {
    let known = KINDS.iter().find(|(known, ..)| *known == code);
    known.map(|(_, kind, _)| *kind).with_context(|| {
        let names: Vec<&str> = KINDS.iter().map(|(.., name)| *name).collect();
        format!("type {code} is not read; {} are", names.join(", "))
    })
}

/// The code of a type.
pub fn code(kind: GgmlDType) -> u32 {
    KINDS.iter().find(|(_, known, _)| *known == kind).map_or(u32::MAX, |(code, ..)| *code)
}

/// The name of a type.
pub fn name(kind: GgmlDType) -> &'static str {
    KINDS.iter().find(|(_, known, _)| *known == kind).map_or("unknown", |(.., name)| name)
}

/// Bytes of a tensor. Blocks never cross rows.
///
/// # Errors
/// Rows that are no whole number of blocks, empty dimensions, more than can be counted.
pub fn bytes(kind: GgmlDType, shape: &[usize]) -> anyhow::Result<usize> {
    let (block, row) = (kind.block_size(), shape.last().copied().unwrap_or(0));
    ensure!(row.is_multiple_of(block), "rows of {row} values are no whole number of {} blocks", name(kind));
    let values = shape.iter().try_fold(1usize, |all, &size| all.checked_mul(size)).filter(|all| *all > 0);
    let values = values.with_context(|| format!("shape {shape:?} is empty or too large"))?;
    (values / block).checked_mul(kind.type_size()).with_context(|| format!("shape {shape:?} is too large"))
}

/// Appends `count` values of a tensor from `first` on.
///
/// # Errors
/// The range is not whole blocks of the tensor.
pub fn decode(kind: GgmlDType, bytes: &[u8], first: usize, count: usize, out: &mut Vec<f32>) -> anyhow::Result<()> {
    let (block, width) = (kind.block_size(), kind.type_size());
    let whole = first.is_multiple_of(block) && count.is_multiple_of(block);
    ensure!(whole, "{count} values from {first} on are no whole {} blocks", name(kind));
    let range = bytes.get(first / block * width..(first + count) / block * width);
    let range = range.context("the tensor is shorter than its shape says")?;
    match kind {
        GgmlDType::F32 => out.extend(range.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        GgmlDType::F16 => out.extend(range.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())),
        GgmlDType::BF16 => out.extend(range.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
        _ => {
            let stored = QStorage::from_data(Cow::Borrowed(range), &Device::Cpu, kind)?;
            out.extend(QTensor::new(stored, count)?.dequantize(&Device::Cpu)?.to_vec1::<f32>()?);
        }
    }
    Ok(())
}
