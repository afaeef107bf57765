//! Products in AMX's tiles, of atoms that are kept in 8 bits, which bf16 holds exactly, with residuals in two parts in bf16 each, which keep
//! 17 bits of a number: nearly as exact as f32, so that nothing need be compared once more.

use core::arch::x86_64::*;

use super::{ExactGains, TILE_ATOMS};
use crate::kernels::amx::{HALF_DEPTH, HalfTile, SIDE, Tiles};
use crate::kernels::scan::RoundedAtoms;

/// Tiles of atoms that are multiplied at a time.
const AT_ONCE: usize = Tiles::HALVES_AT_ONCE;
/// Sums that are multiplied at a time.
const ROWS: usize = SIDE * AT_ONCE;

/// The nearest number in bf16, as its bits, and in f32. Numbers must not be near f32's largest.
#[inline(always)]
fn half(x: f32) -> (u16, f32) {
    let bits = x.to_bits() + 0x8000;
    ((bits >> 16) as u16, f32::from_bits(bits & 0xffff_0000))
}

/// Bits of the integer in the lowest byte, in bf16.
#[inline(always)]
fn widened(byte: u32) -> u32 {
    (f32::from(byte as u8 as i8)).to_bits() >> 16
}

/// # Safety
/// Needs AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn begin(exact: &mut ExactGains, atoms: &RoundedAtoms, tiles: usize) {
    let quads = atoms.quads();
    exact.depth = (quads * 4).div_ceil(HALF_DEPTH);
    exact.columns.clear();
    let count = tiles.next_multiple_of(AT_ONCE) * exact.depth;
    exact.columns.resize(count, HalfTile::ZEROS);
    let columns = exact.columns.chunks_exact_mut(exact.depth);
    for (columns, tile) in columns.zip(atoms.tiles().chunks_exact(quads)).take(tiles) {
        let rows = columns
            .iter_mut()
            .flat_map(|column| column.0.as_chunks_mut::<2>().0);
        for (rows, quad) in rows.zip(tile) {
            for l in 0..SIDE {
                // Numbers have 128 added.
                let quad = u32::from_le_bytes(quad[l]) ^ 0x8080_8080;
                let pair = |at: u32| {
                    let both = widened(quad >> at) | widened(quad >> (at + 8)) << 16;
                    [both as u16, (both >> 16) as u16]
                };
                (rows[0][l], rows[1][l]) = (pair(0), pair(16));
            }
        }
    }
}

/// # Safety
/// Needs AMX and AVX-512; sizes as [`ExactGains::multiply`] checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn multiply(exact: &mut ExactGains, residuals: &[f32], m: usize) {
    let (across, depth, row) = (exact.across(), exact.depth, exact.depth * HALF_DEPTH);
    let filled = (residuals.len() / m).next_multiple_of(ROWS);
    let (high, low) = (&mut exact.high, &mut exact.low);
    high.resize(filled * row, 0);
    low.resize(filled * row, 0);
    let parts = high.chunks_exact_mut(row).zip(low.chunks_exact_mut(row));
    for ((high, low), residual) in parts.zip(residuals.chunks_exact(m)) {
        high[m..].fill(0);
        low[m..].fill(0);
        for ((high, low), &x) in high.iter_mut().zip(low).zip(residual) {
            let (first, nearest) = half(x);
            *high = first;
            *low = half(x - nearest).0;
        }
    }
    exact.products.resize(filled * across, [0.0; TILE_ATOMS]);
    // SAFETY: the level is only where tiles are, and none are made within this.
    let amx = unsafe { Tiles::new() };
    let rows = high
        .chunks_exact(ROWS * row)
        .zip(low.chunks_exact(ROWS * row));
    let products = exact.products.chunks_exact_mut(ROWS * across);
    for ((high, low), products) in rows.zip(products) {
        let columns = exact.columns.chunks_exact(AT_ONCE * depth);
        for (columns, first) in columns.zip((0..across).step_by(AT_ONCE)) {
            // SAFETY: `ROWS` rows of either part, their columns, and as many rows of products from those of the first column on.
            unsafe {
                amx.rows_of_halves(
                    [high.as_ptr(), low.as_ptr()],
                    size_of_val(&high[..row]),
                    columns.as_ptr(),
                    depth,
                    products[first..].as_mut_ptr().cast(),
                    across * size_of::<[f32; TILE_ATOMS]>(),
                );
            }
        }
    }
}

/// # Safety
/// Needs AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn gains<'a>(
    products: impl Iterator<Item = &'a [[f32; TILE_ATOMS]]>,
    sums: &[f32],
    units: &[[f32; TILE_ATOMS]],
    losses: &[[f32; TILE_ATOMS]],
    out: &mut [[f32; TILE_ATOMS]],
) -> [[f32; TILE_ATOMS]; 2] {
    let mut most = [_mm512_set1_ps(f32::NEG_INFINITY); 2];
    let rows = sums.iter().zip(out.chunks_exact_mut(losses.len()));
    for ((&sum, out), products) in rows.zip(products) {
        let sum = _mm512_set1_ps(sum);
        let tiles = out.iter_mut().zip(products).zip(units.iter().zip(losses));
        for (t, ((out, products), (units, losses))) in tiles.enumerate() {
            let less = _mm512_sub_ps(sum, register(losses));
            let gains = _mm512_fmadd_ps(register(products), register(units), less);
            most[t % 2] = _mm512_max_ps(gains, most[t % 2]);
            // SAFETY: sixteen numbers.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), gains) };
        }
    }
    most.map(|most| {
        let mut numbers = [0.0; TILE_ATOMS];
        // SAFETY: sixteen numbers.
        unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), most) };
        numbers
    })
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn register(numbers: &[f32; TILE_ATOMS]) -> __m512 {
    // SAFETY: sixteen numbers.
    unsafe { _mm512_loadu_ps(numbers.as_ptr()) }
}

/// Numbers of which [`nth_of_few`] takes the `n`-th largest.
pub(super) const FEW: usize = 2 * TILE_ATOMS;

/// The `n`-th largest of up to [`FEW`] numbers, of which there are as many.
///
/// # Safety
/// Needs AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn nth_of_few(numbers: &[f32], n: usize) -> f32 {
    let none = _mm512_set1_ps(f32::NEG_INFINITY);
    let one = _mm512_set1_epi32(1);
    let mask = u32::MAX.unbounded_shr((FEW - numbers.len()) as u32);
    // SAFETY: the masks end where the numbers do.
    let candidates = unsafe {
        let start = numbers.as_ptr();
        [
            _mm512_mask_loadu_ps(none, mask as u16, start),
            _mm512_mask_loadu_ps(none, (mask >> 16) as u16, start.wrapping_add(TILE_ATOMS)),
        ]
    };
    // How many are as large as each.
    let mut as_large = [_mm512_setzero_si512(); 2];
    for &x in numbers {
        let x = _mm512_set1_ps(x);
        for (count, &candidate) in as_large.iter_mut().zip(&candidates) {
            let is_larger = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, candidate);
            *count = _mm512_mask_add_epi32(*count, is_larger, *count, one);
        }
    }
    let n = _mm512_set1_epi32(n as i32);
    let [first, second] = [0, 1].map(|half| {
        let are_enough = _mm512_cmpge_epi32_mask(as_large[half], n);
        _mm512_mask_mov_ps(none, are_enough, candidates[half])
    });
    _mm512_reduce_max_ps(_mm512_max_ps(first, second))
}
