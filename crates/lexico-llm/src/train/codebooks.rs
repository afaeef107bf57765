//! Learning of all codebooks, one dictionary after the other.

use std::sync::Arc;

use lexico::KeyValue;
use lexico::dictionary::{CodebookSizes, Codebooks, HeadMaps, JointLayers};
use lexico::learn::{CodebookOptions, RotaryKeys, head_maps, joint_basis, learn_codebooks};
use lexico::threads::Rayon;

use super::reading::{Reading, Sampled, name};
use super::state::{State, damaged};
use super::{OnProgress, PARTS, TrainProgress, go_on, losses};
use crate::error::Result;
use crate::model::Model;

/// Codebooks, as a file of the state keeps them, and the maps behind which codes are found.
pub(super) struct Learned {
    pub(super) codebooks: Codebooks,
    pub(super) maps: Arc<HeadMaps>,
    pub(super) held_out_error: f32,
}

/// The state's file of how much errors of each head count.
const WEIGHTS: &str = "weights";
/// Errors of no head count for less than this share of the others'.
const LEAST: f64 = 0.01;

/// Learns the keys' and the values' codebooks of every layer, or of all layers that are coded together.
pub(super) fn learn_all(
    model: &Model,
    reading: &Reading,
    options: &CodebookOptions,
    joint: JointLayers,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<Vec<KeyValue<Learned>>> {
    let mut learning = Learning {
        model,
        reading,
        joint,
        weights: None,
    };
    if joint.layers * joint.heads > 1 {
        learning.weights = Some(learning.weights(state, progress)?);
    }
    let mut learn = |number| learn_one(&learning, number, options, state, progress);
    (0..model.decoder.config().layers / joint.layers)
        .map(|layer| Ok(KeyValue::new(learn(2 * layer)?, learn(2 * layer + 1)?)))
        .collect()
}

/// What codebooks are learned from. Numbers are those of dictionaries: keys and values in turn, layer after layer.
struct Learning<'a> {
    model: &'a Model,
    reading: &'a Reading,
    joint: JointLayers,
    /// How much errors of each head count, `[layers][2][kv_heads]`; where heads are coded together.
    weights: Option<Weights>,
}

type Weights = Vec<[Vec<f64>; 2]>;

/// Vectors to learn from as they are coded, `[heads, n, m]`.
struct Mapped {
    maps: HeadMaps,
    vectors: Vec<f32>,
}

impl Learning<'_> {
    fn weights(&self, state: &State, progress: &mut OnProgress<'_>) -> Result<Weights> {
        let (reading, layers) = (self.reading, self.model.decoder.config().layers);
        if let Some(saved) = state.load_json::<Weights>(WEIGHTS)? {
            let whole = |own: &Vec<f64>| own.len() == reading.kv_heads;
            if saved.len() != layers || !saved.as_flattened().iter().all(whole) {
                return Err(damaged(&state.path(WEIGHTS)));
            }
            return Ok(saved);
        }
        let alone = Learning {
            joint: JointLayers {
                layers: 1,
                heads: 1,
                ..self.joint
            },
            weights: None,
            ..*self
        };
        let maps = |number| alone.mapped(number).map(|mapped| mapped.maps);
        let maps = (0..layers).map(|l| Ok(KeyValue::new(maps(2 * l)?, maps(2 * l + 1)?)));
        let maps = maps.collect::<Result<Vec<_>>>()?;
        let judged = &reading.progress.judged;
        let weights = losses::head_weights(self.model, &maps, judged, progress)?;
        state.save_json(WEIGHTS, &weights)?;
        Ok(weights)
    }

    /// Vectors of all heads that share codebooks, `[heads][n, m]`, out of samples of each layer.
    fn vectors(
        &self,
        number: usize,
        sampled: impl Fn(usize) -> Result<Sampled>,
    ) -> Result<(Vec<Vec<f32>>, Vec<u32>)> {
        let (m, heads) = (self.reading.head_dim, self.reading.kv_heads);
        let first = number / 2 * self.joint.layers;
        let mut all = vec![Vec::new(); self.joint.layers * heads];
        let mut positions = Vec::new();
        for layer in first..first + self.joint.layers {
            let sampled = sampled(2 * layer + number % 2)?;
            let places = self.joint.place(layer).1;
            let own = by_head(&sampled.vectors, heads, m).into_iter();
            own.zip(places).for_each(|(own, place)| all[place] = own);
            // Of all layers the same are sampled.
            positions = sampled.positions;
        }
        Ok((all, positions))
    }

    /// Second moments of what the vectors of all heads that share codebooks are multiplied with, `[heads, m, m]`: an error
    /// counts where it hurts, of keys as the queries see it, of values as the layer's output does.
    fn moments(&self, number: usize) -> Result<Vec<f64>> {
        let (m, part) = (self.reading.head_dim, number % 2);
        let first = number / 2 * self.joint.layers;
        let each = m * m;
        let mut all = vec![0.0; self.joint.layers * self.reading.kv_heads * each];
        for layer in first..first + self.joint.layers {
            let mut own = match PARTS[part] {
                "keys" => self.reading.queries.layer(layer).to_vec(),
                _ => self.model.decoder.output_moments(layer)?,
            };
            if let Some(weights) = &self.weights {
                // Weights are of vectors behind the layer's own maps.
                let diagonals = own
                    .chunks_exact(each)
                    .flat_map(|own| own.iter().step_by(m + 1));
                let scale = diagonals.sum::<f64>().max(f64::MIN_POSITIVE);
                let own_weights = &weights[layer][part];
                let most = own_weights.iter().copied().fold(0.0, f64::max);
                for (own, weight) in own.chunks_exact_mut(each).zip(own_weights) {
                    let weight = weight.max(LEAST * most) / scale;
                    own.iter_mut().for_each(|x| *x *= weight);
                }
            }
            let places = self.joint.place(layer).1;
            for (own, place) in own.chunks_exact(each).zip(places) {
                all[place * each..][..each].copy_from_slice(own);
            }
        }
        Ok(all)
    }

    fn mapped(&self, number: usize) -> Result<Mapped> {
        let m = self.reading.head_dim;
        let (vectors, positions) = self.vectors(number, |own| self.reading.vectors(own))?;
        let frequencies = &self.model.decoder.config().rotary.frequencies(m);
        let rotary = (PARTS[number % 2] == "keys").then_some(RotaryKeys {
            frequencies,
            positions: &positions,
        });
        let heads = vectors.len();
        let maps = head_maps(&vectors, rotary, &self.moments(number)?, m)?;
        let vectors = maps.all_to_coded(numbers(&positions), &vectors.concat());
        let together = self.joint.layers * self.joint.heads;
        if together == 1 {
            return Ok(Mapped { maps, vectors });
        }
        let basis = joint_basis(&vectors, heads, together, m)?;
        Ok(Mapped {
            vectors: basis.apply(&vectors),
            maps: maps.with_basis(basis)?,
        })
    }
}

fn numbers(positions: &[u32]) -> impl Iterator<Item = usize> + Clone {
    positions.iter().map(|&position| position as usize)
}

fn learn_one(
    learning: &Learning<'_>,
    number: usize,
    options: &CodebookOptions,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<Learned> {
    let (reading, part) = (learning.reading, PARTS[number % 2]);
    let layer = number / 2 * learning.joint.layers;
    let m = reading.head_dim;
    // States of earlier versions call codebooks so.
    let file = format!("{}.groups", name(number));
    let Mapped { maps, vectors } = learning.mapped(number)?;
    let maps = Arc::new(maps);
    let saved = state.load(&file)?;
    let learned = match saved {
        Some(saved) => Learned::load(&saved, maps).ok_or_else(|| damaged(&state.path(&file)))?,
        None => {
            let (held_out, positions) = learning.vectors(number, |own| reading.held_out(own))?;
            let held_out = maps.all_to_coded(numbers(&positions), &held_out.concat());
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
