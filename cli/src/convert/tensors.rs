//! Tensors on their way from one file to another: one at a time, row by row.

use super::names::Order;
use super::quants;
use anyhow::Context;
use candle_core::quantized::GgmlDType;
use half::{bf16, f16};
use indicatif::ProgressBar;
use safetensors::tensor::{Dtype, TensorView, View};
use std::borrow::Cow;
use std::cell::OnceCell;
use std::path::Path;

/// Types that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// 4 bytes a value.
    F32,
    /// 2 bytes a value, finer.
    F16,
    /// 2 bytes a value, wider.
    Bf16,
}

impl Target {
    /// What keeps a stored tensor: its own type, and bf16 for blocks of 8 bits a value and less (a step of bf16 is far
    /// finer than theirs).
    pub fn of(kind: GgmlDType) -> Target {
        match kind {
            GgmlDType::F32 => Target::F32,
            GgmlDType::F16 => Target::F16,
            _ => Target::Bf16,
        }
    }

    /// As configurations name it.
    pub fn name(self) -> &'static str {
        match self {
            Target::F32 => "float32",
            Target::F16 => "float16",
            Target::Bf16 => "bfloat16",
        }
    }

    /// As safetensors names it.
    pub fn dtype(self) -> Dtype {
        match self {
            Target::F32 => Dtype::F32,
            Target::F16 => Dtype::F16,
            Target::Bf16 => Dtype::BF16,
        }
    }

    /// As ggml names it.
    pub fn kind(self) -> GgmlDType {
        match self {
            Target::F32 => GgmlDType::F32,
            Target::F16 => GgmlDType::F16,
            Target::Bf16 => GgmlDType::BF16,
        }
    }

    /// Bytes of a value.
    pub fn width(self) -> usize {
        if self == Target::F32 { 4 } else { 2 }
    }

    pub(super) fn push(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            Target::F32 => out.extend(values.iter().flat_map(|x| x.to_le_bytes())),
            Target::F16 => out.extend(values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes())),
            Target::Bf16 => out.extend(values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
        }
    }
}

/// A tensor to write.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// In the file that is written.
    pub name: String,
    /// Rows first.
    pub shape: Vec<usize>,
    /// How the source stores it.
    pub kind: GgmlDType,
    /// The source.
    pub bytes: &'a [u8],
    /// Which row of the source is a row of what is written.
    pub order: Order,
    /// How it is written.
    pub target: Target,
}

impl<'a> Tensor<'a> {
    /// A tensor of a checkpoint.
    ///
    /// # Errors
    /// Its type is none that checkpoints have.
    pub fn of_view(name: String, view: &TensorView<'a>) -> anyhow::Result<Tensor<'a>> {
        let target = [Target::F32, Target::F16, Target::Bf16].into_iter().find(|t| t.dtype() == view.dtype());
        let target =
            target.with_context(|| format!("{name} has type {:?}; f32, f16 and bf16 are read", view.dtype()))?;
        let shape = view.shape().to_vec();
        Ok(Tensor { name, shape, kind: target.kind(), bytes: view.data(), order: Order::Same, target })
    }

    /// How many values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes that are written.
    pub fn size(&self) -> usize {
        self.values() * self.target.width()
    }

    /// What is written.
    ///
    /// # Errors
    /// The source is shorter than its shape says, or holds a number that is none.
    pub fn encode(&self) -> anyhow::Result<Vec<u8>> {
        let vector = self.shape.len() == 1 && self.order != Order::Same;
        let width = if vector { 1 } else { self.shape.last().copied().unwrap_or(1).max(1) };
        let mut out = Vec::with_capacity(self.size());
        let mut row = Vec::with_capacity(width);
        for index in 0..self.values() / width {
            row.clear();
            quants::decode(self.kind, self.bytes, self.order.source(index) * width, width, &mut row)
                .with_context(|| format!("tensor {}", self.name))?;
            anyhow::ensure!(row.iter().all(|x| x.is_finite()), "tensor {} holds an infinite value or none", self.name);
            self.target.push(&row, &mut out);
        }
        Ok(out)
    }
}

/// Writes a safetensors file, one tensor in memory at a time.
///
/// # Errors
/// A tensor cannot be read, or the file cannot be written.
pub fn write_safetensors(tensors: &[Tensor<'_>], path: &Path, bar: &ProgressBar) -> anyhow::Result<()> {
    let failed = OnceCell::new();
    let views = tensors.iter().map(|tensor| (tensor.name.as_str(), Lazy { tensor, failed: &failed, bar }));
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let written = safetensors::serialize_to_file(views, Some(metadata), path);
    match failed.into_inner() {
        Some(error) => Err(error),
        None => written.with_context(|| format!("cannot write {}", path.display())),
    }
}

/// A tensor that is made when its turn comes.
struct Lazy<'a> {
    tensor: &'a Tensor<'a>,
    /// The first failure: the trait leaves no other way to tell.
    failed: &'a OnceCell<anyhow::Error>,
    bar: &'a ProgressBar,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        self.tensor.target.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bar.inc(self.tensor.size() as u64);
        if self.failed.get().is_some() {
            return Cow::Borrowed(&[]);
        }
        Cow::Owned(self.tensor.encode().unwrap_or_else(|error| {
            let _ = self.failed.set(error);
            Vec::new()
        }))
    }

    fn data_len(&self) -> usize {
        self.tensor.size()
    }
}
