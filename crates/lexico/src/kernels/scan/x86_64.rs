//! Products of 8-bit integers, summed in 32 bits.

use core::arch::x86_64::*;

use super::{LANES, Operands, QUAD, STRIP_TILES, TILE_ATOMS};

const QUAD_BYTES: usize = TILE_ATOMS * QUAD;

/// AVX2.
pub(super) mod avx2 {
    use super::*;

    /// # Safety
    /// Needs AVX2; sizes as [`scan`](super::super::scan) checks them, every number of a vector within ±64.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in crate::kernels::scan) unsafe fn scan(
        operands: Operands<'_>,
        out: &mut [f32],
        largest: &mut [[f32; TILE_ATOMS]],
    ) {
        // SAFETY: AVX2 is there, and the sizes are right.
        unsafe {
            tile_by_tile(operands, out, largest, |sum, atoms, x| {
                add_products(sum, atoms, x)
            })
        }
    }

    /// # Safety
    /// Needs AVX2; sizes as [`products`](super::super::products) checks them, every number of a vector within ±64.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in crate::kernels::scan) unsafe fn products(
        operands: Operands<'_>,
        count: usize,
        out: &mut [[i32; TILE_ATOMS]],
    ) {
        // SAFETY: AVX2 is there, and the sizes are right.
        unsafe {
            all_products(operands, count, out, |sum, atoms, x| {
                add_products(sum, atoms, x)
            })
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add_products(sum: __m256i, atoms: __m256i, x: __m256i) -> __m256i {
        let pairs = _mm256_maddubs_epi16(atoms, x);
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in crate::kernels::scan) fn at_least(a: &[f32], enough: f32, found: &mut Vec<u32>) {
        let least = _mm256_set1_ps(enough);
        at_least_by(a, enough, found, |block| {
            let parts = block.as_chunks::<8>().0.iter();
            // Most blocks have none, which one comparison of the largest tells.
            let most = parts
                .clone()
                .fold(_mm256_set1_ps(f32::NEG_INFINITY), |most, part| {
                    // SAFETY: a part has 8 numbers.
                    _mm256_max_ps(unsafe { _mm256_loadu_ps(part.as_ptr()) }, most)
                });
            if _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(most, least)) == 0 {
                return 0;
            }
            parts.rev().fold(0, |mask, part| {
                // SAFETY: a part has 8 numbers.
                let numbers = unsafe { _mm256_loadu_ps(part.as_ptr()) };
                let large = _mm256_cmp_ps::<_CMP_GE_OQ>(numbers, least);
                mask << 8 | u64::from(_mm256_movemask_ps(large) as u32)
            })
        });
    }
}

/// AVX2 and AVX-VNNI.
pub(super) mod avx_vnni {
    use super::*;

    pub(in crate::kernels::scan) use super::avx2::at_least;

    /// # Safety
    /// Needs AVX2 and AVX-VNNI; sizes as [`scan`](super::super::scan) checks them.
    #[target_feature(enable = "avxvnni,avx2,fma,f16c")]
    pub(in crate::kernels::scan) unsafe fn scan(
        operands: Operands<'_>,
        out: &mut [f32],
        largest: &mut [[f32; TILE_ATOMS]],
    ) {
        let add_products = |sum, atoms, x| _mm256_dpbusd_avx_epi32(sum, atoms, x);
        // SAFETY: AVX2 is there, and the sizes are right.
        unsafe { tile_by_tile(operands, out, largest, add_products) }
    }

    /// # Safety
    /// Needs AVX2 and AVX-VNNI; sizes as [`products`](super::super::products) checks them.
    #[target_feature(enable = "avxvnni,avx2,fma,f16c")]
    pub(in crate::kernels::scan) unsafe fn products(
        operands: Operands<'_>,
        count: usize,
        out: &mut [[i32; TILE_ATOMS]],
    ) {
        let add_products = |sum, atoms, x| _mm256_dpbusd_avx_epi32(sum, atoms, x);
        // SAFETY: AVX2 is there, and the sizes are right.
        unsafe { all_products(operands, count, out, add_products) }
    }
}

/// AVX-512.
pub(super) mod avx512 {
    use super::*;

    /// # Safety
    /// Needs AVX-512 with VNNI; sizes as [`scan`](super::super::scan) checks them.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub(in crate::kernels::scan) unsafe fn scan(
        operands: Operands<'_>,
        out: &mut [f32],
        largest: &mut [[f32; TILE_ATOMS]],
    ) {
        let (quads, row, count) = (operands.quads, operands.row(), largest.len());
        let strip_bytes = STRIP_TILES * quads * QUAD_BYTES;
        let tiles = operands.tiles.chunks_exact(strip_bytes);
        let scales = operands.scales.chunks_exact(STRIP_TILES * TILE_ATOMS);
        for (strip, (tiles, scales)) in tiles.zip(scales).enumerate() {
            let mut first = 0;
            while first < count {
                let here = Place {
                    tiles: tiles.as_ptr(),
                    scales: scales.as_ptr(),
                    quads,
                    vectors: operands.numbers_from(first).as_ptr(),
                    starts: &operands.starts[first..count],
                    out: out[first * row + strip * TILE_ATOMS..].as_mut_ptr(),
                    largest: largest[first..].as_mut_ptr(),
                    row,
                };
                // SAFETY: the strip, the vectors, of which no more are taken than are left in the block, and
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

    /// # Safety
    /// Needs AVX-512 with VNNI; sizes as [`products`](super::super::products) checks them.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub(in crate::kernels::scan) unsafe fn products(
        operands: Operands<'_>,
        count: usize,
        out: &mut [[i32; TILE_ATOMS]],
    ) {
        let tiles = out.len() / count;
        let strip_bytes = STRIP_TILES * operands.quads * QUAD_BYTES;
        for (strip, strip_tiles) in operands.tiles.chunks_exact(strip_bytes).enumerate() {
            let here = strip * STRIP_TILES..((strip + 1) * STRIP_TILES).min(tiles);
            let mut first = 0;
            while first < count && !here.is_empty() {
                let vectors = operands.numbers_from(first).as_ptr();
                let starts = &operands.starts[first..count];
                let mut write = |sums: &[[__m512i; STRIP_TILES]]| {
                    for (v, sums) in sums.iter().enumerate() {
                        for (t, &sum) in here.clone().zip(sums) {
                            let out = out[(first + v) * tiles + t].as_mut_ptr();
                            // SAFETY: a result has 16 numbers.
                            unsafe { _mm512_storeu_si512(out.cast(), sum) };
                        }
                    }
                    sums.len()
                };
                // SAFETY: the strip and the vectors, of which no more are taken than are left in the block, lie within
                // their slices.
                first += unsafe {
                    let (strip, quads) = (strip_tiles.as_ptr(), operands.quads);
                    match count - first {
                        LANES.. => write(&strip_sums::<LANES>(strip, quads, vectors, starts)),
                        4.. => write(&strip_sums::<4>(strip, quads, vectors, starts)),
                        2.. => write(&strip_sums::<2>(strip, quads, vectors, starts)),
                        _ => write(&strip_sums::<1>(strip, quads, vectors, starts)),
                    }
                };
            }
        }
    }

    /// Sums of products of a strip's tiles with `V` vectors of one block, each added to its vector's start.
    ///
    /// # Safety
    /// A strip's tiles and `V` vectors of one block must lie behind the pointers.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn strip_sums<const V: usize>(
        strip: *const u8,
        quads: usize,
        vectors: *const u32,
        starts: &[i32],
    ) -> [[__m512i; STRIP_TILES]; V] {
        let mut sums = [[_mm512_setzero_si512(); STRIP_TILES]; V];
        for (sums, &start) in sums.iter_mut().zip(starts) {
            *sums = [_mm512_set1_epi32(start); STRIP_TILES];
        }
        for quad in 0..quads {
            let mut tiles = [_mm512_setzero_si512(); STRIP_TILES];
            for (t, tile) in tiles.iter_mut().enumerate() {
                let at = (t * quads + quad) * QUAD_BYTES;
                // SAFETY: quad `quad` of tile `t`, which the caller vouches for.
                *tile = unsafe { _mm512_loadu_si512(strip.add(at).cast()) };
            }
            for (v, sums) in sums.iter_mut().enumerate() {
                // SAFETY: quad `quad` of vector `v`, which the caller vouches for.
                let x = unsafe { *vectors.add(quad * LANES + v) };
                let x = _mm512_set1_epi32(x as i32);
                for (sum, &tile) in sums.iter_mut().zip(&tiles) {
                    *sum = _mm512_dpbusd_epi32(*sum, tile, x);
                }
            }
        }
        sums
    }

    /// A strip of tiles, some vectors, and where their results go.
    struct Place<'a> {
        tiles: *const u8,
        scales: *const f32,
        quads: usize,
        vectors: *const u32,
        starts: &'a [i32],
        out: *mut f32,
        largest: *mut [f32; TILE_ATOMS],
        /// Number of a vector's results.
        row: usize,
    }

    impl Place<'_> {
        /// Looks over the strip for `V` vectors, and returns how many these are.
        ///
        /// # Safety
        /// A strip's tiles, `V` vectors of one block and their results must lie behind the pointers.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        unsafe fn look_over<const V: usize>(&self) -> usize {
            // SAFETY: the caller vouches for the strip's tiles and `V` vectors.
            let sums =
                unsafe { strip_sums::<V>(self.tiles, self.quads, self.vectors, self.starts) };
            for (v, sums) in sums.iter().enumerate() {
                let mut max = _mm512_setzero_ps();
                for (t, &sum) in sums.iter().enumerate() {
                    // SAFETY: the tile's 16 scales.
                    let scales = unsafe { _mm512_loadu_ps(self.scales.add(t * TILE_ATOMS)) };
                    let magnitude = _mm512_cvtepi32_ps(_mm512_abs_epi32(sum));
                    max = _mm512_max_ps(max, _mm512_mul_ps(magnitude, scales));
                }
                // SAFETY: the strip's 16 places in row `v` of `out`, and the 16 largest of vector `v`.
                unsafe {
                    _mm512_storeu_ps(self.out.add(v * self.row), max);
                    let largest = self.largest.add(v).cast::<f32>();
                    _mm512_storeu_ps(largest, _mm512_max_ps(_mm512_loadu_ps(largest), max));
                }
            }
            V
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub(in crate::kernels::scan) fn at_least(a: &[f32], enough: f32, found: &mut Vec<u32>) {
        const WIDTH: usize = 16;
        let least = _mm512_set1_ps(enough);
        let mut numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let (blocks, rest) = a.as_chunks::<WIDTH>();
        let mut count = found.len();
        // Without a branch, as there is no telling where the large ones are: a whole register is written for every block.
        found.reserve((blocks.len() + 1) * WIDTH);
        for block in blocks {
            // SAFETY: a block has 16 numbers, and there is room for 16 more than are counted.
            unsafe {
                let block = _mm512_loadu_ps(block.as_ptr());
                let large = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(block, least);
                let large_numbers = _mm512_maskz_compress_epi32(large, numbers);
                _mm512_storeu_si512(found.as_mut_ptr().add(count).cast(), large_numbers);
                count += large.count_ones() as usize;
            }
            numbers = _mm512_add_epi32(numbers, _mm512_set1_epi32(WIDTH as i32));
        }
        // SAFETY: so many have been written.
        unsafe { found.set_len(count) };
        let first = (a.len() - rest.len()) as u32;
        let large = (first..).zip(rest).filter(|(_, x)| **x >= enough);
        found.extend(large.map(|(i, _)| i));
    }
}

pub(super) use avx512 as amx;

/// Vectors at a time: with the two halves of a tile as many sums as additions are under way.
const AT_ONCE: usize = 4;

/// Sums of products of a tile with four vectors from `first` on, each added to its vector's start.
///
/// # Safety
/// Needs AVX2, and whole blocks of vectors, whatever is in those that nobody asks for.
#[inline(always)]
unsafe fn tile_sums(
    operands: Operands<'_>,
    tile: &[[u8; QUAD_BYTES]],
    first: usize,
    starts: &[i32],
    add_products: &impl Fn(__m256i, __m256i, __m256i) -> __m256i,
) -> [[__m256i; 2]; AT_ONCE] {
    let quads = operands.quads;
    let block = &operands.vectors[first / LANES * quads * LANES..][..quads * LANES];
    let (block, first_lane) = (block.as_chunks::<LANES>().0, first % LANES);
    // SAFETY: AVX2 is there; a quad of a tile has two halves of 32 bytes.
    unsafe {
        let mut sums = [[_mm256_setzero_si256(); 2]; AT_ONCE];
        for (sums, &start) in sums.iter_mut().zip(starts) {
            *sums = [_mm256_set1_epi32(start); 2];
        }
        for (numbers, x) in tile.iter().zip(block) {
            let x = &x[first_lane..][..AT_ONCE];
            let low = _mm256_loadu_si256(numbers.as_ptr().cast());
            let high = _mm256_loadu_si256(numbers[QUAD_BYTES / 2..].as_ptr().cast());
            for (sums, &x) in sums.iter_mut().zip(x) {
                let x = _mm256_set1_epi32(x as i32);
                sums[0] = add_products(sums[0], low, x);
                sums[1] = add_products(sums[1], high, x);
            }
        }
        sums
    }
}

/// Writes all products with `add_products`, which adds the products of eight quads to eight sums.
///
/// # Safety
/// Needs AVX2; sizes as [`products`](super::products) checks them.
#[inline(always)]
unsafe fn all_products(
    operands: Operands<'_>,
    count: usize,
    out: &mut [[i32; TILE_ATOMS]],
    add_products: impl Fn(__m256i, __m256i, __m256i) -> __m256i,
) {
    let tiles = out.len() / count;
    let all = operands.tiles.as_chunks::<QUAD_BYTES>().0;
    for (t, tile) in all.chunks_exact(operands.quads).take(tiles).enumerate() {
        for (part, starts) in operands.starts[..count].chunks(AT_ONCE).enumerate() {
            let first = part * AT_ONCE;
            // SAFETY: AVX2 is there; a result has 16 numbers, half of them from either half's place on.
            unsafe {
                let sums = tile_sums(operands, tile, first, starts, &add_products);
                for (v, sums) in sums.into_iter().enumerate().take(starts.len()) {
                    let out = out[(first + v) * tiles + t].as_mut_ptr();
                    _mm256_storeu_si256(out.cast(), sums[0]);
                    _mm256_storeu_si256(out.add(TILE_ATOMS / 2).cast(), sums[1]);
                }
            }
        }
    }
}

/// Scans with `add_products`, which adds the products of eight quads to eight sums.
///
/// # Safety
/// Needs AVX2; sizes as [`scan`](super::scan) checks them.
#[inline(always)]
unsafe fn tile_by_tile(
    operands: Operands<'_>,
    out: &mut [f32],
    largest: &mut [[f32; TILE_ATOMS]],
    add_products: impl Fn(__m256i, __m256i, __m256i) -> __m256i,
) {
    /// Atoms of half a tile.
    const HALF: usize = TILE_ATOMS / 2;
    let (quads, row) = (operands.quads, operands.row());
    out.fill(0.0);
    let tiles = operands.tiles.chunks_exact(quads * QUAD_BYTES);
    let scales = operands.scales.chunks_exact(TILE_ATOMS);
    for (t, (tile, scales)) in tiles.zip(scales).enumerate() {
        let tile = tile.as_chunks::<QUAD_BYTES>().0;
        let parts = largest
            .chunks_mut(AT_ONCE)
            .zip(operands.starts.chunks(AT_ONCE));
        for (part, (largest, starts)) in parts.enumerate() {
            let first = part * AT_ONCE;
            // SAFETY: AVX2 is there; scales, results and the largest have 16 numbers, half of them from either half's place
            // on.
            unsafe {
                let sums = tile_sums(operands, tile, first, starts, &add_products);
                for (v, (largest, sums)) in largest.iter_mut().zip(sums).enumerate() {
                    let place = (first + v) * row + t / STRIP_TILES * TILE_ATOMS;
                    let out = &mut out[place..][..TILE_ATOMS];
                    for (half, sum) in sums.into_iter().enumerate() {
                        let scales = _mm256_loadu_ps(scales[half * HALF..].as_ptr());
                        let magnitude = _mm256_cvtepi32_ps(_mm256_abs_epi32(sum));
                        let scaled = _mm256_mul_ps(magnitude, scales);
                        for max in [&mut out[half * HALF..], &mut largest[half * HALF..]] {
                            let max = max.as_mut_ptr();
                            _mm256_storeu_ps(max, _mm256_max_ps(_mm256_loadu_ps(max), scaled));
                        }
                    }
                }
            }
        }
    }
}

/// Numbers that are compared at a time: a bit each.
const BLOCK: usize = 64;

/// Appends the numbers of those entries of `a` that are at least `enough`, which `mask_of` says of a block.
#[inline(always)]
fn at_least_by(
    a: &[f32],
    enough: f32,
    found: &mut Vec<u32>,
    mask_of: impl Fn(&[f32; BLOCK]) -> u64,
) {
    let (blocks, rest) = a.as_chunks::<BLOCK>();
    for (number, block) in blocks.iter().enumerate() {
        let mut mask = mask_of(block);
        while mask != 0 {
            found.push((number * BLOCK) as u32 + mask.trailing_zeros());
            mask &= mask - 1;
        }
    }
    let first = (a.len() - rest.len()) as u32;
    let large = (first..).zip(rest).filter(|(_, x)| **x >= enough);
    found.extend(large.map(|(i, _)| i));
}
