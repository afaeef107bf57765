//! What is wrong is refused, in OpenAI's envelope, by the name of its field; and the server goes on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;

use common::{Running, small};
use lexico_serve::{Error, Options, Server};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A chat, with one field more.
fn chat(field: &str, value: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 3 });
    body[field] = value;
    body
}

fn completion(field: &str, value: Value) -> Value {
    let mut body = json!({ "prompt": "Hello", "max_tokens": 3 });
    body[field] = value;
    body
}

#[test]
fn wrong_fields_are_named() {
    let server = Running::start(small());
    let message = |message: Value| chat("messages", json!([message]));
    let tool = |tool: Value| chat("tools", json!([tool]));
    let function = |function: Value| tool(json!({ "type": "function", "function": function }));
    let schema = |schema: Value| {
        let named = json!({ "type": "json_schema", "json_schema": { "schema": schema } });
        chat("response_format", named)
    };
    let cases = [
        (CHAT, chat("messages", json!([])), "messages"),
        (CHAT, chat("messages", json!("Hello")), "messages"),
        (CHAT, json!({ "max_tokens": 3 }), "messages"),
        (CHAT, message(json!("Hello")), "messages[0]"),
        (
            CHAT,
            message(json!({ "content": "Hello" })),
            "messages[0].role",
        ),
        (
            CHAT,
            message(json!({ "role": "robot", "content": "Hello" })),
            "messages[0].role",
        ),
        (
            CHAT,
            message(json!({ "role": "user" })),
            "messages[0].content",
        ),
        (
            CHAT,
            message(json!({ "role": "user", "content": 5 })),
            "messages[0].content",
        ),
        (
            CHAT,
            message(
                json!({ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }),
            ),
            "messages[0].content[0]",
        ),
        (
            CHAT,
            message(json!({ "role": "assistant", "tool_calls": 3 })),
            "messages[0].tool_calls",
        ),
        (
            CHAT,
            message(
                json!({ "role": "assistant", "tool_calls": [{ "function": { "name": "f" } }] }),
            ),
            "messages[0].tool_calls[0].function",
        ),
        (TEXT, completion("stop", json!("x".repeat(5000))), "stop"),
        (TEXT, completion("prompt", json!(vec!["a"; 1025])), "prompt"),
        (TEXT, completion("prompt", json!(vec![1; 5000])), "prompt"),
        (CHAT, chat("max_tokens", json!(-1)), "max_tokens"),
        (CHAT, chat("max_tokens", json!(0)), "max_tokens"),
        (CHAT, chat("max_tokens", json!("many")), "max_tokens"),
        (
            CHAT,
            chat("max_completion_tokens", json!(1.5)),
            "max_completion_tokens",
        ),
        (CHAT, chat("temperature", json!(-1)), "temperature"),
        (CHAT, chat("temperature", json!("hot")), "temperature"),
        (CHAT, chat("top_p", json!(0)), "top_p"),
        (CHAT, chat("top_p", json!(1.1)), "top_p"),
        (CHAT, chat("top_k", json!(-2)), "top_k"),
        (CHAT, chat("min_p", json!(2)), "min_p"),
        (CHAT, chat("presence_penalty", json!(3)), "presence_penalty"),
        (
            CHAT,
            chat("frequency_penalty", json!(-3)),
            "frequency_penalty",
        ),
        (
            CHAT,
            chat("repetition_penalty", json!(0)),
            "repetition_penalty",
        ),
        (
            CHAT,
            chat("logit_bias", json!({ "99999": 1 })),
            "logit_bias.99999",
        ),
        (
            CHAT,
            chat("logit_bias", json!({ "5": 1000 })),
            "logit_bias.5",
        ),
        (CHAT, chat("seed", json!("luck")), "seed"),
        (CHAT, chat("n", json!(0)), "n"),
        (CHAT, chat("n", json!(1000)), "n"),
        (CHAT, chat("stop", json!(5)), "stop"),
        (CHAT, chat("stop", json!(vec!["x"; 100])), "stop"),
        (
            CHAT,
            chat("stop_token_ids", json!([-1])),
            "stop_token_ids[0]",
        ),
        (CHAT, chat("stream", json!("yes")), "stream"),
        (
            CHAT,
            chat("stream_options", json!({ "include_usage": true })),
            "stream_options",
        ),
        (CHAT, chat("top_logprobs", json!(3)), "top_logprobs"),
        (CHAT, chat("top_logprobs", json!(21)), "top_logprobs"),
        (
            CHAT,
            chat("response_format", json!({ "type": "poem" })),
            "response_format.type",
        ),
        (
            CHAT,
            schema(json!({ "type": "no such type" })),
            "response_format",
        ),
        (
            CHAT,
            schema(json!({ "$ref": "#/nowhere" })),
            "response_format",
        ),
        (CHAT, chat("tools", json!({})), "tools"),
        (CHAT, tool(json!({ "type": "browser" })), "tools[0].type"),
        (
            CHAT,
            tool(json!({ "type": "function" })),
            "tools[0].function",
        ),
        (
            CHAT,
            function(json!({ "name": "a b" })),
            "tools[0].function.name",
        ),
        (
            CHAT,
            function(json!({ "name": "f", "parameters": 3 })),
            "tools[0].function.parameters",
        ),
        (CHAT, chat("tool_choice", json!("required")), "tool_choice"),
        (CHAT, chat("tool_choice", json!("perhaps")), "tool_choice"),
        (
            CHAT,
            chat("tool_choice", json!({ "function": { "name": "f" } })),
            "tool_choice",
        ),
        (TEXT, json!({ "max_tokens": 3 }), "prompt"),
        (TEXT, completion("prompt", json!([])), "prompt"),
        (TEXT, completion("prompt", json!([[]])), "prompt"),
        (TEXT, completion("prompt", json!({})), "prompt"),
        (TEXT, completion("prompt", json!([5, 99999])), "prompt"),
        (TEXT, completion("prompt", json!([-1])), "prompt"),
        (TEXT, completion("max_tokens", json!(0)), "max_tokens"),
        (TEXT, completion("logprobs", json!(21)), "logprobs"),
        (TEXT, completion("suffix", json!("and so on")), "suffix"),
        (
            TEXT,
            completion("prompt", json!("coins ".repeat(5000))),
            "prompt",
        ),
        (TEXT, completion("max_tokens", json!(5000)), "prompt"),
        ("/tokenize", json!({}), "prompt"),
        ("/detokenize", json!({ "tokens": [99999] }), "tokens"),
        ("/detokenize", json!({}), "tokens"),
    ];
    for (path, body, param) in cases {
        let answer = server.post(path, &body);
        let error = &answer.document["error"];
        let shown: String = body.to_string().chars().take(200).collect();
        assert_eq!(answer.status, 400, "{shown}: {}", answer.document);
        assert_eq!(error["param"], param, "{shown}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().unwrap().len() < 1500);
    }
    let long = server.post(TEXT, &completion("max_tokens", json!(5000)));
    assert_eq!(long.document["error"]["code"], "context_length_exceeded");
    let other = server.post(TEXT, &completion("model", json!("gpt-4")));
    assert_eq!(
        (other.status, &other.document["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    for (path, body) in [
        (TEXT, ""),
        (TEXT, "{"),
        (TEXT, "[]"),
        (CHAT, "\u{0}"),
        (CHAT, "{} {}"),
    ] {
        let answer = server.post_text(path, body);
        assert_eq!(answer.status, 400, "{body:?}");
        assert!(answer.document["error"]["message"].is_string(), "{body:?}");
    }
    assert_eq!(server.post_text(TEXT, &"[".repeat(100_000)).status, 400);
    assert_eq!(server.get("/v1/nothing").status, 404);
    assert_eq!(server.get(TEXT).status, 405);
    assert_eq!(server.get("/v1/models/gpt-4").status, 404);
    let known = completion("an unknown field", json!({ "of": ["any", "kind"] }));
    assert_eq!(server.post(TEXT, &known).status, 200);
    for field in [
        "temperature",
        "stop",
        "seed",
        "stream",
        "logit_bias",
        "n",
        "logprobs",
        "model",
    ] {
        assert_eq!(
            server.post(TEXT, &completion(field, Value::Null)).status,
            200,
            "{field}"
        );
    }
}

/// As openai-python's `message.model_dump()` writes answers, and with what models made of arguments.
#[test]
fn answers_that_clients_send_back_are_taken() {
    let server = Running::start(small());
    let call = |arguments: &str| json!([{ "id": "1", "type": "function", "function": { "name": "f", "arguments": arguments } }]);
    for calls in [
        json!(null),
        json!([]),
        call(""),
        call("{"),
        call("{\"a\": 1}"),
    ] {
        let mut body = chat("max_tokens", json!(2));
        let answer =
            json!({ "role": "assistant", "content": "Hi", "refusal": null, "tool_calls": calls });
        let messages = body["messages"].as_array_mut().unwrap();
        messages.extend([answer, json!({ "role": "user", "content": "Again" })]);
        server.chat(&body);
    }
}

/// Texts of one call wait for each other, not for others', and let others' calls go between.
#[test]
fn a_call_of_many_texts_is_answered_whole_and_leaves_room_for_others() {
    let server = Running::start(Options {
        parallel: 1,
        queue: 16,
        queue_timeout: std::time::Duration::from_millis(20),
        ..small()
    });
    let mut many = completion("prompt", json!(vec![common::problem(1); 17]));
    many["max_tokens"] = json!(200);
    many["ignore_eos"] = json!(true);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| server.complete(&many));
        server.until("it is served", || {
            asked.is_finished() || server.figure("vllm:num_requests_running") == 1.0
        });
        // The queue is full, but a call that has begun is never turned away for another's sake.
        let busy = server.post(TEXT, &completion("max_tokens", json!(5)));
        assert_eq!(busy.status, 429, "{}", busy.document);
        assert_eq!(
            asked.join().unwrap()["choices"].as_array().unwrap().len(),
            17
        );
    });
    many["prompt"]
        .as_array_mut()
        .unwrap()
        .push(json!("one more"));
    let refused = server.post(TEXT, &many);
    assert_eq!(refused.status, 400, "{}", refused.document);
    assert_eq!(refused.document["error"]["param"], "prompt");
    server.stop();
    let server = Running::start(Options {
        parallel: 1,
        ..small()
    });
    many["prompt"].as_array_mut().unwrap().truncate(12);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| server.complete(&many));
        server.until("it is served", || {
            asked.is_finished() || server.figure("vllm:num_requests_running") == 1.0
        });
        server.complete(&completion("max_tokens", json!(5)));
        assert!(!asked.is_finished());
        asked.join().unwrap();
    });
}

#[test]
fn pages_of_other_origins_may_send_headers_of_their_own() {
    let server = Running::start(small());
    let headers = "authorization,content-type,x-stainless-lang";
    let request = ureq::options(format!("{}{TEXT}", server.base));
    let request = request.header("origin", "http://page.example");
    let request = request.header("access-control-request-method", "POST");
    let request = request.header("access-control-request-headers", headers);
    let answer = request.call().unwrap();
    assert_eq!(answer.headers()["access-control-allow-headers"], headers);
}

#[test]
fn requests_without_the_key_are_turned_away() {
    let server = Running::start(Options {
        // As it stands in a file.
        api_key: Some("secret\n".to_owned()),
        ..small()
    });
    for path in ["/v1/models", "/metrics", "/version", "/openapi.json"] {
        let answer = server.get(path);
        assert_eq!(answer.status, 401, "{path}");
        assert_eq!(answer.document["error"]["code"], "invalid_api_key");
    }
    assert_eq!(server.get("/").status, 200);
    let body = completion("n", json!(1));
    assert_eq!(
        server
            .post_with(TEXT, &body, &[("authorization", "Bearer wrong")])
            .status,
        401
    );
    let answer = server.post_with(
        TEXT,
        &body,
        &[
            ("authorization", "Bearer secret"),
            ("x-request-id", "mine"),
            ("origin", "http://page.example"),
        ],
    );
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["x-request-id"], "mine");
    assert_eq!(answer.headers["access-control-allow-origin"], "*");
}

#[test]
fn texts_that_can_never_fit_are_refused_and_full_queues_say_when_to_come_back() {
    let server = Running::start(Options {
        kv_memory: 700_000,
        parallel: 1,
        queue: 0,
        ..small()
    });
    let huge = server.post(TEXT, &completion("max_tokens", json!(4000)));
    assert_eq!(huge.status, 400, "{}", huge.document);
    assert_eq!(huge.document["error"]["code"], "kv_memory_exceeded");
    let mut long = completion("max_tokens", json!(1500));
    long["stream"] = json!(true);
    long["ignore_eos"] = json!(true);
    let mut others = server.send(TEXT, &long.to_string(), &[]);
    let mut some = [0; 10];
    others.body_mut().as_reader().read_exact(&mut some).unwrap();
    let busy = server.post(TEXT, &completion("max_tokens", json!(5)));
    drop(others);
    assert_eq!(busy.status, 429, "{}", busy.document);
    assert_eq!(busy.document["error"]["type"], "rate_limit_error");
    assert!(
        busy.headers["retry-after"]
            .to_str()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 0
    );
}

#[test]
fn bodies_and_headers_beyond_limits_are_refused() {
    let server = Running::start(Options {
        body_bytes: 10_000,
        ..small()
    });
    let large = completion("prompt", json!("x".repeat(20_000)));
    let answer = server.post(TEXT, &large);
    assert_eq!(answer.status, 413, "{}", answer.document);
    let address = server.base.strip_prefix("http://").unwrap();
    for text in [
        "GET /health HTTP/1.1\r\nhost: x\r\nx: ".to_owned() + &"y".repeat(1 << 20) + "\r\n\r\n",
        "no such protocol\r\n\r\n".to_owned(),
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: many\r\n\r\n".to_owned(),
    ] {
        let mut stream = TcpStream::connect(address).unwrap();
        // It may hang up before all is sent.
        let _ = stream.write_all(text.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{answer}"
        );
    }
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn settings_that_cannot_be_are_refused_before_anything_is_loaded() {
    for options in [
        Options {
            parallel: 0,
            ..small()
        },
        Options {
            chunk: 0,
            ..small()
        },
        Options {
            kv_memory: 0,
            ..small()
        },
        Options {
            api_key: Some(" ".to_owned()),
            ..small()
        },
    ] {
        assert!(matches!(Server::bind(options), Err(Error::Setting { .. })));
    }
    let options = Options {
        address: ("no such host.example".to_owned(), 1),
        ..small()
    };
    assert!(matches!(Server::bind(options), Err(Error::Listen { .. })));
    let run = |options: Options| {
        let server = Server::bind(options).unwrap();
        server.run(lexico_llm::Model::tiny, std::future::pending)
    };
    let folder = tempfile::tempdir().unwrap();
    let store = Some(folder.path().join("store").to_str().unwrap().to_owned());
    let full = Options {
        cache: "full".parse().unwrap(),
        prefix_store: store,
        ..small()
    };
    assert!(
        run(full)
            .unwrap_err()
            .to_string()
            .contains("--prefix-store")
    );
    let template = Options {
        chat_template: Some("{% for".to_owned()),
        ..small()
    };
    assert!(
        run(template)
            .unwrap_err()
            .to_string()
            .contains("chat template")
    );
    let events = Options {
        kv_events: Some("carrier pigeon".to_owned()),
        ..small()
    };
    assert!(run(events).unwrap_err().to_string().contains("--kv-events"));
    let failed = Server::bind(small())
        .unwrap()
        .run(|| Err("no model"), std::future::pending);
    assert_eq!(failed.unwrap_err().to_string(), "no model");
}
