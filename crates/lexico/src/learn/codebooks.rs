//! Learning of codebooks for additive quantisation.

use std::ops::ControlFlow;

use rand::seq::index::sample;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::LearnError;
use crate::dictionary::{CODEBOOK_ATOMS, CodebookSizes, Codebooks, MAX_ATOMS, MAX_FIRST_ATOMS};
use crate::encode::{BeamSearch, Encoder};
use crate::kernels::vector::{add_scaled, square};
use crate::threads::{Threads, for_each};
use crate::{Error, Result};

/// Passes of k-means over the residuals that a codebook is to code.
const ITERATIONS: usize = 2;
/// Max vectors that k-means looks at for each atom.
const VECTORS_AN_ATOM: usize = 64;
/// Vectors below which an atom counts as unused.
const USERS: usize = 2;
/// Passes over the codebooks for the same codes.
const SWEEPS: usize = 2;
/// Share of a round's move that the next round adds to its own.
const MOMENTUM: f32 = 0.5;
/// Share of its vectors so far that an atom counts with beside those of the next round.
const MEMORY: f64 = 0.8;
/// Number of further codebooks with which the error of a code counts twice as much: about as it falls.
const CODEBOOKS_TO_HALVE: f64 = 5.0;
/// Least number of vectors that hold an atom where it is, were they all imaginary.
const INERTIA: f64 = 2.0;
/// Real vectors for each added mixture.
const VECTORS_A_MIXTURE: usize = 64;
/// Vectors in a mixture.
const MIXED: usize = 16;
/// Vectors coded between two calls of the progress.
const SLICE: usize = 8192;
/// Vectors, and atoms, of one task.
const TASK_VECTORS: usize = 1024;
const TASK_ATOMS: usize = 16;

/// Settings of [`learn_codebooks`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodebookOptions {
    /// Atoms of the first codebook, at most 2,048; as many as there are vectors, where these are fewer.
    pub first: usize,
    /// Number of codebooks, and so the max atoms of a code.
    pub codebooks: usize,
    /// Atoms of the codes that the held-out error is measured with, at most one a codebook.
    pub sparsity: usize,
    /// Rounds of coding vectors and fitting the atoms to the codes, once all codebooks are there.
    pub rounds: usize,
    /// Vectors that a round looks at, those of one round after those of the other; all where there are fewer.
    pub vectors: usize,
    /// Beam width of the search for codes while learning.
    pub beam: usize,
    /// Seed of every random choice: the same seed gives the same codebooks on any number of threads.
    pub seed: u64,
}

impl Default for CodebookOptions {
    /// Returns the settings for a head dim of 64.
    fn default() -> Self {
        Self::of(64)
    }
}

impl CodebookOptions {
    /// Returns the settings for a head dim `m`: `m/2` codebooks, judged at `3m/16` of them.
    #[must_use]
    pub fn of(head_dim: usize) -> Self {
        Self {
            first: 2048,
            codebooks: (head_dim / 2).max(1),
            sparsity: (3 * head_dim / 16).max(1),
            rounds: 8,
            vectors: 1 << 15,
            beam: 4,
            seed: 0,
        }
    }

    /// Counts the multiplications that learning from `n` vectors of head dim `m` takes, within a tenth or so.
    #[must_use]
    pub fn products(&self, n: usize, head_dim: usize) -> f64 {
        let nearest = |vectors: usize, atoms: usize| (vectors * atoms * head_dim) as f64;
        let beginning = |codebook: usize| {
            let atoms = if codebook == 0 {
                self.first
            } else {
                CODEBOOK_ATOMS
            };
            let looked_at = n.min(VECTORS_AN_ATOM * atoms);
            ITERATIONS as f64 * nearest(looked_at, atoms) + nearest(n, atoms)
        };
        let beginning: f64 = (0..self.codebooks).map(beginning).sum();
        let round = self.products_of_a_search(self.vectors.min(n), head_dim);
        beginning + self.rounds as f64 * round
    }

    /// Counts the multiplications of a search for codes of `n` vectors over all codebooks.
    #[must_use]
    pub fn products_of_a_search(&self, n: usize, head_dim: usize) -> f64 {
        let others = self.codebooks.saturating_sub(1) * CODEBOOK_ATOMS * self.beam;
        n as f64 * ((self.first + others) * head_dim) as f64
    }

    /// Checks all that can be checked before the vectors are there.
    ///
    /// # Errors
    /// [`Error::Learn`] for a setting that is 0 or too many atoms.
    pub fn check(&self) -> Result<()> {
        crate::kernels::check_level().map_err(Error::Level)?;
        if self.first == 0 || self.codebooks == 0 || self.sparsity == 0 || self.beam == 0 {
            let zero = "the atoms of the first codebook, codebooks, sparsity and beam";
            return Err(Error::Learn(LearnError::Zero(zero)));
        }
        if self.first > MAX_FIRST_ATOMS {
            return Err(Error::Learn(LearnError::FirstCodebook(self.first)));
        }
        let others = (self.codebooks - 1).saturating_mul(CODEBOOK_ATOMS);
        let atoms = self.first.saturating_add(others);
        if atoms > MAX_ATOMS {
            return Err(Error::Learn(LearnError::ManyCodebooks {
                codebooks: self.codebooks,
                first: self.first,
                atoms,
            }));
        }
        Ok(())
    }
}

/// Progress of [`learn_codebooks`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodebookProgress {
    /// Steps done; a step codes some thousands of vectors over one codebook.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
}

/// Learned codebooks.
#[derive(Debug, Clone, PartialEq)]
pub struct LearnedCodebooks {
    /// The codebooks.
    pub codebooks: Codebooks,
    /// Mean relative error of the held-out vectors at [`CodebookOptions::sparsity`]; `None` where there were none.
    pub held_out_error: Option<f32>,
}

/// Learns codebooks for vectors `[n, m]`, judged on `held_out` `[n', m]`; an additive code takes one atom of each.
///
/// Unlike a [`Learner`](super::Learner) it takes the vectors at their lengths, which the atoms keep, so that the loss is
/// the squared error. Each codebook begins as the means that k-means (Lloyd 1982) finds in the residuals that the
/// codebooks before it leave (residual quantisation: Juang & Gray 1982; Chen, Guan, Wang 2010). Then, in rounds, a
/// beam search codes the next [`CodebookOptions::vectors`], and with the codes fixed codebook after codebook moves to
/// where the loss is least (additive quantisation: Babenko & Lempitsky 2014; Martinez et al. 2016, 2018), held by the
/// vectors of earlier rounds (mini-batches: Sculley 2010), and on by a share of the move of the round before, since
/// codes and atoms that wait for each other come forward slowly (momentum: Polyak 1964). All beginnings of a code count
/// too, so that the first codebooks alone serve smaller sparsities well. An atom that k-means leaves unused becomes a
/// vector drawn by its squared error.
///
/// One in 65 of the vectors learned from is a mixture of real ones: random vectors of their mean and covariance. A
/// first codebook that knows nearly all vectors of a corpus by heart would leave nothing to learn for the other
/// codebooks, which could then not code vectors of other texts.
///
/// Takes `O(n·N·m·b)` time for `n` vectors of all rounds, `N` atoms and a beam of `b`, about as much for the beginning,
/// and memory for `3·n·m` numbers. The vectors are taken because they are scaled in place.
///
/// `progress` is called every few thousand vectors and may break off.
///
/// # Errors
/// Those of [`CodebookOptions::check`]; [`Error::Learn`] where there are no vectors, [`Error::VectorLength`],
/// [`Error::NotFinite`], and [`Error::Interrupted`] where `progress` broke off.
pub fn learn_codebooks(
    mut vectors: Vec<f32>,
    held_out: &[f32],
    head_dim: usize,
    options: &CodebookOptions,
    threads: &dyn Threads,
    progress: &mut dyn FnMut(CodebookProgress) -> ControlFlow<()>,
) -> Result<LearnedCodebooks> {
    options.check()?;
    for vectors in [&vectors, held_out] {
        super::InMemory::new(vectors, head_dim)?;
        crate::encode::check_vectors(vectors, head_dim)?;
    }
    let n = vectors.len() / head_dim;
    if n == 0 || n > u32::MAX as usize {
        return Err(Error::Learn(LearnError::Vectors(n)));
    }
    // Whatever the vectors' lengths, squares of what is left of them are numbers that f32 has.
    let scale = (square(&vectors) / n as f64).sqrt();
    let scale = if scale > 0.0 { scale } else { 1.0 };
    vectors
        .iter_mut()
        .for_each(|x| *x = (f64::from(*x) / scale) as f32);
    let sizes = CodebookSizes {
        first: options.first.min(n),
    };
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    add_mixtures(&mut vectors, head_dim, &mut rng);
    let n = vectors.len() / head_dim;
    let mut learner = CodebookLearner {
        vectors: &vectors,
        head_dim,
        sizes,
        options,
        rng,
        threads,
        progress,
        done: CodebookProgress {
            step: 0,
            steps: options.steps(n, sizes),
        },
    };
    let mut atoms = learner.begin()?;
    let mut moves = vec![0f32; atoms.len()];
    let each = options.vectors.min(n);
    let mut order: Vec<usize> = sample(&mut learner.rng, n, n).into_vec();
    let mut held = vec![INERTIA; atoms.len() / head_dim];
    for round in 1..=options.rounds {
        let own = rows(learner.vectors, head_dim, &order[..each]);
        order.rotate_left(each);
        let codes = learner.code(&atoms, &own)?;
        let before = atoms.clone();
        for _ in 0..SWEEPS {
            learner.fit(&mut atoms, &before, &held, &own, &codes)?;
        }
        if each < n {
            codes.iter().for_each(|&i| held[usize::from(i)] += 1.0);
            let fade = |held: &mut f64| *held = (MEMORY * *held).max(INERTIA);
            held.iter_mut().for_each(fade);
        }
        // The last round leaves the atoms where its codes want them.
        if round < options.rounds {
            for ((atom, before), last) in atoms.iter_mut().zip(before).zip(&mut moves) {
                *last = *atom - before + MOMENTUM * *last;
                *atom = before + *last;
            }
        }
    }
    atoms
        .iter_mut()
        .for_each(|x| *x = (f64::from(*x) * scale) as f32);
    let codebooks = Codebooks::new(atoms, head_dim, sizes)?;
    let sparsity = options.sparsity.min(options.codebooks);
    let search = BeamSearch::new(&codebooks, sparsity)?;
    let codes = search.encode_on(held_out, threads)?;
    let held_out_error = (!codes.is_empty()).then(|| codes.mean_relative_error());
    Ok(LearnedCodebooks {
        codebooks,
        held_out_error,
    })
}

/// Appends mixtures of the vectors `[n, m]`: their mean plus sums of differences from it with random signs.
fn add_mixtures(vectors: &mut Vec<f32>, m: usize, rng: &mut ChaCha8Rng) {
    let n = vectors.len() / m;
    let mut sums = vec![0f64; m];
    for x in vectors.chunks_exact(m) {
        add(&mut sums, x);
    }
    let mean: Vec<f32> = sums.iter().map(|sum| (sum / n as f64) as f32).collect();
    let share = 1.0 / (MIXED as f32).sqrt();
    for _ in 0..n / VECTORS_A_MIXTURE {
        let mut mixture = mean.clone();
        for _ in 0..MIXED {
            let from = rng.random_range(0..n) * m;
            let share = if rng.random() { share } else { -share };
            add_scaled(&mut mixture, share, &vectors[from..from + m]);
            add_scaled(&mut mixture, -share, &mean);
        }
        vectors.extend(mixture);
    }
}

impl CodebookOptions {
    /// Counts the steps that `n` vectors take.
    fn steps(&self, n: usize, sizes: CodebookSizes) -> usize {
        let slices = |vectors: usize| vectors.div_ceil(SLICE);
        let beginning = |codebook: usize| {
            let looked_at = slices(n.min(VECTORS_AN_ATOM * sizes.size(codebook)));
            let coded = usize::from(codebook + 1 < self.codebooks);
            ITERATIONS * looked_at + coded * slices(n)
        };
        let rounds = self.rounds * slices(self.vectors.min(n)) * self.codebooks;
        (0..self.codebooks).map(beginning).sum::<usize>() + rounds
    }
}

struct CodebookLearner<'a> {
    /// `[n, m]`
    vectors: &'a [f32],
    head_dim: usize,
    sizes: CodebookSizes,
    options: &'a CodebookOptions,
    rng: ChaCha8Rng,
    threads: &'a dyn Threads,
    progress: &'a mut dyn FnMut(CodebookProgress) -> ControlFlow<()>,
    done: CodebookProgress,
}

impl CodebookLearner<'_> {
    fn tell(&mut self, steps: usize) -> Result<()> {
        self.done.step += steps;
        match (self.progress)(self.done) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    }

    /// Learns each codebook from the residuals that those before it leave; returns all atoms.
    fn begin(&mut self) -> Result<Vec<f32>> {
        let m = self.head_dim;
        let mut atoms = Vec::new();
        let mut residuals = self.vectors.to_vec();
        for codebook in 0..self.options.codebooks {
            let mut own = self.means(&residuals, self.sizes.size(codebook))?;
            if codebook + 1 < self.options.codebooks {
                let (nearest, _) = self.nearest(&own, &residuals)?;
                // Means of all vectors, where k-means looked at some.
                let users = Users::new(&nearest, self.sizes.size(codebook));
                users.move_atoms(self.threads, &mut own, m, None, |v, sum| {
                    add(sum, &residuals[v * m..(v + 1) * m]);
                });
                subtract(self.threads, &mut residuals, &own, m, &nearest);
            }
            atoms.extend(own);
        }
        Ok(atoms)
    }

    /// Codes all vectors over the codebooks that these atoms fill; returns the atoms' numbers, `[n, codebooks]`.
    fn code(&mut self, atoms: &[f32], vectors: &[f32]) -> Result<Vec<u16>> {
        let codebooks = Codebooks::new(atoms.to_vec(), self.head_dim, self.sizes)?;
        let beam = self.options.beam;
        Ok(self.search(&codebooks, vectors, beam)?.0)
    }

    /// Finds the nearest of these atoms to each vector.
    fn nearest(&mut self, atoms: &[f32], vectors: &[f32]) -> Result<Found> {
        let first = atoms.len() / self.head_dim;
        let alone = Codebooks::new(atoms.to_vec(), self.head_dim, CodebookSizes { first })?;
        self.search(&alone, vectors, 1)
    }

    fn search(&mut self, codebooks: &Codebooks, vectors: &[f32], beam: usize) -> Result<Found> {
        let sparsity = codebooks.len();
        let search = BeamSearch::new(codebooks, sparsity)?.with_beam_width(beam);
        let (mut indices, mut errors) = Found::default();
        for slice in vectors.chunks(SLICE * self.head_dim) {
            let codes = search.encode_on(slice, self.threads)?;
            indices.extend(codes.indices);
            errors.extend(codes.relative_errors);
            self.tell(sparsity)?;
        }
        Ok((indices, errors))
    }

    /// Finds `count` means of `vectors` by k-means on a sample.
    fn means(&mut self, vectors: &[f32], count: usize) -> Result<Vec<f32>> {
        let m = self.head_dim;
        let n = vectors.len() / m;
        let most = VECTORS_AN_ATOM * count;
        let drawn: Vec<f32>;
        let vectors = if n > most {
            drawn = rows(vectors, m, &sample(&mut self.rng, n, most).into_vec());
            &drawn
        } else {
            vectors
        };
        let n = vectors.len() / m;
        let row = |v: usize| &vectors[v * m..(v + 1) * m];
        let mut atoms = vec![0.0; count * m];
        let first = sample(&mut self.rng, n, count.min(n));
        for (atom, v) in atoms.chunks_exact_mut(m).zip(first) {
            atom.copy_from_slice(row(v));
        }
        for _ in 0..ITERATIONS {
            let (nearest, errors) = self.nearest(&atoms, vectors)?;
            let users = Users::new(&nearest, count);
            users.move_atoms(self.threads, &mut atoms, m, None, |v, sum| {
                add(sum, row(v));
            });
            // Vectors badly coded, each as likely as its squared error is large.
            let mut total = 0.0;
            let errors = errors.iter().enumerate();
            let sums: Vec<f64> = errors
                .map(|(v, &error)| {
                    total += square(row(v)) * f64::from(error).powi(2);
                    total
                })
                .collect();
            if total > 0.0 {
                for (i, atom) in atoms.chunks_exact_mut(m).enumerate() {
                    if users.of(i).len() < USERS {
                        let place = self.rng.random_range(0.0..total);
                        let v = sums.partition_point(|&sum| sum <= place);
                        atom.copy_from_slice(row(v.min(n - 1)));
                    }
                }
            }
        }
        Ok(atoms)
    }

    /// Makes one pass of coordinate descent: moves the atoms of each codebook to where the codes' weighted errors are
    /// least, while those of the other codebooks stay.
    ///
    /// The first `l` atoms of a code leave an error whose weight is `w_l`. The atom of codebook `g` has part in
    /// those of `l > g`: with `W_g = Σ_{l>g} w_l` it is best where it is the mean, over its vectors, of
    /// `x − Σ_{h<g} c_h − Σ_{h>g} c_h · W_h / W_g`.
    fn fit(
        &mut self,
        atoms: &mut [f32],
        anchors: &[f32],
        held: &[f64],
        vectors: &[f32],
        codes: &[u16],
    ) -> Result<()> {
        let (m, s) = (self.head_dim, self.options.codebooks);
        let weights = summed_weights(s);
        // What the codebooks before leave of every vector, and what those after add with their weights.
        let mut before = vectors.to_vec();
        let mut after = vec![0.0; before.len()];
        let all: &[f32] = atoms;
        let rows = after
            .chunks_mut(TASK_VECTORS * m)
            .zip(codes.chunks(TASK_VECTORS * s));
        for_each(self.threads, rows, |(after, codes)| {
            for (after, code) in after.chunks_exact_mut(m).zip(codes.chunks_exact(s)) {
                for (&i, &weight) in code.iter().zip(&weights).skip(1) {
                    add_scaled(after, weight as f32, atom(all, m, i));
                }
            }
        });
        for codebook in 0..s {
            let first = self.sizes.start(codebook);
            let own: Vec<u16> = codes
                .chunks_exact(s)
                .map(|code| code[codebook] - first as u16)
                .collect();
            let size = self.sizes.size(codebook);
            let users = Users::new(&own, size);
            let moved = &mut atoms[first * m..(first + size) * m];
            let share = -1.0 / weights[codebook];
            let inertia = Some((&anchors[first * m..][..size * m], &held[first..][..size]));
            users.move_atoms(self.threads, moved, m, inertia, |v, sum| {
                let place = v * m..(v + 1) * m;
                let wanted = before[place.clone()].iter().zip(&after[place]);
                for (sum, (&before, &after)) in sum.iter_mut().zip(wanted) {
                    *sum += f64::from(before) + share * f64::from(after);
                }
            });
            let next = weights.get(codebook + 1).map(|&weight| -weight as f32);
            let all: &[f32] = atoms;
            let rows = before
                .chunks_mut(TASK_VECTORS * m)
                .zip(after.chunks_mut(TASK_VECTORS * m))
                .zip(codes.chunks(TASK_VECTORS * s));
            for_each(self.threads, rows, |((before, after), codes)| {
                let rows = before.chunks_exact_mut(m).zip(after.chunks_exact_mut(m));
                for ((before, after), code) in rows.zip(codes.chunks_exact(s)) {
                    add_scaled(before, -1.0, atom(all, m, code[codebook]));
                    if let Some(weight) = next {
                        add_scaled(after, weight, atom(all, m, code[codebook + 1]));
                    }
                }
            });
            self.tell(0)?;
        }
        Ok(())
    }
}

/// Returns some of the vectors `[n, m]`.
fn rows(vectors: &[f32], m: usize, numbers: &[usize]) -> Vec<f32> {
    let rows = numbers.iter().flat_map(|&v| &vectors[v * m..(v + 1) * m]);
    rows.copied().collect()
}

/// Atoms that a search found for each vector, one after the other, and the vectors' relative errors.
type Found = (Vec<u16>, Vec<f32>);

/// Vectors whose code has an atom, for every atom, rising.
struct Users {
    /// Start of each atom's vectors, and the end of the last one's.
    starts: Vec<usize>,
    vectors: Vec<u32>,
}

impl Users {
    /// Takes the atom of each vector.
    fn new(indices: &[u16], atoms: usize) -> Self {
        let mut starts = vec![0; atoms + 1];
        for &i in indices {
            starts[usize::from(i) + 1] += 1;
        }
        for i in 0..atoms {
            starts[i + 1] += starts[i];
        }
        let mut next = starts.clone();
        let mut vectors = vec![0; indices.len()];
        for (v, &i) in indices.iter().enumerate() {
            let place = &mut next[usize::from(i)];
            vectors[*place] = v as u32;
            *place += 1;
        }
        Self { starts, vectors }
    }

    fn of(&self, atom: usize) -> &[u32] {
        &self.vectors[self.starts[atom]..self.starts[atom + 1]]
    }

    /// Moves each atom `[m]` to the mean of what `add` adds for each of its vectors and of itself, `inertia` times; one
    /// without any stays.
    fn move_atoms(
        &self,
        threads: &dyn Threads,
        atoms: &mut [f32],
        m: usize,
        inertia: Option<(&[f32], &[f64])>,
        add: impl Fn(usize, &mut [f64]) + Sync,
    ) {
        let tasks = atoms.chunks_mut(TASK_ATOMS * m).enumerate();
        for_each(threads, tasks, |(task, atoms)| {
            let mut sum = vec![0.0; m];
            for (i, atom) in atoms.chunks_exact_mut(m).enumerate() {
                let users = self.of(task * TASK_ATOMS + i);
                let number = task * TASK_ATOMS + i;
                let held = inertia.map_or(0.0, |(_, held)| held[number]);
                let count = users.len() as f64 + held;
                if count == 0.0 {
                    continue;
                }
                sum.fill(0.0);
                if let Some((anchors, _)) = inertia {
                    let own = sum.iter_mut().zip(&anchors[number * m..][..m]);
                    own.for_each(|(sum, &x)| *sum = held * f64::from(x));
                }
                users.iter().for_each(|&v| add(v as usize, &mut sum));
                for (x, sum) in atom.iter_mut().zip(&sum) {
                    *x = (sum / count) as f32;
                }
            }
        });
    }
}

/// Returns, for every codebook, the sum of the weights of the codes that have an atom of it.
fn summed_weights(codebooks: usize) -> Vec<f64> {
    let mut sum = 0.0;
    let weights = (0..codebooks).rev().map(|codebook| {
        sum += (codebook as f64 / CODEBOOKS_TO_HALVE).exp2();
        sum
    });
    let mut weights: Vec<f64> = weights.collect();
    weights.reverse();
    weights
}

fn atom(atoms: &[f32], m: usize, i: u16) -> &[f32] {
    &atoms[usize::from(i) * m..][..m]
}

/// Subtracts the atoms of its code from each vector.
fn subtract(threads: &dyn Threads, vectors: &mut [f32], atoms: &[f32], m: usize, codes: &[u16]) {
    let each = codes.len() * m / vectors.len();
    let tasks = vectors
        .chunks_mut(TASK_VECTORS * m)
        .zip(codes.chunks(TASK_VECTORS * each));
    for_each(threads, tasks, |(vectors, codes)| {
        for (x, code) in vectors.chunks_exact_mut(m).zip(codes.chunks_exact(each)) {
            for &i in code {
                add_scaled(x, -1.0, atom(atoms, m, i));
            }
        }
    });
}

fn add(sum: &mut [f64], x: &[f32]) {
    for (sum, &x) in sum.iter_mut().zip(x) {
        *sum += f64::from(x);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

    use super::*;
    use crate::threads::{Alone, Rayon};

    const M: usize = 8;

    /// Vectors about some centres, the numbers of each nearer to zero than those before.
    fn drawn_vectors(seed: u64, count: usize) -> Vec<f32> {
        let mut centres = ChaCha8Rng::seed_from_u64(99);
        let centres: Vec<f32> = (0..20 * M)
            .map(|_| centres.random_range(-1.0..1.0))
            .collect();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut vectors = Vec::with_capacity(count * M);
        for _ in 0..count {
            let centre = rng.random_range(0..20) * M;
            for (i, x) in centres[centre..][..M].iter().enumerate() {
                vectors.push(x + rng.random_range(-1f32..1.0) / (1 + i) as f32);
            }
        }
        vectors
    }

    fn options() -> CodebookOptions {
        CodebookOptions {
            first: 64,
            codebooks: 5,
            sparsity: 3,
            ..CodebookOptions::of(M)
        }
    }

    fn learned(
        vectors: &[f32],
        options: &CodebookOptions,
        threads: &dyn Threads,
    ) -> LearnedCodebooks {
        let held_out = drawn_vectors(2, 300);
        let go_on = &mut |_| ControlFlow::Continue(());
        learn_codebooks(vectors.to_vec(), &held_out, M, options, threads, go_on).unwrap()
    }

    /// Mean squared error on held-out vectors over their mean square.
    fn error(dictionary: &Codebooks, sparsity: usize) -> f64 {
        let held_out = drawn_vectors(2, 300);
        let codes = BeamSearch::new(dictionary, sparsity).unwrap();
        let codes = codes.encode(&held_out).unwrap();
        let errors = codes.relative_errors.iter().zip(held_out.chunks(M));
        let squares = errors.map(|(&e, x)| f64::from(e).powi(2) * square(x));
        squares.sum::<f64>() / square(&held_out)
    }

    #[test]
    fn every_step_of_learning_and_every_atom_lowers_the_held_out_error() {
        let vectors = drawn_vectors(1, 12_000);
        let learned_in = |rounds| {
            let options = CodebookOptions {
                rounds,
                ..options()
            };
            learned(&vectors, &options, &Rayon)
        };
        let (begun, whole) = (learned_in(0), learned_in(3));
        let errors: Vec<f64> = (1..=5).map(|s| error(&whole.codebooks, s)).collect();
        assert!(errors.is_sorted_by(|a, b| *b < 0.8 * a), "{errors:?}");
        // With more there are hardly more vectors than atoms can learn by heart.
        for s in 2..=4 {
            let before = error(&begun.codebooks, s);
            assert!(errors[s - 1] < before, "{s} atoms: {errors:?}, {before}");
        }
        assert!(whole.held_out_error < begun.held_out_error);
        // Atoms of the same numbers that were never learned.
        let mut random = whole.codebooks.atoms().to_vec();
        let sizes = whole.codebooks.sizes();
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for codebook in 0..5 {
            let own = &mut random[sizes.start(codebook) * M..sizes.start(codebook + 1) * M];
            rand::seq::SliceRandom::shuffle(own, &mut rng);
        }
        let random = Codebooks::new(random, M, sizes).unwrap();
        for s in 1..=5 {
            assert!(errors[s - 1] < 0.7 * error(&random, s), "{s} atoms");
        }
    }

    #[test]
    fn a_seed_gives_one_dictionary_on_any_number_of_threads() {
        // More than are coded at once, and than k-means looks at.
        let vectors = drawn_vectors(1, 20_000);
        let options = CodebookOptions {
            codebooks: 2,
            rounds: 1,
            ..options()
        };
        let alone = learned(&vectors, &options, &Alone);
        let three = rayon::ThreadPoolBuilder::new().num_threads(3).build();
        let three = three
            .unwrap()
            .install(|| learned(&vectors, &options, &Rayon));
        assert_eq!(alone, three);
        let other = CodebookOptions { seed: 1, ..options };
        assert_ne!(alone, learned(&vectors, &other, &Alone));
    }

    #[test]
    fn atoms_move_to_where_the_weighted_error_is_less() {
        let vectors = drawn_vectors(3, 700);
        let options = options();
        let sizes = CodebookSizes { first: 64 };
        let (n, s) = (700, options.codebooks);
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let mut atoms: Vec<f32> = (0..sizes.atoms(s) * M)
            .map(|_| rng.random_range(-0.5..0.5))
            .collect();
        let mut codes = Vec::new();
        for _ in 0..n {
            codes.extend(
                (0..s).map(|g| (sizes.start(g) + rng.random_range(0..sizes.size(g))) as u16),
            );
        }
        // By the definition, in f64: of the first 1, 2 ... atoms of every code.
        let loss = |atoms: &[f32]| {
            let mut loss = 0.0;
            for (x, code) in vectors.chunks(M).zip(codes.chunks(s)) {
                let mut rest: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                for (place, &i) in code.iter().enumerate() {
                    for (rest, &a) in rest.iter_mut().zip(atom(atoms, M, i)) {
                        *rest -= f64::from(a);
                    }
                    let square: f64 = rest.iter().map(|r| r * r).sum();
                    loss += 2f64.powf(place as f64 / 5.0) * square;
                }
            }
            loss
        };
        let mut losses = vec![loss(&atoms)];
        let mut learner = CodebookLearner {
            vectors: &vectors,
            head_dim: M,
            sizes,
            options: &options,
            rng,
            threads: &Rayon,
            progress: &mut |_| ControlFlow::Continue(()),
            done: CodebookProgress { step: 0, steps: 0 },
        };
        for _ in 0..40 {
            let (before, held) = (atoms.clone(), vec![INERTIA; atoms.len() / M]);
            let fit = learner.fit(&mut atoms, &before, &held, &vectors, &codes);
            fit.unwrap();
            losses.push(loss(&atoms));
        }
        assert!(
            losses.is_sorted_by(|a, b| *b <= a * (1.0 + 1e-6)),
            "{losses:?}"
        );
        // At the least loss no atom has a better place: what its vectors want of it sums to nothing.
        let before = losses[40];
        for (i, step) in [(3, 1e-2), (64 + 7, -1e-2), (64 + 256 + 9, 1e-2)] {
            let mut other = atoms.clone();
            other[i * M] += step;
            assert!(loss(&other) > before * (1.0 - 1e-6), "atom {i}");
        }
    }

    #[test]
    fn odd_vectors_are_learned() {
        let few = drawn_vectors(1, 5);
        let mut zeros_too = few.clone();
        zeros_too.extend([0.0; 3 * M]);
        // About as large and as small as codes can be.
        let huge: Vec<f32> = few.iter().map(|x| x * 1e14).collect();
        let tiny: Vec<f32> = few.iter().map(|x| x * 1e-15).collect();
        let mut outlier = drawn_vectors(1, 300);
        outlier[7] = 3e38;
        for (name, vectors) in [
            ("one", few[..M].to_vec()),
            ("five", few.clone()),
            ("zero", vec![0.0; 9 * M]),
            ("some zero", zeros_too),
            ("equal", few[..M].repeat(400)),
            ("huge", huge),
            ("tiny", tiny),
            ("one far off", outlier),
        ] {
            let held_out = vectors.clone();
            let mut last = None;
            let learned = learn_codebooks(vectors, &held_out, M, &options(), &Rayon, &mut |p| {
                last = Some(p);
                ControlFlow::Continue(())
            });
            let learned = learned.unwrap();
            let n = held_out.len() / M;
            assert_eq!(learned.codebooks.len(), 5, "{name}");
            assert_eq!(learned.codebooks.sizes().first, n.min(64), "{name}");
            let error = learned.held_out_error.unwrap();
            if name == "one far off" {
                assert!(error.is_finite());
            } else {
                assert!(error < 1e-3, "{name}: {error}");
            }
            let last = last.unwrap();
            assert_eq!(last.step, last.steps, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_learned_is_refused() {
        let vectors = drawn_vectors(1, 300);
        let run = |vectors: &[f32], held_out: &[f32], change: fn(&mut CodebookOptions)| {
            let mut options = options();
            change(&mut options);
            let go_on = &mut |_| ControlFlow::Continue(());
            learn_codebooks(vectors.to_vec(), held_out, M, &options, &Rayon, go_on)
        };
        let same: fn(&mut CodebookOptions) = |_| {};
        for refused in [
            run(&[], &[], same),
            run(&vectors, &[], |o| o.first = 0),
            run(&vectors, &[], |o| o.codebooks = 0),
            run(&vectors, &[], |o| o.sparsity = 0),
            run(&vectors, &[], |o| o.beam = 0),
            run(&vectors, &[], |o| o.codebooks = 257),
            run(&vectors, &[], |o| o.codebooks = usize::MAX),
        ] {
            assert!(matches!(refused, Err(Error::Learn(_))), "{refused:?}");
        }
        let ragged = run(&vectors[1..], &[], same);
        assert!(matches!(ragged, Err(Error::VectorLength { .. })));
        let mut poisoned = vectors.clone();
        poisoned[7 * M] = f32::NAN;
        for refused in [run(&poisoned, &[], same), run(&vectors, &poisoned, same)] {
            assert!(matches!(refused, Err(Error::NotFinite { row: 7 })));
        }
        assert_eq!(run(&vectors, &[], same).unwrap().held_out_error, None);
        let mut calls = 0;
        let stopped = learn_codebooks(vectors, &[], M, &options(), &Rayon, &mut |_| {
            calls += 1;
            if calls == 20 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        assert!(matches!(stopped, Err(Error::Interrupted)) && calls == 20);
    }
}
