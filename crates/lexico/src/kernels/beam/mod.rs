//! What a beam search makes of rounded products: gains of sums that are continued with each atom of a codebook.

mod portable;

use super::scan::TILE_ATOMS;
use super::{compile, dispatch};

compile! {
    gains(
        products: &[[i32; TILE_ATOMS]], sums: &[Continued], units: &[[f32; TILE_ATOMS]], losses: &[[f32; TILE_ATOMS]],
        out: &mut [[f32; TILE_ATOMS]], largest: &mut [[f32; TILE_ATOMS]]
    );
}

/// A sum of atoms that is to be continued with one of a codebook's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Continued {
    /// The unit that numbers of what is left of its vector are multiples of.
    pub(crate) unit: f32,
    /// By how much half the squared distance to the vector fell with it.
    pub(crate) gain: f32,
}

/// By how much half the squared distance falls with each of `sums` and each atom, `out` `[sums, tiles]`: the sum's own gain, and
/// their product less half the atom's squared length (`losses`). `products` are in the units of the sum and of the atom.
/// `largest` has the largest gain with each atom.
///
/// # Panics
/// Where one of the slices has not a number for each sum and atom.
pub(crate) fn gains(
    products: &[[i32; TILE_ATOMS]],
    sums: &[Continued],
    units: &[[f32; TILE_ATOMS]],
    losses: &[[f32; TILE_ATOMS]],
    out: &mut [[f32; TILE_ATOMS]],
    largest: &mut [[f32; TILE_ATOMS]],
) {
    let tiles = losses.len();
    assert!(
        units.len() == tiles && largest.len() == tiles,
        "a number for each atom"
    );
    let pairs = sums.len() * tiles;
    assert!(
        products.len() == pairs && out.len() == pairs,
        "a number for each sum and atom"
    );
    dispatch!(gains(products, sums, units, losses, out, largest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::testing::every_level;

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
            let mut largest = vec![[f32::NAN; TILE_ATOMS]; tiles];
            for () in every_level!(gains(&products, &sums, &units, &losses, &mut out, &mut largest)) {
                for t in 0..tiles {
                    for l in 0..TILE_ATOMS {
                        let own = sums.iter().enumerate().map(|(v, sum)| {
                            let product = f64::from(products[v * tiles + t][l]) * f64::from(units[t][l]) * f64::from(sum.unit);
                            let gain = f64::from(sum.gain) + product - f64::from(losses[t][l]);
                            let found = f64::from(out[v * tiles + t][l]);
                            assert!((found - gain).abs() <= 1e-6 * (product.abs() + 4.0), "{found} for {gain}");
                            out[v * tiles + t][l]
                        });
                        let most = own.fold(f32::NEG_INFINITY, f32::max);
                        prop_assert_eq!(largest[t][l], most);
                    }
                }
            }
        }
    }
}
