//! Dictionary learning: pursuit on minibatches, Adam on the sphere.

mod adam;

use std::ops::ControlFlow;

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::dictionary::{Dictionary, MOST_ATOMS, check_sparsity, norm};
use crate::pursuit::{Pursuit, SparseBatch};
use crate::{Error, Result};
use adam::Adam;

/// Steps between two looks for unused atoms.
const RESEED_STEPS: usize = 50;
/// Share of the run after which no atom is re-seeded: a new atom needs time to settle.
const RESEED_UNTIL: f32 = 0.8;

/// Settings of [`learn`].
#[derive(Debug, Clone, PartialEq)]
pub struct LearnOptions {
    /// `N`.
    pub atoms: usize,
    /// `s` during learning.
    pub sparsity: usize,
    /// Passes over the vectors.
    pub epochs: usize,
    /// Vectors a step.
    pub batch: usize,
    /// Adam's step size at the start; it falls to 0 along a half cosine.
    pub learning_rate: f32,
    /// Seed of every random choice: the same seed and thread count give the same dictionary.
    pub seed: u64,
}

impl Default for LearnOptions {
    fn default() -> Self {
        Self {
            atoms: 4096,
            sparsity: 8,
            epochs: 6,
            batch: 512,
            learning_rate: 1e-2,
            seed: 0,
        }
    }
}

/// How far learning has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearnProgress {
    /// Steps done.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// Mean relative error of the step's minibatch before the step.
    pub relative_error: f32,
    /// Atoms re-seeded so far.
    pub reseeded: usize,
}

/// A learned dictionary.
#[derive(Debug, Clone, PartialEq)]
pub struct Learned {
    /// The dictionary.
    pub dictionary: Dictionary,
    /// Mean relative error of the held-out vectors at the training sparsity, f32 coefficients;
    /// `None` where there were none.
    pub held_out_error: Option<f32>,
    /// Atoms re-seeded in all.
    pub reseeded: usize,
}

/// Learns a dictionary for `vectors` `[n, m]`, judged on `held_out` `[n', m]`.
///
/// Every vector is scaled to unit length first, so that the loss `‖x − x̂‖²` is the squared
/// relative error. A step codes a minibatch by [`Pursuit`] with the dictionary fixed, then moves
/// the dictionary against the loss's gradient with the codes fixed; the gradient is made tangent
/// to the sphere and every atom scaled back to unit length (METHOD.md, "Universal dictionary").
/// Atoms start as drawn vectors; those that nothing uses become the vectors coded worst.
///
/// `progress` is called after every step and may break off.
///
/// # Errors
/// [`Error::Learn`] where there are fewer vectors than atoms or a setting is 0,
/// [`Error::Sparsity`], [`Error::NotFinite`], and [`Error::Interrupted`] where `progress` broke off.
pub fn learn(
    vectors: &[f32],
    held_out: &[f32],
    head_dim: usize,
    options: &LearnOptions,
    progress: &mut dyn FnMut(LearnProgress) -> ControlFlow<()>,
) -> Result<Learned> {
    let vectors = unit_vectors(vectors, head_dim)?;
    let n = vectors.len() / head_dim;
    options.check(head_dim)?;
    if options.atoms > n {
        return Err(Error::Learn(format!(
            "{} atoms need at least as many vectors, there are {n}; give more text or fewer atoms",
            options.atoms
        )));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let mut dictionary = initial(&vectors, head_dim, options.atoms, &mut rng)?;

    let batch_size = options.batch.min(n);
    let steps = options.epochs.saturating_mul(n.div_ceil(batch_size));
    let mut adam = Adam::new(options.atoms, head_dim);
    let mut gradient = vec![0.0; dictionary.atoms().len()];
    let mut uses = vec![0u32; options.atoms];
    let mut order: Vec<usize> = (0..n).collect();
    let mut batch = Vec::with_capacity(batch_size * head_dim);
    let mut step = 0;
    let mut reseeded = 0;
    for _ in 0..options.epochs {
        order.shuffle(&mut rng);
        for chosen in order.chunks(batch_size) {
            batch.clear();
            for &v in chosen {
                batch.extend_from_slice(&vectors[v * head_dim..(v + 1) * head_dim]);
            }
            let codes = Pursuit::new(&dictionary, options.sparsity)?.encode(&batch)?;
            tangent_gradient(&dictionary, &batch, &codes, &mut gradient, &mut uses);
            let done = step as f32 / steps as f32;
            let rate = options.learning_rate * 0.5 * (1.0 + (std::f32::consts::PI * done).cos());
            adam.step(dictionary.atoms_mut(), &gradient, rate);
            renormalise(&mut dictionary, options.learning_rate)?;
            step += 1;
            if step % RESEED_STEPS == 0 {
                if done < RESEED_UNTIL {
                    reseeded += reseed(&mut dictionary, &mut adam, &batch, &codes, &uses);
                }
                uses.fill(0);
            }
            let report = LearnProgress {
                step,
                steps,
                relative_error: codes.mean_relative_error(),
                reseeded,
            };
            if progress(report).is_break() {
                return Err(Error::Interrupted);
            }
        }
    }
    let held_out_error = if held_out.is_empty() {
        None
    } else {
        let codes = Pursuit::new(&dictionary, options.sparsity)?.encode(held_out)?;
        Some(codes.mean_relative_error())
    };
    Ok(Learned {
        dictionary,
        held_out_error,
        reseeded,
    })
}

impl LearnOptions {
    /// Checks all that can be checked before the vectors are there.
    ///
    /// # Errors
    /// [`Error::Learn`] for a setting that is 0 or not a number, [`Error::Sparsity`].
    pub fn check(&self, head_dim: usize) -> Result<()> {
        if self.atoms == 0 || self.epochs == 0 || self.batch == 0 {
            let reason = "atoms, epochs and batch must be at least 1";
            return Err(Error::Learn(reason.to_owned()));
        }
        if self.atoms > MOST_ATOMS {
            let reason = format!("{} atoms; at most {MOST_ATOMS} are possible", self.atoms);
            return Err(Error::Learn(reason));
        }
        // Atoms have unit length: a step of 1 already leaves nothing of one.
        if !(self.learning_rate > 0.0 && self.learning_rate <= 1.0) {
            let reason = format!(
                "a learning rate of {} is impossible: it must be above 0 and at most 1",
                self.learning_rate
            );
            return Err(Error::Learn(reason));
        }
        check_sparsity(self.sparsity, head_dim, self.atoms)
    }
}

/// The vectors scaled to unit length, without those that are zero.
fn unit_vectors(vectors: &[f32], head_dim: usize) -> Result<Vec<f32>> {
    if head_dim == 0 || !vectors.len().is_multiple_of(head_dim) {
        return Err(Error::VectorLength {
            found: vectors.len(),
            head_dim,
        });
    }
    let mut units = Vec::with_capacity(vectors.len());
    for (row, x) in vectors.chunks_exact(head_dim).enumerate() {
        let length = norm(x);
        if !length.is_finite() {
            return Err(Error::NotFinite { row });
        }
        if length > 0.0 {
            units.extend(x.iter().map(|&v| (f64::from(v) / length) as f32));
        }
    }
    Ok(units)
}

/// Drawn vectors as atoms, moved a little so that no two are alike.
fn initial(
    vectors: &[f32],
    head_dim: usize,
    atoms: usize,
    rng: &mut ChaCha8Rng,
) -> Result<Dictionary> {
    let n = vectors.len() / head_dim;
    let chosen = rand::seq::index::sample(rng, n, atoms);
    let noise = 0.01 / (head_dim as f32).sqrt();
    let mut rows = Vec::with_capacity(atoms * head_dim);
    for v in chosen {
        let x = &vectors[v * head_dim..(v + 1) * head_dim];
        rows.extend(x.iter().map(|x| x + noise * rng.random_range(-1f32..1.0)));
    }
    Dictionary::normalised(rows, head_dim)
}

/// Gradient of the minibatch's mean squared error, tangent to the sphere at every atom.
fn tangent_gradient(
    dictionary: &Dictionary,
    batch: &[f32],
    codes: &SparseBatch,
    gradient: &mut [f32],
    uses: &mut [u32],
) {
    let m = dictionary.head_dim();
    gradient.fill(0.0);
    let scale = -2.0 / codes.len() as f32;
    let mut residual = vec![0.0; m];
    for (v, x) in batch.chunks_exact(m).enumerate() {
        residual.copy_from_slice(x);
        let (indices, coefficients) = codes.row(v);
        for (&i, &c) in indices.iter().zip(coefficients) {
            crate::arch::add_scaled(&mut residual, -c, dictionary.atom(usize::from(i)));
        }
        for (&i, &c) in indices.iter().zip(coefficients) {
            let i = usize::from(i);
            crate::arch::add_scaled(&mut gradient[i * m..(i + 1) * m], scale * c, &residual);
            uses[i] += 1;
        }
    }
    for (i, g) in gradient.chunks_exact_mut(m).enumerate() {
        let atom = dictionary.atom(i);
        let along = crate::arch::dot(g, atom);
        crate::arch::add_scaled(g, -along, atom);
    }
}

/// Scales every atom back to unit length.
fn renormalise(dictionary: &mut Dictionary, learning_rate: f32) -> Result<()> {
    let m = dictionary.head_dim();
    for atom in dictionary.atoms_mut().chunks_exact_mut(m) {
        let length = norm(atom);
        if !(length.is_normal()) {
            let reason = format!("it diverged; a learning rate of {learning_rate} is too high");
            return Err(Error::Learn(reason));
        }
        for x in atom {
            *x = (f64::from(*x) / length) as f32;
        }
    }
    Ok(())
}

/// Replaces unused atoms by the worst coded vectors of the batch; returns how many.
fn reseed(
    dictionary: &mut Dictionary,
    adam: &mut Adam,
    batch: &[f32],
    codes: &SparseBatch,
    uses: &[u32],
) -> usize {
    let m = dictionary.head_dim();
    let mut worst: Vec<usize> = (0..codes.len()).collect();
    worst.sort_by(|&a, &b| codes.relative_errors[b].total_cmp(&codes.relative_errors[a]));
    let unused = (0..uses.len()).filter(|&i| uses[i] == 0);
    let mut count = 0;
    for (i, v) in unused.zip(worst) {
        dictionary.atoms_mut()[i * m..(i + 1) * m].copy_from_slice(&batch[v * m..(v + 1) * m]);
        adam.forget(i);
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors made of two atoms each of a hidden dictionary.
    fn planted(seed: u64, count: usize, atoms: usize, m: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut hidden_rng = ChaCha8Rng::seed_from_u64(99);
        let draw = (0..atoms * m)
            .map(|_| hidden_rng.random_range(-1f32..1.0))
            .collect();
        let hidden = Dictionary::normalised(draw, m).unwrap();
        let mut vectors = vec![0.0; count * m];
        for x in vectors.chunks_exact_mut(m) {
            for _ in 0..2 {
                let c = rng.random_range(0.5f32..2.0);
                crate::arch::add_scaled(x, c, hidden.atom(rng.random_range(0..atoms)));
            }
        }
        vectors
    }

    fn options() -> LearnOptions {
        LearnOptions {
            atoms: 32,
            sparsity: 2,
            epochs: 20,
            batch: 128,
            learning_rate: 2e-2,
            seed: 1,
        }
    }

    #[test]
    fn finds_a_planted_dictionary_and_repeats_itself() {
        let vectors = planted(1, 4000, 16, 12);
        let held_out = planted(2, 500, 16, 12);
        let mut first_error = None;
        let run = |first: &mut Option<f32>| {
            learn(&vectors, &held_out, 12, &options(), &mut |p| {
                first.get_or_insert(p.relative_error);
                ControlFlow::Continue(())
            })
            .unwrap()
        };
        let learned = run(&mut first_error);
        assert!(
            learned.held_out_error.unwrap() < 0.1,
            "error {:?}",
            learned.held_out_error
        );
        assert!(learned.held_out_error.unwrap() < 0.5 * first_error.unwrap());
        assert_eq!(learned, run(&mut None));
    }

    #[test]
    fn unused_atoms_are_reseeded() {
        // One direction only: nearly all atoms are useless until they are re-seeded.
        let mut vectors = planted(3, 200, 16, 12);
        let spread = vectors.clone();
        for x in vectors.chunks_exact_mut(12).take(100) {
            x.fill(1.0);
        }
        vectors.extend(spread);
        let options = LearnOptions {
            sparsity: 1,
            batch: 16,
            ..options()
        };
        let learned = learn(&vectors, &[], 12, &options, &mut |_| {
            ControlFlow::Continue(())
        });
        assert!(learned.unwrap().reseeded > 0);
    }

    #[test]
    fn impossible_settings_are_refused() {
        let vectors = planted(1, 40, 16, 12);
        let run = |vectors: &[f32], options: &LearnOptions| {
            learn(
                vectors,
                &[],
                12,
                options,
                &mut |_| ControlFlow::Continue(()),
            )
            .unwrap_err()
        };
        let with = |change: fn(&mut LearnOptions)| {
            let mut options = options();
            change(&mut options);
            options
        };
        let refused = [
            run(&vectors, &with(|o| o.atoms = 41)),
            run(&vectors, &with(|o| o.atoms = 0)),
            run(&vectors, &with(|o| o.epochs = 0)),
            run(&vectors, &with(|o| o.batch = 0)),
            run(&vectors, &with(|o| o.learning_rate = f32::NAN)),
            run(&vectors, &with(|o| o.learning_rate = 1e9)),
            run(&vectors, &with(|o| o.atoms = 1 << 20)),
        ];
        assert!(
            refused.iter().all(|e| matches!(e, Error::Learn(_))),
            "{refused:?}"
        );
        let error = run(&vectors, &with(|o| o.sparsity = 13));
        assert!(matches!(error, Error::Sparsity { .. }), "{error}");
        let mut poisoned = vectors.clone();
        poisoned[12 * 7] = f32::NAN;
        assert!(matches!(
            run(&poisoned, &options()),
            Error::NotFinite { row: 7 }
        ));
        let stopped = learn(&vectors, &[], 12, &options(), &mut |_| {
            ControlFlow::Break(())
        });
        assert!(matches!(stopped, Err(Error::Interrupted)));
    }
}
