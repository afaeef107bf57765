//! Reading of the corpus by the model: its keys and values are sampled, its queries summed up.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use ::lexico::attention::NumberType;
use ::lexico::tensor_file::{self, Dtype};
use candle_core::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::queries::QueryMoments;
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
/// Position beyond which no chunk begins.
const LAST_POSITION: usize = 1 << 15;
/// Keeps the draws of positions apart from those of the samples.
const OFFSETS: u64 = 0x0FF5_E750;
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
    pub(super) checksum: u32,
    /// Positions offered so far to each sample to learn from, and to each to judge by.
    positions: u64,
    positions_held_out: u64,
    /// Chunks that attention is judged on.
    pub(super) judged: Vec<Vec<u32>>,
    done: bool,
}

/// Samples of the keys and the values of every layer.
pub(super) struct Reading {
    pub(super) progress: Progress,
    /// Samples of keys and values in turn, layer after layer.
    pub(super) samples: Vec<Sample>,
    pub(super) queries: QueryMoments,
    pub(super) head_dim: usize,
    pub(super) kv_heads: usize,
    /// Layers whose samples are of the same positions.
    joint_layers: usize,
}

/// Samples of the keys or the values of a layer: rows of all KV heads of a position, and its number.
pub(super) struct Sample {
    pub(super) train: Reservoir,
    pub(super) held_out: Reservoir,
}

/// Sampled vectors of all KV heads, and where they were.
#[derive(Default)]
pub(super) struct Sampled {
    /// `[positions, kv_heads, m]`
    pub(super) vectors: Vec<f32>,
    pub(super) positions: Vec<u32>,
}

impl Reading {
    fn open(model: &Model, options: &TrainOptions, state: &State) -> Result<Self> {
        let config = model.decoder.config();
        let progress: Progress = state.load_json(READING)?.unwrap_or_default();
        let mut samples = Vec::with_capacity(2 * config.layers);
        for number in 0..2 * config.layers {
            let reservoir = |ending: &str, vectors: usize| {
                let path = state.path(&format!("{}.{ending}", name(number)));
                let max = (vectors / config.kv_heads).max(1);
                let rows = Rows::open(&path, config.kv_heads * config.head_dim + 1, max);
                let rows = rows.map_err(|error| state.not_saved(error))?;
                Ok::<_, Error>(Reservoir { rows, max })
            };
            samples.push(Sample {
                train: reservoir("vectors", options.vectors)?,
                held_out: reservoir("held-out", HELD_OUT_VECTORS)?,
            });
        }
        Ok(Self {
            queries: QueryMoments::open(config, state, progress.windows)?,
            progress,
            samples,
            head_dim: config.head_dim,
            kv_heads: config.kv_heads,
            joint_layers: options.joint_layers,
        })
    }

    /// Counts the vectors of each sample to learn from.
    pub(super) fn count(&self) -> usize {
        let sample = self.samples.first();
        let kept = sample.map_or(0, |sample| sample.train.held(self.progress.positions));
        kept * self.kv_heads
    }

    /// Reads the vectors to learn from of sample `number`.
    pub(super) fn vectors(&self, number: usize) -> Result<Sampled> {
        let sample = &self.samples[number].train;
        self.sampled(sample, sample.held(self.progress.positions))
    }

    /// Reads the vectors to judge by of sample `number`.
    pub(super) fn held_out(&self, number: usize) -> Result<Sampled> {
        let sample = &self.samples[number].held_out;
        self.sampled(sample, sample.held(self.progress.positions_held_out))
    }

    fn sampled(&self, sample: &Reservoir, count: usize) -> Result<Sampled> {
        let rows = sample.rows.read_first(count)?;
        let length = self.kv_heads * self.head_dim;
        let mut sampled = Sampled::default();
        for row in rows.chunks_exact(length + 1) {
            sampled.vectors.extend_from_slice(&row[..length]);
            sampled.positions.push(row[length] as u32);
        }
        Ok(sampled)
    }

    /// Writes the samples to learn from for other tools.
    pub(super) fn keep(&self, path: &Path) -> Result<()> {
        let samples = self.samples.iter().enumerate();
        let names: Vec<String> = samples.map(|(number, _)| name(number)).collect();
        let shape = || vec![self.count(), self.head_dim];
        let shapes = names.iter();
        let shapes = shapes.map(|name| (name.as_str(), Dtype::F32, shape()));
        let shapes: Vec<_> = shapes.collect();
        let mut failed = None;
        let written = tensor_file::write_in_turn(path, &shapes, |number| {
            let vectors = self.vectors(number);
            let sampled = vectors.map_err(|error| failed = Some(error)).ok()?;
            Some(
                sampled
                    .vectors
                    .iter()
                    .flat_map(|x| x.to_le_bytes())
                    .collect(),
            )
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
        self.queries.save(state, self.progress.windows)?;
        state.save_json(READING, &self.progress)?;
        QueryMoments::remove_former(state, self.progress.windows)
    }

    /// Counts a chunk, which is `held_out` or not.
    fn add(&mut self, window: Vec<u32>, held_out: bool) {
        let progress = &mut self.progress;
        progress.windows += 1;
        progress.tokens += window.len();
        progress.checksum = checksum(progress.checksum, &window);
        let positions = window.len() as u64;
        if held_out {
            progress.positions_held_out += positions;
            if progress.judged.len() < JUDGED_WINDOWS {
                progress.judged.push(window);
            }
        } else {
            progress.positions += positions;
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
    let times = options.long_chunks(model.decoder.config());
    let (context, tokens) = (options.context, options.tokens);
    let tokenizer = &model.tokenizer;
    let mut windows = corpus.chunks_with_longer(tokenizer, context, times, tokens, seed)?;
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
        let room = model.decoder.config().context - window.len();
        let first = first_position(number, window.len(), room, seed);
        let mut moments = std::mem::take(&mut reading.queries);
        let mut collector = Collector {
            cache: FullCache::new(model.decoder.config(), NumberType::F32),
            first,
            reading: &reading,
            moments: (!held_out).then_some(&mut moments),
            state,
            held_out,
            seed,
        };
        let decoder = &model.decoder;
        decoder.forward_one(&window, &mut collector, Logits::Last)?;
        reading.queries = moments;
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
    if before.windows > 0 && before.positions == 0 && before.positions_held_out == 0 {
        return Err(damaged(&state.path(READING)));
    }
    Ok(())
}

/// Draws the position at which chunk `number` begins, so that keys are seen as they are turned at all positions of long
/// texts: half of the chunks begin at 0, the others at some position of each order of magnitude alike.
fn first_position(number: usize, length: usize, room: usize, seed: u64) -> usize {
    let most = room.min(LAST_POSITION);
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ OFFSETS);
    rng.set_stream(number as u64);
    if rng.random() || most <= length {
        return 0;
    }
    let (low, high) = ((length as f64).ln(), (most as f64).ln());
    rng.random_range(low..high).exp() as usize
}

/// Cache for one chunk that samples the keys and values it is given.
struct Collector<'a> {
    cache: FullCache,
    /// The position of the chunk's first token.
    first: usize,
    reading: &'a Reading,
    moments: Option<&'a mut QueryMoments>,
    state: &'a State,
    held_out: bool,
    seed: u64,
}

impl KvCache for Collector<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let progress = &self.reading.progress;
        let step = Step::new(q, k, v)?;
        step.check_finite(layer)?;
        if let Some(moments) = &mut self.moments {
            moments.add(layer, &step.queries);
        }
        // A chunk's positions are whole numbers that f32 holds.
        let first = self.first + self.cache.len();
        let by_position = |x: &Tensor| -> Result<Vec<f32>> {
            let rows = x.transpose(0, 1)?.contiguous()?.flatten_from(1)?;
            let rows: Vec<Vec<f32>> = rows.to_vec2()?;
            let rows = rows.into_iter().zip(first..);
            let rows = rows.flat_map(|(row, position)| row.into_iter().chain([position as f32]));
            Ok(rows.collect())
        };
        for (number, vectors) in [
            (2 * layer, by_position(k)?),
            (2 * layer + 1, by_position(v)?),
        ] {
            let sample = &self.reading.samples[number];
            // The draws for a chunk depend on nothing before it: it can be read again.
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            let own = layer % self.reading.joint_layers;
            let stream = progress.windows * self.reading.samples.len() + number - 2 * own;
            rng.set_stream(stream as u64);
            let (reservoir, seen) = match self.held_out {
                true => (&sample.held_out, progress.positions_held_out),
                false => (&sample.train, progress.positions),
            };
            let offered = reservoir.offer(&vectors, seen, &mut rng);
            offered.map_err(|error| self.state.not_saved(error))?;
        }
        self.cache.attend(layer, q, k, v)
    }

    fn len(&self) -> usize {
        self.first + self.cache.len()
    }

    fn footprint(&self) -> Footprint {
        self.cache.footprint()
    }
}
