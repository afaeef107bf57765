//! The kernels' own text, compiled for the host by a C++ compiler, against the code for the CPU.
#![cfg(all(feature = "cuda", unix))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod emulator;

use emulator::Emulator;
use lexico::cuda::{DEVICE_BEAM, DeviceGroupedPursuit, DevicePursuit};
use lexico::dictionary::{GROUP, GroupedDictionary, Groups};
use lexico::pursuit::GroupedPursuit;
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

/// Groups each nearer to zero than the one before.
fn grouped(rng: &mut ChaCha8Rng, m: usize, first: usize, groups: usize) -> GroupedDictionary {
    let count = first + (groups - 1) * GROUP;
    let mut atoms = drawn(rng, count * m);
    for (i, atom) in atoms.chunks_exact_mut(m).enumerate() {
        let group = i.saturating_sub(first).div_ceil(GROUP);
        atom.iter_mut()
            .for_each(|x| *x *= 0.8f32.powi(group as i32));
    }
    let groups = Groups { first };
    GroupedDictionary::new(atoms, m, groups)
        .unwrap()
        .in_half_precision()
        .unwrap()
}

#[test]
fn packed_codes_are_those_of_the_cpu() {
    let emulator = emulator!();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for (m, first, groups, sparsities, each) in [
        (32, 100, 6, vec![6, 3], 11),
        (20, 300, 3, vec![1, 2, 3], 5),
        (48, 7, 9, vec![9], 0),
    ] {
        let dictionary = grouped(&mut rng, m, first, groups);
        let vectors = drawn(&mut rng, sparsities.len() * each * m);
        for unbiased in [false, true] {
            let device = DeviceGroupedPursuit::new(&emulator, &dictionary, groups).unwrap();
            let found = device.encode(&vectors, &sparsities, unbiased).unwrap();
            let found = found
                .batch(&emulator, dictionary.groups(), groups, &sparsities)
                .unwrap();
            let on_cpu = GroupedPursuit::new(&dictionary, groups).unwrap();
            let on_cpu = on_cpu.with_beam(DEVICE_BEAM).unbiased(unbiased);
            let heads = on_cpu
                .encode_heads_on(&vectors, &sparsities, &lexico::threads::Alone)
                .unwrap();
            let wanted: Vec<_> = heads
                .iter()
                .flat_map(|head| (0..each).map(|v| head.row(v)))
                .collect();
            let errors = heads.iter().flat_map(|head| &head.relative_errors);
            let mut same = 0;
            for (v, ((indices, scales), error)) in wanted
                .iter()
                .zip(errors)
                .enumerate()
                .map(|(v, (&row, &e))| (v, (row, e)))
            {
                let (own, own_scales) = found.row(v);
                // Products of halves may prefer another sum, as near.
                let ratio = found.relative_errors[v] / error;
                assert!(
                    (0.97..1.03).contains(&ratio),
                    "m = {m}, vector {v}: {ratio}"
                );
                if own == indices {
                    same += 1;
                    assert!(
                        (own_scales[0] - scales[0]).abs() < 0.03 * scales[0],
                        "one step at the most"
                    );
                }
            }
            assert!(
                4 * same >= 3 * wanted.len(),
                "m = {m}: {same} of {}",
                wanted.len()
            );
        }
    }
}
