//! Dictionary learning: pursuit with the dictionary fixed, and in turn the dictionary with the codes fixed.

mod adam;
mod basis;
mod codebooks;
mod effort;
mod learner;
mod maps;
mod reseed;
mod state;
mod vectors;

use crate::dictionary::{Dictionary, MAX_ATOMS, check_sparsity};
use crate::{Error, Result};

pub use crate::error::LearnError;
pub use basis::joint_basis;
pub use codebooks::{CodebookOptions, CodebookProgress, LearnedCodebooks, learn_codebooks};
pub use effort::Effort;
pub use learner::Learner;
pub use maps::{RotaryKeys, head_maps};
pub use vectors::{InMemory, Vectors};

/// Atoms before the first step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitialAtoms {
    /// Drawn vectors.
    Vectors,
    /// Directions drawn evenly from the sphere.
    Random,
}

/// Settings of a [`Learner`].
#[derive(Debug, Clone, PartialEq)]
pub struct LearnOptions {
    /// Number of atoms, `N`.
    pub atoms: usize,
    /// Sparsity during learning, `s`.
    pub sparsity: usize,
    /// Passes over the vectors.
    pub epochs: usize,
    /// Vectors of a step, held in memory; all of them where there are fewer.
    pub batch: usize,
    /// Step size of Adam at the start; it falls to 0 along a half cosine.
    pub learning_rate: f32,
    /// Atoms at the start.
    pub initial: InitialAtoms,
    /// Replaces atoms that no code uses, and near duplicates, by the vectors coded worst.
    pub reseed: bool,
    /// Epochs in a row without a lower held-out error after which learning stops; 0 never stops early.
    pub patience: usize,
    /// Seed of every random choice: the same seed gives the same dictionary on any number of threads.
    pub seed: u64,
}

impl Default for LearnOptions {
    fn default() -> Self {
        Self {
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

/// Progress of learning.
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
    /// Atoms replaced so far.
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
    /// Atoms replaced in all.
    pub reseeded: usize,
}

impl LearnOptions {
    /// Checks all that can be checked before the vectors are there.
    ///
    /// # Errors
    /// [`Error::Learn`] for a setting that is 0 or not a number, [`Error::Sparsity`].
    pub fn check(&self, head_dim: usize) -> Result<()> {
        crate::kernels::check_level().map_err(Error::Level)?;
        if self.atoms == 0 || self.epochs == 0 || self.batch == 0 {
            return Err(Error::Learn(LearnError::Zero("atoms, epochs and batch")));
        }
        if self.atoms > MAX_ATOMS {
            return Err(Error::Learn(LearnError::ManyAtoms(self.atoms)));
        }
        // Atoms have unit length: a step of 1 already leaves nothing of one.
        if !(self.learning_rate > 0.0 && self.learning_rate <= 1.0) {
            return Err(Error::Learn(LearnError::LearningRate(self.learning_rate)));
        }
        check_sparsity(self.sparsity, head_dim, self.atoms)
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use std::ops::ControlFlow;

    use super::*;
    use crate::threads::Rayon;

    /// Takes all steps of learning; `progress` is called after every one and may break off.
    fn learn(
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
                hidden.row(rng.random_range(0..atoms)).add_scaled_to(c, x);
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
            ..LearnOptions::default()
        }
    }

    #[test]
    fn finds_a_planted_dictionary_and_repeats_itself() {
        let vectors = planted(1, 4000, 16, 12);
        let held_out = planted(2, 500, 16, 12);
        for initial in [InitialAtoms::Vectors, InitialAtoms::Random] {
            let options = LearnOptions {
                initial,
                reseed: initial == InitialAtoms::Vectors,
                ..options()
            };
            let mut first_error = None;
            let run = |first: &mut Option<f32>| {
                learn(&vectors, &held_out, 12, &options, &mut |p| {
                    first.get_or_insert(p.relative_error);
                    ControlFlow::Continue(())
                })
                .unwrap()
            };
            let learned = run(&mut first_error);
            let error = learned.held_out_error.unwrap();
            assert!(error < 0.1, "{initial:?}: {error}");
            assert!(error < 0.5 * first_error.unwrap(), "{initial:?}: {error}");
            assert!(options.reseed || learned.reseeded == 0);
            assert_eq!(learned, run(&mut None), "{initial:?}");
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
        let before = reseed::near_duplicates(&learner.dictionary, &Rayon).len();
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
        let options = LearnOptions {
            batch: 64,
            epochs: 6,
            ..options()
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
