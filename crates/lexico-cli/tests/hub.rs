//! Models and data sets by hub name, against a small hub of our own on the loopback.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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
/// GGUF files; with a repository of dictionaries, `org/tiny-lexico`, where a test publishes some; and with two data sets:
/// `org/set`, and `org/closed`, which is gated.
struct Hub {
    endpoint: String,
    requests: Arc<AtomicUsize>,
    state: Arc<State>,
}

/// What a hub does otherwise than it should, and what it was asked.
#[derive(Default)]
struct State {
    /// Cut the next large answer after so many bytes.
    cut: Mutex<Option<usize>>,
    /// Send so many bytes of the next large answer, and no more.
    hang: Mutex<Option<usize>>,
    /// Answer so many requests with a status and `Retry-After: 0`.
    busy: Mutex<(usize, &'static str)>,
    /// Take requests and never answer.
    silent: AtomicBool,
    /// Send whole files, whatever range is asked for.
    no_ranges: AtomicBool,
    /// Checksum that is promised of weights.
    checksum: Mutex<Option<String>>,
    /// Folder of the files of `org/tiny-lexico`.
    published: Mutex<Option<PathBuf>>,
    /// Send twice the bytes that were promised.
    grown: AtomicBool,
    /// Path, range and token of every request.
    log: Mutex<Vec<[String; 3]>>,
}

/// Bytes that are large enough to be cut.
const LARGE: usize = 100_000;

impl Hub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = Self {
            endpoint: format!("http://{}", listener.local_addr().unwrap()),
            requests: Arc::default(),
            state: Arc::default(),
        };
        let (requests, state) = (hub.requests.clone(), hub.state.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                requests.fetch_add(1, Ordering::SeqCst);
                // A client that hangs up is its own affair; one that waits keeps no other waiting.
                let state = state.clone();
                std::thread::spawn(move || drop(answer(stream, &state)));
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

    /// Runs a model with these variables, no others of the hub's, and HF_HOME in `home`.
    fn run_with(&self, home: &Path, model: &str, variables: &[(&str, &str)]) -> Output {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("lexico"));
        let of_hub = std::env::vars_os().filter(|(name, _)| {
            let name = name.to_string_lossy();
            name.starts_with("HF_") || name.starts_with("HUGGING") || name == "TRANSFORMERS_OFFLINE"
        });
        for (name, _) in of_hub {
            command.env_remove(name);
        }
        command
            .args([
                "run", "-m", model, "--cache", "full", "-n", "2", "--json", "x",
            ])
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HF_HOME", home)
            .envs(variables.iter().copied())
            .current_dir(home)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Ranges that were asked for of a file.
    fn ranges(&self, file: &str) -> Vec<String> {
        let log = self.state.log.lock().unwrap();
        let own = log.iter().filter(|[path, ..]| path.ends_with(file));
        own.map(|[_, range, _]| range.clone()).collect()
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

fn answer(mut stream: TcpStream, state: &State) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let mut from = 0;
    let mut to = usize::MAX;
    let (mut range, mut token) = (String::new(), String::new());
    for line in lines {
        let line = line?;
        if let Some(given) = line.strip_prefix("authorization: ") {
            token = given.to_owned();
        }
        let line = line.to_lowercase();
        if let Some(given) = line.strip_prefix("range: ") {
            range = given.to_owned();
        }
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
    let entry = [path.to_owned(), range.clone(), token];
    state.log.lock().unwrap().push(entry);
    if state.silent.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_secs(60));
        return Ok(());
    }
    let busy = {
        let mut busy = state.busy.lock().unwrap();
        busy.0 = busy.0.saturating_sub(1);
        Some(busy.1).filter(|_| busy.0 > 0)
    };
    if let Some(status) = busy {
        return write!(
            stream,
            "HTTP/1.1 {status}\r\nRetry-After: 0\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    let refuse = |stream: &mut TcpStream, status: &str| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
    };
    if let Some(asked) = path.strip_prefix("/api/models/org/") {
        let (model, revision) = asked.split_once("/revision/").unwrap_or((asked, "main"));
        let about = match model {
            "open" | "bare" | "tiny-lexico" => "{\"gated\": false}",
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
        "tiny-lexico" => {
            let folder = state.published.lock().unwrap().clone();
            std::fs::read(folder.unwrap_or_default().join(file))
        }
        "files" if file == "m-q8_0.gguf" => std::fs::read(family_file("llama/q8_0.gguf")),
        "files" => return refuse(&mut stream, "404 Not Found"),
        _ => return refuse(&mut stream, "401 Unauthorized"),
    };
    let Ok(mut bytes) = file else {
        return refuse(&mut stream, "404 Not Found");
    };
    let whole = range.is_empty() || state.no_ranges.load(Ordering::SeqCst);
    if whole {
        (from, to) = (0, usize::MAX);
    }
    if whole && state.grown.load(Ordering::SeqCst) {
        bytes.resize(2 * bytes.len(), 0);
    }
    let end = bytes.len().min(to.saturating_add(1));
    let from = from.min(end);
    let first = match whole {
        true => "200 OK\r\n".to_owned(),
        false => format!(
            "206 Partial Content\r\nContent-Range: bytes {from}-{}/{}\r\n",
            end.max(1) - 1,
            bytes.len()
        ),
    };
    let checksum = state.checksum.lock().unwrap().clone();
    let checksum = checksum.filter(|_| bytes.len() > LARGE);
    let linked = checksum.map_or(String::new(), |sum| format!("X-Linked-ETag: \"{sum}\"\r\n"));
    write!(
        stream,
        "HTTP/1.1 {first}Content-Length: {}\r\nETag: \"{:x}\"\r\n{linked}X-Repo-Commit: {COMMIT}\r\n\
         Connection: close\r\n\r\n",
        end - from,
        bytes.len(),
    )?;
    let body = &bytes[from..end];
    if body.len() > LARGE {
        if let Some(most) = state.cut.lock().unwrap().take() {
            return stream.write_all(&body[..most]);
        }
        let hang = state.hang.lock().unwrap().take();
        if let Some(most) = hang {
            stream.write_all(&body[..most])?;
            std::thread::sleep(Duration::from_secs(60));
            return Ok(());
        }
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
    *hub.state.cut.lock().unwrap() = Some(50_000);
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
    for (value, offline) in [("False", false), ("0", false), ("ON", true), ("1", true)] {
        // What the hub lacks is kept in the cache too.
        let home = tempfile::tempdir().unwrap();
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

/// The cache's folder of `org/open`.
const OPEN: &str = "models--org--open";

/// Fills a cache as a program does that needs these files only.
fn fill(cache: &Path, files: &[&str]) -> PathBuf {
    let snapshot = cache.join(OPEN).join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(cache.join(OPEN).join("refs")).unwrap();
    std::fs::write(cache.join(OPEN).join("refs/main"), COMMIT).unwrap();
    for file in files {
        std::fs::copy(tiny_file(file), snapshot.join(file)).unwrap();
    }
    snapshot
}

const NEEDED: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];

#[test]
fn what_a_cache_lacks_of_a_models_files_is_fetched_once() {
    let hub = Hub::start();
    let home = tempfile::tempdir().unwrap();
    let snapshot = fill(&home.path().join("hub"), &NEEDED);
    let output = hub.run_with(home.path(), "org/open", &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for file in ["generation_config.json", "tokenizer_config.json"] {
        assert!(snapshot.join(file).is_file(), "{file}");
    }
    assert!(hub.ranges("model.safetensors").is_empty(), "it was there");
    // What the hub does not have is written down as huggingface_hub does.
    let none = home
        .path()
        .join("hub")
        .join(OPEN)
        .join(".no_exist")
        .join(COMMIT);
    assert!(none.join("chat_template.jinja").is_file());
    assert!(!none.join("generation_config.json").exists());
    let asked = hub.requests.load(Ordering::SeqCst);
    assert!(hub.run_with(home.path(), "org/open", &[]).status.success());
    assert_eq!(hub.requests.load(Ordering::SeqCst), asked);

    // And what others wrote down is believed.
    let other = tempfile::tempdir().unwrap();
    let snapshot = fill(&other.path().join("hub"), &NEEDED);
    let none = other
        .path()
        .join("hub")
        .join(OPEN)
        .join(".no_exist")
        .join(COMMIT);
    std::fs::create_dir_all(&none).unwrap();
    let optional = [
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
    ];
    for file in optional {
        std::fs::write(none.join(file), "").unwrap();
    }
    let output = hub.run_with(other.path(), "org/open", &[("HF_HUB_OFFLINE", "1")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!text(&output.stderr).contains("does not hold"));
    assert!(hub.run_with(other.path(), "org/open", &[]).status.success());
    assert_eq!(hub.requests.load(Ordering::SeqCst), asked);
    assert!(!snapshot.join("generation_config.json").exists());
}

#[test]
fn files_that_may_be_missing_are_said_in_one_line() {
    let hub = Hub::start();
    let unreachable = Hub {
        endpoint: "http://127.0.0.1:9".to_owned(),
        ..Hub::start()
    };
    let home = tempfile::tempdir().unwrap();
    fill(&home.path().join("hub"), &NEEDED);
    let said = |hub: &Hub, variables: &[(&str, &str)]| {
        let output = hub.run_with(home.path(), "org/open", variables);
        let notes = text(&output.stderr);
        assert!(output.status.success(), "{notes}");
        let lines = notes
            .lines()
            .filter(|line| line.contains("generation_config.json"));
        let lines: Vec<String> = lines.map(str::to_owned).collect();
        assert_eq!(lines.len(), 1, "{notes}");
        assert!(lines[0].contains("chat_template.jinja"), "{notes}");
        lines[0].clone()
    };
    for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        assert!(said(&hub, &[(name, "1")]).contains(name));
    }
    assert_eq!(hub.requests.load(Ordering::SeqCst), 0);
    assert!(said(&unreachable, &[]).contains("127.0.0.1:9"));
    // A hub that does not answer is waited for once.
    hub.state.silent.store(true, Ordering::SeqCst);
    let started = Instant::now();
    said(&hub, &[("HF_HUB_ETAG_TIMEOUT", "1")]);
    assert!(started.elapsed() < Duration::from_secs(20));
    assert_eq!(hub.requests.load(Ordering::SeqCst), 1);

    // What the tokenizer's config says is not missed elsewhere.
    let home = tempfile::tempdir().unwrap();
    let files = [&NEEDED[..], &["generation_config.json"]].concat();
    let snapshot = fill(&home.path().join("hub"), &files);
    let config =
        "{\"chat_template\": \"{{ 1 }}\", \"bos_token\": \"<s>\", \"eos_token\": \"</s>\"}";
    std::fs::write(snapshot.join("tokenizer_config.json"), config).unwrap();
    let output = hub.run_with(home.path(), "org/open", &[("HF_HUB_OFFLINE", "1")]);
    assert!(
        !text(&output.stderr).contains("does not hold"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn the_variables_of_huggingface_hub_count() {
    let hub = Hub::start();
    let home = tempfile::tempdir().unwrap();
    let cache = home.path().join("elsewhere");
    fill(&cache, &NEEDED);
    let offline = ("HF_HUB_OFFLINE", "1");
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
        let output = hub.run_with(
            home.path(),
            "org/open",
            &[offline, (name, cache.to_str().unwrap())],
        );
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    let own = home.path().to_str().unwrap();
    let variables = [
        offline,
        ("HOME", own),
        ("HF_HUB_CACHE", "~/$PART"),
        ("PART", "elsewhere"),
    ];
    assert!(
        hub.run_with(home.path(), "org/open", &variables)
            .status
            .success()
    );
    assert!(!home.path().join("~").exists());
    // The token as secrets come, and an address with a slash.
    let endpoint = format!("{}/", hub.endpoint);
    let variables = [("HF_TOKEN", "hf_x\r\n"), ("HF_ENDPOINT", endpoint.as_str())];
    let output = hub.run_with(home.path(), "org/open", &variables);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let log = std::mem::take(&mut *hub.state.log.lock().unwrap());
    assert!(
        !log.is_empty()
            && log
                .iter()
                .all(|[path, _, token]| token == "Bearer hf_x" && !path.contains("//")),
        "{log:?}"
    );
    // What cannot be meant is refused with the variable's name.
    for (name, value) in [
        ("HF_TOKEN", "two words"),
        ("HF_ENDPOINT", "huggingface.co"),
        ("HF_HUB_ETAG_TIMEOUT", "soon"),
        ("HF_HOME", "~nobody/x"),
    ] {
        let output = hub.run_with(home.path(), "org/other", &[(name, value)]);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(
            message.contains(name) && !message.contains("two words"),
            "{message}"
        );
    }
}

#[test]
fn a_busy_hub_is_asked_again_and_not_for_ever() {
    let hub = Hub::start();
    for (number, status) in ["429 Too Many Requests", "503 Service Unavailable", "500 Oh"]
        .into_iter()
        .enumerate()
    {
        let home = tempfile::tempdir().unwrap();
        *hub.state.busy.lock().unwrap() = (4, status);
        let output = hub.run_with(home.path(), "org/open", &[]);
        assert!(
            output.status.success(),
            "{number}: {}",
            text(&output.stderr)
        );
    }
    let home = tempfile::tempdir().unwrap();
    *hub.state.busy.lock().unwrap() = (usize::MAX, "503 Service Unavailable");
    let before = hub.requests.load(Ordering::SeqCst);
    let output = hub.run_with(home.path(), "org/open", &[]);
    let message = text(&output.stderr);
    assert!(
        output.status.code() == Some(1) && message.contains("503"),
        "{message}"
    );
    assert!(hub.requests.load(Ordering::SeqCst) - before < 10);
}

#[test]
fn a_hub_that_does_not_answer_is_given_up() {
    let hub = Hub::start();
    let home = tempfile::tempdir().unwrap();
    hub.state.silent.store(true, Ordering::SeqCst);
    let started = Instant::now();
    let output = hub.run_with(home.path(), "org/open", &[("HF_HUB_ETAG_TIMEOUT", "1")]);
    let message = text(&output.stderr);
    assert!(
        output.status.code() == Some(1) && message.contains("timeout"),
        "{message}"
    );
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn broken_downloads_go_on_and_end_whole() {
    let hub = Hub::start();
    let wanted = std::fs::read(tiny_file("model.safetensors")).unwrap();
    let weights = |home: &Path| {
        let place = format!("hub/{OPEN}/snapshots/{COMMIT}/model.safetensors");
        std::fs::read(home.join(place)).ok()
    };
    let part = |home: &Path, bytes: &[u8]| {
        let blobs = home.join("hub").join(OPEN).join("blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        let name = format!("{:x}.incomplete", wanted.len());
        std::fs::write(blobs.join(name), bytes).unwrap();
    };
    let run = |home: &Path| {
        let output = hub.run_with(home, "org/open", &[("HF_HUB_DOWNLOAD_TIMEOUT", "1")]);
        (output.status.success(), text(&output.stderr))
    };
    let ranges = || {
        let mut ranges = hub.ranges("model.safetensors");
        hub.state.log.lock().unwrap().clear();
        ranges.retain(|range| range != "bytes=0-0");
        ranges
    };
    // It stops in the middle, and hangs or hangs up.
    for hang in [true, false] {
        let home = tempfile::tempdir().unwrap();
        let fault = if hang {
            &hub.state.hang
        } else {
            &hub.state.cut
        };
        *fault.lock().unwrap() = Some(50_000);
        let (success, notes) = run(home.path());
        assert!(success, "{notes}");
        assert!(weights(home.path()).unwrap() == wanted);
        assert_eq!(ranges(), ["", "bytes=50000-"], "hang: {hang}");
    }
    // An earlier program was ended.
    let home = tempfile::tempdir().unwrap();
    part(home.path(), &wanted[..70_000]);
    assert!(run(home.path()).0);
    assert!(weights(home.path()).unwrap() == wanted);
    assert_eq!(ranges(), ["bytes=70000-"]);
    // The hub sends all of it again, or less was asked for than there is.
    hub.state.no_ranges.store(true, Ordering::SeqCst);
    for there in [70_000, wanted.len(), 0] {
        let home = tempfile::tempdir().unwrap();
        part(home.path(), &wanted[..there]);
        assert!(run(home.path()).0);
        assert!(weights(home.path()).unwrap() == wanted, "{there}");
    }
    let home = tempfile::tempdir().unwrap();
    part(home.path(), &[&wanted[..], b"more"].concat());
    assert!(run(home.path()).0);
    assert!(weights(home.path()).unwrap() == wanted);
    hub.state.no_ranges.store(false, Ordering::SeqCst);
}

/// SHA-256 as the hub has it of large files; that of the tiny model is the one `sha256sum` gives.
#[test]
fn a_file_that_is_not_what_was_promised_is_not_kept() {
    let hub = Hub::start();
    let bytes = std::fs::read(tiny_file("model.safetensors")).unwrap();
    let sum = Command::new("sha256sum")
        .arg(tiny_file("model.safetensors"))
        .output();
    let Ok(sum) = sum else {
        return;
    };
    let sum = text(&sum.stdout)[..64].to_owned();
    let blob = |home: &Path, name: &str| home.join("hub").join(OPEN).join("blobs").join(name);
    let home = tempfile::tempdir().unwrap();
    *hub.state.checksum.lock().unwrap() = Some("0".repeat(64));
    let output = hub.run_with(home.path(), "org/open", &[]);
    let message = text(&output.stderr);
    assert!(
        output.status.code() == Some(1) && message.contains("checksum"),
        "{message}"
    );
    assert!(!blob(home.path(), &"0".repeat(64)).exists());
    // Something else lies where the download would go on.
    *hub.state.checksum.lock().unwrap() = Some(sum.clone());
    let part = blob(home.path(), &format!("{sum}.incomplete"));
    std::fs::write(&part, vec![0; 70_000]).unwrap();
    let output = hub.run_with(home.path(), "org/open", &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(std::fs::read(blob(home.path(), &sum)).unwrap() == bytes);
    assert!(!part.exists());
}

/// Publishes the embedded model's dictionaries at `org/tiny-lexico`; returns the folder.
fn publish(hub: &Hub, home: &Path) -> PathBuf {
    let (folder, file) = (home.join("published"), tiny_file("dictionary.safetensors"));
    let (folder_name, file) = (folder.to_str().unwrap(), file.to_str().unwrap());
    let output = hub.lexico(home, &["publish", file, "--out", folder_name]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    *hub.state.published.lock().unwrap() = Some(folder.clone());
    folder
}

/// Runs the embedded model with dictionaries of that name.
fn run_with_dictionary(hub: &Hub, home: &Path, name: &str) -> Output {
    hub.lexico(home, &["run", "--dictionary", name, QUESTION])
}

#[test]
fn published_dictionaries_are_downloaded_once_and_then_serve_offline() {
    let hub = Hub::start();
    let home = tempfile::tempdir().unwrap();
    publish(&hub, home.path());
    // The download breaks off, and goes on.
    *hub.state.cut.lock().unwrap() = Some(50_000);
    let output = run_with_dictionary(&hub, home.path(), "hf://org/tiny-lexico");
    assert!(
        text(&output.stdout).contains("#### 19"),
        "{}",
        text(&output.stderr)
    );
    let asked = hub.requests.load(Ordering::SeqCst);
    assert!(asked > 0 && hub.ranges("README.md").is_empty());
    let unreachable = Hub {
        endpoint: "http://127.0.0.1:9".to_owned(),
        ..Hub::start()
    };
    for name in [
        "hf://org/tiny-lexico",
        "hf://org/tiny-lexico@main",
        "hf://org/tiny-lexico/tiny.safetensors",
    ] {
        let output = run_with_dictionary(&unreachable, home.path(), name);
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
    }
    let output = run_with_dictionary(
        &unreachable,
        home.path(),
        "hf://org/tiny-lexico/other.safetensors",
    );
    let message = text(&output.stderr);
    assert!(
        message.contains("names no other.safetensors; there are tiny.safetensors"),
        "{message}"
    );
    // Only what is not there is asked for.
    let output = Command::new(assert_cmd::cargo::cargo_bin!("lexico"))
        .args(["run", "-d", "hf://org/tiny-lexico", "x"])
        .env("HF_HOME", home.path().join("empty"))
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let message = text(&output.stderr);
    assert!(
        message.contains("dictionaries.json") && message.contains("HF_HUB_OFFLINE"),
        "{message}"
    );
}

#[test]
fn published_dictionaries_that_lie_are_refused() {
    let home = tempfile::tempdir().unwrap();
    // What the index says instead, whether the hub sends more than it promised, what the message has, and the ranges that
    // are asked for of the dictionary file.
    type Lie<'a> = (
        &'a dyn Fn(&str) -> String,
        bool,
        &'a [&'a str],
        Option<&'a [&'a str]>,
    );
    let replaced = |key: &'static str, value: &'static str| {
        move |index: &str| {
            let mut json: serde_json::Value = serde_json::from_str(index).unwrap();
            json["dictionaries"][0][key] = serde_json::from_str(value).unwrap();
            json.to_string()
        }
    };
    let fingerprint = replaced("fingerprint", "\"0123456789abcdef\"");
    let digest = "\"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"";
    let digest = replaced("sha256", digest);
    let (size, outside) = (
        replaced("size", "7"),
        replaced("file", "\"../../x.safetensors\""),
    );
    let large = |index: &str| format!("{index}{}", " ".repeat(1 << 20));
    let list = |_: &str| "[]".to_owned();
    let same = |index: &str| index.to_owned();
    let lies: [Lie; 7] = [
        (
            &fingerprint,
            false,
            &["0123456789abcdef", "lexico train"],
            Some(&[]),
        ),
        (
            &size,
            false,
            &["14424352 bytes", "not the 7"],
            Some(&["bytes=0-0"]),
        ),
        (&outside, false, &["dictionaries[0].file"], Some(&[])),
        (
            &large,
            false,
            &["dictionaries.json", "at most 1048576"],
            Some(&[]),
        ),
        (&list, false, &["no JSON object"], Some(&[])),
        (&digest, false, &["SHA-256", "download it anew"], None),
        (&same, true, &["more bytes than it promised"], None),
    ];
    for (number, (lie, grown, words, ranges)) in lies.into_iter().enumerate() {
        let hub = Hub::start();
        let folder = publish(&hub, home.path());
        let index = folder.join("dictionaries.json");
        let sound = std::fs::read_to_string(&index).unwrap();
        std::fs::write(&index, lie(&sound)).unwrap();
        hub.state.grown.store(grown, Ordering::SeqCst);
        let cache = home.path().join(format!("home-{number}"));
        let output = run_with_dictionary(&hub, &cache, "hf://org/tiny-lexico");
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        for word in words {
            assert!(message.contains(word), "{number}: {word} in {message}");
        }
        if let Some(ranges) = ranges {
            assert_eq!(hub.ranges("tiny.safetensors"), ranges, "{message}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    // What is not there is told apart.
    let hub = Hub::start();
    for (name, word) in [
        ("hf://org/open", "it has no dictionaries.json"),
        ("hf://org/never", "there is no such repository"),
        ("hf://org/gated", "it is gated"),
        ("hf://org/tiny-lexico@v9", "it has no revision \"v9\""),
        ("hf://org", "hf://OWNER/NAME"),
    ] {
        let output = run_with_dictionary(&hub, home.path(), name);
        let message = text(&output.stderr);
        assert!(message.contains(word), "{name}: {message}");
    }
}

#[test]
fn ready_made_dictionaries_are_looked_for_where_the_environment_says() {
    let hub = Hub::start();
    let home = tempfile::tempdir().unwrap();
    let folder = publish(&hub, home.path());
    // The embedded model as a folder, without dictionaries.
    let model = home.path().join("tiny");
    std::fs::create_dir(&model).unwrap();
    for file in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        std::fs::copy(tiny_file(file), model.join(file)).unwrap();
    }
    let run = |place: Option<&str>| {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("lexico"));
        command
            .args(["run", "-m", model.to_str().unwrap(), QUESTION])
            .env("HF_ENDPOINT", &hub.endpoint)
            .env("HF_HOME", home.path())
            .env("XDG_DATA_HOME", home.path().join("data"))
            .env_remove("HF_TOKEN")
            .env_remove("HF_HUB_OFFLINE")
            .env_remove("LEXICO_DICTIONARIES")
            .stdin(Stdio::null());
        if let Some(place) = place {
            command.env("LEXICO_DICTIONARIES", place);
        }
        let output = command.output().unwrap();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    // Without it nobody is asked, and the message says how.
    let (code, _, message) = run(None);
    assert_eq!((code, hub.requests.load(Ordering::SeqCst)), (Some(1), 0));
    assert!(
        message.contains("LEXICO_DICTIONARIES") && message.contains("hf://OWNER/NAME"),
        "{message}"
    );
    for place in [
        "hf://org",
        "hf://org/",
        "hf://org/tiny-lexico",
        folder.to_str().unwrap(),
    ] {
        let (code, answer, notes) = run(Some(place));
        assert!(answer.contains("#### 19"), "{place}: {notes}");
        assert_eq!(code, Some(0));
        assert!(notes.contains("LEXICO_DICTIONARIES"), "{notes}");
    }
    for (place, word) in [
        ("hf://nobody", "nobody/tiny-lexico"),
        ("hf://a b", "hf://OWNER/NAME"),
        ("/no/such/folder", "/no/such/folder"),
    ] {
        let (code, _, notes) = run(Some(place));
        assert_eq!(code, Some(1), "{notes}");
        for word in [word, "no ready-made dictionaries", "lexico train --model"] {
            assert!(notes.contains(word), "{place}: {word} in {notes}");
        }
    }
}
