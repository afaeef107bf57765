/// Adam (Kingma & Ba 2015) with its usual constants, over atoms that may start afresh.
pub(super) struct Adam {
    head_dim: usize,
    first: Vec<f32>,
    second: Vec<f32>,
    /// Steps of each atom since it started.
    steps: Vec<i32>,
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

    /// Moves all atoms, `[N, m]`, against their gradient.
    pub(super) fn step(&mut self, atoms: &mut [f32], gradient: &[f32], rate: f32) {
        let m = self.head_dim;
        let moments = self
            .first
            .chunks_exact_mut(m)
            .zip(self.second.chunks_exact_mut(m));
        let atoms = atoms.chunks_exact_mut(m).zip(gradient.chunks_exact(m));
        for (((atom, gradient), (first, second)), steps) in atoms.zip(moments).zip(&mut self.steps)
        {
            *steps += 1;
            let first_bias = 1.0 - FIRST_DECAY.powi(*steps);
            let second_bias = 1.0 - SECOND_DECAY.powi(*steps);
            for (((x, &g), first), second) in atom.iter_mut().zip(gradient).zip(first).zip(second) {
                *first = FIRST_DECAY * *first + (1.0 - FIRST_DECAY) * g;
                *second = SECOND_DECAY * *second + (1.0 - SECOND_DECAY) * g * g;
                *x -= rate * (*first / first_bias) / ((*second / second_bias).sqrt() + EPSILON);
            }
        }
    }

    /// Starts one atom afresh.
    pub(super) fn forget(&mut self, atom: usize) {
        let entries = atom * self.head_dim..(atom + 1) * self.head_dim;
        self.first[entries.clone()].fill(0.0);
        self.second[entries].fill(0.0);
        self.steps[atom] = 0;
    }
}
