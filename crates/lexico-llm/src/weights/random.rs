//! Weights of any name and shape whose products keep activations of the size that trained ones do:
//! norms are 1, the rest small.

use std::ops::Range;

use candle_core::quantized::GgmlDType;
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn is_norm(name: &str) -> bool {
    name.ends_with("norm.weight")
}

pub(super) fn number_type(name: &str) -> GgmlDType {
    if is_norm(name) {
        GgmlDType::F32
    } else {
        GgmlDType::F16
    }
}

pub(super) fn read_rows(name: &str, rows: Range<usize>, out: &mut [u8]) {
    if is_norm(name) {
        for number in out.as_chunks_mut::<4>().0 {
            *number = 1f32.to_le_bytes();
        }
        return;
    }
    let seed = name
        .bytes()
        .fold(0u64, |seed, b| seed.wrapping_mul(31) + u64::from(b));
    let row_bytes = out.len() / rows.len().max(1);
    // A row is drawn by its number: the same whichever rows are read with it.
    for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(row as u64));
        for number in out.as_chunks_mut::<2>().0 {
            *number = f16::from_f32(rng.random_range(-0.03f32..0.03)).to_le_bytes();
        }
    }
}
