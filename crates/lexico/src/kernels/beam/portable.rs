//! Gains in plain Rust, which vectorises at any width.

use super::Continued;
use crate::kernels::scan::TILE_ATOMS;
use crate::kernels::{larger, multiply_add};

#[inline(always)]
pub(super) fn gains<const FMA: bool>(
    products: &[[i32; TILE_ATOMS]],
    sums: &[Continued],
    units: &[[f32; TILE_ATOMS]],
    losses: &[[f32; TILE_ATOMS]],
    out: &mut [[f32; TILE_ATOMS]],
    largest: &mut [[f32; TILE_ATOMS]],
) {
    let tiles = losses.len();
    let atoms = units.iter().zip(losses).zip(largest);
    // Tile by tile: where the largest so far were read and written again, compilers would make slow masked writes of it.
    for (t, ((units, losses), largest)) in atoms.enumerate() {
        let mut most = [f32::NEG_INFINITY; TILE_ATOMS];
        let rows = products
            .chunks_exact(tiles)
            .zip(out.chunks_exact_mut(tiles));
        for ((products, out), sum) in rows.zip(sums) {
            let products = &products[t];
            let mut own = [0f32; TILE_ATOMS];
            for l in 0..TILE_ATOMS {
                let less = sum.gain - losses[l];
                own[l] = multiply_add::<FMA>(products[l] as f32, units[l] * sum.unit, less);
                most[l] = larger(own[l], most[l]);
            }
            out[t] = own;
        }
        *largest = most;
    }
}
