//! Reading of the corpus by the model, and sampling of its keys and values.

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
use super::state::{State, StateError, damaged, refused};
use super::{OnProgress, PARTS, READING, TrainOptions, TrainProgress, go_on};
use crate::cache::{Footprint, FullCache, KvCache, Step};
use crate::corpus::{Chunks, Corpus};
use crate::decoder::Logits;
use crate::error::{Error, Result};
use crate::model::Model;

/// Period of held-out chunks: the last of so many is kept apart to judge the dictionaries on.
const HELD_OUT: usize = 20;
/// Max vectors that a dictionary is judged on.
const HELD_OUT_VECTORS: usize = 4096;
/// Max held-out chunks that the model reads again in the end, its keys and values coded.
pub(super) const JUDGED_WINDOWS: usize = 16;

/// Progress of reading.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Progress {
    windows: usize,
    pub(super) tokens: usize,
    /// Checksum of all tokens read, so that another text under the same name is noticed.
    checksum: u32,
    /// Vectors offered so far to each sample to learn from, and to each to judge by.
    seen: u64,
    seen_held_out: u64,
    /// Chunks that attention is judged on.
    pub(super) judged: Vec<Vec<u32>>,
    done: bool,
}

/// Samples of the keys and the values of every layer.
pub(super) struct Reading {
    pub(super) progress: Progress,
    /// Samples of keys and values in turn, layer after layer.
    pub(super) samples: Vec<Sample>,
    pub(super) head_dim: usize,
    kv_heads: usize,
}

/// Samples of the keys or the values of a layer.
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
            let reservoir = |ending: &str, max| {
                let path = state.path(&format!("{}.{ending}", name(number)));
                let rows = Rows::open(&path, config.head_dim, max);
                let rows = rows.map_err(|error| state.not_saved(error))?;
                Ok::<_, Error>(Reservoir { rows, max })
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

    /// Counts the vectors of each sample to learn from, at most `max`.
    pub(super) fn count(&self, max: usize) -> usize {
        self.progress.seen.min(max as u64) as usize
    }

    /// Counts the vectors of each sample to judge by.
    pub(super) fn held_out_count(&self) -> usize {
        self.progress.seen_held_out.min(HELD_OUT_VECTORS as u64) as usize
    }

    /// Writes the samples to learn from for other tools.
    pub(super) fn keep(&self, path: &Path) -> Result<()> {
        let samples = self.samples.iter().enumerate();
        let names = samples.map(|(number, sample)| (name(number), self.count(sample.train.max)));
        let names: Vec<(String, usize)> = names.collect();
        let shape = |count| vec![count, self.head_dim];
        let shapes = names.iter();
        let shapes = shapes.map(|(name, count)| (name.as_str(), Dtype::F32, shape(*count)));
        let shapes: Vec<_> = shapes.collect();
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

    /// Counts a chunk, which is `held_out` or not.
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

/// Names a layer's keys (even numbers) or values.
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

/// Lets the model read the rest of the corpus.
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
    let mut windows = corpus.chunks(&model.tokenizer, options.context, options.tokens, seed)?;
    // Where there are fewer chunks than a period has, the last one is held out.
    let first: Vec<Vec<u32>> = windows.by_ref().take(HELD_OUT).collect::<Result<_>>()?;
    let period = first.len();
    let mut first = first.into_iter();
    let mut next = |windows: &mut Chunks<'_>| first.next().map(Ok).or_else(|| windows.next());
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
        let decoder = &model.decoder;
        decoder.forward_one(&window, &mut collector, Logits::Last)?;
        reading.add(window, held_out);
        let tokens = reading.progress.tokens;
        let total = windows.total();
        let flow = progress(TrainProgress::Reading { tokens, total });
        if flow == ControlFlow::Break(()) || saved.elapsed() >= state.every {
            reading.save(state)?;
            saved = Instant::now();
        }
        go_on(flow)?;
    }
    reading.progress.done = true;
    reading.save(state)?;
    Ok(reading)
}

/// Passes over the chunks that were read before, which must be the same.
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
        return Err(refused(&state.path(READING), StateError::OtherCorpus));
    }
    if before.windows > 0 && before.seen == 0 && before.seen_held_out == 0 {
        return Err(damaged(&state.path(READING)));
    }
    Ok(())
}

/// Cache for one chunk that samples the keys and values it is given.
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
        let step = Step::new(q, k, v)?;
        step.check_finite(layer)?;
        for (number, vectors) in [(2 * layer, &step.keys), (2 * layer + 1, &step.values)] {
            let sample = &self.reading.samples[number];
            // The draws for a chunk depend on nothing before it: it can be read again.
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream((progress.windows * self.reading.samples.len() + number) as u64);
            let (reservoir, seen) = match self.held_out {
                true => (&sample.held_out, progress.seen_held_out),
                false => (&sample.train, progress.seen),
            };
            let offered = reservoir.offer(vectors, seen, &mut rng);
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
