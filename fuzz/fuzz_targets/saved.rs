//! Any bytes as a saved cache, whole or in part with the rest and all checksums right: it is resumed, or it is refused.
#![no_main]

use std::sync::LazyLock;

use lexico_fuzz::in_file;
use lexico_llm::Model;
use lexico_llm::cache::CacheState;
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
        // Without the file around them blocks are read a hundred times as often. The first holds the tokens.
        _ => {
            let number = 1 + usize::from(*which) % (blocks.len() - 1);
            blocks[number] = bytes.to_vec();
            let names = header["blocks"].as_array().unwrap().iter();
            let names = names.map(|block| block["name"].as_str().unwrap().to_owned());
            let state = CacheState {
                blocks: names.zip(blocks).skip(1).collect(),
                facts: header["facts"].take(),
            };
            let spec = header["cache"].as_str().unwrap().parse().unwrap();
            let mut cache = MODEL.cache(&spec).unwrap();
            if cache.resume(&state).is_ok() {
                let again = cache.state().unwrap();
                assert_eq!(again.blocks.len(), state.blocks.len());
            }
            return;
        }
    };
    let saved = in_file("fuzzed.cache", &bytes, SavedGeneration::open);
    if let Ok((cache, progress)) = saved.and_then(|saved| saved.resume(&MODEL)) {
        assert!(cache.len() <= progress.tokens.len());
        assert!(cache.state().is_some());
    }
});
