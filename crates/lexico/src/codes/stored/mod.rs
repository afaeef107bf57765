//! Codes at rest: entropy-coded blocks for disk and transfer.
//!
//! A block holds up to 8,192 vectors of every head of one layer's keys or values, and can be read alone:
//!
//! | bytes | |
//! |---|---|
//! | 1 | [`VERSION`] |
//! | 4 | CRC-32 of all that follows |
//! | 2 | vectors of each head |
//! | 2, then 8 a head | heads; sparsity, whether lengths vary, how coefficients are stored, atoms of the first codebook |
//! | | columns of all heads: lengths where they vary, indices, coefficients, scales; of additive codes scales, the atoms of the first codebook, then those of every other one |
//!
//! The checksum is not at the end, where checksums of whole blocks, in a file that holds many, would be the same for all
//! of them. Numbers are little-endian. A sparse vector's indices ascend and are stored as their differences, which are
//! small. A column is raw, or coded with the distribution of its symbols (asymmetric numeral systems, Duda 2013), heads
//! apart or together, whichever is smallest.

mod additive;
mod columns;
mod input;
mod rans;
mod sparse;

use super::pages::{PAGE, Page, Pages};
use super::{CodeFormat, Codes, FamilyPages};
use crate::{Error, Result};
use input::{Input, damaged};

/// The version that a block begins with.
pub const VERSION: u8 = 1;

/// Pages of one family, as columns.
trait StoredPage: Page {
    /// The format as a block describes it.
    fn describe(format: Self::Format) -> [u8; 8];

    /// Writes columns of the codes of every head.
    fn write(heads: &[Vec<Self::Block<'_>>], out: &mut Vec<u8>);

    /// Reads the page of every head from columns of `count` vectors each.
    fn read(input: &mut Input<'_>, formats: &[Self::Format], count: usize) -> Result<Vec<Self>>;
}

/// Writes the codes of several heads as blocks, which together hold all of them in order; none where there are none.
///
/// # Panics
/// Where the heads differ in their number of vectors, or in the family of their codes.
pub fn write(heads: &[&Codes]) -> Vec<Vec<u8>> {
    let (mut sparse, mut additive) = (Vec::new(), Vec::new());
    for codes in heads {
        match &codes.0 {
            FamilyPages::Sparse(pages) => sparse.push(pages),
            FamilyPages::Additive(pages) => additive.push(pages),
        }
    }
    assert!(
        sparse.is_empty() || additive.is_empty(),
        "heads of one family"
    );
    let mut blocks = write_pages(&sparse);
    blocks.extend(write_pages(&additive));
    blocks
}

fn write_pages<P: StoredPage>(heads: &[&Pages<P>]) -> Vec<Vec<u8>> {
    let Some(first) = heads.first() else {
        return Vec::new();
    };
    assert!(
        heads.iter().all(|pages| pages.len() == first.len()),
        "heads of one length"
    );
    let formats: Vec<P::Format> = heads.iter().map(|pages| pages.format()).collect();
    let (mut blocks, mut written) = (Vec::new(), 0);
    // Blocks are read as pages, and sums over codes go page by page: what is read has the pages that were written.
    for page in first.pages() {
        for start in (0..page.len()).step_by(PAGE) {
            let count = PAGE.min(page.len() - start);
            let mut out = (count as u16).to_le_bytes().to_vec();
            out.extend(describe::<P>(&formats));
            let own = heads.iter().map(|pages| {
                let mut own = Vec::new();
                pages.visit(written..written + count, |block, _| own.push(block));
                own
            });
            let own: Vec<Vec<P::Block<'_>>> = own.collect();
            written += count;
            P::write(&own, &mut out);
            let checksum = crc32fast::hash(&out).to_le_bytes();
            blocks.push([&[VERSION], checksum.as_slice(), &out].concat());
        }
    }
    blocks
}

/// Reads the codes of heads of these formats from blocks, in order, of [`write()`]; no codes where there are no blocks.
///
/// # Errors
/// [`Error::Stored`] where a block is damaged or holds codes of other formats, or the formats are of both families;
/// those of [`Codes::new`].
pub fn read<'a>(
    formats: &[CodeFormat],
    blocks: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Vec<Codes>> {
    let mut codes: Vec<Codes> = formats
        .iter()
        .map(|&format| Codes::new(format))
        .collect::<Result<_>>()?;
    let (mut sparse, mut additive) = (Vec::new(), Vec::new());
    for codes in &mut codes {
        match &mut codes.0 {
            FamilyPages::Sparse(pages) => sparse.push(pages),
            FamilyPages::Additive(pages) => additive.push(pages),
        }
    }
    for block in blocks {
        match (sparse.is_empty(), additive.is_empty()) {
            (_, true) => read_block(&mut sparse, block)?,
            (true, false) => read_block(&mut additive, block)?,
            (false, false) => {
                let reason = "a block holds codes of one family, not of both";
                return Err(Error::Stored(reason.to_owned()));
            }
        }
    }
    Ok(codes)
}

/// The description of the heads of a block.
fn describe<P: StoredPage>(formats: &[P::Format]) -> Vec<u8> {
    let mut out = (formats.len() as u16).to_le_bytes().to_vec();
    out.extend(formats.iter().flat_map(|&format| P::describe(format)));
    out
}

/// Appends a block's codes to those of every head.
fn read_block<P: StoredPage>(heads: &mut [&mut Pages<P>], block: &[u8]) -> Result<()> {
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
    let formats: Vec<P::Format> = heads.iter().map(|pages| pages.format()).collect();
    let expected = describe::<P>(&formats);
    if input.take(expected.len())? != expected {
        return Err(Error::Stored(
            "the block holds codes of other heads or sparsities".to_owned(),
        ));
    }
    let pages = P::read(&mut input, &formats, count)?;
    input.end()?;
    for (head, page) in heads.iter_mut().zip(pages) {
        head.push(page);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

    use proptest::collection::vec;
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::codes::{AdditiveFormat, CoefficientFormat, SparseFormat};
    use crate::dictionary::CodebookSizes;
    use crate::encode::EncodedBatch;

    /// Codes of `count` drawn vectors, some of them short, over `atoms` atoms.
    fn drawn(format: CodeFormat, count: usize, atoms: usize, rng: &mut ChaCha8Rng) -> Codes {
        let s = format.sparsity();
        let mut batch = EncodedBatch {
            sparsity: s,
            lengths: Vec::new(),
            indices: vec![0; count * s],
            coefficients: vec![0.0; count * s],
            relative_errors: vec![0.0; count],
        };
        if let CodeFormat::Additive(AdditiveFormat { sizes, .. }) = format {
            batch.lengths = vec![s as u16; count];
            for row in batch.coefficients.chunks_exact_mut(s) {
                row.fill(rng.random_range(0f32..1.0).exp2());
            }
            for (j, index) in batch.indices.iter_mut().enumerate() {
                let own = rng.random_range(0..sizes.size(j % s));
                *index = (sizes.start(j % s) + own) as u16;
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

    /// The formats of up to `heads` heads, of one family.
    fn formats(heads: usize) -> impl Strategy<Value = Vec<CodeFormat>> {
        let coefficients = prop_oneof![
            Just(CoefficientFormat::I8),
            Just(CoefficientFormat::F8),
            Just(CoefficientFormat::F32),
        ];
        let any_sparse = (1usize..9, any::<bool>(), coefficients);
        let any_sparse = any_sparse.prop_map(|(s, variable, c)| sparse(s, variable, c));
        let any_additive = (1usize..9, 1usize..2049).prop_map(|(s, first)| additive(s, first));
        prop_oneof![vec(any_sparse, 1..=heads), vec(any_additive, 1..=heads)]
    }

    fn sparse(sparsity: usize, variable: bool, coefficients: CoefficientFormat) -> CodeFormat {
        CodeFormat::Sparse(SparseFormat {
            sparsity,
            variable,
            coefficients,
        })
    }

    fn additive(sparsity: usize, first: usize) -> CodeFormat {
        CodeFormat::Additive(AdditiveFormat {
            sparsity,
            sizes: CodebookSizes { first },
        })
    }

    /// The pages to the last bit.
    fn pages(codes: &Codes) -> String {
        match &codes.0 {
            FamilyPages::Sparse(pages) => format!("{:?}", pages.pages().collect::<Vec<_>>()),
            FamilyPages::Additive(pages) => format!("{:?}", pages.pages().collect::<Vec<_>>()),
        }
    }

    fn read_again(codes: &[Codes], blocks: &[Vec<u8>]) -> Result<Vec<Codes>> {
        let formats: Vec<CodeFormat> = codes.iter().map(Codes::format).collect();
        read(&formats, blocks.iter().map(Vec::as_slice))
    }

    proptest! {
        /// Indices, coefficients and scales come back to the last bit, page by page.
        #[test]
        fn codes_come_back(formats in formats(3), count in 0usize..300, drop: prop::sample::Index, seed: u64) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let draw = |&format: &CodeFormat| drawn(format, count, 4000, &mut rng);
            let mut codes: Vec<Codes> = formats.iter().map(draw).collect();
            let dropped = drop.index(count + 1);
            codes.iter_mut().for_each(|codes| codes.drop_front(dropped));
            let blocks = write(&codes.iter().collect::<Vec<_>>());
            let again = read_again(&codes, &blocks).unwrap();
            for (codes, again) in codes.iter().zip(&again) {
                prop_assert_eq!(pages(codes), pages(again));
                prop_assert_eq!(codes.len(), again.len());
                prop_assert!(again.largest_index() <= codes.largest_index());
            }
        }

        /// The checksum is renewed, so that what is wrong reaches the code behind it.
        #[test]
        fn damage_behind_the_checksum_never_panics(formats in formats(2), seed: u64, at: prop::sample::Index, with: u8) {
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
        for format in [sparse(2, false, CoefficientFormat::I8), additive(2, 700)] {
            many_pages(format);
        }
    }

    fn many_pages(format: CodeFormat) {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut codes = drawn(format, 2 * PAGE + 100, 1000, &mut rng);
        codes.drop_front(1000);
        let blocks = write(&[&codes, &codes]);
        assert_eq!(blocks.len(), 3);
        let again = read_again(&[codes.clone(), codes.clone()], &blocks).unwrap();
        for again in again {
            assert_eq!(pages(&codes), pages(&again));
        }
    }

    #[test]
    fn blocks_differ_in_checksums_over_them() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let format = additive(4, 50);
        let mut checksum = || crc32fast::hash(&write(&[&drawn(format, 50, 0, &mut rng)])[0]);
        assert_ne!(checksum(), checksum());
    }

    #[test]
    fn every_flip_and_cut_is_found() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let format = sparse(4, true, CoefficientFormat::F8);
        let codes = [drawn(format, 50, 1000, &mut rng)];
        let blocks = write(&[&codes[0]]);
        for at in 0..blocks[0].len() {
            let mut flipped = blocks.clone();
            flipped[0][at] ^= 1 << (at % 8);
            assert!(read_again(&codes, &flipped).is_err(), "byte {at}");
            let cut = vec![blocks[0][..at].to_vec()];
            assert!(read_again(&codes, &cut).is_err(), "cut at {at}");
        }
        for other in [sparse(5, true, CoefficientFormat::F8), additive(4, 50)] {
            assert!(read(&[other], [blocks[0].as_slice()]).is_err());
            assert!(read(&[format, other], [blocks[0].as_slice()]).is_err());
        }
    }
}
