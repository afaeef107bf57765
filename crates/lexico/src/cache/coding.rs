use std::sync::Arc;

use crate::codes::{AdditiveFormat, CodeFormat, Codes, CoefficientFormat, SparseFormat};
use crate::dictionary::{
    Atoms, CodeFamily, Codebooks, Dictionary, HeadMaps, JointBasis, LayerDictionaries,
};
use crate::encode::{BEAM_WIDTH, BeamSearch, Encoder, Fit, Pursuit};
use crate::key_value::KeyValue;
use crate::threads::Threads;
use crate::{Error, Result};

/// The kind of codes, and how they are found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Coding {
    /// Additive codes, by beam search.
    Additive {
        /// See [`BeamSearch::with_beam_width`].
        beam_width: usize,
    },
    /// Sparse codes, by orthogonal matching pursuit.
    Sparse {
        /// Format of the coefficients.
        coefficients: CoefficientFormat,
        /// The relative error at which a vector needs no more atoms, see [`Pursuit::with_tolerance`]; lengths vary
        /// where it is above 0.
        tolerance: f32,
    },
}

impl Default for Coding {
    fn default() -> Self {
        Self::usual(CodeFamily::Additive)
    }
}

impl Coding {
    /// The usual codes of a family; sparse ones have 8-bit coefficients.
    pub fn usual(family: CodeFamily) -> Self {
        match family {
            CodeFamily::Additive => Self::Additive {
                beam_width: BEAM_WIDTH,
            },
            CodeFamily::Sparse => Self::Sparse {
                coefficients: CoefficientFormat::default(),
                tolerance: 0.0,
            },
        }
    }

    /// The bytes of a vector's code of this sparsity.
    pub(super) fn bytes(self, sparsity: usize) -> usize {
        match self {
            Self::Additive { .. } => AdditiveFormat::bytes_of(sparsity),
            Self::Sparse {
                coefficients,
                tolerance,
            } => SparseFormat {
                sparsity,
                variable: tolerance > 0.0,
                coefficients,
            }
            .bytes(),
        }
    }

    /// The family of the codes.
    pub fn family(self) -> CodeFamily {
        match self {
            Self::Additive { .. } => CodeFamily::Additive,
            Self::Sparse { .. } => CodeFamily::Sparse,
        }
    }

    /// The coders of a layer's keys and values.
    ///
    /// # Errors
    /// [`Error::Setting`] for additive codes where there are no codebooks, [`Error::Dictionary`] where values have
    /// [`RotaryMeans`](crate::dictionary::RotaryMeans), or other heads are coded together than in keys.
    pub fn coders(self, dictionaries: &LayerDictionaries) -> Result<KeyValue<Coder>> {
        match self {
            Self::Additive { beam_width } => {
                let codebooks = dictionaries.codebooks.as_ref();
                let reason = "these dictionaries have no codebooks";
                let codebooks =
                    codebooks.ok_or_else(|| Error::setting("format", "additive", reason))?;
                let maps = dictionaries.maps.as_ref();
                if maps.is_some_and(|maps| maps.values.rotary_means().is_some()) {
                    let reason =
                        "values have means before a rotary embedding, which turns keys alone";
                    return Err(Error::Dictionary(reason.to_owned()));
                }
                let together = |maps: &HeadMaps| maps.basis().map(JointBasis::together);
                if let Some(maps) = maps
                    && together(&maps.keys) != together(&maps.values)
                {
                    let reason = "as many heads are coded together in keys as in values";
                    return Err(Error::Dictionary(reason.to_owned()));
                }
                let maps = maps.map_or_else(KeyValue::default, |both| both.clone().map(Some));
                let both = codebooks.clone().zip(maps);
                Ok(both.map(|(codebooks, maps)| Coder::Additive {
                    codebooks,
                    maps,
                    beam_width,
                }))
            }
            Self::Sparse {
                coefficients,
                tolerance,
            } => {
                let sparse = dictionaries.sparse.as_ref();
                let reason = "there are only codebooks for additive codes";
                let sparse =
                    sparse.ok_or_else(|| Error::setting("format", coefficients.name(), reason))?;
                Ok(sparse.clone().map(|dictionary| Coder::Sparse {
                    dictionary,
                    coefficients,
                    tolerance,
                }))
            }
        }
    }
}

/// The kind of codes of a layer's keys, or its values, and what they are over.
#[derive(Debug, Clone)]
pub enum Coder {
    /// See [`Coding::Additive`].
    Additive {
        /// The codebooks.
        codebooks: Arc<Codebooks>,
        /// The maps of the KV heads behind which codes are found, if there are any.
        maps: Option<Arc<HeadMaps>>,
        /// See [`BeamSearch::with_beam_width`].
        beam_width: usize,
    },
    /// See [`Coding::Sparse`].
    Sparse {
        /// The dictionary.
        dictionary: Arc<Dictionary>,
        /// Format of the coefficients.
        coefficients: CoefficientFormat,
        /// See [`Pursuit::with_tolerance`].
        tolerance: f32,
    },
}

impl Coder {
    /// The format of codes of this sparsity.
    pub fn format(&self, sparsity: usize) -> CodeFormat {
        match self {
            Self::Additive { codebooks, .. } => AdditiveFormat {
                sparsity,
                sizes: codebooks.sizes(),
            }
            .into(),
            Self::Sparse {
                coefficients,
                tolerance,
                ..
            } => SparseFormat {
                sparsity,
                variable: *tolerance > 0.0,
                coefficients: *coefficients,
            }
            .into(),
        }
    }

    /// The encoder of codes of up to `sparsity` atoms.
    ///
    /// # Errors
    /// Those of [`BeamSearch::new`], [`Pursuit::new`] and [`Pursuit::with_tolerance`].
    pub fn encoder(&self, sparsity: usize, fit: Fit) -> Result<Box<dyn Encoder + '_>> {
        Ok(match self {
            Self::Additive {
                codebooks,
                beam_width,
                ..
            } => {
                let search = BeamSearch::new(codebooks, sparsity)?;
                Box::new(search.with_beam_width(*beam_width).with_fit(fit))
            }
            Self::Sparse {
                dictionary,
                tolerance,
                ..
            } => {
                let pursuit = Pursuit::new(dictionary, sparsity)?;
                Box::new(pursuit.with_tolerance(*tolerance)?.with_fit(fit))
            }
        })
    }

    /// The maps of the KV heads behind which codes are found, if there are any.
    pub fn maps(&self) -> Option<&HeadMaps> {
        match self {
            Self::Additive { maps, .. } => maps.as_deref(),
            Self::Sparse { .. } => None,
        }
    }

    /// The vectors `[heads, n, m]` that codes of these vectors of all KV heads, at these positions, stand for once they are
    /// stored; of so many atoms for each head, or each part of heads that are coded together.
    ///
    /// # Errors
    /// Those of [`Coder::encoder`] and [`Encoder::encode_heads`].
    ///
    /// # Panics
    /// Where the vectors are not whole, or there are maps of other heads.
    pub fn reconstruct(
        &self,
        positions: impl Iterator<Item = usize> + Clone,
        vectors: &[f32],
        sparsities: &[usize],
        fit: Fit,
        threads: &dyn Threads,
    ) -> Result<Vec<f32>> {
        let coded = self.maps();
        let coded = coded.map(|maps| maps.all_to_coded(positions.clone(), vectors));
        let vectors = coded.as_deref().unwrap_or(vectors);
        let most = sparsities.iter().copied().max().unwrap_or(1);
        let encoder = self.encoder(most, fit)?;
        let batches = encoder.encode_heads(vectors, sparsities, threads)?;
        let mut decoded = Vec::with_capacity(vectors.len());
        for (batch, &sparsity) in batches.iter().zip(sparsities) {
            let mut codes = Codes::new(self.format(sparsity))?;
            codes.extend(batch);
            decoded.extend(codes.decode(self.atoms(sparsity))?);
        }
        Ok(match self.maps() {
            Some(maps) => maps.all_from_coded(positions, decoded),
            None => decoded,
        })
    }

    /// Checks that codes can have this many atoms.
    ///
    /// # Errors
    /// [`Error::Sparsity`], [`Error::Codebooks`] or [`Error::Tolerance`].
    pub(super) fn check(&self, sparsity: usize) -> Result<()> {
        match self {
            Self::Additive { codebooks, .. } => codebooks.check_sparsity(sparsity),
            Self::Sparse {
                dictionary,
                tolerance,
                ..
            } => {
                let pursuit = Pursuit::new(dictionary, sparsity)?;
                pursuit.with_tolerance(*tolerance).map(drop)
            }
        }
    }

    /// The atoms that codes of up to `sparsity` atoms are over.
    ///
    /// # Panics
    /// Where there are fewer codebooks.
    pub fn atoms(&self, sparsity: usize) -> Atoms<'_> {
        match self {
            Self::Additive { codebooks, .. } => codebooks.first(sparsity),
            Self::Sparse { dictionary, .. } => dictionary.as_ref().into(),
        }
    }

    /// A checksum of the dictionary or the codebooks, so that codes can say which they need.
    pub fn checksum(&self) -> u32 {
        match self {
            Self::Additive {
                codebooks, maps, ..
            } => codebooks.checksum() ^ maps.as_ref().map_or(0, |maps| maps.checksum()),
            Self::Sparse { dictionary, .. } => dictionary.checksum(),
        }
    }
}
