//! `lexico run --save-cache` and `--load-cache`: runs that stop and go on in another process.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const QUESTION: &str = "Question: Ana has 12 coins at home. Ben gives Ana 7 more. \
                        How many coins does Ana have now?\nAnswer:";
const SMALL: &str = "lexico:window=8,batch=4";

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("lexico"));
        command.current_dir(self.0.path()).args(arguments);
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[&["run", "--json"], arguments].concat());
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {message}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The message of a run that must fail.
    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(&[&["run"], arguments].concat());
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(!message.contains("panicked"), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        message
    }
}

fn text(report: &Value) -> &str {
    report["text"].as_str().unwrap()
}

/// The file's bytes, which hold every token, draw and number.
fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn runs_in_parts_are_one_run() {
    let folder = Folder::new();
    for settings in [
        &["--cache", SMALL][..],
        &[
            "--cache",
            SMALL,
            "--temperature",
            "0.9",
            "--seed",
            "3",
            "--repeat-penalty",
            "1.2",
        ],
        &[
            "--cache",
            "lexico:window=8,batch=4,sparsity=6,tolerance=0.2,format=i8",
            "--temperature",
            "0.9",
        ],
    ] {
        let more = [settings, &["--ignore-eos"]].concat();
        let run = |arguments: &[&str]| folder.json(&[arguments, &more].concat());
        let whole = run(&["-n", "60", "--save-cache", "whole", QUESTION]);
        let first = run(&["-n", "25", "--save-cache", "part", QUESTION]);
        // Settings of the cache come from the file; the first part's text is not read again.
        let second = run(&["-n", "1", "--load-cache", "part", "--save-cache", "part"]);
        let rest = &more[2..];
        let third = folder.json(
            &[
                &["-n", "34", "--load-cache", "part", "--save-cache", "part"],
                rest,
            ]
            .concat(),
        );
        let parts = [text(&first), text(&second), text(&third)].concat();
        assert_eq!(parts, text(&whole), "{settings:?}");
        assert_eq!(second["prompt_tokens"], 1);
        assert_eq!(
            bytes(&folder.file("part")),
            bytes(&folder.file("whole")),
            "{settings:?}"
        );
        let saved = &third["saved"];
        let length = bytes(&folder.file("part")).len();
        assert_eq!(saved["bytes"].as_u64(), Some(length as u64));
        assert_eq!(saved["positions"], third["cache"]["positions"]);
        assert_eq!(saved["fp16_bytes"], third["cache"]["fp16_bytes"]);
    }
}

#[test]
fn a_prompt_follows_what_was_saved() {
    let folder = Folder::new();
    let save = [
        "-n",
        "12",
        "--ignore-eos",
        "--cache",
        SMALL,
        "--save-cache",
        "a",
        QUESTION,
    ];
    let first = folder.json(&save);
    let load = ["-n", "12", "--ignore-eos", "--load-cache", "a"];
    let next = " Question: Ben has 3 hens.";
    let short = folder.json(&[&load[..], &[next]].concat());
    // llama.cpp's way: the whole text again, of which only what is new is read.
    let whole = format!("{QUESTION}{}{next}", text(&first));
    let long = folder.json(&[&load[..], &[&whole]].concat());
    assert_eq!(text(&short), text(&long));
    assert_eq!(short["prompt_tokens"], long["prompt_tokens"]);
    assert!(long["prompt_tokens"].as_u64().unwrap() < 20, "{long}");
    // The text itself adds nothing: it goes on where it stopped.
    let same = format!("{QUESTION}{}", text(&first));
    let nothing = folder.json(&load);
    assert_eq!(
        text(&folder.json(&[&load[..], &[&same]].concat())),
        text(&nothing)
    );
    assert_ne!(text(&nothing), text(&short));
}

#[test]
fn a_text_that_has_ended_only_goes_on_with_a_prompt() {
    let folder = Folder::new();
    let first = folder.json(&["--cache", SMALL, "--save-cache", "a", QUESTION]);
    assert_ne!(first["finish"], "max_tokens");
    let nothing = folder.json(&["--load-cache", "a", "--save-cache", "b"]);
    assert_eq!((text(&nothing), &nothing["finish"]), ("", &first["finish"]));
    assert_eq!(nothing["generated_tokens"], 0);
    assert_eq!(bytes(&folder.file("a")), bytes(&folder.file("b")));
    let more = folder.json(&[
        "--load-cache",
        "a",
        "\n\nQuestion: Ben has 3 hens. How many hens?\nAnswer:",
    ]);
    assert_ne!(text(&more), "");
}

#[test]
fn what_is_saved_is_said_and_inspected() {
    let folder = Folder::new();
    let output = folder.run(&[
        "run",
        "-n",
        "5",
        "--ignore-eos",
        "--save-cache",
        "a",
        QUESTION,
    ]);
    let notes = String::from_utf8(output.stderr).unwrap();
    let line = notes.lines().find(|line| line.contains("saved")).unwrap();
    assert!(
        line.contains("positions") && line.contains("dense") && line.contains(" s]"),
        "{line}"
    );

    let output = folder.run(&["inspect", "a"]);
    let shown = String::from_utf8(output.stdout).unwrap();
    for words in [
        "saved cache",
        "lexico-cache/1",
        "tiny",
        "fingerprint",
        "positions",
        "window",
        "tokens",
    ] {
        assert!(shown.contains(words), "{shown}");
    }
    let output = folder.run(&["inspect", "--json", "a"]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["kind"], "saved cache");
    assert_eq!(json["cache"], "lexico");
    let parts = json["parts"].as_object().unwrap().values();
    let parts: u64 = parts.map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(json["bytes"].as_u64(), Some(parts));
}

#[test]
fn what_cannot_be_is_refused() {
    let folder = Folder::new();
    let one = ["-n", "3", "--ignore-eos"];
    folder.json(&[&one[..], &["--cache", SMALL, "--save-cache", "a", QUESTION]].concat());
    let kept = bytes(&folder.file("a"));
    std::fs::write(folder.file("cut"), &kept[..kept.len() - 1]).unwrap();
    std::fs::write(folder.file("notes.txt"), "mine").unwrap();

    let message = folder.fails(
        1,
        &["--load-cache", "a", "--cache", "lexico:window=9,batch=4"],
    );
    assert!(
        message.contains(SMALL)
            && message.contains("window=9")
            && message.contains("leave out --cache"),
        "{message}"
    );
    let message = folder.fails(1, &["--load-cache", "a", "--quantize", "q8_0"]);
    assert!(message.contains("another model"), "{message}");
    for (file, words) in [
        ("cut", "damaged"),
        ("notes.txt", "no saved cache"),
        ("none", "none"),
    ] {
        let message = folder.fails(1, &["--load-cache", file]);
        assert!(message.contains(words), "{message}");
    }
    // Before the text is generated.
    let message = folder.fails(1, &["--cache", "kivi", "--save-cache", "b", QUESTION]);
    assert!(message.contains("\"kivi\" cannot be saved"), "{message}");
    let message = folder.fails(1, &["--save-cache", "notes.txt", QUESTION]);
    assert!(message.contains("no saved cache"), "{message}");
    let message = folder.fails(1, &["--save-cache", "no/such/folder", QUESTION]);
    assert!(message.contains("no/such/folder"), "{message}");
    folder.fails(2, &["--load-cache", "a", "--compare"]);
    assert_eq!(bytes(&folder.file("notes.txt")), b"mine");
    assert!(!folder.file("b").exists());
    // Other ways to write the same settings are the same.
    folder.json(
        &[
            &one[..],
            &["--load-cache", "a", "--cache", "lexico:batch=4,window=8"],
        ]
        .concat(),
    );
}

/// One Ctrl-C ends the generation, and what was generated by then is saved; so do the signals by which jobs are ended
/// and terminals closed.
#[cfg(unix)]
#[test]
fn an_interrupted_run_is_saved_and_goes_on() {
    use std::io::Read;
    let folder = Folder::new();
    let more = ["--ignore-eos", "--cache", SMALL];
    // Under nohup a hangup is ignored, by the programs that a test starts too; one that the test handles is not.
    let handled = std::sync::Arc::default();
    signal_hook::flag::register(signal_hook::consts::SIGHUP, handled).unwrap();
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("lexico"));
        command
            .args(["run", "-n", "-1", "--save-cache", "a", QUESTION])
            .args(more);
        command.current_dir(folder.0.path());
        let piped = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = piped.spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut first = [0; 20];
        out.read_exact(&mut first).unwrap();
        let kill = Command::new("kill")
            .args([signal, &child.id().to_string()])
            .status();
        assert!(kill.unwrap().success());
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{signal}");
        let part = String::from_utf8(first.to_vec()).unwrap() + rest.strip_suffix('\n').unwrap();

        let second = folder.json(&[&["-n", "10", "--load-cache", "a"], &more[..]].concat());
        let all = second["cache"]["positions"].as_u64().unwrap() + 1;
        let prompt = folder.json(&[&["-n", "1", QUESTION], &more[..]].concat());
        let generated = all - prompt["prompt_tokens"].as_u64().unwrap();
        let whole = folder.json(&[&["-n", &generated.to_string(), QUESTION], &more[..]].concat());
        assert_eq!(part + text(&second), text(&whole), "{signal}");
        std::fs::remove_file(folder.file("a")).unwrap();
    }
}

/// What runs under nohup is not to end with its terminal.
#[cfg(unix)]
#[test]
fn a_hangup_that_is_ignored_ends_nothing() {
    use std::io::Read;
    let folder = Folder::new();
    let program = assert_cmd::cargo::cargo_bin!("lexico");
    let script = "trap '' HUP; exec \"$0\" run -n 400 --ignore-eos --cache full x";
    let mut child = Command::new("sh")
        .args(["-c", script])
        .arg(program)
        .current_dir(folder.0.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = [0; 1];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    let kill = Command::new("kill")
        .args(["-HUP", &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
}
