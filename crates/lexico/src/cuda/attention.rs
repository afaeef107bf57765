use half::f16;

use super::codes::format_number;
use super::device::{Argument, CODES, COMMON, Device, Grid, PAIR, Program, check_shared, upload};
use super::means::DeviceMeans;
use super::pair::{DevicePast, describe};
use crate::codes::CodeFormat;
use crate::dictionary::{Atoms, HeadMaps};
use crate::{Error, Result};

const THREADS: u32 = 256;
/// Atoms of a block of `project`, and its threads.
const PROJECTED: usize = 64;
const PROJECT_THREADS: u32 = 128;
/// Positions that a part of the context has at the least.
const LEAST_PART: usize = 1024;
/// Atoms that a block of `combine` sums.
const COMBINED: usize = 256;
/// Blocks along y that a grid can have.
const MAX_PAIRS: usize = 65_535;
/// Blocks along y that share a block's atoms.
const PROJECT_BLOCKS: usize = 16;

/// Attention of one new position of many sequences over codes and dense windows in a device's memory.
///
/// `p`, and the sums of codes, take part as on the CPU (see [`attend_heads`](crate::attention::attend_heads)); `p` is rounded to halves.
pub struct DeviceAttention<D: Device> {
    program: Program,
    /// `[N, m]`, halves.
    pub(super) key_atoms: D::Memory,
    pub(super) value_atoms: D::Memory,
    /// What coded keys are without.
    pub(super) means: Option<DeviceMeans<D>>,
    key_count: usize,
    value_count: usize,
    head_dim: usize,
    group: usize,
    /// The codes' format as kernels name it.
    pub(super) format: usize,
}

impl<D: Device> DeviceAttention<D> {
    /// Attention of `group` queries a KV head over codes of this format, over these atoms, which are rounded to halves.
    ///
    /// # Errors
    /// [`Error::Device`] where the head dim is no multiple of 16, the group is none of 1 to 8, the format is not for devices, or memory
    /// does not suffice.
    pub fn new(
        device: &D,
        format: impl Into<CodeFormat>,
        key_atoms: Atoms<'_>,
        value_atoms: Atoms<'_>,
        group: usize,
    ) -> Result<Self> {
        Self::behind(device, format, key_atoms, value_atoms, group, None)
    }

    /// The same where keys are coded behind these maps.
    ///
    /// # Errors
    /// Those of [`DeviceAttention::new`].
    pub(super) fn behind(
        device: &D,
        format: impl Into<CodeFormat>,
        key_atoms: Atoms<'_>,
        value_atoms: Atoms<'_>,
        group: usize,
        maps: Option<&HeadMaps>,
    ) -> Result<Self> {
        let format = format_number(format.into())?;
        let head_dim = key_atoms.head_dim();
        if !head_dim.is_multiple_of(16) || !(1..=8).contains(&group) {
            return Err(Error::Device(format!(
                "attention of groups of {group} queries of {head_dim} numbers; possible are 1 to 8 of a multiple of 16"
            )));
        }
        let summed = value_atoms.len() * group * size_of::<i32>();
        check_shared(device, summed, "attention")?;
        let scored = key_atoms.len() * group * size_of::<f16>();
        check_shared(device, scored, "attention")?;
        let halves = |atoms: Atoms<'_>| {
            let numbers = atoms.numbers();
            let halves = numbers.iter().map(|&x| f16::from_f32(x));
            upload(device, halves.flat_map(f16::to_le_bytes))
        };
        let means = maps.map(|maps| DeviceMeans::new(device, maps, group, format));
        let means = means.transpose()?.flatten();
        Ok(Self {
            program: Program {
                name: "attention",
                parts: &[COMMON, CODES, PAIR, include_str!("kernels/attention.cu")],
                constants: vec![
                    ("M", head_dim),
                    ("G", group),
                    ("FORMAT", format),
                    ("MEANS", usize::from(means.is_some())),
                ],
            },
            means,
            key_atoms: halves(key_atoms)?,
            value_atoms: halves(value_atoms)?,
            key_count: key_atoms.len(),
            value_count: value_atoms.len(),
            head_dim,
            group,
            format,
        })
    }

    /// Attends with `queries` `[pairs, G, m]` in f32, scaled by `1/√m`; `out` is of their shape. Both are addresses of the device's
    /// memory, and all that is written stays there.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Panics
    /// Where a sequence's keys and values differ in number.
    ///
    /// # Safety
    /// As many numbers must be at both addresses, and windows where they are said to be, until the device has done this.
    pub unsafe fn attend(
        &self,
        device: &D,
        pasts: &[DevicePast<'_, D>],
        queries: u64,
        out: u64,
    ) -> Result<()> {
        let pairs = pasts.len();
        if pairs == 0 {
            return Ok(());
        }
        if pairs > MAX_PAIRS {
            let reason =
                format!("attention of {pairs} KV heads at once; at most {MAX_PAIRS} are possible");
            return Err(Error::Device(reason));
        }
        let coded = pasts.iter().map(|past| past.keys.len - past.hidden);
        let longest = coded.max().unwrap_or(0);
        let room = pasts.iter().map(DevicePast::positions).max();
        let room = room.unwrap_or(0).max(1);
        let parts = (device.blocks() as usize).div_ceil(pairs);
        let parts = parts.clamp(1, longest.div_ceil(LEAST_PART).max(1));
        let slices = self.value_count.div_ceil(COMBINED);
        let (m, g) = (self.head_dim, self.group);
        let described = upload(device, describe(pasts))?;
        let allocate = |numbers: usize| device.allocate(numbers * size_of::<f32>());
        let products = allocate((pairs * self.key_count * g).div_ceil(2))?;
        let scores = allocate(pairs * room * g)?;
        let maxima = allocate(pairs * (parts + 1) * g)?;
        let accumulated = allocate(parts * pairs * g * self.value_count)?;
        let totals = allocate(parts * pairs * g)?;
        let outputs = allocate(slices * pairs * g * m)?;
        let (at, int) = (Argument::of::<D>, Argument::int);
        // Those of every kernel, `ARGUMENTS` in kernels/attention.cu.
        let arguments = [
            at(&described),
            int(pairs),
            at(&self.key_atoms),
            int(self.key_count),
            at(&self.value_atoms),
            int(self.value_count),
            Argument::Address(queries),
            at(&products),
            at(&scores),
            int(room),
            at(&maxima),
            int(parts),
            at(&accumulated),
            at(&totals),
            int(COMBINED),
            int(slices),
            at(&outputs),
            Argument::Address(out),
        ];
        if let Some(means) = &self.means {
            // SAFETY: there is room for the scores; the rest is the caller's.
            unsafe {
                means.offset(device, &described, pairs, longest, queries, room, &scores)?;
            }
        }
        let projected = self.key_count.div_ceil(PROJECTED);
        let columns = (pairs * g).div_ceil(8).min(PROJECT_BLOCKS);
        let key_products = self.key_count * g * size_of::<f16>();
        let value_sums = self.value_count * g * size_of::<i32>();
        let combined = g * COMBINED * size_of::<f32>();
        for (kernel, blocks, threads, shared) in [
            ("project", [projected, columns], PROJECT_THREADS, 0),
            ("score", [parts + 1, pairs], THREADS, key_products),
            ("accumulate", [parts, pairs], THREADS, value_sums),
            ("combine", [slices, pairs], m as u32, combined),
            ("finish", [pairs, 1], m as u32, 0),
        ] {
            let grid = Grid {
                blocks: blocks.map(|b| b as u32),
                threads,
                shared,
            };
            // SAFETY: the kernels have room for what they write; the rest is the caller's.
            unsafe { device.launch(&self.program, kernel, grid, &arguments)? };
        }
        Ok(())
    }
}
