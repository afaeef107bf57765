use nalgebra::DMatrix;

use super::{JointBasis, RotaryMeans};
use crate::kernels::matmul::{Matrix, multiply};
use crate::{Error, Result};

/// One affine map a KV head, `y = A(x − μ)`: codes are found, and attended to, where it leads.
///
/// It is chosen so that an equal error hurts equally in every direction and in every head. For keys `A` is the square
/// root of the queries' second moments, so that `‖y − ŷ‖` is the error of the scores that queries give (the metric of
/// quantisation for inner products: Guo et al., AISTATS 2016). Nothing is approximated by it: with
/// `q' = A⁻ᵀq` scores change by the same number `q·μ` at all positions, which the softmax does not see, and attention's
/// weights sum up to 1, so that its output is `A⁻¹o' + μ`.
///
/// Of keys, what is coded can be without their [`RotaryMeans`] too, mapped; what these add to scores at each position
/// comes from [`HeadMaps::offsets`].
///
/// With a [`JointBasis`] it is not the mapped vectors of single heads that are coded but their parts.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadMaps {
    head_dim: usize,
    heads: Box<[HeadMap]>,
    rotary: Option<Rotary>,
    basis: Option<JointBasis>,
    checksum: u32,
}

#[derive(Debug, Clone, PartialEq)]
struct Rotary {
    means: RotaryMeans,
    /// Those of each head, mapped; see [`RotaryMeans::directions`].
    directions: Vec<Vec<f32>>,
}

/// What the means before the rotary embedding add to scores of a head's coded keys.
#[derive(Clone, Copy)]
pub struct RotaryOffsets<'a> {
    means: &'a RotaryMeans,
    directions: &'a [f32],
    /// The position of the first key.
    first: usize,
}

impl RotaryOffsets<'_> {
    /// Adds to the scores `[n, rows]` of keys from key `from` on, of several heads side by side; `queries` `[heads, group, m]`
    /// are mapped, and scaled as those of the scores were. Rows beyond them are left as they are.
    pub(crate) fn add(
        heads: &[Self],
        queries: &[f32],
        rows: usize,
        from: usize,
        scores: &mut [f32],
    ) {
        let Some(own) = heads.first() else { return };
        let directions: Vec<&[f32]> = heads.iter().map(|head| head.directions).collect();
        own.means
            .add_scores(&directions, own.first + from, queries, rows, scores);
    }
}

#[derive(Debug, Clone, PartialEq)]
struct HeadMap {
    /// `μ`, `[m]`.
    mean: Vec<f32>,
    /// `A`, `[m, m]`.
    matrix: Vec<f32>,
    /// `A⁻¹`, `[m, m]`.
    inverse: Vec<f32>,
}

/// Does `each(head, vectors)` for some heads of `vectors` `[heads, n, m]`, one after the other.
pub(crate) fn for_heads(
    heads: impl ExactSizeIterator<Item = usize>,
    vectors: &[f32],
    each: impl Fn(usize, &[f32]) -> Vec<f32>,
) -> Vec<f32> {
    let own = (vectors.len() / heads.len().max(1)).max(1);
    let heads = heads.zip(vectors.chunks_exact(own));
    heads.flat_map(|(head, own)| each(head, own)).collect()
}

/// A map that loses more than this share of a vector in f32 is refused.
const LOSS: f64 = 1e-3;

impl HeadMaps {
    /// Takes the means `[heads, m]` and the matrices `[heads, m, m]`, both row by row. `O(heads·m³)`.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where the numbers do not fill whole heads, one is not finite, or a matrix cannot be
    /// inverted in f32.
    pub fn new(means: &[f32], matrices: &[f32], head_dim: usize) -> Result<Self> {
        let m = head_dim;
        let heads = means.len().checked_div(m).unwrap_or(0);
        if heads == 0 || means.len() != heads * m || matrices.len() != heads * m * m {
            let reason = format!(
                "{} means and {} numbers of matrices are not those of heads with head dim {m}",
                means.len(),
                matrices.len()
            );
            return Err(Error::Dictionary(reason));
        }
        if !means.iter().chain(matrices).all(|x| x.is_finite()) {
            let reason = "a head's mean or matrix holds a NaN or an infinity".to_owned();
            return Err(Error::Dictionary(reason));
        }
        let parts = means.chunks_exact(m).zip(matrices.chunks_exact(m * m));
        let maps = parts.enumerate().map(|(head, (mean, matrix))| {
            let inverse = inverse(matrix, m).ok_or_else(|| {
                Error::Dictionary(format!("the matrix of head {head} cannot be inverted"))
            })?;
            Ok(HeadMap {
                mean: mean.to_vec(),
                matrix: matrix.to_vec(),
                inverse,
            })
        });
        let mut hasher = crc32fast::Hasher::new();
        for x in means.iter().chain(matrices) {
            hasher.update(&x.to_le_bytes());
        }
        Ok(Self {
            head_dim,
            heads: maps.collect::<Result<_>>()?,
            rotary: None,
            basis: None,
            checksum: hasher.finalize(),
        })
    }

    /// The same maps of keys that are coded without their means before the rotary embedding. `O(heads·m³)`.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where the means are of other heads.
    pub fn with_rotary_means(mut self, means: RotaryMeans) -> Result<Self> {
        let numbers = self.heads() * self.head_dim;
        if means.heads() != self.heads() || means.means().len() != numbers {
            let reason = format!(
                "{} numbers of means before the rotary embedding, and maps of {} heads with head dim {}",
                means.means().len(),
                self.heads(),
                self.head_dim
            );
            return Err(Error::Dictionary(reason));
        }
        let mut hasher = crc32fast::Hasher::new_with_initial(self.checksum);
        for x in means.frequencies().iter().chain(means.means()) {
            hasher.update(&x.to_le_bytes());
        }
        self.checksum = hasher.finalize();
        let heads = self.heads.iter().enumerate();
        let directions = heads.map(|(head, map)| means.directions(head, &map.matrix));
        self.rotary = Some(Rotary {
            directions: directions.collect(),
            means,
        });
        Ok(self)
    }

    /// The same maps with a basis that heads are coded in together.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where the basis is of other heads.
    pub fn with_basis(mut self, basis: JointBasis) -> Result<Self> {
        if basis.heads() != self.heads() || basis.head_dim() != self.head_dim {
            let reason = format!(
                "a basis of {} heads with head dim {}, and maps of {} with head dim {}",
                basis.heads(),
                basis.head_dim(),
                self.heads(),
                self.head_dim
            );
            return Err(Error::Dictionary(reason));
        }
        let mut hasher = crc32fast::Hasher::new_with_initial(self.checksum);
        hasher.update(&basis.checksum().to_le_bytes());
        self.checksum = hasher.finalize();
        self.basis = Some(basis);
        Ok(self)
    }

    /// The basis that heads are coded in together, if there is one.
    pub fn basis(&self) -> Option<&JointBasis> {
        self.basis.as_ref()
    }

    /// The means before the rotary embedding that coded keys are without.
    pub fn rotary_means(&self) -> Option<&RotaryMeans> {
        self.rotary.as_ref().map(|rotary| &rotary.means)
    }

    /// What the means of each head are products with, `[2·pairs, m]`; see [`RotaryMeans::directions`].
    #[cfg(feature = "cuda")]
    pub(crate) fn directions(&self) -> impl Iterator<Item = &[f32]> {
        let rotary = self.rotary.iter();
        rotary.flat_map(|rotary| rotary.directions.iter().map(Vec::as_slice))
    }

    /// Takes the means before the rotary embedding, if there are any, away from mapped keys `[n, m]` of a head at these
    /// positions: what is left is coded. `O(n·m²)`.
    ///
    /// # Panics
    /// Where there is no such head.
    pub fn centre(&self, head: usize, positions: impl Iterator<Item = usize>, mapped: &mut [f32]) {
        self.add_means(head, positions, -1.0, mapped);
    }

    /// Turns vectors `[n, m]` of a head at these positions into those that are coded, unless heads are coded together:
    /// [`HeadMaps::apply`], then [`HeadMaps::centre`].
    ///
    /// # Panics
    /// Those of [`HeadMaps::apply`].
    pub fn to_coded(
        &self,
        head: usize,
        positions: impl Iterator<Item = usize>,
        vectors: &[f32],
    ) -> Vec<f32> {
        let mut mapped = self.apply(head, vectors);
        self.centre(head, positions, &mut mapped);
        mapped
    }

    /// Turns decoded vectors `[n, m]` of a head at these positions back: [`HeadMaps::uncentre`], then [`HeadMaps::invert`].
    ///
    /// # Panics
    /// Those of [`HeadMaps::invert`].
    pub fn from_coded(
        &self,
        head: usize,
        positions: impl Iterator<Item = usize>,
        mut decoded: Vec<f32>,
    ) -> Vec<f32> {
        self.uncentre(head, positions, &mut decoded);
        self.invert(head, &decoded)
    }

    /// Turns vectors `[heads, n, m]` of all heads at these positions into those that are coded: [`HeadMaps::to_coded`], then
    /// [`JointBasis::apply`] where there is a basis.
    ///
    /// # Panics
    /// Where the vectors are not whole.
    pub fn all_to_coded(
        &self,
        positions: impl Iterator<Item = usize> + Clone,
        vectors: &[f32],
    ) -> Vec<f32> {
        let mapped = for_heads(0..self.heads(), vectors, |head, own| {
            self.to_coded(head, positions.clone(), own)
        });
        match &self.basis {
            Some(basis) => basis.apply(&mapped),
            None => mapped,
        }
    }

    /// Turns decoded vectors `[heads, n, m]` of all heads at these positions back: the inverse of
    /// [`HeadMaps::all_to_coded`].
    ///
    /// # Panics
    /// Those of [`HeadMaps::all_to_coded`].
    pub fn all_from_coded(
        &self,
        positions: impl Iterator<Item = usize> + Clone,
        mut decoded: Vec<f32>,
    ) -> Vec<f32> {
        if let Some(basis) = &self.basis {
            decoded = basis.invert(&decoded);
        }
        for_heads(0..self.heads(), &decoded, |head, own| {
            self.from_coded(head, positions.clone(), own.to_vec())
        })
    }

    /// Checks that each head is coded alone.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where there is a basis.
    pub fn check_alone(&self) -> Result<()> {
        let Some(basis) = &self.basis else {
            return Ok(());
        };
        Err(Error::Dictionary(format!(
            "{} heads are coded together, so that vectors of one alone have no codes; dictionaries learned with \
             `--joint-heads 1` have",
            basis.together()
        )))
    }

    /// Gives decoded keys back what [`HeadMaps::centre`] took. `O(n·m²)`.
    ///
    /// # Panics
    /// Where there is no such head.
    pub fn uncentre(
        &self,
        head: usize,
        positions: impl Iterator<Item = usize>,
        mapped: &mut [f32],
    ) {
        self.add_means(head, positions, 1.0, mapped);
    }

    fn add_means(
        &self,
        head: usize,
        positions: impl Iterator<Item = usize>,
        sign: f32,
        mapped: &mut [f32],
    ) {
        if let Some(Rotary { means, directions }) = &self.rotary {
            means.add(&directions[head], positions, sign, mapped);
        }
    }

    /// What scores of coded keys of a head, the first of them at position `first`, lack where they have no means; `None`
    /// where they lack nothing.
    ///
    /// # Panics
    /// Where there is no such head.
    pub fn offsets(&self, head: usize, first: usize) -> Option<RotaryOffsets<'_>> {
        self.rotary.as_ref().map(|rotary| RotaryOffsets {
            means: &rotary.means,
            directions: &rotary.directions[head],
            first,
        })
    }

    /// KV heads.
    pub fn heads(&self) -> usize {
        self.heads.len()
    }

    /// `m`, the length of a vector.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Turns vectors `[n, m]` of a head into those that are coded: `A(x − μ)`. `O(n·m²)`.
    ///
    /// # Panics
    /// Where there is no such head, or the vectors are not whole.
    pub fn apply(&self, head: usize, vectors: &[f32]) -> Vec<f32> {
        let map = &self.heads[head];
        let rows = vectors.chunks_exact(self.head_dim);
        let centred = rows.flat_map(|x| x.iter().zip(&map.mean).map(|(x, mean)| x - mean));
        let centred: Vec<f32> = centred.collect();
        self.product(&centred, &map.matrix, true)
    }

    /// Turns coded vectors, or outputs of attention to them, `[n, m]`, of a head back: `A⁻¹y + μ`. `O(n·m²)`.
    ///
    /// # Panics
    /// Those of [`HeadMaps::apply`].
    pub fn invert(&self, head: usize, vectors: &[f32]) -> Vec<f32> {
        let map = &self.heads[head];
        let mut out = self.product(vectors, &map.inverse, true);
        for x in out.chunks_exact_mut(self.head_dim) {
            x.iter_mut().zip(&map.mean).for_each(|(x, mean)| *x += mean);
        }
        out
    }

    /// Turns queries `[n, m]` of a head into those that give mapped keys their scores, up to a number that is the
    /// same for all positions: `A⁻ᵀq`. `O(n·m²)`.
    ///
    /// # Panics
    /// Those of [`HeadMaps::apply`].
    pub fn queries(&self, head: usize, queries: &[f32]) -> Vec<f32> {
        self.product(queries, &self.heads[head].inverse, false)
    }

    /// The means `[heads, m]` and the matrices `[heads, m, m]`.
    pub fn numbers(&self) -> (Vec<f32>, Vec<f32>) {
        let means = self.heads.iter().flat_map(|map| &map.mean);
        let matrices = self.heads.iter().flat_map(|map| &map.matrix);
        (means.copied().collect(), matrices.copied().collect())
    }

    /// The inverse matrices, `[heads, m, m]`.
    pub fn inverses(&self) -> Vec<f32> {
        let inverses = self.heads.iter().flat_map(|map| &map.inverse);
        inverses.copied().collect()
    }

    /// The bytes held.
    pub fn bytes(&self) -> usize {
        let m = self.head_dim;
        let rotary = self.rotary.iter().map(|rotary| {
            let directions = rotary.directions.iter().map(Vec::len).sum::<usize>();
            rotary.means.bytes() + directions * size_of::<f32>()
        });
        self.heads.len() * (m + 2 * m * m) * size_of::<f32>()
            + rotary.sum::<usize>()
            + self.basis.as_ref().map_or(0, JointBasis::bytes)
    }

    /// A checksum of all numbers, so that codes can say what they were found behind.
    pub fn checksum(&self) -> u32 {
        self.checksum
    }

    /// `matrix · x` of every row `x`, or `matrixᵀ · x`.
    fn product(&self, rows: &[f32], matrix: &[f32], upright: bool) -> Vec<f32> {
        let m = self.head_dim;
        let n = rows.len() / m;
        let mut out = vec![0.0; n * m];
        let matrix = Matrix::by_rows(matrix, m, m);
        let matrix = if upright { matrix.transposed() } else { matrix };
        multiply(&mut out, false, Matrix::by_rows(rows, n, m), matrix);
        out
    }
}

/// The inverse of a matrix `[m, m]`; `None` where f32 would not bring vectors back.
fn inverse(matrix: &[f32], m: usize) -> Option<Vec<f32>> {
    let wide = DMatrix::from_row_iterator(m, m, matrix.iter().map(|&x| f64::from(x)));
    let inverse = wide.clone().try_inverse()?;
    let rounded: Vec<f32> = inverse.transpose().iter().map(|&x| x as f32).collect();
    // Rounding errors of a product grow with the norms of both.
    let lost = wide.norm() * inverse.norm() * f64::from(f32::EPSILON);
    (lost < LOSS && rounded.iter().all(|x| x.is_finite())).then_some(rounded)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vectors(count: usize, m: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-8f32..8.0, count * m)
    }

    /// Matrices that are far enough from singular.
    fn matrices(heads: usize, m: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-0.3f32..0.3, heads * m * m).prop_map(move |mut all| {
            for matrix in all.chunks_exact_mut(m * m) {
                for i in 0..m {
                    matrix[i * m + i] += 2.0;
                }
            }
            all
        })
    }

    proptest! {
        #[test]
        fn scores_differ_by_one_number_and_vectors_come_back(
            (m, means, matrices, keys, query) in (1usize..6).prop_flat_map(|m| {
                (Just(m), vectors(2, m), matrices(2, m), vectors(5, m), vectors(1, m))
            })
        ) {
            let maps = HeadMaps::new(&means, &matrices, m).unwrap();
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
            };
            for head in 0..2 {
                let mapped = maps.apply(head, &keys);
                let back = maps.invert(head, &mapped);
                for (a, b) in keys.iter().zip(&back) {
                    prop_assert!((a - b).abs() < 1e-3, "{a} {b}");
                }
                let mapped_query = maps.queries(head, &query);
                let shift = dot(&query, &means[head * m..][..m]);
                for (key, mapped) in keys.chunks(m).zip(mapped.chunks(m)) {
                    let (score, own) = (dot(&query, key), dot(&mapped_query, mapped));
                    prop_assert!((score - shift - own).abs() < 1e-2, "{score} {shift} {own}");
                }
                // By its definition, in f64.
                for (i, &y) in mapped.iter().take(m).enumerate() {
                    let row = &matrices[(head * m + i) * m..][..m];
                    let centred = keys.iter().zip(&means[head * m..]);
                    let centred: Vec<f32> = centred.take(m).map(|(x, mean)| x - mean).collect();
                    prop_assert!((f64::from(y) - dot(row, &centred)).abs() < 1e-3);
                }
            }
        }
    }

    #[test]
    fn what_is_no_map_is_refused() {
        let refused = |means: &[f32], matrices: &[f32]| {
            let error = HeadMaps::new(means, matrices, 2).unwrap_err();
            assert!(matches!(error, Error::Dictionary(_)), "{error}");
            error.to_string()
        };
        refused(&[], &[]);
        refused(&[0.0; 3], &[0.0; 4]);
        refused(&[0.0; 2], &[1.0, 0.0, 0.0]);
        refused(&[0.0, f32::NAN], &[1.0, 0.0, 0.0, 1.0]);
        let singular = refused(&[0.0; 4], &[1.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0]);
        assert!(singular.contains("head 1"), "{singular}");
        refused(&[0.0; 2], &[1.0, 1.0, 1.0, 1.000001]);
        refused(&[0.0; 2], &[1e-30, 0.0, 0.0, 1e30]);
    }
}
