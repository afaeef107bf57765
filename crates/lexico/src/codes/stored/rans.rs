//! Range asymmetric numeral systems (Duda 2013, arXiv 1311.2540) for bytes of a static distribution: 32-bit states that
//! are refilled by 16-bit words, several states side by side over one run of words (Giesen 2014, arXiv 1402.3392).
//!
//! Our own rather than the `constriction` crate's, whose coder has one state, so that each symbol waits for the one
//! before: with its lookup models it decoded 170 MB/s of bytes where this decodes several times as much.

use super::input::{Input, damaged};
use crate::Result;
use crate::tensor_file::numbers;

/// Frequencies sum to `2^BITS`.
const BITS: u32 = 12;
const TOTAL: usize = 1 << BITS;
/// States lie from here to 2³².
const LEAST: u32 = 1 << 16;
/// States side by side.
const STREAMS: usize = 4;

/// Steps of a factor of two that frequencies are rounded to.
const STEPS: f64 = 2.0;
/// The largest weight: so rare a byte as `2^(-15)` of the most frequent one is told apart.
const MAX_WEIGHT: u8 = 31;

/// Distribution of bytes.
///
/// Frequencies are written as *weights*, their logarithms in steps of a factor √2: 3 or 4 bits each where exact
/// ones took 12. What is coded grows by less than a hundredth of a bit a byte.
pub(super) struct Model {
    /// 0 of a byte that does not occur.
    weights: [u8; 256],
    /// Sum of the frequencies of all bytes before each.
    starts: [u16; 257],
}

impl Model {
    /// A model of bytes that occur so often; `None` where none does.
    pub(super) fn of_counts(counts: &[u32; 256]) -> Option<Self> {
        let largest = counts
            .iter()
            .copied()
            .max()
            .filter(|&largest| largest > 0)?;
        Some(Self::of_weights(counts.map(|count| match count {
            0 => 0,
            count => {
                let below = STEPS * (f64::from(largest) / f64::from(count)).log2();
                (f64::from(MAX_WEIGHT) - below.round()).max(1.0) as u8
            }
        })))
    }

    /// Not all weights may be 0.
    fn of_weights(weights: [u8; 256]) -> Self {
        // 2^(w/2), in integers: every machine must come to the same frequencies.
        let value = |weight: u8| match weight {
            0 => 0u64,
            even if even % 2 == 0 => 1000 << (even / 2),
            odd => 1414 << (odd / 2),
        };
        let all: u64 = weights.iter().map(|&w| value(w)).sum();
        let present = weights.iter().filter(|&&w| w > 0).count() as u64;
        // Every byte that occurs has 1, and its share of the rest; what is rounded is the sums, so that nothing is left.
        let (mut before, mut values) = (0, 0);
        let mut starts = [0; 257];
        for (start, &weight) in starts[1..].iter_mut().zip(&weights) {
            before += u64::from(weight > 0);
            values += value(weight);
            *start = (before + values * (TOTAL as u64 - present) / all.max(1)) as u16;
        }
        Self { weights, starts }
    }

    fn range(&self, byte: u8) -> (u32, u32) {
        let start = self.starts[usize::from(byte)];
        let end = self.starts[usize::from(byte) + 1];
        (u32::from(start), u32::from(end - start))
    }

    /// Bytes that a column of these counts takes with this model, about.
    pub(super) fn cost(&self, counts: &[u32; 256]) -> usize {
        let bits = (0..=255).zip(counts).filter(|(_, count)| **count > 0);
        let bits = bits.map(|(byte, &count)| {
            let (_, frequency) = self.range(byte);
            f64::from(count) * (f64::from(BITS) - f64::from(frequency).log2())
        });
        (bits.sum::<f64>() / 8.0) as usize + self.written_bytes() + 4 * STREAMS + 4
    }

    fn written_bytes(&self) -> usize {
        let (first, last, _, bits) = self.extent();
        4 + (usize::from(last - first) * bits as usize + bits as usize).div_ceil(8)
    }

    /// The first and the last byte that occur, the least weight, and bits of `weight − least + 1`.
    fn extent(&self) -> (u8, u8, u8, u32) {
        let occurs = |b: &u8| self.weights[usize::from(*b)] > 0;
        let first = (0..=255).find(occurs).unwrap_or(0);
        let last = (0..=255).rev().find(occurs).unwrap_or(0);
        let present = self.weights.iter().copied().filter(|&w| w > 0);
        let least = present.clone().min().unwrap_or(1);
        let largest = present.max().unwrap_or(1);
        (
            first,
            last,
            least,
            u8::BITS - (largest - least + 1).leading_zeros(),
        )
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let (first, last, least, bits) = self.extent();
        out.extend([first, last, least, bits as u8]);
        let (mut held, mut filled) = (0u32, 0);
        for &weight in &self.weights[usize::from(first)..=usize::from(last)] {
            let number = if weight == 0 { 0 } else { weight - least + 1 };
            held |= u32::from(number) << filled;
            filled += bits;
            while filled >= 8 {
                out.push(held as u8);
                held >>= 8;
                filled -= 8;
            }
        }
        if filled > 0 {
            out.push(held as u8);
        }
    }

    pub(super) fn read(input: &mut Input<'_>) -> Result<Self> {
        let [first, last, least, bits] = *input.array::<4>()?;
        if first > last || !(1..=5).contains(&bits) || !(1..=MAX_WEIGHT).contains(&least) {
            return Err(damaged("a distribution"));
        }
        let bits = u32::from(bits);
        let count = usize::from(last - first) + 1;
        let mut bytes = input.take((count * bits as usize).div_ceil(8))?.iter();
        let mut weights = [0; 256];
        let (mut held, mut filled) = (0u32, 0);
        for weight in &mut weights[usize::from(first)..=usize::from(last)] {
            if filled < bits {
                held |= u32::from(bytes.next().copied().unwrap_or(0)) << filled;
                filled += 8;
            }
            let number = (held & ((1 << bits) - 1)) as u8;
            held >>= bits;
            filled -= bits;
            if number > 0 {
                *weight = least - 1 + number;
            }
        }
        let impossible = weights.iter().any(|&w| w > MAX_WEIGHT);
        if impossible || weights[usize::from(first)] == 0 {
            return Err(damaged("a distribution"));
        }
        Ok(Self::of_weights(weights))
    }

    /// Codes `bytes`, all of which the model must know.
    pub(super) fn encode(&self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut states = [LEAST; STREAMS];
        let mut words: Vec<u16> = Vec::with_capacity(bytes.len() / 2);
        // What is read last is written first.
        for (i, &byte) in bytes.iter().enumerate().rev() {
            let (start, frequency) = self.range(byte);
            let state = &mut states[i % STREAMS];
            if u64::from(*state) >= u64::from(frequency) << (32 - BITS) {
                words.push(*state as u16);
                *state >>= 16;
            }
            *state = ((*state / frequency) << BITS) + *state % frequency + start;
        }
        out.extend((words.len() as u32).to_le_bytes());
        out.extend(states.iter().flat_map(|state| state.to_le_bytes()));
        out.extend(words.iter().rev().flat_map(|word| word.to_le_bytes()));
    }

    /// Fills `out` with what was coded.
    pub(super) fn decode(&self, input: &mut Input<'_>, out: &mut [u8]) -> Result<()> {
        let count = u32::from_le_bytes(*input.array()?) as usize;
        let mut states = [0; STREAMS];
        for state in &mut states {
            *state = u32::from_le_bytes(*input.array()?);
        }
        // A state takes at most one word a byte.
        if count > out.len() {
            return Err(damaged("a count of words"));
        }
        let mut words = numbers(input.take(2 * count)?, u16::from_le_bytes);
        // So that a step can look at as many as it may need.
        words.resize(count + STREAMS, 0);
        let table = self.table();
        let mut at = 0;
        let (steps, rest) = out.as_chunks_mut::<STREAMS>();
        for step in steps {
            at += step_of(&table, &mut states, words_at(&words, at)?, step);
        }
        at += step_of(&table, &mut states, words_at(&words, at)?, rest);
        if at != count || states != [LEAST; STREAMS] {
            return Err(damaged("coded bytes"));
        }
        Ok(())
    }

    /// For each of the 2¹² remainders of a state its byte, that byte's frequency less 1, and the place in its range.
    fn table(&self) -> Box<[u32; TOTAL]> {
        let mut table = Box::new([0; TOTAL]);
        for byte in 0..=255 {
            let (start, frequency) = self.range(byte);
            let own = table.iter_mut().skip(start as usize);
            for (slot, place) in own.zip(0..frequency) {
                *slot = u32::from(byte) | (frequency - 1) << 8 | place << 20;
            }
        }
        table
    }
}

fn words_at(words: &[u16], at: usize) -> Result<&[u16; STREAMS]> {
    let ahead = words.get(at..).and_then(|ahead| ahead.first_chunk());
    ahead.ok_or_else(|| damaged("coded bytes"))
}

/// Decodes a byte of each stream, or of the first ones; returns how many words it took.
#[inline(always)]
fn step_of(
    table: &[u32; TOTAL],
    states: &mut [u32; STREAMS],
    ahead: &[u16; STREAMS],
    out: &mut [u8],
) -> usize {
    let mut taken = 0;
    for (byte, state) in out.iter_mut().zip(states) {
        let slot = table[*state as usize % TOTAL];
        *byte = slot as u8;
        let frequency = (slot >> 8 & 0xfff) + 1;
        // Damaged states may be too large; the end tells.
        let next = frequency
            .wrapping_mul(*state >> BITS)
            .wrapping_add(slot >> 20);
        let refilled = next << 16 | u32::from(ahead[taken % STREAMS]);
        let low = next < LEAST;
        *state = if low { refilled } else { next };
        taken += usize::from(low);
    }
    taken
}
