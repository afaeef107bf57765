//! What a beam search makes of rounded products: gains of sums that are continued with each atom of a codebook, and of those that
//! may be among the largest the exact ones, and what they leave.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
use super::amx::HalfTile;
#[cfg(target_arch = "x86_64")]
use super::level::{Level, level};
use super::rows::{Number, Rows, with_numbers};
use super::scan::{RoundedAtoms, TILE_ATOMS};
use super::{compile, dispatch};

compile! {
    gains(
        products: &[[i32; TILE_ATOMS]], sums: &[Continued], units: &[[f32; TILE_ATOMS]], losses: &[[f32; TILE_ATOMS]],
        out: &mut [[f32; TILE_ATOMS]]
    ) -> [[f32; TILE_ATOMS]; 2];
    nth_largest(numbers: &[f32], n: usize) -> f32;
    products_of(pairs: &[Pair], atoms: &[impl Number], units: &[f32], residuals: &[f32], m: usize, out: &mut [f32]);
    rests(pairs: &[Pair], atoms: &[impl Number], units: &[f32], residuals: &[f32], m: usize, out: &mut [f32]);
}

/// A sum of atoms that is to be continued with one of a codebook's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Continued {
    /// The unit that numbers of what is left of its vector are multiples of.
    pub(crate) unit: f32,
    /// By how much half the squared distance to the vector fell with it.
    pub(crate) gain: f32,
}

/// A sum and the atom that it is continued with, by their numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pair {
    pub(crate) sum: u32,
    pub(crate) atom: u32,
}

/// Gains of sums with a codebook's atoms that are so exact that they need not be compared once more, where the level has them.
#[cfg(target_arch = "x86_64")]
#[derive(Default)]
pub(crate) struct ExactGains {
    /// The atoms, `[tiles, depth]`, filled up.
    columns: Vec<HalfTile>,
    /// Tiles that an atom's numbers fill.
    depth: usize,
    /// What bf16 keeps of the residuals' numbers, and what it keeps of the rest.
    high: Vec<u16>,
    low: Vec<u16>,
    /// Products of all sums, `[sums, tiles]`, filled up.
    products: Vec<[f32; TILE_ATOMS]>,
}

#[cfg(target_arch = "x86_64")]
impl ExactGains {
    /// Begins with a codebook: `rounded` are its atoms, which are kept as `atoms`. Returns whether there are such gains of it here.
    pub(crate) fn begin(&mut self, atoms: Rows<'_>, rounded: &RoundedAtoms, tiles: usize) -> bool {
        let are_had = level() == Level::Amx && matches!(atoms, Rows::I8 { .. });
        if are_had {
            // SAFETY: the level has AVX-512.
            unsafe { x86_64::begin(self, rounded, tiles) };
        }
        are_had
    }

    /// Tiles of atoms in a row of products.
    fn across(&self) -> usize {
        self.columns.len() / self.depth.max(1)
    }

    /// Multiplies residuals `[n, m]`, none of whose numbers may be near f32's largest, with the codebook's atoms.
    ///
    /// # Panics
    /// Where there are no such gains, or residuals are longer than atoms.
    pub(crate) fn multiply(&mut self, residuals: &[f32], m: usize) {
        assert!(level() == Level::Amx, "a level that has such gains");
        assert!(
            m > 0 && m <= self.depth * super::amx::HALF_DEPTH,
            "residuals of the codebook's length"
        );
        // SAFETY: the level has tiles and AVX-512, and the sizes have been checked.
        unsafe { x86_64::multiply(self, residuals, m) };
    }

    /// As [`gains`], of some of the residuals that were multiplied, from number `first` on, and their `sums`' own gains.
    ///
    /// # Panics
    /// Where there are not so many, or one of the slices has not a number for each sum and atom.
    pub(crate) fn gains(
        &self,
        first: usize,
        sums: &[f32],
        units: &[[f32; TILE_ATOMS]],
        losses: &[[f32; TILE_ATOMS]],
        out: &mut [[f32; TILE_ATOMS]],
    ) -> [[f32; TILE_ATOMS]; 2] {
        assert!(level() == Level::Amx, "a level that has such gains");
        let across = self.across();
        let products = &self.products[first * across..(first + sums.len()) * across];
        assert!(
            units.len() == losses.len() && losses.len() <= across,
            "a number for each atom"
        );
        assert_eq!(out.len(), sums.len() * losses.len(), "a gain of each");
        let products = products.chunks_exact(across);
        // SAFETY: the level has AVX-512.
        unsafe { x86_64::gains(products, sums, units, losses, out) }
    }
}

/// No level has them here.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Default)]
pub(crate) struct ExactGains;

#[cfg(not(target_arch = "x86_64"))]
impl ExactGains {
    pub(crate) fn begin(&mut self, _: Rows<'_>, _: &RoundedAtoms, _: usize) -> bool {
        false
    }

    pub(crate) fn multiply(&mut self, _: &[f32], _: usize) {}

    pub(crate) fn gains(
        &self,
        _: usize,
        _: &[f32],
        _: &[[f32; TILE_ATOMS]],
        _: &[[f32; TILE_ATOMS]],
        _: &mut [[f32; TILE_ATOMS]],
    ) -> [[f32; TILE_ATOMS]; 2] {
        [[0.0; TILE_ATOMS]; 2]
    }
}

/// By how much half the squared distance falls with each of `sums` and each atom, `out` `[sums, tiles]`: the sum's own gain, and
/// their product less half the atom's squared length (`losses`). `products` are in the units of the sum and of the atom.
/// Returns the largest gain with the atoms of each place of a tile, of even and of odd ones.
///
/// # Panics
/// Where one of the slices has not a number for each sum and atom.
pub(crate) fn gains(
    products: &[[i32; TILE_ATOMS]],
    sums: &[Continued],
    units: &[[f32; TILE_ATOMS]],
    losses: &[[f32; TILE_ATOMS]],
    out: &mut [[f32; TILE_ATOMS]],
) -> [[f32; TILE_ATOMS]; 2] {
    let tiles = losses.len();
    assert_eq!(units.len(), tiles, "a number for each atom");
    let pairs = sums.len() * tiles;
    assert!(
        products.len() == pairs && out.len() == pairs,
        "a number for each sum and atom"
    );
    dispatch!(gains(products, sums, units, losses, out))
}

/// The `n`-th largest of some numbers, −∞ where there are fewer. `O(N²)`, without a branch, for few numbers; `O(N)` for many.
pub(crate) fn nth_largest(numbers: &[f32], n: usize) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if (n..=x86_64::FEW).contains(&numbers.len()) && level().has_avx512() {
        // SAFETY: the level has AVX-512.
        return unsafe { x86_64::nth_of_few(numbers, n) };
    }
    dispatch!(nth_largest(numbers, n))
}

fn check(pairs: &[Pair], atoms: Rows<'_>, residuals: &[f32], m: usize) {
    assert!(m > 0, "numbers");
    let (atoms, sums) = (atoms.len() / m, residuals.len() / m);
    for pair in pairs {
        let there = (pair.atom as usize) < atoms && (pair.sum as usize) < sums;
        assert!(there, "sums and atoms that there are");
    }
}

/// `out[i] = ⟨atom, residual⟩` of each pair, of `atoms` `[N, m]` and `residuals` `[sums, m]`.
///
/// # Panics
/// Where a pair names what is not there, or there is no place for each.
pub(crate) fn products_of(
    pairs: &[Pair],
    atoms: Rows<'_>,
    residuals: &[f32],
    m: usize,
    out: &mut [f32],
) {
    check(pairs, atoms, residuals, m);
    assert_eq!(out.len(), pairs.len(), "a place for each");
    with_numbers!(atoms, (numbers, units) => {
        dispatch!(products_of(pairs, numbers, units, residuals, m, out));
    });
}

/// `out[i] = residual − atom` of each pair, `[pairs, m]`, of `atoms` `[N, m]` and `residuals` `[sums, m]`.
///
/// # Panics
/// Where a pair names what is not there, or there is no place for each.
pub(crate) fn rests(pairs: &[Pair], atoms: Rows<'_>, residuals: &[f32], m: usize, out: &mut [f32]) {
    check(pairs, atoms, residuals, m);
    assert_eq!(out.len(), pairs.len() * m, "a place for each");
    with_numbers!(atoms, (numbers, units) => {
        dispatch!(rests(pairs, numbers, units, residuals, m, out));
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::testing::{at_level, levels};

    proptest! {
        #[test]
        fn gains_agree_with_f64(
            sums in prop::collection::vec((0.01f32..2.0, -3f32..3.0), 1..10), tiles in 1usize..5, seed: u32,
        ) {
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32
            };
            let sums: Vec<Continued> = sums.into_iter().map(|(unit, gain)| Continued { unit, gain }).collect();
            let mut tile = || std::array::from_fn(|_| draw());
            let units: Vec<[f32; TILE_ATOMS]> = (0..tiles).map(|_| tile()).collect();
            let losses: Vec<[f32; TILE_ATOMS]> = (0..tiles).map(|_| tile()).collect();
            let products: Vec<[i32; TILE_ATOMS]> =
                (0..sums.len() * tiles).map(|_| tile().map(|x| ((x - 0.5) * 2000.0) as i32)).collect();
            let mut out = vec![[f32::NAN; TILE_ATOMS]; products.len()];
            for level in levels() {
                let mut largest = [[f32::NAN; TILE_ATOMS]; 2];
                at_level(level, || largest = gains(&products, &sums, &units, &losses, &mut out));
                let mut most = [[f32::NEG_INFINITY; TILE_ATOMS]; 2];
                for (v, sum) in sums.iter().enumerate() {
                    for t in 0..tiles {
                        for l in 0..TILE_ATOMS {
                            let product = f64::from(products[v * tiles + t][l]) * f64::from(units[t][l]) * f64::from(sum.unit);
                            let gain = f64::from(sum.gain) + product - f64::from(losses[t][l]);
                            let found = out[v * tiles + t][l];
                            prop_assert!((f64::from(found) - gain).abs() <= 1e-6 * (product.abs() + 4.0), "{found} for {gain}");
                            most[t % 2][l] = most[t % 2][l].max(found);
                        }
                    }
                }
                prop_assert_eq!(largest, most, "{:?}", level);
            }
        }

        #[test]
        fn exact_gains_agree_with_f64(m in 1usize..200, atoms in 1usize..200, count in 1usize..80, seed: u32) {
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            let numbers: Vec<i8> = (0..atoms * m).map(|_| (draw() * 127.4) as i8).collect();
            let units: Vec<f32> = (0..atoms).map(|_| draw().abs() + 0.1).collect();
            let rows = Rows::I8 { numbers: &numbers, units: &units };
            let rounded = RoundedAtoms::new(rows, m);
            let residuals: Vec<f32> = (0..count * m).map(|_| 5.0 * draw()).collect();
            let sums: Vec<f32> = (0..count).map(|_| draw()).collect();
            let tiles = atoms.div_ceil(TILE_ATOMS);
            let losses: Vec<[f32; TILE_ATOMS]> = (0..tiles).map(|_| [(); TILE_ATOMS].map(|()| draw())).collect();
            for level in levels() {
                let mut exact = ExactGains::default();
                let mut out = vec![[f32::NAN; TILE_ATOMS]; count * tiles];
                let mut most = [[f32::NAN; TILE_ATOMS]; 2];
                let (mut are_had, first) = (false, count / 3);
                out.truncate((count - first) * tiles);
                at_level(level, || {
                    // What another codebook and other residuals left does not matter.
                    let other = RoundedAtoms::new(Rows::I8 { numbers: &[5; 900], units: &[1.0; 3] }, 300);
                    exact.begin(rows, &other, 1);
                    are_had = exact.begin(rows, &rounded, tiles);
                    if are_had {
                        let units = &rounded.units()[..tiles];
                        exact.multiply(&residuals, m);
                        most = exact.gains(first, &sums[first..], units, &losses, &mut out);
                    }
                });
                if !are_had {
                    continue;
                }
                for (v, residual) in residuals.chunks(m).enumerate().skip(first) {
                    let out = &out[(v - first) * tiles..][..tiles];
                    for (i, atom) in numbers.chunks(m).enumerate() {
                        let (t, l) = (i / TILE_ATOMS, i % TILE_ATOMS);
                        let unit = f64::from(units[i]);
                        let terms = atom.iter().zip(residual).map(|(&a, &r)| unit * f64::from(a) * f64::from(r));
                        let exact = terms.clone().sum::<f64>() + f64::from(sums[v]) - f64::from(losses[t][l]);
                        let size = terms.map(f64::abs).sum::<f64>() + 2.0;
                        prop_assert!((f64::from(out[t][l]) - exact).abs() <= 8e-6 * size, "{:?}: {} for {}", level, out[t][l], exact);
                    }
                }
                for (parity, most) in most.iter().enumerate() {
                    for (l, &most) in most.iter().enumerate() {
                        let own = out.chunks(tiles).flat_map(|out| out.iter().skip(parity).step_by(2).map(|out| out[l]));
                        prop_assert_eq!(most, own.fold(f32::NEG_INFINITY, f32::max), "{:?}", level);
                    }
                }
            }
        }

        #[test]
        fn the_nth_largest_is_where_sorting_has_it(numbers in prop::collection::vec(-9i8..9, 0..200), n in 1usize..210) {
            let numbers: Vec<f32> = numbers.into_iter().map(f32::from).collect();
            let mut sorted = numbers.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let wanted = sorted.get(n - 1).copied().unwrap_or(f32::NEG_INFINITY);
            for level in levels() {
                at_level(level, || assert_eq!(super::nth_largest(&numbers, n), wanted, "{level:?}"));
            }
        }

        #[test]
        fn pairs_agree_with_f64(
            m in 1usize..150, in_bytes: bool, pairs in prop::collection::vec((0u32..5, 0u32..20), 0..30), seed: u32,
        ) {
            let mut state = seed;
            let mut draw = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            let bytes: Vec<i8> = (0..20 * m).map(|_| (draw() * 127.0) as i8).collect();
            let units: Vec<f32> = (0..20).map(|_| draw()).collect();
            let mut atoms: Vec<f32> = (0..20 * m).map(|_| draw()).collect();
            let rows = if in_bytes {
                atoms = bytes.iter().enumerate().map(|(i, &x)| f32::from(x) * units[i / m]).collect();
                Rows::I8 { numbers: &bytes, units: &units }
            } else {
                Rows::F32(&atoms)
            };
            let residuals: Vec<f32> = (0..5 * m).map(|_| draw()).collect();
            let pairs: Vec<Pair> = pairs.into_iter().map(|(sum, atom)| Pair { sum, atom }).collect();
            for level in levels() {
                let (mut products, mut left) = (vec![f32::NAN; pairs.len()], vec![f32::NAN; pairs.len() * m]);
                at_level(level, || {
                    products_of(&pairs, rows, &residuals, m, &mut products);
                    rests(&pairs, rows, &residuals, m, &mut left);
                });
                for ((pair, &product), left) in pairs.iter().zip(&products).zip(left.chunks(m)) {
                    let atom = atoms[pair.atom as usize * m..][..m].iter();
                    let residual = &residuals[pair.sum as usize * m..][..m];
                    let both = atom.zip(residual).map(|(&a, &r)| (f64::from(a), f64::from(r)));
                    let exact: f64 = both.clone().map(|(a, r)| a * r).sum();
                    let size: f64 = both.clone().map(|(a, r)| (a * r).abs()).sum();
                    prop_assert!((f64::from(product) - exact).abs() <= 1e-5 * size, "{:?}: {} for {}", level, product, exact);
                    for (&left, (a, r)) in left.iter().zip(both) {
                        prop_assert!((f64::from(left) - (r - a)).abs() <= 1e-6 * (a.abs() + r.abs()), "{:?}", level);
                    }
                }
            }
        }
    }
}
