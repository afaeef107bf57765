//! What holds of every cache method.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use candle_core::{Device, Tensor};
use lexico_llm::cache::{CacheBudget, CacheContext, CacheSpec, KvCache, Lengths, METHODS};
use lexico_llm::config::Config;
use lexico_llm::decoder::{Logits, Sequence};
use lexico_llm::{Error, Model};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The distance that what a method expects to hold may have from what it holds: storage grows by up to a sixteenth.
const TOLERANCE: f64 = 0.07;

/// Those that hold all positions, each coded by itself or with others, with windows so small that most positions are coded.
const QUANTISED: [&str; 19] = [
    "per-token:bits=8",
    "per-token:bits=3,group=24,window=0",
    "per-token:bits=2,window=16",
    "kivi:bits=4",
    "kivi:bits=2,residual=32",
    "zipcache",
    "turboquant:bits=2.5",
    "turboquant:bits=4,window=16",
    "turboquant:bits=3,sinks=9,window=16",
    "per-token:bits=3,sinks=7,window=16",
    "kivi:bits=2,residual=32,sinks=6",
    "vllm-turboquant:preset=k8v4,dense-layers=0",
    "vllm-turboquant:dense-layers=0,sinks=6,window=16",
    "llama-cpp",
    "llama-cpp:k=q4_0,v=q4_1,sinks=6",
    "fp8:scales=prompt",
    "kvarn:group=32,sinks=6",
    "oscar:window=16,sinks=4",
    "oscar:window=0,group=32,rotation=hadamard",
];

/// The methods whose codes are for head dims that 32 divides, or that are powers of two.
const EVEN_HEAD_DIMS: [&str; 4] = ["vllm-turboquant", "llama-cpp", "kvarn", "oscar"];

fn context(model: &Model) -> CacheContext<'_> {
    CacheContext {
        model: "tiny",
        config: model.decoder.config(),
        dictionaries: model.dictionaries.as_ref(),
        calibration: model.calibration.as_ref(),
        device: model.decoder.device(),
    }
}

fn text(model: &Model, length: usize) -> Vec<u32> {
    let text = "Question: Ana has 12 coins at home. Ben gives Ana 7 more. ".repeat(length / 12);
    let mut tokens = model.tokenizer.encode_first(&text).unwrap();
    assert!(tokens.len() >= length);
    tokens.truncate(length);
    tokens
}

/// Logits of every step: a prompt, and then one token after the other.
fn run(model: &Model, cache: &mut dyn KvCache, prompt: usize, tokens: &[u32]) -> Vec<Vec<f32>> {
    let steps = [&tokens[..prompt]]
        .into_iter()
        .chain(tokens[prompt..].chunks(1));
    steps
        .map(|tokens| {
            let mut sequences = [Sequence {
                tokens,
                cache: &mut *cache,
            }];
            let logits = model.decoder.forward(&mut sequences, Logits::Last).unwrap();
            logits.squeeze(0).unwrap().to_vec1().unwrap()
        })
        .collect()
}

#[test]
fn caches_hold_the_bytes_that_they_expect_to() {
    let model = Model::tiny().unwrap();
    let context = context(&model);
    let tokens = text(&model, 360);
    let lengths = Lengths {
        prompt: 300,
        end: 360,
    };
    let check = |spec: &CacheSpec| {
        let expected = spec.expected_bytes(&context, lengths).unwrap();
        let mut cache = spec.build(&context).unwrap();
        run(&model, cache.as_mut(), lengths.prompt, &tokens);
        let held = cache.footprint().total() as f64;
        let ratio = expected / held;
        println!("{spec}: {expected} expected, {held} held, {ratio:.4}");
        assert!((ratio - 1.0).abs() < TOLERANCE, "{spec}: {ratio}");
    };
    for method in METHODS {
        check(&method.name.parse().unwrap());
        // What budgets choose, from one that most methods cannot keep to one that any can.
        for share in [0.12, 0.2, 0.3, 0.45] {
            let budget = CacheBudget::Share(share);
            let spec: CacheSpec = method.name.parse().unwrap();
            match spec.within(budget, &[lengths], &context) {
                Ok(spec) => check(&spec),
                Err(Error::Budget { smallest, .. }) => check(&smallest.parse().unwrap()),
                Err(e) => panic!("{}: {e}", method.name),
            }
        }
    }
}

#[test]
fn eight_bits_are_nearly_all() {
    let model = Model::tiny().unwrap();
    let tokens = text(&model, 200);
    let logits = |spec: &str| {
        let spec: CacheSpec = spec.parse().unwrap();
        run(
            &model,
            spec.build(&context(&model)).unwrap().as_mut(),
            150,
            &tokens,
        )
    };
    let full = logits("full");
    let eight = logits("per-token:bits=8,window=0");
    for (step, (full, eight)) in full.iter().zip(&eight).enumerate() {
        let worst = full.iter().zip(eight).map(|(a, b)| (a - b).abs());
        let worst = worst.fold(0.0, f32::max);
        assert!(worst < 0.15, "step {step}: {worst}");
    }
}

/// Queries, keys and values of `t` positions; channels differ in their spread.
fn draw(rng: &mut ChaCha8Rng, config: &Config, t: usize) -> [Tensor; 3] {
    let m = config.head_dim;
    [config.heads, config.kv_heads, config.kv_heads].map(|heads| {
        let numbers: Vec<f32> = (0..heads * t * m)
            .map(|i| rng.random_range(-1f32..1.0) * (1.0 + (i % m % 3) as f32))
            .collect();
        Tensor::from_vec(numbers, (heads, t, m), &Device::Cpu).unwrap()
    })
}

/// Attention under a sliding window is near that of the full cache, and what is outside is let go.
#[test]
fn sliding_windows_are_kept() {
    let model = Model::tiny().unwrap();
    for head_dim in [64, 26] {
        let config = Config {
            head_dim,
            window: Some(300),
            layers: 1,
            ..model.decoder.config().clone()
        };
        let context = CacheContext {
            model: "drawn",
            config: &config,
            dictionaries: None,
            calibration: None,
            device: model.decoder.device(),
        };
        for spec in QUANTISED {
            let spec: CacheSpec = spec.parse().unwrap();
            if head_dim == 26 && EVEN_HEAD_DIMS.contains(&spec.method().name) {
                continue;
            }
            let mut full = "full"
                .parse::<CacheSpec>()
                .unwrap()
                .build(&context)
                .unwrap();
            let mut cache = spec.build(&context).unwrap();
            let mut rng = ChaCha8Rng::seed_from_u64(7);
            let mut sizes = Vec::new();
            let (mut off, mut all) = (0.0, 0.0);
            for t in [1, 500, 150]
                .into_iter()
                .chain([1; 300])
                .chain([350])
                .chain([1; 350])
            {
                let [q, k, v] = draw(&mut rng, &config, t);
                let numbers = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let expected = numbers(full.attend(0, &q, &k, &v).unwrap());
                let got = numbers(cache.attend(0, &q, &k, &v).unwrap());
                for (a, b) in expected.iter().zip(&got) {
                    off += f64::from((a - b) * (a - b));
                    all += f64::from(a * a);
                }
                sizes.push(cache.footprint().total());
            }
            assert_eq!(cache.len(), full.len());
            let error = (off / all).sqrt();
            println!(
                "{spec}, m = {head_dim}: {error:.3}, {} bytes",
                sizes[sizes.len() - 1]
            );
            assert!(error < 0.6, "{spec}, m = {head_dim}: {error}");
            let most = |sizes: &[usize]| *sizes.iter().max().unwrap() as f64;
            let (early, late) = sizes.split_at(sizes.len() / 2);
            assert!(most(late) < 1.3 * most(early), "{spec}: {sizes:?}");
        }
    }
}

#[test]
fn what_is_not_finite_is_refused() {
    let model = Model::tiny().unwrap();
    let context = context(&model);
    let config = context.config;
    for spec in QUANTISED {
        for (part, bad) in [
            ("key", f32::NAN),
            ("value", f32::INFINITY),
            ("value", f32::NAN),
        ] {
            let mut cache = spec.parse::<CacheSpec>().unwrap().build(&context).unwrap();
            let [q, k, v] = draw(&mut ChaCha8Rng::seed_from_u64(1), config, 3);
            let spoil = |x: &Tensor, when: bool| {
                let mut numbers: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
                if when {
                    numbers[config.head_dim + 5] = bad;
                }
                Tensor::from_vec(numbers, x.shape(), &Device::Cpu).unwrap()
            };
            let (k, v) = (spoil(&k, part == "key"), spoil(&v, part == "value"));
            let refused = cache.attend(0, &q, &k, &v).unwrap_err();
            let told = matches!(&refused, Error::Coding { layer: 0, part: p, .. } if *p == part);
            assert!(told, "{spec}: {refused}");
        }
    }
}

/// Windows, groups and gaps of any size are taken; they are never full.
#[test]
fn large_options_are_taken() {
    let model = Model::tiny().unwrap();
    let context = context(&model);
    let most = usize::MAX;
    let lengths = Lengths { prompt: 3, end: 4 };
    for spec in [
        format!("per-token:group={most},window={most}"),
        format!("per-token:group={most},window=0"),
        format!("kivi:group={most},residual={most}"),
        format!("zipcache:gap={most}"),
        format!("turboquant:window={most}"),
        format!("per-token:sinks={most},dense-layers={most}"),
        format!("kivi:sinks={most}"),
        format!("turboquant:sinks={most},window={most}"),
        format!("vllm-turboquant:window={most},dense-layers={most}"),
        format!("llama-cpp:window={most},sinks={most}"),
        format!("fp8:window={most}"),
        format!("kvarn:group={most},window={most}"),
        format!("random:capacity={most},window=3"),
        format!("oscar:group={most},window={most},sinks=0"),
        format!("lexico:window={most},batch={most}"),
    ] {
        let spec: CacheSpec = spec.parse().unwrap();
        let mut cache = spec.build(&context).unwrap();
        let [q, k, v] = draw(&mut ChaCha8Rng::seed_from_u64(1), context.config, 3);
        cache.attend(0, &q, &k, &v).unwrap();
        let [q, k, v] = draw(&mut ChaCha8Rng::seed_from_u64(2), context.config, 1);
        cache.attend(0, &q, &k, &v).unwrap();
        assert!(spec.expected_bytes(&context, lengths).unwrap() > 0.0);
    }
}

/// Zeros, and numbers that f16 cannot hold, are coded; what comes out is finite.
#[test]
fn extremes_are_coded() {
    let model = Model::tiny().unwrap();
    let context = context(&model);
    let config = context.config;
    for spec in QUANTISED {
        for size in [0.0, 1e-30, 1e6, 1e36] {
            let mut cache = spec.parse::<CacheSpec>().unwrap().build(&context).unwrap();
            for t in [40, 1, 1, 1] {
                let [q, k, v] = draw(&mut ChaCha8Rng::seed_from_u64(1), config, t);
                let scaled = |x: &Tensor| (x.clamp(-1f32, 1f32).unwrap() * size).unwrap();
                let q = (q * 0.0).unwrap();
                let out = cache.attend(0, &q, &scaled(&k), &scaled(&v)).unwrap();
                let out: Vec<f32> = out.flatten_all().unwrap().to_vec1().unwrap();
                assert!(out.iter().all(|x| x.is_finite()), "{spec}, {size}");
            }
        }
    }
}

#[test]
fn impossible_options_are_refused() {
    let model = Model::tiny().unwrap();
    let context = context(&model);
    for (spec, words) in [
        ("per-token:group=0", "1 or more"),
        ("kivi:group=0", "1 or more"),
        ("kivi:residual=0", "1 or more"),
        ("kivi:group=48", "multiple of the group, 48"),
        ("zipcache:gap=0", "1 or more"),
        ("zipcache:salient=1.5", "from 0 to 1"),
        ("zipcache:salient=NaN", "from 0 to 1"),
        ("turboquant:bits=0.5", "from 1 to 4"),
        ("turboquant:bits=5", "from 1 to 4"),
        ("turboquant:bits=NaN", "from 1 to 4"),
        ("turboquant:bits=2.01", "channels"),
        ("kvarn:group=1", "no variance"),
        ("oscar:k-clip=-1", "from 0 to 1"),
        ("random:capacity=9", "36 of these"),
    ] {
        let spec: CacheSpec = spec.parse().unwrap();
        let built = spec.build(&context).map(|_| ()).unwrap_err().to_string();
        assert!(built.contains(words), "{built}");
        let lengths = Lengths { prompt: 1, end: 2 };
        let told = spec.expected_bytes(&context, lengths).unwrap_err();
        assert_eq!(told.to_string(), built);
    }
    for spec in [
        "per-token:bits=5",
        "kivi:bits=3",
        "zipcache:bits=3",
        "turboquant:norm=x",
        "llama-cpp:k=q6_k",
        "vllm-turboquant:preset=2bit",
        "kvarn:v=3",
    ] {
        let refused = spec.parse::<CacheSpec>().unwrap_err().to_string();
        assert!(refused.contains("must be one of"), "{refused}");
    }
}

/// Attention over what a cache holds is attention over the vectors that it says it holds, in f64 and unrotated.
#[test]
fn attention_is_over_what_is_decoded() {
    let model = Model::tiny().unwrap();
    let config = Config {
        layers: 1,
        ..model.decoder.config().clone()
    };
    let context = CacheContext {
        config: &config,
        ..context(&model)
    };
    let (m, group) = (config.head_dim, config.heads / config.kv_heads);
    let specs = QUANTISED.into_iter().chain([
        "llama-cpp:own=exact",
        "fp8:own=exact",
        "vllm-turboquant:dense-layers=0,own=exact",
        "turboquant:norm=eden",
        "kvarn",
    ]);
    for spec in specs {
        let spec: CacheSpec = spec.parse().unwrap();
        let mut cache = spec.build(&context).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for t in [150, 1, 1, 70, 1] {
            let before = cache.decoded(0).unwrap().unwrap();
            let [q, k, v] = draw(&mut rng, &config, t);
            let out = numbers(&cache.attend(0, &q, &k, &v).unwrap());
            let after = cache.decoded(0).unwrap().unwrap();
            let (q, k, v) = (numbers(&q), numbers(&k), numbers(&v));
            let held = before.keys.len() / m / config.kv_heads;
            // What a step's own positions are attended to as: as coded where nothing is dense, or as they are.
            let text = spec.to_string();
            let coded = match spec.method().name {
                "llama-cpp" | "fp8" => !text.contains("own=exact"),
                "vllm-turboquant" => {
                    t == 1 && !text.contains("own=exact") && !text.contains("window")
                }
                _ => false,
            };
            for head in 0..config.heads {
                let own = head / group;
                let row = |past: &[f32], new: &[f32], all: &[f32], at: usize| -> Vec<f64> {
                    let row = if at < held {
                        &past[(own * held + at) * m..][..m]
                    } else if coded {
                        &all[(own * (held + t) + at) * m..][..m]
                    } else {
                        &new[(own * t + at - held) * m..][..m]
                    };
                    row.iter().map(|&x| f64::from(x)).collect()
                };
                for query in [0, t - 1] {
                    let seen = held + query + 1;
                    let place = (head * t + query) * m;
                    let scores: Vec<f64> = (0..seen)
                        .map(|at| {
                            let key = row(&before.keys, &k, &after.keys, at);
                            let products = q[place..place + m].iter().zip(key);
                            products.map(|(&a, b)| f64::from(a) * b).sum::<f64>()
                                / (m as f64).sqrt()
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    let mut expected = vec![0.0; m];
                    for (at, score) in scores.iter().enumerate() {
                        let value = row(&before.values, &v, &after.values, at);
                        let weight = (score - max).exp() / sum;
                        expected
                            .iter_mut()
                            .zip(value)
                            .for_each(|(e, v)| *e += weight * v);
                    }
                    for (got, expected) in out[place..place + m].iter().zip(&expected) {
                        let off = (f64::from(*got) - expected).abs();
                        assert!(off < 2e-3, "{spec}, step of {t}: {got} for {expected}");
                    }
                }
            }
        }
    }
}

/// Rotations that the model was calibrated for are its own: a cache is smaller by them, and by nothing else where the text
/// was its prompt.
#[test]
fn a_calibrated_model_has_the_rotations() {
    let mut model = Model::tiny().unwrap();
    let tokens = text(&model, 200);
    let spec: CacheSpec = "oscar:window=16,sinks=4".parse().unwrap();
    let made = |model: &Model| {
        let mut cache = spec.build(&context(model)).unwrap();
        run(model, cache.as_mut(), 150, &tokens);
        let lengths = Lengths {
            prompt: 150,
            end: 200,
        };
        let expected = spec.expected_bytes(&context(model), lengths).unwrap();
        let held = cache.footprint().total() as f64;
        assert!(
            (expected / held - 1.0).abs() < TOLERANCE,
            "{expected}, {held}"
        );
        (cache.decoded(0).unwrap().unwrap(), held)
    };
    let (own, held) = made(&model);
    model.calibrate(&[]).unwrap();
    assert!(model.calibration.is_none());
    model.calibrate(&tokens[..150]).unwrap();
    let (calibrated, smaller) = made(&model);
    let config = model.decoder.config();
    let matrices = config.layers * 2 * (config.head_dim.pow(2) * 4 + 16);
    assert_eq!(held - smaller, matrices as f64);
    // The first layer is given the same numbers, and so has the same rotations; those of others differ by rounding.
    assert_eq!(own.keys, calibrated.keys);
    assert_eq!(own.values, calibrated.values);
}

/// A prompt that a cache reads beside another leaves it as one that it attends to.
#[test]
fn reading_a_prompt_is_attending_to_it() {
    let model = Model::tiny().unwrap();
    let context = context(&model);
    let config = model.decoder.config();
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    let names = METHODS.iter().map(|method| method.name);
    for spec in names.chain(QUANTISED) {
        let spec: CacheSpec = spec.parse().unwrap();
        let [mut attends, mut reads] = [0, 1].map(|_| spec.build(&context).unwrap());
        for layer in 0..config.layers {
            let [q, k, v] = draw(&mut rng, config, 150);
            attends.attend(layer, &q, &k, &v).unwrap();
            reads.read(layer, &q, &k, &v).unwrap();
        }
        assert_eq!((attends.len(), reads.len()), (150, 150), "{spec}");
        assert_eq!(attends.footprint(), reads.footprint(), "{spec}");
        for step in 0..3 {
            for layer in 0..config.layers {
                let [q, k, v] = draw(&mut rng, config, 1);
                let outputs = [&mut attends, &mut reads].map(|cache| {
                    let out = cache.attend(layer, &q, &k, &v).unwrap();
                    out.flatten_all().unwrap().to_vec1::<f32>().unwrap()
                });
                assert_eq!(outputs[0], outputs[1], "{spec}: step {step}, layer {layer}");
            }
        }
    }
}

/// Methods that say that prompts are exact give for a prompt what the full cache gives.
#[test]
fn prompts_are_exact_where_a_method_says_so() {
    let model = Model::tiny().unwrap();
    let context = context(&model);
    let config = model.decoder.config();
    let mut rng = ChaCha8Rng::seed_from_u64(18);
    let [q, k, v] = draw(&mut rng, config, 150);
    let attended = |spec: &CacheSpec| {
        let mut cache = spec.build(&context).unwrap();
        let out = cache.attend(0, &q, &k, &v).unwrap();
        out.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let full = attended(&"full".parse().unwrap());
    let names = METHODS.iter().map(|method| method.name);
    let exact = ["llama-cpp:own=exact", "fp8:own=exact"];
    for spec in names.chain(QUANTISED).chain(exact) {
        let spec: CacheSpec = spec.parse().unwrap();
        let own = attended(&spec);
        let worst = full.iter().zip(&own).map(|(a, b)| (a - b).abs());
        let worst = worst.fold(0.0, f32::max);
        assert_eq!(spec.exact_prompts(), worst < 1e-3, "{spec}: {worst}");
    }
}
