//! Runs a task with each of several caches: `full` first, then every other at the sizes asked for.

use std::fmt;
use std::ops::ControlFlow;
use std::str::FromStr;
use std::time::Instant;

use lexico_llm::Model;
use lexico_llm::cache::{Budget, CacheContext, CacheSpec, Lengths};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::report::folder::ReportFolder;
use crate::statistics::{Estimate, percentile};
use crate::task::{Detail, Measure, Outcome, Task};

/// Settings of [`evaluate`].
#[derive(Debug, Clone)]
pub struct EvaluateOptions {
    /// Items to run, from the first on; all where there are fewer.
    pub items: usize,
    /// Puts the items in a random order before the first are taken.
    pub seed: Option<u64>,
    /// Items that are run together.
    pub batch: usize,
    /// Sizes that caches are to keep to: each cache is run once for each of them.
    pub budgets: Vec<CacheBudget>,
}

impl Default for EvaluateOptions {
    fn default() -> Self {
        Self {
            items: usize::MAX,
            seed: None,
            batch: 8,
            budgets: Vec::new(),
        }
    }
}

/// How large a cache may be at the end of an item of mean length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CacheBudget {
    /// A share of FP16's bytes.
    Share(f64),
    /// Bytes.
    Bytes(f64),
}

impl fmt::Display for CacheBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CacheBudget::Share(share) => write!(f, "{}%", round(100.0 * share)),
            CacheBudget::Bytes(bytes) => write!(f, "{}KiB", round(bytes / 1024.0)),
        }
    }
}

/// Without what only rounding has added.
fn round(x: f64) -> f64 {
    (x * 1e6).round() / 1e6
}

impl FromStr for CacheBudget {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        const UNITS: [(&str, f64); 5] = [
            ("%", 0.01),
            ("KiB", 1024.0),
            ("MiB", 1024.0 * 1024.0),
            ("GiB", 1024.0 * 1024.0 * 1024.0),
            ("B", 1.0),
        ];
        let parsed = UNITS.iter().find_map(|(unit, factor)| {
            let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
            let value = number * factor;
            (value.is_finite() && value > 0.0).then_some((*unit, value))
        });
        match parsed {
            Some(("%", share)) if share <= 1.0 => Ok(CacheBudget::Share(share)),
            Some((unit, bytes)) if unit != "%" => Ok(CacheBudget::Bytes(bytes)),
            _ => Err("a budget is a share of FP16, as 20%, or a size, as 64MiB".to_owned()),
        }
    }
}

/// A task's results with each cache.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// The task.
    pub task: &'static str,
    /// The model's name.
    pub model: String,
    /// What decides the results: of the task, of the evaluation.
    pub settings: Map<String, Value>,
    /// Of what computed them.
    pub versions: Map<String, Value>,
    /// What random choices began from; null where none was made.
    pub seeds: Map<String, Value>,
    /// What the scores are.
    pub measure: Measure,
    /// One entry a cache, `full` first.
    pub runs: Vec<Run>,
    /// Caches that could not be made as small as a budget.
    pub skipped: Vec<Skipped>,
    /// Of the items, for people to read.
    #[serde(skip)]
    pub prompts: Vec<String>,
}

/// What became of the items with one cache.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// The cache, as the command line names it.
    pub cache: String,
    /// Its method's name.
    pub method: &'static str,
    /// The budgets that its settings were chosen for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<String>,
    /// As the task's [`Measure`] says.
    pub score: f64,
    /// The lower end of the score's 95 % confidence interval.
    pub low: f64,
    /// The upper end.
    pub high: f64,
    /// Bytes of the cache over FP16's, mean over the items.
    pub share: f64,
    /// Of the items that `full` gets right, how many are still right, where items are right or wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
    /// Where distributions are compared.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub distributions: Option<Distributions>,
    /// Time that the items took.
    pub seconds: f64,
    /// Item by item.
    pub items: Vec<Outcome>,
}

/// Of the items that `full` gets right, how many another cache does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Those that `full` gets right.
    pub of: usize,
    /// Those of them that are right with this cache.
    pub right: usize,
}

/// How distributions of the next token differ from the full cache's, beside their mean divergence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Distributions {
    /// The 99th percentile of the tokens' divergences, in nats.
    pub percentile_99: f32,
    /// Share of tokens of which both find the same one most likely.
    pub agreement: f64,
}

/// A cache that could not be made as small as a budget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// The cache, as it was asked for.
    pub cache: String,
    /// The budget.
    pub budget: String,
    /// Why.
    pub reason: String,
}

/// How far an evaluation has come.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The cache that is run.
    pub cache: &'a str,
    /// Items done, of all caches.
    pub done: usize,
    /// Items there are, of all caches.
    pub of: usize,
}

/// Called at every step; may break off.
pub type OnProgress<'a> = dyn FnMut(Progress<'_>) -> ControlFlow<()> + 'a;

/// Runs `task` with `full` and then each of `caches`.
///
/// Budgets are met at the lengths that the items have with `full`: of the options that a cache leaves open, the best
/// that fit. With a `report` folder what is done is saved there batch by batch; where a run was interrupted it goes on,
/// and with the same results. What is in the folder when this returns is for [`ReportFolder::finish`] to complete.
///
/// # Errors
/// [`Error::Options`] for settings that no run can meet, [`Error::Interrupted`], [`Error::Report`], those of the model.
pub fn evaluate(
    task: &dyn Task,
    model: &Model,
    caches: &[CacheSpec],
    options: &EvaluateOptions,
    mut report: Option<&mut ReportFolder>,
    progress: &mut OnProgress<'_>,
) -> Result<Evaluation> {
    let order = order(task, options)?;
    let others = others(caches)?;
    let settings = settings(task, model, caches, options)?;
    if let Some(report) = &mut report {
        report.begin(&settings)?;
    }
    let sizes = options.budgets.len().max(1);
    let mut of = order.len() * (1 + others.len() * sizes);
    let mut done = 0;
    let mut run = |spec: &CacheSpec, budgets: Vec<String>, of: usize| -> Result<Run> {
        let name = spec.to_string();
        let mut outcomes = Vec::with_capacity(order.len());
        let mut seconds = 0.0;
        for batch in order.chunks(options.batch) {
            let saved = report.as_ref().and_then(|r| r.saved(&name, outcomes.len()));
            if let Some(batch) = saved {
                outcomes.extend(batch.outcomes.iter().cloned());
                seconds += batch.seconds;
                done += batch.outcomes.len();
                continue;
            }
            let started = Instant::now();
            let cache = name.as_str();
            let mut on_step = || progress(Progress { cache, done, of });
            let Some(made) = task.run(model, spec, batch, &mut on_step)? else {
                return Err(Error::Interrupted);
            };
            done += made.len();
            let took = started.elapsed().as_secs_f64();
            seconds += took;
            if let Some(report) = &mut report {
                report.save(&name, outcomes.len(), &made, took)?;
            }
            outcomes.extend(made);
        }
        Ok(Run::new(spec, budgets, task.measure(), seconds, outcomes))
    };
    let full = CacheSpec::from_str("full")?;
    let mut runs = vec![run(&full, Vec::new(), of)?];
    let mut skipped = Vec::new();
    let context = CacheContext {
        model: &model.name,
        config: model.decoder.config(),
        dictionaries: model.dictionaries.as_ref(),
    };
    for spec in others {
        let budgets: Vec<Option<CacheBudget>> = match options.budgets.as_slice() {
            [] => vec![None],
            budgets => budgets.iter().copied().map(Some).collect(),
        };
        for budget in budgets {
            let named = budget.map(|b| b.to_string());
            let chosen = match budget {
                None => Ok(spec.clone()),
                Some(budget) => spec.within(budget.of(&runs[0], &context), &context),
            };
            let chosen = match chosen {
                Err(error @ lexico_llm::Error::Budget { .. }) => {
                    skipped.push(Skipped {
                        cache: spec.to_string(),
                        budget: named.unwrap_or_default(),
                        reason: error.to_string(),
                    });
                    of -= order.len();
                    continue;
                }
                chosen => chosen?,
            };
            let chosen_name = chosen.to_string();
            // Settings that leave nothing open are for no budget.
            let named = named.filter(|_| chosen_name != spec.to_string());
            if let Some(same) = runs.iter_mut().find(|run| run.cache == chosen_name) {
                same.budgets.extend(named);
                of -= order.len();
                continue;
            }
            let made = run(&chosen, named.into_iter().collect(), of)?;
            runs.push(made);
        }
    }
    if task.measure() == Measure::Accuracy {
        let right: Vec<bool> = runs[0].items.iter().map(|item| item.score >= 1.0).collect();
        for run in &mut runs {
            let still = run.items.iter().zip(&right).filter(|(_, full)| **full);
            run.kept = Some(Kept {
                of: right.iter().filter(|right| **right).count(),
                right: still.filter(|(item, _)| item.score >= 1.0).count(),
            });
        }
    }
    let prompts = order.iter().filter_map(|&item| task.prompt(item));
    Ok(Evaluation {
        task: task.name(),
        model: model.name.clone(),
        measure: task.measure(),
        versions: versions(),
        seeds: Map::from_iter([("items".to_owned(), json!(options.seed))]),
        settings,
        runs,
        skipped,
        prompts: prompts.map(str::to_owned).collect(),
    })
}

/// The items to run, in order.
fn order(task: &dyn Task, options: &EvaluateOptions) -> Result<Vec<usize>> {
    let refuse = |reason: &str| Err(Error::Options(reason.to_owned()));
    if options.batch == 0 {
        return refuse("a batch of 0 items is impossible: at least 1");
    }
    let mut order: Vec<usize> = (0..task.len()).collect();
    if let Some(seed) = options.seed {
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    }
    order.truncate(options.items);
    if order.is_empty() {
        return refuse("0 items are impossible: at least 1");
    }
    Ok(order)
}

/// The caches to run beside `full`.
fn others(caches: &[CacheSpec]) -> Result<Vec<&CacheSpec>> {
    let mut names: Vec<String> = Vec::new();
    let mut others = Vec::new();
    for spec in caches {
        let name = spec.to_string();
        if names.contains(&name) {
            return Err(Error::Options(format!(
                "the cache {name} is given twice; name each once"
            )));
        }
        if name != "full" {
            others.push(spec);
        }
        names.push(name);
    }
    Ok(others)
}

fn settings(
    task: &dyn Task,
    model: &Model,
    caches: &[CacheSpec],
    options: &EvaluateOptions,
) -> Result<Map<String, Value>> {
    let mut settings = task.settings();
    let dictionaries = model.dictionaries.as_ref().map(|set| {
        let mut checksum = crc32fast::Hasher::new();
        for dictionary in set
            .layers
            .iter()
            .flat_map(|layer| [&layer.keys, &layer.values])
        {
            checksum.update(&dictionary.checksum().to_le_bytes());
        }
        format!("{:08x}", checksum.finalize())
    });
    let texts = |texts: &mut dyn Iterator<Item = String>| Value::from_iter(texts);
    let own = [
        ("task", json!(task.name())),
        ("model", json!(model.name)),
        ("fingerprint", json!(model.fingerprint()?)),
        ("items", json!(options.items.min(task.len()))),
        ("seed", json!(options.seed)),
        ("batch_size", json!(options.batch)),
        ("caches", texts(&mut caches.iter().map(ToString::to_string))),
        (
            "budgets",
            texts(&mut options.budgets.iter().map(ToString::to_string)),
        ),
        ("dictionaries_crc32", json!(dictionaries)),
    ];
    settings.extend(own.map(|(name, value)| (name.to_owned(), value)));
    Ok(settings)
}

fn versions() -> Map<String, Value> {
    let own = ("lexico".to_owned(), json!(env!("CARGO_PKG_VERSION")));
    let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    Map::from_iter([own, ("target".to_owned(), json!(target))])
}

impl CacheBudget {
    /// For items of the lengths that they had in a run.
    fn of(self, run: &Run, context: &CacheContext<'_>) -> Budget {
        let mean = |f: &dyn Fn(&Outcome) -> usize| {
            let sum: usize = run.items.iter().map(f).sum();
            (sum as f64 / run.items.len().max(1) as f64).round() as usize
        };
        let lengths = Lengths {
            prompt: mean(&|item| item.prompt_positions),
            end: mean(&|item| item.positions),
        };
        let bytes = match self {
            CacheBudget::Share(share) => {
                share * context.config.fp16_cache_bytes(lengths.end) as f64
            }
            CacheBudget::Bytes(bytes) => bytes,
        };
        Budget { bytes, lengths }
    }
}

impl Run {
    fn new(
        spec: &CacheSpec,
        budgets: Vec<String>,
        measure: Measure,
        seconds: f64,
        items: Vec<Outcome>,
    ) -> Self {
        let Estimate { value, low, high } = measure.of(&items);
        let shares: f64 = items.iter().map(|item| item.share).sum();
        let (mut all, mut agreements) = (Vec::new(), 0.0);
        for item in &items {
            if let Detail::Distributions {
                divergences,
                agreement,
            } = &item.detail
            {
                all.extend_from_slice(divergences);
                agreements += agreement * divergences.len() as f64;
            }
        }
        let distributions = (!all.is_empty()).then(|| Distributions {
            agreement: agreements / all.len() as f64,
            percentile_99: percentile(all, 0.99),
        });
        Self {
            cache: spec.to_string(),
            method: spec.method().name,
            budgets,
            score: value,
            low,
            high,
            share: shares / items.len().max(1) as f64,
            kept: None,
            distributions,
            seconds,
            items,
        }
    }
}
