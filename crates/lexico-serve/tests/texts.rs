//! Texts are what they would be alone, however they are asked for and whoever is served beside them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use common::{Running, problem, small, text};
use serde_json::{Value, json};

fn greedy(prompt: &str, max_tokens: usize) -> Value {
    json!({ "prompt": prompt, "max_tokens": max_tokens, "temperature": 0 })
}

/// Prompts of many lengths.
fn prompts(count: usize) -> Vec<String> {
    let prompt = |number: usize| {
        let before: String = (0..number % 5)
            .map(|i| problem(number + 7 * i) + "Answer: 5\n")
            .collect();
        before + &problem(number)
    };
    (0..count).map(prompt).collect()
}

#[test]
fn fifty_texts_together_are_each_what_they_are_alone() {
    // Without prefixes kept: nothing of one text may reach another by them either.
    let server = Running::start(small());
    let prompts = prompts(50);
    let lengths = |i: usize| 8 + i % 40;
    let together: Vec<String> = std::thread::scope(|scope| {
        let ask = |(i, prompt): (usize, &String)| {
            let prompt = prompt.clone();
            let server = &server;
            scope.spawn(move || text(&server.complete(&greedy(&prompt, lengths(i)))).to_owned())
        };
        let asked: Vec<_> = prompts.iter().enumerate().map(ask).collect();
        asked
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(server.figure("lexico_generated_tokens_total") > 500.0);
    server.stop();
    let server = Running::start(small());
    for (i, prompt) in prompts.iter().enumerate() {
        let alone = server.complete(&greedy(prompt, lengths(i)));
        assert_eq!(text(&alone), together[i], "{prompt}");
    }
    let distinct: std::collections::HashSet<&String> = together.iter().collect();
    assert!(distinct.len() > 20, "prompts differ, and so do texts");
}

#[test]
fn drawn_texts_depend_on_their_seed_alone() {
    let server = Running::start(small());
    let body = |seed: i64| json!({ "prompt": problem(3), "max_tokens": 30, "temperature": 1.2, "seed": seed });
    let alone: Vec<String> = (0..6)
        .map(|seed| text(&server.complete(&body(seed))).to_owned())
        .collect();
    let together: Vec<String> = std::thread::scope(|scope| {
        let server = &server;
        let asked: Vec<_> = (0..6)
            .map(|seed| scope.spawn(move || text(&server.complete(&body(seed))).to_owned()))
            .collect();
        asked
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(alone, together);
    assert!(alone.iter().any(|text| *text != alone[0]), "seeds differ");
    let several = server.complete(&json!({
        "prompt": problem(3), "max_tokens": 30, "temperature": 1.2, "seed": 0, "n": 3,
    }));
    let choices = several["choices"].as_array().unwrap();
    let texts: Vec<&str> = choices
        .iter()
        .map(|c| c["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts, alone[..3], "each answer has the next seed");
    let usage = &several["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap()
    );
}

#[test]
fn prompts_that_were_read_before_are_not_read_anew_and_give_the_same_texts() {
    let first = Running::start(small());
    let long: String = (0..6).map(|i| problem(i) + "Answer: 7\n").collect();
    let cached = |document: &Value| {
        document["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    let ask = |server: &Running, prompt: &str| {
        let document = server.complete(&greedy(prompt, 24));
        (text(&document).to_owned(), cached(&document))
    };
    let anew = ask(&first, &long);
    assert_eq!(anew.1, 0);
    let again = ask(&first, &long);
    assert_eq!(again.0, anew.0);
    let tokens = first.post("/tokenize", &json!({ "prompt": long })).document["count"]
        .as_u64()
        .unwrap();
    assert_eq!(again.1, (tokens - 1) / 32 * 32, "all whole chunks");
    // A prompt that goes on otherwise is read from where they part once that has been seen.
    let others: Vec<String> = (20..24).map(|i| long.clone() + &problem(i)).collect();
    let of_others: Vec<(String, u64)> = others.iter().map(|other| ask(&first, other)).collect();
    assert!(of_others[1].1 > 0 && of_others[3].1 > 0, "{of_others:?}");
    first.stop();
    let second = Running::start(small());
    for (other, (text, _)) in others.iter().zip(&of_others).rev() {
        assert_eq!(&ask(&second, other).0, text);
    }
    let cheap = small();
    let spec = "lexico:window=16,batch=4,format=i8".parse().unwrap();
    let third = Running::start(lexico_serve::Options {
        cache: spec,
        ..cheap
    });
    let sparse: Vec<_> = (0..2).map(|_| ask(&third, &others[0])).collect();
    assert!(sparse[1].1 > 0 && sparse[0].0 == sparse[1].0, "{sparse:?}");
}

#[test]
fn streams_tell_what_whole_answers_tell() {
    let server = Running::start(small());
    let body = greedy(&problem(5), 30);
    let whole = server.complete(&body);
    let mut asked = body.clone();
    asked["stream_options"] = json!({ "include_usage": true });
    let chunks = server.stream("/v1/completions", &asked);
    let (usage, chunks) = chunks.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(
        usage["usage"]["completion_tokens"],
        whole["usage"]["completion_tokens"]
    );
    let streamed: String = chunks.iter().map(text).collect();
    assert_eq!(streamed, text(&whole));
    let (last, before) = chunks.split_last().unwrap();
    assert_eq!(
        last["choices"][0]["finish_reason"],
        whole["choices"][0]["finish_reason"]
    );
    assert!(
        before
            .iter()
            .all(|chunk| chunk["choices"][0]["finish_reason"].is_null())
    );
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk["usage"].is_null() && chunk["id"] == usage["id"])
    );

    let body = json!({
        "messages": [{ "role": "user", "content": problem(2) }], "max_tokens": 20, "temperature": 0, "n": 2,
    });
    let whole = server.chat(&body);
    let chunks = server.stream("/v1/chat/completions", &body);
    for index in 0..2 {
        let own: Vec<&Value> = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0])
            .filter(|choice| choice["index"] == index)
            .collect();
        assert_eq!(
            own[0]["delta"],
            json!({ "role": "assistant", "content": "" })
        );
        assert_eq!(own.last().unwrap()["delta"], json!({}));
        let content = own
            .iter()
            .filter_map(|choice| choice["delta"]["content"].as_str());
        let message = &whole["choices"][index as usize]["message"];
        assert_eq!(
            content.collect::<String>(),
            message["content"].as_str().unwrap()
        );
    }
    assert!(
        chunks.iter().all(|chunk| chunk.get("usage").is_none()),
        "none was asked for"
    );
}

#[test]
fn texts_end_where_they_should() {
    let server = Running::start(small());
    let mut body = greedy(&problem(4), 40);
    body["ignore_eos"] = json!(true);
    let whole = text(&server.complete(&body)).to_owned();
    assert!(whole.len() > 20, "{whole}");
    // A stop text that begins within a token, and ends within another.
    let middle = whole.char_indices().nth(11).unwrap().0;
    let stop = &whole[middle..middle + 5];
    let expected = &whole[..whole.find(stop).unwrap()];
    for stops in [json!(stop), json!(["never seen", stop])] {
        body["stop"] = stops;
        let stopped = server.complete(&body);
        assert_eq!(text(&stopped), expected);
        assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
        let chunks = server.stream("/v1/completions", &body);
        assert_eq!(chunks.iter().map(text).collect::<String>(), expected);
    }
    body.as_object_mut().unwrap().remove("stop");
    body["max_tokens"] = json!(7);
    let short = server.complete(&body);
    assert_eq!(short["usage"]["completion_tokens"], 7);
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    // The third token is named as one that ends the text.
    body["logprobs"] = json!(0);
    let told = server.complete(&body);
    let names = told["choices"][0]["logprobs"]["tokens"]
        .as_array()
        .unwrap()
        .clone();
    let tokens = server.post(
        "/tokenize",
        &json!({ "prompt": names[2], "add_special_tokens": false }),
    );
    if let [token] = &tokens.document["tokens"].as_array().unwrap()[..] {
        body["stop_token_ids"] = json!([token]);
        let ended = server.complete(&body);
        assert_eq!(ended["choices"][0]["finish_reason"], "stop");
        assert!(ended["usage"]["completion_tokens"].as_u64().unwrap() <= 3);
    }
}

#[test]
fn log_probabilities_of_prompts_and_answers_agree() {
    let server = Running::start(small());
    let prompt = problem(6) + &problem(7);
    let tokens = server
        .post("/tokenize", &json!({ "prompt": prompt }))
        .document["tokens"]
        .clone();
    let written = server.complete(&json!({
        "prompt": tokens, "max_tokens": 4, "temperature": 0, "logprobs": 2, "ignore_eos": true,
    }));
    let own = &written["choices"][0]["logprobs"];
    assert_eq!(own["tokens"].as_array().unwrap().len(), 4);
    // As lm-eval asks: the tokens of prompt and answer, echoed.
    let echoed = server.complete(&json!({
        "prompt": [tokens], "max_tokens": 0, "temperature": 0, "logprobs": 2, "echo": true,
    }));
    let choice = &echoed["choices"][0];
    assert_eq!(choice["text"], prompt);
    let told = &choice["logprobs"];
    let count = tokens.as_array().unwrap().len();
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(told[list].as_array().unwrap().len(), count, "{list}");
    }
    assert!(told["token_logprobs"][0].is_null());
    let sums = told["top_logprobs"].as_array().unwrap().iter().skip(1);
    for (top, own) in sums.zip(told["token_logprobs"].as_array().unwrap().iter().skip(1)) {
        let top: Vec<f64> = top
            .as_object()
            .unwrap()
            .values()
            .map(|l| l.as_f64().unwrap())
            .collect();
        let own = own.as_f64().unwrap();
        assert!(own <= 0.0 && top.contains(&own) && top.iter().all(|&l| l <= 0.0));
        assert!(top.iter().map(|l| l.exp()).sum::<f64>() < 1.001);
    }
    let alone = server.complete(&json!({
        "prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": true, "ignore_eos": true,
    }));
    let last = alone["choices"][0]["logprobs"]["token_logprobs"]
        .as_array()
        .unwrap()
        .last()
        .unwrap();
    // Many rows of logits are summed in another order than one.
    let differ = last.as_f64().unwrap() - own["token_logprobs"][0].as_f64().unwrap();
    assert!(differ.abs() < 1e-3, "the first token of the answer");
}

#[test]
fn structures_are_followed() {
    let server = Running::start(small());
    let schema = json!({
        "type": "object",
        "properties": { "name": { "type": "string", "maxLength": 8 }, "coins": { "type": "integer", "minimum": 0, "maximum": 99 } },
        "required": ["name", "coins"], "additionalProperties": false,
    });
    let body = json!({
        "messages": [{ "role": "user", "content": problem(1) }], "max_tokens": 80, "seed": 4,
        "response_format": { "type": "json_schema", "json_schema": { "name": "answer", "schema": schema } },
    });
    for temperature in [0.0, 1.0] {
        let mut body = body.clone();
        body["temperature"] = json!(temperature);
        let answer = server.chat(&body);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        let document: Value = serde_json::from_str(text(&answer)).unwrap();
        assert!(document["coins"].as_u64().unwrap() < 100 && document["name"].is_string());
    }
    let tool = |name: &str| {
        json!({ "type": "function", "function": { "name": name, "description": "Adds numbers.", "parameters": {
            "type": "object", "properties": { "a": { "type": "integer", "maximum": 9 } }, "required": ["a"],
            "additionalProperties": false,
        } } })
    };
    let mut body = json!({
        "messages": [{ "role": "user", "content": problem(1) }], "max_tokens": 120, "temperature": 0,
        "tools": [tool("add"), tool("subtract")], "parallel_tool_calls": false,
    });
    for (choice, names) in [
        (json!("required"), &["add", "subtract"][..]),
        (
            json!({ "type": "function", "function": { "name": "subtract" } }),
            &["subtract"],
        ),
    ] {
        body["tool_choice"] = choice;
        let answer = server.chat(&body);
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
        let call = &choice["message"]["tool_calls"][0];
        assert!(names.contains(&call["function"]["name"].as_str().unwrap()));
        let arguments: Value =
            serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        assert!(arguments["a"].as_i64().unwrap() <= 9);
        let chunks = server.stream("/v1/chat/completions", &body);
        let calls: Vec<&Value> = chunks
            .iter()
            .map(|c| &c["choices"][0]["delta"]["tool_calls"][0])
            .collect();
        let streamed = calls.into_iter().find(|call| !call.is_null()).unwrap();
        assert_eq!(streamed["function"], call["function"]);
        assert_eq!(streamed["index"], 0);
        assert_eq!(
            chunks.last().unwrap()["choices"][0]["finish_reason"],
            "tool_calls"
        );
    }
}
