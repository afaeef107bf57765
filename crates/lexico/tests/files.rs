//! Dictionary and code files: they come back as they were, and every way a file can lie is an error.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use common::{drawn_vectors, random_dictionary};
use lexico::attention::NumberType;
use lexico::cache::{CacheOptions, Coding};
use lexico::codes::CodeFile;
use lexico::dictionary::{
    CodingLosses, FORMATS, LayerDictionaries, LayerErrors, LayerLosses, LayerSparsities,
    ModelIdentity, RotaryIdentity, Training,
};
use lexico::tensor_file::{self, Dtype, NewTensor, TensorFile};
use lexico::{
    Codes, CoefficientFormat, Dictionary, DictionarySet, Encoder, Error, Fit, KeyValue,
    LayerSettings, Pursuit, SparseFormat,
};
use proptest::prelude::*;

fn identity(layers: usize, head_dim: usize) -> ModelIdentity {
    ModelIdentity {
        name: "drawn".to_owned(),
        architecture: "LlamaForCausalLM".to_owned(),
        layers,
        kv_heads: 2,
        head_dim,
        rotary: RotaryIdentity {
            kind: "default".to_owned(),
            theta: 10_000.0,
            parameters: Default::default(),
        },
    }
}

fn drawn_set(layers: usize, atoms: usize, m: usize) -> DictionarySet {
    let layer = |l: usize| LayerDictionaries {
        sparse: Some(KeyValue::new(
            random_dictionary(2 * l as u64, atoms, m).into(),
            random_dictionary(2 * l as u64 + 1, atoms, m).into(),
        )),
        ..LayerDictionaries::default()
    };
    DictionarySet {
        layers: (0..layers).map(layer).collect(),
        model: identity(layers, m),
        training: Training {
            sparsity: 3,
            corpus: vec!["a text".to_owned()],
            tokens: 1000,
            relative_error: vec![
                LayerErrors {
                    keys: 0.25,
                    values: 0.125
                };
                layers
            ],
            tool: "a test".to_owned(),
            ..Training::default()
        },
    }
}

fn metadata() -> HashMap<String, String> {
    HashMap::from([("format".to_owned(), FORMATS[0].to_owned())])
}

/// A file with this one tensor and the dictionary format.
fn one_tensor(folder: &Path, tensor: NewTensor) -> PathBuf {
    let path = folder.join("one.safetensors");
    tensor_file::write(&path, &[tensor], metadata()).unwrap();
    path
}

#[test]
fn a_dictionary_set_comes_back_as_it_was_up_to_f16() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.safetensors");
    let set = drawn_set(3, 40, 8);
    set.save(&path).unwrap();
    let back = DictionarySet::load(&path).unwrap();
    assert_eq!((&back.model, &back.training), (&set.model, &set.training));
    for (a, b) in set.layers.iter().zip(&back.layers) {
        let (a, b) = (a.sparse.clone().unwrap(), b.sparse.clone().unwrap());
        for (a, b) in a.zip(b) {
            let (a, b) = (a.atoms(), b.atoms());
            let differences = a.iter().zip(&*b).map(|(x, y)| (x - y).abs());
            assert!(differences.fold(0.0, f32::max) <= 1.0 / 2048.0);
        }
    }
    // What was rounded once is not rounded again.
    back.save(&path).unwrap();
    assert_eq!(DictionarySet::load(&path).unwrap(), back);
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        1,
        "no temporary file is left"
    );
}

#[test]
fn one_dictionary_needs_only_the_format_and_its_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let dictionary = random_dictionary(4, 10, 6);
    let path = one_tensor(
        folder.path(),
        NewTensor::f32("layers.0.keys", &[10, 6], &dictionary.atoms()),
    );
    assert_eq!(
        Dictionary::load(&path, "layers.0.keys").unwrap(),
        dictionary
    );
}

#[test]
fn a_set_for_another_model_says_what_differs() {
    let set = drawn_set(2, 10, 6);
    set.check_fits(&identity(2, 6)).unwrap();
    let changes: [(&str, fn(&mut ModelIdentity)); 5] = [
        ("architecture", |m| {
            m.architecture = "QwenForCausalLM".to_owned()
        }),
        ("layers", |m| m.layers = 3),
        ("KV heads", |m| m.kv_heads = 8),
        ("head dim", |m| m.head_dim = 8),
        ("rotary", |m| m.rotary.theta = 5e5),
    ];
    for (word, change) in changes {
        let mut other = identity(2, 6);
        change(&mut other);
        let message = set.check_fits(&other).unwrap_err().to_string();
        assert!(message.contains(word), "{message:?} does not name {word:?}");
    }
}

#[test]
fn layers_that_differ_are_told() {
    let good = drawn_set(2, 16, 8);
    assert!(good.check_alike().is_ok());
    let refused = |change: &dyn Fn(&mut DictionarySet), words: &str| {
        let mut set = good.clone();
        change(&mut set);
        let refused = set.check_alike().unwrap_err().to_string();
        assert!(refused.contains(words), "{refused}");
    };
    refused(&|set| set.model.layers = 3, "2 layers for a model of 3");
    refused(
        &|set| set.model.head_dim = 16,
        "layer 0: vectors of length 8",
    );
    refused(
        &|set| set.layers[1].sparse = None,
        "layer 1: it has other parts",
    );
    let without = |set: &mut DictionarySet| {
        let layers = set.layers.iter_mut();
        layers.for_each(|layer| layer.sparse = None);
    };
    refused(&without, "layer 0: it has neither");
    let other = |set: &mut DictionarySet| {
        let both = || random_dictionary(9, 16, 4).into();
        set.layers[1].sparse = Some(KeyValue::new(both(), both()));
    };
    refused(&other, "layer 1: vectors of length 4");
}

#[test]
fn options_of_a_cache_are_known_values_that_do_not_contradict_each_other() {
    let set = drawn_set(2, 16, 8);
    let layers = |given: &str| {
        let mut options = CacheOptions::default();
        for (name, value) in given.split(',').filter_map(|pair| pair.split_once('=')) {
            options.set(name, value)?;
        }
        options.layers(&set)
    };
    let usual = layers("").unwrap();
    assert_eq!(
        usual[0],
        LayerSettings {
            coding: Coding::Sparse {
                coefficients: CoefficientFormat::I8,
                tolerance: 0.0
            },
            ..LayerSettings::new(LayerSparsities::same(2, 3, 3))
        }
    );
    // Each layer codes at its own steps.
    assert_ne!(usual[0].delay, usual[1].delay);
    let all = "sparsity=4,value-sparsity=2,allocation=same,tolerance=0.5,fit=least-squares,sinks=1,window=9,batch=8,format=f32,dense=f32";
    let own = layers(all).unwrap();
    assert_eq!(
        own[1],
        LayerSettings {
            coding: Coding::Sparse {
                coefficients: CoefficientFormat::F32,
                tolerance: 0.5
            },
            fit: Fit::LeastSquares,
            sinks: 1,
            recent_window: 9,
            batch: 8,
            delay: 4,
            number_type: NumberType::F32,
            ..LayerSettings::new(LayerSparsities::same(2, 4, 2))
        }
    );
    // What is left out is what it is by default, however it is told.
    assert_eq!(layers("window=128,sinks=4,batch=16").unwrap(), usual);
    let long = format!("window={}", "\u{1b}[2J".repeat(10_000));
    let refused = layers(&long).unwrap_err().to_string();
    assert!(
        refused.len() < 1000 && !refused.contains('\u{1b}'),
        "{refused}"
    );
    for (given, words) in [
        (
            "width=3",
            "option=width: there is no such option; there are: sparsity, key-sparsity",
        ),
        ("sparsity=many", "sparsity=many: "),
        ("window=-1", "it must be a whole number"),
        ("window=", "window=: "),
        (
            "fit=loose",
            "fit=loose: it must be one of unbiased, least-squares",
        ),
        ("format=f16", "additive, i8, f8, f32"),
        ("format=additive", "no codebooks"),
        ("beam=4", "only the search for additive codes"),
        ("sparsity=9", "it must be from 1 to 8"),
        ("sparsity=NaN", "it must be from 1 to 8"),
        ("sparsity=2.5", "whole numbers"),
        ("sparsity=3,key-sparsity=2,value-sparsity=2", "says nothing"),
        ("allocation=measured", "lexico measure"),
        ("allocation=measured,key-sparsity=2", "give sparsity alone"),
    ] {
        let refused = layers(given).unwrap_err().to_string();
        assert!(refused.contains(words), "{given}: {refused}");
    }
}

#[test]
fn atoms_that_cannot_be_are_refused_by_number() {
    let folder = tempfile::tempdir().unwrap();
    let with = |place: usize, value: f32| {
        let mut atoms = random_dictionary(4, 10, 6).atoms().to_vec();
        atoms[place] = value;
        atoms
    };
    let mut zero = with(12, 0.0);
    zero[12..18].fill(0.0);
    for (atoms, words) in [
        (with(3 * 6 + 1, f32::NAN), ["atom 3", "NaN"]),
        (with(5 * 6, f32::INFINITY), ["atom 5", "NaN or an infinity"]),
        (zero, ["atom 2", "all zeros"]),
        (with(9 * 6 + 5, 40.0), ["atom 9", "unit length"]),
    ] {
        let path = one_tensor(folder.path(), NewTensor::f32("d", &[10, 6], &atoms));
        let message = Dictionary::load(&path, "d").unwrap_err().to_string();
        for word in words.iter().chain(&["one.safetensors", "\"d\""]) {
            assert!(message.contains(word), "{message:?} does not name {word:?}");
        }
    }
}

#[test]
fn wrong_shapes_types_and_names_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dictionary = random_dictionary(4, 10, 6);
    let load = |tensor: NewTensor| Dictionary::load(one_tensor(folder.path(), tensor), "d");
    let refused = [
        load(NewTensor::f32("d", &[60], &dictionary.atoms())),
        load(NewTensor::f32("d", &[1, 10, 6], &dictionary.atoms())),
        load(NewTensor::f32("d", &[0, 6], &[])),
        load(NewTensor::f32("d", &[6, 0], &[])),
        load(NewTensor::new("d", Dtype::I32, &[10, 6], vec![0; 240])),
        load(NewTensor::f32("d", &[70_000, 1], &vec![1.0; 70_000])),
    ];
    assert!(
        refused
            .iter()
            .all(|r| matches!(r, Err(Error::Tensor { .. }))),
        "{refused:?}"
    );
    let other = load(NewTensor::f32("e", &[10, 6], &dictionary.atoms()));
    assert!(
        matches!(&other, Err(Error::MissingTensor { present, .. }) if present == "e"),
        "{other:?}"
    );
}

#[test]
fn a_set_whose_metadata_lies_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.safetensors");
    let good = drawn_set(2, 10, 6);
    let mut wrong_head_dim = good.clone();
    wrong_head_dim.model.head_dim = 7;
    wrong_head_dim.save(&path).unwrap();
    assert!(matches!(
        DictionarySet::load(&path),
        Err(Error::Tensor { .. })
    ));
    for layers in [0, 1, 3, usize::MAX] {
        let mut set = good.clone();
        set.model.layers = layers;
        set.save(&path).unwrap();
        let result = DictionarySet::load(&path);
        assert!(
            matches!(result, Err(Error::Metadata { key: "model", .. })),
            "{layers}: {result:?}"
        );
    }
    let layer = LayerLosses {
        keys: vec![vec![0.1, 0.0]; good.model.kv_heads],
        values: vec![vec![0.1, 0.0]; good.model.kv_heads],
    };
    for layers in [1, 2, 3] {
        let mut set = good.clone();
        set.training.losses = Some(CodingLosses {
            sparsities: vec![1, 4],
            layers: vec![layer.clone(); layers],
        });
        set.save(&path).unwrap();
        match DictionarySet::load(&path) {
            Ok(back) => assert!(layers == 2 && back.training == set.training),
            Err(Error::Metadata {
                key: "training", ..
            }) => assert_ne!(layers, 2),
            Err(other) => panic!("{other}"),
        }
    }
    tensor_file::write(&path, &[], metadata()).unwrap();
    assert!(matches!(
        DictionarySet::load(&path),
        Err(Error::Metadata { .. })
    ));
    tensor_file::write(&path, &[], HashMap::new()).unwrap();
    let unmarked = DictionarySet::load(&path);
    assert!(
        matches!(unmarked, Err(Error::Format { .. })),
        "{unmarked:?}"
    );
}

#[test]
fn files_that_are_no_safetensors_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.safetensors");
    drawn_set(1, 10, 6).save(&path).unwrap();
    let good = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let lying_header = |json: &str| {
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(json.as_bytes());
        file.extend([0u8; 16]);
        file
    };
    let mut cases = vec![
        Vec::new(),
        b"short".to_vec(),
        b"PK\x03\x04 this is a zip archive, not a dictionary".to_vec(),
        u64::MAX.to_le_bytes().to_vec(),
        [good.clone(), vec![0]].concat(),
        good[..header].to_vec(),
        lying_header("not json"),
        lying_header(r#"{"d":{"dtype":"F32","shape":[4],"data_offsets":[0,999]}}"#),
        lying_header(r#"{"d":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#),
        lying_header(r#"{"d":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}"#),
        lying_header(
            r#"{"d":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}"#,
        ),
        lying_header(r#"{"d":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}"#),
        lying_header(r#"{"d":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#),
    ];
    // Cut anywhere.
    cases.extend((0..good.len()).step_by(97).map(|at| good[..at].to_vec()));
    for (number, bytes) in cases.into_iter().enumerate() {
        std::fs::write(&path, bytes).unwrap();
        let error = DictionarySet::load(&path);
        assert!(
            matches!(error, Err(Error::NotSafetensors { .. })),
            "case {number}: {error:?}"
        );
        let message = error.unwrap_err().to_string();
        assert!(message.contains("bad.safetensors"), "{message}");
    }
    assert!(matches!(
        DictionarySet::load(folder.path()),
        Err(Error::NotSafetensors { .. } | Error::Io { .. })
    ));
    assert!(matches!(
        DictionarySet::load(folder.path().join("none")),
        Err(Error::Io { .. })
    ));
}

#[test]
fn a_file_cut_short_while_open_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.safetensors");
    drawn_set(1, 10, 6).save(&path).unwrap();
    let file = TensorFile::open(&path).unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(40)
        .unwrap();
    assert!(matches!(DictionarySet::read(&file), Err(Error::Io { .. })));
}

#[test]
fn what_cannot_be_written_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let set = drawn_set(1, 10, 6);
    assert!(matches!(
        set.save(folder.path().join("no/such/folder/x")),
        Err(Error::Io { .. })
    ));
    assert!(matches!(set.save(folder.path()), Err(Error::Io { .. })));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Devices are not replaced, links are written through.
#[cfg(unix)]
#[test]
fn only_regular_files_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let set = drawn_set(1, 10, 6);
    let pipe = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&pipe).unwrap();
    assert!(matches!(set.save(&pipe), Err(Error::Io { .. })));
    assert!(matches!(
        tensor_file::check_writable(&pipe),
        Err(Error::Io { .. })
    ));
    let (real, link) = (folder.path().join("real"), folder.path().join("link"));
    std::fs::write(&real, "old").unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    set.save(&link).unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    DictionarySet::load(&real).unwrap();
    assert!(matches!(
        DictionarySet::load("/dev/zero"),
        Err(Error::NotSafetensors { .. })
    ));
}

#[test]
fn huge_and_zero_vectors_have_a_relative_error() {
    let huge = [3e38f32; 4];
    assert_eq!(lexico::mean_relative_error(&huge, &[0.0; 4], 4), 1.0);
    assert_eq!(
        lexico::mean_relative_error(&huge, &huge.map(|x| -x), 4),
        2.0
    );
    assert_eq!(lexico::mean_relative_error(&[0.0; 4], &[1.0; 4], 4), 0.0);
    assert_eq!(lexico::mean_relative_error(&[], &[], 4), 0.0);
    let unit = Dictionary::normalised(huge.to_vec(), 4).unwrap();
    assert_eq!(*unit.atoms(), [0.5; 4]);
}

fn drawn_codes(dictionary: &Dictionary, n: usize, format: SparseFormat, tolerance: f32) -> Codes {
    let vectors = drawn_vectors(9, n, dictionary.head_dim());
    let pursuit = Pursuit::new(dictionary, format.sparsity)
        .unwrap()
        .with_tolerance(tolerance)
        .unwrap();
    let mut codes = Codes::new(format).unwrap();
    codes.extend(&pursuit.encode(&vectors).unwrap());
    codes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn codes_come_back_bit_for_bit(n in 0usize..50, s in 1usize..7, variable: bool, kind in 0usize..3) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("codes.safetensors");
        let dictionary = random_dictionary(3, 20, 6);
        let format = SparseFormat {
            sparsity: s.min(6),
            variable,
            coefficients: [CoefficientFormat::I8, CoefficientFormat::F8, CoefficientFormat::F32][kind],
        };
        let codes = drawn_codes(&dictionary, n, format, if variable { 0.4 } else { 0.0 });
        let nonzeros = codes.bytes_used();
        CodeFile::new(codes.clone(), "layers.0.keys", &dictionary).save(&path).unwrap();
        let back = CodeFile::load(&path).unwrap();
        prop_assert_eq!(back.codes.format(), format.into());
        prop_assert_eq!(back.codes.len(), n);
        prop_assert_eq!(back.codes.bytes_used(), nonzeros);
        prop_assert_eq!(back.decode(&dictionary).unwrap(), codes.decode(&dictionary).unwrap());
    }
}

#[test]
fn sizes_are_what_the_format_says() {
    let dictionary = random_dictionary(3, 20, 6);
    for (variable, coefficients, bytes) in [
        (false, CoefficientFormat::I8, 10 * (3 * 4 + 1)),
        (false, CoefficientFormat::F8, 10 * (3 * 4 + 1)),
        (false, CoefficientFormat::F32, 10 * 6 * 4),
        (true, CoefficientFormat::F8, 10 * (3 * 4 + 2)),
    ] {
        let format = SparseFormat {
            sparsity: 4,
            variable,
            coefficients,
        };
        assert_eq!(
            drawn_codes(&dictionary, 10, format, 0.0).bytes_used(),
            bytes
        );
    }
    let format = SparseFormat {
        sparsity: 256,
        variable: true,
        coefficients: CoefficientFormat::F8,
    };
    assert!(matches!(
        Codes::new(format),
        Err(Error::VariableSparsity(256))
    ));
}

#[test]
fn code_files_that_lie_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codes.safetensors");
    let dictionary = random_dictionary(3, 20, 6);
    let format = SparseFormat {
        sparsity: 2,
        variable: true,
        coefficients: CoefficientFormat::F8,
    };
    CodeFile::new(drawn_codes(&dictionary, 3, format, 0.4), "d", &dictionary)
        .save(&path)
        .unwrap();
    let good = TensorFile::open(&path).unwrap();
    let tensors: Vec<NewTensor> = good
        .names()
        .iter()
        .map(|name| {
            let (dtype, shape) = good.info(name).unwrap();
            NewTensor::new(name, dtype, shape, good.bytes(name).unwrap())
        })
        .collect();
    let with = |name: &str, change: fn(&mut NewTensor)| {
        let mut tensors = tensors.clone();
        change(tensors.iter_mut().find(|t| t.name == name).unwrap());
        tensor_file::write(&path, &tensors, good.metadata()).unwrap();
        CodeFile::load(&path)
    };
    let refused = [
        with("lengths", |t| t.bytes[1] = 3),
        with("coefficients", |t| t.bytes[0] = 0x7f),
        with("scales", |t| t.bytes[0] = 0xff),
        with("indices", |t| {
            t.shape = vec![12];
            t.dtype = Dtype::U8;
        }),
        with("indices", |t| t.dtype = Dtype::I16),
        with("indices", |t| {
            t.shape = vec![0, 1 << 62];
            t.bytes.clear();
        }),
        with("indices", |t| {
            t.shape = vec![0, 0];
            t.bytes.clear();
        }),
        with("lengths", |t| {
            t.shape = vec![2];
            t.bytes.pop();
        }),
        with("scales", |t| {
            t.shape = vec![1];
            t.bytes.truncate(1);
        }),
    ];
    for (number, result) in refused.iter().enumerate() {
        assert!(
            matches!(result, Err(Error::Tensor { .. })),
            "case {number}: {result:?}"
        );
    }
    let outside = with("indices", |t| t.bytes[0] = 200).unwrap();
    assert!(matches!(
        outside.decode(&dictionary),
        Err(Error::Dictionary(_))
    ));
    let other = random_dictionary(4, 20, 6);
    let sound = with("indices", |_| ()).unwrap();
    assert!(matches!(
        sound.decode(&other),
        Err(Error::OtherDictionary(_))
    ));
    for key in ["tensor", "dictionary_crc32", "head_dim"] {
        let mut metadata = good.metadata();
        metadata.remove(key);
        tensor_file::write(&path, &tensors, metadata).unwrap();
        let result = CodeFile::load(&path);
        assert!(
            matches!(result, Err(Error::Metadata { .. })),
            "{key}: {result:?}"
        );
    }
}
