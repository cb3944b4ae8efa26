//! Operations of the model with hand-written gradients. The slices' arithmetic is in `math`, `rotary` and `attention`,
//! matrix products come from the kernels; `embed`, `attend`, `feed_forward` and `head` wrap it as candle operations, one
//! per sublayer, so that candle's graph stays small and its element-wise kernels stay out of the hot path.
//!
//! Every operation is single-threaded and deterministic: the trainer runs one micro-batch per thread.

pub mod attend;
pub mod attention;
pub mod embed;
pub mod feed_forward;
pub mod head;
pub mod math;
pub mod rotary;

use std::sync::LazyLock;

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, Tensor};
use unmask_kernels::{Cpu, Isa, MatRef};

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Dimensions per head, even.
    pub head_dim: usize,
}

impl Heads {
    /// Floats per row of queries, keys and values together.
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// One thread: products run inside micro-batches, which are what is spread over threads.
static CPU: LazyLock<Cpu> = LazyLock::new(|| Cpu::new(Isa::detect().unwrap_or(Isa::Portable), 1));

/// `C = A B`, or `C += A B`.
pub(crate) fn product(a: MatRef<'_>, b: MatRef<'_>, c: &mut [f32], accumulate: bool) {
    CPU.matmul(a, b, c, accumulate);
}

/// A row-major matrix of `width` columns.
pub(crate) fn matrix(data: &[f32], width: usize) -> MatRef<'_> {
    MatRef::new(data, data.len() / width, width)
}

/// The contiguous elements of an operation's argument.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("argument is not contiguous");
    };
    match storage {
        CpuStorage::F32(data) => Ok(&data[start..end]),
        _ => candle_core::bail!("argument is not f32"),
    }
}

/// Calls `read` with the elements of a contiguous f32 tensor on the CPU.
pub fn with_floats<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => read(floats(storage, layout)?),
        _ => candle_core::bail!("tensor is not on the CPU"),
    }
}

/// A tensor on the CPU.
fn tensor(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

/// What the forward pass leaves for the backward pass.
type Saved<T> = std::sync::Mutex<Option<T>>;

fn take<T>(saved: &Saved<T>, name: &str) -> Result<T> {
    let taken = saved.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    taken.ok_or_else(|| candle_core::Error::Msg(format!("{name}: nothing saved for the backward pass")))
}

fn put<T>(saved: &Saved<T>, value: T) {
    *saved.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(value);
}
