//! Codes over learned dictionaries for the keys and values of language models.
//!
//! A model's KV cache holds a key and a value vector of every token, head and layer. This crate stores each of them as a
//! sum of a few atoms of small dictionaries that were learned once for the model, and attends to the codes
//! directly. The method is that of Kim, Park, Cho and Papailiopoulos, *Lexico: Extreme KV Cache
//! Compression via Sparse Coding over Universal Dictionaries* (ICML 2025,
//! [arXiv 2412.08890](https://arxiv.org/abs/2412.08890)). Nothing here knows of models or tensors.
//!
//! ```
//! use lexico::dictionary::LayerSparsities;
//! use lexico::threads::Rayon;
//! use lexico::{DictionarySet, KeyValue, LayerCache, LayerSettings};
//!
//! # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny/dictionary.safetensors");
//! let dictionaries = DictionarySet::load(path)?;
//! let (kv_heads, m) = (dictionaries.model.kv_heads, dictionaries.model.head_dim);
//!
//! // The cache of layer 0: additive codes of 12 atoms a key and a value, the newest 128 positions dense.
//! let settings = LayerSettings::new(LayerSparsities::same(kv_heads, 12, 12));
//! let mut cache = LayerCache::new(&dictionaries.layers[0], settings)?;
//!
//! // A prompt of 500 positions: keys (after rotary embedding) and values, [kv_heads, 500, m].
//! let (keys, values) = (vec![0.5; kv_heads * 500 * m], vec![0.25; kv_heads * 500 * m]);
//! cache.append(KeyValue::new(&keys, &values), &Rayon)?;
//!
//! // One query a KV head attends to all of them, [kv_heads, 1, m].
//! let queries = vec![1.0; kv_heads * m];
//! let mut out = vec![0.0; kv_heads * m];
//! cache.attend(&queries, None, &mut out, &Rayon);
//!
//! let fp16 = 2 * 2 * kv_heads * 500 * m;
//! assert!(cache.footprint().total() < fp16 / 2);
//! # Ok::<(), lexico::Error>(())
//! ```
//!
//! | module | what it has |
//! |---|---|
//! | [`cache`] | [`LayerCache`], the cache of one layer: codes of the past, the first and the newest positions dense |
//! | [`dictionary`] | [`Dictionary`] of unit atoms, [`Codebooks`] for additive codes, maps of heads, the files that hold them |
//! | [`encode`] | [`Pursuit`] finds sparse codes, [`BeamSearch`] additive ones |
//! | [`codes`] | [`Codes`], which grow by position, and their form at rest |
//! | [`attention`] | attention on codes and on dense rows |
//! | [`learn`] | learning dictionaries and codebooks |
//!
//! A few vectors can be coded by themselves:
//!
//! ```
//! use lexico::{Codes, CoefficientFormat, Dictionary, Encoder, Pursuit, SparseFormat};
//!
//! // Six atoms of length 4: the axes and two diagonals.
//! let dictionary = Dictionary::normalised(
//!     vec![
//!         1.0, 0.0, 0.0, 0.0,  0.0, 1.0, 0.0, 0.0,  0.0, 0.0, 1.0, 0.0,
//!         0.0, 0.0, 0.0, 1.0,  1.0, 1.0, 0.0, 0.0,  0.0, 0.0, 1.0, -1.0,
//!     ],
//!     4,
//! )?;
//! let vectors = [3.0, 3.0, 0.0, 0.5, 0.0, 0.0, 2.0, -2.0];
//! let batch = Pursuit::new(&dictionary, 2)?.encode(&vectors)?;
//! assert!(batch.mean_relative_error() < 1e-6);
//!
//! let mut codes = Codes::new(SparseFormat {
//!     sparsity: 2,
//!     variable: false,
//!     coefficients: CoefficientFormat::I8,
//! })?;
//! codes.extend(&batch);
//! assert_eq!(codes.bytes_used(), 2 * (3 * 2 + 1));
//! let decoded = codes.decode(&dictionary)?;
//! assert!(decoded.iter().zip(vectors).all(|(a, b)| (a - b).abs() < 0.2));
//! # Ok::<(), lexico::Error>(())
//! ```

pub mod attention;
pub mod cache;
pub mod codes;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dictionary;
pub mod encode;
mod error;
pub mod kernels;
mod key_value;
pub mod learn;
pub mod shown;
mod size;
pub mod tensor_file;
pub mod threads;

pub use cache::{LayerCache, LayerSettings};
pub use codes::{AdditiveFormat, CodeFormat, Codes, CoefficientFormat, SparseFormat};
pub use dictionary::{Codebooks, Dictionary, DictionarySet};
pub use encode::{BeamSearch, EncodedBatch, Encoder, Fit, Pursuit};
pub use error::{Error, Result};
pub use key_value::KeyValue;
pub use size::parse_size;

/// Mean over the vectors `[n, m]` of `‖x − x̂‖ / ‖x‖`; a zero vector counts 0, no vectors give 0.
///
/// # Panics
/// Where the slices differ in length.
pub fn mean_relative_error(vectors: &[f32], decoded: &[f32], head_dim: usize) -> f32 {
    assert_eq!(vectors.len(), decoded.len(), "one decoded vector each");
    let pairs = vectors.chunks(head_dim).zip(decoded.chunks(head_dim));
    let errors = pairs.map(|(x, decoded)| {
        let differences = x.iter().zip(decoded);
        let squares = differences.map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2));
        let (rest, whole) = (squares.sum::<f64>().sqrt(), dictionary::norm(x));
        if whole > 0.0 {
            (rest / whole) as f32
        } else {
            0.0
        }
    });
    encode::mean(&errors.collect::<Vec<_>>())
}
