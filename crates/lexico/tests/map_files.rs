//! Dictionary files with maps of heads, and code files behind them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use common::{drawn_vectors, random_dictionary};
use lexico::cache::Coding;
use lexico::codes::CodeFile;
use lexico::dictionary::{
    CodeFamily, CodebookSizes, Codebooks, FORMATS, HeadMaps, JointBasis, LayerDictionaries,
    ModelIdentity, RotaryIdentity, RotaryMeans, Training,
};
use lexico::tensor_file::{self, Dtype, NewTensor, TensorFile};
use lexico::{
    AdditiveFormat, BeamSearch, Codes, DictionarySet, Encoder, Error, KeyValue, Result,
    mean_relative_error,
};

const HEADS: usize = 2;
const M: usize = 6;

fn drawn_maps(seed: u64, heads: usize, m: usize) -> HeadMaps {
    let matrices = drawn_vectors(seed, heads * m, m).into_iter().enumerate();
    let matrices = matrices.map(|(i, x)| match i % (m * m) % (m + 1) {
        0 => 2.0,
        _ => 0.1 * x,
    });
    let matrices: Vec<f32> = matrices.collect();
    HeadMaps::new(&drawn_vectors(seed ^ 1, heads, m), &matrices, m).unwrap()
}

fn drawn_codebooks(seed: u64, m: usize) -> Codebooks {
    let sizes = CodebookSizes { first: 9 };
    let codebooks = Codebooks::new(drawn_vectors(seed, sizes.atoms(3), m), m, sizes).unwrap();
    codebooks.in_half_precision().unwrap()
}

/// The same maps of keys without drawn means before a rotary embedding.
fn with_rotary_means(maps: HeadMaps, seed: u64) -> HeadMaps {
    let (heads, m) = (maps.heads(), maps.head_dim());
    let frequencies = [1.0, 0.02, 1e-4];
    let means = RotaryMeans::new(&frequencies[..m / 2], &drawn_vectors(seed, heads, m), m);
    maps.with_rotary_means(means.unwrap()).unwrap()
}

/// A set with maps whose keys are without their means before the rotary embedding.
fn rotary_set(layers: usize, sparse: bool) -> DictionarySet {
    let mut set = drawn_set(layers, sparse, true);
    for (l, layer) in set.layers.iter_mut().enumerate() {
        let KeyValue { keys, values } = layer.maps.take().unwrap();
        let keys = with_rotary_means((*keys).clone(), l as u64 + 70).into();
        layer.maps = Some(KeyValue { keys, values });
    }
    set
}

/// A set that files keep to the last bit.
fn drawn_set(layers: usize, sparse: bool, maps: bool) -> DictionarySet {
    let layer = |l: usize| {
        let pair = KeyValue::new(10 * l as u64, 10 * l as u64 + 5);
        let dictionary = |seed| random_dictionary(seed, 12, M).in_half_precision().unwrap();
        LayerDictionaries {
            sparse: sparse.then(|| pair.map(|seed| dictionary(seed).into())),
            codebooks: Some(pair.map(|seed| drawn_codebooks(seed + 1, M).into())),
            maps: maps.then(|| pair.map(|seed| drawn_maps(seed + 2, HEADS, M).into())),
        }
    };
    DictionarySet {
        layers: (0..layers).map(layer).collect(),
        model: ModelIdentity {
            name: "drawn".to_owned(),
            architecture: "LlamaForCausalLM".to_owned(),
            layers,
            kv_heads: HEADS,
            head_dim: M,
            rotary: RotaryIdentity {
                kind: "default".to_owned(),
                theta: 10_000.0,
                parameters: Default::default(),
            },
        },
        training: Training {
            sparsity: 2,
            ..Training::default()
        },
    }
}

#[test]
fn sets_come_back_with_and_without_maps_and_sparse_dictionaries() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.safetensors");
    for layers in [1, 3] {
        for (sparse, maps) in [(true, true), (false, true), (true, false), (false, false)] {
            let set = drawn_set(layers, sparse, maps);
            set.save(&path).unwrap();
            let back = DictionarySet::load(&path).unwrap();
            assert_eq!(back, set);
            assert_eq!(back.bytes(), set.bytes());
            // Earlier versions read what they can use, and refuse by its format what they cannot.
            let format = TensorFile::open(&path).unwrap().metadata()["format"].clone();
            let wanted = FORMATS[usize::from(maps || !sparse)];
            assert_eq!(format, wanted, "sparse: {sparse}, maps: {maps}");
            assert_eq!(set.max_sparsity(CodeFamily::Additive), 3);
            let most = if sparse { 6 } else { 0 };
            assert_eq!(set.max_sparsity(CodeFamily::Sparse), most);
        }
    }
}

#[test]
fn sets_without_means_before_the_rotary_embedding_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.safetensors");
    for sparse in [false, true] {
        let set = rotary_set(2, sparse);
        set.save(&path).unwrap();
        let back = DictionarySet::load(&path).unwrap();
        assert_eq!(back, set);
        assert_ne!(back, drawn_set(2, sparse, true));
        assert_eq!(back.bytes(), set.bytes());
        // Earlier versions would take codes for something else.
        let format = TensorFile::open(&path).unwrap().metadata()["format"].clone();
        assert_eq!(format, FORMATS[2]);
        let keys = HeadMaps::load(&path, "layers.1.keys").unwrap().unwrap();
        assert_eq!(keys, *set.layers[1].maps.as_ref().unwrap().keys);
        let plain = drawn_set(2, sparse, true).layers[1].maps.clone().unwrap();
        assert_ne!(keys.checksum(), plain.keys.checksum());
    }
}

/// The same with heads that are coded together.
fn joint_set(layers: usize, sparse: bool) -> DictionarySet {
    let mut set = rotary_set(layers, sparse);
    for (l, layer) in set.layers.iter_mut().enumerate() {
        let maps = layer.maps.take().unwrap();
        let joint = |maps: Arc<HeadMaps>, angle: f32| {
            let n = HEADS * M;
            let mut basis = vec![0.0; n * n];
            (0..n).for_each(|i| basis[i * n + (i + M) % n] = 1.0);
            let (sine, cosine) = angle.sin_cos();
            (basis[M], basis[M + 1]) = (cosine, sine);
            (basis[n + M], basis[n + M + 1]) = (-sine, cosine);
            let basis = JointBasis::new(&basis, HEADS, HEADS, M).unwrap();
            Arc::new(HeadMaps::clone(&maps).with_basis(basis).unwrap())
        };
        let angle = l as f32 + 0.3;
        layer.maps = Some(KeyValue {
            keys: joint(maps.keys, angle),
            values: joint(maps.values, -angle),
        });
    }
    set
}

#[test]
fn sets_of_heads_that_are_coded_together_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.safetensors");
    for sparse in [false, true] {
        let set = joint_set(2, sparse);
        assert!(set.check_alike().is_ok());
        set.save(&path).unwrap();
        let back = DictionarySet::load(&path).unwrap();
        assert_eq!(back, set);
        assert_eq!(back.bytes(), set.bytes());
        assert_eq!(back.layers[1].joint_heads(), HEADS);
        // Earlier versions would take codes for something else.
        let format = TensorFile::open(&path).unwrap().metadata()["format"].clone();
        assert_eq!(format, FORMATS[3]);
        let keys = HeadMaps::load(&path, "layers.1.keys").unwrap().unwrap();
        assert_eq!(keys, *set.layers[1].maps.as_ref().unwrap().keys);
        let alone = rotary_set(2, sparse).layers[1].maps.clone().unwrap();
        assert_ne!(keys.checksum(), alone.keys.checksum());
        assert!(alone.keys.check_alone().is_ok());
        let refused = keys.check_alone().unwrap_err().to_string();
        assert!(refused.contains("2 heads are coded together"), "{refused}");
    }
    // One layer, or one part of it, alone is refused.
    let mut set = joint_set(2, false);
    let alone = rotary_set(2, false);
    set.layers[0] = alone.layers[0].clone();
    assert!(set.check_alike().is_err());
    let mut layer = joint_set(1, false).layers.remove(0);
    let values = alone.layers[0].maps.as_ref().unwrap().values.clone();
    layer.maps.as_mut().unwrap().values = values;
    let refused = Coding::default().coders(&layer).unwrap_err();
    assert!(matches!(refused, Error::Dictionary(_)), "{refused}");
}

#[test]
fn files_whose_bases_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.safetensors");
    joint_set(2, false).save(&path).unwrap();
    let load = changed(&path);
    load(&|_| ()).unwrap();
    let name = "layers.1.values.basis";
    let change = |change: &dyn Fn(&mut NewTensor)| {
        load(&|tensors| change(tensors.iter_mut().find(|t| t.name == name).unwrap()))
    };
    let set = |x: f32| change(&|tensor| tensor.bytes[4..8].copy_from_slice(&x.to_le_bytes()));
    let shaped = |shape: &[usize]| {
        change(&|tensor| {
            tensor.shape = shape.to_vec();
            tensor.bytes.resize(4 * shape.iter().product::<usize>(), 0);
        })
    };
    let n = HEADS * M;
    for (case, result) in [
        set(f32::NAN),
        set(0.1),
        change(&|tensor| tensor.bytes.fill(0)),
        shaped(&[2, n, n]),
        shaped(&[1, n, n + 1]),
        shaped(&[1, n + 1, n + 1]),
        shaped(&[HEADS, M, M]),
        shaped(&[0, n, n]),
        shaped(&[1, 0, 0]),
        shaped(&[n, n]),
        shaped(&[1, 3 * M, 3 * M]),
        change(&|tensor| tensor.dtype = Dtype::I32),
        change(&|tensor| tensor.name = "layers.2.values.basis".to_owned()),
        load(&|tensors| tensors.retain(|t| t.name != name)),
        load(&|tensors| tensors.retain(|t| !t.name.contains("values.basis"))),
    ]
    .into_iter()
    .enumerate()
    {
        let message = result.unwrap_err().to_string();
        assert!(
            message.contains("basis") || message.contains("tensors"),
            "case {case}: {message}"
        );
    }
}

#[test]
fn files_whose_means_before_the_rotary_embedding_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.safetensors");
    rotary_set(2, false).save(&path).unwrap();
    let load = changed(&path);
    load(&|_| ()).unwrap();
    let (means, angles) = ("layers.1.keys.rotary-means", "layers.0.keys.frequencies");
    let of = |name: &str, change: &dyn Fn(&mut NewTensor)| {
        load(&|tensors| change(tensors.iter_mut().find(|t| t.name == name).unwrap()))
    };
    let set = |name: &str, x: f32| {
        of(name, &|tensor| {
            tensor.bytes[4..8].copy_from_slice(&x.to_le_bytes())
        })
    };
    let shaped = |name: &str, shape: &[usize]| {
        of(name, &|tensor| {
            tensor.shape = shape.to_vec();
            tensor.bytes.resize(4 * shape.iter().product::<usize>(), 0);
        })
    };
    let renamed = |name: &str, new: &str| of(name, &|tensor| tensor.name = new.to_owned());
    let without = |ending: &str| load(&|tensors| tensors.retain(|t| !t.name.ends_with(ending)));
    for (case, result) in [
        set(means, f32::NAN),
        set(angles, f32::INFINITY),
        shaped(means, &[1, M]),
        shaped(means, &[HEADS, M + 1]),
        shaped(means, &[HEADS * M]),
        shaped(means, &[0, M]),
        shaped(angles, &[M / 2 + 1]),
        shaped(angles, &[0]),
        shaped(angles, &[1, 3]),
        of(means, &|tensor| tensor.dtype = Dtype::I32),
        of(angles, &|tensor| tensor.dtype = Dtype::U32),
        without(".rotary-means"),
        without(".frequencies"),
        without("1.keys.rotary-means"),
        without("0.keys.frequencies"),
        renamed(means, "layers.1.values.rotary-means"),
        load(&|tensors| {
            for tensor in tensors {
                if tensor.name.ends_with(".rotary-means") || tensor.name.ends_with(".frequencies") {
                    tensor.name = tensor.name.replace("keys", "values");
                }
            }
        }),
    ]
    .into_iter()
    .enumerate()
    {
        assert!(result.is_err(), "case {case}");
    }
}

#[test]
fn the_maps_of_one_tensor_need_only_the_format() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.safetensors");
    let set = drawn_set(2, false, true);
    set.save(&path).unwrap();
    let maps = set.layers[1].maps.clone().unwrap();
    let read = HeadMaps::load(&path, "layers.1.values").unwrap();
    assert_eq!(read.as_ref(), Some(&*maps.values));
    assert!(HeadMaps::are_in(
        &TensorFile::open(&path).unwrap(),
        "layers.0.keys"
    ));
    assert!(HeadMaps::load(&path, "layers.2.keys").unwrap().is_none());
    drawn_set(2, false, false).save(&path).unwrap();
    assert!(HeadMaps::load(&path, "layers.0.keys").unwrap().is_none());
    tensor_file::write(&path, &[], HashMap::new()).unwrap();
    let unmarked = HeadMaps::load(&path, "layers.0.keys");
    assert!(matches!(unmarked, Err(Error::Format { .. })));
}

/// Loads the set of a file with other tensors.
fn changed(path: &Path) -> impl Fn(&dyn Fn(&mut Vec<NewTensor>)) -> Result<DictionarySet> {
    let (tensors, metadata) = parts(path);
    move |change| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        tensor_file::write(path, &tensors, metadata.clone()).unwrap();
        DictionarySet::load(path)
    }
}

/// The tensors and the metadata of a file.
fn parts(path: &Path) -> (Vec<NewTensor>, HashMap<String, String>) {
    let file = TensorFile::open(path).unwrap();
    let tensors = file.names().into_iter().map(|name| {
        let (dtype, shape) = file.info(&name).unwrap();
        NewTensor::new(&name, dtype, shape, file.bytes(&name).unwrap())
    });
    (tensors.collect(), file.metadata())
}

#[test]
fn files_whose_maps_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.safetensors");
    drawn_set(2, false, true).save(&path).unwrap();
    let (means, matrices) = ("layers.1.values.means", "layers.0.keys.matrices");
    let load = changed(&path);
    load(&|_| ()).unwrap();
    let of = |name: &str, change: &dyn Fn(&mut NewTensor)| {
        load(&|tensors| change(tensors.iter_mut().find(|t| t.name == name).unwrap()))
    };
    let number = |place: usize, x: f32| {
        move |tensor: &mut NewTensor| {
            tensor.bytes[4 * place..][..4].copy_from_slice(&x.to_le_bytes())
        }
    };
    let set = |name: &str, place: usize, x: f32| of(name, &number(place, x));
    let shaped = |name: &str, shape: &[usize]| {
        of(name, &|tensor| {
            tensor.shape = shape.to_vec();
            tensor.bytes.resize(4 * shape.iter().product::<usize>(), 0);
        })
    };
    let typed = |name: &str, dtype: Dtype| of(name, &|tensor| tensor.dtype = dtype);
    let refused = [
        // Numbers that are none.
        (means, set(means, 3, f32::NAN)),
        (means, set(means, 0, f32::NEG_INFINITY)),
        (matrices, set(matrices, 40, f32::NAN)),
        (matrices, set(matrices, 7, f32::INFINITY)),
        // Matrices of which f32 finds no inverse.
        (matrices, of(matrices, &|tensor| tensor.bytes.fill(0))),
        (
            matrices,
            of(matrices, &|tensor| tensor.bytes.copy_within(..4 * M, 4 * M)),
        ),
        (matrices, set(matrices, 0, 1e30)),
        // Other heads, other lengths, other dimensions.
        (means, shaped(means, &[1, M])),
        (means, shaped(means, &[3, M])),
        (means, shaped(means, &[HEADS, M + 1])),
        (means, shaped(means, &[HEADS * M])),
        (means, shaped(means, &[0, M])),
        (matrices, shaped(matrices, &[1, M, M])),
        (matrices, shaped(matrices, &[3, M, M])),
        (matrices, shaped(matrices, &[HEADS, M, M + 1])),
        (matrices, shaped(matrices, &[HEADS * M, M])),
        (matrices, shaped(matrices, &[0, M, M])),
        (means, typed(means, Dtype::I32)),
        (matrices, typed(matrices, Dtype::U32)),
    ];
    for (case, (name, result)) in refused.into_iter().enumerate() {
        let (tensor, _) = name.rsplit_once('.').unwrap();
        match result {
            Err(error @ Error::Tensor { .. }) => {
                let message = error.to_string();
                assert!(message.contains(tensor), "case {case}: {message}");
            }
            other => panic!("case {case}: {other:?}"),
        }
    }
    // A singular one is named by its head.
    let message = of(matrices, &|tensor| tensor.bytes[4 * M * M..].fill(0));
    let message = message.unwrap_err().to_string();
    assert!(message.contains("head 1"), "{message}");
    // Parts that are not there.
    let without = |ending: &str| load(&|tensors| tensors.retain(|t| !t.name.ends_with(ending)));
    for ending in [
        ".means",
        ".matrices",
        "1.values.means",
        "0.keys.matrices",
        ".first",
        ".others",
    ] {
        let result = without(ending);
        assert!(result.is_err(), "without {ending}");
    }
    let renamed = load(&|tensors| {
        let own = tensors.iter_mut().find(|t| t.name == means).unwrap();
        own.name = "layers.7.values.means".to_owned();
    });
    assert!(
        matches!(renamed, Err(Error::MissingTensor { .. })),
        "{renamed:?}"
    );
    // Maps are of no use but for codebooks, whatever else the file has.
    for sparse in [false, true] {
        let mut set = drawn_set(2, sparse, true);
        set.layers
            .iter_mut()
            .for_each(|layer| layer.codebooks = None);
        set.save(&path).unwrap();
        let result = DictionarySet::load(&path);
        let message = result.unwrap_err().to_string();
        assert!(!sparse || message.contains("codebooks"), "{message}");
    }
    // Metadata of another model.
    let changes: [fn(&mut ModelIdentity); 6] = [
        |model: &mut ModelIdentity| model.kv_heads = 3,
        |model: &mut ModelIdentity| model.kv_heads = 0,
        |model: &mut ModelIdentity| model.kv_heads = usize::MAX,
        |model: &mut ModelIdentity| model.head_dim = M + 1,
        |model: &mut ModelIdentity| model.head_dim = 0,
        |model: &mut ModelIdentity| model.layers = 1,
    ];
    for change in changes {
        let mut set = drawn_set(2, false, true);
        change(&mut set.model);
        set.save(&path).unwrap();
        assert!(DictionarySet::load(&path).is_err(), "{:?}", set.model);
    }
}

#[test]
fn a_cut_file_is_refused_wherever_it_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.safetensors");
    drawn_set(1, false, true).save(&path).unwrap();
    let good = std::fs::read(&path).unwrap();
    for at in (0..good.len()).step_by(61) {
        std::fs::write(&path, &good[..at]).unwrap();
        let result = DictionarySet::load(&path);
        assert!(
            matches!(result, Err(Error::NotSafetensors { .. })),
            "cut at {at}"
        );
    }
}

#[test]
fn codes_behind_a_map_come_back_from_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codes.safetensors");
    let codebooks = drawn_codebooks(1, M);
    let maps = with_rotary_means(drawn_maps(2, HEADS, M), 8);
    let vectors = drawn_vectors(3, 40, M);
    let format = AdditiveFormat {
        sparsity: 3,
        sizes: codebooks.sizes(),
    };
    let mut codes = Codes::new(format).unwrap();
    let search = BeamSearch::new(&codebooks, 3).unwrap();
    let mut mapped = maps.apply(1, &vectors);
    maps.centre(1, 0.., &mut mapped);
    codes.extend(&search.encode(&mapped).unwrap());
    let mut decoded = codes.decode(&codebooks).unwrap();
    maps.uncentre(1, 0.., &mut decoded);
    let own = maps.invert(1, &decoded);
    let file = CodeFile::new(codes.clone(), "layers.0.keys", &codebooks).behind(&maps, 1);
    file.save(&path).unwrap();
    let back = CodeFile::load(&path).unwrap();
    assert_eq!((back.head, back.checksum), (Some(1), file.checksum));
    assert_eq!(back.decode_behind(&codebooks, Some(&maps)).unwrap(), own);
    assert!(mean_relative_error(&vectors, &own, M) < 0.5);
    // Without the maps, or behind others, they stand for something else.
    for maps in [
        None,
        Some(&drawn_maps(9, HEADS, M)),
        Some(&drawn_maps(9, HEADS, M + 1)),
    ] {
        let result = back.decode_behind(&codebooks, maps);
        assert!(
            matches!(result, Err(Error::OtherDictionary(_))),
            "{result:?}"
        );
    }
    assert!(back.decode(&codebooks).is_err());
    // A head that there is not.
    let other = CodeFile {
        head: Some(HEADS),
        ..back
    };
    let result = other.decode_behind(&codebooks, Some(&maps));
    assert!(matches!(result, Err(Error::Dictionary(_))), "{result:?}");
    // Codes of no head leave maps alone, as those of earlier versions.
    let plain = CodeFile::new(codes.clone(), "layers.0.keys", &codebooks);
    plain.save(&path).unwrap();
    let (_, metadata) = parts(&path);
    assert!(!metadata.contains_key("head"));
    let decoded = CodeFile::load(&path).unwrap();
    let decoded = decoded.decode_behind(&codebooks, Some(&maps)).unwrap();
    assert_eq!(decoded, codes.decode(&codebooks).unwrap());
    // A head that is no number.
    for head in ["-1", "", "two", "99999999999999999999999"] {
        let (tensors, mut metadata) = parts(&path);
        metadata.insert("head".to_owned(), head.to_owned());
        let path = folder.path().join("lies.safetensors");
        tensor_file::write(&path, &tensors, metadata).unwrap();
        let result = CodeFile::load(&path).map(drop);
        assert!(
            matches!(result, Err(Error::Metadata { key: "head", .. })),
            "{result:?}"
        );
    }
}
