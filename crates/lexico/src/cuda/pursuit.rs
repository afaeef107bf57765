use half::f16;

use super::device::{
    Argument, COMMON, Device, Grid, Program, Streams, check_shared, download, download_f32,
    download_u16, padded_rows, upload, upload_rows,
};
use crate::encode::EncodedBatch;
use crate::{Dictionary, Error, Result};

/// Vectors that a block codes side by side; `ROWS` in pursuit.cu.
const ROWS: usize = 64;
const THREADS: u32 = 128;
/// Atoms in shared memory at a time; `TILE` in pursuit.cu.
const TILE: usize = 64;

/// [`Pursuit`](crate::Pursuit) on a device.
///
/// Atoms are chosen by products of halves, summed in f32; their coefficients are those of least squares in f32.
pub struct DevicePursuit<D: Device> {
    program: Program,
    /// `[N, padded]`, halves.
    atoms: D::Memory,
    head_dim: usize,
    /// The head dim filled up to a multiple of 16.
    padded: usize,
    count: usize,
    most: usize,
    blocks: u32,
}

/// Codes with coefficients that were found on a device, and lie there.
pub struct FoundCodes<D: Device> {
    pub(super) count: usize,
    pub(super) most: usize,
    /// Atoms of each vector, `[n, most]`, u16.
    pub indices: D::Memory,
    /// Their coefficients, `[n, most]`, f32.
    pub coefficients: D::Memory,
    /// How many each vector has, `[n]`, u8.
    pub lengths: D::Memory,
    /// `‖x − x̂‖ / ‖x‖`, `[n]`, f32.
    pub errors: D::Memory,
    /// What the kernel needs beside, as long as it runs.
    pub(super) used: Vec<D::Memory>,
}

impl<D: Device> DevicePursuit<D> {
    /// Codes of at most `most` nonzeros over the dictionary, whose atoms are rounded to halves.
    ///
    /// # Errors
    /// [`Error::Sparsity`](crate::Error::Sparsity) as for [`Pursuit::new`](crate::Pursuit::new),
    /// [`Error::Device`] where its memory does not suffice.
    pub fn new(device: &D, dictionary: &Dictionary, most: usize) -> Result<Self> {
        dictionary.check_sparsity(most)?;
        let head_dim = dictionary.head_dim();
        let padded = head_dim.next_multiple_of(16);
        if most > usize::from(u8::MAX) {
            let reason = format!("codes of {most} nonzeros; at most 255 are possible on a device");
            return Err(Error::Device(reason));
        }
        check_shared(device, shared(padded, most), "pursuit")?;
        let atoms: Vec<u8> = padded_rows(dictionary.atoms(), head_dim, padded)
            .into_iter()
            .flat_map(|x| f16::from_f32(x).to_le_bytes())
            .collect();
        Ok(Self {
            program: Program {
                name: "pursuit",
                parts: &[COMMON, include_str!("kernels/pursuit.cu")],
                constants: vec![("M", padded)],
            },
            atoms: upload(device, &atoms)?,
            head_dim,
            padded,
            count: dictionary.len(),
            most,
            blocks: device.blocks(),
        })
    }

    /// Codes `vectors` `[n, m]`, each with at most as many nonzeros as there may be.
    ///
    /// # Errors
    /// As [`Pursuit::encode`](crate::Pursuit::encode), and [`Error::Device`].
    pub fn encode(&self, streams: &Streams<D>, vectors: &[f32]) -> Result<EncodedBatch> {
        crate::encode::check_vectors(vectors, self.head_dim)?;
        let n = vectors.len() / self.head_dim;
        let rows = upload_rows(&streams.main, vectors, self.head_dim, self.padded)?;
        let found = self.encode_heads(streams, &rows, n, &[self.most])?;
        streams.main.wait_for(&streams.background)?;
        found.batch(&streams.main)
    }

    /// Codes the vectors of several heads, `[heads, n, padded]` with the head dim filled up to a multiple of 16, those of each with
    /// at most its own of `sparsities`. What was found is there once the main stream has waited for the other.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Panics
    /// Where a sparsity is 0 or above the most, or the vectors are not as many for each head.
    pub fn encode_heads(
        &self,
        streams: &Streams<D>,
        vectors: &D::Memory,
        count: usize,
        sparsities: &[usize],
    ) -> Result<FoundCodes<D>> {
        let each = crate::encode::vectors_a_head(count, sparsities, self.most);
        let (n, s) = (kernel_count(count)?, self.most);
        let device = &streams.main;
        let blocks = self.blocks.min(count.div_ceil(ROWS) as u32);
        let rows = blocks as usize * ROWS;
        let numbers = |numbers: usize| device.allocate(numbers * size_of::<f32>());
        // Orthonormal bases of the vectors that are being coded, and how atoms are made of them.
        let (basis, triangles) = (numbers(rows * s * self.padded)?, numbers(rows * s * s)?);
        let found = FoundCodes {
            count,
            most: s,
            indices: device.allocate(count * s * size_of::<u16>())?,
            coefficients: numbers(count * s)?,
            lengths: device.allocate(count)?,
            errors: numbers(count)?,
            used: vec![upload_lengths(device, sparsities)?, basis, triangles],
        };
        if count == 0 {
            return Ok(found);
        }
        streams.background.wait_for(device)?;
        let address = |memory: &D::Memory| Argument::Address(D::address(memory));
        let grid = Grid {
            blocks: [blocks, 1],
            threads: THREADS,
            shared: shared(self.padded, s),
        };
        let arguments = [
            address(vectors),
            Argument::Integer(n),
            Argument::Integer(each as i32),
            address(&found.used[0]),
            address(&self.atoms),
            Argument::Integer(self.count as i32),
            Argument::Integer(s as i32),
            address(&found.used[1]),
            address(&found.used[2]),
            address(&found.indices),
            address(&found.coefficients),
            address(&found.lengths),
            address(&found.errors),
        ];
        // SAFETY: the arguments are those of `pursue` in kernels/pursuit.cu, with room for what it writes.
        unsafe {
            streams
                .background
                .launch(&self.program, "pursue", grid, &arguments)?;
        }
        Ok(found)
    }
}

impl<D: Device> FoundCodes<D> {
    /// Bytes of device memory.
    pub(super) fn bytes(&self) -> usize {
        self.count * (self.most * (size_of::<u16>() + size_of::<f32>()) + 1 + size_of::<f32>())
    }

    /// What was found, as [`Pursuit`](crate::Pursuit) gives it.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn batch(&self, device: &D) -> Result<EncodedBatch> {
        let (n, s) = (self.count, self.most);
        let lengths = download(device, &self.lengths, n)?;
        Ok(EncodedBatch {
            sparsity: s,
            lengths: lengths.into_iter().map(u16::from).collect(),
            indices: download_u16(device, &self.indices, n * s)?,
            coefficients: download_f32(device, &self.coefficients, n * s)?,
            relative_errors: download_f32(device, &self.errors, n)?,
        })
    }
}

/// Bytes of shared memory that a block takes.
fn shared(padded: usize, most: usize) -> usize {
    2 * TILE * (padded + 8) * size_of::<u16>() + ROWS * (padded + most + 2) * size_of::<f32>()
}

/// The number of vectors, as kernels take it.
pub(super) fn kernel_count(n: usize) -> Result<i32> {
    i32::try_from(n)
        .map_err(|_| Error::Device(format!("{n} vectors at once; less than 2³¹ are possible")))
}

/// Memory of the sparsities of heads.
pub(super) fn upload_lengths<D: Device>(device: &D, sparsities: &[usize]) -> Result<D::Memory> {
    let lengths = sparsities.iter().flat_map(|&s| (s as i32).to_le_bytes());
    upload(device, &lengths.collect::<Vec<u8>>())
}
