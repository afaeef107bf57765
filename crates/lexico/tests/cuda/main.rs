//! The kernels' own text, compiled for the host by a C++ compiler, against the code for the CPU.
#![cfg(all(feature = "cuda", unix))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic
#![allow(clippy::arc_with_non_send_sync)] // devices that one thread uses

mod compiler;
mod emulator;

use compiler::Compiler;
use emulator::Emulator;
use std::sync::Arc;

use half::f16;
use lexico::attention::{DenseRows, Head, NumberType, Source, attend_heads};
use lexico::cache::{Coding, LayerCache, LayerSettings};
use lexico::codes::{AdditiveFormat, SparseFormat};
use lexico::cuda::{
    DEVICE_BEAM, Device, DeviceAttention, DeviceCodes, DeviceEncoder, DeviceLayer, DevicePast,
    DeviceRows, DeviceSequence, FoundCodes, Program, Streams, compile, compile_cached,
};
use lexico::dictionary::{
    Atoms, CODEBOOK_ATOMS, CodebookSizes, Codebooks, HeadMaps, LayerDictionaries, LayerSparsities,
    RotaryMeans,
};
use lexico::encode::{BeamSearch, Encoder, Fit};
use lexico::threads::Alone;
use lexico::{CodeFormat, Codes, CoefficientFormat, Dictionary, EncodedBatch, KeyValue, Pursuit};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The emulator, or `None`, said so, where there is no compiler for it.
macro_rules! emulator {
    () => {
        match Emulator::new().and_then(|main| Ok((main, Emulator::new()?))) {
            Ok((main, background)) => Streams { main, background },
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

/// Codes vectors of `m` numbers, which are filled up with zeros to a multiple of 16.
fn encode(
    encoder: &DeviceEncoder<Emulator>,
    streams: &Streams<Emulator>,
    vectors: &[f32],
    m: usize,
    sparsities: &[usize],
    fit: Fit,
) -> FoundCodes<Emulator> {
    let zeros = vec![0.0; m.next_multiple_of(16) - m];
    let rows: Vec<&[f32]> = vectors.chunks_exact(m).flat_map(|x| [x, &zeros]).collect();
    let rows = numbers(&streams.main, &rows.concat());
    encoder
        .encode_heads(streams, &rows, vectors.len() / m, sparsities, fit)
        .unwrap()
}

fn bytes(emulator: &Emulator, from: &Vec<u64>, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    emulator.read(from, 0, &mut bytes).unwrap();
    bytes
}

fn indices(emulator: &Emulator, found: &FoundCodes<Emulator>, count: usize) -> Vec<u16> {
    let bytes = bytes(emulator, &found.indices, 2 * count);
    let numbers = bytes.as_chunks().0.iter();
    numbers.map(|&b| u16::from_le_bytes(b)).collect()
}

#[test]
fn pursuit_is_that_of_the_cpu() {
    let streams = emulator!();
    let emulator = &streams.main;
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
        let device = DeviceEncoder::pursuit(emulator, &dictionary, sparsity).unwrap();
        let found = encode(
            &device,
            &streams,
            &vectors,
            m,
            &[sparsity],
            Fit::LeastSquares,
        );
        let found = EncodedBatch {
            sparsity,
            lengths: bytes(emulator, &found.lengths, count)
                .into_iter()
                .map(u16::from)
                .collect(),
            indices: indices(emulator, &found, count * sparsity),
            coefficients: read(emulator, &found.coefficients, count * sparsity),
            relative_errors: read(emulator, &found.errors, count),
        };
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
                    .zip(&*atom)
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

/// Codebooks each nearer to zero than the one before.
fn codebooks(rng: &mut ChaCha8Rng, m: usize, first: usize, count: usize) -> Codebooks {
    let mut atoms = drawn(rng, (first + (count - 1) * CODEBOOK_ATOMS) * m);
    for (i, atom) in atoms.chunks_exact_mut(m).enumerate() {
        let codebook = i.saturating_sub(first).div_ceil(CODEBOOK_ATOMS);
        atom.iter_mut()
            .for_each(|x| *x *= 0.8f32.powi(codebook as i32));
    }
    Codebooks::new(atoms, m, CodebookSizes { first })
        .unwrap()
        .in_half_precision()
        .unwrap()
}

#[test]
fn additive_codes_are_those_of_the_cpu() {
    let streams = emulator!();
    let emulator = &streams.main;
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for (m, first, count, sparsities, each) in [
        (32, 100, 6, vec![6, 3], 11),
        (20, 300, 3, vec![1, 2, 3], 5),
        (48, 7, 9, vec![9], 0),
    ] {
        let codebooks = codebooks(&mut rng, m, first, count);
        let vectors = drawn(&mut rng, sparsities.len() * each * m);
        for fit in [Fit::LeastSquares, Fit::Unbiased] {
            let device = DeviceEncoder::beam_search(emulator, &codebooks, count).unwrap();
            let found = encode(&device, &streams, &vectors, m, &sparsities, fit);
            let n = sparsities.len() * each;
            let paths = indices(emulator, &found, n * count);
            let scales = bytes(emulator, &found.coefficients, n);
            let errors = read(emulator, &found.errors, n);
            let on_cpu = BeamSearch::new(&codebooks, count).unwrap();
            let on_cpu = on_cpu.with_beam_width(DEVICE_BEAM).with_fit(fit);
            let heads = on_cpu.encode_heads(&vectors, &sparsities, &Alone).unwrap();
            let wanted: Vec<_> = heads
                .iter()
                .flat_map(|head| (0..each).map(|v| (head.row(v), head.relative_errors[v])))
                .collect();
            let mut same = 0;
            for (v, ((indices, wanted_scales), error)) in wanted.iter().enumerate() {
                let path = paths[v * count..][..indices.len()].iter();
                let own = path
                    .zip(0..)
                    .map(|(atom, i)| atom + codebooks.sizes().start(i) as u16);
                let scale = 2f32.powf(f32::from(scales[v]) / 32.0);
                // Products of halves may prefer another sum, as near.
                let ratio = errors[v] / error;
                assert!(
                    (0.97..1.03).contains(&ratio),
                    "m = {m}, vector {v}: {ratio}"
                );
                if own.eq(indices.iter().copied()) {
                    same += 1;
                    // One step at the most.
                    assert!((scale - wanted_scales[0]).abs() < 0.03 * wanted_scales[0]);
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

/// Memory of these bytes.
fn memory(emulator: &Emulator, bytes: &[u8]) -> Vec<u64> {
    let mut memory = emulator.allocate(bytes.len()).unwrap();
    emulator.write(&mut memory, 0, bytes).unwrap();
    memory
}

fn numbers(emulator: &Emulator, numbers: &[f32]) -> Vec<u64> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    memory(emulator, &bytes)
}

fn read(emulator: &Emulator, from: &Vec<u64>, count: usize) -> Vec<f32> {
    let bytes = bytes(emulator, from, 4 * count);
    let numbers = bytes.as_chunks().0.iter();
    numbers.map(|&b| f32::from_le_bytes(b)).collect()
}

/// A ring of `room` halves' rows, these the first of which is at `start`.
fn ring(emulator: &Emulator, rows: &[f32], m: usize, room: usize, start: usize) -> Vec<u64> {
    let mut bytes = vec![0xff; room * m * 2];
    for (i, row) in rows.chunks_exact(m).enumerate() {
        let to = (start + i) % room * m * 2;
        let row = row.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes());
        bytes[to..to + 2 * m].copy_from_slice(&row.collect::<Vec<u8>>());
    }
    memory(emulator, &bytes)
}

/// Codes that nothing was searched for.
fn any_batch(rng: &mut ChaCha8Rng, format: CodeFormat, atoms: usize, n: usize) -> EncodedBatch {
    let s = format.sparsity();
    let index = |i: usize, rng: &mut ChaCha8Rng| match format {
        CodeFormat::Additive(AdditiveFormat { sizes, .. }) => {
            rng.random_range(sizes.start(i % s)..sizes.start(i % s + 1)) as u16
        }
        CodeFormat::Sparse(_) => rng.random_range(0..atoms) as u16,
    };
    let indices = (0..n * s).map(|i| index(i, rng)).collect();
    let mut coefficients = drawn(rng, n * s);
    if let CodeFormat::Additive(_) = format {
        for row in coefficients.chunks_exact_mut(s) {
            row.fill(1.0 + row[0].abs() / 2.0);
        }
    }
    EncodedBatch {
        sparsity: s,
        lengths: vec![s as u16; n],
        indices,
        coefficients,
        relative_errors: vec![0.0; n],
    }
}

#[test]
fn attention_is_that_of_the_cpu() {
    let streams = emulator!();
    let emulator = &streams.main;
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let m = 32;
    let sparse = |coefficients, sparsity| {
        let variable = false;
        CodeFormat::from(SparseFormat {
            sparsity,
            variable,
            coefficients,
        })
    };
    let additive = |first, sparsity| {
        let sizes = CodebookSizes { first };
        CodeFormat::from(AdditiveFormat { sparsity, sizes })
    };
    for (format, group) in [
        (additive(70, 1), 1),
        (additive(100, 2), 2),
        (additive(300, 8), 4),
        (sparse(CoefficientFormat::I8, 6), 8),
        (sparse(CoefficientFormat::F8, 7), 4),
        (additive(9, 3), 7),
        (sparse(CoefficientFormat::I8, 2), 3),
    ] {
        let count = match format {
            CodeFormat::Additive(format) => format.sizes.atoms(format.sparsity),
            CodeFormat::Sparse(_) => 150,
        };
        let [key_atoms, value_atoms] = [(); 2].map(|()| {
            let atoms = Dictionary::normalised(drawn(&mut rng, count * m), m).unwrap();
            atoms.in_half_precision().unwrap()
        });
        let (keys, values) = (Atoms::from(&key_atoms), Atoms::from(&value_atoms));
        let device = DeviceAttention::new(emulator, format, keys, values, group).unwrap();
        // Sequences of many lengths, which grow in pieces.
        let mut codes = Vec::new();
        for length in [0, 5, 1100, 2500] {
            codes.push([(); 2].map(|()| {
                let on_cpu = Codes::new(format).unwrap();
                let mut own = (on_cpu, DeviceCodes::new(emulator, format).unwrap());
                for first in (0..length).step_by(700) {
                    let batch = any_batch(&mut rng, format, count, (length - first).min(700));
                    own.0.extend(&batch);
                    own.1.extend(emulator, &batch).unwrap();
                }
                own
            }));
        }
        let windows =
            [3, 0, 17, 1].map(|length: usize| [(); 2].map(|()| drawn(&mut rng, length * m)));
        // Rings with room for more rows, whose first row lies anywhere.
        let (room, start) = (20, 11);
        let rings = windows.each_ref().map(|pair| {
            pair.each_ref()
                .map(|rows| ring(emulator, rows, m, room, start))
        });
        // Of which codes some may not be seen.
        let hidden = [0, 2, 0, 1500];
        let mut pasts = Vec::new();
        for (i, ([keys, values], [window_keys, window_values])) in
            codes.iter().zip(&rings).enumerate()
        {
            pasts.push(DevicePast {
                keys: &keys.1,
                values: &values.1,
                hidden: hidden[i],
                first: 0,
                window: DeviceRows {
                    keys: Emulator::address(window_keys),
                    values: Emulator::address(window_values),
                    room,
                    start,
                    len: windows[i][0].len() / m,
                    sinks: 0,
                    first_sink: 0,
                },
            });
        }
        let queries = drawn(&mut rng, pasts.len() * group * m);
        let scaled: Vec<f32> = queries.iter().map(|x| x / (m as f32).sqrt()).collect();
        let scaled = numbers(emulator, &scaled);
        let out = emulator.allocate(4 * queries.len()).unwrap();
        let at = Emulator::address;
        // SAFETY: as many numbers are there.
        unsafe { device.attend(emulator, &pasts, at(&scaled), at(&out)) }.unwrap();
        let found = read(emulator, &out, queries.len());
        for (i, ([key_codes, value_codes], window)) in codes.iter().zip(&windows).enumerate() {
            let [window_keys, window_values] = window.each_ref().map(|rows| {
                let mut dense = DenseRows::new(m, NumberType::F16);
                dense.extend(rows);
                dense
            });
            let [mut seen_keys, mut seen_values] = [&key_codes.0, &value_codes.0].map(Clone::clone);
            seen_keys.drop_front(hidden[i]);
            seen_values.drop_front(hidden[i]);
            let sources = [
                Source::Codes {
                    codes: KeyValue::new(&seen_keys, &seen_values),
                    atoms: KeyValue::new(keys, values),
                    offsets: None,
                },
                Source::Dense(KeyValue::new(&window_keys, &window_values)),
            ];
            let own = i * group * m..(i + 1) * group * m;
            let mut wanted = vec![f32::NAN; group * m];
            let head = Head {
                queries: &queries[own.clone()],
                sources: &sources,
                out: &mut wanted,
            };
            attend_heads(&mut [head], m, 1, None, &Alone);
            for (found, wanted) in found[own].iter().zip(&wanted) {
                assert!(
                    (found - wanted).abs() < 2e-3,
                    "{format:?}, pair {i}: {found} for {wanted}"
                );
            }
        }
    }
}

/// One head's rows, keys or values, of a sequence.
type Rows = Vec<f32>;

/// Softmax attention over rows, in f64.
fn attention(query: &[f32], keys: &[f32], values: &[f32]) -> Vec<f64> {
    let m = query.len();
    let dot = |key: &[f32]| -> f64 {
        let products = query.iter().zip(key);
        products.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum()
    };
    let scores: Vec<f64> = keys.chunks_exact(m).map(dot).collect();
    let most = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut out = vec![0.0; m];
    for (weight, value) in weights.iter().zip(values.chunks_exact(m)) {
        for (out, &v) in out.iter_mut().zip(value) {
            *out += weight / total * f64::from(v);
        }
    }
    out
}

fn relative_error(found: &[f32], wanted: &[f32]) -> f32 {
    let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>();
    let rest = square(&mut found.iter().zip(wanted).map(|(a, b)| a - b));
    (rest / square(&mut wanted.iter().copied())).sqrt()
}

/// Adds to keys from position `first` on the means that they are coded without, if there are some.
fn add_means(dictionaries: &LayerDictionaries, head: usize, first: usize, keys: &mut [f32]) {
    if let Some(maps) = &dictionaries.maps {
        // The maps are the caller's to apply, and change nothing but for the means.
        maps.keys.uncentre(head, first.., keys);
    }
}

/// Two sequences of one layer read prompts and decode together; what each holds and what attention gives is checked after every
/// step.
fn goes_on(
    streams: &Arc<Streams<Emulator>>,
    dictionaries: &LayerDictionaries,
    coding: Coding,
    sliding: Option<usize>,
    sinks: usize,
) {
    const M: usize = 16;
    const HEADS: usize = 2;
    let (group, window, batch, delay) = (3, 5, 4, 2);
    let settings = LayerSettings {
        coding,
        fit: Fit::LeastSquares,
        sinks,
        recent_window: window,
        batch,
        delay,
        sliding_window: sliding,
        ..LayerSettings::new(LayerSparsities {
            keys: vec![4, 2],
            values: vec![3, 5],
        })
    };
    let on_cpu = || LayerCache::new(dictionaries, settings.clone()).unwrap();
    let mut on_cpu = [on_cpu(), on_cpu()];
    let layer = DeviceLayer::new(streams.clone(), dictionaries, settings.clone(), group).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(21);
    let emulator = &streams.main;
    let at = Emulator::address;
    let mut sequences = [layer.sequence().unwrap(), layer.sequence().unwrap()];
    // Of each sequence and head, all that came.
    let mut keys = vec![vec![Rows::new(); HEADS]; 2];
    let mut values = keys.clone();
    let check = |sequence: &DeviceSequence<Emulator>, keys: &[Rows], values: &[Rows]| {
        let seen = sequence.seen();
        let all = keys[0].len() / M;
        assert_eq!(sequence.positions(), all);
        assert_eq!(seen, sliding.map_or(all, |sliding| all.min(sliding)));
        let found = [(); 2].map(|()| emulator.allocate(HEADS * seen * M * 4).unwrap());
        // SAFETY: there is room for as many.
        unsafe { layer.read_back(sequence, KeyValue::new(at(&found[0]), at(&found[1]))) }.unwrap();
        let found = found.map(|memory| read(emulator, &memory, HEADS * seen * M));
        for (found, wanted) in found.iter().zip([keys, values]) {
            for (found, wanted) in found.chunks_exact((seen * M).max(1)).zip(wanted) {
                let wanted = &wanted[(all - seen) * M..];
                let errors = found.chunks_exact(M).zip(wanted.chunks_exact(M));
                let errors: Vec<f32> = errors.map(|(a, b)| relative_error(a, b)).collect();
                let exact = errors
                    .iter()
                    .rev()
                    .take_while(|&&error| error < 1e-3)
                    .count();
                let coded = &errors[..seen - exact];
                let most = sinks + window + batch + delay;
                assert!(exact >= window.min(seen) && exact <= most, "{exact}");
                // The first positions are as they were.
                let first = sinks.saturating_sub(all - seen).min(seen);
                assert!(
                    errors[..first].iter().all(|&error| error < 1e-3),
                    "{errors:?}"
                );
                let mean = coded.iter().sum::<f32>() / coded.len().max(1) as f32;
                assert!(mean < 0.75, "{mean} after {all} positions: {errors:?}");
            }
        }
        found
    };
    for (i, t) in [7, 1, 40].into_iter().enumerate() {
        let i = i % 2;
        let [mut k, v] = [(); 2].map(|()| drawn(&mut rng, HEADS * t * M));
        for head in 0..HEADS {
            add_means(
                dictionaries,
                head,
                keys[i][head].len() / M,
                &mut k[head * t * M..][..t * M],
            );
            keys[i][head].extend(&k[head * t * M..][..t * M]);
            values[i][head].extend(&v[head * t * M..][..t * M]);
        }
        let new = KeyValue::new(&k[..], &v[..]);
        on_cpu[i].append(new, &Alone).unwrap();
        let new = new.map(|rows| numbers(emulator, rows));
        // SAFETY: as many numbers are there.
        unsafe { layer.take(&mut sequences[i], new.as_ref().map(at), t) }.unwrap();
        same_steps(&sequences[i], &on_cpu[i]);
        check(&sequences[i], &keys[i], &values[i]);
    }
    for step in 0..20 {
        let [mut k, v] = [(); 2].map(|()| drawn(&mut rng, 2 * HEADS * M));
        let queries = drawn(&mut rng, 2 * HEADS * group * M);
        for (pair, k) in k.chunks_exact_mut(M).enumerate() {
            let (i, head) = (pair / HEADS, pair % HEADS);
            add_means(dictionaries, head, keys[i][head].len() / M, k);
        }
        for (pair, (k, v)) in k.chunks_exact(M).zip(v.chunks_exact(M)).enumerate() {
            keys[pair / HEADS][pair % HEADS].extend(k);
            values[pair / HEADS][pair % HEADS].extend(v);
        }
        // As they are before a batch takes its place among the codes, and so as attention sees them.
        let mut together = Vec::new();
        if step % 5 == 0 {
            for sequence in &sequences {
                together.push(check_before(&layer, emulator, sequence, HEADS, M));
            }
        }
        let each = k.chunks_exact(HEADS * M).zip(v.chunks_exact(HEADS * M));
        for (cache, (k, v)) in on_cpu.iter_mut().zip(each) {
            cache.append(KeyValue::new(k, v), &Alone).unwrap();
        }
        let [k, v, q] = [&k, &v, &queries].map(|rows| numbers(emulator, rows));
        let out = emulator.allocate(4 * queries.len()).unwrap();
        let [first, second] = &mut sequences;
        // SAFETY: as many numbers are there.
        unsafe {
            layer.decode(
                &mut [first, second],
                KeyValue::new(at(&k), at(&v)),
                at(&q),
                at(&out),
            )
        }
        .unwrap();
        let out = read(emulator, &out, queries.len());
        for (i, held) in together.iter().enumerate() {
            for head in 0..HEADS {
                let pair = i * HEADS + head;
                let mut rows = held.each_ref().map(|held| held[head].clone());
                for (rows, new) in rows.iter_mut().zip([&keys, &values]) {
                    let new = &new[i][head];
                    rows.extend(&new[new.len() - M..]);
                    let hidden = (rows.len() / M).saturating_sub(sliding.unwrap_or(usize::MAX));
                    rows.drain(..hidden * M);
                }
                for g in 0..group {
                    let own = (pair * group + g) * M..(pair * group + g + 1) * M;
                    let wanted = attention(&queries[own.clone()], &rows[0], &rows[1]);
                    for (found, wanted) in out[own].iter().zip(wanted) {
                        assert!(
                            (f64::from(*found) - wanted).abs() < 3e-3,
                            "step {step}, pair {pair}"
                        );
                    }
                }
            }
        }
        for (i, sequence) in sequences.iter().enumerate() {
            same_steps(sequence, &on_cpu[i]);
            if step % 5 > 1 {
                check(sequence, &keys[i], &values[i]);
            }
        }
    }
    let bytes = layer.footprint(&sequences[1]);
    assert!(bytes.codes.into_iter().all(|b| b > 0) && bytes.recent_window > 0);
}

/// Checks that positions have moved as they do in a processor's cache.
fn same_steps(sequence: &DeviceSequence<Emulator>, on_cpu: &LayerCache) {
    assert_eq!(sequence.dense(), on_cpu.dense());
    if on_cpu.settings().sliding_window.is_none() {
        assert_eq!(sequence.sinks(), on_cpu.sinks());
        assert_eq!(sequence.coded(), on_cpu.coded());
    }
}

/// One layer's dictionaries, keys and values alike.
fn alike(dictionary: Dictionary, codebooks: Codebooks) -> LayerDictionaries {
    let (dictionary, codebooks) = (Arc::new(dictionary), Arc::new(codebooks));
    LayerDictionaries {
        sparse: Some(KeyValue::new(dictionary.clone(), dictionary)),
        codebooks: Some(KeyValue::new(codebooks.clone(), codebooks)),
        maps: None,
    }
}

/// Maps that change nothing, of keys that are coded without drawn means before a rotary embedding.
fn rotary_maps(rng: &mut ChaCha8Rng, heads: usize, m: usize) -> KeyValue<Arc<HeadMaps>> {
    let mut matrices = vec![0.0; heads * m * m];
    for own in matrices.chunks_exact_mut(m * m) {
        own.iter_mut().step_by(m + 1).for_each(|x| *x = 1.0);
    }
    let plain = HeadMaps::new(&vec![0.0; heads * m], &matrices, m).unwrap();
    let means: Vec<f32> = drawn(rng, heads * m).iter().map(|x| 4.0 * x).collect();
    let frequencies = [1.0, 0.4, 0.09, 0.01, 0.0015, 1e-4, 0.0];
    let means = RotaryMeans::new(&frequencies, &means, m).unwrap();
    let keys = plain.clone().with_rotary_means(means).unwrap();
    KeyValue::new(keys.into(), plain.into())
}

fn sparse(coefficients: CoefficientFormat) -> Coding {
    Coding::Sparse {
        coefficients,
        tolerance: 0.0,
    }
}

/// What a sequence holds of each head, keys and values.
fn check_before(
    layer: &DeviceLayer<Emulator>,
    emulator: &Emulator,
    sequence: &DeviceSequence<Emulator>,
    heads: usize,
    m: usize,
) -> [Vec<Rows>; 2] {
    let each = sequence.seen() * m;
    let found = [(); 2].map(|()| emulator.allocate(heads * each * 4).unwrap());
    let at = Emulator::address;
    // SAFETY: there is room for as many.
    unsafe { layer.read_back(sequence, KeyValue::new(at(&found[0]), at(&found[1]))) }.unwrap();
    found.map(|memory| {
        let rows = read(emulator, &memory, heads * each);
        rows.chunks_exact(each.max(1))
            .map(<[f32]>::to_vec)
            .collect()
    })
}

#[test]
fn a_layer_holds_and_attends_to_what_came() {
    let streams = Arc::new(emulator!());
    let mut rng = ChaCha8Rng::seed_from_u64(20);
    let dictionary = Dictionary::normalised(drawn(&mut rng, 300 * 16), 16).unwrap();
    let dictionaries = alike(dictionary, codebooks(&mut rng, 16, 100, 5));
    let new = |settings| DeviceLayer::new(streams.clone(), &dictionaries, settings, 1);
    let usual = || LayerSettings::new(LayerSparsities::same(1, 2, 2));
    for (recent_window, batch, sinks) in [
        (usize::MAX, 1, 0),
        (1, usize::MAX, 0),
        (1 << 31, 1, 0),
        (1, 1, usize::MAX),
        (1, 1, 1 << 31),
    ] {
        let settings = LayerSettings {
            recent_window,
            batch,
            sinks,
            ..usual()
        };
        let message = new(settings).err().unwrap().to_string();
        assert!(message.contains("window"), "{message}");
    }
    let coded = |coding| LayerSettings { coding, ..usual() };
    for (settings, words) in [
        (coded(Coding::Additive { beam_width: 4 }), "beam=4"),
        (coded(sparse(CoefficientFormat::F32)), "format=f32"),
        (
            coded(Coding::Sparse {
                coefficients: CoefficientFormat::I8,
                tolerance: 0.5,
            }),
            "tolerance=0.5",
        ),
        (
            LayerSettings {
                number_type: NumberType::F32,
                ..usual()
            },
            "dense=f32",
        ),
        (
            LayerSettings {
                batch: 0,
                ..usual()
            },
            "batch=0",
        ),
    ] {
        let message = new(settings).err().unwrap().to_string();
        assert!(message.contains(words), "{message}");
    }
    for sliding in [None, Some(30), Some(3)] {
        for coding in [Coding::default(), sparse(CoefficientFormat::I8)] {
            for sinks in [0, 4, 9] {
                goes_on(&streams, &dictionaries, coding, sliding, sinks);
            }
        }
    }
    let with_means = LayerDictionaries {
        maps: Some(rotary_maps(&mut rng, 2, 16)),
        ..dictionaries
    };
    for sliding in [None, Some(30), Some(3)] {
        goes_on(&streams, &with_means, Coding::default(), sliding, 4);
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
    let streams = Arc::new(Streams {
        main: Compiler::new(),
        background: Compiler::new(),
    });
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let m = 128;
    let dictionary = Dictionary::normalised(drawn(&mut rng, 100 * m), m).unwrap();
    let mut dictionaries = alike(dictionary, codebooks(&mut rng, m, 300, 3));
    dictionaries.maps = Some(rotary_maps(&mut rng, 2, m));
    for coding in [
        Coding::default(),
        sparse(CoefficientFormat::I8),
        sparse(CoefficientFormat::F8),
    ] {
        for group in 1..=8 {
            let settings = LayerSettings {
                coding,
                recent_window: 4,
                batch: 2,
                delay: 0,
                ..LayerSettings::new(LayerSparsities::same(2, 3, 2))
            };
            let layer = DeviceLayer::new(streams.clone(), &dictionaries, settings, group).unwrap();
            let mut sequence = layer.sequence().unwrap();
            // SAFETY: nothing runs.
            unsafe {
                let nowhere = KeyValue::default();
                layer.take(&mut sequence, nowhere, 9).unwrap();
                layer.read_back(&sequence, nowhere).unwrap();
                layer.decode(&mut [&mut sequence], nowhere, 0, 0).unwrap();
            }
        }
    }
    let names = [
        "pursue",
        "search",
        "store_additive",
        "store_sparse",
        "project",
        "score",
        "accumulate",
        "combine",
        "finish",
        "append",
        "gather",
        "decode",
        "add_means",
        "project_means",
        "offset",
    ];
    for name in names {
        let [main, background] =
            [&streams.main, &streams.background].map(|device| device.compiled.borrow());
        let mut compiled = main.iter().chain(background.iter());
        assert!(compiled.any(|&(kernel, _)| kernel == name), "{name}");
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
