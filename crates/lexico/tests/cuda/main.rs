//! The kernels' own text, compiled for the host by a C++ compiler, against the code for the CPU.
#![cfg(all(feature = "cuda", unix))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod compiler;
mod emulator;

use compiler::Compiler;
use emulator::Emulator;
use half::f16;
use lexico::attention::{DenseRows, NumberType, Source, attend};
use lexico::cuda::{
    DEVICE_BEAM, Device, DeviceAttention, DeviceCodes, DeviceGroupedPursuit, DevicePast,
    DevicePursuit, Program, compile, compile_cached,
};
use lexico::dictionary::{Atoms, GROUP, GroupedDictionary, Groups};
use lexico::pursuit::GroupedPursuit;
use lexico::{CodeFormat, Codes, CoefficientFormat, Dictionary, Pursuit, SparseBatch};
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
                .batch(&emulator, dictionary.groups(), &sparsities)
                .unwrap();
            let on_cpu = GroupedPursuit::new(&dictionary, groups).unwrap();
            let on_cpu = on_cpu.with_beam(DEVICE_BEAM).unbiased(unbiased);
            let heads = on_cpu
                .encode_heads_on(&vectors, &sparsities, &lexico::threads::Alone)
                .unwrap();
            let wanted: Vec<_> = heads
                .iter()
                .flat_map(|head| (0..each).map(|v| (head.row(v), head.relative_errors[v])))
                .collect();
            let mut same = 0;
            for (v, ((indices, scales), error)) in wanted.iter().enumerate() {
                let (own, own_scales) = found.row(v);
                // Products of halves may prefer another sum, as near.
                let ratio = found.relative_errors[v] / error;
                assert!(
                    (0.97..1.03).contains(&ratio),
                    "m = {m}, vector {v}: {ratio}"
                );
                if own == *indices {
                    same += 1;
                    // One step at the most.
                    assert!((own_scales[0] - scales[0]).abs() < 0.03 * scales[0]);
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

/// Memory of these halves.
fn halves(emulator: &Emulator, rows: &[f32]) -> Vec<u64> {
    let bytes = rows.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes());
    let bytes: Vec<u8> = bytes.collect();
    let mut memory = emulator.allocate(bytes.len()).unwrap();
    emulator.write(&mut memory, 0, &bytes).unwrap();
    memory
}

/// Codes that nothing was searched for.
fn any_batch(rng: &mut ChaCha8Rng, format: CodeFormat, atoms: usize, n: usize) -> SparseBatch {
    let s = format.sparsity;
    let packed = match format.coefficients {
        CoefficientFormat::InAtoms(groups) => Some(groups),
        _ => None,
    };
    let index = |i: usize, rng: &mut ChaCha8Rng| match packed {
        Some(groups) => rng.random_range(groups.start(i % s)..groups.start(i % s + 1)) as u16,
        None => rng.random_range(0..atoms) as u16,
    };
    let indices = (0..n * s).map(|i| index(i, rng)).collect();
    let mut coefficients = drawn(rng, n * s);
    if packed.is_some() {
        for row in coefficients.chunks_exact_mut(s) {
            row.fill(1.0 + row[0].abs() / 2.0);
        }
    }
    SparseBatch {
        sparsity: s,
        lengths: vec![s as u16; n],
        indices,
        coefficients,
        relative_errors: vec![0.0; n],
    }
}

#[test]
fn attention_is_that_of_the_cpu() {
    let emulator = emulator!();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let m = 32;
    for (coefficients, s, group) in [
        (CoefficientFormat::InAtoms(Groups { first: 70 }), 1, 1),
        (CoefficientFormat::InAtoms(Groups { first: 100 }), 2, 2),
        (CoefficientFormat::InAtoms(Groups { first: 300 }), 8, 4),
        (CoefficientFormat::I8, 6, 8),
        (CoefficientFormat::F8, 7, 4),
    ] {
        let format = CodeFormat {
            sparsity: s,
            variable: false,
            coefficients,
        };
        let count = match coefficients {
            CoefficientFormat::InAtoms(groups) => groups.atoms(s),
            _ => 150,
        };
        let [key_atoms, value_atoms] = [(); 2].map(|()| {
            let atoms = Dictionary::normalised(drawn(&mut rng, count * m), m).unwrap();
            atoms.in_half_precision().unwrap()
        });
        let (keys, values) = (Atoms::from(&key_atoms), Atoms::from(&value_atoms));
        let device = DeviceAttention::new(&emulator, format, keys, values, group).unwrap();
        // Sequences of many lengths, which grow in pieces.
        let mut codes = Vec::new();
        for length in [0, 5, 1100, 2500] {
            codes.push([(); 2].map(|()| {
                let on_cpu = Codes::new(format).unwrap();
                let mut own = (on_cpu, DeviceCodes::new(&emulator, format).unwrap());
                for first in (0..length).step_by(700) {
                    let batch = any_batch(&mut rng, format, count, (length - first).min(700));
                    own.0.extend(&batch);
                    own.1.extend(&emulator, &batch).unwrap();
                }
                own
            }));
        }
        let windows =
            [3, 0, 17, 1].map(|length: usize| [(); 2].map(|()| drawn(&mut rng, length * m)));
        let on_device = windows
            .each_ref()
            .map(|pair| pair.each_ref().map(|rows| halves(&emulator, rows)));
        let pasts: Vec<_> = codes
            .iter()
            .zip(&windows)
            .zip(&on_device)
            .map(
                |(([keys, values], window), [window_keys, window_values])| DevicePast {
                    keys: &keys.1,
                    values: &values.1,
                    window: Some((window_keys, window_values)),
                    window_len: window[0].len() / m,
                },
            )
            .collect();
        let queries = drawn(&mut rng, pasts.len() * group * m);
        let scaled = queries.iter().map(|x| x / (m as f32).sqrt());
        let scaled: Vec<u8> = scaled.flat_map(f32::to_le_bytes).collect();
        let mut memory = emulator.allocate(scaled.len()).unwrap();
        emulator.write(&mut memory, 0, &scaled).unwrap();
        let mut out = emulator.allocate(scaled.len()).unwrap();
        device.attend(&pasts, &memory, &mut out).unwrap();
        let mut found = vec![0; scaled.len()];
        emulator.read(&out, 0, &mut found).unwrap();
        let found = found.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
        let found: Vec<f32> = found.collect();
        for (i, ([key_codes, value_codes], window)) in codes.iter().zip(&windows).enumerate() {
            let [window_keys, window_values] = window.each_ref().map(|rows| {
                let mut dense = DenseRows::new(m, NumberType::F16);
                dense.extend(rows);
                dense
            });
            let sources = [
                Source::Codes {
                    keys: &key_codes.0,
                    values: &value_codes.0,
                    key_atoms: keys,
                    value_atoms: values,
                },
                Source::Dense {
                    keys: &window_keys,
                    values: &window_values,
                },
            ];
            let own = i * group * m..(i + 1) * group * m;
            let mut wanted = vec![f32::NAN; group * m];
            attend(&queries[own.clone()], m, 1, None, &sources, &mut wanted);
            for (found, wanted) in found[own].iter().zip(&wanted) {
                assert!(
                    (found - wanted).abs() < 2e-3,
                    "{coefficients:?}, pair {i}: {found} for {wanted}"
                );
            }
        }
    }
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let program = Program {
        name: "none",
        parts: &["extern \"C\" __global__ void none() {}"],
        constants: vec![],
    };
    if let Err(reason) = compile(&program, "sm_90") {
        eprintln!("SKIPPED: compiling kernels: {reason}");
        return;
    }
    let device = Compiler::new();
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let m = 128;
    let vectors = drawn(&mut rng, 2 * m);
    let dictionary = Dictionary::normalised(drawn(&mut rng, 100 * m), m).unwrap();
    let pursuit = DevicePursuit::new(&device, &dictionary, 16, 0.0).unwrap();
    pursuit.encode(&vectors).unwrap();
    let groups = grouped(&mut rng, m, 300, 3);
    let pursuit = DeviceGroupedPursuit::new(&device, &groups, 3).unwrap();
    pursuit.encode(&vectors, &[2, 3], true).unwrap();
    for coefficients in [
        CoefficientFormat::InAtoms(groups.groups()),
        CoefficientFormat::I8,
        CoefficientFormat::F8,
    ] {
        let format = CodeFormat {
            sparsity: 3,
            variable: false,
            coefficients,
        };
        let mut codes = DeviceCodes::new(&device, format).unwrap();
        let batch = any_batch(&mut rng, format, 100, 5);
        codes.extend(&device, &batch).unwrap();
        let atoms = groups.atoms(3);
        for group in [1, 2, 4, 8] {
            let attention = DeviceAttention::new(&device, format, atoms, atoms, group).unwrap();
            let past = DevicePast {
                keys: &codes,
                values: &codes,
                window: None,
                window_len: 0,
            };
            attention.attend(&[past], &0, &mut 0).unwrap();
        }
    }
    let names = [
        "pursue",
        "search",
        "store_packed",
        "store_sparse",
        "project",
        "score",
        "accumulate",
        "combine",
        "finish",
    ];
    for name in names {
        let compiled = device.compiled.borrow();
        assert!(compiled.iter().any(|&(kernel, _)| kernel == name), "{name}");
    }
}

#[test]
fn what_does_not_compile_is_said() {
    let program = |text| Program {
        name: "broken",
        parts: text,
        constants: vec![("M", 3)],
    };
    let folder = tempfile::tempdir().unwrap();
    let error = compile(&program(&["__global__ void f() { nowhere = M; }"]), "sm_90").unwrap_err();
    let error = error.to_string();
    if error.contains("there is no NVRTC") {
        eprintln!("SKIPPED: {error}");
        return;
    }
    assert!(
        error.contains("broken.cu") && error.contains("nowhere"),
        "{error}"
    );
    // A file that was cut or is of another text is compiled anew.
    let program = program(&["extern \"C\" __global__ void f(int *x) { *x = M; }"]);
    let first = compile_cached(&program, "sm_90", folder.path()).unwrap();
    let file = std::fs::read_dir(folder.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let whole = std::fs::read(&file).unwrap();
    for lie in [&whole[..whole.len() - 1], &whole[..9], b"", &[0; 200]] {
        std::fs::write(&file, lie).unwrap();
        assert_eq!(
            compile_cached(&program, "sm_90", folder.path()).unwrap(),
            first
        );
        assert_eq!(std::fs::read(&file).unwrap(), whole);
    }
}
