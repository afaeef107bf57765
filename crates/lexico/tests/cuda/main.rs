//! The kernels' own text, compiled for the host by a C++ compiler, against the code for the CPU.
#![cfg(all(feature = "cuda", unix))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod emulator;

use emulator::Emulator;
use lexico::cuda::DevicePursuit;
use lexico::{Dictionary, Pursuit};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The emulator, or `None`, said so, where there is no compiler for it.
macro_rules! emulator {
    () => {
        match Emulator::new() {
            Ok(emulator) => emulator,
            Err(reason) => {
                eprintln!("SKIPPED: kernels on the host: {reason}");
                return;
            }
        }
    };
}

fn drawn(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-1f32..1.0)).collect()
}

#[test]
fn pursuit_is_that_of_the_cpu() {
    let emulator = emulator!();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for (m, atoms, sparsity, count) in [
        (32, 150, 5, 70),
        (20, 64, 20, 3),
        (16, 1, 1, 65),
        (48, 200, 4, 0),
    ] {
        let dictionary = Dictionary::normalised(drawn(&mut rng, atoms * m), m)
            .unwrap()
            .in_half_precision()
            .unwrap();
        let vectors = drawn(&mut rng, count * m);
        let device = DevicePursuit::new(&emulator, &dictionary, sparsity, 0.0).unwrap();
        let found = device.encode(&vectors).unwrap();
        let on_cpu = Pursuit::new(&dictionary, sparsity)
            .unwrap()
            .encode(&vectors)
            .unwrap();
        let ratio = found.mean_relative_error() / on_cpu.mean_relative_error().max(1e-6);
        assert!(
            count == 0 || sparsity == m || ratio < 1.005,
            "m = {m}: {ratio}"
        );
        for (v, x) in vectors.chunks_exact(m).enumerate() {
            let length = usize::from(found.lengths[v]);
            let mut rest: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            for j in v * sparsity..v * sparsity + length {
                let atom = dictionary.atom(usize::from(found.indices[j]));
                let c = f64::from(found.coefficients[j]);
                rest.iter_mut()
                    .zip(atom)
                    .for_each(|(r, &a)| *r -= c * f64::from(a));
            }
            let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            let whole: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let error = norm(&rest) / norm(&whole);
            assert!(
                (error - f64::from(found.relative_errors[v])).abs() < 1e-4,
                "{error}"
            );
        }
    }
}
