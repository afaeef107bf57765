#![allow(dead_code)] // each test file uses a part

pub(crate) mod oracle;

use std::path::PathBuf;

use lexico::Dictionary;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A folder of the reference material beside the repository, or `None`, said aloud.
pub(crate) fn shared(folder: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared")
        .join(folder);
    if path.is_dir() {
        return Some(path);
    }
    eprintln!("SKIPPED: {} is not there", path.display());
    None
}

pub(crate) fn drawn_vectors(seed: u64, count: usize, m: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Sums of uniforms: near enough to normal, and without a further dependency.
    (0..count * m)
        .map(|_| (0..4).map(|_| rng.random_range(-1f32..1.0)).sum())
        .collect()
}

pub(crate) fn random_dictionary(seed: u64, atoms: usize, m: usize) -> Dictionary {
    Dictionary::normalised(drawn_vectors(seed, atoms, m), m).expect("drawn atoms are not zero")
}

pub(crate) fn mean_relative_error(vectors: &[f32], decoded: &[f32], m: usize) -> f64 {
    let pairs = vectors.chunks(m).zip(decoded.chunks(m));
    let errors = pairs.map(|(x, y)| {
        let squares = |f: fn(f64, f64) -> f64| -> f64 {
            x.iter()
                .zip(y)
                .map(|(&x, &y)| f(f64::from(x), f64::from(y)).powi(2))
                .sum::<f64>()
                .sqrt()
        };
        squares(|x, y| x - y) / squares(|x, _| x)
    });
    errors.sum::<f64>() / (vectors.len() / m) as f64
}
