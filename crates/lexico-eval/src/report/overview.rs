//! Several evaluations beside each other: what each task says of every cache, and how much dictionaries differ by luck.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::folder::RESULTS;
use crate::error::{Result, refused};
use crate::evaluation::Difference;
use crate::task::Measure;

/// Largest file of results that is read.
const MAX_BYTES: u64 = 1 << 30;
/// Settings that may differ between evaluations that are compared: they decide what is run, and not what of.
const FREE: [&str; 8] = [
    "program",
    "threads",
    "batch_size",
    "caches",
    "budgets",
    "dictionaries_crc32",
    "fingerprint",
    "seed",
];
/// Settings that people need not see: checksums, and what the title says already.
const UNSAID: [&str; 3] = ["task", "model", "tokens_crc32"];
/// Characters of a setting that are shown.
const CHARACTERS: usize = 40;

/// What evaluations found, those of one task, model and settings together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Overview {
    /// In the order in which they come up.
    pub comparisons: Vec<Comparison>,
}

/// Evaluations of one task with one model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The task.
    pub task: String,
    /// The model's name.
    pub model: String,
    /// Settings of the task.
    pub settings: Map<String, Value>,
    /// Measure of the scores.
    pub measure: Measure,
    /// Score of the full cache.
    pub full: f64,
    /// The other caches, by their bytes.
    pub caches: Vec<CacheScores>,
    #[serde(skip)]
    reports: Vec<(PathBuf, Option<String>)>,
}

/// Scores of one cache.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CacheScores {
    /// The cache, as the command line names it.
    pub cache: String,
    /// What it is one of several sizes of.
    pub family: String,
    /// Bytes over FP16's, mean over the evaluations.
    pub share: f64,
    /// One entry for each different outcome, rising by score: dictionaries learned anew give others.
    pub outcomes: Vec<CacheOutcome>,
}

/// What one evaluation found of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CacheOutcome {
    /// Score, as the task's [`Measure`] says.
    pub score: f64,
    /// Bytes over FP16's.
    pub share: f64,
    /// What it adds to the score of `full`, where that is a difference to tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside_full: Option<Difference>,
    /// The 99.9th percentile of the divergence, where that is measured.
    #[serde(rename = "percentile_99.9", skip_serializing_if = "Option::is_none")]
    pub percentile_99_9: Option<f32>,
    /// Share of tokens of which both find the same one most likely, where that is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
}

/// A file of results, as far as it is needed.
#[derive(Deserialize)]
struct Results {
    task: String,
    model: String,
    settings: Map<String, Value>,
    measure: Measure,
    runs: Vec<ResultsOfCache>,
}

#[derive(Deserialize)]
struct ResultsOfCache {
    cache: String,
    family: String,
    #[serde(flatten)]
    outcome: CacheOutcome,
}

impl Overview {
    /// Reads the results of these report folders.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) for a folder without results, results that are none, a cache that two
    /// reports of the same task and dictionaries have, and scores of `full` that differ.
    pub fn read(folders: &[PathBuf]) -> Result<Self> {
        let mut comparisons: Vec<Comparison> = Vec::new();
        for folder in folders {
            let Results {
                task,
                model,
                settings: all,
                measure,
                runs,
            } = read(&folder.join(RESULTS))?;
            let dictionaries = all.get("dictionaries_crc32").and_then(Value::as_str);
            let dictionaries = dictionaries.map(str::to_owned);
            let mut settings = all;
            settings.retain(|name, _| !FREE.contains(&name.as_str()));
            let mut runs = runs.into_iter();
            let full = runs.next().filter(|run| run.cache == "full");
            let Some(full) = full else {
                return Err(refused(
                    folder,
                    "its results are not those of `lexico eval`, whose first cache is full",
                ));
            };
            let full = full.outcome.score;
            let same = |own: &&mut Comparison| {
                (&own.task, &own.model, &own.settings) == (&task, &model, &settings)
            };
            let comparison = match comparisons.iter_mut().find(same) {
                Some(comparison) => comparison,
                None => {
                    comparisons.push(Comparison {
                        task,
                        model,
                        settings,
                        measure,
                        full,
                        caches: Vec::new(),
                        reports: Vec::new(),
                    });
                    let last = comparisons.len() - 1;
                    &mut comparisons[last]
                }
            };
            comparison.add(folder, dictionaries, full, runs)?;
        }
        for comparison in &mut comparisons {
            for own in &mut comparison.caches {
                own.outcomes.sort_by(|a, b| a.score.total_cmp(&b.score));
                let shares: f64 = own.outcomes.iter().map(|outcome| outcome.share).sum();
                own.share = shares / own.outcomes.len() as f64;
            }
            comparison
                .caches
                .sort_by(|a, b| a.share.total_cmp(&b.share));
        }
        Ok(Self { comparisons })
    }
}

impl Comparison {
    fn add(
        &mut self,
        folder: &Path,
        dictionaries: Option<String>,
        full: f64,
        runs: impl Iterator<Item = ResultsOfCache>,
    ) -> Result<()> {
        if full != self.full {
            let first = self
                .reports
                .first()
                .map(|(folder, _)| folder.display().to_string());
            let reason = format!(
                "the full cache scores {full} here and {} in {}: of different models or texts; compare each alone",
                self.full,
                first.unwrap_or_default()
            );
            return Err(refused(folder, reason));
        }
        let mut before = self.reports.iter();
        let before = before.find(|(_, own)| *own == dictionaries);
        for run in runs {
            let place = self.caches.iter().position(|own| own.cache == run.cache);
            let Some(place) = place else {
                self.caches.push(CacheScores {
                    cache: run.cache,
                    family: run.family,
                    share: 0.0,
                    outcomes: vec![run.outcome],
                });
                continue;
            };
            let own = &mut self.caches[place];
            // Methods without dictionaries have the same outcome whatever dictionaries were there.
            if own.outcomes.contains(&run.outcome) {
                continue;
            }
            if let Some((other, _)) = before {
                let reason = format!(
                    "it has another outcome of {} than {}, with the same dictionaries; give one of both",
                    run.cache,
                    other.display()
                );
                return Err(refused(folder, reason));
            }
            own.outcomes.push(run.outcome);
        }
        self.reports.push((folder.to_owned(), dictionaries));
        Ok(())
    }

    /// The task, the model and the settings that people tell it by.
    #[must_use]
    pub fn title(&self) -> String {
        let said = self.settings.iter();
        let said = said.filter(|(name, _)| !UNSAID.contains(&name.as_str()));
        let said = said.filter_map(|(name, value)| {
            let value = match value {
                Value::Number(number) => number.to_string(),
                Value::String(text) => text.clone(),
                Value::Bool(true) => return Some(name.replace('_', " ")),
                Value::Array(all) => {
                    let all = all.iter().map(|one| match one {
                        Value::String(text) => text.clone(),
                        other => other.to_string(),
                    });
                    all.collect::<Vec<_>>().join(", ")
                }
                _ => return None,
            };
            let short = value.chars().count() <= CHARACTERS;
            (short && !value.is_empty()).then(|| format!("{} {value}", name.replace('_', " ")))
        });
        let mut title = format!("{}, {}", self.task, self.model);
        for setting in said {
            title += "; ";
            title += &setting;
        }
        title
    }

    /// A table of the caches: its header and its rows.
    #[must_use]
    pub fn table(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let outcomes = || self.caches.iter().flat_map(|own| &own.outcomes);
        let compared = outcomes().any(|own| own.beside_full.is_some());
        let distributions = outcomes().any(|own| own.agreement.is_some());
        let mut header = vec![
            "cache",
            "of FP16",
            self.measure.name(),
            "least",
            "most",
            "trainings",
        ];
        if compared {
            header.extend(["beside full", "95 % interval"]);
        }
        if distributions {
            header.extend(["99.9th", "same token"]);
        }
        let score = |score: f64| self.measure.print(score);
        let rows = self.caches.iter().map(|own| {
            let middle = own.median();
            let (first, last) = (own.outcomes.first(), own.outcomes.last());
            let end =
                |end: Option<&CacheOutcome>| end.map_or(String::new(), |own| score(own.score));
            let several = own.outcomes.len() > 1;
            let mut row = vec![
                own.cache.clone(),
                percent(own.share),
                score(middle.score),
                end(first.filter(|_| several)),
                end(last.filter(|_| several)),
                own.outcomes.len().to_string(),
            ];
            if compared {
                let beside = middle.beside_full;
                let print = |value: f64| self.measure.print_beside(value);
                row.push(beside.map_or(String::new(), |own| print(own.value)));
                row.push(match beside.map(|own| (own.low, own.high)) {
                    Some((Some(low), Some(high))) => format!("{} to {}", print(low), print(high)),
                    _ => String::new(),
                });
            }
            if distributions {
                let percentile = middle.percentile_99_9;
                row.push(percentile.map_or(String::new(), |own| score(f64::from(own))));
                row.push(middle.agreement.map_or(String::new(), percent));
            }
            row
        });
        let rows = rows.collect();
        (header, rows)
    }
}

impl CacheScores {
    /// The outcome in the middle by score; the lower one of two.
    #[must_use]
    pub fn median(&self) -> CacheOutcome {
        self.outcomes[(self.outcomes.len() - 1) / 2]
    }
}

fn read(path: &Path) -> Result<Results> {
    let failed = |error: std::io::Error| refused(path, error);
    let bytes = path.metadata().map_err(failed)?.len();
    if bytes > MAX_BYTES {
        return Err(refused(
            path,
            format!("{bytes} bytes are more than results have"),
        ));
    }
    let text = std::fs::read(path).map_err(failed)?;
    serde_json::from_slice(&text).map_err(|error| {
        refused(
            path,
            format!("these are no results of `lexico eval`: {error}"),
        )
    })
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
