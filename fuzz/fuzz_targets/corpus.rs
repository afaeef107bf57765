//! Any bytes as a text to train on, plain, JSON or Parquet: it is cut into chunks, or it is refused.
#![no_main]

use std::sync::LazyLock;

use lexico_fuzz::in_file;
use lexico_llm::{Corpus, Model};
use libfuzzer_sys::fuzz_target;

static MODEL: LazyLock<Model> = LazyLock::new(|| Model::tiny().unwrap());

fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, bytes)) = bytes.split_first() else {
        return;
    };
    let name = ["a.txt", "a.json", "a.jsonl", "a.parquet"][usize::from(kind % 4)];
    let _ = in_file(name, bytes, |path| -> lexico_llm::Result<()> {
        let corpus = Corpus::open(&[path], None, false)?;
        for chunk in corpus.chunks(&MODEL.tokenizer, 16, 64, u64::from(kind))? {
            assert!(chunk?.len() <= 16);
        }
        Ok(())
    });
});
