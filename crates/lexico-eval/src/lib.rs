//! Tasks that compare KV cache methods on the same model and the same prompts, and what dictionaries are
//! worth on text that they have not seen.
//!
//! ```
//! use std::ops::ControlFlow;
//! use lexico_eval::evaluation::{EvaluateOptions, evaluate};
//! use lexico_eval::questions::{AskOptions, Asked};
//! use lexico_eval::tasks::problems::problems;
//! use lexico_llm::Model;
//!
//! let model = Model::tiny()?;
//! let task = Asked::new(&model, problems(1)?, AskOptions::default())?;
//! let caches = ["lexico:sparsity=16,window=16".parse()?];
//! let options = EvaluateOptions { items: 1, ..Default::default() };
//! let results = evaluate(&task, &model, &caches, &options, None, &mut |_| ControlFlow::Continue(()))?;
//! assert_eq!(results.runs[0].cache, "full");
//! assert!(results.runs[1].share < 0.6);
//! # Ok::<(), lexico_eval::Error>(())
//! ```

mod data;
mod error;
pub mod evaluation;
pub mod metrics;
pub mod plot;
pub mod questions;
pub mod report;
pub mod statistics;
pub mod task;
pub mod tasks;

pub use error::{Error, Result};
