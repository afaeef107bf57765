//! The cache of one layer: the past as codes, the newest positions dense. No model, no tensors.

mod coding;
mod layer;
mod leaving;
mod memory;
mod options;
mod saved;
mod settings;

pub use coding::{Coder, Coding};
pub use layer::{LayerCache, LayerFootprint, outside_window};
pub(crate) use leaving::Leaving;
pub use memory::MemoryLimit;
pub use options::CacheOptions;
pub use saved::LayerState;
pub use settings::LayerSettings;
