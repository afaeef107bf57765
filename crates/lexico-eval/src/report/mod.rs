//! Reports of an evaluation: results for machines, a page and a plot for people.

pub mod folder;
pub mod overview;
mod page;

use serde::Serialize;

/// Results that can be reported: as JSON, as they are serialised, as a page and as a plot.
pub trait Report: Serialize {
    /// HTML without outside resources.
    ///
    /// # Errors
    /// Those of its template.
    fn page(&self) -> Result<String, minijinja::Error>;

    /// SVG.
    fn plot(&self) -> String;
}
