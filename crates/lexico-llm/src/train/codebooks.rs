//! All dictionaries for codes of one atom a group, one after the other.

use lexico::dictionary::{CodebookSizes, Codebooks};
use lexico::learn::{CodebookOptions, learn_codebooks};
use lexico::threads::Rayon;

use super::reading::{Reading, name};
use super::state::{State, damaged};
use super::{OnProgress, PARTS, TrainProgress, go_on};
use crate::error::Result;

/// A dictionary, as a file keeps it.
pub(super) struct One {
    pub(super) dictionary: Codebooks,
    pub(super) held_out_error: f32,
}

/// Learns the keys' and the values' dictionary of every layer from `vectors` vectors at the most.
pub(super) fn learn_all(
    reading: &Reading,
    vectors: usize,
    options: &CodebookOptions,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<Vec<[One; 2]>> {
    let mut one = |number| learn_one(number, reading, vectors, options, state, progress);
    (0..reading.samples().len() / 2)
        .map(|layer| Ok([one(2 * layer)?, one(2 * layer + 1)?]))
        .collect()
}

fn learn_one(
    number: usize,
    reading: &Reading,
    vectors: usize,
    options: &CodebookOptions,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<One> {
    let (layer, part) = (number / 2, PARTS[number % 2]);
    let head_dim = reading.head_dim();
    let file = format!("{}.groups", name(number));
    let one = match state.load(&file)? {
        Some(saved) => One::load(&saved, head_dim).ok_or_else(|| damaged(&state.path(&file)))?,
        None => {
            let sample = &reading.samples()[number];
            let held_out = sample.held_out.rows.read_first(reading.held_out_count())?;
            let vectors = sample.train.rows.read_first(reading.count(vectors))?;
            let options = CodebookOptions {
                seed: options.seed.wrapping_add(number as u64),
                ..options.clone()
            };
            let mut tell = |progress_of_one| {
                progress(TrainProgress::LearningCodebooks {
                    layer,
                    part,
                    progress: progress_of_one,
                })
            };
            let learned =
                learn_codebooks(vectors, &held_out, head_dim, &options, &Rayon, &mut tell)?;
            let one = One {
                dictionary: learned.dictionary.in_half_precision()?,
                // A corpus has two windows at the least, of which one is held out.
                held_out_error: learned.held_out_error.unwrap_or(f32::NAN),
            };
            state.save(&file, &one.save())?;
            one
        }
    };
    go_on(progress(TrainProgress::LearnedCodebooks {
        layer,
        part,
        held_out_error: one.held_out_error,
    }))?;
    Ok(one)
}

impl One {
    fn save(&self) -> Vec<u8> {
        let first = self.dictionary.groups().first as u64;
        let mut out = first.to_le_bytes().to_vec();
        out.extend_from_slice(&self.held_out_error.to_le_bytes());
        let atoms = self.dictionary.dictionary().atoms();
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
