//! Products of 8-bit integers, summed in 32 bits.

use core::arch::aarch64::*;
use core::arch::asm;

use super::{LANES, Operands, QUAD, STRIP_TILES, TILE_ATOMS, portable};

const QUAD_BYTES: usize = TILE_ATOMS * QUAD;
/// Registers that a tile's quad, or its sums, take.
const PARTS: usize = TILE_ATOMS / 4;

/// Adds to four sums the products of four quads with quad `$lane` of `$x`: an instruction whose intrinsic
/// is not stable.
macro_rules! add_products {
    ($sum:expr, $quads:expr, $x:expr, $lane:literal) => {
        asm!(
            concat!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[", $lane, "]"),
            inout(vreg) $sum,
            in(vreg) $quads,
            in(vreg) $x,
            options(pure, nomem, nostack, preserves_flags),
        )
    };
}

/// NEON.
pub(super) mod neon {
    use super::*;

    /// # Safety
    /// Needs NEON; sizes as [`scan`](super::super::scan) checks them.
    #[target_feature(enable = "neon")]
    pub(in crate::kernels::scan) unsafe fn scan(
        operands: Operands<'_>,
        out: &mut [f32],
        largest: &mut [[f32; TILE_ATOMS]],
    ) {
        out.fill(0.0);
        for (t, tile) in operands
            .tiles
            .chunks_exact(operands.quads * QUAD_BYTES)
            .enumerate()
        {
            for first in (0..largest.len()).step_by(AT_ONCE) {
                keep_largest(
                    operands,
                    t,
                    first,
                    &tile_sums(operands, tile, first),
                    out,
                    largest,
                );
            }
        }
    }

    /// # Safety
    /// Needs NEON; sizes as [`products`](super::super::products) checks them.
    #[target_feature(enable = "neon")]
    pub(in crate::kernels::scan) unsafe fn products(
        operands: Operands<'_>,
        count: usize,
        out: &mut [[i32; TILE_ATOMS]],
    ) {
        let tiles = out.len() / count;
        let all = operands.tiles.chunks_exact(operands.quads * QUAD_BYTES);
        for (t, tile) in all.take(tiles).enumerate() {
            for first in (0..count).step_by(AT_ONCE) {
                write_products(t, first, &tile_sums(operands, tile, first), count, out);
            }
        }
    }

    /// Vectors at a time: two sums an atom each.
    const AT_ONCE: usize = 2;

    /// Sums of products of a tile with vectors from `first` on.
    #[inline]
    #[target_feature(enable = "neon")]
    fn tile_sums(
        operands: Operands<'_>,
        tile: &[u8],
        first: usize,
    ) -> [[int32x4_t; PARTS]; AT_ONCE] {
        let mut halves = [[[vdupq_n_s32(0); 2]; PARTS]; AT_ONCE];
        // Whole blocks of vectors are there, whatever is in those that nobody asks for.
        let own = operands.numbers_from(first);
        for (quad, numbers) in tile.chunks_exact(QUAD_BYTES).enumerate() {
            let x = &own[quad * LANES..][..AT_ONCE];
            for (part, numbers) in numbers.as_chunks::<16>().0.iter().enumerate() {
                let atoms = signed(numbers);
                for (halves, &x) in halves.iter_mut().zip(x) {
                    let x = vreinterpretq_s8_u32(vdupq_n_u32(x));
                    let low = vmull_s8(vget_low_s8(atoms), vget_low_s8(x));
                    let high = vmull_high_s8(atoms, x);
                    let [first, second] = &mut halves[part];
                    *first = vpadalq_s16(*first, low);
                    *second = vpadalq_s16(*second, high);
                }
            }
        }
        halves.map(|parts| parts.map(|[a, b]| vpaddq_s32(a, b)))
    }

    #[target_feature(enable = "neon")]
    pub(in crate::kernels::scan) fn at_least(a: &[f32], enough: f32, found: &mut Vec<u32>) {
        portable::at_least::<true>(a, enough, found);
    }
}

/// NEON and its dot products.
pub(super) mod dot_product {
    use super::*;

    pub(in crate::kernels::scan) use super::neon::at_least;

    /// # Safety
    /// Needs NEON and its dot products; sizes as [`scan`](super::super::scan) checks them.
    #[target_feature(enable = "neon,dotprod")]
    pub(in crate::kernels::scan) unsafe fn scan(
        operands: Operands<'_>,
        out: &mut [f32],
        largest: &mut [[f32; TILE_ATOMS]],
    ) {
        out.fill(0.0);
        for (t, tile) in operands
            .tiles
            .chunks_exact(operands.quads * QUAD_BYTES)
            .enumerate()
        {
            for first in (0..largest.len()).step_by(AT_ONCE) {
                keep_largest(
                    operands,
                    t,
                    first,
                    &tile_sums(operands, tile, first),
                    out,
                    largest,
                );
            }
        }
    }

    /// # Safety
    /// Needs NEON and its dot products; sizes as [`products`](super::super::products) checks them.
    #[target_feature(enable = "neon,dotprod")]
    pub(in crate::kernels::scan) unsafe fn products(
        operands: Operands<'_>,
        count: usize,
        out: &mut [[i32; TILE_ATOMS]],
    ) {
        let tiles = out.len() / count;
        let all = operands.tiles.chunks_exact(operands.quads * QUAD_BYTES);
        for (t, tile) in all.take(tiles).enumerate() {
            for first in (0..count).step_by(AT_ONCE) {
                write_products(t, first, &tile_sums(operands, tile, first), count, out);
            }
        }
    }

    /// Vectors at a time: their quads fill a register.
    const AT_ONCE: usize = 4;

    /// Sums of products of a tile with vectors from `first` on.
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    fn tile_sums(
        operands: Operands<'_>,
        tile: &[u8],
        first: usize,
    ) -> [[int32x4_t; PARTS]; AT_ONCE] {
        let mut sums = [[vdupq_n_s32(0); PARTS]; AT_ONCE];
        // Whole blocks of vectors are there, whatever is in those that nobody asks for.
        let own = operands.numbers_from(first);
        for (quad, numbers) in tile.chunks_exact(QUAD_BYTES).enumerate() {
            let x = &own[quad * LANES..][..AT_ONCE];
            // SAFETY: the quads of four vectors, and NEON's dot products are there.
            unsafe {
                let x = vld1q_s8(x.as_ptr().cast());
                for (part, numbers) in numbers.as_chunks::<16>().0.iter().enumerate() {
                    let atoms = signed(numbers);
                    add_products!(sums[0][part], atoms, x, 0);
                    add_products!(sums[1][part], atoms, x, 1);
                    add_products!(sums[2][part], atoms, x, 2);
                    add_products!(sums[3][part], atoms, x, 3);
                }
            }
        }
        sums
    }
}

/// Writes the products of tile `t` with vectors from `first` on, those of them that are asked for.
#[inline]
#[target_feature(enable = "neon")]
fn write_products(
    t: usize,
    first: usize,
    sums: &[[int32x4_t; PARTS]],
    count: usize,
    out: &mut [[i32; TILE_ATOMS]],
) {
    let tiles = out.len() / count;
    for (v, sums) in (first..count).zip(sums) {
        let places = out[v * tiles + t].as_chunks_mut::<4>().0;
        for (&sum, place) in sums.iter().zip(places) {
            // SAFETY: four numbers.
            unsafe { vst1q_s32(place.as_mut_ptr(), sum) };
        }
    }
}

/// Four quads of a tile without the 128 that they have added.
#[inline]
#[target_feature(enable = "neon")]
fn signed(numbers: &[u8; 16]) -> int8x16_t {
    // SAFETY: 16 bytes.
    let numbers = unsafe { vld1q_u8(numbers.as_ptr()) };
    vreinterpretq_s8_u8(veorq_u8(numbers, vdupq_n_u8(0x80)))
}

/// Writes what is largest so far of tile `t`'s strip and of all, for the vectors from `first` on, as many of
/// `sums` as there are.
#[inline]
#[target_feature(enable = "neon")]
fn keep_largest(
    operands: Operands<'_>,
    t: usize,
    first: usize,
    sums: &[[int32x4_t; PARTS]],
    out: &mut [f32],
    largest: &mut [[f32; TILE_ATOMS]],
) {
    let scales = operands.scales[t * TILE_ATOMS..].as_chunks::<4>().0;
    for (v, (largest, sums)) in largest[first..].iter_mut().zip(sums).enumerate() {
        let place = (first + v) * operands.row() + t / STRIP_TILES * TILE_ATOMS;
        let out = &mut out[place..place + TILE_ATOMS];
        let places = out.as_chunks_mut::<4>().0.iter_mut();
        let places = places.zip(largest.as_chunks_mut::<4>().0);
        for ((&sum, scales), (out, largest)) in sums.iter().zip(scales).zip(places) {
            // SAFETY: four numbers each.
            unsafe {
                let magnitude = vcvtq_f32_s32(vabsq_s32(sum));
                let scaled = vmulq_f32(magnitude, vld1q_f32(scales.as_ptr()));
                for max in [out, largest] {
                    let max = max.as_mut_ptr();
                    vst1q_f32(max, vmaxq_f32(vld1q_f32(max), scaled));
                }
            }
        }
    }
}
