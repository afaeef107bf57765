//! Dictionary learning: pursuit with the dictionary fixed, and in turn the dictionary with the codes fixed.

mod adam;
mod codebooks;
mod ksvd;
mod learner;
mod optimal_directions;
mod reseed;
mod state;
mod vectors;

use std::ops::ControlFlow;

use crate::dictionary::{Dictionary, MAX_ATOMS, check_sparsity};
use crate::encode::EncodedBatch;
use crate::threads::Rayon;
use crate::{Error, Result};

pub use codebooks::{CodebookOptions, CodebookProgress, LearnedCodebooks, learn_codebooks};
pub use learner::Learner;
pub use vectors::{InMemory, Vectors};

/// How atoms are moved while the codes stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LearnMethod {
    /// One step of Adam (Kingma & Ba 2015) on the sphere, for minibatches.
    Adam,
    /// K-SVD (Aharon et al. 2006; approximate, Rubinstein et al. 2008): atom after atom, for all vectors at once.
    Ksvd,
    /// The method of optimal directions, MOD (Engan et al. 1999): least squares, for all vectors at once.
    OptimalDirections,
}

/// What atoms are before the first step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitialAtoms {
    /// Drawn vectors.
    Vectors,
    /// Directions drawn evenly from the sphere.
    Random,
}

/// Settings of [`learn`].
#[derive(Debug, Clone, PartialEq)]
pub struct LearnOptions {
    /// What moves the atoms.
    pub method: LearnMethod,
    /// `N`.
    pub atoms: usize,
    /// `s` during learning.
    pub sparsity: usize,
    /// Passes over the vectors.
    pub epochs: usize,
    /// Vectors a step, which memory holds; where there are fewer, all.
    pub batch: usize,
    /// Adam's step size at the start; it falls to 0 along a half cosine.
    pub learning_rate: f32,
    /// What atoms begin as.
    pub initial: InitialAtoms,
    /// Whether atoms that nothing uses, and those that are nearly another, become the vectors coded worst.
    pub reseed: bool,
    /// Learning stops after so many epochs in a row without a lower held-out error; 0 never stops early.
    pub patience: usize,
    /// Seed of every random choice: the same seed gives the same dictionary on any number of threads.
    pub seed: u64,
}

impl Default for LearnOptions {
    fn default() -> Self {
        Self {
            method: LearnMethod::Adam,
            atoms: 4096,
            sparsity: 8,
            epochs: 24,
            batch: 512,
            learning_rate: 1e-2,
            initial: InitialAtoms::Vectors,
            reseed: true,
            patience: 3,
            seed: 0,
        }
    }
}

impl LearnOptions {
    /// Settings that suit a method: Adam's are the default, the others take all vectors in each step.
    #[must_use]
    pub fn of(method: LearnMethod) -> Self {
        let adam = Self::default();
        let batch = match method {
            LearnMethod::Adam => adam.batch,
            LearnMethod::Ksvd | LearnMethod::OptimalDirections => usize::MAX,
        };
        Self {
            method,
            batch,
            ..adam
        }
    }

    /// The recipe of the reference implementation (Kim et al. 2025): 20 epochs of minibatches of 64 at a rate
    /// of 1e-4, random initial atoms, no re-seeding, no early stop.
    #[must_use]
    pub fn paper() -> Self {
        Self {
            epochs: 20,
            batch: 64,
            learning_rate: 1e-4,
            initial: InitialAtoms::Random,
            reseed: false,
            patience: 0,
            ..Self::default()
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
    /// Mean relative error of the held-out vectors, after an epoch's last step.
    pub held_out_error: Option<f32>,
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
/// relative error. A step codes a minibatch by [`Pursuit`](crate::Pursuit) with the dictionary fixed, then
/// moves the dictionary with the codes fixed: [`LearnMethod::Adam`] against the loss's gradient, made tangent
/// to the sphere (METHOD.md, "Universal dictionary"), the others to the least loss. Every atom is scaled back to
/// unit length.
/// Atoms start as drawn vectors; those that nothing uses, and those that are nearly another, become the
/// vectors coded worst. Of the dictionaries after each epoch the one with the lowest held-out error is kept.
///
/// `progress` is called after every step and may break off. [`Learner`] takes the steps one by one.
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
    let vectors = InMemory::new(vectors, head_dim)?;
    let mut learner = Learner::new(&vectors, held_out, head_dim, options)?;
    while !learner.is_done() {
        if progress(learner.step(&Rayon)?).is_break() {
            return Err(Error::Interrupted);
        }
    }
    Ok(learner.finish())
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
        if self.atoms > MAX_ATOMS {
            let reason = format!("{} atoms; at most {MAX_ATOMS} are possible", self.atoms);
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

/// Takes what the code of vector `v` of the batch stands for off `x` `[m]`.
fn subtract_code(x: &mut [f32], dictionary: &Dictionary, codes: &EncodedBatch, v: usize) {
    let (indices, coefficients) = codes.row(v);
    for (&i, &c) in indices.iter().zip(coefficients) {
        crate::kernels::add_scaled(x, -c, dictionary.atom(usize::from(i)));
    }
}

/// What the codes leave of every vector, `[n, m]`.
fn residuals(dictionary: &Dictionary, batch: &[f32], codes: &EncodedBatch) -> Vec<f32> {
    let mut residuals = batch.to_vec();
    let rows = residuals.chunks_exact_mut(dictionary.head_dim());
    for (v, residual) in rows.enumerate() {
        subtract_code(residual, dictionary, codes, v);
    }
    residuals
}

/// For every atom, the vectors that use it, with their coefficients.
fn users(codes: &EncodedBatch, atoms: usize) -> Vec<Vec<(u32, f32)>> {
    let mut users = vec![Vec::new(); atoms];
    for v in 0..codes.len() {
        let (indices, coefficients) = codes.row(v);
        for (&i, &c) in indices.iter().zip(coefficients) {
            users[usize::from(i)].push((v as u32, c));
        }
    }
    users
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

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
                crate::kernels::add_scaled(x, c, hidden.atom(rng.random_range(0..atoms)));
            }
        }
        vectors
    }

    /// Drawn vectors, more than there are atoms or fewer, and their codes over drawn atoms.
    pub(super) fn drawn_codes(seed: u64) -> (Dictionary, Vec<f32>, EncodedBatch) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let m = rng.random_range(1..20);
        let (atoms, count) = (rng.random_range(1..24), rng.random_range(1..100));
        let mut draw = |count: usize| (0..count).map(|_| rng.random_range(-1f32..1.0)).collect();
        let dictionary = Dictionary::normalised(draw(atoms * m), m).unwrap();
        let batch: Vec<f32> = draw(count * m);
        let sparsity = m.min(atoms).min(3);
        let codes = crate::Pursuit::new(&dictionary, sparsity).unwrap();
        let codes = codes.encode(&batch).unwrap();
        (dictionary, batch, codes)
    }

    const METHODS: [LearnMethod; 3] = [
        LearnMethod::Adam,
        LearnMethod::Ksvd,
        LearnMethod::OptimalDirections,
    ];

    fn options_of(method: LearnMethod) -> LearnOptions {
        let batch = LearnOptions::of(method).batch.max(options().batch);
        LearnOptions {
            method,
            batch,
            ..options()
        }
    }

    fn options() -> LearnOptions {
        LearnOptions {
            atoms: 32,
            sparsity: 2,
            epochs: 20,
            batch: 128,
            learning_rate: 2e-2,
            seed: 1,
            ..LearnOptions::default()
        }
    }

    #[test]
    fn finds_a_planted_dictionary_and_repeats_itself() {
        let vectors = planted(1, 4000, 16, 12);
        let held_out = planted(2, 500, 16, 12);
        for method in METHODS {
            let mut first_error = None;
            let run = |first: &mut Option<f32>| {
                learn(&vectors, &held_out, 12, &options_of(method), &mut |p| {
                    first.get_or_insert(p.relative_error);
                    ControlFlow::Continue(())
                })
                .unwrap()
            };
            let learned = run(&mut first_error);
            let error = learned.held_out_error.unwrap();
            assert!(error < 0.1, "{method:?}: {error}");
            assert!(error < 0.5 * first_error.unwrap(), "{method:?}: {error}");
            assert_eq!(learned, run(&mut None), "{method:?}");
        }
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
    fn near_duplicates_are_found_and_reseeded() {
        let atoms = [
            [1.0, 0.0, 0.0],
            [0.6, 0.8, 0.0],
            [-0.999, 0.001, 0.0],
            [0.6, 0.8, 0.001],
            [0.0, 0.0, 1.0],
        ];
        let dictionary = Dictionary::normalised(atoms.concat(), 3).unwrap();
        assert_eq!(reseed::near_duplicates(&dictionary, &Rayon), [2, 3]);

        // Five vectors, each many times over: those drawn as atoms are mostly alike.
        let few = planted(4, 5, 16, 12);
        let many = planted(5, 300, 16, 12);
        let vectors: Vec<f32> = few
            .iter()
            .cycle()
            .take(12 * 600)
            .chain(&many)
            .copied()
            .collect();
        let options = LearnOptions {
            epochs: 3,
            ..options()
        };
        let vectors = InMemory::new(&vectors, 12).unwrap();
        let mut learner = Learner::new(&vectors, &[], 12, &options).unwrap();
        let before = reseed::near_duplicates(learner.dictionary(), &Rayon).len();
        while !learner.is_done() {
            learner.step(&Rayon).unwrap();
        }
        let learned = learner.finish();
        let after = reseed::near_duplicates(&learned.dictionary, &Rayon).len();
        assert!(before >= 10 && after < before / 2, "{before}, then {after}");
    }

    #[test]
    fn learning_stops_early_and_keeps_the_best() {
        let vectors = planted(1, 64, 16, 12);
        // Nothing like what is learned from: what is learned soon does not help.
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let held_out: Vec<f32> = (0..1200).map(|_| rng.random_range(-1f32..1.0)).collect();
        let options = LearnOptions {
            epochs: 10_000,
            patience: 4,
            ..options()
        };
        let mut errors = Vec::new();
        let mut steps = (0, 0);
        let learned = learn(&vectors, &held_out, 12, &options, &mut |p| {
            errors.extend(p.held_out_error);
            steps = (p.step, p.steps);
            ControlFlow::Continue(())
        });
        let learned = learned.unwrap();
        assert!(steps.0 < steps.1, "{steps:?}");
        let best = errors.iter().copied().fold(f32::INFINITY, f32::min);
        assert_eq!(learned.held_out_error, Some(best));
        let first = errors.iter().position(|&e| e == best).unwrap();
        assert_eq!(errors.len(), first + 1 + options.patience);
    }

    #[test]
    fn a_saved_learner_goes_on_bit_for_bit() {
        let vectors = planted(1, 700, 16, 12);
        let held_out = planted(2, 100, 16, 12);
        for method in METHODS {
            let of_method = options_of(method);
            let options = LearnOptions {
                batch: of_method.batch.min(64),
                epochs: 6,
                ..of_method
            };
            let whole = learn(&vectors, &held_out, 12, &options, &mut |_| {
                ControlFlow::Continue(())
            });
            let vectors = InMemory::new(&vectors, 12).unwrap();
            let mut learner = Learner::new(&vectors, &held_out, 12, &options).unwrap();
            while !learner.is_done() {
                learner.step(&crate::threads::Alone).unwrap();
                let saved = learner.save();
                learner = Learner::resume(&vectors, &held_out, 12, &options, &saved).unwrap();
            }
            let saved = learner.save();
            assert_eq!(learner.finish(), whole.unwrap());
            for length in (0..saved.len()).step_by(37) {
                let cut = Learner::resume(&vectors, &held_out, 12, &options, &saved[..length]);
                assert!(matches!(cut, Err(Error::Learn(_))), "{length} bytes");
            }
            let more = [&saved[..], &[0]].concat();
            assert!(Learner::resume(&vectors, &held_out, 12, &options, &more).is_err());
        }
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
