use super::device::{Argument, CODES, COMMON, Device, Grid, PAIR, Program, upload};
use crate::Result;
use crate::dictionary::{HeadMaps, RotaryMeans};

/// Blocks along x at the most, each of which goes through rows or positions in strides.
const MAX_BLOCKS: usize = 4096;

/// Means of keys before their rotary embedding on a device; see [`RotaryMeans`].
pub(super) struct DeviceMeans<D: Device> {
    program: Program,
    /// `[pairs]`, f64.
    frequencies: D::Memory,
    /// `[heads, 2·pairs, m]`, f32.
    directions: D::Memory,
    /// `[2·fast, BLOCK]`, f32.
    within: D::Memory,
    pairs: usize,
    group: usize,
    head_dim: usize,
}

impl<D: Device> DeviceMeans<D> {
    /// Those of maps of keys, if they have any; `group` query heads share a KV head, `format` is that of codes as kernels
    /// name it.
    pub(super) fn new(
        device: &D,
        maps: &HeadMaps,
        group: usize,
        format: usize,
    ) -> Result<Option<Self>> {
        let Some(means) = maps.rotary_means() else {
            return Ok(None);
        };
        let frequencies = means.frequencies_in_order();
        let pairs = frequencies.len();
        let numbers =
            |numbers: &[f32]| upload(device, numbers.iter().flat_map(|x| x.to_le_bytes()));
        let directions: Vec<f32> = maps.directions().flatten().copied().collect();
        let fast = means.within().len() / (2 * RotaryMeans::BLOCK);
        Ok(Some(Self {
            program: Program {
                name: "means",
                parts: &[COMMON, CODES, PAIR, include_str!("kernels/means.cu")],
                constants: vec![
                    ("M", maps.head_dim()),
                    ("FORMAT", format),
                    ("G", group),
                    ("HEADS", maps.heads()),
                    ("PAIRS", pairs),
                    ("FAST", fast),
                ],
            },
            frequencies: upload(
                device,
                frequencies.iter().flat_map(|x| f64::from(*x).to_le_bytes()),
            )?,
            directions: numbers(&directions)?,
            within: numbers(means.within())?,
            pairs,
            group,
            head_dim: maps.head_dim(),
        }))
    }

    /// Adds `sign` times their means to rows `first` to `first + coded` of keys `[pairs, count, m]`, the first of which is `position`
    /// after that of each pair's first code; `described` says what these are.
    ///
    /// # Safety
    /// As many numbers must be at the address of `keys`, of as many `pasts` as are described.
    #[allow(clippy::too_many_arguments)] // those of the kernel
    pub(super) unsafe fn add(
        &self,
        device: &D,
        described: &D::Memory,
        pasts: usize,
        [count, first, coded, position]: [usize; 4],
        sign: i32,
        keys: u64,
    ) -> Result<()> {
        if coded == 0 || pasts == 0 {
            return Ok(());
        }
        let arguments = [
            Argument::of::<D>(described),
            Argument::of::<D>(&self.frequencies),
            Argument::of::<D>(&self.directions),
            Argument::int(count),
            Argument::int(first),
            Argument::int(coded),
            Argument::int(position),
            Argument::Integer(sign),
            Argument::Address(keys),
        ];
        let grid = self.grid(coded, pasts, self.head_dim);
        // SAFETY: the arguments are those of `add_means` in kernels/means.cu; the keys are the caller's.
        unsafe { device.launch(&self.program, "add_means", grid, &arguments) }
    }

    /// Writes what the means add to the scores of codes that are seen, up to `longest` of a pair, to `scores` `[pairs, room, G]`; `queries`
    /// `[pairs, G, m]` is an address.
    ///
    /// # Safety
    /// As many numbers must be there, of as many `pasts` as are described.
    #[allow(clippy::too_many_arguments)] // those of the kernels
    pub(super) unsafe fn offset(
        &self,
        device: &D,
        described: &D::Memory,
        pasts: usize,
        longest: usize,
        queries: u64,
        room: usize,
        scores: &D::Memory,
    ) -> Result<()> {
        let products = 2 * self.pairs * self.group;
        let products = device.allocate(pasts * products * size_of::<f32>())?;
        let at = Argument::of::<D>;
        let projection = [
            at(&self.directions),
            Argument::Address(queries),
            at(&products),
        ];
        let grid = self.grid(1, pasts, self.head_dim);
        // SAFETY: the arguments are those of `project_means` in kernels/means.cu; the rest is the caller's.
        unsafe { device.launch(&self.program, "project_means", grid, &projection)? };
        let arguments = [
            at(described),
            at(&self.frequencies),
            at(&self.within),
            at(&products),
            Argument::int(room),
            at(scores),
        ];
        let blocks = longest.div_ceil(RotaryMeans::BLOCK) + 1;
        let grid = self.grid(blocks, pasts, RotaryMeans::BLOCK);
        // SAFETY: as above, of `offset`.
        unsafe { device.launch(&self.program, "offset", grid, &arguments) }
    }

    fn grid(&self, rows: usize, pairs: usize, threads: usize) -> Grid {
        Grid {
            blocks: [rows.min(MAX_BLOCKS) as u32, pairs as u32],
            threads: threads as u32,
            shared: 0,
        }
    }
}
