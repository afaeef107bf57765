//! Evaluations: sizes asked for, settings refused, interruption at any step.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::ops::ControlFlow;
use std::path::Path;

use lexico_eval::Error;
use lexico_eval::evaluation::{EvaluateOptions, Evaluation, evaluate};
use lexico_eval::questions::{AskOptions, Asked, Item, Questions, Verdict, template_tokens};
use lexico_eval::report::folder::ReportFolder;
use lexico_eval::task::{Measure, Task};
use lexico_eval::tasks;
use lexico_eval::tasks::text::{TextMeasure, TextOptions, TextTask};
use lexico_llm::cache::CacheSpec;
use lexico_llm::{Corpus, Model, Quantize};
use serde_json::{Map, Value};

fn caches(texts: &[&str]) -> Vec<CacheSpec> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn problems(model: &Model) -> Asked {
    let problems = tasks::problems::problems(0).unwrap();
    Asked::new(model, problems, AskOptions::default()).unwrap()
}

fn options(items: usize) -> EvaluateOptions {
    EvaluateOptions {
        items,
        batch: 2,
        ..EvaluateOptions::default()
    }
}

/// All but the time it took.
fn document(evaluation: &Evaluation) -> Value {
    let mut document = serde_json::to_value(evaluation).unwrap();
    assert!(document["seconds"].take().as_f64().unwrap() > 0.0);
    document
}

fn on(_: lexico_eval::evaluation::Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Every step is counted, those in which a model writes the text too.
#[test]
fn progress_ends_with_its_last_step() {
    let model = Model::tiny().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, "Ana has 12 coins at home. ".repeat(40)).unwrap();
    let corpus = Corpus::open(&[&file], None, false).unwrap();
    let specs = caches(&["lexico:window=4,sparsity=2", "kivi"]);
    for own_text in [false, true] {
        let measure = TextMeasure::Divergence;
        let text = TextOptions {
            context: 24,
            prompt: 10,
            step: 1,
            chunks: 3,
            seed: 0,
            own_text,
        };
        let task = TextTask::new(&model, &corpus, measure, text).unwrap();
        let (mut calls, mut ends) = (0, Vec::new());
        let counted = &mut |progress: lexico_eval::evaluation::Progress<'_>| {
            calls += 1;
            ends.push((progress.done, progress.of));
            ControlFlow::Continue(())
        };
        evaluate(&task, &model, &specs, &options(3), None, counted).unwrap();
        assert_eq!(ends.last(), Some(&(calls, calls)), "own text: {own_text}");
    }
}

#[test]
fn an_interrupted_run_goes_on_with_the_same_results() {
    let model = Model::tiny().unwrap();
    let task = problems(&model);
    let specs = caches(&["lexico:sparsity=8,window=4", "lexico"]);
    let mut options = options(5);
    options.seed = Some(3);
    options.budgets = vec!["15%".parse().unwrap(), "20%".parse().unwrap()];
    let mut all = 0i32;
    let counted = &mut |_: lexico_eval::evaluation::Progress<'_>| {
        all += 1;
        ControlFlow::Continue(())
    };
    let whole = evaluate(&task, &model, &specs, &options, None, counted).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("report");
    // Ever later, once in the middle of writing; together less than there is to do.
    let breaks = [3, all / 12, 0, all / 6, all / 2];
    for (round, steps) in breaks.into_iter().enumerate() {
        let mut left = steps;
        let mut report = ReportFolder::open(&folder, round > 0).unwrap();
        let broken = evaluate(
            &task,
            &model,
            &specs,
            &options,
            Some(&mut report),
            &mut |_| {
                left -= 1;
                if left < 0 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        );
        assert!(
            matches!(broken, Err(Error::Interrupted)),
            "after {steps} steps"
        );
        drop(report);
        if round == 1 {
            let path = folder.join("progress.jsonl");
            let mut bytes = std::fs::read(&path).unwrap();
            bytes.extend_from_slice(b"{\"cache\":\"full\",\"first\":4,\"sec");
            std::fs::write(&path, bytes).unwrap();
        }
    }
    let mut report = ReportFolder::open(&folder, true).unwrap();
    let resumed = evaluate(&task, &model, &specs, &options, Some(&mut report), &mut on).unwrap();
    assert_eq!(document(&resumed), document(&whole));
    report.finish(&resumed).unwrap();
    let results = std::fs::read(folder.join("results.json")).unwrap();
    let results: Value = serde_json::from_slice(&results).unwrap();
    assert_eq!(results["runs"].as_array().unwrap().len(), whole.runs.len());
    assert!(!folder.join("progress.jsonl").exists());
    let page = std::fs::read_to_string(folder.join("report.html")).unwrap();
    // Nothing is loaded from elsewhere; the one address is the name of SVG's namespace.
    let outside = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    assert!(
        !outside.contains("http") && !outside.contains("src="),
        "{page}"
    );
    assert!(page.contains("<svg") && page.contains("lexico:sparsity=8,window=4"));
    assert!(
        page.contains("<dt>chat</dt><dd>false</dd>") && page.contains("<dt>seed</dt><dd>3</dd>")
    );
    // A finished report is never written over.
    for resume in [false, true] {
        let error = ReportFolder::open(&folder, resume)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("holds a report already"), "{error}");
    }
}

#[test]
fn a_folder_that_cannot_be_used_is_refused() {
    let model = Model::tiny().unwrap();
    let task = problems(&model);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let refusal = |path: &Path, resume| ReportFolder::open(path, resume).err().unwrap().to_string();
    std::fs::write(path.join("thesis.tex"), "text").unwrap();
    assert!(refusal(path, false).contains("not empty"));
    assert!(refusal(&path.join("thesis.tex"), false).contains("thesis.tex"));
    assert!(refusal(&path.join("a/b"), false).contains("a/b"));
    let own = path.join("own");
    let mut report = ReportFolder::open(&own, false).unwrap();
    assert!(refusal(&own, true).contains("another run is at work"));
    let all = caches(&["lexico:sparsity=4"]);
    evaluate(&task, &model, &all, &options(1), Some(&mut report), &mut on).unwrap();
    drop(report);
    assert!(refusal(&own, false).contains("--resume"));
    // Other settings are named.
    let mut report = ReportFolder::open(&own, true).unwrap();
    let others = caches(&["lexico:sparsity=5"]);
    let error = evaluate(
        &task,
        &model,
        &others,
        &options(2),
        Some(&mut report),
        &mut on,
    );
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("lexico:sparsity=5") && error.contains("items (1 then, 2 now)"),
        "{error}"
    );
    drop(report);
    // A line in the middle that is none.
    let progress = own.join("progress.jsonl");
    let text = std::fs::read_to_string(&progress).unwrap();
    std::fs::write(&progress, text.replacen("\"outcomes\"", "\"outcome\"", 1)).unwrap();
    let error = refusal(&own, true);
    assert!(
        error.contains("progress.jsonl: line 2 is damaged"),
        "{error}"
    );
}

#[test]
fn impossible_settings_are_refused() {
    let model = Model::tiny().unwrap();
    let task = problems(&model);
    let refusal = |specs: &[&str], options: &EvaluateOptions| {
        let specs = caches(specs);
        let error = evaluate(&task, &model, &specs, options, None, &mut on);
        error.unwrap_err().to_string()
    };
    let twice = refusal(&["lexico:sparsity=4", "lexico:sparsity=4"], &options(1));
    assert!(
        twice.contains("lexico:sparsity=4 is given twice"),
        "{twice}"
    );
    assert!(refusal(&[], &options(0)).contains("0 items"));
    let none = EvaluateOptions {
        batch: 0,
        ..options(1)
    };
    assert!(refusal(&[], &none).contains("batch of 0"));
    for text in ["20", "-3%", "120%", "x", "%", "0MiB", "nan%", "infB"] {
        let budget = text.parse::<lexico_llm::cache::CacheBudget>();
        assert!(budget.is_err(), "{text}: {budget:?}");
    }
}

#[test]
fn budgets_are_kept_to_and_what_cannot_be_is_left_out() {
    let model = Model::tiny().unwrap();
    let task = problems(&model);
    let mut options = options(4);
    options.budgets = ["1%", "35%", "100000B", "100%"]
        .map(|b| b.parse().unwrap())
        .to_vec();
    let specs = caches(&["lexico", "lexico:sparsity=8,window=16,batch=1"]);
    let evaluation = evaluate(&task, &model, &specs, &options, None, &mut on).unwrap();
    assert_eq!(evaluation.skipped.len(), 1);
    assert_eq!(evaluation.skipped[0].budget, "1%");
    let runs = &evaluation.runs;
    // All options given: run once, for no budget.
    let fixed = runs.iter().filter(|run| run.budgets.is_empty()).count();
    assert_eq!(fixed, 2, "full, and the one that leaves nothing open");
    let of = |budget: &str| {
        runs.iter()
            .find(|run| run.budgets.iter().any(|b| b == budget))
            .unwrap()
    };
    assert!(
        (0.30..=0.36).contains(&of("35%").share),
        "{}",
        of("35%").share
    );
    let bytes = of("97.65625KiB")
        .items
        .iter()
        .map(|item| item.share * model.decoder.config().fp16_cache_bytes(item.positions) as f64);
    let mean = bytes.sum::<f64>() / 4.0;
    assert!(mean <= 104_000.0, "{mean}");
}

/// Where the model chats, what begins its answer stands behind the template.
#[test]
fn answers_are_begun_behind_the_template() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(tiny.join(name), folder.path().join(name)).unwrap();
    }
    let text = std::fs::read_to_string(tiny.join("tokenizer_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let template = "{% for message in messages %}Ask: {{ message.content }}\n{% endfor %}Say:";
    config["chat_template"] = template.into();
    let path = folder.path().join("tokenizer_config.json");
    std::fs::write(path, config.to_string()).unwrap();
    let model = Model::load(folder.path(), Quantize::None).unwrap();
    let count = |text: &str| model.tokenizer.encode_more(text).unwrap().len();
    assert_eq!(template_tokens(&model).unwrap(), count("Ask: \nSay:"));
    assert_eq!(template_tokens(&Model::tiny().unwrap()).unwrap(), 0);
    let item = Item {
        id: "coins".to_owned(),
        group: None,
        prompt: "Ana has 3 coins. Ana has so many coins:".to_owned(),
        begun: " Ana has so many coins:".to_owned(),
        is_message: true,
        max_tokens: 1,
        stop: Vec::new(),
        expected: "3".to_owned(),
    };
    let full = "full".parse().unwrap();
    let positions = |chat| {
        let options = AskOptions {
            chat,
            truncate: false,
        };
        let asked = Asked::new(&model, questions(vec![item.clone()]), options).unwrap();
        let outcomes = asked.run(&model, &[&full], &[0], &mut || ControlFlow::Continue(()));
        outcomes.unwrap().unwrap()[0][0].prompt_positions
    };
    let chat = "Ask: Ana has 3 coins.\nSay: Ana has so many coins:";
    assert_eq!(positions(true), count(chat));
    assert_eq!(
        positions(false),
        model.tokenizer.encode_first(&item.prompt).unwrap().len()
    );
}

/// Prompts whose answers are half right.
fn questions(items: Vec<Item>) -> Questions {
    Questions {
        name: "long",
        measure: Measure::Accuracy,
        settings: Map::new(),
        items,
        judge: Box::new(|_, _, text| Verdict {
            score: 0.5,
            answer: Some(text.to_owned()),
        }),
    }
}

#[test]
fn a_prompt_beyond_the_context_is_refused_or_cut() {
    let model = Model::tiny().unwrap();
    let context = model.decoder.config().context;
    let long = |max_tokens| {
        questions(vec![Item {
            id: "the long one".to_owned(),
            group: None,
            begun: String::new(),
            is_message: true,
            expected: String::new(),
            prompt: "Ana has 3 coins. ".repeat(1000),
            max_tokens,
            stop: Vec::new(),
        }])
    };
    let ask = |max_tokens, truncate| {
        let options = AskOptions {
            truncate,
            ..AskOptions::default()
        };
        let asked = Asked::new(&model, long(max_tokens), options).unwrap();
        asked.check(&model, &[0]).map(|()| asked)
    };
    let error = ask(4, false).err().unwrap().to_string();
    assert!(
        error.contains("the long one") && error.contains("--truncate"),
        "{error}"
    );
    assert!(ask(context, true).is_err());
    assert!(Asked::new(&model, questions(vec![]), AskOptions::default()).is_err());
    let cut = ask(4, true).unwrap();
    let full = "full".parse().unwrap();
    let outcomes = cut.run(&model, &[&full], &[0], &mut || ControlFlow::Continue(()));
    let outcomes = outcomes.unwrap().unwrap().remove(0);
    assert_eq!(outcomes[0].prompt_positions, context - 4);
    assert_eq!(outcomes[0].score, 0.5);
    // A model without a chat template cannot be asked in chat.
    let chat = AskOptions {
        chat: true,
        truncate: true,
    };
    assert!(Asked::new(&model, long(4), chat).is_err());
}
