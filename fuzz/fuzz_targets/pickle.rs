//! Any bytes as a PyTorch file, or as the pickle inside of one: its dictionaries are imported, or it is refused.
#![no_main]

use std::io::{Cursor, Write};
use std::sync::LazyLock;

use lexico::dictionary::ModelIdentity;
use lexico_fuzz::in_file;
use lexico_llm::Model;
use lexico_llm::import::import_reference;
use libfuzzer_sys::fuzz_target;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

static IDENTITY: LazyLock<ModelIdentity> = LazyLock::new(|| {
    let mut identity = Model::tiny().unwrap().identity();
    (identity.layers, identity.head_dim) = (1, 4);
    identity
});

/// A file of PyTorch's with this pickle and 2 matrices of 4 × 3 numbers.
fn archive(pickle: &[u8]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let numbers: Vec<u8> = (0..24u8)
        .flat_map(|i| (f32::from(i) + 1.0).to_le_bytes())
        .collect();
    for (name, bytes) in [
        ("archive/data.pkl", pickle),
        ("archive/byteorder", b"little"),
        ("archive/data/0", &numbers),
        ("archive/version", b"3\n"),
    ] {
        zip.start_file(name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fuzz_target!(|bytes: &[u8]| {
    let import = |bytes: &[u8]| {
        let set = in_file("fuzzed.pt", bytes, |path| {
            import_reference(path, IDENTITY.clone())
        });
        if let Ok(set) = set {
            assert_eq!(set.layers.len(), 1);
        }
    };
    match bytes.split_first() {
        Some((0, pickle)) => import(&archive(pickle)),
        Some((_, file)) => import(file),
        None => {}
    }
});
