use crate::kernels::matmul::{Matrix, multiply};
use crate::kernels::vector::dot;
use crate::{Error, Result};

/// See [`RotaryMeans::BLOCK`].
const BLOCK: usize = RotaryMeans::BLOCK;
/// Blocks whose scores are found at once: so many that a product is worth it, so few that it stays in the second cache.
const AT_ONCE: usize = 16;
/// The angle, in radians, that slow pairs turn by within a block at the most.
const SLOW: f32 = 0.1;

/// Means of the keys of each KV head before their rotary embedding (Su et al. 2021), which turn with the position as
/// keys do.
///
/// Most of what keys have in common is there before the embedding, and turns with it: an average over positions does not
/// see it. Numbers `i` and `i + pairs` of a key are turned by the angle `position · frequency[i]`; those beyond the last
/// pair are not. Slow pairs are turned by the angle of the middle of their block of 64 positions. That is
/// no approximation of scores: what is taken away from a key and what is added to its scores are the same.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryMeans {
    head_dim: usize,
    /// Radians a position of each pair.
    frequencies: Vec<f32>,
    /// `[heads, m]`
    means: Vec<f32>,
    /// The numbers of the pairs, fast ones first.
    order: Vec<usize>,
    fast: usize,
    /// Ones, cosines and sines of what fast pairs turn by within a block, `[1 + 2·fast, BLOCK]`.
    within: Vec<f32>,
}

impl RotaryMeans {
    /// Positions whose slow pairs are taken to have turned alike.
    pub(crate) const BLOCK: usize = 64;

    /// Takes the angle a position of each pair, in radians, and the means `[heads, m]` before the embedding.
    ///
    /// # Errors
    /// [`Error::Dictionary`] where the means do not fill whole heads, there is no pair or there are more than `m / 2`, or
    /// a number is not finite.
    pub fn new(frequencies: &[f32], means: &[f32], head_dim: usize) -> Result<Self> {
        let (m, pairs) = (head_dim, frequencies.len());
        if m == 0 || means.is_empty() || !means.len().is_multiple_of(m) {
            let reason = format!(
                "{} numbers are not means of heads with head dim {m}",
                means.len()
            );
            return Err(Error::Dictionary(reason));
        }
        if pairs == 0 || 2 * pairs > m {
            let reason = format!("{pairs} pairs of numbers turn; 1 to {} can", m / 2);
            return Err(Error::Dictionary(reason));
        }
        if !frequencies.iter().chain(means).all(|x| x.is_finite()) {
            let reason = "a mean before the rotary embedding, or an angle, is not finite";
            return Err(Error::Dictionary(reason.to_owned()));
        }
        let is_slow = |&pair: &usize| frequencies[pair].abs() * BLOCK as f32 <= SLOW;
        let (slow, mut order): (Vec<usize>, Vec<usize>) = (0..pairs).partition(is_slow);
        let fast = order.len();
        let mut within = vec![1.0; BLOCK];
        for turn in [f64::cos, f64::sin] {
            for &pair in &order {
                let angle = |place: usize| place as f64 * f64::from(frequencies[pair]);
                within.extend((0..BLOCK).map(|place| turn(angle(place)) as f32));
            }
        }
        order.extend(slow);
        Ok(Self {
            head_dim,
            frequencies: frequencies.to_vec(),
            means: means.to_vec(),
            order,
            fast,
            within,
        })
    }

    /// Radians a position of each pair.
    pub fn frequencies(&self) -> &[f32] {
        &self.frequencies
    }

    /// The means before the embedding, `[heads, m]`.
    pub fn means(&self) -> &[f32] {
        &self.means
    }

    /// The angles a position of fast pairs, then of the others.
    #[cfg(feature = "cuda")]
    pub(crate) fn frequencies_in_order(&self) -> Vec<f32> {
        let order = self.order.iter();
        order.map(|&pair| self.frequencies[pair]).collect()
    }

    /// Cosines and sines of what fast pairs turn by within a block, `[2·fast, BLOCK]`.
    #[cfg(feature = "cuda")]
    pub(crate) fn within(&self) -> &[f32] {
        &self.within[BLOCK..]
    }

    /// KV heads.
    pub fn heads(&self) -> usize {
        self.means.len() / self.head_dim
    }

    /// The bytes held.
    pub(crate) fn bytes(&self) -> usize {
        let numbers = self.frequencies.len() + self.means.len() + self.within.len();
        numbers * size_of::<f32>() + self.order.len() * size_of::<usize>()
    }

    /// The means at some positions are products of their cosines and sines with these, `[2·pairs, m]`, turned by
    /// `matrix` `[m, m]`.
    pub(super) fn directions(&self, head: usize, matrix: &[f32]) -> Vec<f32> {
        let (m, pairs) = (self.head_dim, self.order.len());
        let mean = &self.means[head * m..][..m];
        let mut directions = vec![0.0; 2 * pairs * m];
        let (cosines, sines) = directions.split_at_mut(pairs * m);
        let rows = cosines.chunks_exact_mut(m).zip(sines.chunks_exact_mut(m));
        for (&pair, (cosine, sine)) in self.order.iter().zip(rows) {
            let (x, y) = (mean[pair], mean[pair + pairs]);
            (cosine[pair], cosine[pair + pairs]) = (x, y);
            (sine[pair], sine[pair + pairs]) = (-y, x);
        }
        let mut mapped = vec![0.0; 2 * pairs * m];
        let matrix = Matrix::by_rows(matrix, m, m).transposed();
        let directions = Matrix::by_rows(&directions, 2 * pairs, m);
        multiply(&mut mapped, false, directions, matrix);
        mapped
    }

    /// Takes the means at these positions away from keys `[n, m]` of a head. `O(n·m²)`.
    ///
    /// # Panics
    /// Where there is no such head.
    pub(crate) fn take_away(
        &self,
        head: usize,
        positions: impl Iterator<Item = usize>,
        keys: &mut [f32],
    ) {
        let m = self.head_dim;
        let mut same = vec![0.0; m * m];
        same.iter_mut().step_by(m + 1).for_each(|x| *x = 1.0);
        self.add(&self.directions(head, &same), positions, -1.0, keys);
    }

    /// Adds `sign` times the means at these positions to vectors `[n, m]`; `directions` are a head's.
    pub(super) fn add(
        &self,
        directions: &[f32],
        positions: impl Iterator<Item = usize>,
        sign: f32,
        vectors: &mut [f32],
    ) {
        let (m, pairs) = (self.head_dim, self.order.len());
        let n = vectors.len() / m;
        let mut turned = vec![0.0; n * 2 * pairs];
        for (turned, position) in turned.chunks_exact_mut(2 * pairs).zip(positions) {
            let (cosines, sines) = turned.split_at_mut(pairs);
            for (number, &pair) in self.order.iter().enumerate() {
                let (sine, cosine) = self.angle(number, pair, position).sin_cos();
                cosines[number] = sign * cosine as f32;
                sines[number] = sign * sine as f32;
            }
        }
        let turned = Matrix::by_rows(&turned, n, 2 * pairs);
        multiply(
            vectors,
            true,
            turned,
            Matrix::by_rows(directions, 2 * pairs, m),
        );
    }

    /// The angle that pair `pair`, the `number`th in order, is turned by at a position.
    fn angle(&self, number: usize, pair: usize, position: usize) -> f64 {
        let position = match number < self.fast {
            true => position as f64,
            false => middle(position / BLOCK),
        };
        position * f64::from(self.frequencies[pair])
    }

    /// Adds the products of queries `[heads, group, m]` with the means at the positions from `first` on to `scores`
    /// `[n, rows]`; `directions` are each head's. `O(rows·(m·pairs + n·fast))`.
    pub(super) fn add_scores(
        &self,
        directions: &[&[f32]],
        first: usize,
        queries: &[f32],
        rows: usize,
        scores: &mut [f32],
    ) {
        let (m, pairs, fast) = (self.head_dim, self.order.len(), self.fast);
        let end = first + scores.len() / rows;
        let mut products = vec![0.0; rows * 2 * pairs];
        let each = queries.len() / directions.len();
        let heads = products.chunks_mut(each / m * 2 * pairs);
        let heads = heads.zip(queries.chunks_exact(each)).zip(directions);
        for ((products, queries), directions) in heads {
            let directions = Matrix::by_rows(directions, 2 * pairs, m).transposed();
            let queries = Matrix::by_rows(queries, each / m, m);
            multiply(products, false, queries, directions);
        }
        let width = 1 + 2 * fast;
        let within = Matrix::by_rows(&self.within, width, BLOCK).transposed();
        let mut turned = Turned::new(self, first / BLOCK);
        let mut coefficients = vec![0.0; AT_ONCE * rows * width];
        let mut sums = vec![0.0; BLOCK * AT_ONCE * rows];
        for start in (first / BLOCK..end.div_ceil(BLOCK)).step_by(AT_ONCE) {
            let blocks = AT_ONCE.min(end.div_ceil(BLOCK) - start);
            for own in coefficients.chunks_exact_mut(rows * width).take(blocks) {
                let products = products.chunks_exact(2 * pairs);
                for (own, products) in own.chunks_exact_mut(width).zip(products) {
                    turned.turn(products, fast, own);
                }
                turned.next();
            }
            let columns = blocks * rows;
            let sums = &mut sums[..BLOCK * columns];
            let right = Matrix::by_rows(&coefficients[..columns * width], columns, width);
            multiply(sums, false, within, right.transposed());
            for block in start..start + blocks {
                let from = first.max(block * BLOCK);
                let to = end.min((block + 1) * BLOCK);
                let scores = &mut scores[(from - first) * rows..(to - first) * rows];
                let sums = &sums[from % BLOCK * columns + (block - start) * rows..];
                match rows {
                    1 => add_rows::<1>(scores, sums, columns),
                    2 => add_rows::<2>(scores, sums, columns),
                    4 => add_rows::<4>(scores, sums, columns),
                    8 => add_rows::<8>(scores, sums, columns),
                    16 => add_rows::<16>(scores, sums, columns),
                    _ => {
                        let each = scores.chunks_exact_mut(rows).zip(sums.chunks(columns));
                        for (scores, sums) in each {
                            let sums = scores.iter_mut().zip(sums);
                            sums.for_each(|(score, sum)| *score += sum);
                        }
                    }
                }
            }
        }
    }
}

/// Adds the first `N` numbers of each of the rows of `sums`, `columns` apart, to `scores` `[n, N]`.
fn add_rows<const N: usize>(scores: &mut [f32], sums: &[f32], columns: usize) {
    let (scores, _) = scores.as_chunks_mut::<N>();
    for (scores, sums) in scores.iter_mut().zip(sums.chunks(columns)) {
        if let Some(sums) = sums.first_chunk::<N>() {
            for (score, sum) in scores.iter_mut().zip(sums) {
                *score += sum;
            }
        }
    }
}

/// The middle of a block.
fn middle(block: usize) -> f64 {
    (block * BLOCK) as f64 + 0.5 * (BLOCK - 1) as f64
}

/// Cosines and sines of the angles of fast pairs at the begin of a block, and of slow ones at its middle, block after block.
struct Turned {
    exact: Vec<[f64; 2]>,
    steps: Vec<[f64; 2]>,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Turned {
    fn new(means: &RotaryMeans, block: usize) -> Self {
        let turned = |angle: f64| [angle.cos(), angle.sin()];
        let pairs = means.order.iter().enumerate();
        let exact = pairs.map(|(number, &pair)| turned(means.angle(number, pair, block * BLOCK)));
        let steps = means.order.iter();
        let steps = steps.map(|&pair| turned(BLOCK as f64 * f64::from(means.frequencies[pair])));
        let mut all = Self {
            exact: exact.collect(),
            steps: steps.collect(),
            cosines: vec![0.0; means.order.len()],
            sines: vec![0.0; means.order.len()],
        };
        all.round();
        all
    }

    /// Turns a query's products with the directions, `[2·pairs]`, to this block: what slow pairs come to, and what cosines and
    /// then sines of the fast ones within the block are multiplied with.
    fn turn(&self, products: &[f32], fast: usize, out: &mut [f32]) {
        let pairs = self.cosines.len();
        let (along, across) = products.split_at(pairs);
        let (cosines, slow_cosines) = self.cosines.split_at(fast);
        let (sines, slow_sines) = self.sines.split_at(fast);
        let slow = dot(&along[fast..], slow_cosines);
        out[0] = slow + dot(&across[fast..], slow_sines);
        let (out_cosines, out_sines) = out[1..].split_at_mut(fast);
        let (along, across) = (&along[..fast], &across[..fast]);
        let out_sines = &mut out_sines[..fast];
        for i in 0..fast {
            out_cosines[i] = along[i] * cosines[i] + across[i] * sines[i];
            out_sines[i] = across[i] * cosines[i] - along[i] * sines[i];
        }
    }

    fn next(&mut self) {
        for ([cosine, sine], [by_cosine, by_sine]) in self.exact.iter_mut().zip(&self.steps) {
            let turned = *cosine * by_cosine - *sine * by_sine;
            *sine = *sine * by_cosine + *cosine * by_sine;
            *cosine = turned;
        }
        self.round();
    }

    fn round(&mut self) {
        let rounded = self.cosines.iter_mut().zip(&mut self.sines);
        for ((cosine, sine), exact) in rounded.zip(&self.exact) {
            (*cosine, *sine) = (exact[0] as f32, exact[1] as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The mean at a position before it is mapped, by its definition, in f64.
    fn turned(frequencies: &[f32], mean: &[f32], position: usize) -> Vec<f64> {
        let mut turned = vec![0.0; mean.len()];
        let pairs = frequencies.len();
        for (pair, &frequency) in frequencies.iter().enumerate() {
            let place = match frequency.abs() * 64.0 <= 0.1 {
                true => (position / 64 * 64) as f64 + 31.5,
                false => position as f64,
            };
            let (sine, cosine) = (place * f64::from(frequency)).sin_cos();
            let [x, y] = [pair, pair + pairs].map(|place| f64::from(mean[place]));
            turned[pair] = x * cosine - y * sine;
            turned[pair + pairs] = y * cosine + x * sine;
        }
        turned
    }

    proptest! {
        #[test]
        fn keys_lose_what_their_scores_get_back(
            (frequencies, numbers, power, m) in (1usize..12, 0usize..4).prop_flat_map(|(pairs, more)| {
                let m = 2 * pairs + more;
                let frequency = prop_oneof![-1f32..1.0, -2e-3f32..2e-3, Just(0.0)];
                let numbers = prop::collection::vec(-3f32..3.0, 2 * m + m * m + 32 * m);
                (prop::collection::vec(frequency, pairs), numbers, 0u32..6, Just(m))
            }),
            first in prop_oneof![0usize..200, 30_000usize..30_100, Just(1 << 20)],
            n in 1usize..150,
        ) {
            let (means, rest) = numbers.split_at(2 * m);
            let (matrix, queries) = rest.split_at(m * m);
            let group = 1 << power;
            let queries = &queries[..group * m];
            let rotary = RotaryMeans::new(&frequencies, means, m).unwrap();
            let directions = rotary.directions(1, matrix);
            let mut keys = vec![0.0; n * m];
            rotary.add(&directions, first.., -1.0, &mut keys);
            let mut scores = vec![0.5; n * group];
            rotary.add_scores(&[&directions], first, queries, group, &mut scores);
            for (t, key) in keys.chunks_exact(m).enumerate() {
                let mean = turned(&frequencies, &means[m..], first + t);
                let mapped = matrix.chunks_exact(m).map(|row| -> f64 {
                    row.iter().zip(&mean).map(|(&a, x)| f64::from(a) * x).sum()
                });
                let mapped: Vec<f64> = mapped.collect();
                for (&lost, wanted) in key.iter().zip(&mapped) {
                    prop_assert!((f64::from(-lost) - wanted).abs() < 1e-3, "{lost} for -{wanted}");
                }
                for (g, query) in queries.chunks_exact(m).enumerate() {
                    let wanted: f64 = query.iter().zip(&mapped).map(|(&q, x)| f64::from(q) * x).sum();
                    let found = f64::from(scores[t * group + g]) - 0.5;
                    prop_assert!((found - wanted).abs() < 1e-2, "{found} for {wanted}");
                }
            }
        }
    }

    #[test]
    fn what_are_no_means_is_refused() {
        for (frequencies, means) in [
            (&[1.0f32, 0.1][..], &[0.0f32; 7][..]),
            (&[1.0, 0.1], &[]),
            (&[], &[0.0; 4]),
            (&[1.0, 0.1, 0.01], &[0.0; 4]),
            (&[1.0, f32::NAN], &[0.0; 4]),
            (&[1.0], &[0.0, 1.0, f32::INFINITY, 0.0]),
        ] {
            let refused = RotaryMeans::new(frequencies, means, 4);
            assert!(matches!(refused, Err(Error::Dictionary(_))), "{refused:?}");
        }
        assert!(RotaryMeans::new(&[1.0], &[0.0; 2], 0).is_err());
    }
}
