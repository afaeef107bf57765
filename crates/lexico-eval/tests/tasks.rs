//! Published tasks on their published data, as far as that lies in `../shared`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::{Path, PathBuf};

use lexico_eval::questions::Item;
use lexico_eval::tasks::gsm8k::{self, Extraction};
use lexico_eval::tasks::longbench::{self, DATASETS, Dataset, Form, LongBenchOptions, Prompts};
use lexico_eval::tasks::ruler::{RulerOptions, RulerTask, TASKS, ruler};
use lexico_llm::{Model, Quantize};
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

/// Task, tokenizer, length, seed, haystack; of each prompt its CRC-32, its length, its end that begins the answer, and
/// the answers. By `fixtures/make_ruler.py`.
type RulerCase = (
    String,
    String,
    usize,
    u32,
    String,
    Vec<(u32, usize, String, Vec<String>)>,
);

/// Draws the prompts of each case, and compares.
fn agrees_with_ruler(golden: &str, count: impl Fn(&str, &str) -> lexico_eval::Result<usize>) {
    let golden: Vec<RulerCase> = serde_json::from_str(golden).unwrap();
    // All tasks but one at two lengths: the shortest list of common words does not fit.
    assert!(golden.len() + 1 >= 2 * TASKS.len());
    let licence = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../LICENSE-APACHE");
    let licence = std::fs::read_to_string(licence).unwrap();
    for (name, tokenizer, length, seed, haystack, prompts) in golden {
        let options = RulerOptions {
            tasks: vec![RulerTask::named(&name).unwrap()],
            lengths: vec![length],
            samples: prompts.len(),
            haystack: (haystack == "essay").then(|| licence.clone()),
            template_tokens: 0,
            seed,
        };
        let made = ruler(&options, &|text| count(&tokenizer, text)).unwrap();
        assert_eq!(made.items.len(), prompts.len());
        for (number, (item, (crc, bytes, begun, answers))) in
            made.items.iter().zip(prompts).enumerate()
        {
            let whole = (crc32fast::hash(item.prompt.as_bytes()), item.prompt.len());
            let case = format!("{} of {tokenizer}, seed {seed}, {haystack}", item.id);
            assert_eq!(whole, (crc, bytes), "{case}: {}", item.prompt);
            assert_eq!(item.begun, begun, "{case}");
            assert_eq!(item.expected, answers.join(", "), "{case}");
            let all = answers.join(" ").to_uppercase();
            assert_eq!(made.judge(number, &all).score, 1.0, "{case}");
            // Some words are a part of others.
            let first = made.judge(number, &format!("It is {}.", answers[0])).score;
            let least = 1.0 / answers.len() as f64;
            assert!(
                first >= least && (first < 1.0 || least == 1.0),
                "{case}: {first}"
            );
            assert_eq!(made.judge(number, "?").score, 0.0, "{case}");
        }
    }
}

#[test]
fn ruler_prompts_are_the_published_generators() {
    let model = Model::tiny().unwrap();
    agrees_with_ruler(include_str!("fixtures/ruler.json"), |tokenizer, text| {
        Ok(match tokenizer {
            "words" => text.split_whitespace().count(),
            _ => model.tokenizer.encode_more(text)?.len(),
        })
    });
}

#[test]
fn ruler_prompts_of_real_models_are_the_published_generators() {
    let Some(folder) = std::env::var_os("LEXICO_REAL_MODELS") else {
        eprintln!("SKIPPED: LEXICO_REAL_MODELS names no folder of real models");
        return;
    };
    for (file, golden) in [
        (
            "smollm2-135m-instruct-q4_1.gguf",
            include_str!("fixtures/ruler_smollm2.json"),
        ),
        (
            "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            include_str!("fixtures/ruler_qwen2.5-coder.json"),
        ),
    ] {
        let path = Path::new(&folder).join(file);
        if !path.exists() {
            eprintln!("SKIPPED: {} is not there", path.display());
            continue;
        }
        let model = Model::load(&path, Quantize::None).unwrap();
        agrees_with_ruler(golden, |_, text| {
            Ok(model.tokenizer.encode_more(text)?.len())
        });
    }
}

#[test]
fn impossible_ruler_prompts_are_refused() {
    let refusal = |name: &str, length: usize, template_tokens: usize| {
        let options = RulerOptions {
            tasks: vec![RulerTask::named(name).unwrap()],
            lengths: vec![length],
            samples: 1,
            haystack: None,
            template_tokens,
            seed: 42,
        };
        let made = ruler(&options, &|text| Ok(text.split_whitespace().count()));
        made.err().map(|error| error.to_string())
    };
    for task in TASKS {
        for (length, template) in [(0, 0), (100, 90), (160, 0), (usize::MAX, 0)] {
            let error = refusal(task.name, length, template);
            // The shortest of these have room for an answer and some words.
            assert!(
                error.is_some() || length == 160,
                "{} {length} {template}",
                task.name
            );
            if let Some(error) = error {
                assert!(
                    error.contains(task.name) && error.contains("impossible"),
                    "{error}"
                );
            }
        }
        assert_eq!(refusal(task.name, 1024, 40), None);
    }
    assert!(refusal("vt", 2_000, 600).unwrap().contains("too short"));
    assert!(refusal("cwe", 1 << 20, 0).unwrap().contains("8166 words"));
    let error = RulerTask::named("qa_1").unwrap_err().to_string();
    assert!(error.contains("no task qa_1 here") && error.contains("niah_multikey_2"));
    let options = RulerOptions {
        tasks: vec![TASKS[0]],
        lengths: vec![1024],
        samples: 1,
        haystack: Some(" \n".to_owned()),
        template_tokens: 0,
        seed: 42,
    };
    // Noise needs no text; essays do.
    let count = |text: &str| Ok(text.split_whitespace().count());
    assert!(ruler(&options, &count).is_ok());
    let essays = RulerOptions {
        tasks: vec![TASKS[1]],
        ..options.clone()
    };
    let error = ruler(&essays, &count).err().unwrap().to_string();
    assert!(error.contains("holds no text"), "{error}");
    for twice in [
        RulerOptions {
            lengths: vec![1024, 1024],
            ..options.clone()
        },
        RulerOptions {
            tasks: vec![TASKS[0], TASKS[0]],
            ..options
        },
    ] {
        let error = ruler(&twice, &count).err().unwrap().to_string();
        assert!(error.contains("named twice"), "{error}");
    }
}
