//! Times of the codec's inner loops, by way of what calls them, at the level that `LEXICO_LEVEL` names:
//!
//! ```sh
//! cargo bench -p lexico --bench kernels
//! LEXICO_LEVEL=avx2 cargo bench -p lexico --bench kernels -- coded
//! ```
//!
//! Machines are shared: the fastest sample says most.

mod common;

use common::HEAD_DIM;
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use lexico::attention::NumberType;

fn main() {
    divan::main();
}

/// One step: the scan of all atoms, exact products of the candidates, and what is done once a vector.
#[divan::bench(args = [1024, 4096])]
fn first_step_of_pursuit(bencher: Bencher<'_, '_>, atoms: usize) {
    const VECTORS: usize = 64;
    let work = common::pursuit(VECTORS, atoms, 1);
    bencher.counter(ItemsCount::new(VECTORS)).bench_local(work);
}

/// Whole pursuits: beside scans, orthonormalisation against the support and the final refinement.
#[divan::bench(args = [4, 8, 16, 32])]
fn pursuit(bencher: Bencher<'_, '_>, sparsity: usize) {
    const VECTORS: usize = 64;
    let work = common::pursuit(VECTORS, 4096, sparsity);
    bencher.counter(ItemsCount::new(VECTORS)).bench_local(work);
}

#[divan::bench(args = [8, 16])]
fn coefficients_to_bytes(bencher: Bencher<'_, '_>, sparsity: usize) {
    const VECTORS: usize = 4096;
    let work = common::to_bytes(VECTORS, sparsity);
    bencher.counter(ItemsCount::new(VECTORS)).bench_local(work);
}

#[divan::bench(args = [8, 16])]
fn vectors_from_bytes(bencher: Bencher<'_, '_>, sparsity: usize) {
    const VECTORS: usize = 4096;
    let work = common::from_bytes(VECTORS, sparsity);
    bencher.counter(ItemsCount::new(VECTORS)).bench_local(work);
}

/// A page of codes from its stored form, by atoms a vector and whether these are additive, in bytes of memory.
#[divan::bench(args = [(16, false), (12, true)])]
fn codes_from_stored(bencher: Bencher<'_, '_>, (sparsity, additive): (usize, bool)) {
    let codes = common::page(sparsity, additive);
    let bytes = BytesCount::new(codes.bytes_used());
    bencher
        .counter(bytes)
        .bench_local(common::from_stored(&codes));
}

/// The other way.
#[divan::bench(args = [(16, false), (12, true)])]
fn codes_to_stored(bencher: Bencher<'_, '_>, (sparsity, additive): (usize, bool)) {
    let codes = common::page(sparsity, additive);
    let bytes = BytesCount::new(codes.bytes_used());
    bencher
        .counter(bytes)
        .bench_local(common::to_stored(&codes));
}

/// Coded positions, by sparsity and queries of a query group.
#[divan::bench(args = [(8, 1), (16, 1), (8, 4), (12, 4), (16, 4), (32, 4), (16, 8)])]
fn coded_attention(bencher: Bencher<'_, '_>, (sparsity, group): (usize, usize)) {
    const POSITIONS: usize = 8192;
    let work = common::coded(POSITIONS, sparsity, group);
    let bytes = 2 * POSITIONS * (3 * sparsity + 1);
    bencher.counter(BytesCount::new(bytes)).bench_local(work);
}

/// Additive codes, by sparsity and queries of a query group: as near to the vectors as those above of 8 and 16.
#[divan::bench(args = [(13, 1), (28, 1), (7, 4), (13, 4), (28, 4), (28, 8)])]
fn additive_attention(bencher: Bencher<'_, '_>, (sparsity, group): (usize, usize)) {
    additive(bencher, sparsity, group, false);
}

/// The same, keys without their mean before the rotary embedding.
#[divan::bench(args = [(7, 1), (7, 4), (13, 4), (7, 8)])]
fn rotary_attention(bencher: Bencher<'_, '_>, (sparsity, group): (usize, usize)) {
    additive(bencher, sparsity, group, true);
}

fn additive(bencher: Bencher<'_, '_>, sparsity: usize, group: usize, rotary: bool) {
    const POSITIONS: usize = 8192;
    let work = common::additive(POSITIONS, sparsity, group, rotary);
    let bytes = 2 * POSITIONS * (sparsity + 1);
    bencher.counter(BytesCount::new(bytes)).bench_local(work);
}

/// Dense positions in half precision, by queries of a query group.
#[divan::bench(args = [1, 2, 4, 8])]
fn dense_attention_f16(bencher: Bencher<'_, '_>, group: usize) {
    dense_attention(bencher, NumberType::F16, 2, group);
}

/// Dense positions in single precision, by queries of a query group.
#[divan::bench(args = [1, 4])]
fn dense_attention_f32(bencher: Bencher<'_, '_>, group: usize) {
    dense_attention(bencher, NumberType::F32, 4, group);
}

fn dense_attention(bencher: Bencher<'_, '_>, number_type: NumberType, width: usize, group: usize) {
    const POSITIONS: usize = 8192;
    let work = common::dense(POSITIONS, number_type, group);
    let bytes = 2 * POSITIONS * HEAD_DIM * width;
    bencher.counter(BytesCount::new(bytes)).bench_local(work);
}
