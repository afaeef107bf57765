//! Trainings compared: held-out error against the time that learning took.

use serde::{Deserialize, Serialize};

use crate::plot::{Axis, Layout, Line, Panel, Scale, svg};
use crate::{Error, Result};

/// How the dictionaries of one training were learned.
#[derive(Debug, Clone, PartialEq)]
pub struct Course {
    /// What it is called.
    pub name: String,
    layers: Vec<Layer>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Layer {
    keys: Part,
    values: Part,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Part {
    epochs: Vec<Epoch>,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
struct Epoch {
    /// Spent on this dictionary up to the epoch's end.
    seconds: f64,
    /// Held-out mean relative error after it.
    relative_error: f64,
}

impl Part {
    fn seconds(&self) -> f64 {
        self.epochs.last().map_or(0.0, |epoch| epoch.seconds)
    }

    /// The least error of the epochs that ended by `seconds`.
    fn error_by(&self, seconds: f64) -> Option<f64> {
        let ended = self.epochs.iter().filter(|e| e.seconds <= seconds);
        ended.map(|e| e.relative_error).min_by(f64::total_cmp)
    }
}

impl Course {
    /// Reads the document that `lexico train --json` printed.
    ///
    /// # Errors
    /// [`Error::Data`] where it is none.
    pub fn read(name: &str, document: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Document {
            layers: Vec<Layer>,
        }
        let document: Document = serde_json::from_str(document).map_err(|error| Error::Data {
            name: name.to_owned(),
            line: error.line(),
            reason: format!("this is no document of lexico train --json: {error}"),
        })?;
        Ok(Self {
            name: name.to_owned(),
            layers: document.layers,
        })
    }

    fn parts(&self) -> impl Iterator<Item = [&Part; 2]> {
        self.layers.iter().map(|layer| [&layer.keys, &layer.values])
    }
}

/// Trainings of the same dictionaries.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison(Vec<Course>);

/// What one training came to, means over the layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The training.
    pub name: String,
    /// Spent on a dictionary.
    pub seconds: f64,
    /// Held-out mean relative error of the keys in the end.
    pub keys: f64,
    /// Held-out mean relative error of the values in the end.
    pub values: f64,
    /// That of the keys when the fastest of the trainings was done; `None` where no epoch had ended by then.
    pub keys_in_same_time: Option<f64>,
    /// That of the values then.
    pub values_in_same_time: Option<f64>,
}

impl Comparison {
    /// Takes at least one training.
    ///
    /// # Errors
    /// [`Error::Options`] where there is none, where they differ in layers, or one has no epochs.
    pub fn new(courses: Vec<Course>) -> Result<Self> {
        let refuse = |reason: String| Err(Error::Options(reason));
        let Some(first) = courses.first() else {
            return refuse("there is no training to compare".to_owned());
        };
        for course in &courses {
            if course.layers.len() != first.layers.len() {
                return refuse(format!(
                    "{} has {} layers and {} has {}: trainings of one model are compared",
                    first.name,
                    first.layers.len(),
                    course.name,
                    course.layers.len()
                ));
            }
            let mut parts = course.parts().flatten();
            if course.layers.is_empty() || parts.any(|part| part.epochs.is_empty()) {
                return refuse(format!("{}: a dictionary has no epochs", course.name));
            }
        }
        Ok(Self(courses))
    }

    /// What each training came to, in the order in which they were given.
    pub fn outcomes(&self) -> Vec<Outcome> {
        let layers = self.0[0].layers.len();
        // Of every dictionary, when the fastest was done.
        let least = |layer: usize, part: usize| {
            let courses = self.0.iter().filter_map(|c| c.parts().nth(layer));
            courses
                .map(|parts| parts[part].seconds())
                .fold(f64::INFINITY, f64::min)
        };
        let mean = |course: &Course, part: usize, by: &dyn Fn(usize) -> f64| {
            let parts = course.parts().enumerate();
            let errors = parts.map(|(layer, parts)| parts[part].error_by(by(layer)));
            let sum: Option<f64> = errors.sum();
            sum.map(|sum| sum / layers as f64)
        };
        let outcomes = self.0.iter().map(|course| Outcome {
            name: course.name.clone(),
            seconds: course.parts().flatten().map(Part::seconds).sum::<f64>() / (2 * layers) as f64,
            keys: mean(course, 0, &|_| f64::INFINITY).unwrap_or(f64::NAN),
            values: mean(course, 1, &|_| f64::INFINITY).unwrap_or(f64::NAN),
            keys_in_same_time: mean(course, 0, &|layer| least(layer, 0)),
            values_in_same_time: mean(course, 1, &|layer| least(layer, 1)),
        });
        outcomes.collect()
    }

    /// Plots, as SVG: held-out error against seconds, every layer's keys and values.
    #[must_use]
    pub fn plot(&self) -> String {
        // Tenths of a second are what one wants to read at an axis that does not begin at 0.
        let tenths = |seconds: f64| ((seconds * 10.0).round() / 10.0).max(0.1);
        let rows = (0..self.0[0].layers.len()).map(|layer| {
            let panel = |part: usize, name: &str| {
                let line = |course: &Course| Line {
                    name: course.name.clone(),
                    points: course.parts().nth(layer).map_or(Vec::new(), |parts| {
                        let epochs = parts[part].epochs.iter();
                        let points = epochs.map(|e| (tenths(e.seconds), e.relative_error));
                        points.collect()
                    }),
                    bars: Vec::new(),
                };
                Panel {
                    title: format!("{name} of layer {layer}"),
                    x: Axis {
                        label: "seconds of learning".to_owned(),
                        scale: Scale::LogarithmicPlaces,
                    },
                    y: Axis {
                        label: "held-out mean relative error".to_owned(),
                        scale: Scale::FromZero,
                    },
                    level: None,
                    lines: self.0.iter().map(line).collect(),
                }
            };
            vec![panel(0, "keys"), panel(1, "values")]
        });
        svg(&rows.collect::<Vec<_>>(), Layout::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course(name: &str, epochs: &str) -> Course {
        let part = format!("{{\"epochs\": [{epochs}], \"relative_error\": 0.2}}");
        let document = format!("{{\"layers\": [{{\"keys\": {part}, \"values\": {part}}}]}}");
        Course::read(name, &document).unwrap()
    }

    fn epoch(seconds: f64, error: f64) -> String {
        format!("{{\"seconds\": {seconds}, \"relative_error\": {error}}}")
    }

    #[test]
    fn the_slower_is_judged_when_the_faster_is_done() {
        let fast = course("fast", &[epoch(1.0, 0.5), epoch(2.0, 0.4)].join(","));
        let slow = course("slow", &[epoch(1.5, 0.6), epoch(3.0, 0.3)].join(","));
        let slower = course("slower", &epoch(2.5, 0.1));
        let compared = Comparison::new(vec![fast, slow, slower]).unwrap();
        let outcomes = compared.outcomes();
        let same: Vec<_> = outcomes.iter().map(|o| o.keys_in_same_time).collect();
        assert_eq!(same, [Some(0.4), Some(0.6), None]);
        let ends: Vec<_> = outcomes.iter().map(|o| o.values).collect();
        assert_eq!(ends, [0.4, 0.3, 0.1]);
        assert_eq!(outcomes[1].seconds, 3.0);
        let drawn = compared.plot();
        assert_eq!(drawn.matches("<circle").count(), 2 * 5);
        assert!(drawn.contains("slower") && drawn.contains("values of layer 0"));
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        for document in ["", "{}", "{\"layers\": [{}]}", "[1]"] {
            let error = Course::read("a.json", document).unwrap_err().to_string();
            assert!(error.contains("a.json"), "{error}");
        }
        let none = Course::read("none", "{\"layers\": []}").unwrap();
        assert!(Comparison::new(vec![]).is_err());
        assert!(Comparison::new(vec![none.clone()]).is_err());
        assert!(Comparison::new(vec![course("empty", "")]).is_err());
        assert!(Comparison::new(vec![course("one", &epoch(1.0, 0.5)), none]).is_err());
    }
}
