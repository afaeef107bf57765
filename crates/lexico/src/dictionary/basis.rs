use crate::kernels::matmul::{Matrix, multiply};
use crate::{Error, Result};

/// How far the product of a basis with itself may be from one.
const TOLERANCE: f32 = 1e-3;

/// An orthonormal basis for the mapped keys, or the mapped values, of several KV heads together, `z = U·y`: what heads have in common is
/// coded once.
///
/// `y` holds the vectors of a group of `h` heads, `[h, m]`; `z` as many vectors, the *parts*, each of which has a code of its own. As `U`
/// is orthonormal, errors are as long before it as behind it. The principal components of `y`, dealt out to the parts in turn, make
/// parts alike and uncorrelated: transform coding (Huang & Schultheiss 1963), across heads as KVTC has it for what is stored (arXiv
/// 2511.01815), but attended to as it is: `⟨q, yᵢ⟩ = Σ_b ⟨U_{b,i}·q, z_b⟩`.
#[derive(Debug, Clone, PartialEq)]
pub struct JointBasis {
    head_dim: usize,
    /// Heads of a group, `h`.
    together: usize,
    /// `[groups][h·m, h·m]`, row by row.
    groups: Box<[Vec<f32>]>,
    checksum: u32,
}

impl JointBasis {
    /// Takes the bases of all groups of `together` of the `heads` KV heads, `[groups, h·m, h·m]`. `O(groups·(h·m)³)`.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where the numbers are not those of whole groups, or a basis is not orthonormal.
    pub fn new(numbers: &[f32], heads: usize, together: usize, head_dim: usize) -> Result<Self> {
        let whole = together > 1 && heads > 0 && head_dim > 0 && heads.is_multiple_of(together);
        let groups = heads.checked_div(together).unwrap_or(0);
        let n = together.saturating_mul(head_dim);
        if !whole || n.checked_mul(n).and_then(|n| n.checked_mul(groups)) != Some(numbers.len()) {
            let reason = format!(
                "{} numbers are not the bases of {heads} heads with head dim {head_dim}, {together} together",
                numbers.len()
            );
            return Err(Error::Dictionary(reason));
        }
        let mut product = vec![0.0; n * n];
        for (group, own) in numbers.chunks_exact(n * n).enumerate() {
            let rows = Matrix::by_rows(own, n, n);
            multiply(&mut product, false, rows, rows.transposed());
            let is_one = product.iter().enumerate().all(|(place, &x)| {
                let one = if place / n == place % n { 1.0 } else { 0.0 };
                (x - one).abs() <= TOLERANCE
            });
            if !is_one {
                let reason = format!("the basis of group {group} is not orthonormal");
                return Err(Error::Dictionary(reason));
            }
        }
        let mut hasher = crc32fast::Hasher::new_with_initial(together as u32);
        numbers.iter().for_each(|x| hasher.update(&x.to_le_bytes()));
        Ok(Self {
            head_dim,
            together,
            groups: numbers.chunks_exact(n * n).map(<[f32]>::to_vec).collect(),
            checksum: hasher.finalize(),
        })
    }

    /// KV heads.
    pub fn heads(&self) -> usize {
        self.groups.len() * self.together
    }

    /// Heads of a group, and parts.
    pub fn together(&self) -> usize {
        self.together
    }

    /// `m`, the length of a vector.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The bases of all groups, `[groups, h·m, h·m]`.
    pub fn numbers(&self) -> Vec<f32> {
        self.groups.concat()
    }

    /// A checksum of all numbers, so that codes can say what they were found behind.
    pub fn checksum(&self) -> u32 {
        self.checksum
    }

    /// The bytes held.
    pub fn bytes(&self) -> usize {
        self.groups.iter().map(|own| size_of_val(&own[..])).sum()
    }

    /// Turns mapped vectors `[heads, n, m]` into their parts, of the same shape: those of a group stand where its heads
    /// were. `O(n·h·m)` a vector.
    ///
    /// # Panics
    /// Where the vectors are not whole.
    pub fn apply(&self, vectors: &[f32]) -> Vec<f32> {
        self.turned(vectors, true)
    }

    /// Turns parts back: the inverse of [`JointBasis::apply`].
    ///
    /// # Panics
    /// Those of [`JointBasis::apply`].
    pub fn invert(&self, parts: &[f32]) -> Vec<f32> {
        self.turned(parts, false)
    }

    fn turned(&self, vectors: &[f32], forth: bool) -> Vec<f32> {
        let (m, h) = (self.head_dim, self.together);
        let whole = vectors.len().is_multiple_of(self.heads() * m);
        assert!(whole, "whole vectors of every head");
        let count = vectors.len() / (self.heads() * m);
        let mut out = vec![0.0; vectors.len()];
        if count == 0 {
            return out;
        }
        let (each, width) = (count * m, h * m);
        let (mut rows, mut turned) = (vec![0.0; count * width], vec![0.0; count * width]);
        let groups = vectors
            .chunks_exact(h * each)
            .zip(out.chunks_exact_mut(h * each));
        for (basis, (own, out)) in self.groups.iter().zip(groups) {
            for (head, own) in own.chunks_exact(each).enumerate() {
                let places = rows.chunks_exact_mut(width);
                for (row, x) in places.zip(own.chunks_exact(m)) {
                    row[head * m..][..m].copy_from_slice(x);
                }
            }
            let basis = Matrix::by_rows(basis, width, width);
            let basis = if forth { basis.transposed() } else { basis };
            multiply(
                &mut turned,
                false,
                Matrix::by_rows(&rows, count, width),
                basis,
            );
            for (head, out) in out.chunks_exact_mut(each).enumerate() {
                for (row, x) in turned.chunks_exact(width).zip(out.chunks_exact_mut(m)) {
                    x.copy_from_slice(&row[head * m..][..m]);
                }
            }
        }
        out
    }

    /// How attention of KV head `head` sees the parts of its group.
    ///
    /// # Panics
    /// Where there is no such head.
    pub fn of_head(&self, head: usize) -> HeadBasis<'_> {
        HeadBasis {
            basis: &self.groups[head / self.together],
            head: head % self.together,
            parts: self.together,
            m: self.head_dim,
        }
    }
}

/// How the heads of layers that are coded together lie side by side: dictionaries, losses, sparsities and caches of such
/// layers are one each, of all their heads, those that are coded together next to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JointLayers {
    /// Layers that are coded together; 1 where each is coded alone.
    pub layers: usize,
    /// KV heads of each of them that are coded together; 1 where each is coded alone.
    pub heads: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
}

impl JointLayers {
    /// The number of the dictionaries that code a layer of the model, and the places of its heads among theirs.
    pub fn place(&self, layer: usize) -> (usize, Vec<usize>) {
        let (own, h) = (layer % self.layers, self.heads.max(1));
        let places = (0..self.kv_heads).map(|head| (head / h * self.layers + own) * h + head % h);
        (layer / self.layers, places.collect())
    }

    /// The layer of the model and the head of each place among the heads of dictionaries `number`.
    pub fn heads_of(&self, number: usize) -> Vec<(usize, usize)> {
        let first = number * self.layers;
        let mut all = vec![(0, 0); self.layers * self.kv_heads];
        for layer in first..first + self.layers {
            let places = self.place(layer).1.into_iter().enumerate();
            places.for_each(|(head, place)| all[place] = (layer, head));
        }
        all
    }
}

/// A KV head's view of the parts that its group is coded in.
#[derive(Debug, Clone, Copy)]
pub struct HeadBasis<'a> {
    basis: &'a [f32],
    /// The head's number in its group.
    head: usize,
    parts: usize,
    m: usize,
}

impl HeadBasis<'_> {
    /// `U_{b,i}`, the rows of part `part` and the columns of the head, `[m, m]`.
    fn block(self, part: usize) -> Vec<f32> {
        let (m, width) = (self.m, self.parts * self.m);
        let rows = self.basis[part * m * width..][..m * width].chunks_exact(width);
        rows.flat_map(|row| row[self.head * m..][..m].iter().copied())
            .collect()
    }

    /// Turns queries `[n, m]` of the head into those of each part, `[parts, n, m]`, whose scores add up to those of its keys.
    /// `O(n·h·m²)`.
    pub(crate) fn queries(self, queries: &[f32]) -> Vec<f32> {
        let (m, n) = (self.m, queries.len() / self.m);
        let mut out = vec![0.0; self.parts * queries.len()];
        for (part, out) in out.chunks_exact_mut(queries.len().max(1)).enumerate() {
            let block = self.block(part);
            let block = Matrix::by_rows(&block, m, m).transposed();
            multiply(out, false, Matrix::by_rows(queries, n, m), block);
        }
        out
    }

    /// Adds what sums over each part, `[parts, n, m]`, make of the head's vectors to `out` `[n, m]`. `O(n·h·m²)`.
    pub(crate) fn add(self, sums: &[f32], out: &mut [f32]) {
        let (m, n) = (self.m, out.len() / self.m);
        for (part, sums) in sums.chunks_exact(out.len().max(1)).enumerate() {
            let block = self.block(part);
            multiply(
                out,
                true,
                Matrix::by_rows(sums, n, m),
                Matrix::by_rows(&block, m, m),
            );
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use proptest::prelude::*;

    use super::*;

    /// An orthonormal basis of `n` vectors: three reflections (Householder 1958).
    fn orthonormal(n: usize, numbers: &mut impl Iterator<Item = f32>) -> Vec<f32> {
        let unit = |place: usize| if place / n == place % n { 1.0 } else { 0.0 };
        let mut basis: Vec<f64> = (0..n * n).map(unit).collect();
        for _ in 0..3 {
            let v: Vec<f64> = numbers.by_ref().take(n).map(f64::from).collect();
            let square: f64 = v.iter().map(|x| x * x).sum();
            if square < 1e-6 {
                continue;
            }
            for row in basis.chunks_exact_mut(n) {
                let along: f64 = row.iter().zip(&v).map(|(a, b)| a * b).sum();
                let both = row.iter_mut().zip(&v);
                both.for_each(|(x, v)| *x -= 2.0 * along / square * v);
            }
        }
        basis.iter().map(|&x| x as f32).collect()
    }

    proptest! {
        #[test]
        fn parts_come_back_and_keep_scores_and_sums(
            (m, h, groups) in (1usize..5, 2usize..4, 1usize..3),
            numbers in prop::collection::vec(-2f32..2.0, 400),
        ) {
            let (heads, n) = (h * groups, 3);
            let mut numbers = numbers.into_iter().cycle();
            let bases = (0..groups).flat_map(|_| orthonormal(h * m, &mut numbers));
            let basis = JointBasis::new(&bases.collect::<Vec<_>>(), heads, h, m).unwrap();
            let mut drawn = |count: usize| -> Vec<f32> { numbers.by_ref().take(count).collect() };
            let vectors = drawn(heads * n * m);
            let parts = basis.apply(&vectors);
            for (a, b) in vectors.iter().zip(basis.invert(&parts)) {
                prop_assert!((a - b).abs() < 1e-4, "{a} {b}");
            }
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
            };
            for head in 0..heads {
                let own = basis.of_head(head);
                let (query, weights) = (drawn(m), drawn(n));
                let of_parts = own.queries(&query);
                let part = |b: usize, at: usize| &parts[((head / h * h + b) * n + at) * m..][..m];
                let vector = |at: usize| &vectors[(head * n + at) * m..][..m];
                let mut sums = vec![0.0; h * m];
                for (at, weight) in weights.iter().enumerate() {
                    let score: f64 = (0..h).map(|b| dot(&of_parts[b * m..][..m], part(b, at))).sum();
                    let wanted = dot(&query, vector(at));
                    prop_assert!((score - wanted).abs() < 1e-3, "{score} for {wanted}");
                    for (b, sum) in sums.chunks_exact_mut(m).enumerate() {
                        sum.iter_mut().zip(part(b, at)).for_each(|(sum, x)| *sum += weight * x);
                    }
                }
                let mut out = vec![1.0; m];
                own.add(&sums, &mut out);
                for (i, out) in out.iter().enumerate() {
                    let wanted: f32 = (0..n).map(|at| weights[at] * vector(at)[i]).sum();
                    prop_assert!((out - 1.0 - wanted).abs() < 1e-3, "{out} for {wanted}");
                }
            }
        }
    }

    #[test]
    fn heads_of_layers_that_are_coded_together_lie_side_by_side() {
        let joint = |layers, heads| JointLayers {
            layers,
            heads,
            kv_heads: 4,
        };
        assert_eq!(joint(1, 2).place(3), (3, vec![0, 1, 2, 3]));
        assert_eq!(joint(2, 2).place(4), (2, vec![0, 1, 4, 5]));
        assert_eq!(joint(2, 2).place(5), (2, vec![2, 3, 6, 7]));
        assert_eq!(joint(2, 1).place(1), (0, vec![1, 3, 5, 7]));
        for joint in [joint(1, 1), joint(3, 4), joint(2, 2)] {
            for number in 0..2 {
                for (place, (layer, head)) in joint.heads_of(number).into_iter().enumerate() {
                    let (own, places) = joint.place(layer);
                    assert_eq!((own, places[head]), (number, place));
                }
            }
        }
    }

    #[test]
    fn what_is_no_basis_is_refused() {
        let refused = |numbers: &[f32], heads, together| {
            let error = JointBasis::new(numbers, heads, together, 1).unwrap_err();
            assert!(matches!(error, Error::Dictionary(_)), "{error}");
        };
        assert!(JointBasis::new(&[0.0, 1.0, 1.0, 0.0], 2, 2, 1).is_ok());
        refused(&[], 0, 0);
        refused(&[1.0; 3], 2, 2);
        // A head alone needs none.
        refused(&[1.0, 1.0], 2, 1);
        refused(&[1.0, 0.0, 0.0, 1.0], 3, 2);
        refused(&[1.0, 0.0, 0.1, 1.0], 2, 2);
        refused(&[1.0, 0.0, 0.0, f32::NAN], 2, 2);
        refused(&[1.0, 0.0, 0.0, 0.0], 2, 2);
    }
}
