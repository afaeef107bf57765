//! The kernels in plain Rust, which vectorises at any width.

use super::{Continued, Pair};
use crate::kernels::memory::in_general_register;
use crate::kernels::rows::{Number, unit};
use crate::kernels::scan::TILE_ATOMS;
use crate::kernels::vector::portable::dot;
use crate::kernels::{larger, multiply_add};

#[inline(always)]
pub(super) fn gains<const FMA: bool>(
    products: &[[i32; TILE_ATOMS]],
    sums: &[Continued],
    units: &[[f32; TILE_ATOMS]],
    losses: &[[f32; TILE_ATOMS]],
    out: &mut [[f32; TILE_ATOMS]],
) -> [[f32; TILE_ATOMS]; 2] {
    let tiles = losses.len();
    let mut most = [[f32::NEG_INFINITY; TILE_ATOMS]; 2];
    // Tile by tile: where the largest so far were read and written again, compilers would make slow masked writes of it.
    for (t, (units, losses)) in units.iter().zip(losses).enumerate() {
        let mut largest = most[t % 2];
        let rows = products
            .chunks_exact(tiles)
            .zip(out.chunks_exact_mut(tiles));
        for ((products, out), sum) in rows.zip(sums) {
            let products = &products[t];
            let mut own = [0f32; TILE_ATOMS];
            for l in 0..TILE_ATOMS {
                let less = sum.gain - losses[l];
                own[l] = multiply_add::<FMA>(products[l] as f32, units[l] * sum.unit, less);
                largest[l] = larger(own[l], largest[l]);
            }
            out[t] = own;
        }
        most[t % 2] = largest;
    }
    most
}

/// Numbers that are compared with each other in one register of the widest kind.
const WIDTH: usize = 16;
/// Numbers of which each is compared with all others; of more, they are sorted.
const FEW: usize = 4 * WIDTH;

#[inline(always)]
pub(super) fn nth_largest<const FMA: bool>(numbers: &[f32], n: usize) -> f32 {
    if n > numbers.len() {
        return f32::NEG_INFINITY;
    }
    if numbers.len() > FEW {
        let mut numbers = numbers.to_vec();
        return *numbers
            .select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a))
            .1;
    }
    // Of few numbers, without a branch.
    let mut nth = [f32::NEG_INFINITY; WIDTH];
    for candidates in numbers.chunks(WIDTH) {
        let mut filled = [f32::NEG_INFINITY; WIDTH];
        filled[..candidates.len()].copy_from_slice(candidates);
        // How many are as large as each. One after the other, as compilers would rather take many numbers at a time for every one of these.
        let mut as_large = [0u32; WIDTH];
        for &x in numbers {
            let x = f32::from_bits(in_general_register(u64::from(x.to_bits())) as u32);
            for l in 0..WIDTH {
                as_large[l] += u32::from(x >= filled[l]);
            }
        }
        for l in 0..WIDTH {
            let is_enough = as_large[l] >= n as u32;
            let candidate = if is_enough {
                filled[l]
            } else {
                f32::NEG_INFINITY
            };
            nth[l] = larger(candidate, nth[l]);
        }
    }
    nth.into_iter().fold(f32::NEG_INFINITY, larger)
}

#[inline(always)]
pub(super) fn products_of<const FMA: bool>(
    pairs: &[Pair],
    atoms: &[impl Number],
    units: &[f32],
    residuals: &[f32],
    m: usize,
    out: &mut [f32],
) {
    for (pair, out) in pairs.iter().zip(out) {
        let (sum, atom) = (pair.sum as usize, pair.atom as usize);
        let product = dot::<FMA>(&atoms[atom * m..][..m], &residuals[sum * m..][..m]);
        *out = unit(units, atom) * product;
    }
}

#[inline(always)]
pub(super) fn rests<const FMA: bool>(
    pairs: &[Pair],
    atoms: &[impl Number],
    units: &[f32],
    residuals: &[f32],
    m: usize,
    out: &mut [f32],
) {
    for (pair, out) in pairs.iter().zip(out.chunks_exact_mut(m)) {
        let (sum, atom) = (pair.sum as usize, pair.atom as usize);
        let (atom, unit) = (&atoms[atom * m..][..m], unit(units, atom));
        let residual = &residuals[sum * m..][..m];
        for ((out, x), residual) in out.iter_mut().zip(atom).zip(residual) {
            *out = multiply_add::<FMA>(-unit, x.widen(), *residual);
        }
    }
}
