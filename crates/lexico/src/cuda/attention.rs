use half::f16;

use super::codes::{DeviceCodes, format_number};
use super::device::{Argument, COMMON, Device, Grid, Program, upload};
use crate::code::CodeFormat;
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
/// Blocks along y that share a block's atoms.
const PROJECT_BLOCKS: usize = 16;

/// Attention of one new position of many sequences over codes and dense windows in a device's memory.
///
/// `p`, and the sums of codes, take part as on the CPU (see [`attend_heads`](crate::attention::attend_heads)); `p` is rounded to halves.
pub struct DeviceAttention<'d, D: Device> {
    device: &'d D,
    program: Program,
    /// `[N, m]`, halves.
    key_atoms: D::Memory,
    value_atoms: D::Memory,
    key_count: usize,
    value_count: usize,
    head_dim: usize,
    group: usize,
}

/// What one KV head of one sequence attends to.
pub struct DevicePast<'a, D: Device> {
    /// Codes of the keys.
    pub keys: &'a DeviceCodes<D>,
    /// Codes of the values, as many.
    pub values: &'a DeviceCodes<D>,
    /// Dense keys and values after them, halves, `[window, m]` each.
    pub window: Option<(&'a D::Memory, &'a D::Memory)>,
    /// Dense positions.
    pub window_len: usize,
}

impl<'d, D: Device> DeviceAttention<'d, D> {
    /// Attention of `group` queries a KV head over codes of this format, over these atoms, which are rounded to halves.
    ///
    /// # Errors
    /// [`Error::Device`] where the head dim is no multiple of 16, the group none of 1, 2, 4 and 8, the format is not for
    /// devices, or memory does not suffice.
    pub fn new(
        device: &'d D,
        format: CodeFormat,
        key_atoms: Atoms<'_>,
        value_atoms: Atoms<'_>,
        group: usize,
    ) -> Result<Self> {
        let head_dim = key_atoms.head_dim();
        if !head_dim.is_multiple_of(16) || !matches!(group, 1 | 2 | 4 | 8) {
            return Err(Error::Device(format!(
                "attention of groups of {group} queries of {head_dim} numbers; possible are 1, 2, 4 or 8 of a multiple of 16"
            )));
        }
        let halves = |atoms: Atoms<'_>| {
            let mut bytes = Vec::new();
            for (_, atoms) in atoms.matrices() {
                bytes.extend(atoms.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()));
            }
            upload(device, &bytes)
        };
        Ok(Self {
            device,
            program: Program {
                name: "attention",
                parts: &[
                    COMMON,
                    include_str!("kernels/codes.cuh"),
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
        })
    }

    /// Attends with `queries` `[pairs, G, m]` in f32, scaled by `1/√m`; `out` is of their shape. All that is written stays on the
    /// device.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Panics
    /// Where a sequence's keys and values differ in number.
    pub fn attend(
        &self,
        pasts: &[DevicePast<'_, D>],
        queries: &D::Memory,
        out: &mut D::Memory,
    ) -> Result<()> {
        let (device, pairs) = (self.device, pasts.len());
        if pairs == 0 {
            return Ok(());
        }
        let longest = pasts.iter().map(|past| past.keys.len()).max().unwrap_or(0);
        let room = pasts
            .iter()
            .map(|past| past.keys.len() + past.window_len)
            .max()
            .unwrap_or(0)
            .max(1);
        let parts = (device.blocks() as usize).div_ceil(pairs);
        let parts = parts.clamp(1, longest.div_ceil(LEAST_PART).max(1));
        let slices = self.value_count.div_ceil(COMBINED);
        let (m, g) = (self.head_dim, self.group);
        let described: Vec<u8> = pasts.iter().flat_map(pair).collect();
        let described = upload(device, &described)?;
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
            // SAFETY: the arguments below are those of the kernels in kernels/attention.cu, with room for what they write.
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
                at(queries),
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
                at(queries),
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
                at(out),
            ],
        )?;
        // What the kernels read must outlive them.
        device.finish()
    }
}

/// `Pair` in attention.cu.
fn pair<D: Device>(past: &DevicePast<'_, D>) -> Vec<u8> {
    assert_eq!(past.keys.len(), past.values.len(), "one value a key");
    let [keys, values] = match past.window {
        Some((keys, values)) => [D::address(keys), D::address(values)],
        None => [0, 0],
    };
    let mut bytes = Vec::with_capacity(64);
    bytes.extend(past.keys.head());
    bytes.extend(past.values.head());
    // Addresses begin at multiples of eight bytes.
    bytes.extend((past.keys.len() as u64).to_le_bytes());
    bytes.extend(keys.to_le_bytes());
    bytes.extend(values.to_le_bytes());
    bytes.extend((past.window_len as u64).to_le_bytes());
    bytes
}
