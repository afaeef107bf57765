//! Learning of all codebooks, one dictionary after the other.

use lexico::dictionary::{CodebookSizes, Codebooks};
use lexico::learn::{CodebookOptions, learn_codebooks};
use lexico::threads::Rayon;

use super::reading::{Reading, name};
use super::state::{State, damaged};
use super::{OnProgress, PARTS, TrainProgress, go_on};
use crate::error::Result;

/// Codebooks, as a file of the state keeps them.
pub(super) struct Learned {
    pub(super) dictionary: Codebooks,
    pub(super) held_out_error: f32,
}

/// Learns the keys' and the values' codebooks of every layer from at most `vectors` vectors.
pub(super) fn learn_all(
    reading: &Reading,
    vectors: usize,
    options: &CodebookOptions,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<Vec<[Learned; 2]>> {
    let mut learn = |number| learn_one(number, reading, vectors, options, state, progress);
    (0..reading.samples.len() / 2)
        .map(|layer| Ok([learn(2 * layer)?, learn(2 * layer + 1)?]))
        .collect()
}

fn learn_one(
    number: usize,
    reading: &Reading,
    vectors: usize,
    options: &CodebookOptions,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<Learned> {
    let (layer, part) = (number / 2, PARTS[number % 2]);
    let head_dim = reading.head_dim;
    // States of earlier versions call codebooks so.
    let file = format!("{}.groups", name(number));
    let learned = match state.load(&file)? {
        Some(saved) => {
            Learned::load(&saved, head_dim).ok_or_else(|| damaged(&state.path(&file)))?
        }
        None => {
            let sample = &reading.samples[number];
            let held_out = sample.held_out.rows.read_first(reading.held_out_count())?;
            let vectors = sample.train.rows.read_first(reading.count(vectors))?;
            let options = CodebookOptions {
                seed: options.seed.wrapping_add(number as u64),
                ..options.clone()
            };
            let mut tell = |step| {
                progress(TrainProgress::LearningCodebooks {
                    layer,
                    part,
                    progress: step,
                })
            };
            let found = learn_codebooks(vectors, &held_out, head_dim, &options, &Rayon, &mut tell)?;
            let learned = Learned {
                dictionary: found.codebooks.in_half_precision()?,
                // A corpus has at least two chunks, of which one is held out.
                held_out_error: found.held_out_error.unwrap_or(f32::NAN),
            };
            state.save(&file, &learned.save())?;
            learned
        }
    };
    go_on(progress(TrainProgress::LearnedCodebooks {
        layer,
        part,
        held_out_error: learned.held_out_error,
    }))?;
    Ok(learned)
}

impl Learned {
    fn save(&self) -> Vec<u8> {
        let first = self.dictionary.sizes().first as u64;
        let mut out = first.to_le_bytes().to_vec();
        out.extend_from_slice(&self.held_out_error.to_le_bytes());
        let atoms = self.dictionary.atoms();
        out.extend(atoms.iter().flat_map(|x| x.to_le_bytes()));
        out
    }

    fn load(saved: &[u8], head_dim: usize) -> Option<Self> {
        let (first, saved) = saved.split_first_chunk()?;
        let first = usize::try_from(u64::from_le_bytes(*first)).ok()?;
        let (held_out_error, saved) = saved.split_first_chunk()?;
        let (atoms, rest) = saved.as_chunks();
        let atoms = atoms.iter().map(|x| f32::from_le_bytes(*x)).collect();
        let dictionary = Codebooks::new(atoms, head_dim, CodebookSizes { first }).ok()?;
        rest.is_empty().then_some(Self {
            dictionary,
            held_out_error: f32::from_le_bytes(*held_out_error),
        })
    }
}
