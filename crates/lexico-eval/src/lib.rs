//! Tasks that compare KV cache methods on the same model and the same prompts, and what dictionaries are
//! worth on text that they have not seen.
//!
//! ```
//! use std::ops::ControlFlow;
//! use lexico_eval::tasks::problems::{ProblemOptions, Problems};
//! use lexico_llm::Model;
//!
//! let model = Model::tiny()?;
//! let problems = Problems::tiny()?;
//! let options = ProblemOptions { items: 1, ..Default::default() };
//! let run = problems.run(&model, &"full".parse()?, &options, &mut |_| ControlFlow::Continue(()))?;
//! assert_eq!(run.items.len(), 1);
//! assert!((0.9..1.2).contains(&run.share));
//! # Ok::<(), lexico_eval::Error>(())
//! ```

mod data;
pub mod dictionary;
mod error;
pub mod learning;
pub mod metrics;
pub mod plot;
pub mod task;
pub mod tasks;

pub use error::{Error, Result};
