use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::adam::Adam;
use super::reseed::near_duplicates;
use super::state::{Reader, Writer, damaged};
use super::vectors::{Vectors, read_units};
use super::{InitialAtoms, LearnError, LearnOptions, LearnProgress, Learned};
use crate::dictionary::Dictionary;
use crate::encode::{EncodedBatch, Encoder, Fit, Pursuit};
use crate::threads::Threads;
use crate::{Error, Result};

/// Steps between two looks for unused atoms.
const RESEED_STEPS: usize = 50;
/// Share of the run after which no atom is replaced: a new atom needs time to settle.
const RESEED_UNTIL: f32 = 0.8;

/// Learns a dictionary for vectors `[n, m]`, a step at a time.
///
/// Every vector is scaled to unit length first, so that the loss `‖x − x̂‖²` is the squared relative error. A step
/// codes a minibatch by [`Pursuit`] with the dictionary fixed, then moves the atoms by one step of Adam
/// (Kingma & Ba 2015) against the loss's gradient, made tangent to the sphere, and scales them back to unit length.
/// Atoms start as drawn vectors. Atoms that no code uses, and near duplicates, become the vectors coded worst. Of the
/// dictionaries after each epoch the one with the lowest held-out error is kept.
///
/// Its state can be saved after any step, and a learner that goes on from there ends with the same dictionary, bit for
/// bit, on any number of threads.
pub struct Learner<'v> {
    vectors: &'v dyn Vectors,
    held_out: &'v [f32],
    options: LearnOptions,
    pub(super) dictionary: Dictionary,
    adam: Adam,
    /// Uses of each atom by the codes of the steps since the last look.
    uses: Vec<u32>,
    step: usize,
    reseeded: usize,
    best: Option<(Dictionary, f32)>,
    /// Epochs since the best dictionary.
    without_gain: usize,
    /// Vectors of an epoch in the order of its steps, and the epoch's number.
    order: Vec<u32>,
    epoch: Option<usize>,
}

impl<'v> Learner<'v> {
    /// Begins to learn from `vectors`, to be judged on `held_out` `[n', m]`, which may be empty.
    ///
    /// # Errors
    /// Those of [`LearnOptions::check`], [`Error::Learn`] where there are fewer vectors than atoms,
    /// [`Error::NotFinite`], and those of the vectors.
    pub fn new(
        vectors: &'v dyn Vectors,
        held_out: &'v [f32],
        head_dim: usize,
        options: &LearnOptions,
    ) -> Result<Self> {
        options.check(head_dim)?;
        let n = vectors.count();
        if n > u32::MAX as usize {
            return Err(Error::Learn(LearnError::Vectors(n)));
        }
        if options.atoms > n {
            return Err(Error::Learn(LearnError::FewVectors {
                atoms: options.atoms,
                vectors: n,
            }));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        let dictionary = match options.initial {
            InitialAtoms::Vectors => drawn_vectors(vectors, head_dim, options.atoms, &mut rng)?,
            InitialAtoms::Random => random_atoms(head_dim, options.atoms, &mut rng)?,
        };
        Ok(Self::with_dictionary(
            vectors, held_out, dictionary, options,
        ))
    }

    fn with_dictionary(
        vectors: &'v dyn Vectors,
        held_out: &'v [f32],
        dictionary: Dictionary,
        options: &LearnOptions,
    ) -> Self {
        Self {
            vectors,
            held_out,
            options: options.clone(),
            adam: Adam::new(options.atoms, dictionary.head_dim()),
            uses: vec![0; options.atoms],
            step: 0,
            reseeded: 0,
            best: None,
            without_gain: 0,
            order: Vec::new(),
            epoch: None,
            dictionary,
        }
    }

    /// Goes on from what [`Learner::save`] gave, with the same vectors and settings.
    ///
    /// # Errors
    /// [`Error::Learn`] where the bytes are none of these settings.
    pub fn resume(
        vectors: &'v dyn Vectors,
        held_out: &'v [f32],
        head_dim: usize,
        options: &LearnOptions,
        saved: &[u8],
    ) -> Result<Self> {
        options.check(head_dim)?;
        let mut saved = Reader(saved);
        let count = options.atoms * head_dim;
        let dictionary = |saved: &mut Reader<'_>| {
            let atoms = saved.floats(count)?;
            Dictionary::new(atoms, head_dim).map_err(|_| damaged())
        };
        let current = dictionary(&mut saved)?;
        let mut learner = Self::with_dictionary(vectors, held_out, current, options);
        learner.adam.load(&mut saved)?;
        learner.uses = saved.counts(options.atoms)?;
        let mut number = || saved.number().map(|n| n as usize);
        learner.step = number()?;
        learner.reseeded = number()?;
        learner.without_gain = number()?;
        if number()? == 1 {
            let error = saved.floats(1)?[0];
            learner.best = Some((dictionary(&mut saved)?, error));
        }
        if !saved.0.is_empty() {
            return Err(damaged());
        }
        Ok(learner)
    }

    /// Returns all that [`Learner::resume`] needs, in 16 bytes or less a number of the dictionary.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.floats(&self.dictionary.atoms());
        self.adam.save(&mut out);
        out.counts(&self.uses);
        for number in [self.step, self.reseeded, self.without_gain] {
            out.number(number as u64);
        }
        out.number(u64::from(self.best.is_some()));
        if let Some((dictionary, error)) = &self.best {
            out.floats(&[*error]);
            out.floats(&dictionary.atoms());
        }
        out.0
    }

    /// Counts the steps in all, unless learning stops early.
    fn steps(&self) -> usize {
        self.options.epochs.saturating_mul(self.steps_an_epoch())
    }

    fn steps_an_epoch(&self) -> usize {
        self.vectors.count().div_ceil(self.options.batch)
    }

    /// Returns true where all steps are done, or learning stops early.
    #[must_use]
    pub fn is_done(&self) -> bool {
        let patience = self.options.patience;
        self.step >= self.steps() || (patience > 0 && self.without_gain >= patience)
    }

    /// Makes one step: codes a minibatch, moves the dictionary, and measures it at the end of an epoch.
    ///
    /// # Errors
    /// [`Error::NotFinite`], [`Error::Learn`] where learning diverges, and those of the vectors.
    pub fn step(&mut self, threads: &dyn Threads) -> Result<LearnProgress> {
        let head_dim = self.dictionary.head_dim();
        let (steps, an_epoch) = (self.steps(), self.steps_an_epoch());
        let (epoch, within) = (self.step / an_epoch, self.step % an_epoch);
        self.shuffle(epoch);
        let chosen = self.order[within * self.options.batch..].iter();
        let chosen: Vec<u32> = chosen.take(self.options.batch).copied().collect();
        let batch = read_units(self.vectors, &chosen, head_dim)?;
        let codes = Pursuit::new(&self.dictionary, self.options.sparsity)?
            .with_fit(Fit::LeastSquares)
            .encode_on(&batch, threads)?;
        for v in 0..codes.len() {
            for &i in codes.row(v).0 {
                self.uses[usize::from(i)] += 1;
            }
        }
        let done = self.step as f32 / steps as f32;
        let falling = 0.5 * (1.0 + (std::f32::consts::PI * done).cos());
        let rate = self.options.learning_rate * falling;
        self.adam.step(&mut self.dictionary, &batch, &codes, rate)?;
        self.step += 1;
        let ends_epoch = self.step.is_multiple_of(an_epoch);
        if self.step.is_multiple_of(RESEED_STEPS) || ends_epoch {
            if self.options.reseed && done < RESEED_UNTIL {
                self.reseed(&batch, &codes, ends_epoch, threads);
            }
            self.uses.fill(0);
        }
        let held_out_error = if ends_epoch {
            self.judge(threads)?
        } else {
            None
        };
        Ok(LearnProgress {
            step: self.step,
            steps,
            relative_error: codes.mean_relative_error(),
            held_out_error,
            reseeded: self.reseeded,
        })
    }

    /// Returns the dictionary that did best on the held-out vectors; without those, the last.
    #[must_use]
    pub fn finish(self) -> Learned {
        let (dictionary, held_out_error) = match self.best {
            Some((dictionary, error)) => (dictionary, Some(error)),
            None => (self.dictionary, None),
        };
        Learned {
            dictionary,
            held_out_error,
            reseeded: self.reseeded,
        }
    }

    /// Shuffles the vectors for an epoch, by the seed and the epoch's number alone.
    fn shuffle(&mut self, epoch: usize) {
        if self.epoch == Some(epoch) {
            return;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.options.seed);
        rng.set_stream(epoch as u64 + 1);
        self.order.clear();
        self.order.extend(0..self.vectors.count() as u32);
        self.order.shuffle(&mut rng);
        self.epoch = Some(epoch);
    }

    /// Replaces unused atoms, and after an epoch near duplicates, by the vectors of the batch that were coded worst.
    fn reseed(
        &mut self,
        batch: &[f32],
        codes: &EncodedBatch,
        duplicates_too: bool,
        threads: &dyn Threads,
    ) {
        let m = self.dictionary.head_dim();
        let mut useless: Vec<usize> = (0..self.uses.len())
            .filter(|&i| self.uses[i] == 0)
            .collect();
        if duplicates_too {
            useless.extend(near_duplicates(&self.dictionary, threads));
            useless.sort_unstable();
            useless.dedup();
        }
        // What is coded already has nothing to add, and zero is no direction.
        let errors = &codes.relative_errors;
        let mut worst: Vec<usize> = (0..codes.len()).filter(|&v| errors[v] > 0.0).collect();
        worst.sort_by(|&a, &b| errors[b].total_cmp(&errors[a]));
        for (i, v) in useless.into_iter().zip(worst) {
            let atom = &mut self.dictionary.atoms_mut()[i * m..(i + 1) * m];
            atom.copy_from_slice(&batch[v * m..(v + 1) * m]);
            self.adam.forget(i);
            self.reseeded += 1;
        }
    }

    /// Measures the held-out error of the dictionary, which is kept where it is the best so far.
    fn judge(&mut self, threads: &dyn Threads) -> Result<Option<f32>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        let pursuit = Pursuit::new(&self.dictionary, self.options.sparsity)?;
        let error = pursuit
            .encode_on(self.held_out, threads)?
            .mean_relative_error();
        if self.best.as_ref().is_none_or(|(_, best)| error < *best) {
            self.best = Some((self.dictionary.clone(), error));
            self.without_gain = 0;
        } else {
            self.without_gain += 1;
        }
        Ok(Some(error))
    }
}

/// Draws vectors as atoms, moved a little so that no two are alike.
fn drawn_vectors(
    vectors: &dyn Vectors,
    head_dim: usize,
    atoms: usize,
    rng: &mut ChaCha8Rng,
) -> Result<Dictionary> {
    let n = vectors.count();
    let noise = 0.01 / (head_dim as f32).sqrt();
    let mut order: Vec<u32> = (0..n as u32).collect();
    let mut undrawn = order.as_mut_slice();
    let mut rows = Vec::with_capacity(atoms * head_dim);
    while rows.len() < atoms * head_dim {
        let missing = atoms - rows.len() / head_dim;
        if undrawn.is_empty() {
            return Err(Error::Learn(LearnError::ZeroVectors { atoms, missing }));
        }
        let (chosen, rest) = undrawn.partial_shuffle(rng, missing);
        let drawn = read_units(vectors, chosen, head_dim)?;
        for x in drawn.chunks_exact(head_dim) {
            if x.iter().any(|&x| x != 0.0) {
                rows.extend(x.iter().map(|x| x + noise * rng.random_range(-1f32..1.0)));
            }
        }
        undrawn = rest;
    }
    Dictionary::normalised(rows, head_dim)
}

/// Draws directions evenly from the sphere.
fn random_atoms(head_dim: usize, atoms: usize, rng: &mut ChaCha8Rng) -> Result<Dictionary> {
    // Sums of twelve even draws are normal enough for a direction (Box, Muller 1958 would be exact).
    let normal = |rng: &mut ChaCha8Rng| (0..12).map(|_| rng.random_range(-0.5f32..0.5)).sum();
    let rows = (0..atoms * head_dim).map(|_| normal(rng)).collect();
    Dictionary::normalised(rows, head_dim)
}
