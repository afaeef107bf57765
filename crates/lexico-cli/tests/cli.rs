//! The program as a user meets it: output, exit codes, errors.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::collections::HashMap;
use std::io::{BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use lexico::dictionary::HeadMaps;
use lexico::tensor_file::{self, NewTensor, TensorFile};
use lexico::{DictionarySet, KeyValue};
use serde_json::Value;

const QUESTION: &str = "Question: Ana has 12 coins at home. Ben gives Ana 7 more. \
                        How many coins does Ana have now?\nAnswer:";

fn lexico() -> Command {
    Command::new(assert_cmd::cargo::cargo_bin!("lexico"))
}

fn run(arguments: &[&str]) -> Output {
    lexico()
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// One JSON document on stdout and nothing else.
fn json(arguments: &[&str]) -> Value {
    let output = run(arguments);
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        text(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The message of a call that must fail with `code`, without a trace of a panic.
fn fails(code: i32, arguments: &[&str]) -> String {
    let output = run(arguments);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
    assert!(!message.contains("panicked"), "{arguments:?}: {message}");
    assert!(
        output.stdout.is_empty(),
        "{arguments:?} printed {}",
        text(&output.stdout)
    );
    message
}

fn tiny_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../models/tiny")
        .join(name)
}

/// A copy of the embedded model without its dictionaries.
fn tiny_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        std::fs::copy(tiny_file(file), folder.path().join(file)).unwrap();
    }
    folder
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn words(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// Vectors that are easily made, the same everywhere.
fn write_vectors(file: &Path, n: usize, m: usize) -> Vec<f32> {
    let vectors: Vec<f32> = (0..n * m)
        .map(|i| ((i * i + 3 * i) % 101) as f32 / 50.0 - 1.0)
        .collect();
    tensor_file::write(
        file,
        &[NewTensor::f32("vectors", &[n, m], &vectors)],
        HashMap::new(),
    )
    .unwrap();
    vectors
}

#[test]
fn run_learns_dictionaries_where_there_are_none() {
    let (folder, home) = (tiny_folder(), tempfile::tempdir().unwrap());
    let model = path(folder.path());
    let corpus = folder.path().join("text.txt");
    let names = ["Ana", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus"];
    let sentences = (0..700).map(|i| {
        let (giver, taker) = (names[i % 7], names[(i / 7 + i) % 7]);
        format!(
            "{giver} has {} coins and gives {taker} {} of them. ",
            i * 37 % 91,
            i * 11 % 29
        )
    });
    std::fs::write(&corpus, sentences.collect::<String>()).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = lexico();
        command.args(["run", "--model", model, QUESTION, "-n", "4"]);
        command.args(arguments).env("XDG_DATA_HOME", home.path());
        command.stdin(Stdio::null()).output().unwrap()
    };
    // A script is not asked, but told.
    let output = run(&[]);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    for word in [
        "no dictionaries",
        "lexico train --model",
        "--learn",
        "--cache full",
    ] {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
    let missing = run(&["--learn", path(&folder.path().join("nothing.txt"))]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing.stderr).contains("nothing.txt"));

    let output = run(&["--learn", path(&corpus)]);
    let notes = text(&output.stderr);
    assert!(output.status.success(), "{notes}");
    for word in [
        "takes about",
        "codebooks",
        "for this and all later runs",
        "of FP16",
    ] {
        assert!(notes.contains(word), "{notes:?} lacks {word:?}");
    }
    let again = run(&[]);
    assert!(again.status.success(), "{}", text(&again.stderr));
    assert_eq!(again.stdout, output.stdout);
}

#[test]
fn run_prints_the_text_and_one_line_about_the_cache() {
    let output = run(&["run", QUESTION, "--cache", "full"]);
    assert!(output.status.success());
    assert!(
        text(&output.stdout).contains("#### 19"),
        "{}",
        text(&output.stdout)
    );
    let notes = text(&output.stderr);
    assert_eq!(notes.lines().count(), 1, "{notes}");
    for word in ["full", "of FP16", "prefill", "decode", "tokens/s"] {
        assert!(notes.contains(word), "{notes:?} lacks {word:?}");
    }
}

#[test]
fn run_json_is_one_document_with_every_field() {
    let report = json(&["run", "--json", "--max-tokens", "64", QUESTION]);
    assert!(report["text"].as_str().unwrap().contains("####"));
    assert!(report["prompt_tokens"].as_u64().unwrap() > 10);
    let generated = report["generated_tokens"].as_u64().unwrap();
    assert!((1..=64).contains(&generated));
    let cache = &report["cache"];
    assert_eq!(cache["method"], "lexico");
    let bytes = cache["bytes"].as_f64().unwrap();
    let fp16 = cache["fp16_bytes"].as_f64().unwrap();
    assert!((cache["ratio"].as_f64().unwrap() - bytes / fp16).abs() < 1e-9);
    // 4 layers, keys and values, f32 in memory.
    assert!(cache["dictionary_bytes"].as_u64().unwrap() > 4 * 2 * 64 * 4);
    assert!(report["prefill_seconds"].as_f64().unwrap() > 0.0);
    assert!(report["decode_tokens_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn the_prompt_comes_from_an_argument_a_file_or_stdin() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    // Editors and `echo` end a file with a line end; it is no part of the prompt.
    std::fs::write(&file, format!("{QUESTION}\n")).unwrap();
    let of = |arguments: &[&str], stdin: Stdio| {
        let output = lexico()
            .args(["run", "--cache", "full"])
            .args(arguments)
            .stdin(stdin)
            .output();
        text(&output.unwrap().stdout)
    };
    let expected = of(&[QUESTION], Stdio::null());
    assert!(expected.contains("19"));
    let open = || Stdio::from(std::fs::File::open(&file).unwrap());
    assert_eq!(of(&["--file", path(&file)], Stdio::null()), expected);
    assert_eq!(of(&[], open()), expected);
    assert_eq!(of(&["-"], open()), expected);
}

#[test]
fn compare_says_what_agrees_and_what_each_weighs() {
    let report = json(&[
        "run",
        "--json",
        "--compare",
        "--cache",
        "lexico:sparsity=16,window=8",
        QUESTION,
    ]);
    let compare = &report["compare"];
    let agreeing = compare["agreeing_tokens"].as_u64().unwrap();
    assert!(agreeing <= report["generated_tokens"].as_u64().unwrap());
    assert_eq!(compare["full"]["cache"]["method"], "full");
    assert_eq!(compare["full"]["cache"]["dictionary_bytes"], 0);
    assert_eq!(compare["full"]["cache"]["pays_from_positions"], Value::Null);
    // What is saved a position makes the dictionaries good there, and not before.
    let number = |name: &str| report["cache"][name].as_f64().unwrap();
    let saved = (number("fp16_bytes") - number("bytes")) / number("positions");
    let pays = number("pays_from_positions");
    assert!(saved * pays > number("dictionary_bytes"));
    assert!(saved * (pays - 1.0) <= number("dictionary_bytes") * (1.0 + 1e-9));
    let weight = |r: &Value| r["cache"]["bytes"].as_u64().unwrap();
    assert!(weight(&report) < weight(&compare["full"]));
    let itself = json(&["run", "--json", "--compare", "--cache", "full", QUESTION]);
    assert_eq!(itself["compare"]["first_difference"], Value::Null);
    assert_eq!(
        itself["compare"]["agreeing_tokens"],
        itself["generated_tokens"]
    );
}

#[test]
fn sampling_repeats_with_its_seed() {
    let of = |seed: &str| {
        let flags = [
            "run", "--json", "--temp", "1.5", "--top-k", "0", "--top-p", "1", "--min-p", "0",
        ];
        let report = json(&[&flags[..], &["--seed", seed, "-n", "24", "= Lobster ="]].concat());
        report["text"].as_str().unwrap().to_owned()
    };
    assert_eq!(of("3"), of("3"));
    assert_ne!(of("3"), of("4"));
}

#[test]
fn a_stop_text_ends_the_answer() {
    let report = json(&["run", "--json", "--stop", "####", QUESTION]);
    assert_eq!(report["finish"], "stop");
    assert!(!report["text"].as_str().unwrap().contains('#'));
}

#[test]
fn llama_cpp_flags_are_known() {
    let of = |arguments: &[&str]| {
        let report = json(&[&["run", "--json", "--cache", "full"], arguments].concat());
        (
            report["text"].as_str().unwrap().to_owned(),
            report["finish"].as_str().unwrap().to_owned(),
        )
    };
    let expected = of(&[QUESTION]);
    assert_eq!(of(&["-p", QUESTION]), expected);
    assert_eq!(
        of(&[
            "-p",
            QUESTION,
            "-n",
            "-1",
            "--seed",
            "-1",
            "--repeat-last-n",
            "-1"
        ]),
        expected
    );
    assert_eq!(of(&["-p", QUESTION, "-c", "40"]).1, "context_full");
    assert_eq!(of(&["-p", QUESTION, "-r", "\\n####"]).1, "stop");
    assert_eq!(of(&["-m", path(&tiny_file("")), QUESTION]), expected);
    assert_eq!(of(&["--quantize", "q8_0", QUESTION]), expected);
}

/// A model with a chat template answers; plain text is still to be had.
#[test]
fn a_chat_template_is_used_unless_told_otherwise() {
    let folder = tiny_folder();
    let model = path(folder.path());
    let template = folder.path().join("chat_template.jinja");
    let source = "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n\
                  {% else %}Question: {{ m.content }}\n{% endif %}{% endfor %}\
                  {% if add_generation_prompt %}Answer:{% endif %}";
    std::fs::write(&template, source).unwrap();
    let question =
        "Ana has 12 coins at home. Ben gives Ana 7 more. How many coins does Ana have now?";
    let of = |more: &[&str]| {
        let arguments = [
            &[
                "run", "--json", "-m", model, "--cache", "full", "--stop", "\\n\\n",
            ],
            more,
        ]
        .concat();
        json(&arguments)
    };
    let chat = of(&[question]);
    assert!(
        chat["text"].as_str().unwrap().ends_with("#### 19"),
        "{chat}"
    );
    let same_text = of(&["--no-chat", QUESTION]);
    assert_eq!(
        (&chat["text"], &chat["prompt_tokens"]),
        (&same_text["text"], &same_text["prompt_tokens"])
    );
    let told = of(&["--system-prompt", "Solve it.", question]);
    assert!(told["prompt_tokens"].as_u64() > chat["prompt_tokens"].as_u64());

    std::fs::write(&template, "{% if %}").unwrap();
    let message = fails(1, &["run", "-m", model, "--cache", "full", question]);
    assert!(
        message.contains("--no-chat") && message.contains("does not parse"),
        "{message}"
    );
    of(&["--no-chat", QUESTION]);
    std::fs::remove_file(&template).unwrap();
    let message = fails(
        1,
        &[
            "run",
            "-m",
            model,
            "--cache",
            "full",
            "--system-prompt",
            "x",
            question,
        ],
    );
    assert!(message.contains("has none"), "{message}");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let mut child = lexico()
        .args([
            "run",
            "--ignore-eos",
            "-n",
            "2000",
            "--cache",
            "full",
            "= Lobster =",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "");
}

/// A damaged dictionary beside a model stops the caches that need it, and nothing else.
#[test]
fn a_model_folder_runs_with_and_without_its_dictionary() {
    let folder = tiny_folder();
    let model = path(folder.path());
    let dictionary = folder.path().join("dictionary.safetensors");
    let message = fails(1, &["run", "-m", model, QUESTION]);
    assert!(
        message.contains("lexico train --model") && message.contains(model),
        "{message}"
    );
    std::fs::write(&dictionary, "nonsense, but long enough").unwrap();
    let message = fails(1, &["run", "-m", model, QUESTION]);
    assert!(message.contains("dictionary.safetensors"), "{message}");
    json(&["run", "--json", "-m", model, "--cache", "full", QUESTION]);
    std::fs::copy(tiny_file("dictionary.safetensors"), &dictionary).unwrap();
    json(&["run", "--json", "-m", model, QUESTION]);
}

#[test]
fn bad_prompts_models_and_caches_fail_clearly() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty.txt");
    std::fs::write(&empty, "").unwrap();
    let binary = folder.path().join("binary.txt");
    std::fs::write(&binary, [0xff, 0xfe, 0]).unwrap();
    let long = folder.path().join("long.txt");
    std::fs::write(&long, "lobster eggs ".repeat(4000)).unwrap();
    let nowhere = folder.path().join("nowhere");
    let other = folder.path().join("other.safetensors");
    write_vectors(&other, 3, 4);
    let cases: Vec<(i32, Vec<&str>, &str)> = vec![
        (1, vec!["run", ""], "prompt is empty"),
        (1, vec!["run", " \n"], "prompt is empty"),
        (1, vec!["run", "--file", path(&empty)], "prompt is empty"),
        (1, vec!["run"], "prompt is empty"),
        (1, vec!["run", "--file", path(&binary)], "binary.txt"),
        (1, vec!["run", "--file", path(&nowhere)], "nowhere"),
        (1, vec!["run", "--file", path(&long)], "context of 4096"),
        (1, vec!["run", "--model", path(&nowhere), "x"], "nowhere"),
        (
            1,
            vec!["run", "--model", path(folder.path()), "x"],
            "no config.json",
        ),
        (
            1,
            vec!["run", "--dictionary", path(&other), "x"],
            "lexico train",
        ),
        (
            1,
            vec!["run", "--dictionary", path(&nowhere), "x"],
            "nowhere",
        ),
        (2, vec!["run", "--cache", "kivvy", "x"], "lexico, full"),
        (
            2,
            vec!["run", "--cache", "lexico:sparsty=3", "x"],
            "sparsity, key-sparsity",
        ),
        (
            1,
            vec!["run", "--cache", "lexico:sparsity=0", "x"],
            "from 1 to 32",
        ),
        (
            1,
            vec!["run", "--cache", "lexico:sparsity=65", "x"],
            "from 1 to 32",
        ),
        (
            2,
            vec!["run", "--cache", "lexico:sparsity=many", "x"],
            "sparsity=many",
        ),
        (2, vec!["run", "--max-tokens", "-2", "x"], "max-tokens"),
        (1, vec!["run", "--temp=-1", "x"], "temperature"),
        (2, vec!["run", "--threads", "0", "x"], "threads"),
        (
            2,
            vec!["run", "--quantize", "q5_1", "x"],
            "q8_0, q6_k, q4_k",
        ),
        (
            2,
            vec!["bench", "decode", "--shape", "gpt-9"],
            "llama-3.2-1b",
        ),
        (
            1,
            vec!["bench", "pursuit", "--packed", "-s", "500"],
            "cargo bench -p lexico --bench pursuit",
        ),
        (
            1,
            vec!["bench", "attention"],
            "cargo bench -p lexico --bench attention",
        ),
        (1, vec!["bench", "decode", "--context", "131072"], "131072"),
        (1, vec!["bench", "decode", "--steps", "0"], "--steps"),
        (2, vec!["fly"], "fly"),
        (2, vec![], "Usage"),
    ];
    for (code, arguments, word) in cases {
        let message = fails(code, &arguments);
        assert!(
            message.contains(word),
            "{arguments:?}: {message:?} does not name {word:?}"
        );
    }
}

#[test]
fn a_device_that_is_not_there_is_said() {
    for command in [&["run", "x"], &["bench", "decode"]] {
        let with = |device| [&command[..], &["--device", device]].concat();
        // A build for GPUs says that there is no such GPU, or no driver.
        let message = fails(1, &with("cuda:77"));
        assert!(message.contains("the device"), "{message}");
        if !cfg!(feature = "cuda") {
            assert!(message.contains("--features cuda"), "{message}");
        }
        let message = fails(2, &with("gpu"));
        assert!(message.contains("cuda:N"), "{message}");
    }
    let run = json(&["run", "--device", "cpu", "-n", "2", "--json", QUESTION]);
    assert_eq!(
        run["text"],
        json(&["run", "-n", "2", "--json", QUESTION])["text"]
    );
}

#[test]
fn help_lists_the_caches_and_their_options() {
    let help = text(&run(&["run", "--help"]).stdout);
    for word in [
        "lexico",
        "full",
        "sparsity",
        "window",
        "tolerance",
        "[default: 128]",
        "llama-cpp",
        "fp8",
        "vllm-turboquant",
        "kvarn",
        "oscar",
        "random",
        "dense-layers",
    ] {
        assert!(help.contains(word), "{help}");
    }
}

/// Rotations found on a text of its own belong to the model, those of a prompt to its cache.
#[test]
fn a_calibration_is_no_part_of_a_cache() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (text, empty, nowhere) = (file("text.txt"), file("empty.txt"), file("nowhere.txt"));
    std::fs::write(&text, "Ana has 12 coins. ".repeat(20)).unwrap();
    std::fs::write(&empty, "").unwrap();
    let arguments = ["run", "--json", "-n", "2", "--cache", "oscar", QUESTION];
    let bytes = |arguments: &[&str]| json(arguments)["cache"]["bytes"].as_u64().unwrap();
    let on = ["--calibration", path(&text)];
    let calibrated = bytes(&[&arguments[..], &on].concat());
    // Four layers, keys and values, 64 by 64 numbers and two counts each.
    assert_eq!(bytes(&arguments) - calibrated, 4 * 2 * (64 * 64 * 4 + 16));
    for (file, words) in [(&empty, "no text"), (&nowhere, "nowhere.txt")] {
        let on = ["--calibration", path(file)];
        let message = fails(1, &[&arguments[..], &on].concat());
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn vectors_are_coded_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (input, codes, output) = (
        file("in.safetensors"),
        file("codes.safetensors"),
        file("out.safetensors"),
    );
    let vectors = write_vectors(&input, 40, 64);
    let dictionary = tiny_file("dictionary.safetensors");
    let flags = [
        "--dictionary",
        path(&dictionary),
        "--tensor",
        "layers.0.keys",
        "--json",
    ];
    let mut errors = Vec::new();
    for (sparsity, more) in [
        ("8", &["--format", "i8"][..]),
        ("8", &["--format", "f8"]),
        ("8", &["--format", "f32"]),
        ("64", &["--format", "f32"]),
        ("64", &["--tolerance", "0.3", "--format", "f32"]),
        ("8", &["--format", "packed", "--beam", "2"]),
        ("8", &[]),
    ] {
        let report = json(
            &[
                &[
                    "encode",
                    path(&input),
                    "--out",
                    path(&codes),
                    "--sparsity",
                    sparsity,
                    "--fit",
                    "least-squares",
                ],
                &flags[..],
                more,
            ]
            .concat(),
        );
        assert_eq!(
            (&report["vectors"], &report["sparsity"]),
            (&40.into(), &sparsity.parse::<u64>().unwrap().into())
        );
        let file = TensorFile::open(&codes).unwrap();
        // Additive codes are the default, as they are of `run`.
        let sparse =
            more.first() == Some(&"--tolerance") || more.get(1).is_some_and(|f| *f != "packed");
        if sparse {
            let (kind, shape) = file.info("indices").unwrap();
            assert_eq!(
                (format!("{kind:?}").as_str(), shape),
                ("U16", &[40, sparsity.parse().unwrap()][..])
            );
        }
        assert_eq!(file.info("lengths").is_ok(), more.contains(&"--tolerance"));

        json(&[
            "decode",
            path(&codes),
            "--dictionary",
            path(&dictionary),
            "--out",
            path(&output),
            "--json",
        ]);
        let (decoded, shape) = TensorFile::open(&output)
            .unwrap()
            .f32_tensor("vectors", 2)
            .unwrap();
        assert_eq!(shape, [40, 64]);
        let error = lexico::mean_relative_error(&vectors, &decoded, 64);
        let reported = report["mean_relative_error"].as_f64().unwrap();
        assert!(
            (f64::from(error) - reported).abs() < 1e-6,
            "{error} for {reported}"
        );
        errors.push(reported);
        if !sparse {
            assert_eq!(report["bytes"], 40 * (8 + 1));
        } else if sparsity == "8" && !more.contains(&"f32") {
            assert_eq!(report["bytes"], 40 * (3 * 8 + 1));
        }
    }
    assert!(
        errors[2] <= errors[0].min(errors[1])
            && errors[3] < 1e-4
            && errors[4] <= 0.3
            && errors[6] < errors[5],
        "{errors:?}"
    );
}

/// The embedded model's dictionaries, with maps of its heads.
fn write_mapped_dictionary(file: &Path) -> HeadMaps {
    let mut set = DictionarySet::load(tiny_file("dictionary.safetensors")).unwrap();
    let (heads, m) = (set.model.kv_heads, set.model.head_dim);
    let means: Vec<f32> = (0..heads * m).map(|i| (i % 7) as f32 / 10.0).collect();
    let number = |i: usize| match i % (m * m) % (m + 1) {
        0 => 1.5 + (i / (m * m)) as f32,
        _ => ((i * i) % 13) as f32 / 500.0,
    };
    let matrices: Vec<f32> = (0..heads * m * m).map(number).collect();
    let maps = HeadMaps::new(&means, &matrices, m).unwrap();
    for layer in &mut set.layers {
        let own = Arc::new(maps.clone());
        layer.maps = Some(KeyValue::new(own.clone(), own));
    }
    set.save(file).unwrap();
    maps
}

#[test]
fn vectors_of_a_head_are_coded_behind_its_map_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (input, codes, output, dictionary) = (
        file("in.safetensors"),
        file("codes.safetensors"),
        file("out.safetensors"),
        file("dictionary.safetensors"),
    );
    let maps = write_mapped_dictionary(&dictionary);
    let heads = maps.heads();
    let vectors = write_vectors(&input, 40, 64);
    let plain = tiny_file("dictionary.safetensors");
    let encode = |dictionary: &Path, more: &[&str]| -> Vec<String> {
        let own = [
            "encode",
            path(&input),
            "--dictionary",
            path(dictionary),
            "--tensor",
            "layers.0.keys",
            "--sparsity",
            "12",
            "--out",
            path(&codes),
        ];
        own.iter()
            .chain(more)
            .map(|&word| word.to_owned())
            .collect()
    };
    let decode = |dictionary: &Path| {
        [
            "decode",
            path(&codes),
            "-d",
            path(dictionary),
            "-o",
            path(&output),
        ]
        .map(str::to_owned)
    };
    let mut all = Vec::new();
    for head in 0..heads {
        let head = head.to_string();
        let report = json(&words(&encode(&dictionary, &["--head", &head, "--json"])));
        json(&words(
            &[&decode(&dictionary)[..], &["--json".to_owned()]].concat(),
        ));
        let decoded = TensorFile::open(&output).unwrap();
        let (decoded, _) = decoded.f32_tensor("vectors", 2).unwrap();
        // In the original space.
        let error = f64::from(lexico::mean_relative_error(&vectors, &decoded, 64));
        let reported = report["mean_relative_error"].as_f64().unwrap();
        assert!((error - reported).abs() < 1e-6, "{error} for {reported}");
        all.push(decoded);
        let facts = json(&["inspect", path(&codes), "--json"]);
        assert_eq!(facts["head"].to_string(), head);
        let facts = text(&run(&["inspect", path(&codes)]).stdout);
        assert!(facts.contains(&format!("of KV head {head}")), "{facts}");
        // Codes of the file's own dictionary, but without its maps.
        let message = fails(1, &words(&decode(&plain)));
        assert!(message.contains("another dictionary"), "{message}");
    }
    assert_ne!(all[0], all[1], "each head has a map of its own");
    let most = format!("0 to {}", heads - 1);
    let count = format!("{heads} KV heads");
    let beyond = heads.to_string();
    let [most, count, beyond] = [&most, &count, &beyond].map(|text| text.as_str());
    for (dictionary, more, wanted) in [
        (&dictionary, &[][..], vec!["--head", count, most]),
        (
            &dictionary,
            &["--head", beyond],
            vec!["--head", count, most],
        ),
        (
            &dictionary,
            &["--head", "0", "--format", "i8"],
            vec!["--head", "sparse"],
        ),
        (&plain, &["--head", "0"], vec!["--head", "no maps"]),
    ] {
        let message = fails(1, &words(&encode(dictionary, more)));
        assert!(
            wanted.iter().all(|word| message.contains(word)),
            "{more:?}: {message}"
        );
    }
    fails(2, &words(&encode(&dictionary, &["--head=-1"])));
    // Sparse codes need no head, and codes of earlier files no maps.
    json(&words(&encode(&dictionary, &["--format", "i8", "--json"])));
    json(&words(
        &[&decode(&dictionary)[..], &["--json".to_owned()]].concat(),
    ));
    json(&words(&encode(&plain, &["--json"])));
    json(&words(
        &[&decode(&dictionary)[..], &["--json".to_owned()]].concat(),
    ));
    let facts = json(&["inspect", path(&dictionary), "--json"]);
    assert_eq!(facts["maps"], true);
    assert_eq!(json(&["inspect", path(&plain), "--json"])["maps"], false);
}

#[test]
fn an_unknown_level_of_the_processor_is_refused() {
    let mut command = lexico();
    command
        .args(["run", "-n", "1", "Ana"])
        .env("LEXICO_LEVEL", "avx3");
    let output = command.stdin(Stdio::null()).output().unwrap();
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(
        message.contains("LEXICO_LEVEL=\"avx3\"") && message.contains("portable"),
        "{message}"
    );
}

#[test]
fn vectors_that_cannot_be_coded_fail_clearly() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.safetensors");
    let out = folder.path().join("out.safetensors");
    let mut vectors = write_vectors(&input, 4, 64);
    let dictionary = tiny_file("dictionary.safetensors");
    let encode = |more: &[&str]| {
        let mut arguments = vec!["encode", path(&input), "--dictionary", path(&dictionary)];
        arguments.extend(more);
        fails(if more.contains(&"some") { 2 } else { 1 }, &arguments)
    };
    let good = ["--tensor", "layers.0.keys", "--out", path(&out)];
    for (more, word) in [
        (vec!["--sparsity", "0"], "between 1 and 32"),
        (vec!["--sparsity", "33"], "between 1 and 32"),
        (
            vec!["--sparsity", "65", "--format", "i8"],
            "between 1 and 64",
        ),
        (vec!["--sparsity", "some"], "some"),
        (vec!["--sparsity", "4", "--tolerance", "2"], "--format i8"),
        (
            vec!["--sparsity", "4", "--tolerance", "2", "--format", "i8"],
            "tolerance 2",
        ),
        (
            vec!["--sparsity", "4", "--beam", "2", "--format", "i8"],
            "--beam",
        ),
    ] {
        let message = encode(&[&good[..], &more].concat());
        assert!(message.contains(word), "{more:?}: {message:?}");
    }
    let message = encode(&[
        "--tensor",
        "layers.9.keys",
        "--sparsity",
        "4",
        "--out",
        path(&out),
    ]);
    assert!(
        message.contains("layers.9.keys") && message.contains("layers.0.keys"),
        "{message}"
    );
    let nowhere = folder.path().join("no/folder/out");
    let message = encode(&[
        "--tensor",
        "layers.0.keys",
        "--sparsity",
        "4",
        "--out",
        path(&nowhere),
    ]);
    assert!(message.contains("no/folder/out"), "{message}");
    for bad in [f32::NAN, f32::INFINITY] {
        vectors[2 * 64 + 7] = bad;
        tensor_file::write(
            &input,
            &[NewTensor::f32("vectors", &[4, 64], &vectors)],
            HashMap::new(),
        )
        .unwrap();
        let message = encode(&[&good[..], &["--sparsity", "4"]].concat());
        assert!(message.contains("vector 2"), "{message}");
    }
    write_vectors(&input, 4, 32);
    let message = encode(&[&good[..], &["--sparsity", "4"]].concat());
    assert!(message.contains("length 32"), "{message}");
    tensor_file::write(
        &input,
        &[NewTensor::f32("keys", &[1, 64], &[0.0; 64])],
        HashMap::new(),
    )
    .unwrap();
    let message = encode(&[&good[..], &["--sparsity", "4"]].concat());
    assert!(
        message.contains("\"vectors\"") && message.contains("keys"),
        "{message}"
    );
    assert!(!out.exists());
}

/// A lossy result must not replace what it came of.
#[test]
fn no_command_writes_over_its_input() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.safetensors");
    write_vectors(&input, 4, 64);
    let corpus = folder.path().join("corpus.txt");
    write_corpus(&corpus);
    let weights = folder.path().join("model.safetensors");
    std::fs::copy(tiny_file("model.safetensors"), &weights).unwrap();
    let dictionary = tiny_file("dictionary.safetensors");
    let before: Vec<_> = [&input, &corpus, &weights]
        .map(|f| std::fs::read(f).unwrap())
        .into();
    for (arguments, word) in [
        (
            vec![
                "encode",
                path(&input),
                "-d",
                path(&dictionary),
                "--tensor",
                "layers.0.keys",
                "-s",
                "4",
                "-o",
                path(&input),
            ],
            "is read here",
        ),
        (
            vec!["train", "--corpus", path(&corpus), "-o", path(&corpus)],
            "is read here",
        ),
        (
            vec!["train", "--corpus", path(&corpus), "-o", path(&weights)],
            "no dictionary",
        ),
    ] {
        let message = fails(1, &arguments);
        assert!(message.contains(word), "{arguments:?}: {message:?}");
    }
    let after: Vec<_> = [&input, &corpus, &weights]
        .map(|f| std::fs::read(f).unwrap())
        .into();
    assert_eq!(before, after);
}

#[test]
fn inspect_tells_dictionaries_codes_models_and_tensors_apart() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.safetensors");
    let codes = folder.path().join("codes.safetensors");
    write_vectors(&input, 4, 64);
    let dictionary = tiny_file("dictionary.safetensors");
    json(&[
        "encode",
        path(&input),
        "--dictionary",
        path(&dictionary),
        "--tensor",
        "layers.1.values",
        "--sparsity",
        "4",
        "--out",
        path(&codes),
        "--json",
    ]);
    for (file, kind) in [
        (&dictionary, "dictionaries"),
        (&codes, "codes"),
        (&input, "tensors"),
        (&tiny_file("model.safetensors"), "tensors"),
        (&tiny_file(""), "model"),
    ] {
        assert_eq!(json(&["inspect", path(file), "--json"])["kind"], kind);
        let output = run(&["inspect", path(file)]);
        assert!(output.status.success() && text(&output.stdout).contains(kind));
    }
    std::fs::write(&input, "neither").unwrap();
    assert!(fails(1, &["inspect", path(&input)]).contains("not a safetensors file"));
}

/// A text long enough to learn a few atoms from.
fn write_corpus(file: &Path) {
    let sentence = |i: usize| {
        format!(
            "In the year {i} the lobster of the north had {} eggs. ",
            i * 7
        )
    };
    std::fs::write(file, (0..60).map(sentence).collect::<String>()).unwrap();
}

#[test]
fn train_publishes_what_it_learned() {
    let folder = tempfile::tempdir().unwrap();
    let (corpus, out) = (
        folder.path().join("corpus.txt"),
        folder.path().join("d.safetensors"),
    );
    let published = folder.path().join("published");
    write_corpus(&corpus);
    let train = |more: &[&str]| {
        let settings = "--context 128 --tokens 2000 --vectors 600 --codebooks 4 --first-codebook 256 --effort quick --json";
        let given = ["train", "--corpus", path(&corpus), "--out", path(&out)];
        let all = given.into_iter().chain(settings.split(' '));
        all.chain(more.iter().copied())
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let message = fails(2, &words(&train(&["--license", "mit"])));
    assert!(message.contains("--publish-folder"), "{message}");
    // What is wrong with the folder is found before anything is learned.
    let message = fails(1, &words(&train(&["--publish-folder", path(&corpus)])));
    assert!(message.contains("corpus.txt") && !out.exists(), "{message}");
    let more = [
        "--publish-folder",
        path(&published),
        "--license",
        "mit",
        "--base-model",
        "org/tiny",
    ];
    json(&words(&train(&more)));
    assert_eq!(
        std::fs::read(published.join("tiny-quick.safetensors")).unwrap(),
        std::fs::read(&out).unwrap()
    );
    let card = std::fs::read_to_string(published.join("README.md")).unwrap();
    for line in [
        "base_model: org/tiny\nlicense: mit\n",
        "| effort | quick |",
        "| seed | 0 |",
        "| time it took | ",
        "tokens (their CRC-32: ",
        "of corpus.txt |",
    ] {
        assert!(card.contains(line), "{line} in {card}");
    }
    json(&["run", "--json", "--dictionary", path(&published), QUESTION]);
}

#[test]
fn train_writes_a_dictionary_that_run_takes() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = folder.path().join("corpus.txt");
    let out = folder.path().join("d.safetensors");
    write_corpus(&corpus);
    let report = json(&[
        "train",
        "--corpus",
        path(&corpus),
        "--atoms",
        "64",
        "--sparsity",
        "4",
        "--epochs",
        "2",
        "--batch",
        "64",
        "--context",
        "128",
        "--codebooks",
        "0",
        "--out",
        path(&out),
        "--json",
    ]);
    assert_eq!(report["layers"].as_array().unwrap().len(), 4);
    for layer in report["layers"].as_array().unwrap() {
        for part in ["keys", "values"] {
            assert!(layer[part]["relative_error"].as_f64().unwrap() > 0.0);
        }
    }
    let run = json(&["run", "--json", "--dictionary", path(&out), QUESTION]);
    // In f16 as they lie in the file; a text this short is not coded.
    let numbers = 4 * 2 * 64 * 64;
    assert_eq!(run["cache"]["dictionary_bytes"], 2 * numbers);
    assert_eq!(json(&["inspect", path(&out), "--json"])["sparsity"], 4);
}

#[test]
fn train_codes_heads_and_layers_together() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = folder.path().join("corpus.txt");
    let out = folder.path().join("d.safetensors");
    write_corpus(&corpus);
    let train = |more: &[&'static str]| -> Vec<String> {
        let own = ["train", "--corpus", path(&corpus), "--out", path(&out)];
        let few = [
            "--codebooks",
            "2",
            "--first-codebook",
            "64",
            "--context",
            "128",
            "--json",
        ];
        let all = own.iter().chain(&few).chain(more);
        all.map(|&word| word.to_owned()).collect()
    };
    let joint = train(&[
        "--joint-heads",
        "2",
        "--joint-layers",
        "2",
        "--effort",
        "quick",
    ]);
    let report = json(&words(&joint));
    assert_eq!(report["layers"].as_array().unwrap().len(), 4);
    let inspected = json(&["inspect", path(&out), "--json"]);
    let facts = ["joint_heads", "joint_layers"].map(|name| inspected[name].as_u64());
    assert_eq!(facts, [Some(2), Some(2)]);
    assert_eq!(inspected["layers"].as_array().unwrap().len(), 2);
    let shown = text(&run(&["inspect", path(&out)]).stdout);
    assert!(
        shown.contains("2 heads together, 2 layers together"),
        "{shown}"
    );
    // A short window, so that there are codes; then on from a saved cache.
    let cache = "--cache=lexico:window=8,batch=4,sparsity=2";
    let saved = folder.path().join("saved");
    let own = ["run", "--json", "--dictionary", path(&out), cache];
    let whole = json(&[&own[..], &["-n", "12", QUESTION]].concat());
    json(
        &[
            &own[..],
            &["-n", "5", "--save-cache", path(&saved), QUESTION],
        ]
        .concat(),
    );
    let rest = [
        "run",
        "--json",
        "--dictionary",
        path(&out),
        "--load-cache",
        path(&saved),
        "-n",
        "7",
    ];
    let rest = json(&rest);
    let written = |run: &Value| run["text"].as_str().unwrap().to_owned();
    assert!(written(&whole).ends_with(&written(&rest)), "{whole} {rest}");
    // A single head has no codes of its own.
    let vectors = folder.path().join("in.safetensors");
    write_vectors(&vectors, 3, 64);
    let codes = folder.path().join("codes");
    let given = [
        "encode",
        path(&vectors),
        "--dictionary",
        path(&out),
        "--sparsity",
        "2",
        "--out",
    ];
    let tensor = ["--tensor", "layers.0.keys", "--head", "0"];
    let refused = fails(1, &[&given[..], &[path(&codes)], &tensor].concat());
    assert!(refused.contains("4 heads are coded together"), "{refused}");
    for (more, needed) in [
        (&["--joint-heads", "3"][..], "2 KV heads"),
        (&["--joint-heads", "0"], "2 KV heads"),
        (&["--joint-layers", "3"], "4 layers"),
        (&["--joint-layers", "2", "--atoms", "64"], "one layer each"),
    ] {
        let refused = fails(1, &words(&train(more)));
        assert!(refused.contains(needed), "{more:?}: {refused}");
    }
    let sparse = [
        "train",
        "--corpus",
        path(&corpus),
        "--out",
        path(&out),
        "--codebooks",
        "0",
    ];
    let refused = fails(1, &[&sparse[..], &["--joint-heads", "2"]].concat());
    assert!(refused.contains("--joint-heads"), "{refused}");
}

#[test]
fn train_adds_codebooks_to_dictionaries_that_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let [pt, plain, out, corpus] = ["d.pt", "plain.safetensors", "d.safetensors", "corpus.txt"]
        .map(|name| folder.path().join(name));
    write_corpus(&corpus);
    let own = tiny_file("dictionary.safetensors");
    let output = run(&["export", path(&own), "--out", path(&pt)]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let import = [
        "import",
        path(&pt),
        "--model",
        "tiny",
        "--out",
        path(&plain),
    ];
    assert!(run(&import).status.success());
    let settings = ["--context", "128", "--tokens", "4000", "--vectors", "500"];
    let codebooks = ["--codebooks", "3", "--first-codebook", "32"];
    let texts = ["--corpus", path(&corpus), "--out", path(&out)];
    for from in [&own, &plain, &pt] {
        let given = ["train", "--json", "--dictionary", path(from)];
        let report = json(&[&given[..], &texts, &settings, &codebooks].concat());
        assert_eq!(
            (&report["groups"], &report["packed_sparsity"]),
            (&3.into(), &3.into())
        );
        let before = DictionarySet::load(&plain).unwrap();
        let after = DictionarySet::load(&out).unwrap();
        for (l, (before, after)) in before.layers.iter().zip(&after.layers).enumerate() {
            assert_eq!(before.sparse, after.sparse);
            let codebooks = after.codebooks.as_ref().unwrap();
            assert_eq!(
                codebooks.keys.sizes().atoms(codebooks.keys.len()),
                32 + 2 * 256
            );
            let layer = &report["layers"][l];
            for part in ["keys", "values"] {
                let error = layer[part]["packed_relative_error"].as_f64().unwrap();
                assert!(error > 0.0 && error < 0.9, "{layer}");
            }
        }
        let measured = after.training.additive_losses.unwrap();
        assert_eq!(measured.sparsities, [1, 2]);
        if from == &own {
            let before = DictionarySet::load(&own).unwrap().training;
            assert_eq!(after.training.losses, before.losses);
            assert_eq!(after.training.relative_error, before.relative_error);
        }
        let inspected = json(&["inspect", path(&out), "--json"]);
        let keys = &inspected["layers"][3]["keys"];
        assert_eq!(
            (&keys["atoms"], &keys["packed"]["groups"]),
            (&4096.into(), &3.into())
        );
        assert_eq!(keys["packed"]["first"], 32);
        assert_eq!(keys["packed"]["sparsities"].as_array().unwrap().len(), 2);
        let table = text(&run(&["inspect", path(&out)]).stdout);
        assert!(
            table.contains("3 codebooks") && table.contains("32 + 2 × 256"),
            "{table}"
        );
    }
    let packed = "lexico:format=packed,sparsity=2.5,window=8,batch=1";
    let answer = json(&[
        "run",
        "--json",
        "-d",
        path(&out),
        "--cache",
        packed,
        QUESTION,
    ]);
    assert!(answer["cache"]["dictionary_bytes"].as_u64() > Some(8 * 4096 * 64 * 2));
    // Losses of both kinds are measured anew.
    let again = folder.path().join("again.safetensors");
    let measure = [
        "measure",
        path(&out),
        "--corpus",
        path(&corpus),
        "--out",
        path(&again),
    ];
    let limits = ["--context", "96"];
    let output = run(&[&measure[..], &limits].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let measured = DictionarySet::load(&again).unwrap().training;
    assert!(measured.losses.is_some() && measured.additive_losses.is_some());
    for (arguments, word) in [
        (&["--dictionary", path(&out)][..], "is read here"),
        (
            &["--dictionary", path(&own), "--codebooks", "0"],
            "--codebooks 0",
        ),
        (&["--dictionary", path(&corpus)], "corpus.txt"),
    ] {
        let train = [&["train"][..], &texts, arguments].concat();
        let message = fails(1, &train);
        assert!(message.contains(word), "{arguments:?}: {message}");
    }
}

#[test]
fn measure_adds_losses_to_imported_dictionaries() {
    let folder = tempfile::tempdir().unwrap();
    let [pt, plain, out, corpus] = ["d.pt", "plain.safetensors", "d.safetensors", "corpus.txt"]
        .map(|name| folder.path().join(name));
    write_corpus(&corpus);
    let own = tiny_file("dictionary.safetensors");
    for arguments in [
        &["export", path(&own), "--out", path(&pt)][..],
        &[
            "import",
            path(&pt),
            "--model",
            "tiny",
            "--out",
            path(&plain),
        ],
    ] {
        let output = run(arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    let measured = "lexico:allocation=measured,sparsity=6";
    let refused = fails(
        1,
        &[
            "run",
            "--dictionary",
            path(&plain),
            "--cache",
            measured,
            "x",
        ],
    );
    assert!(refused.contains("lexico measure"), "{refused}");
    let limits = ["--context", "96"];
    for from in [&plain, &pt] {
        let corpus = ["--corpus", path(&corpus), "--out", path(&out)];
        let output = run(&[&["measure", path(from)], &corpus[..], &limits].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        let layers = &json(&["inspect", path(&out), "--json"])["layers"];
        let sparsities = |layer: &Value, part: &str| -> Vec<u64> {
            let heads = layer[part]["sparsities"].as_array().unwrap();
            heads.iter().map(|s| s.as_u64().unwrap()).collect()
        };
        let mut all = Vec::new();
        for layer in layers.as_array().unwrap() {
            all.extend(sparsities(layer, "keys"));
            all.extend(sparsities(layer, "values"));
        }
        assert_eq!((all.len(), all.iter().sum::<u64>()), (16, 16 * 8));
        assert!(all.iter().any(|&s| s != 8), "{all:?}");
    }
    run(&["run", "--dictionary", path(&out), "--cache", measured, "x"]);
    let one = ["measure", path(&out), "--corpus", path(&corpus)];
    let same = fails(1, &[&one[..], &["--out", path(&out)]].concat());
    assert!(same.contains("d.safetensors"), "{same}");
    let short = fails(
        1,
        &[&one[..], &["--context", "1", "--out", path(&pt)]].concat(),
    );
    assert!(
        short.contains("--context 1") || short.contains("d.pt"),
        "{short}"
    );
}

#[test]
fn train_reports_every_epoch_and_takes_the_former_names_of_flags() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = folder.path().join("corpus.txt");
    let out = folder.path().join("d.safetensors");
    write_corpus(&corpus);
    let train = [
        &["train", "--json", "--corpus", path(&corpus)][..],
        &["--out", path(&out), "--atoms", "64", "--sparsity", "4"],
        &["--context", "128", "--vectors", "500", "--epochs", "3"],
        &["--groups", "2", "--first-group", "16"],
    ]
    .concat();
    let report = json(&train);
    assert_eq!(report["groups"], 2);
    for layer in report["layers"].as_array().unwrap() {
        for part in ["keys", "values"] {
            let epochs = layer[part]["epochs"].as_array().unwrap();
            let errors = epochs.iter().map(|e| e["relative_error"].as_f64().unwrap());
            assert_eq!(errors.filter(|&e| e > 0.0 && e < 1.0).count(), 3);
            assert!(epochs.is_sorted_by_key(|e| e["seconds"].as_f64()));
        }
    }
    let first = DictionarySet::load(&out).unwrap().layers[0]
        .codebooks
        .clone();
    assert_eq!(first.unwrap().keys.sizes().first, 16);
    for flag in ["--learner", "--recipe"] {
        let message = fails(2, &[&train[..], &[flag, "adam"]].concat());
        assert!(message.contains(flag), "{message}");
    }
}

#[test]
fn train_says_what_it_cannot_use() {
    let folder = tempfile::tempdir().unwrap();
    let text = |name: &str, content: &[u8]| {
        let file = folder.path().join(name);
        std::fs::write(&file, content).unwrap();
        file
    };
    let corpus = folder.path().join("corpus.txt");
    write_corpus(&corpus);
    let nowhere = folder.path().join("no/folder/d");
    let empty = text("empty.txt", b"\n  \n");
    let line = text("line.txt", b"A single line.\n");
    let broken = text("broken.txt", b"Sound, and then \xff\xfe.\n");
    let out = folder.path().join("d.safetensors");
    let with = |corpus: &Path, more: &[&'static str]| {
        let train = ["train", "--corpus", path(corpus), "--out", path(&out)];
        [&train[..], more].concat().join("\n")
    };
    let cases = [
        (2, format!("train\n--out\n{}", path(&out)), "--corpus"),
        (1, with(&nowhere, &[]), "no/folder/d"),
        (
            1,
            format!(
                "train\n--corpus\n{}\n--out\n{}",
                path(&corpus),
                path(&nowhere)
            ),
            "no/folder/d",
        ),
        (1, with(&empty, &[]), "empty.txt: it holds no text"),
        (1, with(&line, &[]), "line.txt: too little text"),
        (
            1,
            with(&broken, &[]),
            "broken.txt: it is not UTF-8 text (byte 16; UTF-16 is to be converted first)",
        ),
        (1, with(&corpus, &["--atoms", "100000"]), "100000 atoms"),
        (1, with(&corpus, &["--atoms", "7"]), "sparsity 8"),
        (
            1,
            with(&corpus, &["--context", "128", "--atoms", "30000"]),
            "30000 atoms need",
        ),
        (
            1,
            with(&corpus, &["--vectors", "5000000000"]),
            "5000000000 vectors",
        ),
        (1, with(&corpus, &["--sparsity", "0"]), "sparsity 0"),
        (1, with(&corpus, &["--sparsity", "65"]), "sparsity 65"),
        (
            1,
            with(&corpus, &["--learning-rate", "NaN"]),
            "learning rate of NaN",
        ),
        (1, with(&corpus, &["--save-every", "NaN"]), "--save-every"),
        (1, with(&corpus, &["--codebooks", "1000"]), "at most 65536"),
        (
            1,
            with(&corpus, &["--first-codebook", "0"]),
            "first codebook",
        ),
        (1, with(&corpus, &["-d", "no/such"]), "no/such"),
        (
            2,
            with(&corpus, &["-d", "no/such", "--atoms", "64"]),
            "--atoms",
        ),
    ];
    for (code, arguments, word) in cases {
        let arguments: Vec<&str> = arguments.split('\n').collect();
        let message = fails(code, &arguments);
        assert!(message.contains(word), "{arguments:?}: {message:?}");
        let there = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(there, 4, "{arguments:?} left something");
    }
}

#[test]
fn train_names_the_layer_of_a_model_that_computes_no_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(tiny_file(name), model.join(name)).unwrap();
    }
    let file = tensor_file::TensorFile::open(tiny_file("model.safetensors")).unwrap();
    let tensors = file.names().into_iter().map(|name| {
        let (dtype, shape) = file.info(&name).unwrap();
        let mut bytes = file.bytes(&name).unwrap();
        if name == "model.layers.1.mlp.up_proj.weight" {
            // A NaN of bf16.
            bytes[600..602].copy_from_slice(&[0xc0, 0x7f]);
        }
        NewTensor::new(&name, dtype, shape, bytes)
    });
    let tensors: Vec<NewTensor> = tensors.collect();
    tensor_file::write(model.join("model.safetensors"), &tensors, HashMap::new()).unwrap();
    let corpus = folder.path().join("corpus.txt");
    write_corpus(&corpus);
    let out = folder.path().join("d.safetensors");
    let message = fails(
        1,
        &[
            "train",
            "--model",
            path(&model),
            "--corpus",
            path(&corpus),
            "--out",
            path(&out),
            "--context",
            "128",
        ],
    );
    assert!(
        message.contains("layer 2") && message.contains("NaN"),
        "{message}"
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[cfg(unix)]
fn interrupt(child: &std::process::Child) {
    let status = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(status.unwrap().success());
}

#[test]
fn train_reads_what_a_researcher_has() {
    let folder = tempfile::tempdir().unwrap();
    let set = folder.path().join("set");
    std::fs::create_dir(&set).unwrap();
    let (corpus, out) = (set.join("a.txt"), folder.path().join("d.safetensors"));
    write_corpus(&corpus);
    let words = std::fs::read_to_string(&corpus).unwrap();
    std::fs::write(set.join("README.md"), "# A set").unwrap();
    let parquet = "../lexico-llm/tests/fixtures/parquet/zstd-v2.parquet";
    let parquet = Path::new(env!("CARGO_MANIFEST_DIR")).join(parquet);
    std::fs::copy(parquet, set.join("b.parquet")).unwrap();
    let train = |arguments: &[&str], input: &str| {
        let rest = "--atoms 32 --sparsity 2 --epochs 1 --batch 64 --context 64 --tokens 4000 --vectors 500 --codebooks 0";
        let out = if arguments.contains(&"--out") {
            &[][..]
        } else {
            &["--out", path(&out)]
        };
        let mut child = lexico()
            .arg("train")
            .args(arguments)
            .args(rest.split(' '))
            .args(out)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It need not read all.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    };
    let names = || json(&["inspect", path(&out), "--json"])["corpus"].clone();
    let output = train(&["--corpus", path(&set)], "");
    let notes = text(&output.stderr);
    assert!(output.status.success(), "{notes}");
    assert!(
        notes.contains("skipped") && notes.contains("README.md"),
        "{notes}"
    );
    assert_eq!(names(), serde_json::json!(["set (text)"]));

    let output = train(&["--corpus", "-", path(&corpus)], &words);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(names(), serde_json::json!(["stdin", "a.txt"]));

    let line = |text: &str| format!("{}\n", serde_json::json!({"body": text}));
    let lines: String = words.split_inclusive(". ").map(line).collect();
    let output = train(&["--corpus", "-", "--field", "body"], &lines);
    assert!(output.status.success(), "{}", text(&output.stderr));

    for (arguments, input, word) in [
        (&["--corpus", "-"][..], "", "holds no text"),
        (&["--corpus", "-"], "few words", "too little text"),
        (&["--corpus", "-", "-"], "few words", "read but once"),
        (
            &["--corpus", "-", "--field", "text"],
            &lines,
            "line 1: no field \"text\"",
        ),
        (
            &["--corpus", path(&set), "--out", path(&corpus)],
            "",
            "is read here",
        ),
    ] {
        let output = train(arguments, input);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains(word), "{arguments:?}: {message:?}");
    }
    assert_eq!(std::fs::read_to_string(&corpus).unwrap(), words);
    let help = text(&run(&["train", "--help"]).stdout);
    for word in [".gguf", ".parquet", "hf://datasets", "stdin", "--field"] {
        assert!(help.contains(word), "{word}: {help}");
    }
}

#[test]
fn prompt_files_are_read_as_editors_write_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    let plain = "One\ntwo é\nthree";
    let tokens = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        let report = json(&[
            "run",
            "--cache",
            "full",
            "-n",
            "1",
            "--json",
            "-f",
            path(&file),
        ]);
        report["prompt_tokens"].as_u64().unwrap()
    };
    let expected = tokens(plain.as_bytes());
    let marked = format!("\u{feff}{plain}\n");
    assert_eq!(tokens(marked.as_bytes()), expected);
    assert_eq!(tokens(marked.replace('\n', "\r\n").as_bytes()), expected);
    // A mark that is not at the beginning is text.
    assert!(tokens(format!("{plain}\u{feff}").as_bytes()) > expected);
    let wide = |order: fn(u16) -> [u8; 2], text: &str| -> Vec<u8> {
        text.encode_utf16().flat_map(order).collect()
    };
    for bytes in [
        wide(u16::to_le_bytes, "\u{feff}One"),
        wide(u16::to_be_bytes, "\u{feff}One"),
        wide(u16::to_le_bytes, "One"),
        b"caf\xe9".to_vec(),
    ] {
        std::fs::write(&file, bytes).unwrap();
        let message = fails(1, &["run", "-f", path(&file)]);
        assert!(
            message.contains("save it as UTF-8") && message.contains("prompt.txt"),
            "{message}"
        );
    }
}

/// Whatever a file holds: its text is not repeated, and nothing of it reaches the terminal as it is.
#[test]
fn outside_text_in_messages_is_bounded_and_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let long = "word ".repeat(400_000);
    let escape = "\u{1b}]0;owned\u{7}\u{202e}";
    let checked = |message: String| {
        assert!(message.len() < 3000, "{} bytes", message.len());
        let steers = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!message.contains(steers), "{message:?}");
        message
    };
    let out = place("d.safetensors");
    for (name, document) in [
        ("list.json", serde_json::json!([long])),
        ("list.json", serde_json::json!([escape])),
        ("lines.jsonl", serde_json::json!(long)),
        (
            "lines.jsonl",
            serde_json::json!({ escape: 1, long.clone(): 2 }),
        ),
        (
            "list.json",
            serde_json::json!([{ escape: 1, long.clone(): 2 }]),
        ),
    ] {
        std::fs::write(place(name), document.to_string()).unwrap();
        let corpus = place(name);
        checked(fails(
            1,
            &["train", "--corpus", path(&corpus), "--out", path(&out)],
        ));
    }
    // A text that is not said whole: its beginning and what was expected.
    std::fs::write(place("list.json"), serde_json::json!([long]).to_string()).unwrap();
    let corpus = place("list.json");
    let message = checked(fails(
        1,
        &["train", "--corpus", path(&corpus), "--out", path(&out)],
    ));
    assert!(
        message.contains("\"text\"") && message.contains("line 1"),
        "{message}"
    );

    for (file, entry, value) in [
        ("config.json", "hidden_size", serde_json::json!(long)),
        ("config.json", "architectures", serde_json::json!([escape])),
        ("config.json", "hidden_act", serde_json::json!(long)),
        (
            "tokenizer_config.json",
            "bos_token",
            serde_json::json!(escape),
        ),
        (
            "tokenizer_config.json",
            "bos_token",
            serde_json::json!(long),
        ),
        (
            "tokenizer_config.json",
            "add_bos_token",
            serde_json::json!(long),
        ),
        (
            "tokenizer_config.json",
            "chat_template",
            serde_json::json!({ long.clone(): escape }),
        ),
        (
            "generation_config.json",
            "eos_token_id",
            serde_json::json!(long),
        ),
        (
            "generation_config.json",
            "stop_strings",
            serde_json::json!({ escape: long }),
        ),
    ] {
        let model = tiny_folder();
        let target = model.path().join(file);
        let mut config: Value = match std::fs::read(&target) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap(),
            Err(_) => serde_json::json!({}),
        };
        config[entry] = value;
        std::fs::write(&target, config.to_string()).unwrap();
        let message = checked(fails(
            1,
            &["run", "-m", path(model.path()), "--cache", "full", "x"],
        ));
        // A template of another name is one that is there, and not the default.
        let place = match entry {
            "chat_template" => "the model's chat template",
            _ => file,
        };
        assert!(
            message.contains(place) || message.contains("tokenizer.json"),
            "{message}"
        );
    }
    // Names of files, and a template's own words.
    let named = place("a\u{1b}[31mb\u{202e}.jsonl");
    std::fs::write(&named, "{}\n").unwrap();
    checked(fails(
        1,
        &["train", "--corpus", path(&named), "--out", path(&out)],
    ));
    let model = tiny_folder();
    let template = "{{ raise_exception('\u{1b}[2J' ~ messages[0].content) }}";
    std::fs::write(model.path().join("chat_template.jinja"), template).unwrap();
    let most = "x ".repeat(20_000);
    let message = fails(
        1,
        &["run", "-m", path(model.path()), "--cache", "full", &most],
    );
    checked(message);
}

#[cfg(unix)]
#[test]
fn ctrl_c_in_train_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = folder.path().join("corpus.txt");
    let out = folder.path().join("d.safetensors");
    write_corpus(&corpus);
    std::fs::copy(tiny_file("dictionary.safetensors"), &out).unwrap();
    let before = std::fs::read(&out).unwrap();
    let mut child = lexico()
        .args([
            "train",
            "--corpus",
            path(&corpus),
            "--out",
            path(&out),
            "--atoms",
            "64",
        ])
        .args(["--epochs", "100000000", "--patience", "0"])
        .args(["--batch", "64", "--context", "128"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first line on stderr says that it listens.
    let mut first = String::new();
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    stderr.read_line(&mut first).unwrap();
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130), "{first}");
    assert_eq!(std::fs::read(&out).unwrap(), before);
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        3,
        "no temporary file is left, but the state to go on from"
    );
}

#[cfg(unix)]
#[test]
fn ctrl_c_in_run_ends_the_answer_and_still_reports() {
    let mut child = lexico()
        .args([
            "run",
            "--ignore-eos",
            "-n",
            "4000",
            "--cache",
            "full",
            "= Lobster =",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first byte says that it is under way.
    let mut first = [0];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    let notes = text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{notes}");
    assert!(notes.contains("tokens/s"), "{notes}");
}

#[test]
fn import_makes_a_dictionary_file_or_says_why_not() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("d.safetensors");
    let pt = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../lexico-llm/tests/fixtures/reference_dictionary.pt");
    let message = fails(
        1,
        &["import", path(&pt), "--model", "tiny", "--out", path(&out)],
    );
    assert!(message.contains("[8, 64, N]"), "{message}");
    assert!(!out.exists());
}

#[test]
fn export_makes_what_import_takes_back() {
    let folder = tempfile::tempdir().unwrap();
    let (pt, back) = (
        folder.path().join("d.pt"),
        folder.path().join("d.safetensors"),
    );
    let own = tiny_file("dictionary.safetensors");
    let output = run(&["export", path(&own), "--out", path(&pt)]);
    let message = text(&output.stderr);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("[8, 64, 4096]"), "{message}");
    assert!(message.contains("left out"), "{message}");
    let output = run(&["import", path(&pt), "--model", "tiny", "--out", path(&back)]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let (want, got) = (
        TensorFile::open(&own).unwrap(),
        TensorFile::open(&back).unwrap(),
    );
    assert_eq!(got.names().len(), 8);
    for name in got.names() {
        assert_eq!(
            want.f32_tensor(&name, 2).unwrap(),
            got.f32_tensor(&name, 2).unwrap(),
            "{name}"
        );
    }
    let nowhere = folder.path().join("none/d.pt");
    assert!(fails(1, &["export", path(&own), "--out", path(&nowhere)]).contains("none"));
    assert!(fails(1, &["export", path(&own), "--out", path(&back)]).contains(".pt"));
    let weights = tiny_file("model.safetensors");
    let message = fails(1, &["export", path(&weights), "--out", path(&pt)]);
    assert!(message.contains("model.safetensors"), "{message}");
}

#[test]
fn eval_dictionary_prints_a_matrix_and_plots_it() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, line: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, line.repeat(60)).unwrap();
        path
    };
    let sums = write("sums.txt", "12 + 7 = 19. 19 + 3 = 22. 5 + 8 = 13.\n");
    let coins = write(
        "coins.txt",
        "Ana has 12 coins at home. Ben gives her 7 more.\n",
    );
    let other = folder.path().join("small.safetensors");
    let settings = ["--tokens", "600", "--context", "64", "--vectors", "200"];
    let train = [
        &["train", "--corpus", path(&sums), "--out", path(&other)][..],
        &["--atoms", "32", "--epochs", "1", "--sparsity", "4"],
        &["--codebooks", "0"],
        &settings,
    ];
    let output = run(&train.concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let own = tiny_file("dictionary.safetensors");
    let coins = format!("coins={}", path(&coins));
    let plot = folder.path().join("p.svg");
    let with = |more: &[&str]| {
        let first = [&["eval", "dictionary", "--text", path(&sums), &coins][..]];
        let all = [&first.concat()[..], &settings, more].concat();
        all.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>()
    };
    let given = |more: &[&str]| {
        let coins = format!("coins={}", path(&own));
        with(&[&["--dictionary", &coins, path(&other)][..], more].concat())
    };
    fn borrowed(arguments: &[String]) -> Vec<&str> {
        arguments.iter().map(String::as_str).collect()
    }
    let arguments = given(&["--json", "--sparsity", "8,4", "--plot", path(&plot)]);
    let report = json(&borrowed(&arguments));
    let cells = report["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 2 * 2 * 2);
    let error = |dictionary: &str, text: &str, sparsity: usize, field: &str| {
        let cell = cells.iter().find(|c| {
            c["dictionary"] == dictionary && c["text"] == text && c["sparsity"] == sparsity
        });
        assert_eq!(cell.unwrap()["layers"].as_array().unwrap().len(), 4);
        cell.unwrap()["keys"][field].as_f64().unwrap()
    };
    for (text, own, rival) in [("sums.txt", "small", "coins"), ("coins", "coins", "small")] {
        // The own dictionary is known by its corpus or by its name.
        assert_eq!(error(own, text, 4, "over_own"), 1.0);
        let ratio = error(rival, text, 4, "relative_error") / error(own, text, 4, "relative_error");
        assert!((error(rival, text, 4, "over_own") - ratio).abs() < 1e-4);
        assert!(error(own, text, 8, "relative_error") < error(own, text, 4, "relative_error"));
    }
    let drawn = std::fs::read_to_string(&plot).unwrap();
    assert_eq!(drawn.matches("sparsity s").count(), 2 * 2 * 2);
    let output = run(&borrowed(&given(&["--per-layer"])));
    let table = text(&output.stdout);
    for word in ["keys, s = 8", "values, s = 16", "small, layer 3", "(1.00)*"] {
        assert!(table.contains(word), "{word:?} is not in {table}");
    }
    for (option, value, word) in [
        ("--sparsity", "33", "33"),
        ("--sparsity", "0", "0"),
        ("--vectors", "0", "vector"),
        ("--context", "100000", "100000"),
        ("--plot", "p.png", "svg"),
        ("--text", path(&sums), "sums.txt"),
        ("--text", "x=none.txt", "none.txt"),
        ("--dictionary", "none.safetensors", "none.safetensors"),
    ] {
        let mut arguments = given(&[]);
        let place = arguments.iter().position(|a| a == option);
        match place.filter(|_| settings.contains(&option)) {
            Some(place) => value.clone_into(&mut arguments[place + 1]),
            None => arguments.extend([option.to_owned(), value.to_owned()]),
        }
        let message = fails(1, &borrowed(&arguments));
        assert!(message.contains(word), "{message:?} does not name {word:?}");
    }
}

#[test]
fn eval_dictionary_takes_another_models_where_told_to() {
    let folder = tiny_folder();
    let config = std::fs::read_to_string(tiny_file("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["rope_parameters"]["rope_theta"] = 777.0.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let sums = folder.path().join("sums.txt");
    std::fs::write(&sums, "12 + 7 = 19. 19 + 3 = 22.\n".repeat(60)).unwrap();
    let dictionary = tiny_file("dictionary.safetensors");
    let mut arguments = vec!["eval", "dictionary", "--model", path(folder.path())];
    arguments.extend(["--dictionary", path(&dictionary), "--text", path(&sums)]);
    arguments.extend([
        "--tokens",
        "600",
        "--context",
        "64",
        "--vectors",
        "50",
        "--json",
    ]);
    let message = fails(1, &arguments);
    assert!(message.contains("rotary"), "{message}");
    assert!(message.contains("--any-model"), "{message}");
    arguments.push("--any-model");
    let report = json(&arguments);
    assert_eq!(report["dictionaries"][0]["other_model"], "tiny");
}

#[test]
fn memory_of_the_cache_is_kept_to() {
    let prompt = tiny_file("prompt.txt");
    let with = |arguments: &[&str]| {
        let all = ["run", "--json", "-f", path(&prompt)];
        json(&[&all[..], arguments].concat())
    };
    let full = with(&["--cache", "full"]);
    let all = with(&["--kv-memory", "16MiB"]);
    assert_eq!(all["text"], full["text"]);
    assert_eq!(all["cache"]["dense_positions"], all["cache"]["positions"]);
    let some = with(&["--kv-memory", "700KiB", "--cache", "lexico:sparsity=6"]);
    assert!(some["cache"]["bytes"].as_u64().unwrap() <= 700 * 1024);
    let dense = |run: &Value| run["cache"]["dense_positions"].as_u64().unwrap();
    assert!(dense(&some) < dense(&all) && dense(&some) > 100, "{some}");

    for (arguments, word) in [
        (
            &["--cache", "full", "--kv-memory", "1MiB"][..],
            "is for --cache lexico",
        ),
        (&["--kv-memory", "100KiB"], "68 are needed"),
        (
            &["--cache", "lexico:window=5", "--kv-memory", "5MiB"],
            "leave one of them out",
        ),
    ] {
        let message = fails(1, &[&["run", "x"][..], arguments].concat());
        assert!(message.contains(word), "{message}");
    }
    assert!(fails(2, &["run", "x", "--kv-memory", "12"]).contains("512MiB"));
}
