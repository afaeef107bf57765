//! Models and data sets by hub name, against a small hub of our own on the loopback.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

const QUESTION: &str = "Question: Ana has 12 coins at home. Ben gives Ana 7 more. \
                        How many coins does Ana have now?\nAnswer:";
/// The last one leads out of the cache, as no hub should.
const DATA_FILES: [&str; 6] = [
    "README.md",
    "raw-v1/test-00000.parquet",
    "raw-v1/train-00000-of-00002.jsonl",
    "raw-v1/train-00001-of-00002.jsonl",
    "v2/train.txt",
    "../../../../../escaped.txt",
];
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn tiny_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../models/tiny")
        .join(name)
}

fn family_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../lexico-llm/tests/fixtures/families")
        .join(name)
}

/// A hub with four models: `org/open`, `org/gated`, `org/bare` without weights, and `org/files` with
/// GGUF files; and with two data sets: `org/set`, and `org/closed`, which is gated.
struct Hub {
    endpoint: String,
    requests: Arc<AtomicUsize>,
    /// Cut the next large answer after so many bytes.
    cut: Arc<Mutex<Option<usize>>>,
}

impl Hub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = Self {
            endpoint: format!("http://{}", listener.local_addr().unwrap()),
            requests: Arc::default(),
            cut: Arc::default(),
        };
        let (requests, cut) = (hub.requests.clone(), hub.cut.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                requests.fetch_add(1, Ordering::SeqCst);
                // A client that hangs up is its own affair.
                let _ = answer(stream, &cut);
            }
        });
        hub
    }

    fn lexico(&self, home: &Path, arguments: &[&str]) -> Output {
        Command::new(assert_cmd::cargo::cargo_bin!("lexico"))
            .args(arguments)
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HF_HOME", home)
            .env("XDG_DATA_HOME", home.join("data"))
            .env_remove("HF_TOKEN")
            .env_remove("HF_HUB_OFFLINE")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

/// A file of `org/set`: sentences that tell which one it is.
fn data_file(name: &str) -> Vec<u8> {
    if name.ends_with(".parquet") {
        let file = "../lexico-llm/tests/fixtures/parquet/snappy.parquet";
        return std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    }
    let line = |i: usize| {
        let text = format!("The lobster number {i} of {name} had {} eggs.", 7 * i);
        if name.ends_with(".jsonl") {
            format!("{}\n", serde_json::json!({ "text": text }))
        } else {
            format!("{text}\n")
        }
    };
    (0..60).map(line).collect::<String>().into_bytes()
}

fn answer(mut stream: TcpStream, cut: &Mutex<Option<usize>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let mut from = 0;
    let mut to = usize::MAX;
    for line in lines {
        let line = line?.to_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some((a, b)) = line
            .strip_prefix("range: bytes=")
            .and_then(|r| r.split_once('-'))
        {
            from = a.parse().unwrap_or(0);
            to = b.parse().unwrap_or(usize::MAX);
        }
    }
    let path = request.split_whitespace().nth(1).unwrap_or_default();
    let refuse = |stream: &mut TcpStream, status: &str| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
    };
    if let Some(asked) = path.strip_prefix("/api/models/org/") {
        let (model, revision) = asked.split_once("/revision/").unwrap_or((asked, "main"));
        let about = match model {
            "open" | "bare" => "{\"gated\": false}",
            "gated" => "{\"gated\": \"manual\"}",
            "files" => {
                "{\"siblings\": [{\"rfilename\": \"README.md\"}, {\"rfilename\": \"m-q8_0.gguf\"}]}"
            }
            _ => return refuse(&mut stream, "401 Unauthorized"),
        };
        if revision != "main" {
            return refuse(&mut stream, "404 Not Found");
        }
        return send_json(&mut stream, about);
    }
    match path {
        "/api/datasets/org/set" | "/api/datasets/org/set/revision/main" => {
            let names = DATA_FILES.map(|name| serde_json::json!({"rfilename": name}));
            let info = serde_json::json!({"sha": COMMIT, "gated": false, "siblings": names});
            return send_json(&mut stream, &info.to_string());
        }
        "/api/datasets/org/closed" | "/api/datasets/org/closed/revision/main" => {
            let info = serde_json::json!({"sha": COMMIT, "gated": "auto",
                                          "siblings": [{"rfilename": "a.txt"}]});
            return send_json(&mut stream, &info.to_string());
        }
        _ => {}
    }
    let Some((name, file)) = path.split_once("/resolve/") else {
        // As the hub does: what is not there is not told from what is private.
        let there = path.starts_with("/api/datasets/org/set/");
        let status = if there {
            "404 Not Found"
        } else {
            "401 Unauthorized"
        };
        return refuse(&mut stream, status);
    };
    // As the hub does, for a revision and for a file that a model has not.
    let file = file.strip_prefix("main/").unwrap_or("none");
    let file = match name
        .strip_prefix("/org/")
        .or(name.strip_prefix('/'))
        .unwrap_or_default()
    {
        "datasets/org/set" if DATA_FILES.contains(&file) => Ok(data_file(file)),
        "datasets/org/set" => return refuse(&mut stream, "404 Not Found"),
        "gated" => return refuse(&mut stream, "401 Unauthorized"),
        "bare" if file.contains("safetensors") => return refuse(&mut stream, "404 Not Found"),
        "open" | "bare" => std::fs::read(tiny_file(file)),
        "files" if file == "m-q8_0.gguf" => std::fs::read(family_file("llama/q8_0.gguf")),
        "files" => return refuse(&mut stream, "404 Not Found"),
        _ => return refuse(&mut stream, "401 Unauthorized"),
    };
    let Ok(bytes) = file else {
        return refuse(&mut stream, "404 Not Found");
    };
    let end = bytes.len().min(to.saturating_add(1));
    let from = from.min(end);
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\n\
         ETag: \"{:x}\"\r\nX-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n",
        end - from,
        end.max(1) - 1,
        bytes.len(),
        bytes.len(),
    )?;
    let mut body = &bytes[from..end];
    if body.len() > 100_000
        && let Some(most) = cut.lock().unwrap().take()
    {
        body = &body[..most];
    }
    stream.write_all(body)
}

fn send_json(stream: &mut TcpStream, json: &str) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{json}",
        json.len()
    )
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_model_is_downloaded_once_and_then_serves_offline() {
    let hub = Hub::start();
    let home = tempfile::tempdir().unwrap();
    let run = ["run", "-m", "org/open", "--cache", "full", QUESTION];
    // The first download of the weights breaks off; the retry takes it up where it ended.
    *hub.cut.lock().unwrap() = Some(50_000);
    let output = hub.lexico(home.path(), &run);
    assert!(
        text(&output.stdout).contains("#### 19"),
        "{}",
        text(&output.stderr)
    );
    let asked = hub.requests.load(Ordering::SeqCst);
    assert!(asked > 0);
    let again = hub.lexico(home.path(), &[&run[..], &["--json"]].concat());
    let report: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(report["model"], "org/open");
    // What is cached is used without asking: also where there is no network and nobody said so.
    assert_eq!(hub.requests.load(Ordering::SeqCst), asked);
    let unreachable = Hub {
        endpoint: "http://127.0.0.1:9".to_owned(),
        ..Hub::start()
    };
    let output = unreachable.lexico(home.path(), &run);
    assert!(output.status.success(), "{}", text(&output.stderr));

    let offline = Command::new(assert_cmd::cargo::cargo_bin!("lexico"))
        .args(run)
        .env("HF_HOME", home.path())
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .output()
        .unwrap();
    assert!(
        text(&offline.stdout).contains("#### 19"),
        "{}",
        text(&offline.stderr)
    );

    // Dictionaries of a model that lies in a cache are the user's own.
    let message = text(
        &hub.lexico(home.path(), &["run", "-m", "org/open", QUESTION])
            .stderr,
    );
    let own = home
        .path()
        .join("data/lexico/dictionaries/org--open.safetensors");
    assert!(message.contains(own.to_str().unwrap()), "{message}");
    std::fs::create_dir_all(own.parent().unwrap()).unwrap();
    std::fs::copy(tiny_file("dictionary.safetensors"), &own).unwrap();
    let output = hub.lexico(home.path(), &["run", "-m", "org/open", QUESTION]);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn refusals_are_told_apart() {
    let hub = Hub::start();
    let home = tempfile::tempdir().unwrap();
    let fails = |name: &str| {
        let output = hub.lexico(home.path(), &["run", "-m", name, "x"]);
        assert_eq!(output.status.code(), Some(1));
        let message = text(&output.stderr);
        assert!(
            message.contains(name) && !message.contains("panicked"),
            "{message}"
        );
        message
    };
    assert!(fails("org/none").contains("no such model"));
    let gated = fails("org/gated");
    assert!(
        gated.contains("accept its licence") && gated.contains("HF_TOKEN"),
        "{gated}"
    );
    assert!(fails("org/bare").contains("no model.safetensors"));
    assert!(fails("org/open@v9").contains("no revision \"v9\""));
    assert!(fails("org/open@refs/pr/9").contains("no revision"));
    assert!(fails("org/files@v9/m-q8_0.gguf").contains("no revision"));

    let unreachable = Hub {
        endpoint: "http://127.0.0.1:9".to_owned(),
        ..hub
    };
    let output = unreachable.lexico(home.path(), &["run", "-m", "org/other", "x"]);
    let message = text(&output.stderr);
    assert!(
        message.contains("no network") && message.contains("127.0.0.1:9"),
        "{message}"
    );
}

#[test]
fn a_gguf_file_of_a_repository_runs() {
    let hub = Hub::start();
    let home = tempfile::tempdir().unwrap();
    let run = |name: &str| {
        let common = ["run", "-m", name, "--cache", "full", "-n", "4", "--json"];
        hub.lexico(home.path(), &[&common[..], &["Ana"]].concat())
    };
    let output = run("org/files/m-q8_0.gguf");
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert!(out.contains("\"org/files\""), "{out}");
    let asked = hub.requests.load(Ordering::SeqCst);
    assert!(run("org/files@main/m-q8_0.gguf").status.success());
    assert_eq!(hub.requests.load(Ordering::SeqCst), asked);
    // The message leads from what is not there to what is.
    for name in ["org/files", "org/files/m-q4_k.gguf"] {
        let message = text(&run(name).stderr);
        assert!(message.contains("m-q8_0.gguf"), "{message}");
    }
}

/// As Hugging Face's own library reads it.
#[test]
fn offline_is_what_says_so() {
    let hub = Hub::start();
    let home = tempfile::tempdir().unwrap();
    for (value, offline) in [("False", false), ("0", false), ("ON", true), ("1", true)] {
        let output = Command::new(assert_cmd::cargo::cargo_bin!("lexico"))
            .args(["run", "-m", "org/bare", "x"])
            .env("HF_ENDPOINT", &hub.endpoint)
            .env("HF_HOME", home.path())
            .env("HF_HUB_OFFLINE", value)
            .output()
            .unwrap();
        let message = text(&output.stderr);
        assert_eq!(message.contains("HF_HUB_OFFLINE"), offline, "{message}");
    }
}

#[test]
fn offline_says_what_is_missing() {
    let home = tempfile::tempdir().unwrap();
    let output = Command::new(assert_cmd::cargo::cargo_bin!("lexico"))
        .args(["run", "-m", "org/never", "x"])
        .env("HF_HOME", home.path())
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let message = text(&output.stderr);
    assert!(
        message.contains("config.json") && message.contains("HF_HUB_OFFLINE"),
        "{message}"
    );
}

/// The arguments of a training of a few seconds.
fn training<'a>(corpora: &[&'a str], out: &'a str) -> Vec<&'a str> {
    let corpora = ["train", "--corpus"]
        .into_iter()
        .chain(corpora.iter().copied());
    let rest = "--atoms 32 --sparsity 2 --epochs 1 --batch 64 --context 64 --tokens 2000 --vectors 500 --codebooks 0 --json --out";
    corpora.chain(rest.split(' ')).chain([out]).collect()
}

#[test]
fn a_data_set_is_learned_from() {
    let hub = Hub::start();
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("d.safetensors");
    let train = |hub: &Hub, name: &str| {
        let output = hub.lexico(home.path(), &training(&[name], out.to_str().unwrap()));
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
        let inspected = hub.lexico(home.path(), &["inspect", out.to_str().unwrap(), "--json"]);
        let report: serde_json::Value = serde_json::from_slice(&inspected.stdout).unwrap();
        (
            report["corpus"][0].as_str().unwrap().to_owned(),
            text(&output.stderr),
        )
    };
    let cached = |name: &str| {
        let snapshot = format!("hub/datasets--org--set/snapshots/{COMMIT}");
        home.path().join(snapshot).join(name).is_file()
    };
    let (name, notes) = train(&hub, "hf://datasets/org/set/raw-v1/train-*.jsonl");
    assert_eq!(
        name,
        format!("hf://datasets/org/set@{COMMIT}/raw-v1/train-*.jsonl (text)")
    );
    assert!(!notes.contains("skipped"), "{notes}");
    assert!(cached(DATA_FILES[2]) && cached(DATA_FILES[3]));
    assert!(
        !cached(DATA_FILES[1]) && !cached(DATA_FILES[4]),
        "not asked for"
    );

    // The whole set: what is no text by its name is neither read nor downloaded.
    let (name, notes) = train(&hub, "hf://datasets/org/set");
    assert_eq!(name, format!("hf://datasets/org/set@{COMMIT} (text)"));
    assert!(
        notes.contains("skipped") && notes.contains("README.md"),
        "{notes}"
    );
    assert!(cached(DATA_FILES[1]) && cached(DATA_FILES[4]) && !cached("README.md"));
    assert!(!home.path().join("escaped.txt").exists());
    assert!(!home.path().join("hub/escaped.txt").exists());

    // A file that the cache has is read without asking; offline, so is all that it has.
    let unreachable = Hub {
        endpoint: "http://127.0.0.1:9".to_owned(),
        ..Hub::start()
    };
    train(&unreachable, "hf://datasets/org/set@main/v2/train.txt");
    let fails = |name: &str, offline: &str| {
        let output = Command::new(assert_cmd::cargo::cargo_bin!("lexico"))
            .args(training(&[name], out.to_str().unwrap()))
            .env("HF_HOME", home.path())
            .env("HF_HUB_OFFLINE", offline)
            .env("HF_ENDPOINT", &unreachable.endpoint)
            .output()
            .unwrap();
        (output.status.code(), text(&output.stderr))
    };
    assert_eq!(fails("hf://datasets/org/set/v2", "1").0, Some(0));
    let (code, message) = fails("hf://datasets/org/set/v2", "0");
    assert!(
        code == Some(1) && message.contains("HF_HUB_OFFLINE=1"),
        "{message}"
    );
    let (_, message) = fails("hf://datasets/org/set/v3", "1");
    assert!(message.contains("in the cache"), "{message}");
    let (_, message) = fails("hf://datasets/org/never", "1");
    assert!(message.contains("HF_HUB_OFFLINE forbids"), "{message}");
}

#[test]
fn data_sets_that_cannot_be_had_are_told_apart() {
    let hub = Hub::start();
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("d.safetensors");
    for (name, word) in [
        ("hf://datasets/org/none", "no such data set"),
        ("hf://datasets/org/set@v9", "no revision \"v9\""),
        (
            "hf://datasets/org/closed",
            "datasets/org/closed with an account",
        ),
        ("hf://datasets/org/set/v3", "raw-v1/test-00000.parquet"),
        (
            "hf://datasets/org/set/raw-v1/train-*.parquet",
            "no file to read",
        ),
        ("hf://datasets/set", "hf://datasets/ORG/NAME"),
        ("hf://datasets/org/set/../v2", "hf://datasets/ORG/NAME"),
    ] {
        let output = hub.lexico(home.path(), &training(&[name], out.to_str().unwrap()));
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{name}");
        assert!(
            message.contains(word) && message.contains("hf://datasets/"),
            "{name}: {message}"
        );
    }
    // A folder of that name on this machine is meant first.
    let local = home.path().join("hf:/datasets/org");
    std::fs::create_dir_all(local.join("none")).unwrap();
    std::fs::write(local.join("none/a.txt"), data_file("a.txt")).unwrap();
    let status = Command::new(assert_cmd::cargo::cargo_bin!("lexico"))
        .args(training(&["hf://datasets/org/none"], out.to_str().unwrap()))
        .current_dir(home.path())
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .output();
    assert!(status.unwrap().status.success());
}
