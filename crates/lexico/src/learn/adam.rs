use super::state::{Reader, Writer};
use crate::Result;

/// Adam (Kingma & Ba 2015) with its usual constants, over atoms that may start afresh.
///
/// Only atoms that a step's codes use are moved, and only their moments fade: the others have no gradient.
pub(super) struct Adam {
    head_dim: usize,
    first: Vec<f32>,
    second: Vec<f32>,
    /// Steps of each atom since it started.
    steps: Vec<u32>,
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
        }
    }

    /// Moves atom `i`, `x` `[m]`, against its gradient.
    pub(super) fn step(&mut self, i: usize, x: &mut [f32], gradient: &[f32], rate: f32) {
        let entries = i * self.head_dim..(i + 1) * self.head_dim;
        let moments = self.first[entries.clone()]
            .iter_mut()
            .zip(&mut self.second[entries]);
        self.steps[i] = self.steps[i].saturating_add(1);
        let steps = self.steps[i].min(i32::MAX as u32) as i32;
        let first_bias = 1.0 - FIRST_DECAY.powi(steps);
        let second_bias = 1.0 - SECOND_DECAY.powi(steps);
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
