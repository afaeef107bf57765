//! What remains of an evaluation: results for machines, a page for people.

pub mod folder;
mod page;
