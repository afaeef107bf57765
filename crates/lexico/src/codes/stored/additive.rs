use super::input::{Input, damaged};
use super::{StoredPage, columns};
use crate::Result;
use crate::codes::additive::{AdditiveFormat, AdditivePage};
use crate::kernels::additive::{AdditiveBlock, Leading};

/// The number of this family among the ways in which coefficients are stored.
const ADDITIVE: u8 = 3;

impl StoredPage for AdditivePage {
    fn describe(AdditiveFormat { sparsity, sizes }: AdditiveFormat) -> [u8; 8] {
        let ([s0, s1], [f0, f1, f2, f3]) = (
            (sparsity as u16).to_le_bytes(),
            (sizes.first as u32).to_le_bytes(),
        );
        [s0, s1, 0, ADDITIVE, f0, f1, f2, f3]
    }

    fn write(heads: &[Vec<AdditiveBlock<'_>>], out: &mut Vec<u8>) {
        let first = |head: &Vec<AdditiveBlock<'_>>| -> Vec<Leading> {
            head.iter().flat_map(|block| block.first).copied().collect()
        };
        let first: Vec<Vec<Leading>> = heads.iter().map(first).collect();
        let scales = first.iter().map(|own| own.iter().map(|l| l.scale_number()));
        columns::write::<u8>(&scales.map(Iterator::collect).collect::<Vec<_>>(), out);
        let atoms = first.iter().map(|own| own.iter().map(|l| l.atom() as u16));
        columns::write::<u16>(&atoms.map(Iterator::collect).collect::<Vec<_>>(), out);
        let others = |head: &Vec<AdditiveBlock<'_>>| head.first().map_or(0, |b| b.sparsity - 1);
        for codebook in 0..heads.iter().map(others).max().unwrap_or(0) {
            let column = |head: &Vec<AdditiveBlock<'_>>| -> Vec<u8> {
                let own = head.iter().filter(|block| codebook < block.sparsity - 1);
                let rows = own.flat_map(|block| block.rest_rows());
                rows.map(|row| row[codebook]).collect()
            };
            columns::write::<u8>(&heads.iter().map(column).collect::<Vec<_>>(), out);
        }
    }

    fn read(input: &mut Input<'_>, formats: &[AdditiveFormat], count: usize) -> Result<Vec<Self>> {
        let each = vec![count; formats.len()];
        let scales = columns::read::<u8>(input, &each)?;
        let atoms = columns::read::<u16>(input, &each)?;
        let mut others = Vec::new();
        for codebook in 1..formats.iter().map(|f| f.sparsity).max().unwrap_or(1) {
            let own = formats.iter();
            let own = own.map(|f| if codebook < f.sparsity { count } else { 0 });
            others.push(columns::read::<u8>(input, &own.collect::<Vec<_>>())?);
        }
        let columns = atoms.into_iter().zip(scales).zip(0..);
        let pages = formats.iter().zip(columns);
        let pages = pages.map(|(&format, ((atoms, scales), head))| {
            let size = format.sizes.first;
            if atoms.iter().any(|&atom| usize::from(atom) >= size) {
                return Err(damaged("an atom of the first codebook"));
            }
            let first = atoms.into_iter().zip(scales);
            let first = first.map(|(atom, scale)| Leading::of_numbers(atom, scale));
            let first: Option<Vec<Leading>> = first.collect();
            let others = others[..format.sparsity - 1].iter();
            let others: Vec<&[u8]> = others.map(|heads| &heads[head][..]).collect();
            Ok(AdditivePage {
                format,
                first: first.ok_or_else(|| damaged("a scale"))?,
                rest: by_vector(&others, count),
            })
        });
        pages.collect()
    }
}

/// Columns of `count` numbers as rows.
fn by_vector(columns: &[&[u8]], count: usize) -> Vec<u8> {
    let mut rows = vec![0; columns.len() * count];
    for (j, column) in columns.iter().enumerate() {
        let own = rows.iter_mut().skip(j).step_by(columns.len());
        own.zip(*column).for_each(|(to, &from)| *to = from);
    }
    rows
}
