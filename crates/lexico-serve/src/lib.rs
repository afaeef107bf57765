//! An OpenAI-compatible server whose KV caches are held as codes.
//!
//! A [`Server`] listens, loads a model, and writes texts for its clients, many at once: they join and leave at every step,
//! and each is what it would be alone. All caches together keep to a number of bytes. Prefixes of prompts are kept in
//! memory, and in a folder, from which later servers begin. `docs/SERVING.md` is for those who run one.
//!
//! ```
//! use lexico_llm::Model;
//! use lexico_serve::{Options, Server};
//!
//! let options = Options {
//!     address: ("127.0.0.1".to_owned(), 0),
//!     kv_memory: 64 << 20,
//!     ..Options::default()
//! };
//! let server = Server::bind(options)?;
//! println!("http://{}/v1", server.address());
//! // A real one stops by `lexico_serve::signalled`; this one at once.
//! server.run(Model::tiny, || std::future::ready(()))?;
//! # Ok::<(), lexico_serve::Error>(())
//! ```
//!
//! A [`Worker`] is the same without HTTP, for programs that have a frontend of their own.

#![forbid(unsafe_code)]

mod engine;
mod error;
mod kv_events;
mod memory;
mod metrics;
mod options;
mod prefix;
mod routes;
mod server;
mod structure;
mod tools;
mod worker;

pub use engine::{Event, Failure, FinishReason, Logprob};
pub use error::{Error, Result};
pub use options::Options;
pub use server::{Server, signalled};
pub use worker::{Figures, TextRequest, Worker, Writing};
