//! Products of 8-bit integers, summed in 32 bits.

use core::arch::x86_64::*;

use crate::arch::scan::{GROUP_TILES, LANES, QUAD, TILE_ATOMS};

const QUAD_BYTES: usize = TILE_ATOMS * QUAD;

/// # Safety
/// Needs AVX-512 with VNNI; sizes as [`crate::arch::scan::scan`] checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in super::super) unsafe fn avx512(
    tiles: &[u8],
    scales: &[f32],
    quads: usize,
    vectors: &[u32],
    out: &mut [f32],
    largest: &mut [[f32; TILE_ATOMS]],
) {
    let row = scales.len() / GROUP_TILES;
    let count = out.len() / row;
    // Numbers of the tiles are 128 too large: what that adds to every sum.
    let starts: Vec<i32> = (0..count)
        .map(|v| {
            let block = &vectors[v / LANES * quads * LANES..][..quads * LANES];
            let own = block.iter().skip(v % LANES).step_by(LANES);
            let sum = |quad: &u32| -> i32 {
                quad.to_le_bytes()
                    .iter()
                    .map(|&byte| i32::from(byte as i8))
                    .sum()
            };
            -128 * own.map(sum).sum::<i32>()
        })
        .collect();
    let group_bytes = GROUP_TILES * quads * QUAD_BYTES;
    let group_scales = scales.chunks_exact(GROUP_TILES * TILE_ATOMS);
    for (group, (tiles, scales)) in tiles
        .chunks_exact(group_bytes)
        .zip(group_scales)
        .enumerate()
    {
        let mut first = 0;
        while first < count {
            let here = Place {
                tiles: tiles.as_ptr(),
                scales: scales.as_ptr(),
                quads,
                vectors: vectors[first / LANES * quads * LANES + first % LANES..].as_ptr(),
                starts: &starts[first..],
                out: out[first * row + group * TILE_ATOMS..].as_mut_ptr(),
                largest: largest[first..].as_mut_ptr(),
                row,
            };
            // SAFETY: the group, the vectors, of which no more are taken than are left in the block, and
            // their results lie within their slices.
            first += unsafe {
                match count - first {
                    LANES.. => here.look_over::<LANES>(),
                    4.. => here.look_over::<4>(),
                    2.. => here.look_over::<2>(),
                    _ => here.look_over::<1>(),
                }
            };
        }
    }
}

/// A group of tiles, some vectors, and where their results go.
struct Place<'a> {
    tiles: *const u8,
    scales: *const f32,
    quads: usize,
    vectors: *const u32,
    starts: &'a [i32],
    out: *mut f32,
    largest: *mut [f32; TILE_ATOMS],
    /// Results of a vector.
    row: usize,
}

impl Place<'_> {
    /// Looks over the group for `V` vectors, and returns how many these are.
    ///
    /// # Safety
    /// A group's tiles, `V` vectors of one block and their results must lie behind the pointers.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn look_over<const V: usize>(&self) -> usize {
        let mut sums = [[_mm512_setzero_si512(); GROUP_TILES]; V];
        for (sums, &start) in sums.iter_mut().zip(self.starts) {
            *sums = [_mm512_set1_epi32(start); GROUP_TILES];
        }
        for quad in 0..self.quads {
            let mut tiles = [_mm512_setzero_si512(); GROUP_TILES];
            for (t, tile) in tiles.iter_mut().enumerate() {
                let at = (t * self.quads + quad) * QUAD_BYTES;
                // SAFETY: quad `quad` of tile `t`, which the caller vouches for.
                *tile = unsafe { _mm512_loadu_si512(self.tiles.add(at).cast()) };
            }
            for (v, sums) in sums.iter_mut().enumerate() {
                // SAFETY: quad `quad` of vector `v`, which the caller vouches for.
                let x = unsafe { *self.vectors.add(quad * LANES + v) };
                let x = _mm512_set1_epi32(x as i32);
                for (sum, &tile) in sums.iter_mut().zip(&tiles) {
                    *sum = _mm512_dpbusd_epi32(*sum, tile, x);
                }
            }
        }
        for (v, sums) in sums.iter().enumerate() {
            let mut most = _mm512_setzero_ps();
            for (t, &sum) in sums.iter().enumerate() {
                // SAFETY: the tile's 16 scales.
                let scales = unsafe { _mm512_loadu_ps(self.scales.add(t * TILE_ATOMS)) };
                let magnitude = _mm512_cvtepi32_ps(_mm512_abs_epi32(sum));
                most = _mm512_max_ps(most, _mm512_mul_ps(magnitude, scales));
            }
            // SAFETY: the group's 16 places in row `v` of `out`, and the 16 largest of vector `v`.
            unsafe {
                _mm512_storeu_ps(self.out.add(v * self.row), most);
                let largest = self.largest.add(v).cast::<f32>();
                _mm512_storeu_ps(largest, _mm512_max_ps(_mm512_loadu_ps(largest), most));
            }
        }
        V
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in super::super) fn at_least_avx512(a: &[f32], enough: f32, found: &mut Vec<u32>) {
    const BLOCK: usize = 64;
    let (blocks, rest) = a.as_chunks::<BLOCK>();
    let least = _mm512_set1_ps(enough);
    for (number, block) in blocks.iter().enumerate() {
        let mut mask = 0;
        for part in 0..BLOCK / 16 {
            // SAFETY: a block has four parts of 16 numbers.
            let numbers = unsafe { _mm512_loadu_ps(block.as_ptr().add(part * 16)) };
            let large = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(numbers, least);
            mask |= u64::from(large) << (part * 16);
        }
        while mask != 0 {
            found.push((number * BLOCK) as u32 + mask.trailing_zeros());
            mask &= mask - 1;
        }
    }
    let first = (a.len() - rest.len()) as u32;
    let large = (first..).zip(rest).filter(|(_, x)| **x >= enough);
    found.extend(large.map(|(i, _)| i));
}

/// # Safety
/// Needs AVX2; sizes as [`crate::arch::scan::scan`] checks them.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn avx2(
    tiles: &[u8],
    scales: &[f32],
    quads: usize,
    vectors: &[u32],
    out: &mut [f32],
    largest: &mut [[f32; TILE_ATOMS]],
) {
    /// Vectors at a time: each tile is taken apart once for them.
    const AT_ONCE: usize = 4;
    let row = scales.len() / GROUP_TILES;
    out.fill(0.0);
    let offset = _mm256_set1_epi8(-128);
    let ones = _mm256_set1_epi16(1);
    for (t, scales) in scales.chunks_exact(TILE_ATOMS).enumerate() {
        let tile = &tiles[t * quads * QUAD_BYTES..][..quads * QUAD_BYTES];
        for (part, largest) in largest.chunks_mut(AT_ONCE).enumerate() {
            let first = part * AT_ONCE;
            // Whole blocks of vectors are there, whatever is in those that nobody asks for.
            let own = &vectors[first / LANES * quads * LANES + first % LANES..];
            let mut sums = [[_mm256_setzero_si256(); 2]; AT_ONCE];
            for (quad, numbers) in tile.chunks_exact(QUAD_BYTES).enumerate() {
                let x = &own[quad * LANES..][..AT_ONCE];
                for half in 0..2 {
                    // SAFETY: a quad has two halves of 32 bytes.
                    let atoms =
                        unsafe { _mm256_loadu_si256(numbers.as_ptr().add(half * 32).cast()) };
                    // Magnitudes by signed numbers: two products of 127² fit 16 bits, so that nothing
                    // saturates.
                    let atoms = _mm256_xor_si256(atoms, offset);
                    let magnitudes = _mm256_abs_epi8(atoms);
                    for (sums, &x) in sums.iter_mut().zip(x) {
                        let signed = _mm256_sign_epi8(_mm256_set1_epi32(x as i32), atoms);
                        let pairs = _mm256_maddubs_epi16(magnitudes, signed);
                        sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
                    }
                }
            }
            for (v, (largest, sums)) in largest.iter_mut().zip(sums).enumerate() {
                let place = (first + v) * row + t / GROUP_TILES * TILE_ATOMS;
                let out = &mut out[place..place + TILE_ATOMS];
                for (half, sum) in sums.into_iter().enumerate() {
                    // SAFETY: all have 16 numbers, half of them from here on.
                    unsafe {
                        let largest = largest.as_mut_ptr().add(half * 8);
                        let scales = _mm256_loadu_ps(scales.as_ptr().add(half * 8));
                        let magnitude = _mm256_cvtepi32_ps(_mm256_abs_epi32(sum));
                        let scaled = _mm256_mul_ps(magnitude, scales);
                        let out = out.as_mut_ptr().add(half * 8);
                        _mm256_storeu_ps(out, _mm256_max_ps(_mm256_loadu_ps(out), scaled));
                        _mm256_storeu_ps(largest, _mm256_max_ps(_mm256_loadu_ps(largest), scaled));
                    }
                }
            }
        }
    }
}
