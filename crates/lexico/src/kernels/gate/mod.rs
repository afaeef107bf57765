//! What gated feed-forward layers do between their products.

mod portable;

use super::{compile, dispatch};

compile! {
    gate(gates: &mut [f32], up: &[f32]);
}

/// `gates = silu(gates) · up`, where `silu(x) = x / (1 + e⁻ˣ)` (Elfwing et al. 2018; as a gate, Shazeer 2020), to a few
/// units in the last place.
///
/// # Panics
/// Where there are not as many of both.
pub fn gate(gates: &mut [f32], up: &[f32]) {
    assert_eq!(gates.len(), up.len(), "as many gates as numbers");
    dispatch!(gate(gates, up));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::testing::{at_level, levels};

    proptest! {
        #[test]
        fn gates_agree_with_f64(pairs in prop::collection::vec((-100f32..100.0, -1e3f32..1e3), 1..70)) {
            let (gates, up): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            for level in levels() {
                at_level(level, || {
                    let mut found = gates.clone();
                    gate(&mut found, &up);
                    for ((&found, &x), &up) in found.iter().zip(&gates).zip(&up) {
                        let x = f64::from(x);
                        let exact = x / (1.0 + (-x).exp()) * f64::from(up);
                        let close = (f64::from(found) - exact).abs() <= 1e-6 * exact.abs() + 1e-33;
                        assert!(close, "{found} for {exact} at {level:?}");
                    }
                });
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for level in levels() {
            at_level(level, || {
                let mut gates = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0];
                gate(&mut gates, &[1.0, 1.0, 1.0, f32::NAN]);
                assert!(
                    gates[0].is_nan() && gates[3].is_nan(),
                    "{gates:?} at {level:?}"
                );
                assert_eq!(gates[1], f32::INFINITY);
            });
        }
    }
}
