//! Times of products with a matrix in half precision: `cargo bench -p lexico-llm --bench matrix`.

use divan::Bencher;
use divan::counter::BytesCount;
use lexico::threads::Alone;
use lexico_llm::half_matrix::{HalfMatrix, Halves};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn main() {
    divan::main();
}

/// Products of one vector with all rows.
#[divan::bench]
fn matrix_f16(bencher: Bencher<'_, '_>) {
    const ROWS: usize = 4096;
    const COLUMNS: usize = 2048;
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
