//! Unsigned codes of a few bits each, packed.

/// A growing list of rows of codes; every row begins at a byte.
#[derive(Debug, Clone)]
pub(super) struct PackedRows {
    /// Number of bits a code.
    pub(super) bits: u32,
    /// Number of codes a row.
    pub(super) width: usize,
    bytes: Vec<u8>,
}

impl PackedRows {
    /// Makes an empty list of rows, each to have `width` codes of `bits` bits, 1 to 8.
    pub(super) fn new(bits: u32, width: usize) -> Self {
        Self {
            bits,
            width,
            bytes: Vec::new(),
        }
    }

    /// Number of rows.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() / row_bytes(self.bits, self.width)
    }

    /// Appends rows; bits of a code above its `bits` are dropped.
    pub(super) fn extend(&mut self, codes: &[u8]) {
        let row = row_bytes(self.bits, self.width);
        grow(&mut self.bytes, codes.len() / self.width * row, row);
        let mask = (1 << self.bits) - 1;
        for codes in codes.chunks_exact(self.width) {
            let (mut held, mut count) = (0u32, 0);
            for &code in codes {
                held |= (u32::from(code) & mask) << count;
                count += self.bits;
                if count >= 8 {
                    self.bytes.push(held as u8);
                    held >>= 8;
                    count -= 8;
                }
            }
            if count > 0 {
                self.bytes.push(held as u8);
            }
        }
    }

    /// Writes the codes of a row, as many as `codes` takes.
    pub(super) fn read(&self, row: usize, codes: &mut [u8]) {
        let each = row_bytes(self.bits, self.width);
        let mut bytes = self.bytes[row * each..(row + 1) * each].iter();
        let mask = (1 << self.bits) - 1;
        let (mut held, mut count) = (0u32, 0);
        for code in codes {
            if count < self.bits {
                held |= u32::from(bytes.next().copied().unwrap_or(0)) << count;
                count += 8;
            }
            *code = (held & mask) as u8;
            held >>= self.bits;
            count -= self.bits;
        }
    }

    /// Drops the `count` oldest rows.
    pub(super) fn drop_front(&mut self, count: usize) {
        let row = row_bytes(self.bits, self.width);
        self.bytes.drain(..count * row);
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.capacity()
    }
}

/// Bytes of a row of `width` codes.
pub(super) fn row_bytes(bits: u32, width: usize) -> usize {
    (bits as usize * width).div_ceil(8)
}

/// Makes room for `more` numbers, a few rows' at least, and otherwise a thirty-second: what is allocated is what the
/// cache weighs.
pub(super) fn grow<T>(numbers: &mut Vec<T>, more: usize, row: usize) {
    const ROWS: usize = 4;
    if numbers.capacity() - numbers.len() < more {
        numbers.reserve_exact(more.max(ROWS * row).max(numbers.len() / 32));
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn codes_come_back(
            (bits, width, codes) in (1u32..=8, 1usize..70)
                .prop_flat_map(|(bits, width)| {
                    let codes = vec(vec(0..=(255u8 >> (8 - bits)), width), 1..20);
                    (Just(bits), Just(width), codes)
                }),
            dropped in 0usize..20,
        ) {
            let mut rows = PackedRows::new(bits, width);
            let (first, rest) = codes.split_at(codes.len() / 2);
            rows.extend(&first.concat());
            for row in rest {
                rows.extend(row);
            }
            let dropped = dropped.min(codes.len());
            rows.drop_front(dropped);
            prop_assert_eq!(rows.len(), codes.len() - dropped);
            let mut out = vec![0; width];
            for (row, codes) in codes[dropped..].iter().enumerate() {
                rows.read(row, &mut out);
                prop_assert_eq!(&out, codes);
            }
        }

        #[test]
        fn storage_grows_by_little(width in 1usize..200, bits in 1u32..=8, count in 1usize..400) {
            let mut rows = PackedRows::new(bits, width);
            for _ in 0..count {
                rows.extend(&vec![0; width]);
            }
            let row = row_bytes(bits, width);
            prop_assert!(rows.bytes() <= count * row + (count * row / 32).max(4 * row));
        }
    }
}
