use crate::kernels::MAX_ATOMS;
use crate::kernels::additive::{CODEBOOK_ATOMS, MAX_FIRST_ATOMS};

/// Reason why a dictionary cannot be learned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LearnError {
    /// Settings that must not be 0, one of which is.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// More atoms than indices can tell apart.
    #[error("{0} atoms; at most {MAX_ATOMS} are possible")]
    ManyAtoms(usize),
    /// A first codebook with more atoms than a code can tell apart.
    #[error("a first codebook of {0} atoms; at most {MAX_FIRST_ATOMS} are possible")]
    FirstCodebook(usize),
    /// Codebooks with more atoms in all than indices can tell apart.
    #[error(
        "{codebooks} codebooks of {CODEBOOK_ATOMS} atoms, the first of {first}, are {atoms} atoms; at most {MAX_ATOMS} are possible"
    )]
    ManyCodebooks {
        /// Number of codebooks.
        codebooks: usize,
        /// Atoms of the first.
        first: usize,
        /// Atoms in all.
        atoms: usize,
    },
    /// A learning rate with which atoms of unit length cannot move.
    #[error("a learning rate of {0} is impossible: it must be above 0 and at most 1")]
    LearningRate(f32),
    /// No vectors, or more than can be counted.
    #[error("{0} vectors; between 1 and {max} are possible", max = u32::MAX)]
    Vectors(usize),
    /// Fewer vectors than atoms.
    #[error(
        "{atoms} atoms need at least as many vectors, and there are {vectors}; give more text or vectors, or fewer atoms"
    )]
    FewVectors {
        /// Atoms wanted.
        atoms: usize,
        /// Vectors that are there.
        vectors: usize,
    },
    /// Fewer vectors that are not zero than atoms.
    #[error(
        "{atoms} atoms need as many vectors that are not zero, {missing} more than there are; give more text or fewer atoms"
    )]
    ZeroVectors {
        /// Atoms wanted.
        atoms: usize,
        /// Vectors missing.
        missing: usize,
    },
    /// Atoms that grew without bound.
    #[error("it diverged at a learning rate of {0}: give a lower one")]
    Diverged(f32),
    /// A saved state that is cut short, damaged, or of other settings.
    #[error("the saved state is damaged, or of other settings")]
    State,
}
