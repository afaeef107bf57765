use half::f16;

use super::device::{
    Argument, COMMON, Device, Grid, Program, Streams, check_shared, download, download_f32,
    download_u16, padded_rows, upload, upload_rows,
};
use super::pursuit::{kernel_count, upload_lengths};
use crate::Result;
use crate::dictionary::{CodebookSizes, Codebooks};
use crate::encode::EncodedBatch;

/// Vectors that a block codes side by side; `VECTORS` in codebooks.cu.
const VECTORS: usize = 8;
const THREADS: u32 = 128;
/// Sums that are followed for every vector; `BEAM_WIDTH` in codebooks.cu.
pub const DEVICE_BEAM: usize = 8;
/// Atoms in shared memory at a time; `TILE` in codebooks.cu.
const TILE: usize = 64;

/// [`BeamSearch`](crate::encode::BeamSearch) on a device, which follows [`DEVICE_BEAM`] sums of every vector.
///
/// Sums are compared by products of halves, summed in f32; what is left of vectors is f32.
pub struct DeviceBeamSearch<D: Device> {
    program: Program,
    /// `[N, padded]`, halves.
    atoms: D::Memory,
    half_squares: D::Memory,
    head_dim: usize,
    /// The head dim filled up to a multiple of 16.
    padded: usize,
    first: usize,
    most: usize,
}

/// Additive codes that were found on a device, and lie there.
pub struct FoundSums<D: Device> {
    pub(super) count: usize,
    pub(super) most: usize,
    /// Atoms of each vector by their numbers in their groups, `[n, most]`, u16.
    pub paths: D::Memory,
    /// Numbers of the vectors' scales, `[n]`, u8.
    pub scales: D::Memory,
    /// `‖x − x̂‖ / ‖x‖` of the sums before they are scaled, `[n]`, f32.
    pub errors: D::Memory,
    /// What the kernel needs beside, as long as it runs.
    pub(super) used: Vec<D::Memory>,
}

impl<D: Device> DeviceBeamSearch<D> {
    /// Codes of up to `most` atoms over the dictionary, whose atoms are rounded to halves.
    ///
    /// # Errors
    /// [`Error::CodebookSizes`](crate::Error::CodebookSizes) unless `1 ≤ most ≤` the number of groups; [`Error::Device`](crate::Error::Device).
    pub fn new(device: &D, dictionary: &Codebooks, most: usize) -> Result<Self> {
        dictionary.check_sparsity(most)?;
        let head_dim = dictionary.head_dim();
        let padded = head_dim.next_multiple_of(16);
        check_shared(device, shared(padded, most), "the search")?;
        let atoms = dictionary.dictionary().atoms();
        let halves: Vec<f16> = padded_rows(atoms, head_dim, padded)
            .into_iter()
            .map(f16::from_f32)
            .collect();
        let half_squares = halves.chunks_exact(padded).map(|atom| {
            let squares = atom.iter().map(|x| f64::from(*x).powi(2));
            (0.5 * squares.sum::<f64>()) as f32
        });
        let half_squares: Vec<u8> = half_squares.flat_map(f32::to_le_bytes).collect();
        let bytes: Vec<u8> = halves.into_iter().flat_map(f16::to_le_bytes).collect();
        Ok(Self {
            program: Program {
                name: "beam",
                parts: &[COMMON, include_str!("kernels/beam.cu")],
                constants: vec![("M", padded)],
            },
            atoms: upload(device, &bytes)?,
            half_squares: upload(device, &half_squares)?,
            head_dim,
            padded,
            first: dictionary.groups().first,
            most,
        })
    }

    /// Codes the vectors of several heads, `[heads, n, m]`, those of each with its own of `sparsities`.
    ///
    /// # Errors
    /// As [`Pursuit::encode`](crate::Pursuit::encode), and [`Error::Device`](crate::Error::Device).
    ///
    /// # Panics
    /// As [`DeviceBeamSearch::encode_heads`].
    pub fn encode(
        &self,
        streams: &Streams<D>,
        vectors: &[f32],
        sparsities: &[usize],
        unbiased: bool,
    ) -> Result<FoundSums<D>> {
        crate::encode::check_vectors(vectors, self.head_dim)?;
        let n = vectors.len() / self.head_dim;
        let rows = upload_rows(&streams.main, vectors, self.head_dim, self.padded)?;
        let found = self.encode_heads(streams, &rows, n, sparsities, unbiased)?;
        streams.main.wait_for(&streams.background)?;
        Ok(found)
    }

    /// Codes the vectors of several heads, `[heads, n, padded]` with the head dim filled up to a multiple of 16, those of each with
    /// its own of `sparsities`. What was found is there once the main stream has waited for the other.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    ///
    /// # Panics
    /// Where a sparsity is 0 or above the most, or the vectors are not as many for each head.
    pub fn encode_heads(
        &self,
        streams: &Streams<D>,
        vectors: &D::Memory,
        n: usize,
        sparsities: &[usize],
        unbiased: bool,
    ) -> Result<FoundSums<D>> {
        let each = crate::encode::vectors_a_head(n, sparsities, self.most);
        let count = kernel_count(n)?;
        let device = &streams.main;
        let found = FoundSums {
            count: n,
            most: self.most,
            paths: device.allocate(n * self.most * size_of::<u16>())?,
            scales: device.allocate(n)?,
            errors: device.allocate(n * size_of::<f32>())?,
            used: vec![upload_lengths(device, sparsities)?],
        };
        if n == 0 {
            return Ok(found);
        }
        streams.background.wait_for(device)?;
        let grid = Grid {
            blocks: [device.blocks().min(n.div_ceil(VECTORS) as u32), 1],
            threads: THREADS,
            shared: shared(self.padded, self.most),
        };
        let address = |memory: &D::Memory| Argument::Address(D::address(memory));
        let arguments = [
            address(vectors),
            Argument::Integer(count),
            Argument::Integer(each as i32),
            address(&found.used[0]),
            Argument::Integer(self.most as i32),
            address(&self.atoms),
            address(&self.half_squares),
            Argument::Integer(self.first as i32),
            Argument::Integer(i32::from(unbiased)),
            address(&found.paths),
            address(&found.scales),
            address(&found.errors),
        ];
        // SAFETY: the arguments are those of `search` in kernels/beam.cu, with room for what it writes.
        unsafe {
            streams
                .background
                .launch(&self.program, "search", grid, &arguments)?;
        }
        Ok(found)
    }
}

/// Bytes of shared memory that a block takes.
fn shared(padded: usize, most: usize) -> usize {
    let rows = VECTORS * DEVICE_BEAM;
    2 * TILE * ((padded + 8) * size_of::<u16>() + size_of::<f32>())
        + rows * (padded * size_of::<f32>() + most * size_of::<u16>())
}

impl<D: Device> FoundSums<D> {
    /// Bytes of device memory.
    pub(super) fn bytes(&self) -> usize {
        self.count * (self.most * size_of::<u16>() + 1 + size_of::<f32>())
    }

    /// What was found, as [`BeamSearch`](crate::encode::BeamSearch) gives it: a batch of codes of `most` atoms, the
    /// vectors of each head with its own of `sparsities`.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    pub fn batch(
        &self,
        device: &D,
        groups: CodebookSizes,
        sparsities: &[usize],
    ) -> Result<EncodedBatch> {
        let (n, most) = (self.count, self.most);
        let each = crate::encode::vectors_a_head(n, sparsities, most);
        let mut batch = EncodedBatch {
            sparsity: most,
            lengths: (0..n).map(|v| sparsities[v / each] as u16).collect(),
            indices: download_u16(device, &self.paths, n * most)?,
            coefficients: vec![0.0; n * most],
            relative_errors: download_f32(device, &self.errors, n)?,
        };
        let scales = download(device, &self.scales, n)?;
        let vectors = batch
            .indices
            .chunks_exact_mut(most)
            .zip(batch.coefficients.chunks_exact_mut(most));
        for (((indices, coefficients), &length), scale) in vectors.zip(&batch.lengths).zip(scales) {
            let (atoms, rest) = indices.split_at_mut(usize::from(length));
            atoms
                .iter_mut()
                .enumerate()
                .for_each(|(group, atom)| *atom += groups.start(group) as u16);
            rest.fill(0);
            coefficients[..atoms.len()].fill(crate::codes::scale_of_number(scale));
        }
        Ok(batch)
    }
}
