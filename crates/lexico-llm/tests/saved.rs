//! Caches that are saved and go on: exactly as if they had not stopped, or refused.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lexico::KeyValue;
use lexico::dictionary::{CodebookSizes, Codebooks, HeadMaps, JointBasis};
use lexico_llm::cache::{CacheState, KvCache};
use lexico_llm::generate::{Finish, GenerateOptions, Generated, generate};
use lexico_llm::sample::{Sampler, Sampling};
use lexico_llm::saved::{Progress, SavedGeneration, save};
use lexico_llm::{Error, Model, Quantize};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

const PROMPT: &str = "Question: Ana has 12 coins at home. Ben gives Ana 7 more. How many";

/// The embedded model with fewer and smaller codebooks than its own, so that tests are short. They are drawn, not learned: what
/// goes on exactly need not make sense.
fn additive_model() -> Model {
    let mut model = Model::tiny().unwrap();
    let mut set = (**model.dictionaries.as_ref().unwrap()).clone();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for layer in &mut set.layers {
        let m = layer.head_dim();
        let mut draw = || {
            let sizes = CodebookSizes { first: 300 };
            let numbers = (0..sizes.atoms(8) * m).map(|_| rng.random_range(-0.3f32..0.3));
            Codebooks::new(numbers.collect(), m, sizes).unwrap().into()
        };
        layer.codebooks = Some(KeyValue::new(draw(), draw()));
    }
    model.set_dictionaries(set).unwrap();
    model
}

/// The same with both heads of two layers each coded together.
fn joint_model() -> Model {
    let mut model = additive_model();
    let mut set = (**model.dictionaries.as_ref().unwrap()).clone();
    let (m, together) = (set.model.head_dim, 4);
    let width = together * m;
    let mut same = vec![0.0; m * m];
    same.iter_mut().step_by(m + 1).for_each(|x| *x = 1.0);
    let maps = HeadMaps::new(&vec![0.1; width], &same.repeat(together), m).unwrap();
    // Numbers of heads change places.
    let mut basis = vec![0.0; width * width];
    (0..width).for_each(|i| basis[i * width + (i * 17 + 5) % width] = 1.0);
    let basis = JointBasis::new(&basis, together, together, m).unwrap();
    let maps = Arc::new(maps.with_basis(basis).unwrap());
    set.layers.truncate(2);
    for layer in &mut set.layers {
        layer.sparse = None;
        layer.maps = Some(KeyValue::new(maps.clone(), maps.clone()));
    }
    set.training.losses = None;
    set.training.additive_losses = None;
    set.check_alike().unwrap();
    model.set_dictionaries(set).unwrap();
    model
}

fn sampling(temperature: f32) -> Sampling {
    Sampling {
        temperature,
        top_k: 0,
        repetition_penalty: 1.1,
        repetition_window: 20,
        seed: 5,
        ..Sampling::default()
    }
}

/// A generation under way.
struct Run {
    cache: Box<dyn KvCache>,
    sampler: Sampler,
    progress: Progress,
    text: String,
}

impl Run {
    fn begin(model: &Model, spec: &str, sampling: &Sampling) -> Self {
        let tokens = model.tokenizer.encode_first(PROMPT).unwrap();
        Self {
            cache: model.cache(&spec.parse().unwrap()).unwrap(),
            sampler: Sampler::new(sampling.clone()).unwrap(),
            progress: Progress {
                prompt_tokens: tokens.len(),
                tokens,
                finish: Finish::MaxTokens,
                messages: Vec::new(),
                seed: sampling.seed,
                draws: 0,
            },
            text: String::new(),
        }
    }

    fn go_on(&mut self, model: &Model, count: usize, goes_on: bool, stop: &[&str]) -> Generated {
        let Progress {
            tokens,
            prompt_tokens,
            ..
        } = &mut self.progress;
        let options = GenerateOptions {
            max_tokens: count,
            ignore_end: true,
            stop: stop.iter().map(|&text| text.to_owned()).collect(),
            written: tokens[*prompt_tokens..].to_vec(),
            goes_on,
            ..GenerateOptions::default()
        };
        let held = self.cache.len();
        self.sampler.rewind(held);
        let generated = generate(
            model,
            self.cache.as_mut(),
            &tokens[held..],
            &mut self.sampler,
            &options,
            &mut |_| ControlFlow::Continue(()),
        )
        .unwrap();
        tokens.extend(&generated.tokens);
        self.text += &generated.text;
        self.progress.finish = generated.finish;
        self.progress.draws = self.sampler.draws();
        generated
    }

    fn save(&self, model: &Model, spec: &str, path: &Path) -> usize {
        let cache = self.cache.as_ref();
        save(path, model, &spec.parse().unwrap(), cache, &self.progress).unwrap()
    }

    fn resume(model: &Model, path: &Path, sampling: &Sampling, text: &str) -> Self {
        let saved = SavedGeneration::open(path).unwrap();
        let (cache, progress) = saved.resume(model).unwrap();
        let mut sampler = Sampler::new(sampling.clone()).unwrap();
        sampler.see(&progress.tokens);
        sampler.set_draws(progress.draws);
        Self {
            cache,
            sampler,
            progress,
            text: text.to_owned(),
        }
    }

    fn state(&self) -> CacheState {
        self.cache.state().unwrap()
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("saved.cache")
    }
}

/// Wherever it stops (before the window is full, at its end, while a batch leaves, while atoms are added), the tokens that
/// follow, the text and every byte of the cache are those of a run that did not stop.
#[test]
fn a_saved_cache_goes_on_exactly() {
    const COUNT: usize = 30;
    /// How far a resumed run goes on: until the batch that is leaving has left.
    const AFTER: usize = 6;
    let (alone, joint) = (additive_model(), joint_model());
    let folder = Folder::new();
    for (spec, temperature, cuts) in [
        (
            "lexico:window=5,batch=4,sparsity=3,beam=2,sinks=2",
            0.0,
            6..24,
        ),
        ("lexico:window=24,batch=8,format=i8", 0.0, 8..20),
        ("lexico:window=6,batch=5,sparsity=5,beam=2", 1.0, 1..12),
        (
            "lexico:window=3,batch=6,key-sparsity=8,value-sparsity=1,beam=2",
            0.0,
            20..COUNT,
        ),
        ("lexico:window=0,batch=1,sparsity=4,format=f8", 0.7, 26..30),
        (
            "lexico:window=9,batch=7,sparsity=4,format=f32,dense=f32",
            0.0,
            18..30,
        ),
        (
            "lexico:window=4,batch=6,sparsity=6,tolerance=0.25,format=i8",
            0.7,
            16..30,
        ),
    ] {
        let model = match spec.contains("sinks") {
            true => &joint,
            false => &alone,
        };
        let sampling = sampling(temperature);
        let mut whole = Run::begin(model, spec, &sampling);
        whole.go_on(model, COUNT, false, &[]);
        let mut first = Run::begin(model, spec, &sampling);
        first.go_on(model, cuts.start, true, &[]);
        for cut in cuts {
            first.save(model, spec, &folder.file());
            let mut second = Run::resume(model, &folder.file(), &sampling, &first.text);
            assert_eq!(second.progress, first.progress, "{spec}, {cut}");
            assert_eq!(second.state(), first.state(), "{spec}, {cut}");
            let count = AFTER.min(COUNT - cut);
            second.go_on(model, count, false, &[]);
            let (tokens, all) = (&second.progress.tokens, &whole.progress.tokens);
            assert_eq!(tokens[..], all[..tokens.len()], "{spec}, {cut}");
            if tokens.len() == all.len() {
                assert_eq!(second.text, whole.text, "{spec}, {cut}");
                assert_eq!(second.state(), whole.state(), "{spec}, {cut}");
            }
            first.go_on(model, 1, true, &[]);
        }
        let held = whole.state();
        let codes = held.blocks.iter().any(|(name, _)| name.ends_with("codes"));
        assert!(codes, "{spec}");
    }
}

/// A stop text, and a character of several tokens, may begin before a cut and end after it.
#[test]
fn what_has_begun_is_ended_after_a_cut() {
    const COUNT: usize = 40;
    let model = Model::tiny().unwrap();
    let folder = Folder::new();
    let spec = "lexico:window=16";
    let sampling = sampling(0.0);
    let mut free = Run::begin(&model, spec, &sampling);
    free.go_on(&model, COUNT, false, &[]);
    // Each ten characters of the text are a stop text once.
    let starts = free.text.char_indices().map(|(at, _)| at).step_by(7);
    for start in starts.take(4) {
        let stop: String = free.text[start..].chars().take(10).collect();
        let mut whole = Run::begin(&model, spec, &sampling);
        let count = whole.go_on(&model, COUNT, false, &[&stop]).tokens.len();
        assert_eq!(whole.progress.finish, Finish::Stop);
        for cut in 1..count {
            let mut first = Run::begin(&model, spec, &sampling);
            first.go_on(&model, cut, true, &[&stop]);
            first.save(&model, spec, &folder.file());
            let mut second = Run::resume(&model, &folder.file(), &sampling, &first.text);
            second.go_on(&model, COUNT - cut, false, &[&stop]);
            assert_eq!(
                second.progress.tokens, whole.progress.tokens,
                "{stop:?}, {cut}"
            );
            assert_eq!(second.text, whole.text, "{stop:?}, {cut}");
            assert_eq!(second.progress.finish, Finish::Stop);
        }
    }
}

/// A small saved cache with every kind of block.
const SPARSE: &str = "lexico:window=3,batch=4,sparsity=3,tolerance=0.3,format=i8";
const ADDITIVE: &str = "lexico:window=3,batch=4,sparsity=3,format=additive,beam=2";

fn small(model: &Model, folder: &Folder, spec: &str) -> Vec<u8> {
    let mut run = Run::begin(model, spec, &sampling(0.0));
    run.go_on(model, 6, true, &[]);
    run.save(model, spec, &folder.file());
    std::fs::read(folder.file()).unwrap()
}

/// What comes of a file of these bytes: its state where it is whole, else a message.
fn outcome(model: &Model, folder: &Folder, bytes: &[u8]) -> Result<CacheState, String> {
    let path = folder.0.path().join("changed.cache");
    std::fs::write(&path, bytes).unwrap();
    let resumed = SavedGeneration::open(&path).and_then(|saved| saved.resume(model));
    let (cache, _) = resumed.map_err(|error| error.to_string())?;
    Ok(cache.state().unwrap())
}

/// Where the blocks of a file begin and end.
fn blocks(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let (header, mut at) = header(bytes);
    let lengths = header["blocks"].as_array().unwrap().iter();
    lengths
        .map(|block| {
            let start = at;
            at += block["bytes"].as_u64().unwrap() as usize;
            start..at
        })
        .collect()
}

/// The header, and where it ends.
fn header(bytes: &[u8]) -> (Value, usize) {
    let start = "lexico-cache/1\n".len();
    let length = u32::from_le_bytes(bytes[start..start + 4].try_into().unwrap()) as usize;
    let end = start + 4 + length;
    (
        serde_json::from_slice(&bytes[start + 4..end]).unwrap(),
        end + 4,
    )
}

/// The file with another header, its checksums as they should be.
fn with_header(bytes: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let (mut header, end) = header(bytes);
    change(&mut header);
    let json = serde_json::to_vec(&header).unwrap();
    let mut start = (json.len() as u32).to_le_bytes().to_vec();
    start.extend(json);
    let checksum = crc32fast::hash(&start);
    start.extend(checksum.to_le_bytes());
    [b"lexico-cache/1\n".as_slice(), &start, &bytes[end..]].concat()
}

#[test]
fn a_thousand_corruptions_are_each_found() {
    for spec in [SPARSE, ADDITIVE] {
        corruptions_are_found(spec);
    }
}

fn corruptions_are_found(spec: &str) {
    let model = additive_model();
    let folder = Folder::new();
    let bytes = small(&model, &folder, spec);
    assert!(outcome(&model, &folder, &bytes).is_ok());
    let blocks = blocks(&bytes);
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut found = 0;
    while found < 1000 {
        let mut changed = bytes.clone();
        let at = rng.random_range(0..bytes.len());
        let count = rng.random_range(1..40usize).min(bytes.len() - at);
        let kind = found % 6;
        match kind {
            0 => changed[at] ^= 1 << rng.random_range(0..8),
            1 => changed.truncate(at),
            2 => drop(changed.drain(at..at + count)),
            3 => {
                let more: Vec<u8> = (0..count).map(|_| rng.random()).collect();
                changed.splice(at..at, more);
            }
            4 => changed[at..at + count].fill_with(|| rng.random()),
            _ => {
                let (a, b) = (
                    rng.random_range(0..blocks.len()),
                    rng.random_range(0..blocks.len()),
                );
                let (a, b) = (blocks[a.min(b)].clone(), blocks[a.max(b)].clone());
                changed = [
                    &bytes[..a.start],
                    &bytes[b.clone()],
                    &bytes[a.end.min(b.start)..b.start],
                    &bytes[a],
                    &bytes[b.end..],
                ]
                .concat();
            }
        }
        if changed == bytes {
            continue;
        }
        let outcome = outcome(&model, &folder, &changed);
        assert!(
            outcome.is_err(),
            "change {found} of kind {kind} at {at}, {count} bytes"
        );
        found += 1;
    }
    for more in [&b"\0"[..], b"lexico-cache/1\n", &bytes] {
        let longer = [bytes.as_slice(), more].concat();
        assert!(
            outcome(&model, &folder, &longer)
                .unwrap_err()
                .contains("after its last block")
        );
    }
}

/// A file whose checksums are right can lie all the same.
#[test]
fn headers_that_lie_are_refused() {
    let model = Model::tiny().unwrap();
    let folder = Folder::new();
    let bytes = small(&model, &folder, SPARSE);
    assert!(outcome(&model, &folder, &with_header(&bytes, |_| ())).is_ok());
    let lies: &[(&str, &str, fn(&mut Value))] = &[
        ("fingerprint", "another model", |h| {
            h["fingerprint"] = "00000000".into()
        }),
        ("positions", "tokens", |h| h["positions"] = 7.into()),
        ("positions of the cache", "positions", |h| {
            h["facts"]["positions"] = 7.into()
        }),
        ("negative", "understood", |h| {
            h["facts"]["positions"] = (-7).into()
        }),
        ("dictionaries", "--dictionary", |h| {
            h["facts"]["dictionaries"] = "0".into()
        }),
        ("age", "window", |h| {
            h["facts"]["leaving"][1] = 1_000_000.into()
        }),
        ("ages", "window", |h| {
            h["facts"]["leaving"] = Value::Array(Vec::new())
        }),
        ("settings", "batch (5 in the file, 4 here)", |h| {
            h["facts"]["settings"]["batch"] = 5.into()
        }),
        ("a setting more", "other settings", |h| {
            h["facts"]["settings"]["more"] = 5.into()
        }),
        ("another method", "cannot be resumed", |h| {
            h["cache"] = "full".into()
        }),
        ("no method", "cannot be made", |h| {
            h["cache"] = "none".into()
        }),
        ("no facts", "understood", |h| h["facts"] = Value::Null),
        ("a block less", "after its last", |h| {
            drop(h["blocks"].as_array_mut().unwrap().pop())
        }),
        ("no blocks", "after its last", |h| {
            h["blocks"] = Value::Array(Vec::new())
        }),
        ("huge block", "ends before", |h| {
            h["blocks"][1]["bytes"] = u64::MAX.into()
        }),
        ("a name", "contradicts itself", |h| {
            h["blocks"][1]["name"] = "layers.9.keys.codes".into()
        }),
        ("another name", "contradicts itself", |h| {
            h["blocks"][1]["name"] = "layers.0.keys.more".into()
        }),
        ("more of the past", "understood", |h| h["more"] = 1.into()),
    ];
    for (name, words, lie) in lies {
        let refused = outcome(&model, &folder, &with_header(&bytes, lie)).unwrap_err();
        assert!(refused.contains(words), "{name}: {refused}");
    }
    // Blocks under other names.
    let (header, _) = header(&bytes);
    let count = header["blocks"].as_array().unwrap().len();
    for a in 0..count {
        for b in 0..a {
            let swapped = with_header(&bytes, |h| {
                let names = h["blocks"].as_array_mut().unwrap();
                let name = names[a]["name"].take();
                names[a]["name"] = names[b]["name"].clone();
                names[b]["name"] = name;
            });
            // Keys for values, say: what cannot be told apart is at least sound.
            let _ = outcome(&model, &folder, &swapped);
        }
    }
}

#[test]
fn other_models_dictionaries_settings_and_versions_are_refused() {
    let model = Model::tiny().unwrap();
    let folder = Folder::new();
    let bytes = small(&model, &folder, SPARSE);

    let quantised = Model::tiny_on(Quantize::Q8_0, &lexico_llm::Device::Cpu).unwrap();
    let refused = outcome(&quantised, &folder, &bytes).unwrap_err();
    assert!(
        refused.contains("another model") && refused.contains("quantised"),
        "{refused}"
    );

    let changed = |change: fn(&mut lexico::DictionarySet)| {
        let mut other = Model::tiny().unwrap();
        let mut set = (**other.dictionaries.as_ref().unwrap()).clone();
        change(&mut set);
        other.set_dictionaries(set).unwrap();
        outcome(&other, &folder, &bytes).unwrap_err()
    };
    let refused = changed(|set| {
        let own = set.layers[1].sparse.as_mut().unwrap();
        std::mem::swap(&mut own.keys, &mut own.values);
    });
    assert!(
        refused.contains("other dictionaries") && refused.contains("--dictionary"),
        "{refused}"
    );

    // Other codebooks are no matter to sparse codes, and all to additive ones.
    let additive = small(&additive_model(), &folder, ADDITIVE);
    assert!(outcome(&additive_model(), &folder, &bytes).is_ok());
    let mut without = Model::tiny().unwrap();
    let mut set = (**without.dictionaries.as_ref().unwrap()).clone();
    set.layers
        .iter_mut()
        .for_each(|layer| layer.codebooks = None);
    without.set_dictionaries(set).unwrap();
    let refused = outcome(&without, &folder, &additive).unwrap_err();
    assert!(refused.contains("no codebooks"), "{refused}");
    let mut other = additive_model();
    let mut set = (**other.dictionaries.as_ref().unwrap()).clone();
    let codebooks = set.layers[2].codebooks.as_mut().unwrap();
    std::mem::swap(&mut codebooks.keys, &mut codebooks.values);
    other.set_dictionaries(set).unwrap();
    let refused = outcome(&other, &folder, &additive).unwrap_err();
    assert!(refused.contains("other dictionaries"), "{refused}");

    let again = String::from_utf8_lossy(&bytes[..15]).replace("/1", "/2");
    let refused = outcome(&model, &folder, &[again.as_bytes(), &bytes[15..]].concat()).unwrap_err();
    assert!(refused.contains("version \"2\""), "{refused}");
    for other in [
        &b""[..],
        b"lexico",
        b"\x89PNG and so on",
        b"lexico-codes/1\n",
    ] {
        let refused = outcome(&model, &folder, other).unwrap_err();
        assert!(refused.contains("no saved cache"), "{refused}");
    }
    assert!(matches!(
        SavedGeneration::open(folder.0.path()),
        Err(Error::File { .. })
    ));

    for spec in lexico_llm::cache::METHODS {
        if spec.name == "lexico" {
            continue;
        }
        let mut run = Run::begin(&model, spec.name, &sampling(0.0));
        run.go_on(&model, 2, true, &[]);
        let cache = run.cache.as_ref();
        let refused = save(
            &folder.file(),
            &model,
            &spec.name.parse().unwrap(),
            cache,
            &run.progress,
        );
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(&format!("{:?}", spec.name)), "{refused}");
    }
}

/// Saved caches of version 0.1, all of [`PROMPT`] and three tokens more.
#[test]
fn caches_that_version_0_1_saved_go_on() {
    let model = Model::tiny().unwrap();
    let folder = Folder::new();
    let fixture = |name: &str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/saved");
        folder.join(format!("{name}.cache"))
    };
    for name in ["packed", "packed-beam", "i8", "f8-tolerance", "f32"] {
        // Processors differ in the last bits of what the model says, and so in its fingerprint.
        let bytes = with_header(&std::fs::read(fixture(name)).unwrap(), |header| {
            header["fingerprint"] = model.fingerprint().unwrap().into();
        });
        std::fs::write(folder.file(), &bytes).unwrap();
        let mut run = Run::resume(&model, &folder.file(), &sampling(0.0), "");
        // Written again the blocks are the same; the first holds the tokens.
        let state = run.state();
        let saved = blocks(&bytes).into_iter().skip(1);
        let saved: Vec<&[u8]> = saved.map(|block| &bytes[block]).collect();
        let held: Vec<&[u8]> = state.blocks.iter().map(|block| &block.1[..]).collect();
        assert_eq!(held, saved, "{name}");
        run.go_on(&model, 12, false, &[]);
        let text = " have now?\nAnswer: Ana starts with 12";
        assert_eq!(run.text, text, "{name}");
    }
    let refused = SavedGeneration::open(&fixture("adaptive")).map(drop);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("adaptive"), "{refused}");
}
