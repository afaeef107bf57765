//! Language models whose KV cache is held as codes over learned dictionaries.
//!
//! A [`Model`] reads a Hugging Face folder or a GGUF file, or is the small one embedded here; a cache is made by
//! name, from [`cache::METHODS`]; [`generate`](generate::generate) goes on from a prompt, and a
//! [`Session`](session::Session) keeps a text or a conversation from call to call and reads only what is new.
//!
//! ```
//! use std::ops::ControlFlow;
//! use lexico_llm::{Model, cache::CacheSpec};
//! use lexico_llm::generate::{GenerateOptions, generate};
//! use lexico_llm::sample::{Sampler, Sampling};
//!
//! let model = Model::tiny()?;
//! let spec: CacheSpec = "lexico:sparsity=8,window=16".parse()?;
//! let mut cache = model.cache(&spec)?;
//! let prompt = model.tokenizer.encode_first("Question: Ana has 3 coins at home.")?;
//! let mut sampler = Sampler::new(Sampling::default())?;
//! let options = GenerateOptions { max_tokens: 8, ..Default::default() };
//! let generated = generate(&model, cache.as_mut(), &prompt, &mut sampler, &options, &mut |text| {
//!     print!("{text}");
//!     ControlFlow::Continue(())
//! })?;
//! assert_eq!(generated.tokens.len(), 8);
//! assert_eq!(cache.len(), prompt.len() + 7);
//! # Ok::<(), lexico_llm::Error>(())
//! ```

mod allocator;
mod block_matrix;
pub mod cache;
pub mod chat;
pub mod config;
mod corpus;
pub mod decoder;
mod device;
mod error;
pub mod export;
pub mod generate;
pub mod gguf;
pub mod half_matrix;
pub mod hub;
pub mod import;
mod model;
mod panics;
pub mod published;
pub mod sample;
pub mod saved;
pub mod session;
pub mod shape;
mod threads;
mod tokenizer;
mod tokenizer_config;
pub mod train;
mod weights;

pub use allocator::give_back_free_memory;
pub use candle_core::Device;
pub use corpus::{Chunks, Corpus};
pub use device::DeviceName;
pub use error::{Error, Result};

pub use model::{DICTIONARY_FILE, Model};
pub use panics::{caught, hide_caught_panics};
pub use threads::threads_in_use;
pub use tokenizer::{TextStream, TokenPiece, Tokenizer};
pub use tokenizer_config::TokenizerFiles;
pub use weights::Quantize;
