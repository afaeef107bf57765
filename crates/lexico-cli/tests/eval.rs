//! Evaluations as a user meets them: every task, reports, interruption, bad input.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("lexico"));
    command.args(["--threads", "1", "eval"]).args(arguments);
    command.stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// What a call prints.
fn printed(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        stderr(&output)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn json(arguments: &[&str]) -> Value {
    let arguments = [arguments, &["--json"]].concat();
    serde_json::from_str(&printed(&arguments)).unwrap()
}

/// The message of a call that must fail with `code`, without a trace of a panic.
fn fails(code: i32, arguments: &[&str]) -> String {
    let output = run(arguments);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
    assert!(!message.contains("panicked"), "{arguments:?}: {message}");
    message
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A folder with small data sets in the published formats.
struct Data(tempfile::TempDir);

impl Data {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file and returns its path as text.
    fn file(&self, name: &str, content: &str) -> String {
        std::fs::write(self.path(name), content).unwrap();
        path(&self.path(name)).to_owned()
    }

    fn problems(&self, name: &str, count: usize) -> String {
        let line = |i: usize| {
            let question = format!(
                "Ana has {i} coins at home. Ben gives Ana 7 more. How many coins does Ana have now?"
            );
            let answer = format!(
                "Ana starts with {i} coins. {i} + 7 = {}.\n#### {}",
                i + 7,
                i + 7
            );
            json!({"question": question, "answer": answer}).to_string() + "\n"
        };
        self.file(name, &(10..10 + count).map(line).collect::<String>())
    }

    fn longbench(&self) -> (String, String) {
        let record = json!({
            "input": "Who fed the lobster?", "context": "Ana fed the lobster. ".repeat(20), "answers": ["Ana"],
            "length": 80, "dataset": "qasper", "language": "en", "all_classes": null, "_id": "x1",
        });
        self.file("qasper.jsonl", &format!("{record}\n"));
        let prompts = json!({"qasper": "{context}\nQuestion: {input}\nAnswer:"}).to_string();
        self.file("dataset2prompt.json", &prompts);
        self.file("dataset2maxlen.json", &json!({"qasper": 8}).to_string());
        let folder = path(self.0.path()).to_owned();
        (folder.clone(), folder)
    }

    fn questions(&self) -> String {
        let record = json!({
            "question_id": 7, "question": "How many legs has a lobster?", "options": ["ten", "two"], "answer": "A",
            "answer_index": 0, "cot_content": "", "category": "biology", "src": "made",
        });
        self.file("questions.jsonl", &format!("{record}\n"))
    }
}

#[test]
fn every_task_runs_and_names_what_it_measured() {
    let data = Data::new();
    let (test, train) = (
        data.problems("test.jsonl", 3),
        data.problems("train.jsonl", 6),
    );
    let (folder, prompts) = data.longbench();
    let questions = data.questions();
    let prose = "The lobster lives in the north. It has ten legs and no neighbours. ".repeat(60);
    let prose = data.file("prose.txt", &prose);
    let tasks: [(&str, &[&str], &[&str]); 9] = [
        (
            "problems",
            &["--shots", "1", "--items", "3", "--seed", "5"],
            &["kept"],
        ),
        (
            "gsm8k",
            &[
                "--data",
                &test,
                "--examples",
                &train,
                "--shots",
                "2",
                "--items",
                "2",
            ],
            &["kept"],
        ),
        (
            "longbench",
            &[
                "--data",
                &folder,
                "--prompts",
                &prompts,
                "--dataset",
                "qasper",
            ],
            &[],
        ),
        (
            "mmlu-pro",
            &["--data", &questions, "--subject", "biology"],
            &["kept"],
        ),
        (
            "needle",
            &["--length", "128", "--depth", "0.5", "--repeats", "1"],
            &["kept"],
        ),
        ("recall", &["--length", "96", "--repeats", "2"], &["kept"]),
        (
            "ruler",
            &[
                "--task",
                "niah_single_1,fwe",
                "--length",
                "640",
                "--repeats",
                "2",
            ],
            &[],
        ),
        (
            "perplexity",
            &["--corpus", &prose, "--context", "48", "--items", "2"],
            &[],
        ),
        (
            "divergence",
            &["--corpus", &prose, "--context", "48", "--items", "2"],
            &["percentile_99", "percentile_99.9", "agreement"],
        ),
    ];
    for (task, arguments, fields) in tasks {
        let caches = [
            "--cache",
            "lexico:sparsity=8,window=4,batch=1",
            "--cache",
            "kivi:bits=4,residual=32",
        ];
        let found = json(&[&[task], arguments, &caches].concat());
        assert_eq!(found["task"], task);
        assert_eq!(found["model"], "tiny");
        assert!(found["settings"].is_object() && found["versions"]["lexico"].is_string());
        assert!(
            found["seeds"].is_object() && found["measure"].is_string(),
            "{found}"
        );
        let runs = found["runs"].as_array().unwrap();
        let names: Vec<&str> = runs
            .iter()
            .map(|run| run["cache"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["full", caches[1], caches[3]]);
        for run in runs {
            for field in fields {
                assert!(!run[*field].is_null(), "{task}: {field} of {run}");
            }
            let number = |name: &str| run[name].as_f64();
            let (score, low, high) = (number("score").unwrap(), number("low"), number("high"));
            let within =
                low.is_some_and(|low| low <= score) && high.is_some_and(|high| score <= high);
            // Of the one item of a data set no interval is known.
            assert!(
                within || task == "longbench",
                "{task}: {low:?} {score} {high:?}"
            );
            let items = run["items"].as_array().unwrap();
            let shares = items.iter().map(|item| item["share"].as_f64().unwrap());
            let mean = shares.sum::<f64>() / items.len() as f64;
            assert!((run["share"].as_f64().unwrap() - mean).abs() < 1e-12);
            for item in items {
                assert!(
                    item["id"].is_string() && item["score"].is_number(),
                    "{item}"
                );
            }
        }
        let compared = runs[1..].iter().all(|run| {
            let beside = &run["beside_full"];
            let value = beside["value"].as_f64();
            let within = |low: f64, value: f64, high: f64| low <= value && value <= high;
            value.is_some_and(
                |value| match (beside["low"].as_f64(), beside["high"].as_f64()) {
                    (Some(low), Some(high)) => within(low, value, high),
                    _ => task == "longbench",
                },
            )
        });
        assert!(compared || task == "divergence", "{task}");
        assert!(runs[0]["beside_full"].is_null());
        if task == "divergence" {
            assert_eq!(runs[0]["score"], 0.0);
            assert!(runs[1]["score"].as_f64().unwrap() > 0.0);
        }
    }
    let found = json(&[
        "reconstruction",
        "--tokens",
        "64",
        "--cache",
        "turboquant:bits=3",
    ]);
    let rows = found["rows"].as_array().unwrap();
    let formats = rows
        .iter()
        .filter(|row| row["format"] == "turboquant:bits=3");
    // Four layers, keys and values.
    assert_eq!(formats.count(), 8);
    assert!(
        rows.iter()
            .all(|row| row["bits_per_number"].as_f64().unwrap() > 0.0)
    );
}

#[test]
fn tables_align_and_reports_are_whole() {
    let data = Data::new();
    let report = data.path("report");
    let arguments = [
        "problems",
        "--shots",
        "0",
        "--items",
        "2",
        "--cache",
        "all",
        "--budget",
        "30%",
        "--report",
        path(&report),
    ];
    let table = printed(&arguments);
    let lines: Vec<&str> = table.lines().collect();
    assert!(
        lines
            .iter()
            .all(|line| line.chars().count() == lines[0].chars().count()),
        "{table}"
    );
    for name in ["full", "lexico:", "turboquant:", "h2o:"] {
        assert!(table.contains(&format!("| {name}")), "{table}");
    }
    let results = std::fs::read_to_string(report.join("results.json")).unwrap();
    let results: Value = serde_json::from_str(&results).unwrap();
    assert_eq!(results["settings"]["budgets"], json!(["30%"]));
    // An answer may end earlier than with the full cache, for whose lengths the sizes are chosen.
    let held = |run: &Value| -> f64 {
        let items = run["items"].as_array().unwrap().iter();
        let number = |item: &Value, name: &str| item[name].as_f64().unwrap();
        items
            .map(|item| number(item, "share") * number(item, "positions"))
            .sum()
    };
    let runs = results["runs"].as_array().unwrap();
    for run in &runs[1..] {
        assert!(
            held(run) < 0.36 * held(&runs[0]),
            "{}: {}",
            run["cache"],
            held(run)
        );
    }
    let page = std::fs::read_to_string(report.join("report.html")).unwrap();
    assert!(page.contains("Prompts and answers") && page.ends_with("</html>\n"));
    let again = fails(1, &arguments);
    assert!(again.contains("holds a report already"), "{again}");
}

/// The results but for the time that they took.
fn results(report: &Path) -> Value {
    let text = std::fs::read_to_string(report.join("results.json")).unwrap();
    let mut results: Value = serde_json::from_str(&text).unwrap();
    results["seconds"].take();
    results
}

#[test]
fn a_killed_run_goes_on_with_the_same_results() {
    let data = Data::new();
    let (whole, broken) = (data.path("whole"), data.path("broken"));
    let arguments = |report: &str| {
        let fixed = [
            "problems",
            "--shots",
            "0",
            "--items",
            "6",
            "--batch-size",
            "2",
            "--seed",
            "1",
        ];
        let caches = [
            "--cache",
            "lexico:sparsity=6,window=16",
            "--cache",
            "h2o:capacity=60",
        ];
        let arguments = [&fixed[..], &caches, &["--report", report]].concat();
        arguments.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let own = arguments(path(&whole));
    printed(&own.iter().map(String::as_str).collect::<Vec<_>>());
    let own = arguments(path(&broken));
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    let progress = broken.join("progress.jsonl");
    let lines = || {
        std::fs::read(&progress).map_or(0, |bytes| bytes.iter().filter(|&&b| b == b'\n').count())
    };
    for wanted in [2, 5] {
        let mut arguments = own.clone();
        if wanted > 2 {
            arguments.push("--resume");
        }
        let mut child = command(&arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while lines() < wanted {
            assert!(started.elapsed() < Duration::from_secs(300), "no progress");
            assert!(
                child.try_wait().unwrap().is_none(),
                "it ended before {wanted} lines"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let refused = fails(1, &own);
    assert!(refused.contains("--resume"), "{refused}");
    printed(&[&own[..], &["--resume"]].concat());
    let (mut whole, mut broken) = (results(&whole), results(&broken));
    assert_eq!(whole["runs"].take(), broken["runs"].take());
}

/// A method that a budget cannot be asked of does not keep the others from running.
#[test]
fn what_does_not_go_with_a_budget_is_left_out() {
    let found = json(&[
        "problems",
        "--shots",
        "0",
        "--items",
        "2",
        "--cache",
        "snapkv:window=400",
        "--cache",
        "kivi:group=48",
        "--cache",
        "lexico:key-sparsity=4,value-sparsity=3",
        "--budget",
        "50%",
    ]);
    let skipped = found["skipped"].as_array().unwrap();
    assert_eq!(skipped.len(), 1, "{skipped:?}");
    assert_eq!(skipped[0]["cache"], "snapkv:window=400");
    let runs = found["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 3);
    assert!(runs[1]["cache"].as_str().unwrap().contains("group=48"));
    assert!(!runs[2]["cache"].as_str().unwrap().contains(",sparsity="));
}

#[test]
fn a_seed_decides_which_items_are_run() {
    let data = Data::new();
    let prose: String = (0..400)
        .map(|i| format!("The lobster number {i} lives in the north. "))
        .collect();
    let prose = data.file("prose.txt", &prose);
    let scores = |seed: &str| {
        let found = json(&[
            "perplexity",
            "--corpus",
            &prose,
            "--context",
            "48",
            "--items",
            "2",
            "--seed",
            seed,
        ]);
        found["runs"][0]["score"].as_f64().unwrap()
    };
    assert_eq!(scores("1"), scores("1"));
    assert_ne!(scores("1"), scores("2"));
}

#[test]
fn bad_input_is_named() {
    let data = Data::new();
    let good = data.problems("good.jsonl", 6);
    let no_field = data.file(
        "fields.jsonl",
        "{\"question\": \"a\", \"answer\": \"#### 1\"}\n{\"question\": \"b\"}\n",
    );
    let no_json = data.file("lines.jsonl", "not JSON\n");
    let empty = data.file("empty.jsonl", "\n");
    let no_number = data.file(
        "unmarked.jsonl",
        "{\"question\": \"a\", \"answer\": \"1\"}\n",
    );
    let (folder, prompts) = data.longbench();
    let gsm8k = |test: &str| fails(1, &["gsm8k", "--data", test, "--examples", &good]);
    for (message, parts) in [
        (gsm8k(&no_field), &["fields.jsonl, line 2", "answer"][..]),
        (gsm8k(&no_json), &["lines.jsonl, line 1"]),
        (gsm8k(&empty), &["empty.jsonl"]),
        (gsm8k("nowhere.jsonl"), &["nowhere.jsonl"]),
        (
            fails(
                1,
                &[
                    "gsm8k",
                    "--data",
                    &good,
                    "--examples",
                    &good,
                    "--shots",
                    "7",
                ],
            ),
            &["7 examples", "6"],
        ),
        (
            fails(
                1,
                &[
                    "longbench",
                    "--data",
                    &folder,
                    "--prompts",
                    &prompts,
                    "--dataset",
                    "trec",
                ],
            ),
            &["trec"],
        ),
        (
            fails(
                1,
                &[
                    "longbench",
                    "--data",
                    &folder,
                    "--prompts",
                    &prompts,
                    "--dataset",
                    "nonsense",
                ],
            ),
            &["nonsense", "qasper"],
        ),
        (fails(1, &["problems", "--items", "0"]), &["0 items"]),
        (
            fails(1, &["problems", "--shots", "501"]),
            &["501 examples", "500"],
        ),
        (
            fails(1, &["problems", "--shots", "100", "--items", "1"]),
            &["context of 4096"],
        ),
        (
            fails(1, &["problems", "--batch-size", "0"]),
            &["batch of 0"],
        ),
        (
            fails(1, &["problems", "--cache", "kivi", "--cache", "kivi"]),
            &["kivi is given twice"],
        ),
        (
            fails(
                1,
                &[
                    "problems",
                    "--cache",
                    "lexico:window=16,sparsity=8",
                    "--cache",
                    "lexico:sparsity=8.0,window=16",
                ],
            ),
            &["lexico:window=16,sparsity=8 and lexico:sparsity=8.0,window=16 are the same"][..],
        ),
        // Found before anything is run.
        (
            fails(
                1,
                &[
                    "problems",
                    "--cache",
                    "lexico",
                    "--cache",
                    "kivi:residual=0",
                ],
            ),
            &["residual=0"],
        ),
        (
            fails(
                1,
                &[
                    "problems",
                    "--cache",
                    "lexico:sparsity=8,key-sparsity=4,value-sparsity=4",
                ],
            ),
            &["sparsity=8", "leave it out"],
        ),
        (
            gsm8k(&no_number),
            &["unmarked.jsonl, line 1", "#### NUMBER"],
        ),
        (
            fails(1, &["needle", "--repeats", "9999999"]),
            &["9999999 repeats"],
        ),
        (
            fails(1, &["recall", "--length", "128,128"]),
            &["128 is named twice"],
        ),
        (
            fails(
                1,
                &[
                    "longbench",
                    "--data",
                    &folder,
                    "--prompts",
                    &prompts,
                    "--dataset",
                    "qasper,qasper",
                ],
            ),
            &["qasper is named twice"],
        ),
        (
            fails(
                1,
                &[
                    "longbench",
                    "--data",
                    &folder,
                    "--prompts",
                    &prompts,
                    "--max-length",
                    "0",
                ],
            ),
            &["0 tokens"],
        ),
        (
            fails(1, &["problems", "--report", &good]),
            &["good.jsonl", "no folder"],
        ),
        (
            fails(2, &["problems", "--cache", "kivy"]),
            &["kivy", "turboquant"],
        ),
        (fails(2, &["problems", "--budget", "20"]), &["20%"]),
        (fails(2, &["problems", "--resume"]), &["--report"]),
        (fails(1, &["needle", "--depth", "2"]), &["depth of 2"]),
        (fails(1, &["recall", "--length", "3"]), &["3 tokens"]),
        (fails(1, &["needle", "--chat"]), &["chat template"]),
        (
            fails(
                1,
                &[
                    "perplexity",
                    "--corpus",
                    &good,
                    "--field",
                    "question",
                    "--context",
                    "9999",
                ],
            ),
            &["4096"],
        ),
        (
            fails(
                1,
                &[
                    "reconstruction",
                    "--cache",
                    "h2o:capacity=20",
                    "--tokens",
                    "64",
                ],
            ),
            &["gives positions up"],
        ),
        (
            fails(1, &["reconstruction", "--tokens", "1"]),
            &["--tokens 1"],
        ),
    ] {
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message}");
        }
    }
}

#[test]
fn errors_are_told_by_position() {
    let data = Data::new();
    let prose = "The lobster lives in the north. It has ten legs and no neighbours. ".repeat(60);
    let prose = data.file("prose.txt", &prose);
    let fixed = ["--corpus", &prose, "--prompt", "24", "--items", "2"];
    let cache = ["--cache", "lexico:sparsity=4,window=4,batch=1"];
    for (task, own) in [
        ("divergence", false),
        ("divergence", true),
        ("perplexity", false),
    ] {
        let report = data.path(&format!("{task}-{own}"));
        let mut arguments = [
            &[task, "--context", "80", "--report", path(&report)],
            &fixed[..],
            &cache,
        ]
        .concat();
        if own {
            arguments.push("--own-text");
        }
        let table = printed(&arguments);
        for band in ["24–31", "32–63", "64–79"] {
            assert!(table.contains(band), "{table}");
        }
        let results = std::fs::read_to_string(report.join("results.json")).unwrap();
        let results: Value = serde_json::from_str(&results).unwrap();
        assert_eq!(
            results["settings"]["own_text"],
            if own { json!(true) } else { Value::Null }
        );
        let run = &results["runs"][1];
        let bands = run["bands"].as_array().unwrap();
        let number = |band: &Value, name: &str| band[name].as_f64().unwrap();
        let tokens: Vec<f64> = bands.iter().map(|band| number(band, "tokens")).collect();
        assert_eq!(tokens, [16.0, 64.0, 32.0]);
        // Together they are the score.
        let of = |score: f64| {
            if task == "perplexity" {
                score.ln()
            } else {
                score
            }
        };
        let all = bands
            .iter()
            .map(|band| of(number(band, "score")) * number(band, "tokens"));
        let mean = all.sum::<f64>() / 112.0;
        assert!((mean - of(number(run, "score"))).abs() < 1e-6, "{mean}");
        let page = std::fs::read_to_string(report.join("report.html")).unwrap();
        assert!(page.contains("By position") && page.matches("<svg").count() == 3);
    }
    // One band needs no table.
    let short = [&["divergence", "--context", "30"], &fixed[..], &cache].concat();
    assert!(!printed(&short).contains("By position"));
    let refused = [&["perplexity", "--context", "30", "--own-text"], &fixed[..]].concat();
    assert!(fails(1, &refused).contains("ask for the divergence"));
}

/// Answers are judged as a whole, wherever they stand; where there are more tasks than caches, each has a row.
#[test]
fn answers_are_told_by_task() {
    let fixed = ["ruler", "--repeats", "1", "--length"];
    let table =
        |lengths: &str, tasks: &str| printed(&[&fixed[..], &[lengths, "--task", tasks]].concat());
    let many = table("512,640", "niah_single_1,fwe");
    let rows: Vec<&str> = many.lines().filter(|row| row.starts_with("| ")).collect();
    let names = rows
        .iter()
        .map(|row| row[2..].split('|').next().unwrap().trim());
    let names: Vec<&str> = names.collect();
    let groups = [
        "niah_single_1, 512 tokens",
        "niah_single_1, 640 tokens",
        "fwe, 512 tokens",
        "fwe, 640 tokens",
    ];
    assert_eq!(names[..4], ["cache", "full", "lexico", ""], "{many}");
    let mut found = names[4..].to_vec();
    found.sort_unstable();
    let mut wanted = groups;
    wanted.sort_unstable();
    assert_eq!(found, wanted, "{many}");
    assert!(!many.contains("By position"), "{many}");
    let one = table("512", "fwe");
    assert!(one.contains("| cache  | fwe"), "{one}");
}

/// What the model writes is longer than the text that its prompts are from.
#[test]
fn own_text_goes_on_where_the_corpus_ends() {
    let data = Data::new();
    let prose = data.file(
        "prose.txt",
        "The lobster lives in the north. It has ten legs.",
    );
    let fixed = [
        "divergence",
        "--corpus",
        &prose,
        "--prompt",
        "6",
        "--context",
        "70",
        "--items",
        "1",
    ];
    let cache = ["--cache", "streaming-llm:sinks=2,window=8"];
    let own = [&fixed[..], &["--own-text"], &cache].concat();
    let run = &json(&own)["runs"][1];
    assert_eq!(run["items"][0]["divergences"].as_array().unwrap().len(), 64);
    assert!(run["score"].as_f64().unwrap() > 0.0);
}

/// Tokens that are read some at a time are those that are predicted one by one, whether or not a step divides them.
#[test]
fn steps_of_several_tokens_predict_the_same_text() {
    let data = Data::new();
    let prose = "The lobster lives in the north. It has ten legs and no neighbours. ".repeat(20);
    let prose = data.file("prose.txt", &prose);
    let fixed = [
        "perplexity",
        "--corpus",
        &prose,
        "--prompt",
        "24",
        "--context",
        "60",
        "--items",
        "2",
        "--cache",
        "full",
        "--cache",
        "lexico:window=64",
        "--cache",
        "lexico:sparsity=2,sinks=0,window=4,batch=1",
    ];
    let found = |step: &str| {
        let all = json(&[&fixed[..], &["--step", step]].concat());
        let step = all["settings"]["step"].clone();
        let losses = all["runs"].as_array().unwrap().iter().flat_map(|run| {
            let items = run["items"].as_array().unwrap().clone();
            items.into_iter().map(|item| {
                let losses = item["losses"].as_array().unwrap().clone();
                losses
                    .iter()
                    .map(|x| x.as_f64().unwrap())
                    .collect::<Vec<_>>()
            })
        });
        (step, losses.collect::<Vec<_>>())
    };
    let (step, single) = found("1");
    assert_eq!(step, Value::Null);
    assert_eq!(single.len(), 6);
    for count in ["7", "36"] {
        let (step, several) = found(count);
        assert_eq!(step.to_string(), count);
        let apart = |run: usize| {
            let pairs = single[2 * run..2 * run + 2].iter().zip(&several[2 * run..]);
            let losses = pairs.flat_map(|(a, b)| {
                assert_eq!(a.len(), b.len());
                a.iter().zip(b).map(|(a, b)| (a - b).abs())
            });
            losses.fold(0.0, f64::max)
        };
        // What keeps every position as it is cannot tell a step from its tokens; what codes them can.
        assert!(
            apart(0) < 1e-3 && apart(1) < 2e-2,
            "{} {}",
            apart(0),
            apart(1)
        );
        assert!(apart(2) > 2e-2, "{}", apart(2));
    }
    let refused = [&fixed[..], &["--step", "0"]].concat();
    assert!(fails(1, &refused).contains("a step of 0 tokens"));
}
