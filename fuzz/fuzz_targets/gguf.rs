//! Any bytes as a GGUF model: it loads, and its tokenizer, chat template and a first step run, or it
//! is refused.
#![no_main]

use std::fs::File;
use std::io::Write;

use lexico_llm::chat::Message;
use lexico_llm::decoder::{Logits, Sequence};
use lexico_llm::{Model, Quantize};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fuzzed.gguf");
    File::create(&path).unwrap().write_all(bytes).unwrap();
    let Ok(model) = Model::load(&path, Quantize::None) else {
        return;
    };
    if let Ok(Some(template)) = model.chat_template() {
        let _ = template.render(&[Message::new("user", "Hello")], true);
    }
    let _ = model.tokenizer.encode_first("ab <s>ä");
    let Ok(mut cache) = model.cache(&"full".parse().unwrap()) else {
        return;
    };
    let mut step = [Sequence {
        tokens: &[0, 1],
        cache: cache.as_mut(),
    }];
    let _ = model.decoder.forward(&mut step, Logits::Last);
});
