//! Pursuit against the f64 oracle and against the reference implementation's figures.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use common::{drawn_vectors, mean_relative_error, oracle, random_dictionary, shared};
use lexico::tensor_file::TensorFile;
use lexico::threads::Rayon;
use lexico::{
    Codes, CoefficientFormat, Dictionary, EncodedBatch, Encoder, Error, Fit, Pursuit, SparseFormat,
};
use proptest::prelude::*;

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn in_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// `x − x̂`, in f64, of the code as it stands.
fn residual(dictionary: &Dictionary, x: &[f32], indices: &[u16], coefficients: &[f32]) -> Vec<f64> {
    let mut rest = in_f64(x);
    for (&i, &c) in indices.iter().zip(coefficients) {
        for (r, &d) in rest.iter_mut().zip(&*dictionary.atom(usize::from(i))) {
            *r -= f64::from(c) * f64::from(d);
        }
    }
    rest
}

fn residual_norm(dictionary: &Dictionary, x: &[f32], indices: &[u16], coefficients: &[f32]) -> f64 {
    norm(&residual(dictionary, x, indices, coefficients))
}

/// The largest correlation of an atom with a residual.
fn largest_correlation(dictionary: &Dictionary, residual: &[f64]) -> f64 {
    let correlations = (0..dictionary.len()).map(|n| {
        let atom = dictionary.atom(n);
        let products = atom.iter().zip(residual);
        products.map(|(&d, r)| f64::from(d) * r).sum::<f64>().abs()
    });
    correlations.fold(0.0, f64::max)
}

/// What rounding the coefficients to f32 alone can add to a residual, atoms being of unit length:
/// nearly dependent atoms, as a drawn square dictionary has them, take coefficients far larger
/// than the vector.
fn rounding(coefficients: &[f32]) -> f64 {
    let sum: f64 = coefficients.iter().map(|c| f64::from(c.abs())).sum();
    sum * 2f64.powi(-24)
}

/// Replays a code in f64: every atom must have been a greedy choice up to rounding, none twice,
/// and the coefficients those of least squares.
fn check_greedy(dictionary: &Dictionary, x: &[f32], indices: &[u16], coefficients: &[f32]) {
    let x64 = in_f64(x);
    let whole = norm(&x64);
    let mut support: Vec<usize> = Vec::new();
    let mut rest = x64.clone();
    for &i in indices {
        let correlation = |n: usize| -> f64 {
            let atom = dictionary.atom(n);
            let atom = atom.iter().zip(&rest);
            atom.map(|(&d, r)| f64::from(d) * r).sum::<f64>().abs()
        };
        let i = usize::from(i);
        assert!(!support.contains(&i), "atom {i} chosen twice");
        let best = (0..dictionary.len()).map(correlation).fold(0.0, f64::max);
        assert!(
            correlation(i) >= best * (1.0 - 1e-3) - 2e-5 * whole,
            "atom {i} correlates {} where the best does {best}",
            correlation(i)
        );
        support.push(i);
        let fit = oracle::least_squares(dictionary, &support, &x64).expect("independent atoms");
        rest.clone_from(&x64);
        for (&n, c) in support.iter().zip(fit) {
            for (r, &d) in rest.iter_mut().zip(&*dictionary.atom(n)) {
                *r -= c * f64::from(d);
            }
        }
    }
    let got = residual_norm(dictionary, x, indices, coefficients);
    assert!(
        (got - norm(&rest)).abs() <= 1e-4 * norm(&rest) + 2e-6 * whole + rounding(coefficients),
        "residual {got}, least squares {}",
        norm(&rest)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// On any shape: odd `m`, `s = 1`, `s = m`, `N < m`, no vectors.
    #[test]
    fn residual_norms_equal_the_oracles(
        m in 1usize..40, atoms in 1usize..200, s in 1usize..40, n in prop_oneof![Just(0usize), 1usize..9, Just(70)],
        tolerance in prop_oneof![Just(0f32), 0.05f32..0.6], seed: u64, exponent in -30i32..30,
    ) {
        let dictionary = random_dictionary(seed, atoms, m);
        let s = s.min(m).min(atoms);
        let mut vectors = drawn_vectors(seed ^ 1, n, m);
        vectors.iter_mut().for_each(|x| *x *= 2f32.powi(exponent));
        let plain = Pursuit::new(&dictionary, s).unwrap().with_tolerance(tolerance).unwrap();
        let batch = plain.with_fit(Fit::LeastSquares).encode(&vectors).unwrap();
        prop_assert_eq!(batch.len(), n);
        for (v, x) in vectors.chunks(m).enumerate() {
            let whole = norm(&in_f64(x));
            let found = oracle::encode(&dictionary, x, s, f64::from(tolerance));
            let (indices, coefficients) = batch.row(v);
            check_greedy(&dictionary, x, indices, coefficients);
            let got = residual_norm(&dictionary, x, indices, coefficients);
            let reported = f64::from(batch.relative_errors[v]) * whole;
            prop_assert!((reported - got).abs() <= 1e-4 * got + 2e-6 * whole);
            // A choice that hangs on rounding may differ; it was checked to be as greedy.
            let sure_stop = (found.residual_norm / whole - f64::from(tolerance)).abs() > 1e-5;
            if found.narrowest_lead > 1e-5 && sure_stop {
                prop_assert!(
                    (got - found.residual_norm).abs()
                        <= 1e-4 * found.residual_norm + 2e-6 * whole + rounding(coefficients),
                    "residual {}, oracle {}", got, found.residual_norm
                );
            }
            if tolerance > 0.0 && indices.len() < s {
                let spanned = indices.len() == m.min(atoms);
                // An atom that is nearly at right angles to what is left brings nothing either.
                let rest = residual(&dictionary, x, indices, coefficients);
                let left = largest_correlation(&dictionary, &rest);
                prop_assert!(
                    got <= f64::from(tolerance) * whole * 1.001 || spanned || left <= 2e-6 * whole,
                    "stopped after {} of {} atoms at {}, the best atom left brings {}",
                    indices.len(), s, got / whole, left / whole
                );
            }
        }
    }

    /// Heads coded side by side get the codes that each would get alone.
    #[test]
    fn heads_have_sparsities_of_their_own(
        m in 2usize..24, atoms in 8usize..100, n in 0usize..20, sparsities in prop::collection::vec(1usize..9, 1..5),
        tolerance in prop_oneof![Just(0f32), 0.05f32..0.6], seed: u64,
    ) {
        let dictionary = random_dictionary(seed, atoms, m);
        let sparsities: Vec<usize> = sparsities.into_iter().map(|s| s.min(m)).collect();
        let vectors = drawn_vectors(seed ^ 1, n * sparsities.len(), m);
        let with = |s: usize| Pursuit::new(&dictionary, s).unwrap().with_tolerance(tolerance).unwrap();
        let most = sparsities.iter().copied().max().unwrap();
        let heads = with(most).encode_heads(&vectors, &sparsities, &Rayon).unwrap();
        prop_assert_eq!(heads.len(), sparsities.len());
        for (head, (found, &s)) in heads.iter().zip(&sparsities).enumerate() {
            let own = &vectors[head * n * m..(head + 1) * n * m];
            prop_assert_eq!(found, &with(s).encode(own).unwrap());
        }
    }

    /// Zeros, denormals, the largest numbers and mixtures of them.
    #[test]
    fn extreme_values_are_coded(
        values in prop::collection::vec(prop_oneof![
            Just(0f32), Just(f32::MIN_POSITIVE), Just(1e-45f32), Just(f32::MAX), Just(-f32::MAX),
            Just(1e-20f32), Just(-1e30f32), -1f32..1.0,
        ], 8),
        seed: u64,
    ) {
        let dictionary = random_dictionary(seed, 50, 8);
        let pursuit = Pursuit::new(&dictionary, 8).unwrap().with_fit(Fit::LeastSquares);
        let batch = pursuit.encode(&values).unwrap();
        let (indices, coefficients) = batch.row(0);
        prop_assert!(coefficients.iter().all(|c| c.is_finite()));
        let whole = norm(&in_f64(&values));
        if whole == 0.0 {
            prop_assert!(indices.is_empty());
        } else {
            let saturated = coefficients.iter().any(|c| c.abs() == f32::MAX);
            let got = residual_norm(&dictionary, &values, indices, coefficients);
            prop_assert!(saturated || whole < 1e-38 || got <= 1e-4 * whole, "{} of {}", got, whole);
        }
    }
}

#[test]
fn an_atom_that_adds_nothing_ends_the_pursuit() {
    // Two atoms that differ in the last bits, and nothing that reaches the third axis.
    let rows = vec![1.0, 0.0, 0.0, 1.0, 1e-6, 0.0, 0.0, 1.0, 0.0];
    let dictionary = Dictionary::normalised(rows, 3).unwrap();
    let pursuit = Pursuit::new(&dictionary, 3).unwrap();
    let pursuit = pursuit.with_fit(Fit::LeastSquares);
    let batch = pursuit.encode(&[2.0, 1.0, 5.0, 0.0, 0.0, 7.0]).unwrap();
    assert_eq!(batch.lengths, [2, 0]);
    let (indices, coefficients) = batch.row(0);
    assert_eq!(indices, [1, 2]);
    assert!(
        coefficients.iter().all(|c| c.abs() < 10.0),
        "{coefficients:?}"
    );
}

#[test]
fn bad_input_is_refused() {
    let dictionary = random_dictionary(5, 20, 6);
    for sparsity in [0, 7, usize::MAX] {
        assert!(matches!(
            Pursuit::new(&dictionary, sparsity),
            Err(Error::Sparsity { max: 6, .. })
        ));
    }
    for tolerance in [-0.1, 1.0, f32::NAN, f32::INFINITY] {
        let pursuit = Pursuit::new(&dictionary, 3).unwrap();
        assert!(matches!(
            pursuit.with_tolerance(tolerance),
            Err(Error::Tolerance(_))
        ));
    }
    let pursuit = Pursuit::new(&dictionary, 3).unwrap();
    let mut vectors = drawn_vectors(1, 4, 6);
    assert!(matches!(
        pursuit.encode(&vectors[1..]),
        Err(Error::VectorLength {
            found: 23,
            head_dim: 6
        })
    ));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        vectors[2 * 6 + 3] = bad;
        assert!(matches!(
            pursuit.encode(&vectors),
            Err(Error::NotFinite { row: 2 })
        ));
    }
}

fn stored(batch: &EncodedBatch, coefficients: CoefficientFormat) -> Codes {
    let mut codes = Codes::new(SparseFormat {
        sparsity: batch.sparsity,
        variable: false,
        coefficients,
    })
    .unwrap();
    codes.extend(batch);
    codes
}

/// Real keys and values, and the errors that the reference implementation reaches on them.
#[test]
fn no_worse_than_the_reference_implementation() {
    let Some(folder) = shared("data") else { return };
    let file = TensorFile::open(folder.join("pursuit_cases.safetensors")).unwrap();
    let figures = std::fs::read_to_string(folder.join("pursuit_cases.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&figures).unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let name = format!(
            "layers.{}.{}",
            case["layer"],
            case["part"].as_str().unwrap()
        );
        let (atoms, shape) = file.f32_tensor(&format!("{name}.dictionary"), 2).unwrap();
        let (vectors, _) = file.f32_tensor(&format!("{name}.vectors"), 2).unwrap();
        let dictionary = Dictionary::new(atoms, shape[1]).unwrap();
        let sparsity = case["sparsity"].as_u64().unwrap() as usize;
        let pursuit = Pursuit::new(&dictionary, sparsity).unwrap();
        let pursuit = pursuit.with_fit(Fit::LeastSquares);
        let batch = pursuit.encode(&vectors).unwrap();
        for (format, key) in [
            (CoefficientFormat::F32, "mean_relative_error_f32"),
            (CoefficientFormat::F8, "mean_relative_error_f8"),
        ] {
            let decoded = stored(&batch, format).decode(&dictionary).unwrap();
            let error = mean_relative_error(&vectors, &decoded, shape[1]);
            let reference = case[key].as_f64().unwrap();
            println!("{name} s={sparsity} {format:?}: {error:.5}, reference {reference:.5}");
            assert!(
                error <= reference * 1.001,
                "{name} s={sparsity} {format:?}: {error} > {reference}"
            );
        }
    }
}

#[test]
fn unbiased_coefficients_keep_the_length_along_the_vector() {
    let m = 16;
    let dictionary = random_dictionary(21, 40, m);
    let vectors = drawn_vectors(22, 200, m);
    let fitted = |fit: Fit| Pursuit::new(&dictionary, 3).unwrap().with_fit(fit);
    let least_squares = fitted(Fit::LeastSquares).encode(&vectors).unwrap();
    let unbiased = fitted(Fit::Unbiased).encode(&vectors).unwrap();
    for (v, x) in vectors.chunks(m).enumerate() {
        let along = |batch: &EncodedBatch| -> f64 {
            let (indices, coefficients) = batch.row(v);
            let terms = indices.iter().zip(coefficients).map(|(&i, &c)| {
                let atom = dictionary.atom(usize::from(i));
                let atom = atom.iter().zip(x);
                f64::from(c)
                    * atom
                        .map(|(&a, &b)| f64::from(a) * f64::from(b))
                        .sum::<f64>()
            });
            terms.sum::<f64>()
        };
        let square: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        let error = f64::from(least_squares.relative_errors[v]);
        assert!((along(&least_squares) / square - (1.0 - error * error)).abs() < 1e-5);
        assert!((along(&unbiased) / square - 1.0).abs() < 1e-4);
    }
    assert_eq!(least_squares.relative_errors, unbiased.relative_errors);
    let zero = |fit: Fit| fitted(fit).encode(&vec![0.0; m]).unwrap();
    assert_eq!(zero(Fit::LeastSquares), zero(Fit::Unbiased));
}
