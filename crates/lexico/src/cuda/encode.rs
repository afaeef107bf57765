use half::f16;
use half::slice::HalfFloatSliceExt;

use super::device::{Argument, COMMON, Device, Grid, Program, Streams, check_shared, upload};
use crate::dictionary::{Atoms, Codebooks};
use crate::encode::{Fit, vectors_per_head};
use crate::{Dictionary, Error, Result};

/// Vectors that a block of pursuit codes side by side; `ROWS` in pursuit.cu.
const ROWS: usize = 64;
/// Vectors that a block of beam search codes side by side; `VECTORS` in beam.cu.
const VECTORS: usize = 8;
/// Sums that are followed for every vector; `BEAM_WIDTH` in beam.cu.
pub const DEVICE_BEAM: usize = 8;
const THREADS: u32 = 128;
/// Atoms in shared memory at a time; `TILE` in pursuit.cu and beam.cu.
const TILE: usize = 64;

/// [`Pursuit`](crate::Pursuit) or [`BeamSearch`](crate::encode::BeamSearch) on a device.
///
/// Pursuit chooses atoms by products of halves, summed in f32; their coefficients are those of least squares in f32.
/// Beam search follows [`DEVICE_BEAM`] sums of every vector. Sums are compared by products of halves, summed in f32;
/// what is left of vectors is f32.
pub struct DeviceEncoder<D: Device> {
    program: Program,
    search: Search<D>,
    /// `[N, padded]`, halves.
    atoms: D::Memory,
    /// The head dim filled up to a multiple of 16.
    padded: usize,
    max: usize,
}

enum Search<D: Device> {
    Pursuit {
        atoms: usize,
    },
    Beam {
        half_squares: D::Memory,
        first: usize,
    },
}

/// Codes that were found on a device, and lie there.
pub struct FoundCodes<D: Device> {
    pub(super) count: usize,
    pub(super) max: usize,
    /// The fit of additive codes or coefficients.
    pub(super) fit: Fit,
    /// Atoms of each vector, `[n, max]`, u16: of additive codes by their numbers in their codebooks.
    pub indices: D::Memory,
    /// Coefficients of the atoms, `[n, max]`, f32; of additive codes the numbers of the vectors' scales, `[n]`, u8.
    pub coefficients: D::Memory,
    /// Number of each vector's atoms, `[n]`, u8; nothing for additive codes.
    pub lengths: D::Memory,
    /// `‖x − x̂‖ / ‖x‖`, of additive codes before they are scaled, `[n]`, f32.
    pub errors: D::Memory,
    /// Bytes of device memory.
    pub(super) bytes: usize,
    /// Memory that the kernel needs beside, as long as it runs.
    pub(super) used: Vec<D::Memory>,
}

impl<D: Device> Search<D> {
    /// Vectors that a block codes side by side.
    fn vectors(&self) -> usize {
        match self {
            Self::Pursuit { .. } => ROWS,
            Self::Beam { .. } => VECTORS,
        }
    }

    /// Bytes of shared memory that a block takes.
    fn shared(&self, padded: usize, max: usize) -> usize {
        let tiles = 2 * TILE * (padded + 8) * size_of::<u16>();
        tiles
            + match self {
                Self::Pursuit { .. } => ROWS * (padded + max + 2) * size_of::<f32>(),
                Self::Beam { .. } => {
                    let sum = padded * size_of::<f32>() + max * size_of::<u16>();
                    2 * TILE * size_of::<f32>() + VECTORS * DEVICE_BEAM * sum
                }
            }
    }
}

impl<D: Device> DeviceEncoder<D> {
    /// Pursuit of at most `max` nonzeros over the dictionary, whose atoms are rounded to halves.
    ///
    /// # Errors
    /// [`Error::Sparsity`] as for [`Pursuit::new`](crate::Pursuit::new); [`Error::Device`] for more than 255 nonzeros,
    /// or where the device's memory does not suffice.
    pub fn pursuit(device: &D, dictionary: &Dictionary, max: usize) -> Result<Self> {
        dictionary.check_sparsity(max)?;
        if max > usize::from(u8::MAX) {
            let reason = format!("codes of {max} nonzeros; at most 255 are possible on a device");
            return Err(Error::Device(reason));
        }
        let (halves, padded) = padded_halves(dictionary.into());
        let atoms = dictionary.len();
        Self::new(device, &halves, padded, max, Search::Pursuit { atoms })
    }

    /// Beam search for codes of up to `max` atoms over the codebooks, which are rounded to halves.
    ///
    /// # Errors
    /// [`Error::Codebooks`] unless `1 ≤ max ≤` the number of codebooks; [`Error::Device`] where the device's memory
    /// does not suffice.
    pub fn beam_search(device: &D, codebooks: &Codebooks, max: usize) -> Result<Self> {
        codebooks.check_sparsity(max)?;
        let (halves, padded) = padded_halves(codebooks.into());
        let half_squares = halves.chunks_exact(padded).flat_map(|atom| {
            let squares = atom.iter().map(|x| f64::from(*x).powi(2));
            ((0.5 * squares.sum::<f64>()) as f32).to_le_bytes()
        });
        let search = Search::Beam {
            half_squares: upload(device, half_squares)?,
            first: codebooks.sizes().first,
        };
        Self::new(device, &halves, padded, max, search)
    }

    fn new(
        device: &D,
        atoms: &[f16],
        padded: usize,
        max: usize,
        search: Search<D>,
    ) -> Result<Self> {
        check_shared(device, search.shared(padded, max), "the search")?;
        let (name, parts) = match search {
            Search::Pursuit { .. } => ("pursuit", &[COMMON, include_str!("kernels/pursuit.cu")]),
            Search::Beam { .. } => ("beam", &[COMMON, include_str!("kernels/beam.cu")]),
        };
        Ok(Self {
            program: Program {
                name,
                parts,
                constants: vec![("M", padded)],
            },
            search,
            atoms: upload(device, atoms.iter().flat_map(|x| x.to_le_bytes()))?,
            padded,
            max,
        })
    }

    /// Codes the vectors of several heads, `[heads, n, padded]` with the head dim filled up to a multiple of 16, those of each with
    /// its own of `sparsities`, or at most as many. What was found is there once the main stream has waited for the other.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Panics
    /// Where a sparsity is 0 or above the maximum, or the vectors are not as many for each head.
    pub fn encode_heads(
        &self,
        streams: &Streams<D>,
        vectors: &D::Memory,
        count: usize,
        sparsities: &[usize],
        fit: Fit,
    ) -> Result<FoundCodes<D>> {
        let each = vectors_per_head(count, sparsities, self.max);
        if i32::try_from(count).is_err() {
            let reason = format!("{count} vectors at once; less than 2³¹ are possible");
            return Err(Error::Device(reason));
        }
        let device = &streams.main;
        let blocks = count.div_ceil(self.search.vectors()) as u32;
        let blocks = blocks.min(device.blocks());
        let lengths = sparsities.iter().flat_map(|&s| (s as i32).to_le_bytes());
        let mut used = vec![upload(device, lengths)?];
        let mut bytes_of_vector = self.max * size_of::<u16>() + size_of::<f32>();
        let [coefficients, lengths] = match self.search {
            Search::Pursuit { .. } => {
                // Orthonormal bases of the vectors that are being coded, and how atoms are made of them.
                let numbers = blocks as usize * ROWS * self.max * size_of::<f32>();
                used.push(device.allocate(numbers * self.padded)?);
                used.push(device.allocate(numbers * self.max)?);
                [self.max * size_of::<f32>(), 1]
            }
            Search::Beam { .. } => [1, 0],
        };
        bytes_of_vector += coefficients + lengths;
        let found = FoundCodes {
            count,
            max: self.max,
            fit,
            indices: device.allocate(count * self.max * size_of::<u16>())?,
            coefficients: device.allocate(count * coefficients)?,
            lengths: device.allocate(count * lengths)?,
            errors: device.allocate(count * size_of::<f32>())?,
            bytes: count * bytes_of_vector,
            used,
        };
        if count == 0 {
            return Ok(found);
        }
        streams.background.wait_for(device)?;
        let at = Argument::of::<D>;
        let mut arguments = vec![
            at(vectors),
            Argument::int(count),
            Argument::int(each),
            at(&found.used[0]),
            Argument::int(self.max),
            at(&self.atoms),
            at(&found.indices),
            at(&found.coefficients),
            at(&found.errors),
        ];
        let kernel = match &self.search {
            Search::Pursuit { atoms } => {
                let [bases, triangles] = [&found.used[1], &found.used[2]].map(at);
                arguments.extend([Argument::int(*atoms), bases, triangles, at(&found.lengths)]);
                "pursue"
            }
            Search::Beam {
                half_squares,
                first,
            } => {
                let unbiased = usize::from(fit == Fit::Unbiased);
                arguments.extend([at(half_squares)]);
                arguments.extend([*first, unbiased].map(Argument::int));
                "search"
            }
        };
        let grid = Grid {
            blocks: [blocks, 1],
            threads: THREADS,
            shared: self.search.shared(self.padded, self.max),
        };
        // SAFETY: the arguments are those of `pursue` in kernels/pursuit.cu or `search` in kernels/beam.cu, with room
        // for what they write.
        unsafe {
            let stream = &streams.background;
            stream.launch(&self.program, kernel, grid, &arguments)?;
        }
        Ok(found)
    }
}

/// Atoms in half precision, each filled up with zeros to a multiple of 16 numbers, which is given too.
fn padded_halves(atoms: Atoms<'_>) -> (Vec<f16>, usize) {
    let m = atoms.head_dim();
    let padded = m.next_multiple_of(16);
    let mut halves = vec![f16::ZERO; atoms.len() * padded];
    let numbers = atoms.numbers();
    let rows = numbers.chunks_exact(m);
    for (row, out) in rows.zip(halves.chunks_exact_mut(padded)) {
        out[..m].convert_from_f32_slice(row);
    }
    (halves, padded)
}
