//! Operations of the model with hand-written gradients. The slices' arithmetic is in `gemm`, `math`, `rotary` and
//! `attention`; `embed`, `attend`, `feed_forward` and `head` wrap it as candle operations, one per sublayer, so that
//! candle's graph stays small and its element-wise kernels stay out of the hot path.
//!
//! Every operation is single-threaded and deterministic: the trainer runs one micro-batch per thread.

pub mod attend;
pub mod attention;
pub mod embed;
pub mod feed_forward;
pub mod gemm;
pub mod head;
pub mod math;
pub mod rotary;

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, Tensor};

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
