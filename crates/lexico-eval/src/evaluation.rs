//! Runs a task with each of several caches: `full`, and every other at the sizes asked for.

use std::ops::ControlFlow;
use std::str::FromStr;
use std::time::Instant;

use lexico::KeyValue;
use lexico_llm::Model;
use lexico_llm::cache::{CacheBudget, CacheContext, CacheSpec, Lengths};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::report::folder::{Batch, ReportFolder};
use crate::statistics::{Estimate, percentile};
use crate::task::{Band, Detail, Measure, Outcome, Task, bands, groups, named};

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

/// A task's results with each cache.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// The task.
    pub task: &'static str,
    /// The model's name.
    pub model: String,
    /// Settings that decide the results: those of the task and of the evaluation.
    pub settings: Map<String, Value>,
    /// Versions of what computed them.
    pub versions: Map<String, Value>,
    /// Seeds of random choices; null where none was made.
    pub seeds: Map<String, Value>,
    /// Measure of the scores.
    pub measure: Measure,
    /// Time that this took, without what was taken over from an interrupted run.
    pub seconds: f64,
    /// One entry a cache, `full` first.
    pub runs: Vec<Run>,
    /// Caches that could not be made as small as a budget.
    pub skipped: Vec<Skipped>,
    /// Prompts of the items, for people to read.
    #[serde(skip)]
    pub prompts: Vec<String>,
}

/// Results of the items with one cache.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// The cache, as the command line names it.
    pub cache: String,
    /// Name of its method.
    pub method: &'static str,
    /// Name of what it is one of several sizes of: the cache as it was asked for where a budget chose the rest, else its
    /// method, or its method's variant.
    pub family: String,
    /// The budgets that its settings were chosen for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<String>,
    /// Score, as the task's [`Measure`] says.
    pub score: f64,
    /// The lower end of the score's 95 % confidence interval; none of a single item.
    pub low: Option<f64>,
    /// The upper end.
    pub high: Option<f64>,
    /// Bytes of the cache over FP16's, mean over the items.
    pub share: f64,
    /// What it adds to the score of `full` on the same items, where that is a difference to tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside_full: Option<Difference>,
    /// Items still right of those that `full` gets right, where items are right or wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
    /// Differences of distributions, where these are compared.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub distributions: Option<Distributions>,
    /// Scores by position, where there is more than one band of positions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bands: Vec<Band>,
    /// Item by item.
    pub items: Vec<Outcome>,
}

/// What a cache adds to the score of `full` on the same items, as [`Measure::beside`] says.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// The difference.
    pub value: f64,
    /// The lower end of its 95 % confidence interval; none of a single item.
    pub low: Option<f64>,
    /// The upper end.
    pub high: Option<f64>,
}

/// Items that another cache gets right of those that `full` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Items that `full` gets right.
    pub of: usize,
    /// Items of these that are right with this cache.
    pub right: usize,
}

/// Differences of distributions of the next token from the full cache's, beside their mean divergence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Distributions {
    /// The 99th percentile of the tokens' divergences, in nats.
    pub percentile_99: f32,
    /// The 99.9th percentile.
    #[serde(rename = "percentile_99.9")]
    pub percentile_99_9: f32,
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
    /// Reason.
    pub reason: String,
}

/// Progress of an evaluation.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The cache that is run, or how many are.
    pub cache: &'a str,
    /// Steps done: prompts read and tokens decoded, each of all caches that run together.
    pub done: usize,
    /// Steps there are, about.
    pub of: usize,
}

/// Called at every step; may break off.
pub type OnProgress<'a> = dyn FnMut(Progress<'_>) -> ControlFlow<()> + 'a;

/// Runs `task` with `full` and each of `caches`, together.
///
/// Budgets are met at the lengths that the items have with `full`: of the options that a cache leaves open, the best
/// that fit. With a `report` folder what is done is saved there batch by batch; where a run was interrupted it goes on,
/// and with the same results. What is in the folder when this returns is for [`ReportFolder::finish`] to complete.
///
/// # Errors
/// [`Error::Options`] for settings that no run can meet, [`Error::Interrupted`], [`Error::File`], those of the model.
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
    let context = CacheContext {
        model: &model.name,
        config: model.decoder.config(),
        dictionaries: model.dictionaries.as_ref(),
        calibration: model.calibration.as_ref(),
        device: model.decoder.device(),
    };
    // Before anything is run: what a method refuses is soon found.
    if options.budgets.is_empty() {
        for spec in &others {
            spec.build(&context)?;
        }
    }
    task.check(model, &order)?;
    let settings = settings(task, model, caches, options)?;
    if let Some(report) = &mut report {
        report.begin(&settings)?;
    }
    let steps = |specs: &[&CacheSpec]| -> usize {
        let batches = order.chunks(options.batch);
        batches.map(|batch| task.steps(specs, batch)).sum()
    };
    let mut done = 0;
    let mut run = |specs: &[&CacheSpec], of: usize| -> Result<Vec<Vec<Outcome>>> {
        let names: Vec<String> = specs.iter().map(ToString::to_string).collect();
        let shown = match names.as_slice() {
            [name] => name.clone(),
            names => format!("{} caches", names.len()),
        };
        let mut outcomes = vec![Vec::with_capacity(order.len()); specs.len()];
        for (number, batch) in order.chunks(options.batch).enumerate() {
            let first = number * options.batch;
            let saved = |name: &String| report.as_ref().and_then(|own| own.saved(name, first));
            // Some alone would be computed in other company than before.
            let saved: Option<Vec<Vec<Outcome>>> = names
                .iter()
                .map(|name| saved(name).map(|batch| batch.outcomes.clone()))
                .collect();
            let made = if let Some(saved) = saved {
                saved
            } else {
                let mut taken = 0;
                let mut on_step = || {
                    taken += 1;
                    progress(Progress {
                        cache: &shown,
                        done: (done + taken).min(of),
                        of,
                    })
                };
                let made = task.run(model, specs, batch, &mut on_step)?;
                let made = made.ok_or(Error::Interrupted)?;
                if let Some(report) = &mut report {
                    let batches = names.iter().zip(&made).map(|(name, outcomes)| Batch {
                        cache: name.clone(),
                        first,
                        outcomes: outcomes.clone(),
                    });
                    report.append_all(&batches.collect::<Vec<_>>())?;
                }
                made
            };
            done += task.steps(specs, batch);
            for (all, made) in outcomes.iter_mut().zip(made) {
                all.extend(made);
            }
        }
        Ok(outcomes)
    };
    let began = Instant::now();
    let full = CacheSpec::from_str("full")?;
    let measure = task.measure();
    let mut skipped = Vec::new();
    let mut runs = Vec::new();
    if options.budgets.is_empty() {
        // All at once: what the model computes of a prompt serves every cache.
        let specs: Vec<&CacheSpec> = std::iter::once(&full).chain(others).collect();
        let outcomes = run(&specs, steps(&specs))?;
        let made = specs.into_iter().zip(outcomes);
        runs.extend(made.map(|(spec, items)| Run::new(spec, measure, items)));
    } else {
        let first = steps(&[&full]);
        let outcomes = run(&[&full], first + steps(&others))?;
        runs.extend(
            outcomes
                .into_iter()
                .map(|items| Run::new(&full, measure, items)),
        );
        let lengths = lengths(&runs[0]);
        // The caches to run, and for each what it was chosen for.
        let mut chosen: Vec<(CacheSpec, Vec<String>, String)> = Vec::new();
        for (spec, budget) in others
            .iter()
            .flat_map(|spec| options.budgets.iter().map(move |budget| (spec, budget)))
        {
            let within = spec.within(*budget, &lengths, &context);
            // Settings that a method refuses are found here, not in the middle of the run.
            let within = within.and_then(|own| own.build(&context).map(|_| own));
            let own = match within {
                Ok(own) => own,
                Err(error) => {
                    skipped.push(Skipped {
                        cache: spec.to_string(),
                        budget: budget.to_string(),
                        reason: error.to_string(),
                    });
                    continue;
                }
            };
            // Settings that leave nothing open are for no budget.
            let (name, asked) = (own.to_string(), spec.to_string());
            let named = (name != asked).then(|| budget.to_string());
            match chosen
                .iter_mut()
                .find(|(other, ..)| other.to_string() == name)
            {
                Some((_, budgets, _)) => budgets.extend(named),
                None => chosen.push((own, named.into_iter().collect(), asked)),
            }
        }
        let specs: Vec<&CacheSpec> = chosen.iter().map(|(own, ..)| own).collect();
        let outcomes = match specs.as_slice() {
            [] => Vec::new(),
            specs => run(specs, first + steps(specs))?,
        };
        for ((spec, budgets, asked), items) in chosen.iter().zip(outcomes) {
            let mut made = Run::new(spec, measure, items);
            if !budgets.is_empty() {
                made.family.clone_from(asked);
                made.budgets.clone_from(budgets);
            }
            runs.push(made);
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    if let [full, others @ ..] = runs.as_mut_slice() {
        for run in others {
            let difference = task.measure().beside(&run.items, &full.items);
            run.beside_full = difference.map(|Estimate { value, interval }| Difference {
                value,
                low: interval.map(|(low, _)| low),
                high: interval.map(|(_, high)| high),
            });
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
    let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    let prompts = order.iter().filter_map(|&item| task.prompt(item));
    Ok(Evaluation {
        task: task.name(),
        model: model.name.clone(),
        measure: task.measure(),
        versions: named([
            ("lexico", json!(env!("CARGO_PKG_VERSION"))),
            ("target", json!(target)),
        ]),
        seeds: named([("items", json!(options.seed))]),
        settings,
        seconds,
        runs,
        skipped,
        prompts: prompts.map(str::to_owned).collect(),
    })
}

impl Evaluation {
    /// A table of each group's scores: its header and its rows. A row is a cache, or a group where there are more groups than
    /// caches, so that the table is not wider than it must be. `None` where items have no groups.
    pub fn by_group(&self) -> Option<(Vec<&str>, Vec<Vec<String>>)> {
        let caches = self.runs.iter().map(|run| run.cache.as_str());
        let names = groups(&self.runs.first()?.items).into_iter();
        let names: Vec<&str> = names.map(|(name, _)| name).collect();
        let scores = self.runs.iter().map(|run| {
            let groups = groups(&run.items).into_iter();
            let score = |(_, items)| self.measure.print(self.measure.of(items).value);
            groups.map(score).collect()
        });
        let scores: Vec<Vec<String>> = scores.collect();
        let row = |name: &str, scores: Vec<String>| {
            let name = std::iter::once(name.to_owned());
            name.chain(scores).collect()
        };
        if names.is_empty() {
            return None;
        }
        if names.len() <= scores.len() {
            let header = std::iter::once("cache").chain(names).collect();
            let rows = caches.zip(scores).map(|(cache, own)| row(cache, own));
            return Some((header, rows.collect()));
        }
        let header = std::iter::once("").chain(caches).collect();
        let of = |group: usize| scores.iter().map(|own| own[group].clone()).collect();
        let rows = names.into_iter().enumerate();
        let rows = rows.map(|(group, name)| row(name, of(group)));
        Some((header, rows.collect()))
    }
}

impl Evaluation {
    /// A table of each cache's scores by position: its header and its rows. `None` where there is but one band.
    pub fn by_position(&self) -> Option<(Vec<String>, Vec<Vec<String>>)> {
        // The full cache has no divergence from itself.
        let skipped = usize::from(self.measure == Measure::Divergence);
        let runs = self.runs.iter().skip(skipped);
        let runs: Vec<&Run> = runs.filter(|run| !run.bands.is_empty()).collect();
        let mut header = vec!["cache".to_owned()];
        let bands = runs.first()?.bands.iter();
        header.extend(bands.map(|band| format!("{}–{}", thousands(band.from), thousands(band.to))));
        let row = |run: &&Run| {
            let scores = run.bands.iter();
            let scores = scores.map(|band| self.measure.print(band.score));
            std::iter::once(run.cache.clone()).chain(scores).collect()
        };
        Some((header, runs.iter().map(row).collect()))
    }
}

/// A number of positions as people read it.
fn thousands(number: usize) -> String {
    match (number / 1000, number % 1000) {
        (0, rest) => rest.to_string(),
        (more, rest) => format!("{},{rest:03}", thousands(more)),
    }
}

/// The items to run, in order.
fn order(task: &dyn Task, options: &EvaluateOptions) -> Result<Vec<usize>> {
    let refuse = |reason: &str| Err(Error::Options(reason.to_owned()));
    if options.batch == 0 {
        return refuse("a batch of 0 items is impossible: at least 1");
    }
    let mut order: Vec<usize> = (0..task.count()).collect();
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
    for (number, spec) in caches.iter().enumerate() {
        if let Some(same) = caches[..number].iter().find(|other| other.same_as(spec)) {
            let reason = if same.to_string() == spec.to_string() {
                format!("the cache {spec} is given twice; name each once")
            } else {
                format!("{same} and {spec} are the same cache; name it once")
            };
            return Err(Error::Options(reason));
        }
    }
    let full = CacheSpec::from_str("full")?;
    Ok(caches.iter().filter(|spec| !spec.same_as(&full)).collect())
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
        for layer in &set.layers {
            let sparse = layer.sparse.iter().flat_map(KeyValue::as_ref);
            let codebooks = layer.codebooks.iter().flat_map(KeyValue::as_ref);
            let maps = layer.maps.iter().flat_map(KeyValue::as_ref);
            let sums = sparse.map(|own| own.checksum());
            let sums = sums.chain(codebooks.map(|own| own.checksum()));
            for sum in sums.chain(maps.map(|own| own.checksum())) {
                checksum.update(&sum.to_le_bytes());
            }
        }
        format!("{:08x}", checksum.finalize())
    });
    let texts = |texts: &mut dyn Iterator<Item = String>| Value::from_iter(texts);
    let own = [
        ("program", json!(env!("CARGO_PKG_VERSION"))),
        // A cache that codes beside the decoding takes more where there are cores to spare.
        ("threads", json!(lexico_llm::threads_in_use())),
        ("task", json!(task.name())),
        ("model", json!(model.name)),
        ("fingerprint", json!(model.fingerprint()?)),
        ("items", json!(options.items.min(task.count()))),
        ("seed", json!(options.seed)),
        ("batch_size", json!(options.batch)),
        ("caches", texts(&mut caches.iter().map(ToString::to_string))),
        (
            "budgets",
            texts(&mut options.budgets.iter().map(ToString::to_string)),
        ),
        ("dictionaries_crc32", json!(dictionaries)),
    ];
    settings.extend(named(own));
    Ok(settings)
}

/// The lengths that the items of a run had.
fn lengths(run: &Run) -> Vec<Lengths> {
    let lengths = run.items.iter().map(|item| Lengths {
        prompt: item.prompt_positions,
        end: item.positions,
    });
    lengths.collect()
}

impl Run {
    fn new(spec: &CacheSpec, measure: Measure, items: Vec<Outcome>) -> Self {
        let Estimate { value, interval } = measure.of(&items);
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
            percentile_99: percentile(&all, 0.99),
            percentile_99_9: percentile(&all, 0.999),
        });
        Self {
            cache: spec.to_string(),
            method: spec.method().name,
            family: spec.family().to_owned(),
            budgets: Vec::new(),
            score: value,
            low: interval.map(|(low, _)| low),
            high: interval.map(|(_, high)| high),
            share: shares / items.len().max(1) as f64,
            beside_full: None,
            kept: None,
            distributions,
            bands: Some(bands(measure, &items))
                .filter(|bands| bands.len() > 1)
                .unwrap_or_default(),
            items,
        }
    }
}
