//! Reading and writing of a learner's saved state, little-endian numbers.

use super::LearnError;
use crate::{Error, Result};

#[derive(Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn number(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    pub(super) fn floats(&mut self, numbers: &[f32]) {
        self.0.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
    }

    pub(super) fn counts(&mut self, numbers: &[u32]) {
        self.0.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
    }
}

pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl Reader<'_> {
    pub(super) fn number(&mut self) -> Result<u64> {
        let (number, rest) = self.0.split_first_chunk().ok_or_else(damaged)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*number))
    }

    pub(super) fn floats(&mut self, count: usize) -> Result<Vec<f32>> {
        Ok(self.words(count)?.map(f32::from_le_bytes).collect())
    }

    pub(super) fn counts(&mut self, count: usize) -> Result<Vec<u32>> {
        Ok(self.words(count)?.map(u32::from_le_bytes).collect())
    }

    fn words(&mut self, count: usize) -> Result<impl Iterator<Item = [u8; 4]>> {
        let bytes = count.checked_mul(4).ok_or_else(damaged)?;
        let (words, rest) = self.0.split_at_checked(bytes).ok_or_else(damaged)?;
        self.0 = rest;
        Ok(words.as_chunks().0.iter().copied())
    }
}

pub(super) fn damaged() -> Error {
    Error::Learn(LearnError::State)
}
