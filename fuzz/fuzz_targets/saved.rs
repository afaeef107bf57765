//! Any bytes as a saved cache, whole or in part with the rest and all checksums right: it is resumed, or it is refused.
#![no_main]

use std::sync::LazyLock;

use lexico_fuzz::in_file;
use lexico_llm::Model;
use lexico_llm::saved::SavedGeneration;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

static MODEL: LazyLock<Model> = LazyLock::new(|| Model::tiny().unwrap());
/// Saved caches of additive and of sparse codes.
const SAVED: [&[u8]; 2] = [
    include_bytes!("../../crates/lexico-llm/tests/fixtures/saved/packed.cache"),
    include_bytes!("../../crates/lexico-llm/tests/fixtures/saved/i8.cache"),
];
const FORMAT: &[u8] = b"lexico-cache/1\n";

/// A saved cache's header and blocks.
fn parts(saved: &[u8]) -> (Value, Vec<Vec<u8>>) {
    let rest = &saved[FORMAT.len()..];
    let length = u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&rest[4..4 + length]).unwrap();
    let mut rest = &rest[4 + length + 4..];
    let blocks = header["blocks"].as_array().unwrap().iter();
    let blocks = blocks.map(|block| {
        let (own, after) = rest.split_at(block["bytes"].as_u64().unwrap() as usize);
        rest = after;
        own.to_vec()
    });
    let blocks = blocks.collect();
    (header, blocks)
}

/// The file of a header and blocks.
fn file(header: &[u8], blocks: &[Vec<u8>]) -> Vec<u8> {
    let mut start = (header.len() as u32).to_le_bytes().to_vec();
    start.extend(header);
    let checksum = crc32fast::hash(&start);
    [FORMAT, &start, &checksum.to_le_bytes(), &blocks.concat()].concat()
}

fuzz_target!(|bytes: &[u8]| {
    let [kind, which, bytes @ ..] = bytes else {
        return;
    };
    let (mut header, mut blocks) = parts(SAVED[usize::from(kind >> 4 & 1)]);
    let bytes = match kind & 3 {
        0 => bytes.to_vec(),
        1 => file(bytes, &blocks),
        _ => {
            let number = usize::from(*which) % blocks.len();
            header["blocks"][number]["bytes"] = bytes.len().into();
            header["blocks"][number]["crc32"] = crc32fast::hash(bytes).into();
            blocks[number] = bytes.to_vec();
            file(&serde_json::to_vec(&header).unwrap(), &blocks)
        }
    };
    let saved = in_file("fuzzed.cache", &bytes, SavedGeneration::open);
    if let Ok((cache, progress)) = saved.and_then(|saved| saved.resume(&MODEL)) {
        assert!(cache.len() <= progress.tokens.len());
        assert!(cache.state().is_some());
    }
});
