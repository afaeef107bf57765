//! Published tasks on their published data, as far as that lies in `../shared`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::{Path, PathBuf};

use lexico_eval::questions::Item;
use lexico_eval::tasks::gsm8k::{self, Extraction};
use lexico_eval::tasks::longbench::{self, DATASETS, Dataset, Form, LongBenchOptions, Prompts};
use lexico_llm::Model;
use serde_json::{Value, json};

/// Reference material beside the checkout, where there is any.
fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared")
        .join(path);
    if !path.exists() {
        eprintln!("SKIPPED: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// CRC-32 and length of the harness's prompts, by `fixtures/make_gsm8k.py`.
fn agrees(items: &[Item], golden: &Value) {
    let golden: Vec<(u32, usize)> = serde_json::from_value(golden.clone()).unwrap();
    for (item, (crc, length)) in items.iter().zip(&golden) {
        assert_eq!(item.prompt.len(), *length, "{}", item.prompt);
        assert_eq!(
            crc32fast::hash(item.prompt.as_bytes()),
            *crc,
            "{}",
            item.prompt
        );
    }
    assert!(items.len() >= golden.len() && !golden.is_empty());
}

#[test]
fn gsm8k_prompts_are_the_harnesss() {
    let Some(folder) = shared("data") else { return };
    let golden: Value = serde_json::from_str(include_str!("fixtures/gsm8k.json")).unwrap();
    let (test, train) = (
        folder.join("gsm8k_test.jsonl"),
        folder.join("gsm8k_train.jsonl"),
    );
    let read = |shots, extraction| gsm8k::read(&test, &train, shots, extraction).unwrap();
    let five = read(5, Extraction::Strict);
    assert_eq!(five.items.len(), 1319);
    assert_eq!(golden["prompts"].as_array().unwrap().len(), 1319);
    agrees(&five.items, &golden["prompts"]);
    agrees(&read(0, Extraction::Strict).items, &golden["zero_shot"]);
    agrees(&read(8, Extraction::Strict).items, &golden["eight_shot"]);
    assert_eq!(json!(five.items[0].stop), golden["until"]);

    // Every worked answer is right.
    let lines = std::fs::read_to_string(&test).unwrap();
    for extraction in [Extraction::Strict, Extraction::Flexible] {
        let set = read(0, extraction);
        for (number, line) in lines.lines().enumerate() {
            let problem: Value = serde_json::from_str(line).unwrap();
            let verdict = set.judge(number, problem["answer"].as_str().unwrap());
            assert_eq!(verdict.score, 1.0, "{verdict:?}");
        }
    }
}

#[test]
fn longbench_prompts_are_the_published_ones() {
    let Some(folder) = shared("data/longbench") else {
        return;
    };
    let model = Model::tiny().unwrap();
    let prompts = Prompts::read(&folder).unwrap();
    let templates: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join(Prompts::FILE)).unwrap())
            .unwrap();
    let lengths: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join(Prompts::LENGTHS)).unwrap())
            .unwrap();

    let data = tempfile::tempdir().unwrap();
    let record = json!({
        "input": "{context} of the harbour?", "context": "A lobster {input}.", "answers": ["Paragraph 2", "Paragraph 4"],
        "length": 7, "all_classes": ["Animal"], "language": "en", "_id": "x",
    });
    for dataset in DATASETS {
        std::fs::write(
            data.path().join(format!("{}.jsonl", dataset.name)),
            record.to_string(),
        )
        .unwrap();
    }
    let options = LongBenchOptions {
        datasets: DATASETS.to_vec(),
        items: usize::MAX,
        seed: None,
        context: 10_000,
    };
    let set = longbench::read(data.path(), &prompts, &model.tokenizer, &options).unwrap();
    assert_eq!(set.items.len(), 16);
    for (item, Dataset { name, .. }) in set.items.iter().zip(DATASETS) {
        assert_eq!(item.group.as_deref(), Some(name));
        // The record's braces are none of the template's.
        let template = templates[name].as_str().unwrap();
        let (before, after) = template.split_once("{context}").unwrap();
        let after = after.replace("{input}", "{context} of the harbour?");
        assert_eq!(item.prompt, format!("{before}A lobster {{input}}.{after}"));
        assert_eq!(json!(item.max_tokens), lengths[name], "{name}");
        assert_eq!(item.id, format!("{name}/x"));
    }
    let plain: Vec<&str> = DATASETS
        .iter()
        .filter(|dataset| dataset.form != Form::Asked)
        .map(|dataset| dataset.name)
        .collect();
    assert_eq!(plain, ["trec", "triviaqa", "samsum", "lcc", "repobench-p"]);
}
