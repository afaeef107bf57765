//! Dictionaries that PyTorch wrote, as the reference implementation saves them, and those written for it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::{Path, PathBuf};

use lexico::dictionary::{ModelIdentity, RotaryIdentity};
use lexico::tensor_file::TensorFile;
use lexico::{Dictionary, DictionarySet, KeyValue};
use lexico_llm::export::export_reference;
use lexico_llm::import::import_reference;
use lexico_llm::{Error, Model};

fn fixture(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(file)
}

fn identity(layers: usize, head_dim: usize) -> ModelIdentity {
    ModelIdentity {
        name: "drawn".to_owned(),
        architecture: "LlamaForCausalLM".to_owned(),
        layers,
        kv_heads: 1,
        head_dim,
        rotary: RotaryIdentity {
            kind: "default".to_owned(),
            theta: 10_000.0,
            parameters: Default::default(),
        },
    }
}

#[test]
fn columns_become_atoms_and_keys_and_values_part() {
    let rows = TensorFile::open(fixture("reference_dictionary.safetensors")).unwrap();
    for (file, tolerance) in [
        ("reference_dictionary.pt", 1e-6),
        ("reference_dictionary_strided.pt", 1e-6),
        ("reference_dictionary_view.pt", 1e-6),
        ("reference_dictionary_f16.pt", 1e-3),
    ] {
        let set = import_reference(&fixture(file), identity(2, 8)).unwrap();
        for (l, layer) in set.layers.iter().enumerate() {
            for (part, dictionary) in
                KeyValue::new("keys", "values").zip(layer.sparse.clone().unwrap())
            {
                let (want, shape) = rows.f32_tensor(&format!("layers.{l}.{part}"), 2).unwrap();
                assert_eq!([dictionary.len(), dictionary.head_dim()], shape[..]);
                let worst = |d: &Dictionary| {
                    let atoms = d.atoms();
                    let pairs = atoms.iter().zip(&want);
                    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
                };
                assert!(worst(&dictionary) <= tolerance, "{file} layer {l} {part}");
            }
        }
    }
}

#[test]
fn another_shape_or_another_file_is_refused() {
    let message = |path: &Path, identity| import_reference(path, identity).unwrap_err().to_string();
    let pt = fixture("reference_dictionary.pt");
    for (path, identity, word) in [
        (&pt, identity(3, 8), "[6, 8, N]"),
        (&pt, identity(2, 16), "[4, 16, N]"),
        (
            &fixture("reference_dictionary.safetensors"),
            identity(2, 8),
            "not a PyTorch file",
        ),
        (&fixture("none.pt"), identity(2, 8), "none.pt"),
        (&fixture(""), identity(2, 8), "fixtures"),
    ] {
        let message = message(path, identity);
        assert!(message.contains(word), "{message:?} does not name {word:?}");
    }
}

/// Every cut and many flips of a sound file: an error or another dictionary, never a panic.
#[test]
fn damaged_files_do_not_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.pt");
    let good = std::fs::read(fixture("reference_dictionary.pt")).unwrap();
    for at in (0..good.len()).step_by(13) {
        std::fs::write(&path, &good[..at]).unwrap();
        assert!(
            import_reference(&path, identity(2, 8)).is_err(),
            "cut at {at}"
        );
        let mut flipped = good.clone();
        flipped[at] ^= 0x55;
        std::fs::write(&path, flipped).unwrap();
        let _ = import_reference(&path, identity(2, 8));
    }
}

/// The tiny model's dictionaries, without the codebooks, which these files have no place for.
fn tiny() -> DictionarySet {
    let model = Model::tiny().unwrap();
    let mut set = model.dictionaries.as_deref().unwrap().clone();
    set.layers
        .iter_mut()
        .for_each(|layer| layer.codebooks = None);
    set
}

#[test]
fn exported_dictionaries_come_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.pt");
    let fixture = import_reference(&fixture("reference_dictionary.pt"), identity(2, 8)).unwrap();
    for set in [tiny(), fixture] {
        export_reference(&set, &path).unwrap();
        let back = import_reference(&path, set.model.clone()).unwrap();
        assert!(set.layers == back.layers);
    }
}

#[test]
fn dictionaries_that_no_tensor_holds_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.pt");
    let mut uneven = tiny();
    let values = Dictionary::new(vec![1.0; 64 * 64], 1).unwrap().into();
    uneven.layers[2].sparse.as_mut().unwrap().values = values;
    let error = export_reference(&uneven, &path).unwrap_err();
    assert!(matches!(error, Error::File { .. }), "{error}");
    assert!(error.to_string().contains("one size"), "{error}");
    let mut empty = tiny();
    empty.layers.clear();
    assert!(export_reference(&empty, &path).is_err());
    let nowhere = folder.path().join("none/d.pt");
    let error = export_reference(&tiny(), &nowhere).unwrap_err().to_string();
    assert!(error.contains("none"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Where `LEXICO_PYTHON` names a Python that has torch and safetensors.
#[test]
fn torch_reads_what_is_exported() {
    let Ok(python) = std::env::var("LEXICO_PYTHON") else {
        println!("SKIPPED: LEXICO_PYTHON names no Python with torch");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let set = tiny();
    export_reference(&set, &folder.path().join("d.pt")).unwrap();
    set.save(folder.path().join("d.safetensors")).unwrap();
    let script = "\
import sys, torch
from safetensors.torch import load_file
folder = sys.argv[1]
rows = load_file(folder + '/d.safetensors')
for mapped in [False, True]:
    tensor = torch.load(folder + '/d.pt', weights_only=True, mmap=mapped)
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert list(tensor.shape) == [len(rows), *rows['layers.0.keys'].T.shape], tensor.shape
    for name, want in rows.items():
        _, layer, part = name.split('.')
        assert torch.equal(tensor[2 * int(layer) + (part == 'values')], want.T.float()), name
";
    let output = std::process::Command::new(python)
        .args(["-c", script])
        .arg(folder.path())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
}
