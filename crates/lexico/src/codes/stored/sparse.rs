use super::input::{Input, damaged};
use super::{StoredPage, columns};
use crate::Result;
use crate::codes::CoefficientFormat;
use crate::codes::coefficients::{self, Coefficients};
use crate::codes::sparse::{SparseFormat, SparsePage};
use crate::kernels::sparse::{Lengths, SparseBlock};

impl StoredPage for SparsePage {
    fn describe(format: SparseFormat) -> [u8; 8] {
        let [s0, s1] = (format.sparsity as u16).to_le_bytes();
        let coefficients = match format.coefficients {
            CoefficientFormat::I8 => 0,
            CoefficientFormat::F8 => 1,
            CoefficientFormat::F32 => 2,
        };
        [s0, s1, u8::from(format.variable), coefficients, 0, 0, 0, 0]
    }

    fn write(heads: &[Vec<SparseBlock<'_>>], out: &mut Vec<u8>) {
        let count = heads.len();
        let (mut lengths, mut scales) = (vec![Vec::new(); count], vec![Vec::new(); count]);
        let (mut indices, mut coefficients) = (vec![Vec::new(); count], vec![Vec::new(); count]);
        for (head, blocks) in heads.iter().enumerate() {
            for block in blocks {
                push_differences(block, &mut indices[head]);
                if let Lengths::Variable(own) = block.lengths {
                    lengths[head].extend_from_slice(own);
                }
                let (coefficients, scales) = (&mut coefficients[head], &mut scales[head]);
                coefficients::write(block.coefficients, coefficients, scales);
            }
        }
        columns::write::<u8>(&lengths, out);
        columns::write::<u16>(&indices, out);
        columns::write::<u8>(&coefficients, out);
        columns::write::<u8>(&scales, out);
    }

    fn read(input: &mut Input<'_>, formats: &[SparseFormat], count: usize) -> Result<Vec<Self>> {
        // The length of each head's column of `width` symbols a vector.
        let lengths_of = |width: &dyn Fn(&SparseFormat) -> usize| -> Vec<usize> {
            formats.iter().map(|format| count * width(format)).collect()
        };
        let lengths = lengths_of(&|format| usize::from(format.variable));
        let lengths = columns::read::<u8>(input, &lengths)?;
        let nonzeros = nonzeros(formats, &lengths, count)?;
        let indices = columns::read::<u16>(input, &nonzeros)?;
        let bytes = nonzeros.iter().zip(formats);
        let bytes: Vec<usize> = bytes.map(|(n, f)| n * f.coefficients.bytes()).collect();
        let coefficients = columns::read::<u8>(input, &bytes)?;
        let scales = lengths_of(&|format| usize::from(format.coefficients.is_scaled()));
        let scales = columns::read::<u8>(input, &scales)?;
        let columns = lengths.into_iter().zip(indices);
        let columns = columns.zip(coefficients.into_iter().zip(scales));
        let pages = formats.iter().zip(columns);
        let pages = pages.map(|(&format, ((lengths, indices), (values, scales)))| {
            let coefficients = Coefficients::read(format.coefficients, values, scales);
            Ok(SparsePage {
                format,
                len: count,
                indices: added_up(format, indices, &lengths, count),
                coefficients: coefficients.map_err(|(part, _)| damaged(part))?,
                lengths,
            })
        });
        pages.collect()
    }
}

/// Appends each index less the one before it in its vector.
fn push_differences(block: &SparseBlock<'_>, out: &mut Vec<u16>) {
    let mut push = |indices: &[u16]| {
        let before = std::iter::once(&0).chain(indices);
        let pairs = indices.iter().zip(before);
        out.extend(pairs.map(|(i, before)| i.wrapping_sub(*before)));
    };
    match block.lengths {
        Lengths::Fixed { length, .. } => block.indices.chunks_exact(length).for_each(push),
        Lengths::Variable(lengths) => {
            let mut rest = block.indices;
            for &length in lengths {
                let (own, after) = rest.split_at(usize::from(length));
                push(own);
                rest = after;
            }
        }
    }
}

/// Indices out of each one's difference to the one before in its vector.
fn added_up(format: SparseFormat, mut indices: Vec<u16>, lengths: &[u8], count: usize) -> Vec<u16> {
    let mut rest = &mut indices[..];
    for length in format.each(lengths, count) {
        let (row, after) = rest.split_at_mut(length);
        let mut before = 0u16;
        for index in row {
            *index = index.wrapping_add(before);
            before = *index;
        }
        rest = after;
    }
    indices
}

/// The nonzeros of `count` vectors of each head.
fn nonzeros(formats: &[SparseFormat], lengths: &[Vec<u8>], count: usize) -> Result<Vec<usize>> {
    let heads = formats.iter().zip(lengths).map(|(format, lengths)| {
        let each = || format.each(lengths, count);
        if each().any(|length| length > format.sparsity) {
            return Err(damaged("a vector's number of nonzeros"));
        }
        Ok(each().sum())
    });
    heads.collect()
}
