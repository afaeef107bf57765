use half::f16;

use super::codes::format_number;
use super::device::{Argument, COMMON, Device, Grid, Program, check_shared, upload};
use super::pair::{DevicePast, describe};
use crate::codes::CodeFormat;
use crate::dictionary::Atoms;
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
    key_atoms: D::Memory,
    value_atoms: D::Memory,
    key_count: usize,
    value_count: usize,
    head_dim: usize,
    group: usize,
    format: usize,
}

impl<D: Device> DeviceAttention<D> {
    /// Attention of `group` queries a KV head over codes of this format, over these atoms, which are rounded to halves.
    ///
    /// # Errors
    /// [`Error::Device`] where the head dim is no multiple of 16, the group is none of 1 to 8, the format is not for devices, or memory
    /// does not suffice.
    pub fn new(
        device: &D,
        format: CodeFormat,
        key_atoms: Atoms<'_>,
        value_atoms: Atoms<'_>,
        group: usize,
    ) -> Result<Self> {
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
            let mut bytes = Vec::new();
            for (_, atoms) in atoms.matrices() {
                bytes.extend(atoms.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()));
            }
            upload(device, &bytes)
        };
        Ok(Self {
            program: Program {
                name: "attention",
                parts: &[
                    COMMON,
                    include_str!("kernels/codes.cuh"),
                    include_str!("kernels/pair.cuh"),
                    include_str!("kernels/attention.cu"),
                ],
                constants: vec![
                    ("M", head_dim),
                    ("G", group),
                    ("FORMAT", format_number(format)?),
                ],
            },
            key_atoms: halves(key_atoms)?,
            value_atoms: halves(value_atoms)?,
            key_count: key_atoms.len(),
            value_count: value_atoms.len(),
            head_dim,
            group,
            format: format_number(format)?,
        })
    }

    /// Atoms of keys and values, `[N, m]`, halves.
    pub(super) fn atoms(&self) -> [&D::Memory; 2] {
        [&self.key_atoms, &self.value_atoms]
    }

    /// How kernels name the codes' format.
    pub(super) fn format_number(&self) -> usize {
        self.format
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
        let coded = pasts.iter().map(|past| past.keys.len() - past.hidden);
        let longest = coded.max().unwrap_or(0);
        let room = pasts.iter().map(DevicePast::positions).max();
        let room = room.unwrap_or(0).max(1);
        let parts = (device.blocks() as usize).div_ceil(pairs);
        let parts = parts.clamp(1, longest.div_ceil(LEAST_PART).max(1));
        let slices = self.value_count.div_ceil(COMBINED);
        let (m, g) = (self.head_dim, self.group);
        let described = upload(device, &describe(pasts))?;
        let allocate = |numbers: usize| device.allocate(numbers * size_of::<f32>());
        let products = allocate((pairs * self.key_count * g).div_ceil(2))?;
        let scores = allocate(pairs * room * g)?;
        let maxima = allocate(pairs * (parts + 1) * g)?;
        let accumulated = allocate(parts * pairs * g * self.value_count)?;
        let totals = allocate(parts * pairs * g)?;
        let outputs = allocate(slices * pairs * g * m)?;
        let at = |memory: &D::Memory| Argument::Address(D::address(memory));
        let int = |number: usize| Argument::Integer(number as i32);
        let launch = |kernel, blocks: [usize; 2], threads, shared, arguments: &[Argument]| {
            let grid = Grid {
                blocks: blocks.map(|b| b as u32),
                threads,
                shared,
            };
            // SAFETY: the arguments below are those of the kernels in kernels/attention.cu, with room for what they write; the rest is
            // the caller's.
            unsafe { device.launch(&self.program, kernel, grid, arguments) }
        };
        let columns = (pairs * g).div_ceil(8).min(PROJECT_BLOCKS);
        launch(
            "project",
            [self.key_count.div_ceil(PROJECTED), columns],
            PROJECT_THREADS,
            0,
            &[
                at(&self.key_atoms),
                int(self.key_count),
                Argument::Address(queries),
                int(pairs),
                at(&products),
            ],
        )?;
        launch(
            "score",
            [parts + 1, pairs],
            THREADS,
            self.key_count * g * size_of::<f16>(),
            &[
                at(&described),
                at(&products),
                int(self.key_count),
                Argument::Address(queries),
                at(&scores),
                int(room),
                at(&maxima),
            ],
        )?;
        launch(
            "accumulate",
            [parts, pairs],
            THREADS,
            self.value_count * g * size_of::<i32>(),
            &[
                at(&described),
                int(self.value_count),
                at(&scores),
                int(room),
                at(&maxima),
                at(&accumulated),
                at(&totals),
            ],
        )?;
        launch(
            "combine",
            [slices, pairs],
            m as u32,
            g * COMBINED * size_of::<f32>(),
            &[
                at(&self.value_atoms),
                int(self.value_count),
                at(&accumulated),
                int(parts),
                int(COMBINED),
                at(&outputs),
            ],
        )?;
        launch(
            "finish",
            [pairs, 1],
            m as u32,
            0,
            &[
                at(&described),
                at(&scores),
                int(room),
                at(&maxima),
                at(&totals),
                int(parts),
                at(&outputs),
                int(slices),
                Argument::Address(out),
            ],
        )
    }
}
