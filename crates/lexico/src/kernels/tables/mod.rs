//! The two products that attention on codes makes with a dictionary: of all its atoms with the queries of several heads, and of weights
//! of all its atoms, summed, for each of their queries.
//!
//! There is no plain form: where there are no tiles, `dense` multiplies a block of atoms at a time with the queries of one head after the other.

#[cfg(target_arch = "x86_64")]
mod x86_64;

use super::dense::{self, combine, dots};
#[cfg(target_arch = "x86_64")]
use super::level::{Level, level};
use super::rows::Rows;

/// Atoms that are read at a time, for all heads: they stay in the first cache.
const BLOCK: usize = 64;
/// Queries of the largest group that there are kernels for: those of two query groups of heads that are coded together.
pub(crate) const MAX_GROUP: usize = 2 * dense::MAX_GROUP;

/// A head's queries, and where their products with atoms go.
pub(crate) struct Products<'a> {
    /// `[group, m]`
    pub(crate) queries: &'a [f32],
    /// How many of the atoms, from the first on, are wanted.
    pub(crate) atoms: usize,
    /// `[atoms, group]`, or longer.
    pub(crate) out: &'a mut [f32],
}

/// A head's weights of atoms, and where the sums of atoms by them go.
pub(crate) struct Sums<'a> {
    /// `[atoms, group]`, or longer.
    pub(crate) weights: &'a [f32],
    /// How many of the atoms, from the first on, have weights.
    pub(crate) atoms: usize,
    /// `[group, m]`, added to.
    pub(crate) out: &'a mut [f32],
}

fn check(rows: Rows<'_>, m: usize, group: usize) -> usize {
    let small = group.is_power_of_two() && group <= MAX_GROUP;
    assert!(small, "a small query group");
    assert!(m > 0 && rows.len().is_multiple_of(m), "whole rows");
    rows.len() / m
}

/// For each head `out[i][g] = ⟨rows_i, queries_g⟩` of the atoms that it wants. `group` is a power of two up to [`MAX_GROUP`].
pub(crate) fn products(rows: Rows<'_>, m: usize, group: usize, heads: &mut [Products<'_>]) {
    let count = check(rows, m, group);
    for head in &*heads {
        assert!(head.atoms <= count, "atoms that there are");
        assert_eq!(head.queries.len(), group * m, "whole queries");
        assert!(head.out.len() >= head.atoms * group, "room for products");
    }
    #[cfg(target_arch = "x86_64")]
    if let (Level::Amx, Rows::I8 { numbers, units }) = (level(), rows) {
        // SAFETY: the level is only where tiles are, and the sizes have been checked.
        unsafe { x86_64::products(numbers, units, m, group, heads) };
        return;
    }
    for first in (0..count).step_by(BLOCK) {
        for head in &mut *heads {
            let here = first.min(head.atoms)..(first + BLOCK).min(head.atoms);
            let rows = rows.part(here.start, here.len(), m);
            let out = &mut head.out[here.start * group..here.end * group];
            if group <= dense::MAX_GROUP {
                dots(rows, head.queries, m, group, out);
                continue;
            }
            for (half, queries) in head.queries.chunks_exact(HALF * m).enumerate() {
                let mut room = [0.0; BLOCK * HALF];
                let room = &mut room[..here.len() * HALF];
                dots(rows, queries, m, HALF, room);
                let own = out.chunks_exact_mut(group).zip(room.chunks_exact(HALF));
                own.for_each(|(out, own)| out[half * HALF..][..HALF].copy_from_slice(own));
            }
        }
    }
}

/// Queries that `dense` multiplies with at a time, of those that are too many for it.
const HALF: usize = dense::MAX_GROUP;

/// For each head `out[g] += Σ_i weights[i][g] · rows_i` over its atoms. `group` is a power of two up to [`MAX_GROUP`].
pub(crate) fn sums(rows: Rows<'_>, m: usize, group: usize, heads: &mut [Sums<'_>]) {
    let count = check(rows, m, group);
    for head in &*heads {
        assert!(head.atoms <= count, "atoms that there are");
        assert!(head.weights.len() >= head.atoms * group, "a weight each");
        assert_eq!(head.out.len(), group * m, "a sum a query");
    }
    #[cfg(target_arch = "x86_64")]
    if let (Level::Amx, Rows::I8 { numbers, units }) = (level(), rows) {
        // SAFETY: the level is only where tiles are, and the sizes have been checked.
        unsafe { x86_64::sums(numbers, units, m, group, heads) };
        return;
    }
    for first in (0..count).step_by(BLOCK) {
        for head in &mut *heads {
            let here = first.min(head.atoms)..(first + BLOCK).min(head.atoms);
            let rows = rows.part(here.start, here.len(), m);
            let weights = &head.weights[here.start * group..here.end * group];
            if group <= dense::MAX_GROUP {
                combine(weights, rows, m, group, head.out);
                continue;
            }
            for (half, out) in head.out.chunks_exact_mut(HALF * m).enumerate() {
                let mut room = [0.0; BLOCK * HALF];
                let room = &mut room[..here.len() * HALF];
                let own = weights.chunks_exact(group).zip(room.chunks_exact_mut(HALF));
                own.for_each(|(weights, own)| own.copy_from_slice(&weights[half * HALF..][..HALF]));
                combine(room, rows, m, HALF, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::level::Level;
    use crate::kernels::testing::{at_level, levels};

    /// Heads' queries or weights, and what the kernels made of them, `[heads, ·]` each.
    struct Made {
        products: Vec<Vec<f32>>,
        sums: Vec<Vec<f32>>,
    }

    /// Runs both at a level, from sums of 0.5; what is beyond a head's atoms is not a number before, and must stay so.
    fn made(
        level: Level,
        rows: Rows<'_>,
        (m, group): (usize, usize),
        wanted: &[usize],
        queries: &[Vec<f32>],
        weights: &[Vec<f32>],
    ) -> Made {
        let mut out: Vec<Vec<f32>> = weights.iter().map(|w| vec![f32::NAN; w.len()]).collect();
        let heads = out.iter_mut().zip(queries).zip(wanted);
        let heads = heads.map(|((out, queries), &atoms)| Products {
            queries,
            atoms,
            out,
        });
        let mut heads: Vec<Products<'_>> = heads.collect();
        at_level(level, || products(rows, m, group, &mut heads));
        let mut summed: Vec<Vec<f32>> = queries.iter().map(|q| vec![0.5; q.len()]).collect();
        let heads = summed.iter_mut().zip(weights).zip(wanted);
        let heads = heads.map(|((out, weights), &atoms)| Sums {
            weights,
            atoms,
            out,
        });
        let mut heads: Vec<Sums<'_>> = heads.collect();
        at_level(level, || sums(rows, m, group, &mut heads));
        Made {
            products: out,
            sums: summed,
        }
    }

    fn draws(seed: u32) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn both_agree_with_f64(
            n in 1usize..700, m in 1usize..200, power in 0u32..5, wanted in prop::collection::vec(0f32..1.2, 1..7),
            one_weight: bool, seed: u32,
        ) {
            let group = 1 << power;
            let mut draw = draws(seed);
            let numbers: Vec<i8> = (0..n * m).map(|_| (draw() * 127.4) as i8).collect();
            let units: Vec<f32> = (0..n).map(|_| draw() / 64.0).collect();
            let rows = Rows::I8 { numbers: &numbers, units: &units };
            let wide = numbers.iter().enumerate().map(|(i, &x)| f64::from(x) * f64::from(units[i / m]));
            let wide: Vec<f64> = wide.collect();
            let atom = |i: usize| wide[i * m..][..m].iter();
            let wanted: Vec<usize> = wanted.iter().map(|share| ((share * n as f32) as usize).min(n)).collect();
            let queries: Vec<Vec<f32>> = wanted.iter().map(|_| (0..group * m).map(|_| 30.0 * draw()).collect()).collect();
            let weights: Vec<Vec<f32>> = wanted
                .iter()
                .map(|_| {
                    // As of one position that has nearly all the weight.
                    let small = if one_weight { 1e-4 } else { 1.0 };
                    let mut weights: Vec<f32> = (0..n * group).map(|_| small * draw()).collect();
                    weights[seed as usize % (n * group)] = 1.0;
                    weights
                })
                .collect();
            for level in levels() {
                let made = made(level, rows, (m, group), &wanted, &queries, &weights);
                for (h, &wanted) in wanted.iter().enumerate() {
                    for g in 0..group {
                        let query = &queries[h][g * m..][..m];
                        let mut sums = vec![0.5f64; m];
                        let mut size = vec![0.5f64; m];
                        for i in 0..n {
                            let found = made.products[h][i * group + g];
                            if i >= wanted {
                                prop_assert!(found.is_nan(), "{:?}: nothing is written beyond", level);
                                continue;
                            }
                            let terms = atom(i).zip(query).map(|(x, &y)| x * f64::from(y));
                            let (product, terms) = terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
                            // A query's numbers are rounded as its largest, up to 30, is.
                            let terms = terms + 5.0 * atom(i).map(|x| x.abs()).sum::<f64>();
                            prop_assert!((f64::from(found) - product).abs() <= 1e-6 * terms, "{:?}: {} for {}", level, found, product);
                            let weight = f64::from(weights[h][i * group + g]);
                            for (k, x) in atom(i).enumerate() {
                                sums[k] += weight * x;
                                // Weights are rounded as the largest is.
                                size[k] += x.abs() * weight.abs().max(0.05);
                            }
                        }
                        for (k, (sum, size)) in sums.iter().zip(&size).enumerate() {
                            let found = made.sums[h][g * m + k];
                            prop_assert!((f64::from(found) - sum).abs() <= 2e-6 * size, "{:?}: {} for {}", level, found, sum);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_reaches_its_own_query_alone() {
        let (n, m, group) = (40, 20, 2);
        let mut draw = draws(1);
        let numbers: Vec<i8> = (0..n * m).map(|i| (i % 100) as i8 + 1).collect();
        let units = vec![0.01; n];
        let rows = Rows::I8 {
            numbers: &numbers,
            units: &units,
        };
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut queries: Vec<Vec<f32>> = (0..3)
                .map(|_| (0..group * m).map(|_| draw()).collect())
                .collect();
            queries[1][m + 3] = wrong;
            let mut weights: Vec<Vec<f32>> = (0..3)
                .map(|_| (0..n * group).map(|_| draw()).collect())
                .collect();
            weights[2][7 * group] = wrong;
            for level in levels() {
                let made = made(level, rows, (m, group), &[n; 3], &queries, &weights);
                for h in 0..3 {
                    for g in 0..group {
                        let own = made.products[h].iter().skip(g).step_by(group);
                        let finite = own.filter(|x| x.is_finite()).count();
                        let wanted = if (h, g) == (1, 1) { 0 } else { n };
                        assert_eq!(finite, wanted, "{level:?}: products of query {h}, {g}");
                        let own = &made.sums[h][g * m..][..m];
                        let finite = own.iter().filter(|x| x.is_finite()).count();
                        let wanted = if (h, g) == (2, 0) { 0 } else { m };
                        assert_eq!(finite, wanted, "{level:?}: sums of query {h}, {g}");
                    }
                }
            }
        }
    }

    #[test]
    fn rooms_may_end_with_a_heads_own_atoms() {
        let (n, m, group, wanted) = (1200, 8, 2, [1200, 30, 0, 600]);
        let numbers = vec![1; n * m];
        let units = vec![0.5; n];
        let rows = Rows::I8 {
            numbers: &numbers,
            units: &units,
        };
        let queries = vec![vec![1.0; group * m]; wanted.len()];
        let weights = wanted.map(|atoms| vec![2.0; atoms * group]);
        for level in levels() {
            let made = made(level, rows, (m, group), &wanted, &queries, &weights);
            for (h, &atoms) in wanted.iter().enumerate() {
                assert_eq!(made.products[h], vec![4.0; atoms * group], "{level:?}");
                let sum = 0.5 + atoms as f32;
                let close = |x: &f32| (x - sum).abs() < 1e-3;
                assert!(made.sums[h].iter().all(close), "{level:?}");
            }
        }
    }

    #[test]
    fn sums_of_every_head_do_not_depend_on_the_others() {
        let (n, m, group) = (600, 64, 4);
        let mut draw = draws(2);
        let numbers: Vec<i8> = (0..n * m).map(|_| (draw() * 127.0) as i8).collect();
        let units: Vec<f32> = (0..n).map(|_| draw()).collect();
        let rows = Rows::I8 {
            numbers: &numbers,
            units: &units,
        };
        let wanted = [600, 30, 0, 599, 513];
        let mut drawn = |each: usize| -> Vec<Vec<f32>> {
            let heads = wanted.iter();
            heads.map(|_| (0..each).map(|_| draw()).collect()).collect()
        };
        let (queries, weights) = (drawn(group * m), drawn(n * group));
        for level in levels() {
            let shape = (m, group);
            let all = made(level, rows, shape, &wanted, &queries, &weights);
            for h in 0..wanted.len() {
                let own = h..h + 1;
                let (queries, weights) = (&queries[own.clone()], &weights[own.clone()]);
                let alone = made(level, rows, shape, &wanted[own], queries, weights);
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&alone.products[0]), bits(&all.products[h]));
                assert_eq!(bits(&alone.sums[0]), bits(&all.sums[h]));
            }
        }
    }
}
