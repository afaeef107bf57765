use bytemuck::cast_slice_mut;
use candle_core::quantized::k_quants::{BlockQ4K, BlockQ6K, BlockQ8_0};
use candle_core::quantized::{GgmlDType, GgmlType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::Result;
use crate::half_matrix::{HalfMatrix, Halves};
use crate::threads::CandleThreads;
use crate::weights::{Quantize, Weights};

/// Number of rows that are read at once.
const CHUNK: usize = 256;

/// Matrix `[rows, columns]` in one of the number types that weights are held in.
pub(super) enum Matrix {
    /// Numbers in f32, or on a GPU in the type that they were stored in.
    Dense(Tensor),
    /// Numbers in f16 or bf16, on the processor.
    Half(HalfMatrix),
    Quantised(QTensor),
}

impl Matrix {
    /// Reads a matrix some rows at a time, quantising it on the way where that is wanted.
    pub(super) fn load(
        weights: &Weights,
        name: &str,
        [rows, columns]: [usize; 2],
        quantize: Quantize,
    ) -> Result<Self> {
        let stored = weights.number_type(name, &[rows, columns])?;
        let reader = Reader {
            weights,
            name,
            stored,
            rows,
            columns,
        };
        match stored {
            GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => match fitting(quantize, columns) {
                Quantize::Q8_0 => reader.quantise::<BlockQ8_0>(),
                Quantize::Q6K => reader.quantise::<BlockQ6K>(),
                Quantize::Q4K => reader.quantise::<BlockQ4K>(),
                Quantize::None => reader.as_stored(),
            },
            _ if quantize == Quantize::None => reader.blocks(),
            _ => {
                let reason = format!("it is stored as {stored:?} already; leave --quantize out");
                Err(weights.error(name, reason))
            }
        }
    }

    /// Moves the matrix to another device.
    pub(super) fn on(self, device: &Device) -> Result<Self> {
        Ok(match self {
            Matrix::Dense(matrix) => Matrix::Dense(matrix.to_device(device)?),
            Matrix::Half(matrix) => {
                let shape = (matrix.rows(), matrix.columns());
                Matrix::Dense(match matrix.into_numbers() {
                    Halves::F16(numbers) => Tensor::from_vec(numbers, shape, device)?,
                    Halves::BF16(numbers) => Tensor::from_vec(numbers, shape, device)?,
                })
            }
            Matrix::Quantised(matrix) => {
                let storage = QStorage::from_data(matrix.data()?, device, matrix.dtype())?;
                Matrix::Quantised(QTensor::new(storage, matrix.shape())?)
            }
        })
    }

    /// Turns `[n, columns]` into `[n, rows]`, in f32.
    pub(super) fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Matrix::Dense(matrix) => {
                let product = x.to_dtype(matrix.dtype())?.matmul(&matrix.t()?)?;
                product.to_dtype(DType::F32)?
            }
            Matrix::Half(matrix) => {
                let n = x.dim(0)?;
                let product = matrix.multiply(&x.flatten_all()?.to_vec1::<f32>()?, &CandleThreads);
                Tensor::from_vec(product, (n, matrix.rows()), &Device::Cpu)?
            }
            Matrix::Quantised(matrix) => x.apply_op1_no_bwd(matrix)?,
        })
    }

    /// Returns these rows, `[n, columns]` in f32; all of them must be there.
    pub(super) fn rows(&self, rows: &[u32]) -> Result<Tensor> {
        Ok(match self {
            Matrix::Dense(matrix) => {
                let rows = matrix.index_select(&Tensor::new(rows, matrix.device())?, 0)?;
                rows.to_dtype(DType::F32)?
            }
            Matrix::Half(matrix) => {
                let columns = matrix.columns();
                let mut out = vec![0f32; rows.len() * columns];
                for (&row, out) in rows.iter().zip(out.chunks_exact_mut(columns)) {
                    matrix.read_row(row as usize, out);
                }
                Tensor::from_vec(out, (rows.len(), columns), &Device::Cpu)?
            }
            Matrix::Quantised(matrix) => {
                let rows = Tensor::new(rows, &matrix.device())?;
                matrix.embedding(&rows)?.to_dtype(DType::F32)?
            }
        })
    }
}

/// Returns the format for a matrix with rows of `width` numbers: whole blocks only, so that a width that a format does
/// not divide takes the next wider one, in the end that of the file.
fn fitting(quantize: Quantize, width: usize) -> Quantize {
    match quantize {
        Quantize::None => Quantize::None,
        Quantize::Q6K if width.is_multiple_of(BlockQ6K::BLCK_SIZE) => Quantize::Q6K,
        Quantize::Q4K if width.is_multiple_of(BlockQ4K::BLCK_SIZE) => Quantize::Q4K,
        _ if width.is_multiple_of(BlockQ8_0::BLCK_SIZE) => Quantize::Q8_0,
        _ => Quantize::None,
    }
}

/// A matrix that is being read.
struct Reader<'a> {
    weights: &'a Weights,
    name: &'a str,
    stored: GgmlDType,
    rows: usize,
    columns: usize,
}

impl Reader<'_> {
    fn as_stored(&self) -> Result<Matrix> {
        let (rows, columns) = (self.rows, self.columns);
        let halves = match self.stored {
            GgmlDType::F16 => Halves::F16(self.numbers(f16::from_le_bytes)?),
            GgmlDType::BF16 => Halves::BF16(self.numbers(bf16::from_le_bytes)?),
            _ => {
                let numbers = self.numbers(f32::from_le_bytes)?;
                let matrix = Tensor::from_vec(numbers, (rows, columns), &Device::Cpu)?;
                return Ok(Matrix::Dense(matrix));
            }
        };
        Ok(Matrix::Half(HalfMatrix::new(halves, rows, columns)))
    }

    fn numbers<T, const BYTES: usize>(&self, number: fn([u8; BYTES]) -> T) -> Result<Vec<T>> {
        let mut numbers = Vec::with_capacity(self.rows * self.columns);
        let mut bytes = vec![0; CHUNK.min(self.rows) * self.columns * BYTES];
        for first in (0..self.rows).step_by(CHUNK) {
            let rows = first..(first + CHUNK).min(self.rows);
            let bytes = &mut bytes[..rows.len() * self.columns * BYTES];
            self.weights.read_rows(self.name, rows, bytes)?;
            numbers.extend(bytes.as_chunks::<BYTES>().0.iter().map(|&b| number(b)));
        }
        Ok(numbers)
    }

    fn quantise<T: GgmlType + 'static>(&self) -> Result<Matrix> {
        let row_blocks = self.columns / T::BLCK_SIZE;
        let mut blocks = vec![T::zeros(); self.rows * row_blocks];
        let chunks = blocks.par_chunks_mut(CHUNK * row_blocks).enumerate();
        chunks.try_for_each(|(chunk, blocks)| -> Result<()> {
            let first = chunk * CHUNK;
            let rows = first..first + blocks.len() / row_blocks;
            let (name, stored) = (self.name, self.stored);
            let numbers = self.weights.f32_rows(name, stored, self.columns, rows)?;
            // Blocks would make sound numbers of them.
            if numbers.iter().any(|number| !number.is_finite()) {
                let reason = "it holds a NaN or an infinity: the file is damaged".to_owned();
                return Err(self.weights.error(name, reason));
            }
            T::from_float(&numbers, blocks);
            Ok(())
        })?;
        self.tensor(QStorage::Cpu(Box::new(blocks)))
    }

    /// A matrix that is stored in quantised blocks, as it is.
    fn blocks(&self) -> Result<Matrix> {
        let bytes = self.rows * self.columns / self.stored.block_size() * self.stored.type_size();
        // candle takes the bytes for blocks where they lie, so they must be aligned as blocks are.
        let mut aligned = vec![0u64; bytes.div_ceil(size_of::<u64>())];
        let data = &mut cast_slice_mut::<u64, u8>(&mut aligned)[..bytes];
        self.weights.read_rows(self.name, 0..self.rows, data)?;
        let data: &[u8] = data;
        self.tensor(QStorage::from_data(data.into(), &Device::Cpu, self.stored)?)
    }

    fn tensor(&self, storage: QStorage) -> Result<Matrix> {
        let tensor = QTensor::new(storage, (self.rows, self.columns))?;
        Ok(Matrix::Quantised(tensor))
    }
}
