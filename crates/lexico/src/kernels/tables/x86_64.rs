//! The products in AMX's tiles, of atoms that are kept in 8 bits. Queries and weights are rounded to 23 bits of the largest,
//! nearly as exact as f32, and taken apart into three digits of 8 bits; sums of integers lose nothing.

use core::arch::x86_64::*;

use super::{Products, Sums};
use crate::kernels::amx::{self, DEPTH, DIGITS, Digits, SIDE, Tile, Tiles};
use crate::kernels::{ROUNDING, prefetch_first};

/// The largest number of three digits, each from −127 to 127, that [`ROUNDING`] leaves exact.
const MOST: f32 = (63 * 0x1_0000 + 127 * 0x101) as f32;
/// Added to a number of three digits, this makes each of its lower three bytes a digit plus 128.
const BALANCE: i32 = 0x80_8080;
/// Numbers of which nothing is left: their unit would have no inverse in f32.
const NOTHING: f32 = 1e-30;
/// Atoms whose weights have one unit, and whose numbers are taken apart at a time: they stay in the second cache.
const BLOCK: usize = 512;

/// What numbers are multiples of.
#[derive(Clone, Copy)]
struct Unit {
    unit: f32,
    inverse: f32,
}

impl Unit {
    /// The unit of numbers of which the largest magnitude has these bits: not a number where one of them is not finite.
    fn new(largest: u32) -> Self {
        let largest = f32::from_bits(largest);
        let (unit, inverse) = match largest {
            _ if !largest.is_finite() => (f32::NAN, 0.0),
            _ if largest < NOTHING => (0.0, 0.0),
            _ => (largest / MOST, MOST / largest),
        };
        Self { unit, inverse }
    }

    /// The digits of the multiple that is nearest to `x`, the lowest first and a byte each; any where `x` is not finite.
    #[inline(always)]
    fn digits(self, x: f32) -> i32 {
        let multiple = (x * self.inverse + ROUNDING).to_bits() as i32 - ROUNDING.to_bits() as i32;
        multiple.wrapping_add(BALANCE) ^ BALANCE
    }
}

/// Bits of a number without its sign: in the order of magnitudes, those that are not finite the largest.
#[inline(always)]
fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// What a row of sums of digits' products stands for, in units.
#[inline(always)]
fn values(sums: &Digits<amx::Sums>, row: usize) -> [f32; SIDE] {
    let [low, middle, high] = sums.each_ref().map(|sums| &sums.0[row]);
    let mut values = [0f32; SIDE];
    for i in 0..SIDE {
        let upper = (high[i] as f32).mul_add(256.0, middle[i] as f32);
        values[i] = upper.mul_add(256.0, low[i] as f32);
    }
    values
}

/// The queries of as many heads as a tile takes.
struct Queries {
    /// For each tile's depth of `m`.
    columns: Vec<Digits<Tile>>,
    units: [f32; SIDE],
}

impl Queries {
    fn new(heads: &[Products<'_>], m: usize) -> Self {
        let mut columns = vec![[Tile::ZEROS; DIGITS]; m.div_ceil(DEPTH)];
        let mut units = [0.0; SIDE];
        let queries = heads.iter().flat_map(|head| head.queries.chunks_exact(m));
        for ((column, query), place) in queries.enumerate().zip(&mut units) {
            let unit = Unit::new(query.iter().map(|&x| magnitude(x)).fold(0, u32::max));
            for (k, &x) in query.iter().enumerate() {
                let at = (k % DEPTH / 4 * SIDE + column) * 4 + k % 4;
                let tiles = &mut columns[k / DEPTH];
                for (tile, digit) in tiles.iter_mut().zip(unit.digits(x).to_le_bytes()) {
                    tile.0[at] = digit as i8;
                }
            }
            *place = unit.unit;
        }
        Self { columns, units }
    }
}

/// # Safety
/// Needs AMX and AVX-512; sizes as [`products`](super::products) checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn products(
    numbers: &[i8],
    units: &[f32],
    m: usize,
    group: usize,
    heads: &mut [Products<'_>],
) {
    match group {
        1 => products_of::<1>(numbers, units, m, heads),
        2 => products_of::<2>(numbers, units, m, heads),
        4 => products_of::<4>(numbers, units, m, heads),
        8 => products_of::<8>(numbers, units, m, heads),
        _ => products_of::<16>(numbers, units, m, heads),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn products_of<const G: usize>(
    numbers: &[i8],
    units: &[f32],
    m: usize,
    heads: &mut [Products<'_>],
) {
    let depth = m.div_ceil(DEPTH);
    let queries: Vec<Queries> = heads
        .chunks(SIDE / G)
        .map(|heads| Queries::new(heads, m))
        .collect();
    let most = heads.iter().map(|head| head.atoms).max().unwrap_or(0);
    let mut room = Vec::new();
    let mut sums = [amx::Sums::ZEROS; DIGITS];
    // SAFETY: the level is only where tiles are, and none are made within this.
    let tiles = unsafe { Tiles::new() };
    for first in (0..most).step_by(SIDE) {
        // What lies behind an atom's end is multiplied with zeros, but must be there.
        let own = &numbers[first * m..];
        let (rows, stride) = if own.len() >= (SIDE - 1) * m + depth * DEPTH {
            (own, m)
        } else {
            room.clear();
            room.resize(SIDE * depth * DEPTH, 0);
            let places = room.chunks_exact_mut(depth * DEPTH);
            let atoms = places.zip(own.chunks_exact(m));
            atoms.for_each(|(place, atom)| place[..m].copy_from_slice(atom));
            (&room[..], depth * DEPTH)
        };
        prefetch_first(own.get(SIDE * m..).unwrap_or(&[]));
        for (queries, heads) in queries.iter().zip(heads.chunks_mut(SIDE / G)) {
            if heads.iter().all(|head| head.atoms <= first) {
                continue;
            }
            // SAFETY: sixteen rows of the columns' depth are there.
            unsafe { tiles.rows_by_digits(rows.as_ptr(), stride, &queries.columns, &mut sums) };
            let mut products = [[0f32; SIDE]; SIDE];
            let rows = products.iter_mut().zip(&units[first..]);
            for (row, (products, unit)) in rows.enumerate() {
                let values = values(&sums, row);
                for i in 0..SIDE {
                    products[i] = values[i] * (unit * queries.units[i]);
                }
            }
            for (h, head) in heads.iter_mut().enumerate() {
                let (out, _) = head.out.as_chunks_mut::<G>();
                let out = &mut out[first.min(head.atoms)..(first + SIDE).min(head.atoms)];
                for (out, products) in out.iter_mut().zip(&products) {
                    out.copy_from_slice(&products[h * G..][..G]);
                }
            }
        }
    }
}

/// # Safety
/// Needs AMX and AVX-512; sizes as [`sums`](super::sums) checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn sums(
    numbers: &[i8],
    units: &[f32],
    m: usize,
    group: usize,
    heads: &mut [Sums<'_>],
) {
    match group {
        1 => sums_of::<1>(numbers, units, m, heads),
        2 => sums_of::<2>(numbers, units, m, heads),
        4 => sums_of::<4>(numbers, units, m, heads),
        8 => sums_of::<8>(numbers, units, m, heads),
        _ => sums_of::<16>(numbers, units, m, heads),
    }
}

/// Tiles of columns that the numbers of an atom up to a row's depth make.
const PARTS: usize = DEPTH / SIDE;

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sums_of<const G: usize>(numbers: &[i8], units: &[f32], m: usize, heads: &mut [Sums<'_>]) {
    let tiles_across = m.div_ceil(DEPTH) * PARTS;
    let most = heads.iter().map(|head| head.atoms).max().unwrap_or(0);
    let mut columns = vec![Tile::ZEROS; BLOCK / DEPTH * tiles_across];
    let mut rows = vec![[Tile::ZEROS; DIGITS]; BLOCK / DEPTH];
    let mut scaled = [[[0f32; SIDE]; G]; BLOCK / SIDE];
    let mut found = [amx::Sums::ZEROS; DIGITS];
    // Sums of each head's queries, columns in the order that `interleave` leaves them in.
    let mut sums = vec![[0f32; SIDE]; heads.len() * G * tiles_across];
    // SAFETY: the level is only where tiles are, and none are made within this.
    let tiles = unsafe { Tiles::new() };
    for first in (0..most).step_by(BLOCK) {
        let count = BLOCK.min(most - first);
        let depth = count.div_ceil(DEPTH);
        interleave(
            &numbers[first * m..][..count * m],
            m,
            depth,
            &mut columns[..depth * tiles_across],
        );
        let all = heads
            .chunks(SIDE / G)
            .zip(sums.chunks_mut(SIDE * tiles_across));
        for (heads, sums) in all {
            let mut row_units = [0f32; SIDE];
            let rows = &mut rows[..depth];
            if heads.iter().all(|head| head.atoms <= first) {
                continue;
            }
            for ((h, head), row_units) in heads.iter().enumerate().zip(row_units.as_chunks_mut().0)
            {
                let own = first.min(head.atoms)..(first + count).min(head.atoms);
                let weights = &head.weights.as_chunks::<G>().0[own.clone()];
                let scaled = &mut scaled[..depth * DEPTH / SIDE];
                *row_units = take_apart(weights, &units[own], h * G, rows, scaled);
            }
            for (across, columns) in columns.chunks_exact(depth).take(tiles_across).enumerate() {
                tiles.digits_by_columns(rows, columns, &mut found);
                let queries = sums.chunks_exact_mut(tiles_across).zip(row_units);
                for (row, (sums, unit)) in queries.enumerate() {
                    let (values, sums) = (values(&found, row), &mut sums[across]);
                    for i in 0..SIDE {
                        sums[i] = values[i].mul_add(unit, sums[i]);
                    }
                }
            }
        }
    }
    let queries = heads
        .iter_mut()
        .flat_map(|head| head.out.chunks_exact_mut(m));
    for (out, sums) in queries.zip(sums.chunks_exact(tiles_across)) {
        for (k, out) in out.iter_mut().enumerate() {
            // As the unpacking leaves them: four numbers of each sixteen to a tile.
            let (across, part) = (k / DEPTH, k % SIDE / 4);
            *out += sums[across * PARTS + part][k % DEPTH / SIDE * 4 + k % 4];
        }
    }
}

/// Writes weights times their atoms' units to rows `first` to `first + G` of tiles of digits, and returns the rows' units. `scaled` is room
/// for as many weights as the tiles have.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn take_apart<const G: usize>(
    weights: &[[f32; G]],
    units: &[f32],
    first: usize,
    rows: &mut [Digits<Tile>],
    scaled: &mut [[[f32; SIDE]; G]],
) -> [f32; G] {
    let without_sign = _mm512_set1_epi32(i32::MAX);
    let mut largest = [_mm512_setzero_si512(); G];
    for (number, scaled) in scaled.iter_mut().enumerate() {
        let from = number * SIDE;
        let own = weights.get(from..).unwrap_or(&[]).as_flattened();
        let units = units.get(from..).unwrap_or(&[]);
        let parts: [__m512; G] = core::array::from_fn(|g| load(&own[own.len().min(g * SIDE)..]));
        let units = load(units);
        for ((own, scaled), largest) in by_query(parts).into_iter().zip(scaled).zip(&mut largest) {
            let own = _mm512_mul_ps(own, units);
            // SAFETY: sixteen numbers.
            unsafe { _mm512_storeu_ps(scaled.as_mut_ptr(), own) };
            let magnitude = _mm512_and_si512(_mm512_castps_si512(own), without_sign);
            *largest = _mm512_max_epu32(*largest, magnitude);
        }
    }
    let row_units = largest.map(|largest| Unit::new(_mm512_reduce_max_epu32(largest)));
    for (tiles, scaled) in rows.iter_mut().zip(scaled.chunks_exact(DEPTH / SIDE)) {
        for (part, scaled) in scaled.iter().enumerate() {
            for (g, (scaled, unit)) in scaled.iter().zip(&row_units).enumerate() {
                let digits = scaled.map(|x| unit.digits(x));
                let place = (first + g) * DEPTH + part * SIDE;
                for (digit, tile) in tiles.iter_mut().enumerate() {
                    let bytes = digits.map(|x| (x >> (8 * digit)) as i8);
                    tile.0[place..][..SIDE].copy_from_slice(&bytes);
                }
            }
        }
    }
    row_units.map(|unit| unit.unit)
}

/// The first sixteen numbers of a slice, zeros where there are fewer.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn load(numbers: &[f32]) -> __m512 {
    let mask = u16::MAX.unbounded_shr((SIDE - SIDE.min(numbers.len())) as u32);
    // SAFETY: the mask ends where the numbers do.
    unsafe { _mm512_maskz_loadu_ps(mask, numbers.as_ptr()) }
}

/// Takes sixteen atoms' weights `[16, G]` to `[G, 16]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn by_query<const G: usize>(mut parts: [__m512; G]) -> [__m512; G] {
    let evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    // Every round takes numbers of even and of odd queries apart.
    let mut width = G;
    while width > 1 {
        for run in parts.chunks_exact_mut(width) {
            let mut apart = [_mm512_setzero_ps(); G];
            for pair in 0..width / 2 {
                let (a, b) = (run[2 * pair], run[2 * pair + 1]);
                apart[pair] = _mm512_permutex2var_ps(a, evens, b);
                apart[pair + width / 2] = _mm512_permutex2var_ps(a, odds, b);
            }
            run.copy_from_slice(&apart[..width]);
        }
        width /= 2;
    }
    // Queries come out in the order of their bits reversed.
    let bits = G.trailing_zeros();
    core::array::from_fn(|g| match bits {
        0 => parts[g],
        _ => parts[g.reverse_bits() >> (usize::BITS - bits)],
    })
}

/// Writes `[n, m]` numbers as columns, `[m / 64, 4, depth]` tiles, filled up with zeros: the four numbers of a column's row are those of four
/// rows here. Column `4 · l + k` of part `j` is number `16 · l + 4 · j + k` of 64, as unpacking within lanes leaves them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn interleave(numbers: &[i8], m: usize, depth: usize, columns: &mut [Tile]) {
    let count = numbers.len() / m;
    for (chunk, columns) in columns.chunks_exact_mut(PARTS * depth).enumerate() {
        let from = chunk * DEPTH;
        let mask = u64::MAX >> (DEPTH - DEPTH.min(m - from));
        let row = |i: usize| {
            if i < count {
                // SAFETY: the mask ends where the row does.
                unsafe { _mm512_maskz_loadu_epi8(mask, numbers[i * m + from..].as_ptr()) }
            } else {
                _mm512_setzero_si512()
            }
        };
        for quad in 0..depth * SIDE {
            let rows: [__m512i; 4] = core::array::from_fn(|r| row(quad * 4 + r));
            let low = [
                _mm512_unpacklo_epi8(rows[0], rows[1]),
                _mm512_unpacklo_epi8(rows[2], rows[3]),
            ];
            let high = [
                _mm512_unpackhi_epi8(rows[0], rows[1]),
                _mm512_unpackhi_epi8(rows[2], rows[3]),
            ];
            let parts = [
                _mm512_unpacklo_epi16(low[0], low[1]),
                _mm512_unpackhi_epi16(low[0], low[1]),
                _mm512_unpacklo_epi16(high[0], high[1]),
                _mm512_unpackhi_epi16(high[0], high[1]),
            ];
            for (j, part) in parts.into_iter().enumerate() {
                let tile = &mut columns[j * depth + quad / SIDE].0;
                let place = &mut tile.as_chunks_mut::<DEPTH>().0[quad % SIDE];
                // SAFETY: a row of a tile has 64 bytes.
                unsafe { _mm512_storeu_si512(place.as_mut_ptr().cast(), part) };
            }
        }
    }
}
