//! Learning of all codebooks, one dictionary after the other.

use std::sync::Arc;

use lexico::KeyValue;
use lexico::dictionary::{CodebookSizes, Codebooks, HeadMaps};
use lexico::learn::{CodebookOptions, RotaryKeys, head_maps, learn_codebooks};
use lexico::threads::Rayon;

use super::reading::{Reading, name};
use super::state::{State, damaged};
use super::{OnProgress, PARTS, TrainProgress, go_on};
use crate::error::Result;
use crate::model::Model;

/// Codebooks, as a file of the state keeps them, and the maps behind which codes are found.
pub(super) struct Learned {
    pub(super) codebooks: Codebooks,
    pub(super) maps: Arc<HeadMaps>,
    pub(super) held_out_error: f32,
}

/// Learns the keys' and the values' codebooks of every layer.
pub(super) fn learn_all(
    model: &Model,
    reading: &Reading,
    options: &CodebookOptions,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<Vec<KeyValue<Learned>>> {
    let mut learn = |number| learn_one(model, number, reading, options, state, progress);
    (0..reading.samples.len() / 2)
        .map(|layer| Ok(KeyValue::new(learn(2 * layer)?, learn(2 * layer + 1)?)))
        .collect()
}

fn learn_one(
    model: &Model,
    number: usize,
    reading: &Reading,
    options: &CodebookOptions,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<Learned> {
    let (layer, part) = (number / 2, PARTS[number % 2]);
    let (m, heads) = (reading.head_dim, reading.kv_heads);
    // States of earlier versions call codebooks so.
    let file = format!("{}.groups", name(number));
    let sampled = reading.vectors(number)?;
    let vectors = by_head(&sampled.vectors, heads, m);
    let frequencies = &model.decoder.config().rotary.frequencies(m);
    // Where an error hurts: keys as the queries see it, values as the layer's output does.
    let (moments, rotary) = match part {
        "keys" => {
            let rotary = RotaryKeys {
                frequencies,
                positions: &sampled.positions,
            };
            (reading.queries.layer(layer).to_vec(), Some(rotary))
        }
        _ => (model.decoder.output_moments(layer)?, None),
    };
    let maps = Arc::new(head_maps(&vectors, rotary, &moments, m)?);
    let saved = state.load(&file)?;
    let learned = match saved {
        Some(saved) => Learned::load(&saved, maps).ok_or_else(|| damaged(&state.path(&file)))?,
        None => {
            let mapped = |vectors: &[Vec<f32>], positions: &[u32]| -> Vec<f32> {
                let heads = vectors.iter().enumerate();
                let heads = heads.flat_map(|(head, own)| {
                    let positions = positions.iter().map(|&position| position as usize);
                    maps.to_coded(head, positions, own)
                });
                heads.collect()
            };
            let held_out = reading.held_out(number)?;
            let held_out = mapped(&by_head(&held_out.vectors, heads, m), &held_out.positions);
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
            let vectors = mapped(&vectors, &sampled.positions);
            let found = learn_codebooks(vectors, &held_out, m, &options, &Rayon, &mut tell)?;
            let learned = Learned {
                codebooks: found.codebooks.in_eight_bits()?,
                maps,
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

/// Takes vectors `[positions, heads, m]` apart, `[heads][positions, m]`.
fn by_head(vectors: &[f32], heads: usize, m: usize) -> Vec<Vec<f32>> {
    let head = |head: usize| vectors.chunks_exact(m).skip(head).step_by(heads);
    (0..heads)
        .map(|h| head(h).flatten().copied().collect())
        .collect()
}

impl Learned {
    fn save(&self) -> Vec<u8> {
        let first = self.codebooks.sizes().first as u64;
        let mut out = first.to_le_bytes().to_vec();
        out.extend_from_slice(&self.held_out_error.to_le_bytes());
        let atoms = self.codebooks.atoms();
        out.extend(atoms.iter().flat_map(|x| x.to_le_bytes()));
        out
    }

    fn load(saved: &[u8], maps: Arc<HeadMaps>) -> Option<Self> {
        let (first, saved) = saved.split_first_chunk()?;
        let first = usize::try_from(u64::from_le_bytes(*first)).ok()?;
        let (held_out_error, saved) = saved.split_first_chunk()?;
        let (atoms, rest) = saved.as_chunks();
        let atoms = atoms.iter().map(|x| f32::from_le_bytes(*x)).collect();
        let sizes = CodebookSizes { first };
        let codebooks = Codebooks::new(atoms, maps.head_dim(), sizes).ok()?;
        rest.is_empty().then_some(Self {
            codebooks,
            maps,
            held_out_error: f32::from_le_bytes(*held_out_error),
        })
    }
}
