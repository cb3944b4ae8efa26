//! What happens to a tile between its sums and the output.

use super::Epilogue;
use super::tile::Tile;
use crate::exp::exp;
use crate::lanes::Lanes;
use crate::pack::{PANEL, Packed};
use crate::rows::RowsMut;

/// Writes rows `first..first + count` of one panel through the epilogue.
///
/// # Safety
/// The ISA of `L` must be present; no other thread may write the same rows and columns.
#[inline(always)]
pub(super) unsafe fn finish<L: Lanes>(
    tile: &Tile,
    (first, count): (usize, usize),
    w: &Packed,
    panel: usize,
    epilogue: Epilogue<'_>,
    out: &RowsMut<'_, f32>,
) {
    let (width, at) = (w.shape.width(), panel * w.shape.panel_columns());
    let columns = w.shape.panel_columns().min(width - at);
    for (i, row) in tile.0[..count].iter().enumerate() {
        // SAFETY: the caller's promise.
        let target = unsafe { out.range((first + i) * width + at, columns) };
        match epilogue {
            Epilogue::Store => target.copy_from_slice(&row[..columns]),
            Epilogue::Bias(bias) => {
                for ((t, y), b) in target.iter_mut().zip(row).zip(&bias[at..]) {
                    *t = y + b;
                }
            }
            Epilogue::Add => target.iter_mut().zip(row).for_each(|(t, y)| *t += y),
            Epilogue::SiluMul => {
                let mut gated = [0.0; PANEL / 2];
                // SAFETY: the caller's promise.
                unsafe { silu_mul::<L>(row, &mut gated) };
                target.copy_from_slice(&gated[..columns]);
            }
        }
    }
}

/// Half a panel of gates, then as many ups.
///
/// # Safety
/// The ISA of `L` must be present.
#[inline(always)]
unsafe fn silu_mul<L: Lanes>(row: &[f32; PANEL], out: &mut [f32; PANEL / 2]) {
    let (gates, ups) = row.split_at(PANEL / 2);
    let mut powers = [0.0; PANEL / 2];
    powers.iter_mut().zip(gates).for_each(|(power, gate)| *power = -gate.abs());
    for i in (0..PANEL / 2).step_by(L::WIDTH) {
        // SAFETY: a multiple of the widest vector; the caller's promise.
        unsafe { exp(L::load(powers.as_ptr().add(i))).store(powers.as_mut_ptr().add(i)) };
    }
    for (((out, &gate), &up), &e) in out.iter_mut().zip(gates).zip(ups).zip(&powers) {
        let sigmoid = (if gate >= 0.0 { 1.0 } else { e }) / (1.0 + e);
        *out = gate * sigmoid * up;
    }
}
