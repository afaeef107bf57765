//! The model reads; a sample of its keys and values is kept.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use ::lexico::attention::NumberType;
use ::lexico::tensor_file::{self, Dtype};
use candle_core::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::rows::{Reservoir, Rows};
use super::state::{State, damaged, refused};
use super::{OnProgress, PARTS, READING, TrainOptions, TrainProgress, check_finite, go_on};
use crate::cache::{Footprint, FullCache, KvCache};
use crate::corpus::{Corpus, Windows};
use crate::decoder::{Logits, Sequence};
use crate::error::{Error, Result};
use crate::model::Model;

/// One window in so many is kept apart to judge the dictionaries on.
const HELD_OUT: usize = 20;
/// Vectors that a dictionary is judged on at the most.
const HELD_OUT_VECTORS: usize = 4096;
/// Held-out windows that the model reads again in the end, its keys and values coded.
pub(super) const JUDGED_WINDOWS: usize = 16;

/// How far reading has come.
#[derive(Default, Serialize, Deserialize)]
struct Progress {
    windows: usize,
    tokens: usize,
    /// Of all tokens read, so that another text under the same name is noticed.
    checksum: u32,
    /// Vectors that each sample to learn from, and each to judge by, was offered.
    seen: u64,
    seen_held_out: u64,
    judged: Vec<Vec<u32>>,
    done: bool,
}

/// What was read: samples of the keys and the values of every layer.
pub(super) struct Reading {
    progress: Progress,
    samples: Vec<Sample>,
    head_dim: usize,
    kv_heads: usize,
}

/// Of one layer's keys or values.
pub(super) struct Sample {
    pub(super) train: Reservoir,
    pub(super) held_out: Reservoir,
}

impl Reading {
    fn open(model: &Model, options: &TrainOptions, state: &State) -> Result<Self> {
        let config = model.decoder.config();
        let progress: Progress = state.load_json(READING)?.unwrap_or_default();
        let mut samples = Vec::with_capacity(2 * config.layers);
        for number in 0..2 * config.layers {
            let reservoir = |ending: &str, most| {
                let path = state.path(&format!("{}.{ending}", name(number)));
                let rows = Rows::open(&path, config.head_dim, most);
                let rows = rows.map_err(|error| state.not_saved(error))?;
                Ok::<_, Error>(Reservoir { rows, most })
            };
            samples.push(Sample {
                train: reservoir("vectors", options.vectors)?,
                held_out: reservoir("held-out", HELD_OUT_VECTORS)?,
            });
        }
        Ok(Self {
            progress,
            samples,
            head_dim: config.head_dim,
            kv_heads: config.kv_heads,
        })
    }

    /// Samples of keys and values in turn, layer after layer.
    pub(super) fn samples(&self) -> &[Sample] {
        &self.samples
    }

    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    pub(super) fn tokens(&self) -> usize {
        self.progress.tokens
    }

    /// The windows that attention is to be judged on.
    pub(super) fn judged(&self) -> &[Vec<u32>] {
        &self.progress.judged
    }

    /// Vectors of each sample to learn from, `most` at the most.
    pub(super) fn count(&self, most: usize) -> usize {
        self.progress.seen.min(most as u64) as usize
    }

    /// Vectors of each sample to judge by.
    pub(super) fn held_out_count(&self) -> usize {
        self.progress.seen_held_out.min(HELD_OUT_VECTORS as u64) as usize
    }

    /// Writes the samples to learn from for other tools.
    pub(super) fn keep(&self, path: &Path) -> Result<()> {
        let mut names = Vec::with_capacity(self.samples.len());
        for (number, sample) in self.samples.iter().enumerate() {
            names.push((name(number), self.count(sample.train.most)));
        }
        let shapes: Vec<_> = names
            .iter()
            .map(|(name, count)| (name.as_str(), Dtype::F32, vec![*count, self.head_dim]))
            .collect();
        let mut failed = None;
        let written = tensor_file::write_in_turn(path, &shapes, |number| {
            let vectors = self.samples[number].train.rows.read_first(names[number].1);
            let vectors = vectors.map_err(|error| failed = Some(error)).ok()?;
            Some(vectors.iter().flat_map(|x| x.to_le_bytes()).collect())
        });
        match failed {
            Some(error) => Err(error),
            None => Ok(written?),
        }
    }

    fn save(&self, state: &State) -> Result<()> {
        for sample in &self.samples {
            for reservoir in [&sample.train, &sample.held_out] {
                let synced = reservoir.rows.sync();
                synced.map_err(|error| state.not_saved(error))?;
            }
        }
        state.save_json(READING, &self.progress)
    }

    /// Counts a window, which is `held_out` or not.
    fn add(&mut self, window: Vec<u32>, held_out: bool) {
        let progress = &mut self.progress;
        progress.windows += 1;
        progress.tokens += window.len();
        progress.checksum = checksum(progress.checksum, &window);
        let vectors = (self.kv_heads * window.len()) as u64;
        if held_out {
            progress.seen_held_out += vectors;
            if progress.judged.len() < JUDGED_WINDOWS {
                progress.judged.push(window);
            }
        } else {
            progress.seen += vectors;
        }
    }
}

/// The name of a layer's keys (even numbers) or values.
pub(super) fn name(number: usize) -> String {
    format!("layers.{}.{}", number / 2, PARTS[number % 2])
}

fn checksum(before: u32, window: &[u32]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(before);
    for token in window {
        hasher.update(&token.to_le_bytes());
    }
    hasher.finalize()
}

/// Lets the model read what it has not read yet.
pub(super) fn read(
    model: &Model,
    corpus: &Corpus,
    options: &TrainOptions,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<Reading> {
    let mut reading = Reading::open(model, options, state)?;
    if reading.progress.done {
        let tokens = reading.progress.tokens;
        go_on(progress(TrainProgress::Reading {
            tokens,
            total: tokens,
        }))?;
        return Ok(reading);
    }
    let seed = options.learn.seed;
    let mut windows = corpus.windows(&model.tokenizer, options.context, options.tokens, seed)?;
    // Where there are fewer windows than a period has, the last one is held out.
    let first: Vec<Vec<u32>> = windows.by_ref().take(HELD_OUT).collect::<Result<_>>()?;
    let period = first.len();
    let mut first = first.into_iter();
    let mut next = |windows: &mut Windows<'_>| first.next().map(Ok).or_else(|| windows.next());
    pass_over(&reading.progress, || next(&mut windows), state)?;
    let mut saved = Instant::now();
    while let Some(window) = next(&mut windows) {
        let window = window?;
        let number = reading.progress.windows;
        let held_out = number % period == period - 1;
        let mut collector = Collector {
            cache: FullCache::new(model.decoder.config(), NumberType::F32),
            reading: &reading,
            state,
            held_out,
            seed,
        };
        let mut sequences = [Sequence {
            tokens: &window,
            cache: &mut collector,
        }];
        model.decoder.forward(&mut sequences, Logits::Last)?;
        reading.add(window, held_out);
        let tokens = reading.progress.tokens;
        let total = windows.total();
        let flow = progress(TrainProgress::Reading { tokens, total });
        if flow == ControlFlow::Break(()) || saved.elapsed() >= state.every() {
            reading.save(state)?;
            saved = Instant::now();
        }
        go_on(flow)?;
    }
    reading.progress.done = true;
    reading.save(state)?;
    Ok(reading)
}

/// Passes over the windows that were read before, which must be the same.
fn pass_over(
    before: &Progress,
    mut next: impl FnMut() -> Option<Result<Vec<u32>>>,
    state: &State,
) -> Result<()> {
    let mut again = 0;
    for _ in 0..before.windows {
        let Some(window) = next() else { break };
        again = checksum(again, &window?);
    }
    if again != before.checksum {
        let reason = "the corpus is another than the state was begun with, though it is called the same; give the \
                      same text to go on, or remove the state's folder to give it up";
        return Err(refused(&state.path(READING), reason.to_owned()));
    }
    if before.windows > 0 && before.seen == 0 && before.seen_held_out == 0 {
        return Err(damaged(&state.path(READING)));
    }
    Ok(())
}

/// A cache for one window that samples the keys and values it is given.
struct Collector<'a> {
    cache: FullCache,
    reading: &'a Reading,
    state: &'a State,
    held_out: bool,
    seed: u64,
}

impl KvCache for Collector<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let progress = &self.reading.progress;
        for (number, part, x) in [(2 * layer, "key", k), (2 * layer + 1, "value", v)] {
            let vectors = x.flatten_all()?.to_vec1::<f32>()?;
            check_finite(layer, part, &vectors, self.reading.head_dim)?;
            let sample = &self.reading.samples[number];
            // What is drawn for a window depends on nothing before it: it can be read again.
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream((progress.windows * self.reading.samples.len() + number) as u64);
            let offered = if self.held_out {
                let seen = progress.seen_held_out;
                sample.held_out.offer(&vectors, seen, &mut rng)
            } else {
                sample.train.offer(&vectors, progress.seen, &mut rng)
            };
            offered.map_err(|error| self.state.not_saved(error))?;
        }
        self.cache.attend(layer, q, k, v)
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn footprint(&self) -> Footprint {
        self.cache.footprint()
    }
}
