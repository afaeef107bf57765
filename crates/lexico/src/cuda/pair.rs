use super::codes::DeviceCodes;
use super::device::Device;

/// Keys and values of one KV head of one sequence: codes, and dense rows after them.
pub struct DevicePast<'a, D: Device> {
    /// Codes of the keys.
    pub keys: &'a DeviceCodes<D>,
    /// Codes of the values, as many.
    pub values: &'a DeviceCodes<D>,
    /// The number of the oldest codes that are not seen.
    pub hidden: usize,
    /// The newest positions.
    pub window: DeviceRows,
}

/// Dense keys and values of one KV head, halves: some rows of rings `[room, m]`.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRows {
    /// Address of the keys' ring.
    pub keys: u64,
    /// Address of the values' ring.
    pub values: u64,
    /// Rows of a ring, at least 1.
    pub room: usize,
    /// The first row.
    pub start: usize,
    /// The number of rows, which go on at the ring's beginning where they reach its end.
    pub len: usize,
}

impl<D: Device> DevicePast<'_, D> {
    /// Positions that are seen.
    pub(super) fn positions(&self) -> usize {
        self.keys.len - self.hidden + self.window.len
    }

    /// `Pair` in kernels/pair.cuh.
    ///
    /// # Panics
    /// Where keys and values differ in number, or more are hidden than there are.
    fn described(&self) -> Vec<u8> {
        assert_eq!(self.keys.len, self.values.len, "one value a key");
        assert!(self.hidden <= self.keys.len, "codes to be hidden");
        let mut bytes = Vec::with_capacity(72);
        bytes.extend(self.keys.head());
        bytes.extend(self.values.head());
        for number in [self.keys.len, self.hidden] {
            bytes.extend((number as i32).to_le_bytes());
        }
        let window = &self.window;
        bytes.extend(window.keys.to_le_bytes());
        bytes.extend(window.values.to_le_bytes());
        for number in [window.room, window.start, window.len, 0] {
            bytes.extend((number as i32).to_le_bytes());
        }
        bytes
    }
}

/// The bytes that kernels read of pairs.
pub(super) fn describe<D: Device>(pasts: &[DevicePast<'_, D>]) -> Vec<u8> {
    pasts.iter().flat_map(DevicePast::described).collect()
}
