use crate::{Error, Result};

/// Bytes that are read from first to last, each piece only where it is there.
pub(super) struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let split = self.rest.split_at_checked(count);
        let (taken, rest) = split.ok_or_else(|| damaged("its length"))?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N]> {
        let split = self.rest.split_first_chunk();
        let (taken, rest) = split.ok_or_else(|| damaged("its length"))?;
        self.rest = rest;
        Ok(taken)
    }

    /// The bytes that are not read yet.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Refuses what nothing has read.
    pub(super) fn end(self) -> Result<()> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(damaged("its length"))
        }
    }
}

/// The error that a part of a block cannot be what was written.
pub(super) fn damaged(part: &str) -> Error {
    Error::Stored(format!("the block is damaged: {part} cannot be right"))
}
