//! Memory, prefixes on disk, clients that go away, and the end of a server.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::io::Read;

use common::{Running, problem, small, text};
use lexico_serve::Options;
use serde_json::{Value, json};

fn greedy(prompt: &str, max_tokens: usize) -> Value {
    json!({ "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true })
}

fn cached(document: &Value) -> u64 {
    let details = &document["usage"]["prompt_tokens_details"];
    details["cached_tokens"].as_u64().unwrap()
}

/// As a router hears of them.
#[test]
fn events_of_kept_prefixes_are_published() {
    use zeromq::{Socket, SocketRecv, SubSocket};
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let endpoint = format!("tcp://127.0.0.1:{port}");
    let server = Running::start(Options {
        kv_events: Some(endpoint.clone()),
        ..small()
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut socket = SubSocket::new();
        socket.connect(&endpoint).await.unwrap();
        socket.subscribe("").await.unwrap();
        let patience = std::time::Duration::from_millis(300);
        // A subscription takes effect a little later: prompts until one is heard of, maybe in its middle, to its end.
        let mut number = 0;
        loop {
            server.complete(&greedy(&long(number), 1));
            number += 1;
            if tokio::time::timeout(patience, socket.recv()).await.is_ok() {
                break;
            }
            assert!(number < 100, "nothing was heard");
        }
        while tokio::time::timeout(patience, socket.recv()).await.is_ok() {}
        server.complete(&greedy(&long(number), 1));
        number += 1;
        let mut stored: Vec<Value> = Vec::new();
        // A message has one event or more.
        while stored.len() < 2 {
            let message = socket.recv().await.unwrap().into_vec();
            let frames = (message[0].len(), message[1].len(), message.len());
            assert_eq!(frames, (0, 8, 3));
            let (time, events, rank): (f64, Vec<Value>, u32) =
                rmp_serde::from_slice(&message[2]).unwrap();
            assert!(time > 1e9 && rank == 0);
            let own = events.into_iter();
            stored.extend(own.filter(|event| event["type"] == "BlockStored"));
        }
        assert_eq!(stored[0]["parent_block_hash"], Value::Null);
        assert_eq!(stored[1]["parent_block_hash"], stored[0]["block_hashes"][0]);
        assert_eq!(stored[0]["block_size"], 32);
        let tokens = server
            .post("/tokenize", &json!({ "prompt": long(number - 1) }))
            .document;
        assert_eq!(
            stored[0]["token_ids"].as_array().unwrap()[..],
            tokens["tokens"].as_array().unwrap()[..32]
        );
        for field in [
            "lora_id",
            "lora_name",
            "medium",
            "extra_keys",
            "group_idx",
            "kv_cache_spec_kind",
            "kv_cache_spec_sliding_window",
        ] {
            assert_eq!(stored[0].get(field), Some(&Value::Null), "{field}");
        }
    });
}

/// A prompt of some chunks.
fn long(number: usize) -> String {
    (0..6)
        .map(|i| problem(number + i) + "Answer: 7\n")
        .collect()
}

#[test]
fn the_memory_is_kept_and_all_that_fits_is_served() {
    let server = Running::start(Options {
        kv_memory: 3 << 20,
        ..small()
    });
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..16)
            .map(|i| {
                let server = &server;
                scope.spawn(move || server.post("/v1/completions", &greedy(&long(i), 60)))
            })
            .collect();
        let budget = server.figure("lexico_kv_budget_bytes");
        // A twenty-fifth is set aside for the allocator.
        assert!((budget - 0.96 * f64::from(3 << 20)).abs() < 1.0);
        while !asked.iter().all(|thread| thread.is_finished()) {
            assert!(server.figure("lexico_kv_reserved_bytes") <= budget);
            assert!(server.figure("lexico_kv_bytes") <= budget);
        }
        for thread in asked {
            let answer = thread.join().unwrap();
            assert_eq!(answer.status, 200, "{}", answer.document);
            assert_eq!(answer.document["usage"]["completion_tokens"], 60);
        }
    });
    server.until("nothing runs", || {
        server.figure("vllm:num_requests_running") == 0.0
    });
}

#[test]
fn clients_that_go_away_free_their_memory() {
    let server = Running::start(small());
    for stream in [true, false] {
        let mut body = greedy(&problem(1), 3000);
        body["stream"] = json!(stream);
        match stream {
            true => {
                let mut response = server.send("/v1/completions", &body.to_string(), &[]);
                let mut some = [0; 100];
                response
                    .body_mut()
                    .as_reader()
                    .read_exact(&mut some)
                    .unwrap();
            }
            false => {
                let address = server.base.strip_prefix("http://").unwrap();
                let mut connection = std::net::TcpStream::connect(address).unwrap();
                let body = body.to_string();
                let head = format!(
                    "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
                    body.len()
                );
                std::io::Write::write_all(&mut connection, (head + &body).as_bytes()).unwrap();
                server.until("it is served", || {
                    server.figure("vllm:num_requests_running") == 1.0
                });
            }
        }
        server.until("it is given up", || {
            server.figure("vllm:num_requests_running") == 0.0
        });
        assert!(server.figure("lexico_kv_reserved_bytes") < 500_000.0);
    }
    assert!(server.figure("lexico_generated_tokens_total") < 5000.0);
    // The one that left before the answer's beginning is counted too.
    let gone = "lexico_requests_total{route=\"/v1/completions\",status=\"499\"}";
    server.until("it is counted", || {
        server
            .get("/metrics")
            .document
            .as_str()
            .unwrap()
            .contains(gone)
    });
}

#[test]
fn what_was_read_anew_is_not_told_as_cached() {
    let server = Running::start(small());
    let mut twice = greedy(&long(3), 2);
    twice["n"] = json!(2);
    assert_eq!(cached(&server.complete(&twice)), 0);
    let both = |body: &Value| cached(&server.complete(body));
    let one = both(&greedy(&long(3), 2));
    let mut two = greedy("", 2);
    two["prompt"] = json!([long(3), long(3)]);
    assert!(one > 100);
    assert_eq!(both(&two), 2 * one);
}

#[test]
fn prefixes_outlive_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("prefixes");
    let options = || Options {
        prefix_store: Some(place.to_str().unwrap().to_owned()),
        ..small()
    };
    let first = Running::start(options());
    let whole = first.complete(&greedy(&long(3), 40));
    assert_eq!(cached(&whole), 0);
    first.stop();
    let files: Vec<_> = place
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(files.len(), 1);
    // A copy for later, and files of others.
    let bytes = std::fs::read(&files[0]).unwrap();
    std::fs::write(place.join("notes.txt"), "not ours").unwrap();
    std::fs::write(place.join(format!("{}.prefix", "0".repeat(64))), "not ours").unwrap();
    // A store of others in a folder below.
    let below = place.join("below");
    std::fs::create_dir(&below).unwrap();
    std::fs::write(below.join(files[0].file_name().unwrap()), "not ours").unwrap();

    let second = Running::start(options());
    let again = second.complete(&greedy(&long(3), 40));
    assert!(cached(&again) > 100, "{again}");
    assert_eq!(text(&again), text(&whole));
    // Another prompt has nothing of it.
    assert_eq!(cached(&second.complete(&greedy(&long(4), 5))), 0);
    second.stop();

    // Another model, or other settings, find nothing.
    let other = Running::start(Options {
        cache: "lexico:window=16,batch=4,sparsity=4".parse().unwrap(),
        ..options()
    });
    assert_eq!(cached(&other.complete(&greedy(&long(3), 5))), 0);
    other.stop();

    // Whatever happens to the file, the text is right, and the server goes on.
    for at in (0..bytes.len()).step_by(bytes.len() / 3) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1;
        for damaged in [flipped, bytes[..at].to_vec()] {
            std::fs::write(&files[0], damaged).unwrap();
            let server = Running::start(options());
            let again = server.complete(&greedy(&long(3), 40));
            assert_eq!((cached(&again), text(&again)), (0, text(&whole)));
            server.stop();
        }
    }
    // What was damaged has been written anew.
    let server = Running::start(options());
    let again = server.complete(&greedy(&long(3), 40));
    assert!(cached(&again) > 100);
    assert_eq!(text(&again), text(&whole));
}

#[test]
fn a_small_store_keeps_its_size() {
    let folder = tempfile::tempdir().unwrap();
    let options = |bytes: u64| Options {
        prefix_store: Some(folder.path().to_str().unwrap().to_owned()),
        prefix_store_bytes: bytes,
        ..small()
    };
    let size = || -> u64 {
        let entries = folder.path().read_dir().unwrap();
        entries
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum()
    };
    let server = Running::start(options(1 << 30));
    server.complete(&greedy(&long(1), 2));
    server.stop();
    let one = size();
    let server = Running::start(options(3 * one));
    for number in 2..8 {
        server.complete(&greedy(&long(9 * number), 2));
    }
    server.stop();
    assert!(size() <= 3 * one && size() > one, "{} of {one}", size());
}

#[test]
fn a_server_that_stops_ends_what_it_has_begun() {
    let server = Running::start(small());
    let whole = server.complete(&greedy(&problem(2), 600));
    let idle = || server.figure("vllm:num_requests_running") == 0.0;
    server.until("nothing runs", idle);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| server.complete(&greedy(&problem(2), 600)));
        let running = || server.figure("vllm:num_requests_running") == 1.0;
        server.until("it is served", || asked.is_finished() || running());
        server.ask_to_stop();
        assert_eq!(text(&asked.join().unwrap()), text(&whole));
    });
    server.stopped();
}

#[test]
fn figures_models_and_the_page_are_there() {
    let server = Running::start(small());
    server.complete(&greedy(&problem(1), 5));
    let models = server.get("/v1/models").document;
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][0]["max_model_len"], 4096);
    assert_eq!(server.get("/v1/models/tiny").document, models["data"][0]);
    assert!(server.get("/version").document["version"].is_string());
    let document = server.get("/openapi.json").document;
    assert!(document["openapi"].as_str().unwrap().starts_with('3'));
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/metrics",
    ] {
        assert!(document["paths"][path].is_object(), "{path}");
    }
    let page = server.get("/");
    assert!(page.document.as_str().unwrap().contains("<textarea"));
    assert!(page.headers.contains_key("content-security-policy"));
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "lexico_prompt_tokens_total",
        "lexico_kv_fp16_bytes",
        "lexico_time_to_first_token_seconds_count",
    ] {
        assert!(server.figure(name) >= 0.0);
    }
    let tokens = server.post(
        "/tokenize",
        &json!({ "prompt": "How many coins?", "return_token_strs": true }),
    );
    let back = server.post(
        "/detokenize",
        &json!({ "tokens": tokens.document["tokens"] }),
    );
    assert_eq!(back.document["prompt"], "How many coins?");
    let chat = json!({ "messages": [{ "role": "user", "content": "Hello" }] });
    assert!(
        server.post("/tokenize", &chat).document["count"]
            .as_u64()
            .unwrap()
            > 5
    );
    assert!(server.get("/tokenizer_info").document["eos_token"].is_string());
}
