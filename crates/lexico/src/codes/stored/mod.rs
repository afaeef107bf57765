//! Codes at rest: entropy-coded blocks for disk and transfer.
//!
//! A block holds up to 8,192 vectors of every head of one layer's keys or values, and can be read alone:
//!
//! | bytes | |
//! |---|---|
//! | 1 | [`VERSION`] |
//! | 4 | CRC-32 of all that follows |
//! | 2 | vectors of each head |
//! | 2, then 8 a head | heads; sparsity, whether lengths vary, how coefficients are stored, atoms of the first group |
//! | | columns of all heads: lengths where they vary, indices, coefficients, scales; of codes of one atom a group, those of the first group, then of every other one |
//!
//! The checksum is not at the end, where checksums of whole blocks, in a file that holds many, would be the same for all
//! of them. Numbers are little-endian. A vector's indices ascend and are stored as their differences, which are small. A column
//! is raw, or coded with the distribution of its symbols (asymmetric numeral systems, Duda 2013), heads apart or
//! together, whichever is smallest.

mod columns;
mod input;
mod rans;

use super::additive::{AdditiveBlock, AdditivePage, Leading};
use super::coefficients::{Coefficients, Scales};
use super::{Block, Blocks, CodeFormat, Codes, CoefficientFormat, Lengths, PAGE, Page, SparsePage};
use crate::{Error, Result};
use input::{Input, damaged};

/// The version that a block begins with.
pub const VERSION: u8 = 1;

/// The codes of several heads as blocks, which together hold all of them in order; none where there are none.
///
/// # Panics
/// Where the heads differ in their number of vectors.
pub fn write(heads: &[&Codes]) -> Vec<Vec<u8>> {
    let Some(first) = heads.first() else {
        return Vec::new();
    };
    assert!(
        heads.iter().all(|codes| codes.len == first.len),
        "heads of one length"
    );
    let formats: Vec<CodeFormat> = heads.iter().map(|codes| codes.format).collect();
    let mut runs: Vec<_> = heads.iter().map(|codes| codes.runs_from(0)).collect();
    let mut blocks = Vec::new();
    // Blocks are read as pages, and sums over codes go page by page: what is read has the pages that were written.
    for page in &first.pages {
        for start in (0..page.len()).step_by(PAGE) {
            let count = PAGE.min(page.len() - start);
            let mut columns = Columns::default();
            for run in &mut runs {
                columns.begin_head();
                run.next(count, |codes, _| columns.push(codes));
            }
            blocks.push(columns.write(count, &formats));
        }
    }
    blocks
}

/// The codes of heads of these formats in blocks, in order, of [`write()`]; no codes where there are no blocks.
///
/// # Errors
/// [`Error::Stored`] where a block is damaged or holds codes of other formats; [`Error::VariableSparsity`].
pub fn read<'a>(
    formats: &[CodeFormat],
    blocks: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Vec<Codes>> {
    let heads = formats.iter().map(|&format| Codes::new(format));
    let mut heads = heads.collect::<Result<Vec<Codes>>>()?;
    for block in blocks {
        for (codes, page) in heads.iter_mut().zip(read_block(formats, block)?) {
            codes.pages.reserve_exact(1);
            codes.push_page(page);
        }
    }
    Ok(heads)
}

/// What is stored of some vectors, each a column a head.
#[derive(Default)]
struct Columns {
    lengths: Vec<Vec<u8>>,
    /// Each index less the one before it in its vector.
    indices: Vec<Vec<u16>>,
    /// As they are in memory; four bytes each in f32.
    coefficients: Vec<Vec<u8>>,
    scales: Vec<Vec<u8>>,
    /// Atoms of the first group.
    first: Vec<Vec<u16>>,
    /// Atoms of every other group.
    rest: Vec<Vec<Vec<u8>>>,
}

impl Columns {
    fn begin_head(&mut self) {
        self.lengths.push(Vec::new());
        self.indices.push(Vec::new());
        self.coefficients.push(Vec::new());
        self.scales.push(Vec::new());
        self.first.push(Vec::new());
        self.rest
            .iter_mut()
            .for_each(|group| group.push(Vec::new()));
    }

    fn push(&mut self, codes: Blocks<'_>) {
        match codes {
            Blocks::I8(block) => self.push_block(&block, |&c| [c as u8]),
            Blocks::F8(block) => self.push_block(&block, |&c| [c]),
            Blocks::F32(block) => self.push_block(&block, |c| c.to_le_bytes()),
            Blocks::Additive(block) => self.push_additive(block),
        }
    }

    fn push_additive(&mut self, block: AdditiveBlock<'_>) {
        let heads = self.first.len();
        let groups = self.rest.len().max(block.sparsity - 1);
        self.rest.resize(groups, vec![Vec::new(); heads]);
        if let (Some(atoms), Some(scales)) = (self.first.last_mut(), self.scales.last_mut()) {
            atoms.extend(block.first.iter().map(|first| first.atom() as u16));
            scales.extend(block.first.iter().map(|first| first.scale_number()));
        }
        for (group, columns) in self.rest.iter_mut().enumerate().take(block.sparsity - 1) {
            if let Some(column) = columns.last_mut() {
                column.extend(block.rest_rows().map(|row| row[group]));
            }
        }
    }

    fn push_block<C, const WIDTH: usize>(
        &mut self,
        block: &Block<'_, C>,
        bytes: impl Fn(&C) -> [u8; WIDTH],
    ) {
        let mut push_indices = |indices: &[u16]| {
            let before = std::iter::once(&0).chain(indices);
            let differences = indices
                .iter()
                .zip(before)
                .map(|(i, before)| i.wrapping_sub(*before));
            if let Some(column) = self.indices.last_mut() {
                column.extend(differences);
            }
        };
        match block.lengths {
            Lengths::Fixed(sparsity, _) => {
                block.indices.chunks_exact(sparsity).for_each(push_indices);
            }
            Lengths::Variable(lengths) => {
                let mut rest = block.indices;
                for &length in lengths {
                    let (own, after) = rest.split_at(usize::from(length));
                    push_indices(own);
                    rest = after;
                }
                if let Some(column) = self.lengths.last_mut() {
                    column.extend_from_slice(lengths);
                }
            }
        }
        if let Some(column) = self.coefficients.last_mut() {
            column.extend(block.coefficients.iter().flat_map(bytes));
        }
        if let (Some(column), Scales::Powers(exponents)) = (self.scales.last_mut(), block.scales) {
            column.extend_from_slice(exponents);
        }
    }

    /// The block of these columns, of `count` vectors a head.
    fn write(&self, count: usize, formats: &[CodeFormat]) -> Vec<u8> {
        let mut out = (count as u16).to_le_bytes().to_vec();
        out.extend(described(formats));
        columns::write(&self.lengths, &mut out);
        columns::write(&self.indices, &mut out);
        columns::write(&self.coefficients, &mut out);
        columns::write(&self.scales, &mut out);
        columns::write(&self.first, &mut out);
        for group in &self.rest {
            columns::write(group, &mut out);
        }
        let checksum = crc32fast::hash(&out).to_le_bytes();
        [&[VERSION], checksum.as_slice(), &out].concat()
    }
}

/// How a block says of which formats its heads are.
fn described(formats: &[CodeFormat]) -> Vec<u8> {
    let mut out = (formats.len() as u16).to_le_bytes().to_vec();
    for format in formats {
        out.extend((format.sparsity as u16).to_le_bytes());
        let (coefficients, first) = match format.coefficients {
            CoefficientFormat::I8 => (0, 0),
            CoefficientFormat::F8 => (1, 0),
            CoefficientFormat::F32 => (2, 0),
            CoefficientFormat::InAtoms(groups) => (3, groups.first as u32),
        };
        out.extend([u8::from(format.variable), coefficients]);
        out.extend(first.to_le_bytes());
    }
    out
}

/// The page of every head in a block.
fn read_block(formats: &[CodeFormat], block: &[u8]) -> Result<Vec<Page>> {
    let mut input = Input::new(block);
    let [version] = *input.array()?;
    if version != VERSION {
        return Err(Error::Stored(format!(
            "the block is of version {version}, and version {VERSION} is understood"
        )));
    }
    let checksum = u32::from_le_bytes(*input.array()?);
    if crc32fast::hash(input.rest()) != checksum {
        return Err(damaged("its checksum"));
    }
    let count = usize::from(u16::from_le_bytes(*input.array()?));
    if !(1..=PAGE).contains(&count) {
        return Err(damaged("its number of vectors"));
    }
    let expected = described(formats);
    if input.take(expected.len())? != expected {
        return Err(Error::Stored(
            "the block holds codes of other heads or sparsities".to_owned(),
        ));
    }
    // How long the column of each head is, of columns of `width` symbols a vector.
    let lengths_of = |width: &dyn Fn(&CodeFormat) -> usize| -> Vec<usize> {
        formats.iter().map(|format| count * width(format)).collect()
    };
    let lengths = lengths_of(&|format| usize::from(format.variable));
    let lengths = columns::read::<u8>(&mut input, &lengths)?;
    let nonzeros = nonzeros(formats, &lengths, count)?;
    let indices = columns::read::<u16>(&mut input, &nonzeros)?;
    let widths = formats.iter().map(|format| match format.coefficients {
        CoefficientFormat::F32 => size_of::<f32>(),
        _ => 1,
    });
    let bytes = nonzeros.iter().zip(widths);
    let bytes: Vec<usize> = bytes.map(|(nonzeros, width)| nonzeros * width).collect();
    let coefficients = columns::read::<u8>(&mut input, &bytes)?;
    let scales = lengths_of(&|format| usize::from(is_scaled(format)));
    let scales = columns::read::<u8>(&mut input, &scales)?;
    let first = lengths_of(&|format| groups_of(format).min(1));
    let first = columns::read::<u16>(&mut input, &first)?;
    let mut rest = Vec::new();
    for group in 1..formats.iter().map(groups_of).max().unwrap_or(0) {
        let own = lengths_of(&|format| usize::from(groups_of(format) > group));
        rest.push(columns::read::<u8>(&mut input, &own)?);
    }
    input.end()?;

    let sparse = lengths
        .into_iter()
        .zip(indices)
        .zip(coefficients.into_iter().zip(scales));
    let mut pages = Vec::with_capacity(formats.len());
    for (head, ((format, first), ((lengths, indices), (values, scales)))) in
        formats.iter().zip(first).zip(sparse).enumerate()
    {
        if let CoefficientFormat::InAtoms(groups) = format.coefficients {
            if first.iter().any(|&atom| usize::from(atom) >= groups.first) {
                return Err(damaged("an atom of the first group"));
            }
            let of_vectors = first.into_iter().zip(scales);
            let first = of_vectors.map(|(atom, scale)| Leading::of_numbers(atom, scale));
            let first = first
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| damaged("a scale"))?;
            let own = rest[..format.sparsity - 1]
                .iter()
                .map(|group| group[head].as_slice());
            let rest = by_vector(own.collect(), count);
            pages.push(Page::Additive(AdditivePage { first, rest }));
            continue;
        }
        let coefficients = match format.coefficients {
            CoefficientFormat::I8 => Coefficients::I8 {
                values: values.into_iter().map(|c| c as i8).collect(),
                scales,
            },
            CoefficientFormat::F8 => Coefficients::F8 { values, scales },
            CoefficientFormat::F32 | CoefficientFormat::InAtoms(_) => {
                let values = values.as_chunks::<4>().0;
                Coefficients::F32(values.iter().map(|&c| f32::from_le_bytes(c)).collect())
            }
        };
        if let Some((part, _)) = coefficients.not_finite() {
            return Err(damaged(part));
        }
        pages.push(Page::Sparse(SparsePage {
            len: count,
            indices: added_up(*format, indices, &lengths),
            coefficients,
            lengths,
        }));
    }
    Ok(pages)
}

/// Atoms of a vector of codes of one atom a group; 0 of other codes.
fn groups_of(format: &CodeFormat) -> usize {
    match format.coefficients {
        CoefficientFormat::InAtoms(_) => format.sparsity,
        _ => 0,
    }
}

/// Whether vectors have a scale.
fn is_scaled(format: &CodeFormat) -> bool {
    format.coefficients != CoefficientFormat::F32
}

/// Columns of `count` numbers as rows.
fn by_vector(columns: Vec<&[u8]>, count: usize) -> Vec<u8> {
    let mut rows = vec![0; columns.len() * count];
    for (j, column) in columns.iter().enumerate() {
        let own = rows.iter_mut().skip(j).step_by(columns.len());
        own.zip(*column).for_each(|(to, &from)| *to = from);
    }
    rows
}

/// Indices out of each one's difference to the one before in its vector.
fn added_up(format: CodeFormat, mut indices: Vec<u16>, lengths: &[u8]) -> Vec<u16> {
    let add_up = |row: &mut [u16]| {
        let mut before = 0u16;
        for index in row {
            *index = index.wrapping_add(before);
            before = *index;
        }
    };
    if format.variable {
        let mut rest = &mut indices[..];
        for &length in lengths {
            let (row, after) = rest.split_at_mut(usize::from(length));
            add_up(row);
            rest = after;
        }
    } else {
        indices.chunks_exact_mut(format.sparsity).for_each(add_up);
    }
    indices
}

/// Nonzeros of `count` vectors of each head.
fn nonzeros(formats: &[CodeFormat], lengths: &[Vec<u8>], count: usize) -> Result<Vec<usize>> {
    let heads = formats.iter().zip(lengths).map(|(format, lengths)| {
        if groups_of(format) > 0 {
            return Ok(0);
        }
        if !format.variable {
            return Ok(count * format.sparsity);
        }
        let each = lengths.iter().map(|&length| usize::from(length));
        if each.clone().any(|length| length > format.sparsity) {
            return Err(damaged("a vector's number of nonzeros"));
        }
        Ok(each.sum())
    });
    heads.collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

    use proptest::collection::vec;
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::dictionary::{CODEBOOK_ATOMS, CodebookSizes};
    use crate::encode::EncodedBatch;

    /// Codes of `count` drawn vectors, some of them short, over `atoms` atoms.
    fn drawn(format: CodeFormat, count: usize, atoms: usize, rng: &mut ChaCha8Rng) -> Codes {
        let s = format.sparsity;
        let mut batch = EncodedBatch {
            sparsity: s,
            lengths: Vec::new(),
            indices: vec![0; count * s],
            coefficients: vec![0.0; count * s],
            relative_errors: vec![0.0; count],
        };
        if let CoefficientFormat::InAtoms(groups) = format.coefficients {
            batch.lengths = vec![s as u16; count];
            for row in batch.coefficients.chunks_exact_mut(s) {
                row.fill(rng.random_range(0f32..1.0).exp2());
            }
            for (j, index) in batch.indices.iter_mut().enumerate() {
                let (group, atoms) = (
                    j % s,
                    if j % s == 0 {
                        groups.first
                    } else {
                        CODEBOOK_ATOMS
                    },
                );
                *index = (groups.start(group) + rng.random_range(0..atoms)) as u16;
            }
            let mut codes = Codes::new(format).unwrap();
            codes.extend(&batch);
            return codes;
        }
        for v in 0..count {
            let length = s - usize::from(rng.random::<u8>()) % (s + 1) * usize::from(v % 3 == 0);
            batch.lengths.push(length as u16);
            let mut chosen: Vec<u16> = Vec::new();
            while chosen.len() < length {
                let atom = rng.random_range(0..atoms) as u16;
                if !chosen.contains(&atom) {
                    chosen.push(atom);
                }
            }
            let scale = rng.random_range(-3f32..3.0).exp2();
            for (j, atom) in chosen.into_iter().enumerate() {
                batch.indices[v * s + j] = atom;
                batch.coefficients[v * s + j] = rng.random_range(-1f32..1.0) * scale;
            }
        }
        let mut codes = Codes::new(format).unwrap();
        codes.extend(&batch);
        codes
    }

    fn formats() -> impl Strategy<Value = CodeFormat> {
        let coefficients = prop_oneof![
            Just(CoefficientFormat::I8),
            Just(CoefficientFormat::F8),
            Just(CoefficientFormat::F32),
            (1usize..2049).prop_map(|first| CoefficientFormat::InAtoms(CodebookSizes { first })),
        ];
        (1usize..9, any::<bool>(), coefficients).prop_map(|(sparsity, variable, coefficients)| {
            CodeFormat {
                sparsity,
                variable: variable && !matches!(coefficients, CoefficientFormat::InAtoms(_)),
                coefficients,
            }
        })
    }

    fn read_again(codes: &[Codes], blocks: &[Vec<u8>]) -> Result<Vec<Codes>> {
        let formats: Vec<CodeFormat> = codes.iter().map(Codes::format).collect();
        read(&formats, blocks.iter().map(Vec::as_slice))
    }

    proptest! {
        /// Indices, coefficients and scales come back to the last bit, page by page.
        #[test]
        fn codes_come_back(formats in vec(formats(), 1..4), count in 0usize..300, drop: prop::sample::Index, seed: u64) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let draw = |&format: &CodeFormat| drawn(format, count, 4000, &mut rng);
            let mut codes: Vec<Codes> = formats.iter().map(draw).collect();
            let dropped = drop.index(count + 1);
            codes.iter_mut().for_each(|codes| codes.drop_front(dropped));
            let blocks = write(&codes.iter().collect::<Vec<_>>());
            let again = read_again(&codes, &blocks).unwrap();
            for (codes, again) in codes.iter().zip(&again) {
                prop_assert_eq!(format!("{:?}", codes.pages), format!("{:?}", again.pages));
                prop_assert_eq!(codes.len(), again.len());
                prop_assert!(again.largest_index() <= codes.largest_index());
            }
        }

        /// The checksum is renewed, so that what is wrong reaches the code behind it.
        #[test]
        fn damage_behind_the_checksum_never_panics(formats in vec(formats(), 1..3), seed: u64, at: prop::sample::Index, with: u8) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let codes: Vec<Codes> = formats.iter().map(|&f| drawn(f, 200, 500, &mut rng)).collect();
            let mut blocks = write(&codes.iter().collect::<Vec<_>>());
            *at.get_mut(&mut blocks[0]) = with;
            let checksum = crc32fast::hash(&blocks[0][5..]);
            blocks[0][1..5].copy_from_slice(&checksum.to_le_bytes());
            let _ = read_again(&codes, &blocks);
        }
    }

    #[test]
    fn codes_of_many_pages_come_back_as_the_same_pages() {
        for coefficients in [
            CoefficientFormat::I8,
            CoefficientFormat::InAtoms(CodebookSizes { first: 700 }),
        ] {
            many_pages(coefficients);
        }
    }

    fn many_pages(coefficients: CoefficientFormat) {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let format = CodeFormat {
            sparsity: 2,
            variable: false,
            coefficients,
        };
        let mut codes = drawn(format, 2 * PAGE + 100, 1000, &mut rng);
        codes.drop_front(1000);
        let blocks = write(&[&codes, &codes]);
        assert_eq!(blocks.len(), 3);
        let again = read_again(&[codes.clone(), codes.clone()], &blocks).unwrap();
        for again in again {
            assert_eq!(format!("{:?}", codes.pages), format!("{:?}", again.pages));
        }
    }

    #[test]
    fn blocks_differ_in_checksums_over_them() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let format = CodeFormat {
            sparsity: 4,
            variable: false,
            coefficients: CoefficientFormat::InAtoms(CodebookSizes { first: 50 }),
        };
        let mut checksum = || crc32fast::hash(&write(&[&drawn(format, 50, 0, &mut rng)])[0]);
        assert_ne!(checksum(), checksum());
    }

    #[test]
    fn every_flip_and_cut_is_found() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let format = CodeFormat {
            sparsity: 4,
            variable: true,
            coefficients: CoefficientFormat::F8,
        };
        let codes = [drawn(format, 50, 1000, &mut rng)];
        let blocks = write(&[&codes[0]]);
        for at in 0..blocks[0].len() {
            let mut flipped = blocks.clone();
            flipped[0][at] ^= 1 << (at % 8);
            assert!(read_again(&codes, &flipped).is_err(), "byte {at}");
            let cut = vec![blocks[0][..at].to_vec()];
            assert!(read_again(&codes, &cut).is_err(), "cut at {at}");
        }
        let other = CodeFormat {
            sparsity: 5,
            ..format
        };
        assert!(read(&[other], [blocks[0].as_slice()]).is_err());
    }
}
