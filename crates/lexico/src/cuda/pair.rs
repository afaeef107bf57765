use super::codes::DeviceCodes;
use super::device::Device;

/// Keys and values of one KV head of one sequence: codes, and dense rows, the first of which may be of the first positions.
pub struct DevicePast<'a, D: Device> {
    /// Codes of the keys.
    pub keys: &'a DeviceCodes<D>,
    /// Codes of the values, as many.
    pub values: &'a DeviceCodes<D>,
    /// The number of the oldest codes that are not seen.
    pub hidden: usize,
    /// The position of the first code.
    pub first: usize,
    /// The first and the newest positions.
    pub window: DeviceRows,
}

/// Dense keys and values of one KV head, halves: some rows of rings `[room, m]`, and of the rows of first positions that lie behind
/// each.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRows {
    /// Address of the keys' ring.
    pub keys: u64,
    /// Address of the values' ring.
    pub values: u64,
    /// Rows of a ring, at least 1.
    pub room: usize,
    /// The first row of the ring's.
    pub start: usize,
    /// The number of rows, those of first positions included; the ring's go on at its beginning where they reach its end.
    pub len: usize,
    /// How many of them are rows of first positions, before the ring's.
    pub sinks: usize,
    /// The first of those, counted from the ring's end.
    pub first_sink: usize,
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
        let mut bytes = Vec::with_capacity(80);
        bytes.extend(self.keys.head());
        bytes.extend(self.values.head());
        for number in [self.keys.len, self.hidden] {
            bytes.extend((number as i32).to_le_bytes());
        }
        let window = &self.window;
        bytes.extend(window.keys.to_le_bytes());
        bytes.extend(window.values.to_le_bytes());
        let sinks = [window.sinks, window.first_sink, self.first];
        for number in [window.room, window.start, window.len]
            .into_iter()
            .chain(sinks)
        {
            bytes.extend((number as i32).to_le_bytes());
        }
        bytes
    }
}

/// The bytes that kernels read of pairs.
pub(super) fn describe<D: Device>(pasts: &[DevicePast<'_, D>]) -> Vec<u8> {
    pasts.iter().flat_map(DevicePast::described).collect()
}
