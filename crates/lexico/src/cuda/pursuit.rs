use half::f16;

use super::device::{
    Argument, COMMON, Device, Grid, Program, download, download_f32, download_u16, padded_rows,
    upload,
};
use crate::pursuit::SparseBatch;
use crate::{Dictionary, Error, Result};

/// Vectors that a block codes side by side; `ROWS` in pursuit.cu.
const ROWS: usize = 64;
const THREADS: u32 = 128;
/// Atoms in shared memory at a time; `TILE` in pursuit.cu.
const TILE: usize = 64;

/// [`Pursuit`](crate::Pursuit) on a device.
///
/// Atoms are chosen by products of halves, summed in f32; their coefficients are those of least squares in f32.
pub struct DevicePursuit<'d, D: Device> {
    device: &'d D,
    program: Program,
    /// `[N, padded]`, halves.
    atoms: D::Memory,
    head_dim: usize,
    /// The head dim filled up to a multiple of 16.
    padded: usize,
    count: usize,
    sparsity: usize,
    tolerance: f32,
    blocks: u32,
    /// Orthonormal bases of the vectors that are being coded, and how atoms are made of them.
    basis: D::Memory,
    triangles: D::Memory,
}

impl<'d, D: Device> DevicePursuit<'d, D> {
    /// Codes of at most `sparsity` nonzeros over the dictionary, whose atoms are rounded to halves.
    ///
    /// # Errors
    /// [`Error::Sparsity`](crate::Error::Sparsity) as for [`Pursuit::new`](crate::Pursuit::new),
    /// [`Error::Device`] where its memory does not suffice.
    pub fn new(
        device: &'d D,
        dictionary: &Dictionary,
        sparsity: usize,
        tolerance: f32,
    ) -> Result<Self> {
        dictionary.check_sparsity(sparsity)?;
        let head_dim = dictionary.head_dim();
        let padded = head_dim.next_multiple_of(16);
        let blocks = device.blocks();
        let rows = blocks as usize * ROWS;
        let atoms: Vec<u8> = padded_rows(dictionary.atoms(), head_dim, padded)
            .into_iter()
            .flat_map(|x| f16::from_f32(x).to_le_bytes())
            .collect();
        Ok(Self {
            device,
            program: Program {
                name: "pursuit",
                parts: &[COMMON, include_str!("kernels/pursuit.cu")],
                constants: vec![("M", padded)],
            },
            atoms: upload(device, &atoms)?,
            head_dim,
            padded,
            count: dictionary.len(),
            sparsity,
            tolerance,
            blocks,
            basis: device.allocate(rows * sparsity * padded * size_of::<f32>())?,
            triangles: device.allocate(rows * sparsity * sparsity * size_of::<f32>())?,
        })
    }

    /// Codes `vectors` `[n, m]`.
    ///
    /// # Errors
    /// As [`Pursuit::encode`](crate::Pursuit::encode), and [`Error::Device`].
    pub fn encode(&self, vectors: &[f32]) -> Result<SparseBatch> {
        crate::pursuit::check_vectors(vectors, self.head_dim)?;
        let (n, s) = (vectors.len() / self.head_dim, self.sparsity);
        let mut batch = SparseBatch {
            sparsity: s,
            lengths: vec![0; n],
            indices: vec![0; n * s],
            coefficients: vec![0.0; n * s],
            relative_errors: vec![0.0; n],
        };
        if n == 0 {
            return Ok(batch);
        }
        let count = i32::try_from(n).map_err(|_| {
            Error::Device(format!("{n} vectors at once; less than 2³¹ are possible"))
        })?;
        let device = self.device;
        let bytes: Vec<u8> = padded_rows(vectors, self.head_dim, self.padded)
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect();
        let vectors = upload(device, &bytes)?;
        // Codes shorter than the sparsity leave the rest as it is.
        let indices = upload(device, &vec![0; n * s * size_of::<u16>()])?;
        let coefficients = upload(device, &vec![0; n * s * size_of::<f32>()])?;
        let lengths = upload(device, &vec![0; n])?;
        let errors = upload(device, &vec![0; n * size_of::<f32>()])?;
        let shared = 2 * TILE * (self.padded + 8) * size_of::<u16>()
            + ROWS * (self.padded + s + 2) * size_of::<f32>();
        let address = |memory: &D::Memory| Argument::Address(D::address(memory));
        let grid = Grid {
            blocks: [self.blocks.min(n.div_ceil(ROWS) as u32), 1],
            threads: THREADS,
            shared,
        };
        let arguments = [
            address(&vectors),
            Argument::Integer(count),
            address(&self.atoms),
            Argument::Integer(self.count as i32),
            Argument::Integer(s as i32),
            Argument::Float(self.tolerance),
            address(&self.basis),
            address(&self.triangles),
            address(&indices),
            address(&coefficients),
            address(&lengths),
            address(&errors),
        ];
        // SAFETY: the arguments are those of `pursue` in kernels/pursuit.cu, with room for what it writes.
        unsafe { device.launch(&self.program, "pursue", grid, &arguments)? };
        batch.coefficients = download_f32(device, &coefficients, n * s)?;
        batch.indices = download_u16(device, &indices, n * s)?;
        batch.relative_errors = download_f32(device, &errors, n)?;
        let lengths = download(device, &lengths, n)?;
        batch.lengths = lengths.into_iter().map(u16::from).collect();
        Ok(batch)
    }
}
