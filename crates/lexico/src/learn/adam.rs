//! Adam on unit atoms.

use super::LearnError;
use super::state::{Reader, Writer};
use crate::dictionary::{Dictionary, norm};
use crate::encode::EncodedBatch;
use crate::kernels::vector::add_scaled;
use crate::{Error, Result};

/// Optimiser Adam (Kingma & Ba 2015) with its usual constants, over atoms that may start afresh.
///
/// Only atoms that a step's codes use are moved, and only their moments fade: the others have no gradient.
pub(super) struct Adam {
    head_dim: usize,
    first: Vec<f32>,
    second: Vec<f32>,
    /// Steps of each atom since it started afresh.
    steps: Vec<u32>,
    /// Gradient `[N, m]` of the step; only rows of `used` atoms have a meaning.
    gradient: Vec<f32>,
    /// Atoms that the batch's codes use.
    used: Vec<usize>,
    is_used: Vec<bool>,
}

const FIRST_DECAY: f32 = 0.9;
const SECOND_DECAY: f32 = 0.999;
const EPSILON: f32 = 1e-8;

impl Adam {
    pub(super) fn new(atoms: usize, head_dim: usize) -> Self {
        Self {
            head_dim,
            first: vec![0.0; atoms * head_dim],
            second: vec![0.0; atoms * head_dim],
            steps: vec![0; atoms],
            gradient: vec![0.0; atoms * head_dim],
            used: Vec::new(),
            is_used: vec![false; atoms],
        }
    }

    /// Moves every atom that the codes use against its gradient, and scales it back to unit length.
    pub(super) fn step(
        &mut self,
        dictionary: &mut Dictionary,
        batch: &[f32],
        codes: &EncodedBatch,
        rate: f32,
    ) -> Result<()> {
        self.find_gradient(dictionary, batch, codes);
        let m = self.head_dim;
        let atoms = dictionary.atoms_mut();
        for number in 0..self.used.len() {
            let i = self.used[number];
            let atom = &mut atoms[i * m..(i + 1) * m];
            self.move_atom(i, atom, rate);
            let length = norm(atom);
            if !length.is_normal() {
                return Err(Error::Learn(LearnError::Diverged(rate)));
            }
            let scale = (1.0 / length) as f32;
            atom.iter_mut().for_each(|x| *x *= scale);
        }
        Ok(())
    }

    /// Computes the gradient of the minibatch's mean squared error, tangent to the sphere at every used atom.
    fn find_gradient(&mut self, dictionary: &Dictionary, batch: &[f32], codes: &EncodedBatch) {
        let m = self.head_dim;
        for i in self.used.drain(..) {
            self.is_used[i] = false;
        }
        let scale = -2.0 / codes.len() as f32;
        let mut residual = vec![0.0; m];
        for (v, x) in batch.chunks_exact(m).enumerate() {
            residual.copy_from_slice(x);
            let (indices, coefficients) = codes.row(v);
            for (&i, &c) in indices.iter().zip(coefficients) {
                dictionary
                    .row(usize::from(i))
                    .add_scaled_to(-c, &mut residual);
            }
            for (&i, &c) in indices.iter().zip(coefficients) {
                let i = usize::from(i);
                let gradient = &mut self.gradient[i * m..(i + 1) * m];
                if !self.is_used[i] {
                    self.is_used[i] = true;
                    self.used.push(i);
                    gradient.fill(0.0);
                }
                add_scaled(gradient, scale * c, &residual);
            }
        }
        for &i in &self.used {
            let (atom, gradient) = (dictionary.row(i), &mut self.gradient[i * m..(i + 1) * m]);
            let along = atom.dot(gradient);
            atom.add_scaled_to(-along, gradient);
        }
    }

    /// Moves atom `i`, `x` `[m]`, against its gradient.
    fn move_atom(&mut self, i: usize, x: &mut [f32], rate: f32) {
        let entries = i * self.head_dim..(i + 1) * self.head_dim;
        let moments = self.first[entries.clone()]
            .iter_mut()
            .zip(&mut self.second[entries.clone()]);
        self.steps[i] = self.steps[i].saturating_add(1);
        let steps = self.steps[i].min(i32::MAX as u32) as i32;
        let first_bias = 1.0 - FIRST_DECAY.powi(steps);
        let second_bias = 1.0 - SECOND_DECAY.powi(steps);
        let gradient = &self.gradient[entries];
        for ((x, &g), (first, second)) in x.iter_mut().zip(gradient).zip(moments) {
            *first = FIRST_DECAY * *first + (1.0 - FIRST_DECAY) * g;
            *second = SECOND_DECAY * *second + (1.0 - SECOND_DECAY) * g * g;
            *x -= rate * (*first / first_bias) / ((*second / second_bias).sqrt() + EPSILON);
        }
    }

    /// Starts one atom afresh.
    pub(super) fn forget(&mut self, atom: usize) {
        let entries = atom * self.head_dim..(atom + 1) * self.head_dim;
        self.first[entries.clone()].fill(0.0);
        self.second[entries].fill(0.0);
        self.steps[atom] = 0;
    }

    pub(super) fn save(&self, out: &mut Writer) {
        out.floats(&self.first);
        out.floats(&self.second);
        out.counts(&self.steps);
    }

    pub(super) fn load(&mut self, saved: &mut Reader<'_>) -> Result<()> {
        self.first = saved.floats(self.first.len())?;
        self.second = saved.floats(self.second.len())?;
        self.steps = saved.counts(self.steps.len())?;
        Ok(())
    }
}
