//! Dictionaries that PyTorch wrote, as the reference implementation saves them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::{Path, PathBuf};

use lexico::Dictionary;
use lexico::dictionary::{ModelIdentity, RotaryIdentity};
use lexico::tensor_file::TensorFile;
use lexico_llm::import::import_reference;

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
            for (part, dictionary) in [("keys", &layer.keys), ("values", &layer.values)] {
                let (want, shape) = rows.f32_tensor(&format!("layers.{l}.{part}"), 2).unwrap();
                assert_eq!([dictionary.len(), dictionary.head_dim()], shape[..]);
                let worst = |d: &Dictionary| {
                    let pairs = d.atoms().iter().zip(&want);
                    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
                };
                assert!(worst(dictionary) <= tolerance, "{file} layer {l} {part}");
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
