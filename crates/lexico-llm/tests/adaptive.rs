//! What atoms that a session adds are worth: error and bytes with and without them, on texts far from the prose
//! that the dictionaries were learned on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use candle_core::Tensor;
use lexico::attention::NumberType;
use lexico::dictionary::{Atoms, Extension};
use lexico::encode::AdaptivePursuit;
use lexico::threads::Rayon;
use lexico::{CodeFormat, Codes, CoefficientFormat, Dictionary, Pursuit};
use lexico_llm::cache::{Footprint, FullCache, KvCache};
use lexico_llm::decoder::{Logits, Sequence};
use lexico_llm::{Model, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const POSITIONS: usize = 2048;
/// Positions that the cache codes at once.
const AT_ONCE: usize = 1024;

/// A cache that keeps what it is given: keys and values `[kv_heads, t, m]` of every layer.
struct Listener {
    cache: FullCache,
    layers: Vec<[Vec<f32>; 2]>,
}

impl KvCache for Listener {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let numbers = |x: &Tensor| -> Result<Vec<f32>> { Ok(x.flatten_all()?.to_vec1()?) };
        self.layers.push([numbers(k)?, numbers(v)?]);
        self.cache.attend(layer, q, k, v)
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn footprint(&self) -> Footprint {
        self.cache.footprint()
    }
}

fn texts() -> [(&'static str, String); 3] {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut recall = String::new();
    let mut numbers = String::new();
    for _ in 0..1000 {
        let key: String = (0..5).map(|_| rng.random_range('a'..='z')).collect();
        recall += &format!(
            "The value of {key} is {}.\n",
            rng.random_range(10_000..100_000)
        );
        let row: Vec<String> = (0..5)
            .map(|_| rng.random_range(0..10_000).to_string())
            .collect();
        numbers += &format!("{}\n", row.join(", "));
    }
    let code = include_str!("../src/cache/lexico.rs").to_owned();
    [("recall", recall), ("numbers", numbers), ("code", code)]
}

/// Codes vectors `[heads, t, m]` as the cache does; the sum of their relative errors and the bytes in use.
fn measure(
    dictionary: &Dictionary,
    vectors: &[f32],
    heads: usize,
    sparsity: usize,
    tolerance: f32,
    most: usize,
) -> (f64, usize) {
    let m = dictionary.head_dim();
    let pursuit = Pursuit::new(dictionary, sparsity).unwrap();
    let pursuit = AdaptivePursuit::new(pursuit.with_tolerance(tolerance).unwrap(), most).unwrap();
    let mut extension = Extension::new(m);
    let format = CodeFormat {
        sparsity,
        variable: tolerance > 0.0,
        coefficients: CoefficientFormat::I8,
    };
    let mut codes = Codes::new(format).unwrap();
    let mut coded = Vec::new();
    let of_head = vectors.len() / heads;
    for first in (0..of_head).step_by(AT_ONCE * m) {
        let piece = heads_part(vectors, heads, first..of_head.min(first + AT_ONCE * m));
        let sparsities = vec![sparsity; heads];
        let batches = pursuit.encode_heads_on(&mut extension, &piece, &sparsities, &Rayon);
        for batch in batches.unwrap() {
            codes.extend(&batch);
        }
        coded.extend(piece);
    }
    let decoded = codes
        .decode(Atoms::extended(dictionary, &extension))
        .unwrap();
    let error = lexico::mean_relative_error(&coded, &decoded, m);
    let bytes = codes.bytes_used() + extension.bytes();
    (f64::from(error) * (coded.len() / m) as f64, bytes)
}

fn heads_part(vectors: &[f32], heads: usize, part: std::ops::Range<usize>) -> Vec<f32> {
    let heads = vectors.chunks_exact(vectors.len() / heads);
    heads
        .flat_map(|head| &head[part.clone()])
        .copied()
        .collect()
}

/// One layer after another; the mean relative error and the share of FP16.
fn measure_all(
    layers: &[(&Dictionary, &[f32])],
    heads: usize,
    sparsity: usize,
    tolerance: f32,
    most: usize,
) -> (f64, f64) {
    let (mut errors, mut bytes, mut numbers) = (0.0, 0, 0);
    for (dictionary, vectors) in layers {
        let (error, own) = measure(dictionary, vectors, heads, sparsity, tolerance, most);
        errors += error;
        bytes += own;
        numbers += vectors.len();
    }
    let m = layers[0].0.head_dim();
    let fp16 = 2 * numbers;
    (errors / (numbers / m) as f64, bytes as f64 / fp16 as f64)
}

/// The error at `share` on the line through points `(error, share)`, shares rising. Beyond its end that of
/// the end: all vectors but a few are within the tolerance there, and further nonzeros would not be used.
fn at(curve: &[(f64, f64)], share: f64) -> f64 {
    let end = curve[curve.len() - 1].0;
    let pair = curve.windows(2).find(|pair| share <= pair[1].1);
    pair.map_or(end, |pair| {
        let along = (share - pair[0].1) / (pair[1].1 - pair[0].1);
        pair[0].0 + along * (pair[1].0 - pair[0].0)
    })
}

#[test]
fn error_at_equal_bytes() {
    let model = Model::tiny().unwrap();
    let config = model.decoder.config();
    let dictionaries = model.dictionaries.clone().unwrap();
    println!(
        "| text | part | tolerance | added | of FP16 | error with | without, at equal bytes |"
    );
    println!("|---|---|---|---|---|---|---|");
    for (name, text) in texts() {
        let mut tokens = model.tokenizer.encode_first(&text).unwrap();
        tokens.truncate(POSITIONS);
        let mut listener = Listener {
            cache: FullCache::new(config, NumberType::F32),
            layers: Vec::new(),
        };
        let mut sequences = [Sequence {
            tokens: &tokens,
            cache: &mut listener,
        }];
        model.decoder.forward(&mut sequences, Logits::Last).unwrap();
        for (part, part_name) in ["keys", "values"].into_iter().enumerate() {
            let layers: Vec<(&Dictionary, &[f32])> = dictionaries
                .layers
                .iter()
                .zip(&listener.layers)
                .map(|(own, vectors)| {
                    let own = [&own.keys, &own.values];
                    (own[part], vectors[part].as_slice())
                })
                .collect();
            for tolerance in [0.1, 0.2] {
                let run = |sparsity, most| {
                    measure_all(&layers, config.kv_heads, sparsity, tolerance, most)
                };
                let curve = [4, 8, 12, 16].map(|sparsity| run(sparsity, 0));
                for most in [64, 256] {
                    let (with, share) = run(8, most);
                    let equal = at(&curve, share);
                    println!(
                        "| {name} | {part_name} | {tolerance} | {most} | {:.1} % | {with:.4} | {equal:.4} |",
                        100.0 * share,
                    );
                    // What is added is paid for, and makes no code worse beyond the coefficients' rounding.
                    let vectors = tokens.len() * config.kv_heads;
                    assert!(share <= curve[1].1 + most as f64 / vectors as f64);
                    assert!(with < curve[1].0 + 0.01);
                }
            }
        }
    }
}
