//! Additive codes: the search against plain f64, codes in memory and in files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::collections::HashMap;

use common::drawn_vectors;
use lexico::codes::CodeFile;
use lexico::dictionary::{CODEBOOK_ATOMS, CodebookSizes, Codebooks};
use lexico::threads::{Alone, Rayon};
use lexico::{AdditiveFormat, BeamSearch, Codes, Encoder, Error, Fit};
use proptest::prelude::*;

/// Codebooks whose atoms get shorter, those of odd seeds in 8 bits.
fn drawn_codebooks(seed: u64, first: usize, codebooks: usize, m: usize) -> Codebooks {
    let sizes = CodebookSizes { first };
    let mut atoms = drawn_vectors(seed, sizes.atoms(codebooks), m);
    for codebook in 0..codebooks {
        let own = sizes.start(codebook) * m..sizes.start(codebook + 1) * m;
        let length = 0.7f32.powi(codebook as i32);
        atoms[own].iter_mut().for_each(|x| *x *= length);
    }
    let codebooks = Codebooks::new(atoms, m, sizes).unwrap();
    match seed % 2 {
        0 => codebooks,
        _ => codebooks.in_eight_bits().unwrap(),
    }
}

fn squared_distance(codebooks: &Codebooks, x: &[f32], indices: &[usize]) -> f64 {
    let numbers = x.iter().enumerate();
    numbers
        .map(|(k, &x)| {
            let sum: f64 = indices
                .iter()
                .map(|&i| f64::from(codebooks.atom(i)[k]))
                .sum();
            (f64::from(x) - sum).powi(2)
        })
        .sum()
}

/// What rounding to f32 may add to the squared distance of a vector from a sum: both may be longer than it.
fn rounding(codebooks: &Codebooks, x: &[f32]) -> f64 {
    let square = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    let atoms = codebooks.atoms();
    let atoms = atoms.chunks_exact(x.len());
    1e-6 * (square(x) + atoms.map(square).fold(0.0, f64::max))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_beam_of_width_one_takes_the_nearest_atom_of_each_codebook(
        seed: u64, first in 1usize..300, s in 1usize..5, m in 1usize..20, n in 0usize..20,
    ) {
        let codebooks = drawn_codebooks(seed, first, 4, m);
        let vectors = drawn_vectors(seed ^ 1, n, m);
        let sizes = codebooks.sizes();
        let batch = BeamSearch::new(&codebooks, s).unwrap().with_beam_width(1).with_fit(Fit::LeastSquares).encode(&vectors).unwrap();
        prop_assert_eq!(batch.len(), n);
        for (v, x) in vectors.chunks_exact(m).enumerate() {
            let (indices, coefficients) = batch.row(v);
            prop_assert!(coefficients.iter().all(|&c| c == 1.0) && indices.len() == s);
            let found: Vec<usize> = indices.iter().map(|&i| usize::from(i)).collect();
            // In f64, of each codebook the nearest after those that were taken before: in f32 nearly equal atoms may change
            // places, and others are the nearest then.
            for codebook in 0..s {
                let with = |i: usize| squared_distance(&codebooks, x, &[&found[..codebook], &[i]].concat());
                let atoms = sizes.start(codebook)..sizes.start(codebook + 1);
                let best = atoms.map(with).fold(f64::INFINITY, f64::min);
                let taken = with(found[codebook]);
                prop_assert!(taken <= best + rounding(&codebooks, x), "{}: {} for {}", codebook, taken, best);
            }
            let found_error = squared_distance(&codebooks, x, &found);
            let whole: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            let relative = (found_error / whole.max(f64::MIN_POSITIVE)).sqrt();
            prop_assert!((f64::from(batch.relative_errors[v]) - relative).abs() < 1e-4 * relative.max(1.0));
        }
    }

    #[test]
    fn a_beam_as_wide_as_the_first_codebook_finds_the_nearest_pair(
        seed: u64, first in 1usize..12, m in 1usize..8, n in 1usize..5,
    ) {
        let codebooks = drawn_codebooks(seed, first, 2, m);
        let vectors = drawn_vectors(seed ^ 1, n, m);
        let pursuit = BeamSearch::new(&codebooks, 2).unwrap().with_beam_width(first);
        let batch = pursuit.encode(&vectors).unwrap();
        for (v, x) in vectors.chunks_exact(m).enumerate() {
            let found: Vec<usize> = batch.row(v).0.iter().map(|&i| usize::from(i)).collect();
            let pairs = (0..first).flat_map(|i| (first..first + CODEBOOK_ATOMS).map(move |j| [i, j]));
            let best = pairs.map(|pair| squared_distance(&codebooks, x, &pair)).fold(f64::INFINITY, f64::min);
            let found = squared_distance(&codebooks, x, &found);
            prop_assert!(found <= best + rounding(&codebooks, x), "{} for {}", found, best);
        }
    }

    #[test]
    fn heads_have_sparsities_of_their_own_and_threads_change_nothing(
        seed: u64, sparsities in prop::collection::vec(1usize..5, 1..4), each in 0usize..30, beam in 1usize..10,
    ) {
        let m = 6;
        let codebooks = drawn_codebooks(seed, 40, 5, m);
        let vectors = drawn_vectors(seed ^ 1, each * sparsities.len(), m);
        let pursuit = BeamSearch::new(&codebooks, 4).unwrap().with_beam_width(beam);
        let heads = pursuit.encode_heads(&vectors, &sparsities, &Rayon).unwrap();
        prop_assert_eq!(&heads, &pursuit.encode_heads(&vectors, &sparsities, &Alone).unwrap());
        for (head, (batch, &s)) in heads.iter().zip(&sparsities).enumerate() {
            let alone = BeamSearch::new(&codebooks, s).unwrap().with_beam_width(beam);
            let own = &vectors[head * each * m..][..each * m];
            prop_assert_eq!(batch, &alone.encode(own).unwrap());
        }
    }

    #[test]
    fn additive_codes_are_the_sums_of_their_atoms_and_come_back_from_files(
        seed: u64, n in 0usize..40, s in 1usize..6, first in 1usize..400, dropped in 0usize..40,
    ) {
        let m = 5;
        let codebooks = drawn_codebooks(seed, first, 5, m);
        let vectors = drawn_vectors(seed ^ 1, n, m);
        let search = BeamSearch::new(&codebooks, s).unwrap().with_fit(Fit::LeastSquares);
        let batch = search.encode(&vectors).unwrap();
        let format = AdditiveFormat { sparsity: s, sizes: codebooks.sizes() };
        let mut codes = Codes::new(format).unwrap();
        // In parts, so that storage grows.
        codes.extend(&batch);
        codes.extend(&batch);
        prop_assert_eq!(codes.bytes_used(), 2 * n * (s + 1));
        let dropped = dropped.min(2 * n);
        codes.drop_front(dropped);
        let decoded = codes.decode(codebooks.first(s)).unwrap();
        prop_assert_eq!(decoded.len(), (2 * n - dropped) * m);
        for (v, x) in decoded.chunks_exact(m).enumerate() {
            let indices = batch.row((v + dropped) % n).0;
            for (k, &x) in x.iter().enumerate() {
                let sum: f32 = indices.iter().map(|&i| codebooks.atom(usize::from(i))[k]).sum();
                prop_assert!((x - sum).abs() < 1e-5);
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("codes.safetensors");
        CodeFile::new(codes, "layers.0.keys", &codebooks).save(&path).unwrap();
        let back = CodeFile::load(&path).unwrap();
        prop_assert_eq!(back.codes.format(), format.into());
        prop_assert_eq!(back.decode(&codebooks).unwrap(), decoded);
    }
}

#[test]
fn a_wider_beam_comes_nearer_on_the_whole() {
    let codebooks = drawn_codebooks(3, 512, 8, 16);
    let vectors = drawn_vectors(4, 300, 16);
    let errors = [1, 4, 16].map(|beam| {
        let pursuit = BeamSearch::new(&codebooks, 8).unwrap();
        let batch = pursuit.with_beam_width(beam).encode(&vectors).unwrap();
        batch.mean_relative_error()
    });
    assert!(
        errors[0] > 1.02 * errors[1] && errors[1] > 1.02 * errors[2],
        "{errors:?}"
    );
}

/// The squared distance that a beam search in f64 ends with.
fn beam_in_f64(codebooks: &Codebooks, x: &[f32], s: usize, beam: usize) -> f64 {
    let rest: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let square = |rest: &[f64]| rest.iter().map(|r| r * r).sum::<f64>();
    let mut sums = vec![(square(&rest), rest)];
    for codebook in 0..s {
        let atoms = codebooks.codebook(codebook);
        let atoms = atoms.chunks_exact(x.len());
        let less = |rest: &[f64], atom: &[f32]| -> Vec<f64> {
            rest.iter()
                .zip(atom)
                .map(|(r, &a)| r - f64::from(a))
                .collect()
        };
        let continued = sums
            .iter()
            .flat_map(|(_, rest)| atoms.clone().map(|atom| less(rest, atom)));
        let mut next: Vec<(f64, Vec<f64>)> = continued.map(|rest| (square(&rest), rest)).collect();
        next.sort_by(|a, b| a.0.total_cmp(&b.0));
        next.truncate(beam);
        sums = next;
    }
    sums[0].0
}

#[test]
fn the_look_in_8_bits_loses_nothing() {
    let m = 24;
    let codebooks = drawn_codebooks(5, 90, 5, m);
    let mut vectors = drawn_vectors(6, 60, m);
    // Some of them with one number that leaves little of the 8 bits to the others.
    vectors.iter_mut().step_by(2 * m).for_each(|x| *x *= 30.0);
    for beam in [1, 3, 8, 20] {
        let search = BeamSearch::new(&codebooks, 5)
            .unwrap()
            .with_beam_width(beam);
        let batch = search.with_fit(Fit::LeastSquares).encode(&vectors).unwrap();
        let (mut found, mut exact) = (0.0, 0.0);
        for (v, x) in vectors.chunks_exact(m).enumerate() {
            let indices: Vec<usize> = batch.row(v).0.iter().map(|&i| usize::from(i)).collect();
            let whole: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            found += squared_distance(&codebooks, x, &indices) / whole;
            exact += beam_in_f64(&codebooks, x, 5, beam) / whole;
        }
        assert!(
            (found / exact - 1.0).abs() < 1e-3,
            "{beam}: {found} for {exact}"
        );
    }
}

#[test]
fn extreme_vectors_are_coded_or_refused() {
    let codebooks = drawn_codebooks(3, 10, 3, 4);
    let pursuit = BeamSearch::new(&codebooks, 3).unwrap();
    for x in [f32::MAX, f32::MIN, 1e-45, 0.0] {
        let batch = pursuit.encode(&[x; 4]).unwrap();
        assert!(batch.relative_errors[0].is_finite(), "{x}");
    }
    for x in [f32::NAN, f32::INFINITY] {
        let refused = pursuit.encode(&[0.0, 0.0, 0.0, 0.0, x, 0.0, 0.0, 0.0]);
        assert!(matches!(refused, Err(Error::NotFinite { row: 1 })));
    }
    let short = pursuit.encode(&[0.0; 5]);
    assert!(matches!(short, Err(Error::VectorLength { .. })));
    for sparsity in [0, 4] {
        assert!(matches!(
            BeamSearch::new(&codebooks, sparsity),
            Err(Error::Codebooks { codebooks: 3, .. })
        ));
    }
}

#[test]
fn atoms_that_do_not_fill_codebooks_are_refused() {
    for (count, first) in [(10, 0), (10, 11), (10, 9), (300, 45), (266, 11)] {
        let atoms = vec![0.5; count * 3];
        let refused = Codebooks::new(atoms, 3, CodebookSizes { first });
        assert!(
            matches!(refused, Err(Error::Dictionary(_))),
            "{count} {first}: {refused:?}"
        );
    }
    let mut atoms = vec![0.5; 10 * 3];
    atoms[4] = f32::NAN;
    let refused = Codebooks::new(atoms, 3, CodebookSizes { first: 10 });
    assert!(matches!(refused, Err(Error::Dictionary(_))));
    for (sparsity, first) in [(0, 5), (257, 5), (usize::MAX, 5), (2, 0), (2, 2_049)] {
        let sizes = CodebookSizes { first };
        let refused = Codes::new(AdditiveFormat { sparsity, sizes });
        assert!(
            matches!(refused, Err(Error::AdditiveCodes { .. })),
            "{sparsity} {first}"
        );
    }
}

#[test]
fn additive_code_files_that_lie_are_refused() {
    use lexico::tensor_file::{self, Dtype, NewTensor};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codes.safetensors");
    let entries = |first: &str| {
        HashMap::from(
            [
                ("format", lexico::codes::FORMAT),
                ("tensor", "d"),
                ("dictionary_crc32", "00000000"),
                ("head_dim", "4"),
                ("first_group", first),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned())),
        )
    };
    let first = |n: usize, index: u16| {
        let bytes = index.to_le_bytes().repeat(n);
        NewTensor::new("first", Dtype::U16, &[n], bytes)
    };
    let rest = |shape: &[usize]| {
        let bytes = vec![7; shape.iter().product()];
        NewTensor::new("rest", Dtype::U8, shape, bytes)
    };
    let write = |tensors: &[NewTensor], groups: &str| {
        tensor_file::write(&path, tensors, entries(groups)).unwrap();
        CodeFile::load(&path)
    };
    assert_eq!(
        write(&[first(3, 9), rest(&[3, 2])], "10")
            .unwrap()
            .codes
            .len(),
        3
    );
    let wrong_type = NewTensor::new("rest", Dtype::I8, &[3, 2], vec![7; 6]);
    let cases = [
        write(&[first(3, 10), rest(&[3, 2])], "10"),
        write(&[first(3, 9), rest(&[2, 2])], "10"),
        write(&[first(3, 9), rest(&[6])], "10"),
        write(&[first(3, 9)], "10"),
        write(&[rest(&[3, 2])], "10"),
        write(&[first(3, 9), wrong_type], "10"),
        write(&[first(3, 0), rest(&[3, 2])], "0"),
        write(&[first(3, 0), rest(&[3, 2])], "65537"),
        write(&[first(3, 0), rest(&[3, 2])], "-1"),
        write(&[first(3, 0), rest(&[3, 300])], "10"),
        write(&[first(3, 0), rest(&[3, 2])], "18446744073709551615"),
    ];
    for (case, result) in cases.into_iter().enumerate() {
        let message = result.err().map(|e| e.to_string());
        assert!(message.is_some_and(|m| !m.is_empty()), "case {case}");
    }
}
