//! Embedding gather.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{floats, tensor, with_floats};

/// (vocabulary, hidden) -> (rows, hidden).
pub struct Embed {
    /// Token id per row; all below the vocabulary's size.
    pub ids: Arc<[u32]>,
}

impl CustomOp1 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, hidden) = layout.shape().dims2()?;
        let table = floats(storage, layout)?;
        let mut out = Vec::with_capacity(self.ids.len() * hidden);
        for &id in self.ids.iter() {
            out.extend_from_slice(&table[id as usize * hidden..][..hidden]);
        }
        Ok((CpuStorage::F32(out), Shape::from((self.ids.len(), hidden))))
    }

    fn bwd(&self, table: &Tensor, _out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let (vocabulary, hidden) = table.dims2()?;
        let mut dtable = vec![0.0f32; vocabulary * hidden];
        with_floats(dout, |dout| {
            for (&id, row) in self.ids.iter().zip(dout.chunks_exact(hidden)) {
                for (sum, x) in dtable[id as usize * hidden..][..hidden].iter_mut().zip(row) {
                    *sum += x;
                }
            }
            Ok(())
        })?;
        Ok(Some(tensor(dtable, (vocabulary, hidden))?))
    }
}
