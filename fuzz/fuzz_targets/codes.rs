//! Any bytes as a code file: it loads, decodes, and comes back from its own writing as it was, or it is refused.
#![no_main]

use lexico::codes::CodeFile;
use lexico::dictionary::{CODEBOOK_ATOMS, Codebooks};
use lexico::{CodeFormat, Dictionary};
use lexico_fuzz::in_file;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = in_file("fuzzed.safetensors", bytes, |path| CodeFile::load(path)) else {
        return;
    };
    let m = file.head_dim;
    if !(1..=64).contains(&m) {
        return;
    }
    let numbers = |atoms: usize| (0..atoms * m).map(|i| 1.0 + (i % 7) as f32).collect();
    // The checksum is another's: what else a decoder finds comes first where it can.
    let decoded = match file.codes.format() {
        CodeFormat::Sparse(_) => file
            .codes
            .decode(&Dictionary::normalised(numbers(64), m).unwrap()),
        CodeFormat::Additive(format) => {
            let atoms = format.sizes.first + 3 * CODEBOOK_ATOMS;
            match Codebooks::new(numbers(atoms), m, format.sizes) {
                Ok(codebooks) => file.codes.decode(&codebooks),
                Err(_) => return,
            }
        }
    };
    if let Ok(decoded) = decoded {
        assert_eq!(decoded.len(), file.codes.len() * m);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("again.safetensors");
    file.save(&path).unwrap();
    let again = CodeFile::load(&path).unwrap();
    assert_eq!(again.codes.format(), file.codes.format());
    assert_eq!(again.codes.len(), file.codes.len());
    assert_eq!(again.head, file.head);
});
