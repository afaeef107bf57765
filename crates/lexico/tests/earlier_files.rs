//! Files that version 0.1 wrote, before codebooks were called so: they load, and decode to the same numbers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::PathBuf;

use lexico::codes::{CodeFile, stored};
use lexico::dictionary::{Atoms, CodeFamily, Codebooks};
use lexico::{
    AdditiveFormat, CodeFormat, CoefficientFormat, Dictionary, DictionarySet, SparseFormat,
};

const TENSOR: &str = "layers.0.keys";

fn fixture(name: &str) -> PathBuf {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/version-0.1");
    PathBuf::from(folder).join(name)
}

/// The numbers that version 0.1 decoded from codes of this name.
fn decoded(name: &str) -> Vec<f32> {
    let text = std::fs::read_to_string(fixture("decoded.txt")).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let numbers = line.unwrap().split(' ');
    numbers
        .map(|x| f32::from_bits(u32::from_str_radix(x, 16).unwrap()))
        .collect()
}

/// Checks that numbers are those of version 0.1, but for what the processor's fused additions change.
fn assert_decoded(name: &str, found: &[f32]) {
    let wanted = decoded(name);
    assert_eq!(found.len(), wanted.len(), "{name}");
    for (found, wanted) in found.iter().zip(wanted) {
        assert!(
            (found - wanted).abs() < 1e-6,
            "{name}: {found} for {wanted}"
        );
    }
}

#[test]
fn a_dictionary_file_loads_with_all_that_was_measured() {
    let set = DictionarySet::load(fixture("dictionary.safetensors")).unwrap();
    assert_eq!(
        (set.layers.len(), set.model.kv_heads, set.model.head_dim),
        (1, 2, 8)
    );
    assert_eq!(set.max_sparsity(CodeFamily::Additive), 2);
    assert_eq!(set.usual_family(), CodeFamily::Additive);
    let codebooks = set.layers[0].codebooks.as_ref().unwrap();
    assert_eq!(codebooks.keys.sizes().first, 16);
    let training = &set.training;
    assert_eq!(training.relative_error[0].keys, 0.25);
    assert_eq!(
        training.additive_relative_error.as_ref().unwrap()[0].values,
        0.1
    );
    let losses = |family| set.losses(family).unwrap().layers[0].values[1].clone();
    assert_eq!(losses(CodeFamily::Sparse), [0.5, 0.125]);
    assert_eq!(losses(CodeFamily::Additive), [0.25, 0.0625]);
    // Written again it is the same file.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("again.safetensors");
    set.save(&path).unwrap();
    assert_eq!(DictionarySet::load(&path).unwrap(), set);
}

#[test]
fn code_files_and_stored_blocks_decode_to_the_same_numbers() {
    let path = fixture("dictionary.safetensors");
    let dictionary = Dictionary::load(&path, TENSOR).unwrap();
    let codebooks = Codebooks::load(&path, TENSOR).unwrap();
    let sparse = |coefficients, variable| {
        let sparsity = 3;
        CodeFormat::from(SparseFormat {
            sparsity,
            variable,
            coefficients,
        })
    };
    let additive = AdditiveFormat {
        sparsity: 2,
        sizes: codebooks.sizes(),
    };
    for (name, format) in [
        ("i8", sparse(CoefficientFormat::I8, false)),
        ("f8", sparse(CoefficientFormat::F8, false)),
        ("f32", sparse(CoefficientFormat::F32, false)),
        ("i8-variable", sparse(CoefficientFormat::I8, true)),
        ("packed", additive.into()),
    ] {
        let atoms = match format.family() {
            CodeFamily::Sparse => Atoms::from(&dictionary),
            CodeFamily::Additive => Atoms::from(&codebooks),
        };
        let file = CodeFile::load(fixture(&format!("{name}.codes.safetensors"))).unwrap();
        assert_eq!(
            (file.codes.format(), file.codes.len()),
            (format, 11),
            "{name}"
        );
        assert_decoded(name, &file.decode(atoms).unwrap());
        let block = std::fs::read(fixture(&format!("{name}.block"))).unwrap();
        let codes = stored::read(&[format], [&block[..]]).unwrap();
        assert_decoded(name, &codes[0].decode(atoms).unwrap());
        // What is at rest is as small as it was.
        assert_eq!(stored::write(&[&codes[0]]), [block], "{name}");
    }
}
