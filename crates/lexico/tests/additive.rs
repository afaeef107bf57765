//! Codes of one atom a group: the search against plain f64, packed codes in memory and in files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::collections::HashMap;

use common::drawn_vectors;
use lexico::codes::CodeFile;
use lexico::dictionary::{CODEBOOK_ATOMS, CodebookSizes, Codebooks};
use lexico::encode::BeamSearch;
use lexico::threads::{Alone, Rayon};
use lexico::{CodeFormat, Codes, CoefficientFormat, Error};
use proptest::prelude::*;

/// CodebookSizes whose atoms get shorter.
fn drawn_dictionary(seed: u64, first: usize, groups: usize, m: usize) -> Codebooks {
    let count = first + (groups - 1) * CODEBOOK_ATOMS;
    let mut atoms = drawn_vectors(seed, count, m);
    for (i, atom) in atoms.chunks_exact_mut(m).enumerate() {
        let group = if i < first {
            0
        } else {
            (i - first) / CODEBOOK_ATOMS + 1
        };
        atom.iter_mut()
            .for_each(|x| *x *= 0.7f32.powi(group as i32));
    }
    Codebooks::new(atoms, m, CodebookSizes { first }).unwrap()
}

fn squared_distance(dictionary: &Codebooks, x: &[f32], indices: &[usize]) -> f64 {
    let atoms = dictionary.dictionary();
    let numbers = x.iter().enumerate();
    numbers
        .map(|(k, &x)| {
            let sum: f64 = indices.iter().map(|&i| f64::from(atoms.atom(i)[k])).sum();
            (f64::from(x) - sum).powi(2)
        })
        .sum()
}

/// What rounding to f32 may add to the squared distance of a vector from a sum: both may be longer than it.
fn rounding(dictionary: &Codebooks, x: &[f32]) -> f64 {
    let square = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    let atoms = dictionary.dictionary().atoms().chunks_exact(x.len());
    1e-6 * (square(x) + atoms.map(square).fold(0.0, f64::max))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_beam_of_one_takes_the_nearest_atom_of_each_group(
        seed: u64, first in 1usize..300, s in 1usize..5, m in 1usize..20, n in 0usize..20,
    ) {
        let dictionary = drawn_dictionary(seed, first, 4, m);
        let vectors = drawn_vectors(seed ^ 1, n, m);
        let groups = dictionary.groups();
        let batch = BeamSearch::new(&dictionary, s).unwrap().with_beam(1).encode(&vectors).unwrap();
        prop_assert_eq!(batch.len(), n);
        for (v, x) in vectors.chunks_exact(m).enumerate() {
            let (indices, coefficients) = batch.row(v);
            prop_assert!(coefficients.iter().all(|&c| c == 1.0) && indices.len() == s);
            let found: Vec<usize> = indices.iter().map(|&i| usize::from(i)).collect();
            // In f64, of each group the nearest after those that were taken before: in f32 nearly equal atoms may change
            // places, and others are the nearest then.
            for group in 0..s {
                let with = |i: usize| squared_distance(&dictionary, x, &[&found[..group], &[i]].concat());
                let atoms = groups.start(group)..groups.start(group + 1);
                let best = atoms.map(with).fold(f64::INFINITY, f64::min);
                let taken = with(found[group]);
                prop_assert!(taken <= best + rounding(&dictionary, x), "{}: {} for {}", group, taken, best);
            }
            let found_error = squared_distance(&dictionary, x, &found);
            let whole: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            let relative = (found_error / whole.max(f64::MIN_POSITIVE)).sqrt();
            prop_assert!((f64::from(batch.relative_errors[v]) - relative).abs() < 1e-4 * relative.max(1.0));
        }
    }

    #[test]
    fn a_beam_as_wide_as_the_first_group_finds_the_nearest_pair(
        seed: u64, first in 1usize..12, m in 1usize..8, n in 1usize..5,
    ) {
        let dictionary = drawn_dictionary(seed, first, 2, m);
        let vectors = drawn_vectors(seed ^ 1, n, m);
        let pursuit = BeamSearch::new(&dictionary, 2).unwrap().with_beam(first);
        let batch = pursuit.encode(&vectors).unwrap();
        for (v, x) in vectors.chunks_exact(m).enumerate() {
            let found: Vec<usize> = batch.row(v).0.iter().map(|&i| usize::from(i)).collect();
            let pairs = (0..first).flat_map(|i| (first..first + CODEBOOK_ATOMS).map(move |j| [i, j]));
            let best = pairs.map(|pair| squared_distance(&dictionary, x, &pair)).fold(f64::INFINITY, f64::min);
            let found = squared_distance(&dictionary, x, &found);
            prop_assert!(found <= best + rounding(&dictionary, x), "{} for {}", found, best);
        }
    }

    #[test]
    fn heads_have_sparsities_of_their_own_and_threads_change_nothing(
        seed: u64, sparsities in prop::collection::vec(1usize..5, 1..4), each in 0usize..30, beam in 1usize..10,
    ) {
        let m = 6;
        let dictionary = drawn_dictionary(seed, 40, 5, m);
        let vectors = drawn_vectors(seed ^ 1, each * sparsities.len(), m);
        let pursuit = BeamSearch::new(&dictionary, 4).unwrap().with_beam(beam);
        let heads = pursuit.encode_heads_on(&vectors, &sparsities, &Rayon).unwrap();
        prop_assert_eq!(&heads, &pursuit.encode_heads_on(&vectors, &sparsities, &Alone).unwrap());
        for (head, (batch, &s)) in heads.iter().zip(&sparsities).enumerate() {
            let alone = BeamSearch::new(&dictionary, s).unwrap().with_beam(beam);
            let own = &vectors[head * each * m..][..each * m];
            prop_assert_eq!(batch, &alone.encode(own).unwrap());
        }
    }

    #[test]
    fn packed_codes_are_the_sums_of_their_atoms_and_come_back_from_files(
        seed: u64, n in 0usize..40, s in 1usize..6, first in 1usize..400, dropped in 0usize..40,
    ) {
        let m = 5;
        let dictionary = drawn_dictionary(seed, first, 5, m);
        let vectors = drawn_vectors(seed ^ 1, n, m);
        let batch = BeamSearch::new(&dictionary, s).unwrap().encode(&vectors).unwrap();
        let format = packed(&dictionary, s);
        let mut codes = Codes::new(format).unwrap();
        // In parts, so that storage grows.
        codes.extend(&batch);
        codes.extend(&batch);
        prop_assert_eq!(codes.bytes_used(), 2 * n * (s + 1));
        let dropped = dropped.min(2 * n);
        codes.drop_front(dropped);
        let decoded = codes.decode(dictionary.atoms(s)).unwrap();
        prop_assert_eq!(decoded.len(), (2 * n - dropped) * m);
        for (v, x) in decoded.chunks_exact(m).enumerate() {
            let indices = batch.row((v + dropped) % n).0;
            for (k, &x) in x.iter().enumerate() {
                let sum: f32 = indices.iter().map(|&i| dictionary.dictionary().atom(usize::from(i))[k]).sum();
                prop_assert!((x - sum).abs() < 1e-5);
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("codes.safetensors");
        let atoms = dictionary.dictionary();
        CodeFile::new(codes, "layers.0.keys", atoms).save(&path).unwrap();
        let back = CodeFile::load(&path).unwrap();
        prop_assert_eq!(back.codes.format(), format);
        prop_assert_eq!(back.decode(atoms).unwrap(), decoded);
    }
}

fn packed(dictionary: &Codebooks, sparsity: usize) -> CodeFormat {
    CodeFormat {
        sparsity,
        variable: false,
        coefficients: CoefficientFormat::InAtoms(dictionary.groups()),
    }
}

#[test]
fn a_wider_beam_comes_nearer_on_the_whole() {
    let dictionary = drawn_dictionary(3, 512, 8, 16);
    let vectors = drawn_vectors(4, 300, 16);
    let errors = [1, 4, 16].map(|beam| {
        let pursuit = BeamSearch::new(&dictionary, 8).unwrap();
        let batch = pursuit.with_beam(beam).encode(&vectors).unwrap();
        batch.mean_relative_error()
    });
    assert!(
        errors[0] > 1.02 * errors[1] && errors[1] > 1.02 * errors[2],
        "{errors:?}"
    );
}

#[test]
fn extreme_vectors_are_coded_or_refused() {
    let dictionary = drawn_dictionary(3, 10, 3, 4);
    let pursuit = BeamSearch::new(&dictionary, 3).unwrap();
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
            BeamSearch::new(&dictionary, sparsity),
            Err(Error::CodebookSizes { groups: 3, .. })
        ));
    }
}

#[test]
fn atoms_that_do_not_fill_groups_are_refused() {
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
    let dictionary = drawn_dictionary(1, 5, 2, 3);
    let impossible = [
        CodeFormat {
            variable: true,
            ..packed(&dictionary, 2)
        },
        packed(&dictionary, 0),
        packed(&dictionary, 257),
        packed(&dictionary, usize::MAX),
    ];
    for format in impossible {
        let refused = Codes::new(format);
        assert!(
            matches!(refused, Err(Error::AdditiveCodes { .. })),
            "{format:?}"
        );
    }
}

#[test]
fn packed_code_files_that_lie_are_refused() {
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
