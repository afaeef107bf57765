//! One file a task.

pub mod problems;
