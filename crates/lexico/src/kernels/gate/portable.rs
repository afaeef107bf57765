//! Gates in plain Rust, which vectorises at any width.

use crate::kernels::softmax::exp;

/// Beyond this `e⁻ˣ` is no finite number, and the gate as good as shut.
const LARGEST_EXPONENT: f32 = 88.0;

#[inline(always)]
pub(super) fn gate<const FMA: bool>(gates: &mut [f32], up: &[f32]) {
    for (gate, &up) in gates.iter_mut().zip(up) {
        let x = *gate;
        // A NaN stays one.
        let negative = if -x > LARGEST_EXPONENT {
            LARGEST_EXPONENT
        } else {
            -x
        };
        *gate = x / (1.0 + exp::<FMA>(negative)) * up;
    }
}
