//! Chat templates render as transformers renders them: cases made by `fixtures/make_chat.py`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::Path;

use lexico_llm::Error;
use lexico_llm::chat::{ChatTemplate, Message};
use serde_json::Value;

fn parse(source: &str) -> Result<ChatTemplate, Error> {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    ChatTemplate::parse(
        source,
        tokens.map(|(name, token)| (name, token.to_owned())).into(),
    )
}

#[test]
fn conversations_render_as_in_transformers() {
    let golden: Value = serde_json::from_str(include_str!("fixtures/chat.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 60);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let template = parse(golden["templates"][name].as_str().unwrap()).unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let text = template
            .render(&messages, case["answer"].as_bool().unwrap())
            .unwrap();
        assert_eq!(text, case["text"].as_str().unwrap(), "{name}: {messages:?}");
    }
}

/// Llama 3.1 and 3.2, Mistral Nemo, Qwen 2.5 and Qwen 3 as published; `fixtures/fetch_templates.py`
/// puts the templates into the folder that `LEXICO_CHAT_TEMPLATES` names.
#[test]
fn published_templates_render_as_in_transformers() {
    let Some(folder) = std::env::var_os("LEXICO_CHAT_TEMPLATES") else {
        println!("skipped: LEXICO_CHAT_TEMPLATES names no folder of published templates");
        return;
    };
    let golden: Value = serde_json::from_str(include_str!("fixtures/published_chat.json")).unwrap();
    assert_eq!(golden["sha256"].as_object().unwrap().len(), 5);
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 100);
    let today = || jiff::Zoned::now().strftime("%d %b %Y").to_string();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let source = std::fs::read_to_string(Path::new(&folder).join(name)).unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let rendered = parse(&source)
            .unwrap()
            .render(&messages, case["answer"].as_bool().unwrap());
        match (rendered, case["refused"].as_str()) {
            (Ok(text), None) => {
                let text = text.replace(&today(), "@TODAY@");
                assert_eq!(text, case["text"].as_str().unwrap(), "{name}: {messages:?}");
            }
            (Err(error), Some(why)) => assert!(error.to_string().contains(why), "{error}, {why}"),
            (rendered, _) => panic!("{name}: {messages:?}: {rendered:?}"),
        }
    }
}

#[test]
fn a_template_that_does_not_parse_says_where() {
    for source in [
        "{% if %}",
        "{{ messages[ }}",
        "{% for m in messages %}",
        "{% nonsense %}",
    ] {
        let message = parse(source).map(drop).unwrap_err().to_string();
        assert!(
            message.contains("chat template") && message.contains("does not parse"),
            "{message}"
        );
    }
}

#[test]
fn what_a_template_refuses_comes_in_its_own_words() {
    let template = parse("{{ raise_exception('only users may speak') }}").unwrap();
    let message = template
        .render(&[Message::new("user", "x")], true)
        .unwrap_err()
        .to_string();
    assert!(message.contains("only users may speak"), "{message}");
    // Endless recursion, unknown names and loops without end are errors too, not crashes.
    for source in [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.nothing() }}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    ] {
        assert!(
            parse(source).unwrap().render(&[], true).is_err(),
            "{source}"
        );
    }
}
