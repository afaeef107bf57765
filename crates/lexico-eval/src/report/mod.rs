//! What remains of an evaluation: results for machines, a page and a plot for people.

pub mod folder;
mod page;

use serde::Serialize;

use crate::evaluation::Evaluation;
use crate::tasks::reconstruction::Reconstruction;

/// Results that can be reported: as JSON, as they are serialised, as a page and as a plot.
pub trait Report: Serialize {
    /// HTML without outside resources.
    fn page(&self) -> String;

    /// SVG.
    fn plot(&self) -> String;
}

impl Report for Evaluation {
    fn page(&self) -> String {
        page::of_evaluation(self)
    }

    fn plot(&self) -> String {
        page::plot(self)
    }
}

impl Report for Reconstruction {
    fn page(&self) -> String {
        page::of_reconstruction(self)
    }

    fn plot(&self) -> String {
        self.curves(true)
    }
}
