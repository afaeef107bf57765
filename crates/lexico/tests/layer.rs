//! The cache of a layer behind maps of its heads, and with first positions kept dense, against plain f64.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::sync::Arc;

use common::{drawn_vectors, random_dictionary};
use half::f16;
use lexico::attention::NumberType;
use lexico::cache::{Coding, LayerState, MemoryLimit};
use lexico::dictionary::{
    CodebookSizes, Codebooks, HeadMaps, JointBasis, LayerDictionaries, LayerSparsities, RotaryMeans,
};
use lexico::threads::{Alone, Rayon, Threads};
use lexico::{
    BeamSearch, Codes, CoefficientFormat, Encoder, Error, KeyValue, LayerCache, LayerSettings,
    Pursuit,
};
use nalgebra::{DMatrix, DVector};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A pool of any size.
struct Count(usize);

impl Threads for Count {
    fn count(&self) -> usize {
        self.0
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        Rayon.run(tasks, task);
    }
}

/// Maps that are far from singular; heads differ in the length of what they make.
fn drawn_maps(seed: u64, heads: usize, m: usize) -> HeadMaps {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let means = drawn_vectors(seed ^ 77, heads, m);
    let spread = 0.6 / (m as f32).sqrt();
    let matrices = (0..heads * m * m).map(|i| {
        let (head, own) = (i / (m * m), i % (m * m));
        let diagonal = if own / m == own % m { 2.0 } else { 0.0 };
        (diagonal + rng.random_range(-spread..spread)) * [0.5, 1.0, 3.0][head % 3]
    });
    HeadMaps::new(&means, &matrices.collect::<Vec<_>>(), m).unwrap()
}

/// The same maps of keys without drawn means before a rotary embedding some of whose pairs turn slowly.
fn with_rotary_means(maps: HeadMaps, seed: u64) -> HeadMaps {
    let (heads, m) = (maps.heads(), maps.head_dim());
    let pairs = m / 2 - usize::from(m > 6);
    let frequencies = [0.7, 0.001, -0.02, 1e-5, 0.0, 0.0016];
    let frequencies: Vec<f32> = (0..pairs).map(|pair| frequencies[pair % 6]).collect();
    let means = drawn_vectors(seed, heads, m);
    let means = RotaryMeans::new(&frequencies, &means, m).unwrap();
    maps.with_rotary_means(means).unwrap()
}

/// The mean of a head's keys at a position, if they are coded without one, in f64.
fn turned(maps: &HeadMaps, head: usize, position: usize) -> Vec<f64> {
    let m = maps.head_dim();
    let mut turned = vec![0.0; m];
    let Some(means) = maps.rotary_means() else {
        return turned;
    };
    let pairs = means.frequencies().len();
    let own = &means.means()[head * m..][..m];
    for (pair, &frequency) in means.frequencies().iter().enumerate() {
        let slow = frequency.abs() * 64.0 <= 0.1;
        let place = match slow {
            true => (position - position % 64) as f64 + 31.5,
            false => position as f64,
        };
        let (sine, cosine) = (place * f64::from(frequency)).sin_cos();
        let (x, y) = (f64::from(own[pair]), f64::from(own[pair + pairs]));
        turned[pair] = x * cosine - y * sine;
        turned[pair + pairs] = x * sine + y * cosine;
    }
    turned
}

/// The same maps of heads that are coded together.
fn with_basis(maps: HeadMaps, seed: u64, together: usize) -> HeadMaps {
    let (heads, m) = (maps.heads(), maps.head_dim());
    let n = together * m;
    let bases = (0..heads / together).flat_map(|group| {
        let drawn = drawn_vectors(seed ^ (group as u64) << 8, n, n);
        let drawn = DMatrix::from_iterator(n, n, drawn.into_iter().map(f64::from));
        let basis = drawn.qr().q();
        basis.iter().map(|&x| x as f32).collect::<Vec<_>>()
    });
    let basis = JointBasis::new(&bases.collect::<Vec<_>>(), heads, together, m).unwrap();
    maps.with_basis(basis).unwrap()
}

/// What parts `[heads][n, m]` of all heads stand for, in f64.
fn joined(basis: &JointBasis, parts: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let (m, together) = (basis.head_dim(), basis.together());
    let width = together * m;
    let numbers = basis.numbers();
    let mut out = vec![vec![0.0; parts[0].len()]; parts.len()];
    for (head, out) in out.iter_mut().enumerate() {
        let (group, own) = (head / together, head % together);
        let numbers = &numbers[group * width * width..][..width * width];
        for (place, x) in out.iter_mut().enumerate() {
            let (row, i) = (place / m, place % m);
            for (number, &along) in numbers
                .chunks_exact(width)
                .map(|c| &c[own * m + i])
                .enumerate()
            {
                let part = &parts[group * together + number / m];
                *x += f64::from(along) * part[row * m + number % m];
            }
        }
    }
    out
}

/// What codes are found of, of mapped vectors from position `first` on.
fn centred(maps: &HeadMaps, head: usize, first: usize, mapped: &[f32]) -> Vec<f32> {
    let m = maps.head_dim();
    let (_, matrices) = maps.numbers();
    let matrix = &matrices[head * m * m..][..m * m];
    let rows = mapped.chunks_exact(m).zip(first..);
    let rows = rows.flat_map(|(y, position)| {
        let mean = turned(maps, head, position);
        let left = y.iter().zip(matrix.chunks_exact(m)).map(|(&y, row)| {
            let products = row.iter().zip(&mean).map(|(&a, x)| f64::from(a) * x);
            (f64::from(y) - products.sum::<f64>()) as f32
        });
        left.collect::<Vec<_>>()
    });
    rows.collect()
}

fn drawn_codebooks(seed: u64, count: usize, m: usize) -> Codebooks {
    let sizes = CodebookSizes { first: 30 };
    let mut atoms = drawn_vectors(seed, sizes.atoms(count), m);
    for codebook in 0..count {
        let own = sizes.start(codebook) * m..sizes.start(codebook + 1) * m;
        let length = 2.0 * 0.7f32.powi(codebook as i32);
        atoms[own].iter_mut().for_each(|x| *x *= length);
    }
    Codebooks::new(atoms, m, sizes).unwrap()
}

fn drawn_dictionaries(seed: u64, heads: usize, m: usize, maps: bool) -> LayerDictionaries {
    let pair = KeyValue::new(seed, seed ^ 1);
    LayerDictionaries {
        sparse: Some(pair.map(|seed| random_dictionary(seed, 40, m).into())),
        codebooks: Some(pair.map(|seed| drawn_codebooks(seed ^ 2, 3, m).into())),
        maps: maps.then(|| {
            let both = pair.map(|seed| drawn_maps(seed ^ 4, heads, m));
            let keys = match m == 1 || seed.is_multiple_of(4) {
                true => both.keys,
                false => with_rotary_means(both.keys, seed ^ 5),
            };
            KeyValue::new(keys.into(), both.values.into())
        }),
    }
}

/// Dictionaries of heads that are coded together.
fn joint_dictionaries(seed: u64, heads: usize, m: usize, together: usize) -> LayerDictionaries {
    let own = drawn_dictionaries(seed, heads, m, true);
    let joint = |maps: &HeadMaps, seed| Arc::new(with_basis(maps.clone(), seed, together));
    let maps = own
        .maps
        .as_ref()
        .map(|maps| KeyValue::new(joint(&maps.keys, seed ^ 6), joint(&maps.values, seed ^ 7)));
    LayerDictionaries { maps, ..own }
}

/// `A⁻¹y + μ` of rows, in f64.
fn back(maps: &HeadMaps, head: usize, rows: &[f64]) -> Vec<f64> {
    let m = maps.head_dim();
    let (means, matrices) = maps.numbers();
    let matrix = &matrices[head * m * m..][..m * m];
    let matrix = DMatrix::from_row_iterator(m, m, matrix.iter().map(|&x| f64::from(x)));
    let matrix = matrix.lu();
    let rows = rows.chunks_exact(m).flat_map(|y| {
        let y = DVector::from_row_slice(y);
        let x = matrix.solve(&y).unwrap();
        let means = means[head * m..][..m].iter();
        let x: Vec<f64> = x
            .iter()
            .zip(means)
            .map(|(x, &mean)| x + f64::from(mean))
            .collect();
        x
    });
    rows.collect()
}

/// Attention of one head's queries `[G, t, m]` over positions, of which the last `t` are causal.
fn attention(
    queries: &[f32],
    (m, t): (usize, usize),
    sliding: Option<usize>,
    keys: &[f64],
    values: &[f64],
) -> Vec<f64> {
    let positions = keys.len() / m;
    let mut out = Vec::new();
    for (row, q) in queries.chunks(m).enumerate() {
        let seen = positions - t + row % t + 1;
        let hidden = sliding.map_or(0, |w| seen.saturating_sub(w));
        let dot = |k: &[f64]| -> f64 {
            let products = q.iter().zip(k).map(|(&a, &b)| f64::from(a) * b);
            products.sum::<f64>() / (m as f64).sqrt()
        };
        let scores: Vec<f64> = keys.chunks(m).take(seen).skip(hidden).map(dot).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for j in 0..m {
            let values = values.chunks(m).skip(hidden);
            let weighted = weights.iter().zip(values).map(|(w, v)| w * v[j]);
            out.push(weighted.sum::<f64>() / sum);
        }
    }
    out
}

/// All that came of a layer's keys, or its values, head by head.
#[derive(Default, Clone)]
struct Came {
    original: Vec<f32>,
    /// What codes are found of.
    mapped: Vec<f32>,
}

/// A cache, and what it has to do.
struct Checked {
    cache: LayerCache,
    /// One that was loaded from the first one's state on the way.
    twin: Option<LayerCache>,
    dictionaries: LayerDictionaries,
    came: Vec<KeyValue<Came>>,
    total: usize,
    /// The positions that were dropped from outside.
    dropped: usize,
    /// The number of the position after the last sink.
    sinks_end: usize,
    group: usize,
    m: usize,
    threads: usize,
}

impl Checked {
    fn new(
        dictionaries: LayerDictionaries,
        settings: LayerSettings,
        group: usize,
        threads: usize,
    ) -> Self {
        let heads = settings.sparsities.keys.len();
        Self {
            cache: LayerCache::new(&dictionaries, settings).unwrap(),
            twin: None,
            came: vec![KeyValue::default(); heads],
            total: 0,
            dropped: 0,
            sinks_end: 0,
            group,
            m: dictionaries.head_dim(),
            dictionaries,
            threads,
        }
    }

    fn heads(&self) -> usize {
        self.came.len()
    }

    /// The maps, where codes are found behind them.
    fn maps(&self) -> KeyValue<Option<Arc<HeadMaps>>> {
        match (self.cache.settings().coding, &self.dictionaries.maps) {
            (Coding::Additive { .. }, Some(maps)) => maps.clone().map(Some),
            _ => KeyValue::default(),
        }
    }

    /// Attends with `t` drawn positions and takes them.
    fn step(&mut self, seed: u64, t: usize) {
        let (heads, m) = (self.heads(), self.m);
        let keys = drawn_vectors(seed ^ 10, heads * t, m);
        let values = drawn_vectors(seed ^ 11, heads * t, m);
        let queries = drawn_vectors(seed ^ 12, heads * self.group * t, m);
        let new = KeyValue::new(&keys[..], &values[..]);
        let threads = Count(self.threads);
        let held = self.held();
        let mut out = vec![f32::NAN; queries.len()];
        self.cache.attend(&queries, Some(new), &mut out, &threads);
        self.attended(&queries, t, &held, Some(new), &out);
        if let Some(twin) = &self.twin {
            let mut again = vec![f32::NAN; queries.len()];
            twin.attend(&queries, Some(new), &mut again, &threads);
            assert_eq!(bits(&out), bits(&again), "what was loaded attends alike");
        }
        if self.cache.coded() + self.cache.dense() == 0 {
            let room = self.cache.settings().sinks - self.cache.sinks();
            self.sinks_end = self.total + room.min(t);
        }
        self.cache.append(new, &threads).unwrap();
        if let Some(twin) = &mut self.twin {
            twin.append(new, &threads).unwrap();
        }
        let maps = self.maps();
        for (head, came) in self.came.iter_mut().enumerate() {
            let parts = came.as_mut().zip(new).zip(maps.as_ref());
            for ((came, new), maps) in parts {
                let own = &new[head * t * m..][..t * m];
                came.original.extend(own);
                match maps {
                    Some(maps) => came.mapped.extend(maps.apply(head, own)),
                    None => came.mapped.extend(own),
                }
            }
        }
        self.total += t;
        self.positions();
    }

    /// Checks the numbers of positions.
    fn positions(&self) {
        let (cache, settings) = (&self.cache, self.cache.settings());
        let (front, rest) = (self.front(), self.total - self.sinks_end.min(self.total));
        match settings.sliding_window {
            None => assert_eq!(front, self.dropped),
            Some(window) => {
                assert!(front >= self.dropped);
                let seen = (window.max(1) - 1).min(self.total - self.dropped);
                assert!(cache.len() >= seen, "what is seen is held");
                // The recent window is not cut.
                let most = window + 64 + settings.recent_window + 3 * settings.batch;
                assert!(cache.len() <= most.max(window + 64 + settings.sinks));
            }
        }
        assert_eq!(cache.sinks(), self.sinks_end.saturating_sub(front));
        assert!(cache.sinks() <= settings.sinks);
        let wanted = settings
            .recent_window
            .min(rest)
            .min(cache.len() - cache.sinks());
        assert!(cache.dense() >= wanted, "{} of {wanted}", cache.dense());
        // A batch that is on its way when some of it is dropped sets out anew.
        let most = settings.recent_window + 3 * settings.batch;
        assert!(cache.dense() <= most, "{} of {most}", cache.dense());
    }

    /// The positions that are gone.
    fn front(&self) -> usize {
        self.total - self.cache.len()
    }

    /// What `decode` says of each head, once that is known to be right.
    fn held(&self) -> Vec<KeyValue<Vec<f64>>> {
        let (cache, m) = (&self.cache, self.m);
        let decoded = cache.decode().unwrap();
        let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| f64::from(x)).collect() };
        let each = cache.len() * m;
        let held =
            (0..self.heads()).map(|h| decoded.as_ref().map(|x| wide(&x[h * each..][..each])));
        let held: Vec<KeyValue<Vec<f64>>> = held.collect();
        if self
            .twin
            .as_ref()
            .is_some_and(|twin| twin.len() == cache.len())
        {
            let again = self.twin.as_ref().unwrap().decode().unwrap();
            assert_eq!(decoded.map(|x| bits(&x)), again.map(|x| bits(&x)));
        }
        let settings = cache.settings();
        let (front, coded) = (self.front(), cache.coded());
        let first = front + cache.sinks();
        let decoded = self.decoded(first, coded);
        for (h, (held, came)) in held.iter().zip(&self.came).enumerate() {
            let decoded = decoded.as_ref().map(|heads| heads[h].clone());
            let parts = held.as_ref().zip(came.as_ref()).zip(self.maps());
            for (((held, came), maps), decoded) in parts.zip(decoded) {
                let dense = |range: std::ops::Range<usize>| -> Vec<f64> {
                    let range = range.start * m..range.end * m;
                    match settings.number_type {
                        NumberType::F32 => wide(&came.original[range]),
                        NumberType::F16 => {
                            let rounded = came.mapped[range].iter();
                            let rounded: Vec<f32> =
                                rounded.map(|&x| f16::from_f32(x).to_f32()).collect();
                            match &maps {
                                Some(maps) => back(maps, h, &wide(&rounded)),
                                None => wide(&rounded),
                            }
                        }
                    }
                };
                let wanted = [
                    dense(front..first),
                    decoded,
                    dense(first + coded..self.total),
                ];
                let (codes_start, codes_end) = (cache.sinks() * m, (cache.sinks() + coded) * m);
                for (i, (found, wanted)) in held.iter().zip(wanted.concat()).enumerate() {
                    // What waited in the window in f16 was coded as it was rounded.
                    if settings.number_type == NumberType::F16
                        && (codes_start..codes_end).contains(&i)
                    {
                        continue;
                    }
                    assert!(
                        (found - wanted).abs() <= 2e-4 * (1.0 + wanted.abs()),
                        "number {i}, codes {codes_start}..{codes_end}: {found} for {wanted}"
                    );
                }
            }
        }
        held
    }

    /// What the codes of positions from `first` on stand for, head by head.
    fn decoded(&self, first: usize, coded: usize) -> KeyValue<Vec<Vec<f64>>> {
        let m = self.m;
        let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| f64::from(x)).collect() };
        let sparsities = self.cache.settings().sparsities.as_ref();
        let came: KeyValue<Vec<&Came>> = self.came.iter().map(KeyValue::as_ref).collect();
        let parts = KeyValue::new(true, false).zip(sparsities);
        let parts = parts.zip(came.zip(self.maps()));
        parts.map(|((keys, sparsities), (came, maps))| {
            let rows = came.iter().enumerate().map(|(h, came)| {
                let rows = &came.mapped[first * m..][..coded * m];
                match &maps {
                    Some(maps) => centred(maps, h, first, rows),
                    None => rows.to_vec(),
                }
            });
            let mut rows: Vec<Vec<f32>> = rows.collect();
            let basis = maps.as_ref().and_then(|maps| maps.basis());
            if let Some(basis) = basis.filter(|_| coded > 0) {
                let parts = basis.apply(&rows.concat());
                rows = parts.chunks_exact(coded * m).map(<[f32]>::to_vec).collect();
            }
            let codes = rows.iter().zip(sparsities);
            let codes = codes.map(|(rows, &sparsity)| wide(&self.recoded(keys, rows, sparsity)));
            let mut decoded: Vec<Vec<f64>> = codes.collect();
            if let Some(basis) = basis {
                decoded = joined(basis, &decoded);
            }
            let Some(maps) = maps else { return decoded };
            let heads = decoded.iter().enumerate().map(|(h, decoded)| {
                let means = (first..first + coded).flat_map(|t| turned(&maps, h, t));
                let decoded = back(&maps, h, decoded);
                decoded
                    .iter()
                    .zip(means)
                    .map(|(x, mean)| x + mean)
                    .collect()
            });
            heads.collect()
        })
    }

    /// What codes of these vectors stand for.
    fn recoded(&self, keys: bool, vectors: &[f32], sparsity: usize) -> Vec<f32> {
        let settings = self.cache.settings();
        let coders = settings.coding.coders(&self.dictionaries).unwrap();
        let coder = if keys { &coders.keys } else { &coders.values };
        let mut codes = Codes::new(coder.format(sparsity)).unwrap();
        let batch = match settings.coding {
            Coding::Additive { beam_width } => {
                let both = self.dictionaries.codebooks.as_ref().unwrap();
                let own = if keys { &both.keys } else { &both.values };
                let search = BeamSearch::new(own, sparsity).unwrap();
                search
                    .with_beam_width(beam_width)
                    .with_fit(settings.fit)
                    .encode(vectors)
            }
            Coding::Sparse { .. } => {
                let both = self.dictionaries.sparse.as_ref().unwrap();
                let own = if keys { &both.keys } else { &both.values };
                let pursuit = Pursuit::new(own, sparsity).unwrap();
                pursuit.with_fit(settings.fit).encode(vectors)
            }
        };
        codes.extend(&batch.unwrap());
        codes.decode(coder.atoms(sparsity)).unwrap()
    }

    /// Checks attention over what is held and the new positions.
    fn attended(
        &self,
        queries: &[f32],
        t: usize,
        held: &[KeyValue<Vec<f64>>],
        new: Option<KeyValue<&[f32]>>,
        out: &[f32],
    ) {
        let (m, each) = (self.m, queries.len() / self.heads());
        for (h, held) in held.iter().enumerate() {
            let mut all = held.clone();
            if let Some(new) = new {
                for (all, new) in all.as_mut().zip(new) {
                    all.extend(new[h * t * m..][..t * m].iter().map(|&x| f64::from(x)));
                }
            }
            let own = &queries[h * each..][..each];
            let sliding = self.cache.settings().sliding_window;
            let wanted = attention(own, (m, t), sliding, &all.keys, &all.values);
            for (found, wanted) in out[h * each..][..each].iter().zip(wanted) {
                assert!(
                    (f64::from(*found) - wanted).abs() <= 1e-3 * (1.0 + wanted.abs()),
                    "head {h}: {found} for {wanted}"
                );
            }
        }
    }

    /// Attends to what is held alone.
    fn look(&self, seed: u64) {
        let queries = drawn_vectors(seed ^ 13, self.heads() * self.group, self.m);
        let mut out = vec![f32::NAN; queries.len()];
        self.cache
            .attend(&queries, None, &mut out, &Count(self.threads));
        if self.cache.is_empty() {
            assert!(out.iter().all(|&x| x == 0.0));
        } else {
            self.attended(&queries, 1, &self.held(), None, &out);
        }
    }

    fn drop_front(&mut self, count: usize) {
        let count = count.min(self.cache.len());
        self.dropped = self.front() + count;
        self.cache.drop_front(count);
        if let Some(twin) = &mut self.twin {
            twin.drop_front(count);
        }
        assert_eq!(self.front(), self.dropped);
        if self.front() >= self.sinks_end {
            self.sinks_end = self.front();
        }
        self.held();
    }

    /// Goes on with one that is loaded from the cache's state beside it.
    fn split(&mut self) {
        let state = self.cache.save();
        let mut twin = LayerCache::new(&self.dictionaries, self.cache.settings().clone()).unwrap();
        twin.load(&state).unwrap();
        assert_eq!(twin.save(), state);
        let lengths = |cache: &LayerCache| [cache.sinks(), cache.coded(), cache.dense()];
        assert_eq!(lengths(&twin), lengths(&self.cache));
        self.twin = Some(twin);
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[derive(Debug, Clone)]
enum Event {
    Step(usize),
    Drop(usize),
    Split,
    Look,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        8 => Just(Event::Step(1)),
        3 => (1usize..6).prop_map(Event::Step),
        2 => (6usize..40).prop_map(Event::Step),
        1 => (0usize..12).prop_map(Event::Drop),
        1 => Just(Event::Split),
        1 => Just(Event::Look),
    ];
    prop::collection::vec(event, 1..40)
}

fn shapes() -> impl Strategy<Value = (usize, usize, usize, usize)> {
    let m = prop_oneof![Just(1usize), Just(5), Just(16), Just(33)];
    let threads = prop_oneof![Just(1usize), Just(3)];
    (m, 1usize..5, 1usize..5, threads)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_layer_holds_and_attends_to_what_came(
        (m, heads, group, threads) in shapes(), maps: bool, joint: bool, sparse in prop::bool::weighted(0.2), f16: bool, background: bool,
        sinks in prop_oneof![Just(0usize), 1usize..9, Just(40)], recent_window in prop_oneof![Just(0usize), 1usize..12],
        batch in 1usize..6, delay in 0usize..4, sliding in prop_oneof![2 => Just(None), 1 => (1usize..90).prop_map(Some)],
        events in events(), seed: u64,
    ) {
        // Numbers of one dimension have sums that are next to equal, and rounding decides between them.
        let dictionaries = match maps && joint && heads > 1 && m > 1 {
            // All heads, or two groups of them.
            true => {
                let pairs = heads.is_multiple_of(2) && seed.is_multiple_of(2);
                joint_dictionaries(seed, heads, m, if pairs { 2 } else { heads })
            }
            false => drawn_dictionaries(seed, heads, m, maps),
        };
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 5);
        let most = if sparse { m.min(3) } else { 3 };
        let mut draw = || (0..heads).map(|_| rng.random_range(1..=most)).collect();
        let sparsities = LayerSparsities { keys: draw(), values: draw() };
        let coding = match sparse {
            true => Coding::Sparse { coefficients: CoefficientFormat::F32, tolerance: 0.0 },
            false => Coding::Additive { beam_width: 2 },
        };
        let settings = LayerSettings {
            coding, sinks, recent_window, batch, delay, background,
            number_type: if f16 { NumberType::F16 } else { NumberType::F32 },
            sliding_window: sliding,
            ..LayerSettings::new(sparsities)
        };
        let mut checked = Checked::new(dictionaries, settings, group, threads);
        checked.look(seed);
        for (number, event) in events.into_iter().enumerate() {
            match event {
                Event::Step(t) => checked.step(seed.wrapping_add(100 * number as u64), t),
                Event::Drop(count) => checked.drop_front(count),
                Event::Split => checked.split(),
                Event::Look => checked.look(seed ^ number as u64),
            }
        }
    }
}

/// However long a batch is to wait, the window does not grow.
#[test]
fn no_more_comes_than_leaves() {
    let dictionaries = drawn_dictionaries(3, 2, 8, false);
    for (batch, delay) in [(1, 1), (1, 4), (2, 2), (3, 100), (2, usize::MAX), (4, 3)] {
        let settings = LayerSettings {
            recent_window: 2,
            batch,
            delay,
            ..usual(1)
        };
        let mut cache = LayerCache::new(&dictionaries, settings).unwrap();
        let row = vec![0.5; 2 * 8];
        for _ in 0..60 {
            cache.append(KeyValue::new(&row, &row), &Alone).unwrap();
            assert!(cache.dense() <= 2 + 2 * batch, "{batch} {delay}");
        }
    }
}

fn usual(sinks: usize) -> LayerSettings {
    LayerSettings {
        coding: Coding::Additive { beam_width: 2 },
        sinks,
        recent_window: 6,
        batch: 3,
        delay: 1,
        ..LayerSettings::new(LayerSparsities::same(2, 3, 2))
    }
}

#[test]
fn long_prompts_and_contexts_that_are_split_see_the_first_positions() {
    let settings = LayerSettings {
        number_type: NumberType::F32,
        ..usual(5)
    };
    for (threads, joint) in [(1, false), (8, false), (8, true)] {
        let dictionaries = match joint {
            true => joint_dictionaries(3, 2, 8, 2),
            false => drawn_dictionaries(3, 2, 8, true),
        };
        let mut checked = Checked::new(dictionaries, settings.clone(), 2, threads);
        // More than are coded at once, and enough for a context to be split among threads.
        for (seed, t) in [(1, 2500), (2, 1), (3, 1100), (4, 16_000), (5, 1), (6, 1)] {
            let threads = checked.threads;
            if t > 2500 {
                // The reference would take too long.
                let (heads, m) = (checked.heads(), checked.m);
                let rows = [seed ^ 10, seed ^ 11].map(|seed| drawn_vectors(seed, heads * t, m));
                let new = KeyValue::new(&rows[0][..], &rows[1][..]);
                checked.cache.append(new, &Count(threads)).unwrap();
                let maps = checked.maps();
                for (head, came) in checked.came.iter_mut().enumerate() {
                    let parts = came.as_mut().zip(new).zip(maps.as_ref());
                    for ((came, new), maps) in parts {
                        let own = &new[head * t * m..][..t * m];
                        came.original.extend(own);
                        came.mapped.extend(maps.as_ref().unwrap().apply(head, own));
                    }
                }
                checked.total += t;
                continue;
            }
            checked.step(seed, t);
        }
    }
}

/// However the first positions come, they are the same.
#[test]
fn first_positions_come_by_prompts_and_by_tokens() {
    let dictionaries = drawn_dictionaries(7, 2, 8, false);
    let (heads, m, total) = (2, 8, 30);
    let rows = [1, 2].map(|seed| drawn_vectors(seed, heads * total, m));
    let states = [&[30][..], &[3, 2, 5, 20], &[1; 30], &[4, 1, 25], &[6, 24]].map(|pieces| {
        let mut cache = LayerCache::new(&dictionaries, usual(6)).unwrap();
        let mut first = 0;
        for &t in pieces {
            let piece = rows.each_ref().map(|rows| -> Vec<f32> {
                let heads = rows.chunks_exact(total * m);
                heads
                    .flat_map(|own| &own[first * m..(first + t) * m])
                    .copied()
                    .collect()
            });
            cache
                .append(KeyValue::new(&piece[0], &piece[1]), &Alone)
                .unwrap();
            first += t;
            assert_eq!(cache.sinks(), first.min(6));
            assert_eq!(cache.len(), first);
        }
        cache.save()
    });
    let sinks = |state: &LayerState| -> Vec<Vec<u8>> {
        let blocks = state.blocks.iter();
        let blocks = blocks.filter(|(name, _)| name.ends_with(".sinks"));
        blocks.map(|(_, bytes)| bytes.clone()).collect()
    };
    assert_eq!(sinks(&states[0]).len(), 2);
    for state in &states {
        assert_eq!(sinks(state), sinks(&states[0]));
    }
}

fn filled(dictionaries: &LayerDictionaries, settings: LayerSettings) -> LayerCache {
    let (heads, m) = (settings.sparsities.keys.len(), dictionaries.head_dim());
    let mut cache = LayerCache::new(dictionaries, settings).unwrap();
    let rows = [1, 2].map(|seed| drawn_vectors(seed, heads * 30, m));
    cache
        .append(KeyValue::new(&rows[0], &rows[1]), &Alone)
        .unwrap();
    cache
}

#[test]
fn states_that_contradict_themselves_or_the_settings_are_refused() {
    let dictionaries = drawn_dictionaries(9, 2, 8, true);
    let state = filled(&dictionaries, usual(5)).save();
    let refused = |settings: LayerSettings, state: &LayerState| {
        let mut cache = LayerCache::new(&dictionaries, settings).unwrap();
        let before = cache.save();
        let error = cache.load(state).unwrap_err();
        assert_eq!(cache.save(), before, "the cache is as it was");
        error
    };
    let inside = |error: Error| assert!(matches!(error, Error::SavedLayer(_)), "{error}");
    // More first positions than the settings have, or none where there are to be some.
    inside(refused(usual(4), &state));
    inside(refused(usual(0), &state));
    inside(refused(usual(5), &filled(&dictionaries, usual(0)).save()));
    let changed = |change: &dyn Fn(&mut LayerState)| {
        let mut state = state.clone();
        change(&mut state);
        state
    };
    for name in ["keys.sinks", "values.sinks", "keys.window", "values.window"] {
        let place = |state: &LayerState| state.blocks.iter().position(|b| b.0 == name).unwrap();
        let of = |change: &dyn Fn(&mut Vec<u8>)| {
            changed(&|state| {
                let place = place(state);
                change(&mut state.blocks[place].1);
            })
        };
        inside(refused(
            usual(5),
            &changed(&|state| {
                let place = place(state);
                state.blocks.remove(place);
            }),
        ));
        inside(refused(
            usual(5),
            &changed(&|state| {
                let twice = state.blocks[place(state)].clone();
                state.blocks.push(twice);
            }),
        ));
        inside(refused(
            usual(5),
            &changed(&|state| {
                let place = place(state);
                state.blocks[place].0 = "keys.else".to_owned();
            }),
        ));
        // A byte less; a position of one head; a position less; none.
        inside(refused(
            usual(5),
            &of(&|bytes| bytes.truncate(bytes.len() - 1)),
        ));
        inside(refused(
            usual(5),
            &of(&|bytes| bytes.truncate(bytes.len() - 16)),
        ));
        inside(refused(
            usual(5),
            &of(&|bytes| bytes.truncate(bytes.len() - 32)),
        ));
        inside(refused(usual(5), &of(&Vec::clear)));
        for bad in [f16::NAN, f16::INFINITY] {
            inside(refused(
                usual(5),
                &of(&|bytes| {
                    bytes[4..6].copy_from_slice(&bad.to_le_bytes());
                }),
            ));
        }
    }
    for leaving in [Some(2), Some(usize::MAX)] {
        inside(refused(
            usual(5),
            &changed(&|state| state.leaving = leaving),
        ));
    }
    // Behind other maps, or none, the same codes stand for something else.
    for other in [drawn_dictionaries(9, 2, 8, false), {
        let maps = KeyValue::new(drawn_maps(1, 2, 8).into(), drawn_maps(2, 2, 8).into());
        LayerDictionaries {
            maps: Some(maps),
            ..dictionaries.clone()
        }
    }] {
        let error = LayerCache::new(&other, usual(5))
            .unwrap()
            .load(&state)
            .unwrap_err();
        assert!(matches!(error, Error::OtherDictionary(_)), "{error}");
    }
    // It is sound itself, and fewer first positions than there may be are what a short text has.
    LayerCache::new(&dictionaries, usual(5))
        .unwrap()
        .load(&state)
        .unwrap();
    LayerCache::new(&dictionaries, usual(9))
        .unwrap()
        .load(&state)
        .unwrap();
}

/// Where no first positions are kept, states are those that earlier versions wrote.
#[test]
fn states_without_first_positions_are_what_they_were() {
    let dictionaries = drawn_dictionaries(9, 2, 8, false);
    let cache = filled(&dictionaries, usual(0));
    let state = cache.save();
    let names: Vec<&str> = state.blocks.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        ["keys.codes", "keys.window", "values.codes", "values.window"]
    );
    let codebooks = dictionaries.codebooks.as_ref().unwrap();
    assert_eq!(
        state.checksums,
        codebooks.as_ref().map(|own| own.checksum())
    );
    let mut again = LayerCache::new(&dictionaries, usual(0)).unwrap();
    again.load(&state).unwrap();
    assert_eq!(again.decode().unwrap(), cache.decode().unwrap());
}

#[test]
fn maps_that_do_not_fit_are_refused() {
    let dictionaries = drawn_dictionaries(9, 2, 8, true);
    let with = |heads: usize, m: usize| {
        let maps = KeyValue::new(drawn_maps(1, 2, 8).into(), drawn_maps(2, heads, m).into());
        let dictionaries = LayerDictionaries {
            maps: Some(maps),
            ..dictionaries.clone()
        };
        LayerCache::new(&dictionaries, usual(2)).map(drop)
    };
    with(2, 8).unwrap();
    for (heads, m) in [(1, 8), (3, 8), (2, 7), (2, 9)] {
        let error = with(heads, m).unwrap_err();
        let found = matches!(error, Error::Setting { .. } | Error::Dictionary(_));
        assert!(found, "{heads} {m}: {error}");
    }
    // Sparse codes are not found behind maps.
    let sparse = Coding::Sparse {
        coefficients: CoefficientFormat::I8,
        tolerance: 0.0,
    };
    let settings = LayerSettings {
        coding: sparse,
        ..usual(2)
    };
    let coders = sparse.coders(&dictionaries).unwrap();
    assert!(coders.keys.maps().is_none());
    filled(&dictionaries, settings);
    // Additive codes need codebooks, whatever maps there are.
    let without = LayerDictionaries {
        codebooks: None,
        ..dictionaries
    };
    let error = LayerCache::new(&without, usual(2)).err().unwrap();
    assert!(matches!(error, Error::Setting { .. }), "{error}");
}

#[test]
fn what_is_not_finite_behind_a_map_is_refused() {
    let dictionaries = drawn_dictionaries(9, 2, 8, true);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut cache = LayerCache::new(&dictionaries, usual(2)).unwrap();
        let mut rows = drawn_vectors(1, 2 * 30, 8);
        rows[(30 + 12) * 8 + 3] = bad;
        let values = drawn_vectors(2, 2 * 30, 8);
        let refused = cache.append(KeyValue::new(&rows, &values), &Alone);
        assert!(
            matches!(refused, Err(Error::Coding { part: "key", .. })),
            "{refused:?}"
        );
        // Its attention says so.
        let mut out = vec![0.0; 2 * 30 * 8];
        let queries = vec![1.0; out.len()];
        let cache = LayerCache::new(&dictionaries, usual(2)).unwrap();
        cache.attend(
            &queries,
            Some(KeyValue::new(&rows, &values)),
            &mut out,
            &Alone,
        );
        assert!(out[out.len() - 8..].iter().all(|x| x.is_nan()));
    }
}

/// A cache and its copy go on apart, each as if the other were not there, and hold the codes that are there only once.
#[test]
fn copies_go_on_by_themselves() {
    let (heads, m) = (2, 8);
    for coding in [
        Coding::Additive { beam_width: 4 },
        Coding::usual(lexico::dictionary::CodeFamily::Sparse),
    ] {
        let dictionaries = drawn_dictionaries(5, heads, m, true);
        let cache = || {
            let settings = LayerSettings {
                coding,
                recent_window: 6,
                batch: 4,
                delay: 2,
                background: true,
                ..LayerSettings::new(LayerSparsities::same(heads, 2, 3))
            };
            LayerCache::new(&dictionaries, settings).unwrap()
        };
        let vectors = |seed: u64, t: usize| KeyValue {
            keys: drawn_vectors(seed, heads * t, m),
            values: drawn_vectors(seed ^ 9, heads * t, m),
        };
        let take = |cache: &mut LayerCache, seed: u64, t: usize| {
            let new = vectors(seed, t);
            cache.append(new.as_ref().map(|x| &x[..]), &Alone).unwrap();
        };
        // In the middle of a batch that leaves, too.
        for steps in [0, 5, 7] {
            let begin = || {
                let mut cache = cache();
                take(&mut cache, 1, 30);
                (0..steps).for_each(|step| take(&mut cache, 100 + step, 1));
                cache
            };
            let go_on = |cache: &mut LayerCache, seed: u64| {
                take(cache, seed, 20);
                (0..40).for_each(|step| take(cache, seed + step, 1));
                cache.decode().unwrap()
            };
            let mut original = begin();
            let mut copy = original.fork();
            assert_eq!(copy.decode().unwrap(), original.decode().unwrap());
            let codes = |cache: &LayerCache| cache.footprint().codes.into_iter().sum::<usize>();
            assert_eq!(codes(&copy), codes(&original));
            let first = go_on(&mut original, 1000);
            let second = go_on(&mut copy, 2000);
            assert_eq!(first, go_on(&mut begin(), 1000));
            assert_eq!(second, go_on(&mut begin(), 2000));
            assert_ne!(first, second);
        }
    }
}

/// Layers of one model with a limit of memory.
struct Limited {
    layers: Vec<LayerCache>,
    dictionaries: LayerDictionaries,
    limit: MemoryLimit,
    came: KeyValue<Vec<f32>>,
}

impl Limited {
    fn new(dictionaries: LayerDictionaries, bytes: usize, settings: &[LayerSettings]) -> Self {
        let limit = MemoryLimit::new(bytes, settings, dictionaries.head_dim()).unwrap();
        let layers = settings.iter().map(|own| LayerSettings {
            memory: Some(limit),
            ..own.clone()
        });
        Self {
            layers: layers
                .map(|own| LayerCache::new(&dictionaries, own).unwrap())
                .collect(),
            dictionaries,
            limit,
            came: KeyValue::default(),
        }
    }

    fn len(&self) -> usize {
        self.layers[0].len()
    }

    /// Takes `t` drawn positions of one head, the same in every layer; returns false where the memory does not hold them.
    fn take(&mut self, seed: u64, t: usize) -> bool {
        let m = self.dictionaries.head_dim();
        let rows = KeyValue::new(seed ^ 1, seed ^ 2).map(|seed| drawn_vectors(seed, t, m));
        let new = rows.as_ref().map(|x| &x[..]);
        let queries = drawn_vectors(seed ^ 3, 2 * t, m);
        let (held, before) = (self.len(), self.layers[0].decode().unwrap());
        for layer in &mut self.layers {
            let mut out = vec![f32::NAN; queries.len()];
            layer.attend(&queries, Some(new), &mut out, &Alone);
            let all = layer.decode().unwrap().zip(new).map(|(mut all, new)| {
                all.extend(new);
                all.iter().map(|&x| f64::from(x)).collect::<Vec<_>>()
            });
            let wanted = attention(&queries, (m, t), None, &all.keys, &all.values);
            for (found, wanted) in out.iter().zip(wanted) {
                let near = (f64::from(*found) - wanted).abs() <= 1e-3 * (1.0 + wanted.abs());
                assert!(near, "{found} for {wanted} of {held} and {t} positions");
            }
            match layer.append(new, &Alone) {
                Ok(()) => assert!(held + t <= self.limit.capacity()),
                Err(Error::Memory {
                    positions,
                    capacity,
                    ..
                }) => {
                    assert_eq!((positions, capacity), (held + t, self.limit.capacity()));
                    assert!(positions > capacity);
                    assert_eq!(layer.decode().unwrap(), before, "as it was");
                    return false;
                }
                Err(other) => panic!("{other}"),
            }
        }
        for (came, new) in self.came.as_mut().zip(new) {
            came.extend(new);
        }
        true
    }

    fn check(&self) {
        let bytes = self.layers.iter().map(|layer| layer.footprint().total());
        let bytes: usize = bytes.sum();
        assert!(
            bytes <= self.limit.bytes(),
            "{bytes} of {}",
            self.limit.bytes()
        );
        for layer in &self.layers {
            assert_eq!(
                layer.len(),
                self.came.keys.len() / self.dictionaries.head_dim()
            );
            if layer.save().all_dense {
                let f16 = layer.settings().number_type == NumberType::F16;
                let kept = self.came.as_ref().map(|came| -> Vec<f32> {
                    let kept = |&x: &f32| if f16 { f16::from_f32(x).to_f32() } else { x };
                    came.iter().map(kept).collect()
                });
                assert_eq!(layer.decode().unwrap(), kept, "as the model made it");
            }
        }
    }

    /// The same out of what is saved of it.
    fn loaded(&self) -> Self {
        let again = self.layers.iter().map(|layer| {
            let settings = layer.settings().clone();
            let mut again = LayerCache::new(&self.dictionaries, settings).unwrap();
            again.load(&layer.save()).unwrap();
            assert_eq!(again.save(), layer.save());
            again
        });
        Self {
            layers: again.collect(),
            dictionaries: self.dictionaries.clone(),
            limit: self.limit,
            came: self.came.clone(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_limit_of_memory_is_kept(
        m in prop_oneof![Just(16usize), Just(33), Just(64)], maps: bool, f16: bool, background: bool, sinks in 0usize..9,
        batch in 1usize..6, dense in 60usize..500, pieces in prop::collection::vec(prop_oneof![Just(1usize), 2usize..9, 30usize..300], 1..12),
        steps in 0usize..60, seed: u64,
    ) {
        let dictionaries = drawn_dictionaries(seed, 1, m, maps);
        let number_type = if f16 { NumberType::F16 } else { NumberType::F32 };
        let settings = [(3, 1, 0), (1, 2, 3)].map(|(keys, values, delay)| LayerSettings {
            coding: Coding::Additive { beam_width: 2 },
            sinks, batch, delay, background, number_type,
            ..LayerSettings::new(LayerSparsities::same(1, keys, values))
        });
        let bytes = 2 * dense * 2 * m * number_type.bytes();
        let mut limited = Limited::new(dictionaries, bytes, &settings);
        let capacity = limited.limit.capacity();
        let mut goes_on = true;
        for (number, t) in pieces.into_iter().chain(std::iter::repeat_n(1, steps)).enumerate() {
            goes_on = goes_on && limited.take(seed.wrapping_add(number as u64), t);
            if !goes_on {
                break;
            }
            limited.check();
            if number % 5 == 3 {
                limited = limited.loaded();
            }
        }
        prop_assert!(limited.len() <= capacity);
    }
}

/// What fits stays as it is, and of what does not no more is coded than must be.
#[test]
fn positions_are_dense_while_they_fit() {
    let (heads, m, batch) = (2, 64, 16);
    let dictionaries = drawn_dictionaries(5, heads, m, true);
    let settings = [LayerSettings::new(LayerSparsities::same(heads, 3, 3))];
    let dense = 2 * heads * m * 2;
    let limit = MemoryLimit::new(1000 * dense, &settings, m).unwrap();
    let [settings] = settings.map(|own| LayerSettings {
        memory: Some(limit),
        ..own
    });
    let mut cache = LayerCache::new(&dictionaries, settings).unwrap();
    let mut first = None;
    for position in 0..2000 {
        let rows = [1, 2].map(|seed| drawn_vectors(seed * 7 + position, heads, m));
        cache
            .append(KeyValue::new(&rows[0], &rows[1]), &Alone)
            .unwrap();
        let total = cache.footprint().total();
        assert!(total <= limit.bytes(), "{total} after {position}");
        if cache.coded() > 0 {
            first.get_or_insert(cache.len());
            // The memory is used but for what batches on their way need.
            assert!(
                total + 12 * batch * dense > limit.bytes(),
                "{total} after {position}"
            );
        }
    }
    let first = first.unwrap();
    assert!((800..1000).contains(&first), "coded from {first} on");
}
