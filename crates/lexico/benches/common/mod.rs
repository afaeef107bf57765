//! Work of known size for benchmarks and instruction counts, the same in every run.

#![allow(dead_code)] // each bench file uses a part
#![allow(clippy::expect_used)] // sizes here are possible ones

use std::hint::black_box;

use lexico::attention::{DenseRows, Head, NumberType, Source, attend_heads};
use lexico::codes::stored;
use lexico::dictionary::{CodebookSizes, Codebooks, HeadMaps, MAX_FIRST_ATOMS, RotaryMeans};
use lexico::threads::Alone;
use lexico::{
    AdditiveFormat, BeamSearch, CodeFormat, Codes, CoefficientFormat, Dictionary, EncodedBatch,
    Encoder, KeyValue, Pursuit, SparseFormat,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Length of all vectors.
pub(crate) const HEAD_DIM: usize = 128;

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

fn codes(format: impl Into<CodeFormat>, batch: &EncodedBatch) -> Codes {
    let mut codes = Codes::new(format).expect("such codes there are");
    codes.extend(batch);
    codes
}

/// Sparse codes with coefficients of a byte.
fn sparse(sparsity: usize, batch: &EncodedBatch) -> Codes {
    let format = SparseFormat {
        sparsity,
        variable: false,
        coefficients: CoefficientFormat::I8,
    };
    codes(format, batch)
}

/// Codes of as many vectors as a stored block holds, over 4096 atoms or, `additive`, over codebooks whose atoms are used so
/// unevenly that they have 7.7 bits.
pub(crate) fn page(sparsity: usize, additive: bool) -> Codes {
    const VECTORS: usize = 8192;
    let mut rng = rng();
    if !additive {
        return sparse(sparsity, &drawn_codes(&mut rng, VECTORS, sparsity, 4096));
    }
    let sizes = CodebookSizes {
        first: MAX_FIRST_ATOMS,
    };
    let mut index = |codebook: usize| {
        let own = rng.random::<f32>().powf(1.75) * sizes.size(codebook) as f32;
        (sizes.start(codebook) + own as usize) as u16
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
    codes(AdditiveFormat { sparsity, sizes }, &batch)
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
        let batch = pursuit.encode_on(&vectors, &Alone);
        black_box(batch).expect("finite vectors");
    }
}

/// Stores codes: coefficients become 8-bit integers.
pub(crate) fn to_bytes(vectors: usize, sparsity: usize) -> impl FnMut() {
    let batch = drawn_codes(&mut rng(), vectors, sparsity, 4096);
    move || {
        black_box(sparse(sparsity, &batch));
    }
}

/// Turns codes back into vectors: integers become coefficients, and each adds an atom.
pub(crate) fn from_bytes(vectors: usize, sparsity: usize) -> impl FnMut() {
    let mut rng = rng();
    let dictionary = dictionary(&mut rng, 4096);
    let codes = sparse(sparsity, &drawn_codes(&mut rng, vectors, sparsity, 4096));
    move || {
        black_box(codes.decode(&dictionary)).expect("codes of this dictionary");
    }
}

/// Attends to coded positions: scores, softmax, sums of codes, and the dictionary's share, which is small
/// with its 256 atoms.
pub(crate) fn coded(positions: usize, sparsity: usize, group: usize) -> impl FnMut() {
    let mut rng = rng();
    let (keys, values) = (dictionary(&mut rng, 256), dictionary(&mut rng, 256));
    let mut drawn_codes = || sparse(sparsity, &drawn_codes(&mut rng, positions, sparsity, 256));
    let (key_codes, value_codes) = (drawn_codes(), drawn_codes());
    let mut attend = attention(&mut rng, group);
    move || {
        attend(&[Source::Codes {
            codes: KeyValue::new(&key_codes, &value_codes),
            atoms: KeyValue::new((&keys).into(), (&values).into()),
            offsets: None,
        }]);
    }
}

/// Codebooks of 256 atoms each.
fn codebooks(rng: &mut ChaCha8Rng, count: usize) -> Codebooks {
    let sizes = CodebookSizes { first: 256 };
    let atoms = drawn(rng, sizes.atoms(count) * HEAD_DIM);
    Codebooks::new(atoms, HEAD_DIM, sizes).expect("whole codebooks")
}

/// Codes `vectors` vectors over `sparsity` codebooks.
pub(crate) fn beam_search(vectors: usize, sparsity: usize) -> impl FnMut() {
    let mut rng = rng();
    let codebooks = codebooks(&mut rng, sparsity);
    let vectors = drawn(&mut rng, vectors * HEAD_DIM);
    move || {
        let search = BeamSearch::new(&codebooks, sparsity).expect("a possible sparsity");
        let batch = search.encode_on(&vectors, &Alone);
        black_box(batch).expect("finite vectors");
    }
}

/// Maps of one head that change nothing, whose keys are without their mean before a rotary embedding of base 10⁶.
fn rotary_maps(rng: &mut ChaCha8Rng) -> HeadMaps {
    let mut same = vec![0.0; HEAD_DIM * HEAD_DIM];
    same.iter_mut().step_by(HEAD_DIM + 1).for_each(|x| *x = 1.0);
    let pairs = HEAD_DIM / 2;
    let frequency = |pair: usize| 1e6f32.powf(-(pair as f32) / pairs as f32);
    let frequencies: Vec<f32> = (0..pairs).map(frequency).collect();
    let means = RotaryMeans::new(&frequencies, &drawn(rng, HEAD_DIM), HEAD_DIM);
    let maps = HeadMaps::new(&[0.0; HEAD_DIM], &same, HEAD_DIM);
    let maps = maps.and_then(|maps| maps.with_rotary_means(means?));
    maps.expect("maps of one head")
}

/// Does what [`coded`] does with additive codes over codebooks of 256 atoms each; keys are without their mean before the
/// `rotary` embedding, or as they are.
pub(crate) fn additive(
    positions: usize,
    sparsity: usize,
    group: usize,
    rotary: bool,
) -> impl FnMut() {
    let mut rng = rng();
    let (keys, values) = (codebooks(&mut rng, sparsity), codebooks(&mut rng, sparsity));
    let sizes = keys.sizes();
    let mut drawn_codes = || {
        let mut batch = drawn_codes(&mut rng, positions, sparsity, 256);
        for (atom, index) in batch.indices.iter_mut().enumerate() {
            *index += sizes.start(atom % sparsity) as u16;
        }
        codes(AdditiveFormat { sparsity, sizes }, &batch)
    };
    let (key_codes, value_codes) = (drawn_codes(), drawn_codes());
    let maps = rotary.then(|| rotary_maps(&mut rng));
    let mut attend = attention(&mut rng, group);
    move || {
        attend(&[Source::Codes {
            codes: KeyValue::new(&key_codes, &value_codes),
            atoms: KeyValue::new(keys.first(sparsity), values.first(sparsity)),
            offsets: maps.as_ref().and_then(|maps| maps.offsets(0, 4)),
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
        attend(&[Source::Dense(KeyValue::new(&keys, &values))]);
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
        attend_heads(&mut [head], HEAD_DIM, 1, None, &Alone);
        black_box(&out);
    }
}
