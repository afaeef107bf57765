//! Second moments of the queries that each KV head is asked with.

use bytemuck::{cast_slice, pod_collect_to_vec};
use lexico::kernels::matmul::{Matrix, multiply};

use super::state::{State, damaged};
use crate::config::Config;
use crate::error::Result;

/// Of so many queries that follow each other one is looked at: neighbours are alike.
const STRIDE: usize = 4;

/// Sums of `q·qᵀ` over the queries of each KV head, `[layers, kv_heads, m, m]`.
#[derive(Default)]
pub(super) struct QueryMoments {
    sums: Vec<f64>,
    kv_heads: usize,
    head_dim: usize,
}

impl QueryMoments {
    /// Reads what the state holds after so many windows.
    pub(super) fn open(config: &Config, state: &State, windows: usize) -> Result<Self> {
        let (kv_heads, head_dim) = (config.kv_heads, config.head_dim);
        let numbers = config.layers * kv_heads * head_dim * head_dim;
        let sums = match state.load(&file(windows))? {
            Some(saved) if saved.len() == numbers * size_of::<f64>() => pod_collect_to_vec(&saved),
            None if windows == 0 => vec![0.0; numbers],
            _ => return Err(damaged(&state.path(&file(windows)))),
        };
        Ok(Self {
            sums,
            kv_heads,
            head_dim,
        })
    }

    /// Saves them as they are after so many windows.
    pub(super) fn save(&self, state: &State, windows: usize) -> Result<()> {
        state.save(&file(windows), cast_slice(&self.sums))
    }

    /// Removes what was saved after other numbers of windows, once nothing asks for it any more.
    pub(super) fn remove_former(state: &State, windows: usize) -> Result<()> {
        state.remove_others(FILE, &file(windows))
    }

    /// Adds the queries `[heads, t, m]` of a layer.
    pub(super) fn add(&mut self, layer: usize, queries: &[f32]) {
        let (m, heads) = (self.head_dim, self.kv_heads);
        let own = &mut self.sums[layer * heads * m * m..][..heads * m * m];
        let mut product = vec![0.0; m * m];
        for (sums, queries) in own
            .chunks_exact_mut(m * m)
            .zip(queries.chunks_exact(queries.len() / heads))
        {
            let rows = queries.chunks_exact(m).step_by(STRIDE);
            let rows: Vec<f32> = rows.flatten().copied().collect();
            let rows = Matrix::by_rows(&rows, rows.len() / m, m);
            multiply(&mut product, false, rows.transposed(), rows);
            for (sum, &x) in sums.iter_mut().zip(&product) {
                *sum += f64::from(x);
            }
        }
    }

    /// The sums of a layer, `[kv_heads, m, m]`.
    pub(super) fn layer(&self, layer: usize) -> &[f64] {
        let each = self.kv_heads * self.head_dim * self.head_dim;
        &self.sums[layer * each..(layer + 1) * each]
    }
}

/// First letters of the file's name in the state.
pub(super) const FILE: &str = "queries-";

fn file(windows: usize) -> String {
    format!("{FILE}{windows}")
}
