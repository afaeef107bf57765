//! Any bytes as a dictionary file: it loads and codes a vector, or it is refused.
#![no_main]

use std::fs::File;
use std::io::Write;

use lexico::{DictionarySet, Pursuit};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fuzzed.safetensors");
    File::create(&path).unwrap().write_all(bytes).unwrap();
    let Ok(set) = DictionarySet::load(&path) else {
        return;
    };
    for layer in &set.layers {
        let vector = vec![1.0; layer.keys.head_dim()];
        let sparsity = set.training.sparsity.clamp(1, layer.keys.head_dim());
        let pursuit = Pursuit::new(&layer.keys, sparsity).unwrap();
        let batch = pursuit.encode(&vector).unwrap();
        assert!(batch.mean_relative_error().is_finite());
    }
});
