//! Attention on codes equals dense attention, in plain f64, on the decoded vectors.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use common::{drawn_vectors, random_dictionary};
use lexico::attention::{
    DenseRows, Head, NumberType, Positions, Source, accumulated_attention, attend_heads,
};
use lexico::dictionary::{CodebookSizes, Codebooks};
use lexico::threads::{Alone, Rayon, Threads};
use lexico::{
    AdditiveFormat, Codes, CoefficientFormat, Dictionary, EncodedBatch, Encoder, KeyValue, Pursuit,
    SparseFormat,
};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Attention of one KV head.
fn attend(
    queries: &[f32],
    head_dim: usize,
    t: usize,
    window: Option<usize>,
    sources: &[Source<'_>],
    out: &mut [f32],
) {
    let head = Head {
        queries,
        sources,
        out,
    };
    attend_heads(&mut [head], head_dim, t, window, &Rayon);
}

/// `queries` `[G, t, m]` over `past + t` positions, the last `t` causal, through a sliding window.
fn dense_attention(
    queries: &[f32],
    m: usize,
    t: usize,
    sliding: Option<usize>,
    keys: &[f32],
    values: &[f32],
) -> Vec<f64> {
    let positions = keys.len() / m;
    let mut out = Vec::new();
    for (row, q) in queries.chunks(m).enumerate() {
        let seen = positions - t + row % t + 1;
        let hidden = sliding.map_or(0, |w| seen.saturating_sub(w));
        let dot = |k: &[f32]| -> f64 {
            q.iter()
                .zip(k)
                .map(|(&a, &b)| f64::from(a) * f64::from(b))
                .sum::<f64>()
                / (m as f64).sqrt()
        };
        let scores: Vec<f64> = keys.chunks(m).take(seen).skip(hidden).map(dot).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for j in 0..m {
            let weighted = weights
                .iter()
                .zip(values.chunks(m).skip(hidden))
                .map(|(w, v)| w * f64::from(v[j]));
            out.push(weighted.sum::<f64>() / sum);
        }
    }
    out
}

/// Codes over a dictionary, in pieces, as a cache grows.
fn coded(dictionary: &Dictionary, vectors: &[f32], format: SparseFormat, tolerance: f32) -> Codes {
    let pursuit = Pursuit::new(dictionary, format.sparsity).unwrap();
    let pursuit = pursuit.with_tolerance(tolerance).unwrap();
    let mut codes = Codes::new(format).unwrap();
    for piece in vectors.chunks(7 * dictionary.head_dim()) {
        codes.extend(&pursuit.encode(piece).unwrap());
    }
    codes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    #[test]
    fn on_codes_window_and_new_positions(
        m in prop_oneof![Just(1usize), Just(7), Just(16), Just(33), Just(64)],
        group in prop_oneof![1usize..10, Just(40)], t in prop_oneof![Just(1usize), 2usize..40],
        past in prop_oneof![Just(0usize), 1usize..40, Just(300)], window in prop_oneof![Just(0usize), 1usize..20, Just(270)],
        s in 1usize..12, variable: bool, sliding in prop_oneof![Just(None), (1usize..400).prop_map(Some)], f32_coefficients: bool, f16_window: bool, seed: u64,
    ) {
        let s = s.min(m);
        let key_dictionary = random_dictionary(seed, 60, m);
        // One of each kind: atoms that f16 holds exactly are read in f16.
        let value_dictionary = random_dictionary(seed ^ 1, 48, m).in_half_precision().unwrap();
        let format = SparseFormat {
            sparsity: s,
            variable,
            coefficients: if f32_coefficients { CoefficientFormat::F32 } else { CoefficientFormat::F8 },
        };
        let tolerance = if variable { 0.3 } else { 0.0 };
        let keys = coded(&key_dictionary, &drawn_vectors(seed ^ 2, past, m), format, tolerance);
        let values = coded(&value_dictionary, &drawn_vectors(seed ^ 3, past, m), format, tolerance);
        let (key_atoms, value_atoms) = ((&key_dictionary).into(), (&value_dictionary).into());
        let number_type = if f16_window { NumberType::F16 } else { NumberType::F32 };
        let mut window_keys = DenseRows::new(m, number_type);
        let mut window_values = DenseRows::new(m, number_type);
        window_keys.extend(&drawn_vectors(seed ^ 4, window, m));
        window_values.extend(&drawn_vectors(seed ^ 5, window, m));
        let new_keys = drawn_vectors(seed ^ 6, t, m);
        let new_values = drawn_vectors(seed ^ 7, t, m);
        let queries = drawn_vectors(seed ^ 8, group * t, m);

        let mut out = vec![f32::NAN; queries.len()];
        attend(&queries, m, t, sliding, &[
            Source::Codes { codes: KeyValue::new(&keys, &values), atoms: KeyValue::new(key_atoms, value_atoms), offsets: None },
            Source::Dense(KeyValue::new(&window_keys, &window_values)),
            Source::Causal(KeyValue::new(&new_keys, &new_values)),
        ], &mut out);

        let all_keys = [keys.decode(key_atoms).unwrap(), window_keys.to_f32(), new_keys].concat();
        let all_values = [values.decode(value_atoms).unwrap(), window_values.to_f32(), new_values].concat();
        let expected = dense_attention(&queries, m, t, sliding, &all_keys, &all_values);
        for (got, want) in out.iter().zip(expected) {
            prop_assert!((f64::from(*got) - want).abs() <= 1e-4 * want.abs().max(1.0), "{} for {}", got, want);
        }
    }
}

/// Additive codes over atoms of any length; nothing depends on how they were made.
fn additive(codebooks: &Codebooks, sparsity: usize, seed: u64, count: usize) -> Codes {
    let sizes = codebooks.sizes();
    let mut codes = Codes::new(AdditiveFormat { sparsity, sizes }).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // In pieces, as a cache grows.
    for first in (0..count).step_by(777) {
        let n = (count - first).min(777);
        let index = |nonzero: usize| {
            let codebook = nonzero % sparsity;
            rng.random_range(sizes.start(codebook)..sizes.start(codebook + 1)) as u16
        };
        codes.extend(&EncodedBatch {
            sparsity,
            lengths: vec![sparsity as u16; n],
            indices: (0..n * sparsity).map(index).collect(),
            coefficients: vec![1.0; n * sparsity],
            relative_errors: vec![0.0; n],
        });
    }
    codes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn on_additive_codes(
        m in prop_oneof![Just(1usize), Just(7), Just(16), Just(64)],
        group in prop_oneof![1usize..10, Just(40)], t in prop_oneof![2 => Just(1usize), 1 => 2usize..20],
        past in prop_oneof![Just(0usize), 1usize..40, Just(2_500), Just(18_000)],
        gone in prop_oneof![Just(0usize), 1usize..30, Just(8_192), Just(9_001)],
        first in prop_oneof![Just(1usize), Just(300), Just(2_048)], s in 1usize..20, fewer in 0usize..3,
        sliding in prop_oneof![Just(None), (1usize..400).prop_map(Some), Just(Some(10_000))],
        threads in prop_oneof![Just(1usize), Just(4)], eight_bits: bool, seed: u64,
    ) {
        // Many queries of many positions take the reference long.
        let past = if group * t > 12 { past.min(2_500) } else { past };
        let (sizes, gone) = (CodebookSizes { first }, gone.min(past));
        let dictionary = |salt: u64| {
            let atoms: Vec<f32> = drawn_vectors(seed ^ salt, sizes.atoms(s), m);
            let atoms = atoms.iter().map(|x| x / (s as f32).sqrt()).collect();
            let codebooks = Codebooks::new(atoms, m, sizes).unwrap();
            if eight_bits { codebooks.in_eight_bits().unwrap() } else { codebooks }
        };
        let (key_dictionary, value_dictionary) = (dictionary(1), dictionary(2).in_half_precision().unwrap());
        // Values of other sparsities than keys.
        let value_sparsity = s.saturating_sub(fewer).max(1);
        let mut keys = additive(&key_dictionary, s, seed ^ 3, past);
        let mut values = additive(&value_dictionary, value_sparsity, seed ^ 4, past);
        keys.drop_front(gone);
        values.drop_front(gone);
        let (key_atoms, value_atoms) = (key_dictionary.first(s), value_dictionary.first(value_sparsity));
        let (new_keys, new_values) = (drawn_vectors(seed ^ 5, t, m), drawn_vectors(seed ^ 6, t, m));
        let queries = drawn_vectors(seed ^ 7, group * t, m);
        let sources = [
            Source::Codes { codes: KeyValue::new(&keys, &values), atoms: KeyValue::new(key_atoms, value_atoms), offsets: None },
            Source::Causal(KeyValue::new(&new_keys, &new_values)),
        ];
        let mut out = vec![f32::NAN; queries.len()];
        let head = Head { queries: &queries, sources: &sources, out: &mut out };
        attend_heads(&mut [head], m, t, sliding, &Count(threads));

        let all_keys = [keys.decode(key_atoms).unwrap(), new_keys].concat();
        let all_values = [values.decode(value_atoms).unwrap(), new_values].concat();
        let expected = dense_attention(&queries, m, t, sliding, &all_keys, &all_values);
        for (got, want) in out.iter().zip(expected) {
            prop_assert!((f64::from(*got) - want).abs() <= 1e-4 * want.abs().max(1.0), "{} for {}", got, want);
        }
    }
}

/// A pool of any size.
struct Count(usize);

impl Threads for Count {
    fn count(&self) -> usize {
        self.0
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        Rayon.run(tasks, task);
    }
}

#[test]
fn long_contexts_are_split_among_more_threads_than_heads() {
    let (m, group, past, held) = (16, 3, 40_000, 9_000);
    let dictionary = random_dictionary(1, 60, m);
    let format = SparseFormat {
        sparsity: 3,
        variable: false,
        coefficients: CoefficientFormat::I8,
    };
    let codes = |seed| coded(&dictionary, &drawn_vectors(seed, past, m), format, 0.0);
    let rows = |seed| {
        let mut rows = DenseRows::new(m, NumberType::F16);
        rows.extend(&drawn_vectors(seed, held, m));
        rows
    };
    let layer = [0, 10].map(|seed| {
        let coded = (codes(seed + 2), codes(seed + 3));
        (coded, (rows(seed + 4), rows(seed + 5)))
    });
    let own = drawn_vectors(20, 1, m);
    let queries = drawn_vectors(21, 2 * group, m);
    for window in [None, Some(30_000), Some(5)] {
        let attend_on = |threads: usize| {
            let sources: Vec<Vec<Source<'_>>> = layer
                .iter()
                .map(|((keys, values), (dense_keys, dense_values))| {
                    vec![
                        Source::Codes {
                            codes: KeyValue::new(keys, values),
                            atoms: KeyValue::new((&dictionary).into(), (&dictionary).into()),
                            offsets: None,
                        },
                        Source::Dense(KeyValue::new(dense_keys, dense_values)),
                        Source::Causal(KeyValue::new(&own, &own)),
                    ]
                })
                .collect();
            let mut out = vec![f32::NAN; queries.len()];
            let parts = queries
                .chunks(group * m)
                .zip(out.chunks_mut(group * m))
                .zip(&sources);
            let mut heads: Vec<Head<'_>> = parts
                .map(|((queries, out), sources)| Head {
                    queries,
                    sources,
                    out,
                })
                .collect();
            attend_heads(&mut heads, m, 1, window, &Count(threads));
            out
        };
        let whole = attend_on(1);
        assert_eq!(whole, attend_on(2));
        for threads in [4, 5, 8, 1000] {
            for (split, whole) in attend_on(threads).iter().zip(&whole) {
                assert!((split - whole).abs() <= 1e-5, "{split} for {whole}");
            }
        }
    }
}

/// Of heads with few atoms vectors are rebuilt up to more positions than of those with many.
#[test]
fn heads_of_different_sparsities_do_not_depend_on_who_shares_their_thread() {
    let (m, group, past) = (16, 4, 40);
    let dictionary = random_dictionary(1, 300, m);
    let layer = [1, 8].map(|sparsity| {
        let format = SparseFormat {
            sparsity,
            variable: false,
            coefficients: CoefficientFormat::I8,
        };
        [2, 3].map(|seed| coded(&dictionary, &drawn_vectors(seed, past, m), format, 0.0))
    });
    let sources = layer.each_ref().map(|[keys, values]| {
        [Source::Codes {
            codes: KeyValue::new(keys, values),
            atoms: KeyValue::new((&dictionary).into(), (&dictionary).into()),
            offsets: None,
        }]
    });
    let queries = drawn_vectors(4, 2 * group, m);
    let attend_on = |threads: usize| {
        let mut out = vec![f32::NAN; queries.len()];
        let mut heads = Head::split(&queries, &sources, &mut out);
        attend_heads(&mut heads, m, 1, None, &Count(threads));
        out
    };
    assert_eq!(attend_on(1), attend_on(2));
}

/// Positions that are turned back into vectors: held as f32 and halved, to see that they are read.
struct Halved<'a>(&'a [f32], &'a [f32], usize);

impl Positions for Halved<'_> {
    fn len(&self) -> usize {
        self.0.len() / self.2
    }

    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        let range = first * self.2..(first + count) * self.2;
        keys.extend(self.0[range.clone()].iter().map(|x| x / 2.0));
        values.extend(self.1[range].iter().map(|x| x / 2.0));
    }
}

proptest! {
    #[test]
    fn decoded_positions_are_attended_to_like_dense_ones(
        m in 1usize..40, group in 1usize..9, past in 0usize..700, t in 1usize..5,
        sliding in proptest::option::of(1usize..900), seed: u64,
    ) {
        let drawn = |salt, n: usize| drawn_vectors(seed ^ salt, n, m);
        let (queries, keys, values) = (drawn(1, group * t), drawn(2, past + t), drawn(3, past + t));
        let halved = |x: &[f32]| -> Vec<f32> { x.iter().map(|x| x * 2.0).collect() };
        let (past_keys, past_values) = (halved(&keys[..past * m]), halved(&values[..past * m]));
        let positions = Halved(&past_keys, &past_values, m);
        let sources = [
            Source::Decoded(&positions),
            Source::Causal(KeyValue::new(&keys[past * m..], &values[past * m..])),
        ];
        let mut out = vec![0.0; queries.len()];
        attend(&queries, m, t, sliding, &sources, &mut out);
        let expected = dense_attention(&queries, m, t, sliding, &keys, &values);
        for (a, b) in out.iter().zip(expected) {
            prop_assert!((f64::from(*a) - b).abs() <= 1e-4 * (1.0 + b.abs()), "{a} for {b}");
        }
    }
}

#[test]
fn scores_of_any_size_do_not_overflow() {
    let m = 4;
    let keys = [1e4f32, 0.0, 0.0, 0.0, -1e4, 0.0, 0.0, 0.0];
    let values = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
    for sign in [1f32, -1.0] {
        let queries = [sign * 1e4, 0.0, 0.0, 0.0];
        let mut window = DenseRows::new(m, NumberType::F32);
        window.extend(&keys[..m]);
        let mut window_values = DenseRows::new(m, NumberType::F32);
        window_values.extend(&values[..m]);
        let mut out = [0.0; 4];
        let sources = [
            Source::Dense(KeyValue::new(&window, &window_values)),
            Source::Causal(KeyValue::new(&keys[m..], &values[m..])),
        ];
        attend(&queries, m, 1, None, &sources, &mut out);
        let expected = if sign > 0.0 {
            &values[..m]
        } else {
            &values[m..]
        };
        assert_eq!(out, expected);
    }
}

#[test]
fn a_dense_number_beyond_f16_is_held_at_its_limit() {
    let mut rows = DenseRows::new(2, NumberType::F16);
    rows.extend(&[1e9, -1e9]);
    assert_eq!(rows.to_f32(), [65504.0, -65504.0]);
}

/// A NaN must reach the logits, where it is reported, and not turn into zeros on the way.
#[test]
fn a_nan_stays_a_nan() {
    let m = 4;
    let dictionary = random_dictionary(1, 20, m);
    let format = SparseFormat {
        sparsity: 2,
        variable: false,
        coefficients: CoefficientFormat::F8,
    };
    let codes = coded(&dictionary, &drawn_vectors(2, 30, m), format, 0.0);
    let finite = drawn_vectors(3, 1, m);
    let nan = vec![f32::NAN; m];
    let infinite = vec![f32::INFINITY; m];
    for (queries, keys) in [(&nan, &finite), (&finite, &nan), (&infinite, &finite)] {
        let mut out = vec![0.0; m];
        let sources = [
            Source::Codes {
                codes: KeyValue::new(&codes, &codes),
                atoms: KeyValue::new((&dictionary).into(), (&dictionary).into()),
                offsets: None,
            },
            Source::Causal(KeyValue::new(keys, &finite)),
        ];
        attend(queries, m, 1, None, &sources, &mut out);
        assert!(out.iter().all(|x| x.is_nan()), "{out:?}");
    }
}

/// Pages end, the oldest go, and scores rise so far that what was summed must be scaled anew.
#[test]
fn codes_of_many_pages_with_ever_larger_scores() {
    let (m, past) = (4, 20_000);
    let dictionary = random_dictionary(11, 30, m);
    for (variable, group, gone, sliding) in [
        (false, 4, 0, None),
        (true, 4, 0, None),
        (false, 1, 9_001, None),
        (true, 2, 17, Some(12_345)),
        (false, 4, 8_192, Some(3_000)),
    ] {
        let format = SparseFormat {
            sparsity: 4,
            variable,
            coefficients: CoefficientFormat::F8,
        };
        let tolerance = if variable { 0.3 } else { 0.0 };
        let mut keys = drawn_vectors(12, past, m);
        for (position, key) in keys.chunks_mut(m).enumerate() {
            key.iter_mut()
                .for_each(|x| *x *= (1 + position / 5_000) as f32);
        }
        let mut keys = coded(&dictionary, &keys, format, tolerance);
        let mut values = coded(&dictionary, &drawn_vectors(13, past, m), format, tolerance);
        keys.drop_front(gone);
        values.drop_front(gone);
        assert_eq!(keys.len(), past - gone);
        let queries: Vec<f32> = drawn_vectors(14, group, m)
            .iter()
            .map(|q| 6.0 * q)
            .collect();
        let own = drawn_vectors(15, 1, m);
        let mut out = vec![f32::NAN; queries.len()];
        let sources = [
            Source::Codes {
                codes: KeyValue::new(&keys, &values),
                atoms: KeyValue::new((&dictionary).into(), (&dictionary).into()),
                offsets: None,
            },
            Source::Causal(KeyValue::new(&own, &own)),
        ];
        attend(&queries, m, 1, sliding, &sources, &mut out);
        let all_keys = [keys.decode(&dictionary).unwrap(), own.clone()].concat();
        let all_values = [values.decode(&dictionary).unwrap(), own].concat();
        let expected = dense_attention(&queries, m, 1, sliding, &all_keys, &all_values);
        for (got, want) in out.iter().zip(expected) {
            let close = (f64::from(*got) - want).abs() <= 3e-4 * want.abs().max(1.0);
            assert!(close, "{got} for {want}");
        }
    }
}

proptest! {
    /// A position's value is a unit vector of its own, so that attention's output is its weights.
    #[test]
    fn accumulated_attention_is_the_sum_of_the_weights(
        m in prop_oneof![Just(1usize), Just(7), Just(64)], group in 1usize..5, t in 1usize..80,
        past in 0usize..40, part in 0f64..=1.0, scale in prop_oneof![Just(1f32), Just(12.0)], seed: u64,
    ) {
        let n = past + t;
        let newest = (part * t as f64) as usize;
        let draw = |seed: u64, count: usize| -> Vec<f32> {
            drawn_vectors(seed, count, m).iter().map(|x| scale * x).collect()
        };
        let (queries, keys) = (draw(seed, group * t), draw(seed ^ 1, n));
        let mut expected = vec![0.0; n];
        for (position, expected) in expected.iter_mut().enumerate() {
            let mut values = vec![0.0; n * m];
            values[position * m] = 1.0;
            let weights = dense_attention(&queries, m, t, None, &keys, &values);
            *expected = weights
                .chunks(m)
                .enumerate()
                .filter(|(row, _)| row % t >= t - newest)
                .map(|(_, out)| out[0])
                .sum::<f64>();
        }
        let sums = accumulated_attention(&queries, m, t, newest, &keys, &Rayon);
        prop_assert_eq!(&sums, &accumulated_attention(&queries, m, t, newest, &keys, &Alone));
        for (got, want) in sums.iter().zip(expected) {
            prop_assert!((f64::from(*got) - want).abs() < 2e-4 * want.max(1.0), "{got} for {want}");
        }
    }

    #[test]
    fn rows_that_are_kept_are_those_that_were(
        m in 1usize..9, count in 0usize..200, f16: bool, more in 0usize..5, seed: u64,
    ) {
        let number_type = if f16 { NumberType::F16 } else { NumberType::F32 };
        let mut rows = DenseRows::new(m, number_type);
        rows.extend(&drawn_vectors(seed, count, m));
        let before = rows.to_f32();
        let kept: Vec<usize> = (0..count).filter(|i| (seed >> (i % 64)) & 1 == 1).collect();
        rows.keep(&kept);
        let mut expected: Vec<f32> = kept.iter().flat_map(|i| &before[i * m..(i + 1) * m]).copied().collect();
        prop_assert_eq!(&rows.to_f32(), &expected);
        let number = if f16 { 2 } else { 4 };
        let needed = kept.len() * m + (kept.len() * m / 16).max(4 * m);
        let page = size_of::<Vec<u8>>();
        prop_assert!(rows.bytes() <= needed * number + page, "{} for {needed}", rows.bytes());
        let added = vec![1.0; more * m];
        rows.extend(&added);
        expected.extend(added);
        prop_assert_eq!(rows.to_f32(), expected);
    }
}
