use crate::dictionary::norm;
use crate::{Error, Result};

/// Vectors to learn from, wherever they are held.
pub trait Vectors: Sync {
    /// Number of vectors, `n`.
    fn count(&self) -> usize;

    /// Fills `out` `[numbers, m]` with the vectors of these numbers, each below [`Vectors::count`].
    ///
    /// # Errors
    /// Those of reading them.
    fn read(&self, numbers: &[u32], out: &mut [f32]) -> Result<()>;
}

/// Vectors in memory, `[n, m]`.
#[derive(Debug, Clone, Copy)]
pub struct InMemory<'a> {
    vectors: &'a [f32],
    head_dim: usize,
}

impl<'a> InMemory<'a> {
    /// Takes `[n, m]` numbers.
    ///
    /// # Errors
    /// [`Error::VectorLength`] where they do not fill whole vectors.
    pub fn new(vectors: &'a [f32], head_dim: usize) -> Result<Self> {
        if head_dim == 0 || !vectors.len().is_multiple_of(head_dim) {
            return Err(Error::VectorLength {
                found: vectors.len(),
                head_dim,
            });
        }
        Ok(Self { vectors, head_dim })
    }
}

impl Vectors for InMemory<'_> {
    fn count(&self) -> usize {
        self.vectors.len() / self.head_dim
    }

    fn read(&self, numbers: &[u32], out: &mut [f32]) -> Result<()> {
        for (&number, out) in numbers.iter().zip(out.chunks_exact_mut(self.head_dim)) {
            let first = number as usize * self.head_dim;
            out.copy_from_slice(&self.vectors[first..][..self.head_dim]);
        }
        Ok(())
    }
}

/// Reads the vectors of these numbers, scaled to unit length; a zero vector stays zero.
pub(super) fn read_units(
    vectors: &dyn Vectors,
    numbers: &[u32],
    head_dim: usize,
) -> Result<Vec<f32>> {
    let mut out = vec![0.0; numbers.len() * head_dim];
    vectors.read(numbers, &mut out)?;
    for (&number, x) in numbers.iter().zip(out.chunks_exact_mut(head_dim)) {
        let length = norm(x);
        if !length.is_finite() {
            let row = number as usize;
            return Err(Error::NotFinite { row });
        }
        if length > 0.0 {
            x.iter_mut()
                .for_each(|v| *v = (f64::from(*v) / length) as f32);
        }
    }
    Ok(out)
}
