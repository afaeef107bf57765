use super::CodebookOptions;

/// How much is spent on learning a model's codebooks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Effort {
    /// A few minutes for a model of a tenth of a billion parameters on two cores.
    Quick,
    /// About four times as long.
    #[default]
    Normal,
    /// About three times as long again.
    Thorough,
}

impl Effort {
    /// All efforts, the least first.
    pub const ALL: [Self; 3] = [Self::Quick, Self::Normal, Self::Thorough];

    /// The name of the effort.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Normal => "normal",
            Self::Thorough => "thorough",
        }
    }

    /// The tokens that the model reads.
    #[must_use]
    pub const fn tokens(self) -> usize {
        match self {
            Self::Quick => 49_152,
            Self::Normal => 98_304,
            Self::Thorough => 294_912,
        }
    }

    /// The vectors, of each layer's keys and values, that are learned from.
    #[must_use]
    pub const fn vectors(self) -> usize {
        match self {
            Self::Quick => 49_152,
            Self::Normal => 131_072,
            Self::Thorough => 393_216,
        }
    }

    /// The settings of the codebooks, for a head dim `m`.
    #[must_use]
    pub fn codebooks(self, head_dim: usize) -> CodebookOptions {
        let (rounds, vectors, beam) = match self {
            Self::Quick => (4, 1 << 14, 2),
            Self::Normal => (8, 1 << 15, 2),
            Self::Thorough => (12, 1 << 16, 4),
        };
        CodebookOptions {
            rounds,
            vectors,
            beam,
            ..CodebookOptions::of(head_dim)
        }
    }
}
