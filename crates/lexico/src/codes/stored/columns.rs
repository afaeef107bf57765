//! Columns of symbols as they are stored. A column is raw, or coded by the distribution of its symbols, whichever is
//! smaller; symbols of 16 bits are a column of high bytes and, for each of them, a column of the low bytes that go with it.

use super::input::{Input, damaged};
use super::rans::Model;
use crate::Result;

/// Way in which a column of bytes is kept: the byte before it.
const RAW: u8 = 0;
const CODED: u8 = 1;
/// Each byte less the one before, coded.
const DIFFERENCES: u8 = 2;

/// Way in which columns of one kind are kept: the byte before them.
const APART: u8 = 0;
/// All in one column, with one distribution.
const TOGETHER: u8 = 1;

/// Symbol of a column: a byte, or 16 bits.
pub(super) trait Symbol: Copy {
    fn write(column: &[Self], out: &mut Vec<u8>);
    fn read(input: &mut Input<'_>, count: usize) -> Result<Vec<Self>>;
}

/// Writes columns of one kind with a distribution each or with one for all, whichever is smaller: each follows its
/// own more closely, but a short column cannot pay for one.
///
/// Nothing is written of columns without symbols.
pub(super) fn write<S: Symbol>(columns: &[Vec<S>], out: &mut Vec<u8>) {
    if columns.iter().all(Vec::is_empty) {
        return;
    }
    let mut apart = vec![APART];
    for column in columns.iter().filter(|column| !column.is_empty()) {
        S::write(column, &mut apart);
    }
    let mut together = vec![TOGETHER];
    S::write(&columns.concat(), &mut together);
    out.extend(if together.len() < apart.len() {
        together
    } else {
        apart
    });
}

/// Reads columns of these lengths.
pub(super) fn read<S: Symbol>(input: &mut Input<'_>, lengths: &[usize]) -> Result<Vec<Vec<S>>> {
    if lengths.iter().all(|&count| count == 0) {
        return Ok(vec![Vec::new(); lengths.len()]);
    }
    match *input.array()? {
        [APART] => {
            let columns = lengths.iter().map(|&count| match count {
                0 => Ok(Vec::new()),
                count => S::read(input, count),
            });
            columns.collect()
        }
        [TOGETHER] => {
            let all = S::read(input, lengths.iter().sum())?;
            let mut rest = all.as_slice();
            let columns = lengths.iter().map(|&count| {
                let (column, after) = rest.split_at(count);
                rest = after;
                column.to_vec()
            });
            Ok(columns.collect())
        }
        _ => Err(damaged("how columns are kept")),
    }
}

fn counts(column: &[u8]) -> [u32; 256] {
    let mut counts = [0; 256];
    column
        .iter()
        .for_each(|&byte| counts[usize::from(byte)] += 1);
    counts
}

fn differences(column: &[u8]) -> impl Iterator<Item = u8> {
    let before = std::iter::once(&0).chain(column);
    column
        .iter()
        .zip(before)
        .map(|(&byte, &before)| byte.wrapping_sub(before))
}

impl Symbol for u8 {
    fn write(column: &[u8], out: &mut Vec<u8>) {
        let ways = [
            (CODED, column.to_vec()),
            (DIFFERENCES, differences(column).collect()),
        ];
        let costs = ways.into_iter().filter_map(|(way, bytes)| {
            let counts = counts(&bytes);
            let model = Model::of_counts(&counts)?;
            Some((model.cost(&counts), way, model, bytes))
        });
        match costs.min_by_key(|&(cost, ..)| cost) {
            Some((cost, way, model, bytes)) if cost < column.len() => {
                out.push(way);
                model.write(out);
                model.encode(&bytes, out);
            }
            _ => {
                out.push(RAW);
                out.extend_from_slice(column);
            }
        }
    }

    fn read(input: &mut Input<'_>, count: usize) -> Result<Vec<u8>> {
        let [way] = *input.array()?;
        if way == RAW {
            return Ok(input.take(count)?.to_vec());
        }
        if way != CODED && way != DIFFERENCES {
            return Err(damaged("how a column is kept"));
        }
        let model = Model::read(input)?;
        let mut column = vec![0; count];
        model.decode(input, &mut column)?;
        if way == DIFFERENCES {
            let mut before = 0u8;
            for byte in &mut column {
                *byte = byte.wrapping_add(before);
                before = *byte;
            }
        }
        Ok(column)
    }
}

impl Symbol for u16 {
    fn write(column: &[u16], out: &mut Vec<u8>) {
        let mut low = vec![Vec::new(); 256];
        for symbol in column {
            low[usize::from(symbol >> 8)].push(*symbol as u8);
        }
        let high: Vec<u8> = column.iter().map(|symbol| (symbol >> 8) as u8).collect();
        u8::write(&high, out);
        for column in low.iter().filter(|column| !column.is_empty()) {
            u8::write(column, out);
        }
    }

    fn read(input: &mut Input<'_>, count: usize) -> Result<Vec<u16>> {
        let high = u8::read(input, count)?;
        let low = counts(&high).into_iter().map(|count| match count {
            0 => Ok(Vec::new()),
            count => u8::read(input, count as usize),
        });
        let low = low.collect::<Result<Vec<_>>>()?;
        let mut low: Vec<_> = low.iter().map(|column| column.iter()).collect();
        let symbols = high.iter().map(|&high| {
            // As many as were counted are there.
            let low = low[usize::from(high)].next().copied().unwrap_or(0);
            u16::from_be_bytes([high, low])
        });
        Ok(symbols.collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

    use proptest::collection::vec;
    use proptest::prelude::*;
    use rand::{Rng, RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn round_trip<S: Symbol + PartialEq + std::fmt::Debug>(columns: &[Vec<S>]) -> usize {
        let mut bytes = Vec::new();
        write(columns, &mut bytes);
        let mut input = Input::new(&bytes);
        let lengths: Vec<usize> = columns.iter().map(Vec::len).collect();
        assert_eq!(read::<S>(&mut input, &lengths).unwrap(), columns);
        input.end().unwrap();
        bytes.len()
    }

    /// The entropy of a column, in bytes.
    fn entropy<S: Copy + Ord>(column: &[S]) -> f64 {
        let mut sorted = column.to_vec();
        sorted.sort_unstable();
        let all = column.len() as f64;
        let bits = sorted.chunk_by(|a, b| a == b).map(|run| {
            let count = run.len() as f64;
            count * (all / count).log2()
        });
        bits.sum::<f64>() / 8.0
    }

    proptest! {
        #[test]
        fn columns_come_back(columns in vec(vec(any::<u8>(), 0..300), 0..4), wide in vec(vec(any::<u16>(), 0..300), 0..4), shift in 0u32..16) {
            round_trip(&columns);
            let wide: Vec<Vec<u16>> = wide.into_iter().map(|c| c.into_iter().map(|s| s >> shift).collect()).collect();
            round_trip(&wide);
        }

        #[test]
        fn skewed_columns_come_back(seed: u64, count in 0usize..5000, power in 0.1f32..20.0) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut draw = |max: f32| (rng.random::<f32>().powf(power) * max) as u16;
            let wide: Vec<u16> = (0..count).map(|_| draw(65535.9)).collect();
            let narrow: Vec<u8> = (0..count).map(|_| draw(255.9) as u8).collect();
            round_trip(&[wide]);
            round_trip(&[narrow]);
        }

        /// Whatever the bytes, there is an answer.
        #[test]
        fn damage_never_panics(columns in vec(vec(0u16..600, 1..300), 1..3), at: prop::sample::Index, with: u8, garbage in vec(any::<u8>(), 0..200)) {
            let mut bytes = Vec::new();
            write(&columns, &mut bytes);
            let lengths: Vec<usize> = columns.iter().map(Vec::len).collect();
            *at.get_mut(&mut bytes) = with;
            let _ = read::<u16>(&mut Input::new(&bytes), &lengths);
            let _ = read::<u16>(&mut Input::new(&garbage), &lengths);
            let _ = read::<u8>(&mut Input::new(&garbage), &lengths);
        }
    }

    #[test]
    fn columns_take_little_more_than_their_entropy() {
        const COUNT: usize = 100_000;
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for power in [1.2f32, 2.0, 5.0, 30.0] {
            let mut draw = |max: f32| (rng.random::<f32>().powf(power) * max) as u16;
            // A distribution's bytes, and three hundredths of a bit a symbol.
            let allowed = |entropy: f64, distributions: f64| {
                entropy + 160.0 * distributions + 0.03 / 8.0 * COUNT as f64
            };
            let column: Vec<u8> = (0..COUNT).map(|_| draw(256.0) as u8).collect();
            let max = allowed(entropy(&column), 1.0);
            let found = round_trip(&[column]) as f64;
            assert!(found < max, "power {power}: {found} bytes, {max} allowed");
            let wide: Vec<u16> = (0..COUNT).map(|_| draw(4096.0)).collect();
            let max = allowed(entropy(&wide), 17.0);
            let found = round_trip(&[wide]) as f64;
            assert!(
                found < max,
                "power {power}, 12 bits: {found} bytes, {max} allowed"
            );
        }
    }

    #[test]
    fn what_cannot_gain_is_raw_and_what_is_constant_costs_nothing() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut noise = vec![0; 10_000];
        rng.fill_bytes(&mut noise);
        assert_eq!(round_trip(&[noise]), 10_002);
        assert!(round_trip(&[vec![77u8; 10_000]]) < 32);
        let rising: Vec<u8> = (0..10_000).map(|i| (i / 3) as u8).collect();
        assert!(round_trip(&[rising]) < 1_300, "differences");
    }

    #[test]
    fn short_columns_share_a_distribution_and_long_ones_have_their_own() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut draw = |power: f32, count: usize| -> Vec<u8> {
            let symbols = (0..count).map(|_| (rng.random::<f32>().powf(power) * 256.0) as u8);
            symbols.collect()
        };
        let kept = |columns: &[Vec<u8>]| {
            let mut bytes = Vec::new();
            write(columns, &mut bytes);
            bytes[0]
        };
        assert_eq!(kept(&[draw(2.0, 300), draw(2.2, 300)]), TOGETHER);
        assert_eq!(kept(&[draw(2.0, 30_000), draw(6.0, 30_000)]), APART);
    }
}
