//! Times of products with matrices in half precision and in ggml's blocks: `cargo bench -p lexico-llm --bench matrix`.

use divan::Bencher;
use divan::counter::BytesCount;
use lexico::kernels::blocks::{BlockMatrix, BlockType, Panel};
use lexico::threads::Alone;
use lexico_llm::half_matrix::{HalfMatrix, Halves};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn main() {
    divan::main();
}

const ROWS: usize = 4096;
const COLUMNS: usize = 2048;

/// Products of some vectors with all rows of a matrix in blocks: one as in decode, eight as in prefill.
#[divan::bench(args = BlockType::ALL, consts = [1, 8])]
fn matrix_blocks<const VECTORS: usize>(bencher: Bencher<'_, '_>, kind: &BlockType) {
    let bytes = vec![1; ROWS * COLUMNS / kind.numbers() * kind.bytes()];
    let matrix = BlockMatrix::from_blocks(*kind, ROWS, COLUMNS, &bytes);
    let x: Vec<f32> = (0..VECTORS * COLUMNS).map(|i| (i as f32).sin()).collect();
    let x = Panel::new(&x, COLUMNS);
    let mut out = vec![0.0; VECTORS * ROWS];
    bencher
        .counter(BytesCount::new(matrix.bytes()))
        .bench_local(|| matrix.multiply(0..matrix.groups(), &x, &mut out, ROWS));
}

/// Products of one vector with all rows.
#[divan::bench]
fn matrix_f16(bencher: Bencher<'_, '_>) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut drawn =
        |count| -> Vec<f32> { (0..count).map(|_| rng.random_range(-1f32..1.0)).collect() };
    let numbers = drawn(ROWS * COLUMNS).into_iter();
    let numbers = Halves::F16(numbers.map(half::f16::from_f32).collect());
    let matrix = HalfMatrix::new(numbers, ROWS, COLUMNS);
    let x = drawn(COLUMNS);
    bencher
        .counter(BytesCount::new(ROWS * COLUMNS * 2))
        .bench_local(|| matrix.multiply(&x, &Alone));
}
