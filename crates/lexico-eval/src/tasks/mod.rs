//! One file a task.

pub mod problems;
pub mod text;
