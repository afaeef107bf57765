use half::f16;

use super::{EncodedBatch, Pursuit};
use crate::dictionary::{Extension, MAX_ATOMS, norm};
use crate::kernels::dense::{Rows, dots};
use crate::threads::Threads;
use crate::{Error, Result};

/// Pursuit over a dictionary that a session adds atoms to: a vector that misses the tolerance may become an
/// atom and is then coded by it alone (Kim et al. 2025).
#[derive(Debug)]
pub struct AdaptivePursuit<'d> {
    pursuit: Pursuit<'d>,
    most: usize,
}

impl<'d> AdaptivePursuit<'d> {
    /// Adds at most `most` atoms in all to the dictionary of `pursuit`, for vectors that miss its tolerance; 0
    /// adds none.
    ///
    /// # Errors
    /// [`Error::Adaptive`] where atoms are to be added and the tolerance, which says when, is 0, or where they
    /// would be more than 65,536 together.
    pub fn new(pursuit: Pursuit<'d>, most: usize) -> Result<Self> {
        let atoms = pursuit.atoms.dictionary().len();
        if most > 0 && pursuit.tolerance == 0.0 {
            let reason = "they are added for vectors that miss the tolerance, which is 0; set one";
            return Err(Error::Adaptive(reason.to_owned()));
        }
        if most > MAX_ATOMS - atoms {
            let reason = format!(
                "{most} cannot be added to {atoms} atoms: {MAX_ATOMS} are possible together"
            );
            return Err(Error::Adaptive(reason));
        }
        Ok(Self { pursuit, most })
    }

    /// Codes the vectors of several heads as [`Pursuit::encode_heads_on`] does, over the dictionary and
    /// `extension`, and adds atoms to that.
    ///
    /// All vectors are coded first. Of those that miss the tolerance the worst coded becomes an atom, then the
    /// next worst that no atom of this batch codes within the tolerance by itself, of equally bad ones the
    /// first, until the extension is full. Those that missed are then coded anew, and the better code is kept.
    /// So the order of the vectors of a batch matters only between equals, and the number of threads never.
    ///
    /// # Errors
    /// As [`Pursuit::encode`]; the extension is then as it was.
    ///
    /// # Panics
    /// As [`Pursuit::encode_heads_on`], and where the extension's atoms are of another length than the
    /// dictionary's.
    pub fn encode_heads_on(
        &self,
        extension: &mut Extension,
        vectors: &[f32],
        sparsities: &[usize],
        threads: &dyn Threads,
    ) -> Result<Vec<EncodedBatch>> {
        let each = super::vectors_a_head(
            vectors.len() / self.pursuit.atoms.head_dim(),
            sparsities,
            self.pursuit.sparsity,
        );
        let limit = |v: usize| sparsities[v / each];
        let pursuit = self.pursuit.over(extension);
        let mut all = pursuit.encode_limited(vectors, &limit, threads)?;
        let room = self.most.saturating_sub(extension.len());
        let mut missed: Vec<usize> = (0..all.len())
            .filter(|&v| all.relative_errors[v] > self.pursuit.tolerance)
            .collect();
        if room > 0 && !missed.is_empty() {
            let errors = &all.relative_errors;
            missed.sort_by(|&a, &b| errors[b].total_cmp(&errors[a]).then(a.cmp(&b)));
            let m = extension.head_dim();
            let missing = missed.iter().map(|&v| &vectors[v * m..(v + 1) * m]);
            let again: Vec<f32> = missing.clone().flatten().copied().collect();
            let grown = extension.with(&self.chosen(missing, room));
            let limit = |row: usize| limit(missed[row]);
            let pursuit = self.pursuit.over(&grown);
            let better = pursuit.encode_limited(&again, &limit, threads)?;
            for (row, &v) in missed.iter().enumerate() {
                if better.relative_errors[row] < all.relative_errors[v] {
                    all.replace(v, &better, row);
                }
            }
            *extension = grown;
        }
        Ok(all.by_head(sparsities))
    }

    /// The first of `vectors`, and each further one that none chosen before codes by itself, up to `room`.
    fn chosen<'x>(&self, vectors: impl Iterator<Item = &'x [f32]>, room: usize) -> Vec<f32> {
        let m = self.pursuit.atoms.head_dim();
        // The residual of a unit vector on one atom has the square 1 − cos².
        let near = (1.0 - self.pursuit.tolerance.powi(2)).sqrt();
        let mut chosen: Vec<f32> = Vec::new();
        let mut cosines = Vec::new();
        for x in vectors {
            if chosen.len() == room * m {
                break;
            }
            let length = norm(x);
            let unit: Vec<f32> = x.iter().map(|&x| (f64::from(x) / length) as f32).collect();
            cosines.resize(chosen.len() / m, 0.0);
            dots(Rows::F32(&chosen), &unit, m, 1, &mut cosines);
            if cosines.iter().all(|cosine| cosine.abs() < near) {
                // As it will be held.
                chosen.extend(unit.iter().map(|&x| f16::from_f32(x).to_f32()));
            }
        }
        chosen
    }
}
