//! `lexico serve` as a process: it says where it listens, stops when it is told to, and survives being killed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic
#![cfg(unix)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use serde_json::{Value, json};

struct Server {
    child: Child,
    address: String,
    log: Option<BufReader<ChildStderr>>,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let child = Command::new(assert_cmd::cargo::cargo_bin!("lexico"))
            .args(["serve", "--port", "0", "--log-format", "json"])
            .args(["--kv-memory", "64MiB"])
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn();
        let mut server = Self {
            child: child.unwrap(),
            address: String::new(),
            log: None,
        };
        let mut log = BufReader::new(server.child.stderr.take().unwrap());
        loop {
            let mut line = String::new();
            assert!(log.read_line(&mut line).unwrap() > 0, "it ended");
            let Ok(line) = serde_json::from_str::<Value>(&line) else {
                panic!("{line}");
            };
            if let Some(address) = line["address"].as_str() {
                address.clone_into(&mut server.address);
            }
            if line["message"] == "ready" {
                server.log = Some(log);
                return server;
            }
        }
    }

    /// Begins a request.
    fn send(&self, body: &Value) -> TcpStream {
        let body = body.to_string();
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        stream
    }

    fn complete(&self, body: &Value) -> Value {
        let mut answer = String::new();
        self.send(body).read_to_string(&mut answer).unwrap();
        let (head, document) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
        serde_json::from_str(document).unwrap()
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([name, &pid])
                .status()
                .unwrap()
                .success()
        );
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn prompt(number: usize) -> Value {
    let text = format!("Question: Ana has {number} coins. Ben gives Ana 7 more. ").repeat(12);
    json!({ "prompt": text, "max_tokens": 12, "temperature": 0, "ignore_eos": true })
}

#[test]
fn it_stops_when_it_is_told_to() {
    let mut server = Server::start(&[]);
    assert_eq!(
        server.complete(&prompt(1))["usage"]["completion_tokens"],
        12
    );
    server.signal("-TERM");
    assert!(server.child.wait().unwrap().success());
    let mut rest = String::new();
    let log = server.log.as_mut().unwrap();
    log.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"stopped\""), "{rest}");
}

/// Killed in the middle of work and of writing prefixes, it leaves a store that the next one uses, and no text is wrong.
#[test]
fn a_server_that_is_killed_twenty_times_leaves_a_sound_store() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("prefixes");
    let store = [
        "--prefix-store",
        place.to_str().unwrap(),
        "--ubatch-size",
        "32",
    ];
    let text = |document: &Value| document["choices"][0]["text"].clone();
    let expected: Vec<Value> = {
        let server = Server::start(&store[2..]);
        (0..6)
            .map(|number| text(&server.complete(&prompt(number))))
            .collect()
    };
    for round in 0..20 {
        let server = Server::start(&store);
        let number = round % 6;
        assert_eq!(
            text(&server.complete(&prompt(number))),
            expected[number],
            "round {round}"
        );
        // More under way, of which some is written and some not when it is killed.
        let open: Vec<TcpStream> = (0..6).map(|number| server.send(&prompt(number))).collect();
        std::thread::sleep(std::time::Duration::from_millis(3 * round as u64));
        server.signal("-KILL");
        drop(open);
    }
    let server = Server::start(&store);
    let mut cached = 0;
    for (number, expected) in expected.iter().enumerate() {
        let answer = server.complete(&prompt(number));
        assert_eq!(text(&answer), *expected);
        cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap();
    }
    assert!(cached > 0, "the store is used");
    assert!(prefixes(&place) > 0);
}

/// The number of prefixes in a store.
fn prefixes(place: &Path) -> usize {
    let entries = place
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    entries
        .filter(|name| name.to_string_lossy().ends_with(".prefix"))
        .count()
}
