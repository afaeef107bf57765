use std::borrow::Cow;
use std::ops::Range;

use candle_core::quantized::k_quants::{BlockQ4K, BlockQ6K, BlockQ8_0};
use candle_core::quantized::{GgmlDType, GgmlType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use lexico::kernels::blocks::{BlockMatrix, GROUP};
use rayon::prelude::*;

use crate::block_matrix::multiply_all;
use crate::error::Result;
use crate::half_matrix::{HalfMatrix, Halves, MANY_PRODUCTS};
use crate::threads::ModelThreads;
use crate::weights::{Quantize, Weights, block_type};

/// Number of rows that are read at once.
const CHUNK: usize = 256;

/// Matrix `[rows, columns]` in one of the number types that weights are held in.
pub(super) enum Matrix {
    /// Numbers in f32, or on a GPU in the type that they were stored in.
    Dense(Tensor),
    /// Numbers in f16 or bf16, on the processor.
    Half(HalfMatrix),
    /// ggml's blocks, on the processor.
    Blocks(BlockMatrix),
    /// ggml's blocks, on a GPU.
    Quantised(QTensor),
}

impl Matrix {
    /// See [`Decoder::rows_alike`](super::Decoder::rows_alike).
    pub(super) fn rows_alike(&self) -> usize {
        match self {
            Self::Dense(matrix) if matrix.device().is_cpu() => 1,
            Self::Half(_) => MANY_PRODUCTS - 1,
            Self::Dense(_) | Self::Blocks(_) | Self::Quantised(_) => usize::MAX,
        }
    }

    /// Reads a matrix some rows at a time, quantising it on the way where that is wanted and makes it smaller.
    pub(super) fn load(
        weights: &Weights,
        name: &str,
        [rows, columns]: [usize; 2],
        quantize: Quantize,
        device: &Device,
    ) -> Result<Self> {
        let stored = weights.number_type(name, &[rows, columns])?;
        let reader = Reader {
            weights,
            name,
            stored,
            rows,
            columns,
            device,
        };
        let bits = |dtype: GgmlDType| dtype.type_size() as f64 / dtype.block_size() as f64;
        let smaller = |dtype: GgmlDType| bits(dtype) < bits(stored);
        match fitting(quantize, columns) {
            Quantize::Q8_0 if smaller(GgmlDType::Q8_0) => reader.quantise::<BlockQ8_0>(),
            Quantize::Q6K if smaller(GgmlDType::Q6K) => reader.quantise::<BlockQ6K>(),
            Quantize::Q4K if smaller(GgmlDType::Q4K) => reader.quantise::<BlockQ4K>(),
            _ => match block_type(stored) {
                Some(_) => reader.blocks(),
                None => reader.as_stored(),
            },
        }
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
                let product = matrix.multiply(&x.flatten_all()?.to_vec1::<f32>()?, &ModelThreads);
                Tensor::from_vec(product, (n, matrix.rows()), &Device::Cpu)?
            }
            Matrix::Blocks(matrix) => Self::multiply_blocks(&[matrix], x)?.remove(0),
            Matrix::Quantised(matrix) => x.apply_op1_no_bwd(matrix)?,
        })
    }

    /// Products of `x` with several matrices of as many columns.
    pub(super) fn multiply_all(matrices: &[&Self], x: &Tensor) -> Result<Vec<Tensor>> {
        let blocks = matrices.iter().map(|matrix| match matrix {
            Matrix::Blocks(blocks) => Some(blocks),
            _ => None,
        });
        match blocks.collect::<Option<Vec<_>>>() {
            Some(blocks) => Self::multiply_blocks(&blocks, x),
            None => matrices.iter().map(|matrix| matrix.multiply(x)).collect(),
        }
    }

    fn multiply_blocks(matrices: &[&BlockMatrix], x: &Tensor) -> Result<Vec<Tensor>> {
        let n = x.dim(0)?;
        let products = multiply_all(matrices, &x.flatten_all()?.to_vec1::<f32>()?, &ModelThreads);
        let tensor = |(product, matrix): (_, &&BlockMatrix)| {
            Ok(Tensor::from_vec(product, (n, matrix.rows()), &Device::Cpu)?)
        };
        products.into_iter().zip(matrices).map(tensor).collect()
    }

    /// Returns these rows, `[n, columns]` in f32; all of them must be there.
    pub(super) fn rows(&self, rows: &[u32]) -> Result<Tensor> {
        let read = |columns: usize, read_row: &dyn Fn(usize, &mut [f32])| -> Result<Tensor> {
            let mut out = vec![0f32; rows.len() * columns];
            for (&row, out) in rows.iter().zip(out.chunks_exact_mut(columns)) {
                read_row(row as usize, out);
            }
            Ok(Tensor::from_vec(out, (rows.len(), columns), &Device::Cpu)?)
        };
        match self {
            Matrix::Dense(matrix) => {
                let rows = matrix.index_select(&Tensor::new(rows, matrix.device())?, 0)?;
                Ok(rows.to_dtype(DType::F32)?)
            }
            Matrix::Half(matrix) => read(matrix.columns(), &|row, out| matrix.read_row(row, out)),
            Matrix::Blocks(matrix) => read(matrix.columns(), &|row, out| matrix.read_row(row, out)),
            Matrix::Quantised(matrix) => {
                let rows = Tensor::new(rows, &matrix.device())?;
                Ok(matrix.embedding(&rows)?.to_dtype(DType::F32)?)
            }
        }
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
    device: &'a Device,
}

impl Reader<'_> {
    fn as_stored(&self) -> Result<Matrix> {
        let (rows, columns) = (self.rows, self.columns);
        let halves = match self.stored {
            GgmlDType::F16 => Halves::F16(self.numbers(f16::from_le_bytes)?),
            GgmlDType::BF16 => Halves::BF16(self.numbers(bf16::from_le_bytes)?),
            _ => {
                let numbers = self.numbers(f32::from_le_bytes)?;
                let matrix = Tensor::from_vec(numbers, (rows, columns), self.device)?;
                return Ok(Matrix::Dense(matrix));
            }
        };
        if self.device.is_cpu() {
            return Ok(Matrix::Half(HalfMatrix::new(halves, rows, columns)));
        }
        let shape = (rows, columns);
        Ok(Matrix::Dense(match halves {
            Halves::F16(numbers) => Tensor::from_vec(numbers, shape, self.device)?,
            Halves::BF16(numbers) => Tensor::from_vec(numbers, shape, self.device)?,
        }))
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
        self.fill(T::DTYPE, |rows, bytes| {
            let count = rows.len();
            let (name, stored) = (self.name, self.stored);
            let numbers = self.weights.f32_rows(name, stored, self.columns, rows)?;
            // Blocks would make sound numbers of them.
            if numbers.iter().any(|number| !number.is_finite()) {
                let reason = "it holds a NaN or an infinity: the file is damaged".to_owned();
                return Err(self.weights.error(name, reason));
            }
            let mut blocks = vec![T::zeros(); numbers.len() / T::BLCK_SIZE];
            T::from_float(&numbers, &mut blocks);
            let blocks = QStorage::Cpu(Box::new(blocks));
            let blocks = QTensor::new(blocks, (count, self.columns))?;
            bytes.extend_from_slice(&blocks.data()?);
            Ok(())
        })
    }

    /// A matrix that is stored in quantised blocks, as it is.
    fn blocks(&self) -> Result<Matrix> {
        self.fill(self.stored, |rows, bytes| {
            let blocks = rows.len() * self.columns / self.stored.block_size();
            let before = bytes.len();
            bytes.resize(before + blocks * self.stored.type_size(), 0);
            self.weights
                .read_rows(self.name, rows, &mut bytes[before..])
        })
    }

    /// A matrix of blocks, of which `read` appends some rows at a time.
    fn fill(
        &self,
        dtype: GgmlDType,
        read: impl Fn(Range<usize>, &mut Vec<u8>) -> Result<()> + Sync,
    ) -> Result<Matrix> {
        let kind = block_type(dtype).filter(|_| self.device.is_cpu());
        let Some(kind) = kind else {
            let mut bytes = Vec::new();
            for first in (0..self.rows).step_by(CHUNK) {
                read(first..(first + CHUNK).min(self.rows), &mut bytes)?;
            }
            let storage = QStorage::from_data(Cow::Owned(bytes), self.device, dtype)?;
            let tensor = QTensor::new(storage, (self.rows, self.columns))?;
            return Ok(Matrix::Quantised(tensor));
        };
        let mut matrix = BlockMatrix::new(kind, self.rows, self.columns);
        let parts = matrix.parts_mut(CHUNK / GROUP);
        let parts = parts.into_par_iter();
        parts.try_for_each_init(Vec::new, |bytes, mut part| -> Result<()> {
            bytes.clear();
            read(part.rows(), bytes)?;
            part.fill(bytes);
            Ok(())
        })?;
        Ok(Matrix::Blocks(matrix))
    }
}
