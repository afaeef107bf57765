//! Sparse codes over universal dictionaries for the key and value vectors of language models.
//!
//! A vector of a model's KV cache is stored as a few atoms of a dictionary that was learned once
//! for the model: [`Pursuit`] finds them, [`Codes`] keeps them in a byte or three a nonzero, and
//! [`attention::attend`] attends to them as they are, without rebuilding a vector. The method is
//! that of Kim, Park, Cho and Papailiopoulos, *Lexico: Extreme KV Cache Compression via Sparse
//! Coding over Universal Dictionaries* (ICML 2025). Nothing here knows of models or tensors.
//!
//! ```
//! use lexico::{CodeFormat, CoefficientFormat, Codes, Dictionary, Pursuit};
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
//! let mut codes = Codes::new(CodeFormat {
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
pub mod codes;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dictionary;
pub mod encode;
mod error;
mod kernels;
pub mod learn;
pub mod matrix;
pub mod tensor_file;
pub mod threads;

pub use codes::{CodeFormat, Codes, CoefficientFormat};
pub use dictionary::{Dictionary, DictionarySet};
pub use encode::{EncodedBatch, Pursuit};
pub use error::{Error, Result};

/// Mean over the vectors `[n, m]` of `‖x − x̂‖ / ‖x‖`; a zero vector counts 0, no vectors give 0.
///
/// # Panics
/// Where the slices differ in length.
pub fn mean_relative_error(vectors: &[f32], decoded: &[f32], head_dim: usize) -> f32 {
    assert_eq!(vectors.len(), decoded.len(), "one decoded vector each");
    let pairs = vectors.chunks(head_dim).zip(decoded.chunks(head_dim));
    let errors = pairs.map(|(x, decoded)| {
        let square = |x: f64| x * x;
        let rest = x
            .iter()
            .zip(decoded)
            .map(|(&a, &b)| square(f64::from(a) - f64::from(b)));
        let (rest, whole) = (rest.sum::<f64>().sqrt(), dictionary::norm(x));
        if whole > 0.0 {
            (rest / whole) as f32
        } else {
            0.0
        }
    });
    encode::mean(&errors.collect::<Vec<_>>())
}
