//! Work of known size for benchmarks and instruction counts, the same in every run.

#![allow(dead_code)] // each bench file uses a part
#![allow(clippy::expect_used)] // sizes here are possible ones

use std::hint::black_box;

use lexico::attention::{DenseRows, Head, NumberType, Source, attend_heads};
use lexico::codes::stored;
use lexico::dictionary::{CODEBOOK_ATOMS, CodebookSizes, Codebooks, MAX_FIRST_ATOMS};
use lexico::matrix::{HalfMatrix, Halves};
use lexico::threads::Threads;
use lexico::{CodeFormat, Codes, CoefficientFormat, Dictionary, EncodedBatch, Pursuit};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Length of all vectors.
pub(crate) const HEAD_DIM: usize = 128;

/// Runs tasks one after the other.
struct OneThread;

impl Threads for OneThread {
    fn count(&self) -> usize {
        1
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(7)
}

fn drawn(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    // Sums of uniforms: near enough to normal.
    (0..count)
        .map(|_| (0..4).map(|_| rng.random_range(-1f32..1.0)).sum())
        .collect()
}

fn dictionary(rng: &mut ChaCha8Rng, atoms: usize) -> Dictionary {
    Dictionary::normalised(drawn(rng, atoms * HEAD_DIM), HEAD_DIM).expect("no atom is zero")
}

/// Codes drawn at random, as many nonzeros in each.
fn drawn_codes(rng: &mut ChaCha8Rng, count: usize, sparsity: usize, atoms: usize) -> EncodedBatch {
    let indices = (0..count * sparsity).map(|_| rng.random_range(0..atoms) as u16);
    EncodedBatch {
        sparsity,
        lengths: vec![sparsity as u16; count],
        indices: indices.collect(),
        coefficients: drawn(rng, count * sparsity),
        relative_errors: vec![0.0; count],
    }
}

fn codes(sparsity: usize, batch: &EncodedBatch) -> Codes {
    let mut codes = Codes::new(CodeFormat {
        sparsity,
        variable: false,
        coefficients: CoefficientFormat::I8,
    })
    .expect("such codes there are");
    codes.extend(batch);
    codes
}

/// Codes of as many vectors as a stored block holds, over 4096 atoms or, `packed`, over groups whose atoms are used so
/// unevenly that they have 7.7 bits.
pub(crate) fn page(sparsity: usize, packed: bool) -> Codes {
    const VECTORS: usize = 8192;
    let mut rng = rng();
    if !packed {
        return codes(sparsity, &drawn_codes(&mut rng, VECTORS, sparsity, 4096));
    }
    let groups = CodebookSizes {
        first: MAX_FIRST_ATOMS,
    };
    let mut index = |group: usize| {
        let atoms = if group == 0 {
            groups.first
        } else {
            CODEBOOK_ATOMS
        };
        let own = rng.random::<f32>().powf(1.75) * atoms as f32;
        (groups.start(group) + own as usize) as u16
    };
    let indices: Vec<u16> = (0..VECTORS * sparsity)
        .map(|i| index(i % sparsity))
        .collect();
    let scales = (0..VECTORS).flat_map(|_| vec![rng.random_range(1f32..1.3); sparsity]);
    let batch = EncodedBatch {
        sparsity,
        lengths: vec![sparsity as u16; VECTORS],
        indices,
        coefficients: scales.collect(),
        relative_errors: vec![0.0; VECTORS],
    };
    let format = CodeFormat {
        sparsity,
        variable: false,
        coefficients: CoefficientFormat::InAtoms(groups),
    };
    let mut codes = Codes::new(format).expect("such codes there are");
    codes.extend(&batch);
    codes
}

/// A page to its stored form.
pub(crate) fn to_stored(codes: &Codes) -> impl FnMut() {
    move || {
        black_box(stored::write(&[black_box(codes)]));
    }
}

/// A page from its stored form.
pub(crate) fn from_stored(codes: &Codes) -> impl FnMut() {
    let blocks = stored::write(&[codes]);
    move || {
        let blocks = blocks.iter().map(Vec::as_slice);
        black_box(stored::read(&[codes.format()], blocks)).expect("blocks as written");
    }
}

/// Codes `vectors` vectors over `atoms` atoms.
pub(crate) fn pursuit(vectors: usize, atoms: usize, sparsity: usize) -> impl FnMut() {
    let mut rng = rng();
    let dictionary = dictionary(&mut rng, atoms);
    let vectors = drawn(&mut rng, vectors * HEAD_DIM);
    move || {
        let pursuit = Pursuit::new(&dictionary, sparsity).expect("a possible sparsity");
        let batch = pursuit.encode_on(&vectors, &OneThread);
        black_box(batch).expect("finite vectors");
    }
}

/// Stores codes: coefficients become 8-bit integers.
pub(crate) fn to_bytes(vectors: usize, sparsity: usize) -> impl FnMut() {
    let batch = drawn_codes(&mut rng(), vectors, sparsity, 4096);
    move || {
        black_box(codes(sparsity, &batch));
    }
}

/// Turns codes back into vectors: integers become coefficients, and each adds an atom.
pub(crate) fn from_bytes(vectors: usize, sparsity: usize) -> impl FnMut() {
    let mut rng = rng();
    let dictionary = dictionary(&mut rng, 4096);
    let codes = codes(
        sparsity,
        &drawn_codes(&mut rng, vectors, sparsity, dictionary.len()),
    );
    move || {
        black_box(codes.decode(&dictionary)).expect("codes of this dictionary");
    }
}

/// Attends to coded positions: scores, softmax, sums of codes, and the dictionary's share, which is small
/// with its 256 atoms.
pub(crate) fn coded(positions: usize, sparsity: usize, group: usize) -> impl FnMut() {
    let mut rng = rng();
    let (keys, values) = (dictionary(&mut rng, 256), dictionary(&mut rng, 256));
    let mut drawn_codes = || {
        codes(
            sparsity,
            &drawn_codes(&mut rng, positions, sparsity, keys.len()),
        )
    };
    let (key_codes, value_codes) = (drawn_codes(), drawn_codes());
    let mut attend = attention(&mut rng, group);
    move || {
        attend(&[Source::Codes {
            keys: &key_codes,
            values: &value_codes,
            key_atoms: (&keys).into(),
            value_atoms: (&values).into(),
        }]);
    }
}

/// As [`coded`], codes of one atom of each group of 256.
pub(crate) fn packed(positions: usize, sparsity: usize, group: usize) -> impl FnMut() {
    let mut rng = rng();
    let groups = CodebookSizes { first: 256 };
    let mut dictionary = || {
        let atoms = drawn(&mut rng, groups.atoms(sparsity) * HEAD_DIM);
        Codebooks::new(atoms, HEAD_DIM, groups).expect("whole groups")
    };
    let (keys, values) = (dictionary(), dictionary());
    let mut drawn_codes = || {
        let mut codes = Codes::new(CodeFormat {
            sparsity,
            variable: false,
            coefficients: CoefficientFormat::InAtoms(groups),
        })
        .expect("such codes there are");
        let mut batch = drawn_codes(&mut rng, positions, sparsity, 256);
        for (nonzero, index) in batch.indices.iter_mut().enumerate() {
            *index += groups.start(nonzero % sparsity) as u16;
        }
        codes.extend(&batch);
        codes
    };
    let (key_codes, value_codes) = (drawn_codes(), drawn_codes());
    let mut attend = attention(&mut rng, group);
    move || {
        attend(&[Source::Codes {
            keys: &key_codes,
            values: &value_codes,
            key_atoms: keys.atoms(sparsity),
            value_atoms: values.atoms(sparsity),
        }]);
    }
}

/// Attends to dense positions: products, softmax, weighted sums.
pub(crate) fn dense(positions: usize, number_type: NumberType, group: usize) -> impl FnMut() {
    let mut rng = rng();
    let mut rows = || {
        let mut rows = DenseRows::new(HEAD_DIM, number_type);
        rows.extend(&drawn(&mut rng, positions * HEAD_DIM));
        rows
    };
    let (keys, values) = (rows(), rows());
    let mut attend = attention(&mut rng, group);
    move || {
        attend(&[Source::Dense {
            keys: &keys,
            values: &values,
        }]);
    }
}

/// Attention of one new position's queries.
fn attention(rng: &mut ChaCha8Rng, group: usize) -> impl FnMut(&[Source<'_>]) + use<> {
    let queries = drawn(rng, group * HEAD_DIM);
    let mut out = vec![0.0; queries.len()];
    move |sources| {
        let head = Head {
            queries: &queries,
            sources,
            out: &mut out,
        };
        attend_heads(&mut [head], HEAD_DIM, 1, None, &OneThread);
        black_box(&out);
    }
}

/// Products of one vector with the rows of a matrix in half precision.
pub(crate) fn matrix(rows: usize, columns: usize) -> impl FnMut() {
    let mut rng = rng();
    let numbers = drawn(&mut rng, rows * columns).into_iter();
    let numbers = Halves::F16(numbers.map(half::f16::from_f32).collect());
    let matrix = HalfMatrix::new(numbers, rows, columns);
    let x = drawn(&mut rng, columns);
    move || {
        black_box(matrix.multiply(&x, &OneThread));
    }
}
