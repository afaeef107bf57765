//! Chat templates render as transformers renders them: cases made by `fixtures/make_chat.py`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::Path;

use lexico_llm::Error;
use lexico_llm::chat::{ChatTemplate, Message, SpecialTokens, TemplateSources};
use serde_json::{Value, json};

fn constructs() -> Value {
    serde_json::from_str(include_str!("fixtures/constructs.json")).unwrap()
}

fn tokens() -> SpecialTokens {
    let tokens = [
        ("bos_token", "<s>"),
        ("eos_token", "</s>"),
        ("unk_token", "<unk>"),
    ];
    tokens
        .map(|(name, token)| (name.to_owned(), token.to_owned()))
        .into()
}

fn parse(source: &str) -> Result<ChatTemplate, Error> {
    ChatTemplate::parse(source, tokens())
}

fn messages(json: &Value) -> Vec<Message> {
    serde_json::from_value(json.clone()).unwrap()
}

fn rendered(source: &str) -> Result<String, String> {
    let user = [Message::new("user", "Hello")];
    let rendered = parse(source).and_then(|template| template.render(&user, true));
    rendered.map_err(|error| error.to_string())
}

#[test]
fn conversations_render_as_in_transformers() {
    let golden: Value = serde_json::from_str(include_str!("fixtures/chat.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 60);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let template = parse(golden["templates"][name].as_str().unwrap()).unwrap();
        let messages = messages(&case["messages"]);
        let text = template.render(&messages, case["answer"] == true).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap(), "{name}: {messages:?}");
    }
}

/// What Jinja2 renders and we refuse, by a word of the reason: `docs/CHAT.md` has it too.
const REFUSED_HERE: [&str; 2] = ["is not taken", "is no character"];

/// Every construct that is taken renders as in transformers; what is not is refused in clear words, never rendered
/// otherwise. With `--nocapture` it prints the figures.
#[test]
fn constructs_render_as_in_transformers_or_are_refused() {
    let golden = constructs();
    let conversation = messages(&golden["messages"]);
    let (mut equal, mut refused, mut refused_here) = (0, 0, 0);
    let mut failures = Vec::new();
    for (topic, cases) in golden["topics"].as_object().unwrap() {
        for case in cases.as_array().unwrap() {
            let source = case["template"].as_str().unwrap();
            let given = case["given"] == true;
            let (tools, documents) = (&golden["tools"], &golden["documents"]);
            let text = parse(source).and_then(|template| {
                let (tools, documents) = (given.then_some(tools), given.then_some(documents));
                template.render_with(&conversation, !given, tools, documents)
            });
            match (text, case["text"].as_str(), case["refused"].as_str()) {
                (Ok(text), Some(wanted), _) if text == wanted => equal += 1,
                // With the template's own words, where they are its own.
                (Err(error), None, Some(why))
                    if !source.contains("raise_exception('") || error.to_string().contains(why) =>
                {
                    refused += 1;
                }
                (Err(error), Some(_), _)
                    if REFUSED_HERE
                        .iter()
                        .any(|why| error.to_string().contains(why)) =>
                {
                    refused_here += 1;
                    println!("refused here alone: {source:?}: {error}");
                }
                (other, ..) => failures.push(format!("{topic}: {source:?}: {other:?}, not {case}")),
            }
        }
    }
    println!(
        "constructs: {equal} equal, {refused} refused by both, {refused_here} refused here alone"
    );
    assert!(
        failures.is_empty(),
        "{} differ:\n{}",
        failures.len(),
        failures.join("\n")
    );
    // Three are random, and one is half a character.
    assert!(equal > 2800 && refused > 500 && refused_here <= 4);
}

/// Templates as published, of models, of TRL and of vLLM, with and without tools; `fixtures/fetch_templates.py` puts
/// them into the folder that `LEXICO_CHAT_TEMPLATES` names. With `--nocapture` it prints the figures.
#[test]
fn published_templates_render_as_in_transformers() {
    let Some(folder) = std::env::var_os("LEXICO_CHAT_TEMPLATES") else {
        println!("skipped: LEXICO_CHAT_TEMPLATES names no folder of published templates");
        return;
    };
    let golden: Value = serde_json::from_str(include_str!("fixtures/published_chat.json")).unwrap();
    let tools = &constructs()["tools"];
    let conversations = golden["conversations"].as_array().unwrap();
    let conversations: Vec<Vec<Message>> = conversations.iter().map(messages).collect();
    let templates = golden["templates"].as_object().unwrap();
    let (mut plain, mut with_tools, mut refused) = (0, 0, 0);
    let mut failures = Vec::new();
    for (name, cases) in templates {
        let source = std::fs::read_to_string(Path::new(&folder).join(name)).unwrap();
        let version = crc32fast::hash(source.as_bytes());
        assert_eq!(cases["template"], version, "{name} is of another version");
        let template = parse(&source);
        let mut check = |at: usize, answer: bool, tools: Option<&Value>, wanted: &Value| {
            let text = template
                .as_ref()
                .map_err(ToString::to_string)
                .and_then(|template| {
                    let text = template.render_with(&conversations[at], answer, tools, None);
                    text.map_err(|error| error.to_string())
                });
            match (text, wanted.as_u64()) {
                (Ok(text), Some(wanted)) if checksum(&text) == wanted => {
                    *if tools.is_some() {
                        &mut with_tools
                    } else {
                        &mut plain
                    } += 1;
                }
                (Err(_), None) => refused += 1,
                (other, _) => {
                    let other: String = format!("{other:?}").chars().take(300).collect();
                    failures.push(format!("{name}: conversation {at}: {other}"));
                }
            }
        };
        for (at, wanted) in cases["plain"].as_array().unwrap().iter().enumerate() {
            check(at / 2, at % 2 == 1, None, wanted);
        }
        for (at, wanted) in cases["tools"].as_array().unwrap().iter().enumerate() {
            check(at, true, Some(tools), wanted);
        }
    }
    println!(
        "{} published templates: {plain} texts without tools and {with_tools} with tools equal, {refused} refused by both",
        templates.len()
    );
    assert!(
        failures.is_empty(),
        "{} differ:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// A checksum of a text but for today's date.
fn checksum(text: &str) -> u64 {
    let now = jiff::Zoned::now();
    let mut text = text.to_owned();
    for today in ["%d %b %Y", "%Y-%m-%d", "%d %B %Y", "%B %d, %Y"] {
        text = text.replace(&now.strftime(today).to_string(), "@TODAY@");
    }
    crc32fast::hash(text.as_bytes()).into()
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
        assert!(message.contains("line 1"), "{message}");
    }
    let message = parse("a\n{% raw %}\n{% endraw %}\n{{ 1 + }}")
        .map(drop)
        .unwrap_err();
    assert!(message.to_string().contains("line 4"), "{message}");
}

#[test]
fn what_a_template_refuses_comes_in_its_own_words() {
    let message = rendered("{{ raise_exception('only users may speak') }}").unwrap_err();
    assert!(message.contains("only users may speak"), "{message}");
    // Not all of them where they are many, and on one line.
    let message = rendered("{{ raise_exception('a\\n' * 100000) }}").unwrap_err();
    assert!(message.len() < 1000 && !message.contains('\n'), "{message}");
    let message = rendered("{{ messages.nothing() }}").unwrap_err();
    assert!(message.contains("nothing"), "{message}");
}

/// Programs that would take a long time, much memory or all of the stack.
#[test]
fn a_template_can_not_run_away() {
    let deep = |open: &str, inside: &str, close: &str, count: usize| {
        format!(
            "{{{{ {}{inside}{} }}}}",
            open.repeat(count),
            close.repeat(count)
        )
    };
    let chain = |link: &str| format!("{{{{ 1{} }}}}", link.repeat(100_000));
    let grown = |step: &str| {
        format!(
            "{{% set ns = namespace(x=[], t='a') %}}{{% for i in range(90000) %}}{{% set {step} %}}{{% endfor %}}"
        )
    };
    let hostile = [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".to_owned(),
        "{% for i in range(1000000000) %}{% endfor %}".to_owned(),
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}".to_owned(),
        "{{ 'a' * 10**9 }}".to_owned(),
        "{{ [1] * 10**9 }}".to_owned(),
        "{{ (1,) * 10**12 }}".to_owned(),
        "{{ 'a'.zfill(10**12) }}{{ 'a'.center(10**12) }}".to_owned(),
        "{{ 'a'.ljust(10**30) }}".to_owned(),
        "{{ 'a\nb' | indent(10**9) }}".to_owned(),
        "{{ ('a\n' * 10000) | indent('b' * 100000, true, true) }}".to_owned(),
        "{{ 'a' | center(10**11) }}".to_owned(),
        "{{ ('\t' * 100000).expandtabs(100000) }}".to_owned(),
        "{{ '%1000000000000d' % 1 }}".to_owned(),
        "{{ '%.1000000000d' % 1 }}{{ '%*d' % (10**10, 1) }}".to_owned(),
        "{{ '{:1000000000000}'.format(1) }}".to_owned(),
        "{{ '{:.1000000000f}'.format(1.5) }}".to_owned(),
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}".to_owned(),
        "{{ ('a' * 100000).join(['b'] * 100000) }}".to_owned(),
        "{{ (['b'] * 100000) | join('a' * 100000) }}".to_owned(),
        "{{ 10 ** 1000 }}".to_owned(),
        "{{ 2 ** (2 ** 62) }}".to_owned(),
        "{{ [1, 2] | batch(10**15, 0) | list }}".to_owned(),
        "{{ [1, 2] | slice(10**15) | list }}".to_owned(),
        "{{ messages | tojson(indent=10**9) }}".to_owned(),
        "{% for x in [1] %}{{ loop.cycle() }}{% endfor %}".to_owned(),
        "{% macro f() %}{{ f(*varargs, **kwargs) }}{% endmacro %}{{ f(1, a=2) }}".to_owned(),
        "{% block a %}{{ self.a() }}{% endblock %}".to_owned(),
        "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}"
            .to_owned(),
        "{{ ('a ' * 1000000) | wordwrap(1, wrapstring='b' * 1000) }}".to_owned(),
        "{{ {'a' * 1000000: 'a ' * 1000000} | pprint }}".to_owned(),
        "{{ ('www.a.com ' * 1000000) | urlize(target='b' * 10000) }}".to_owned(),
        "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}".to_owned(),
        "{{ '{:01000000000000,}'.format(1) }}".to_owned(),
        format!(
            "{}1{}",
            "{% autoescape 1 %}".repeat(10_000),
            "{% endautoescape %}".repeat(10_000)
        ),
        "{{ 'a'[::-9223372036854775808] }}{{ 1.5 | round(10**9) }}".to_owned(),
        grown("ns.x = [ns.x]"),
        grown("ns.x = {'a': ns.x}"),
        grown("ns.t = ns.t ~ ns.t"),
        grown("ns.t = ns.t + ns.t"),
        grown("ns.x = ns.x + ns.x + [1]"),
        "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x }}".to_owned(),
        "{% set ns = namespace(x=1) %}{% for i in range(90000) %}{% for y in [ns.x] %}{% set ns.x = [loop] %}{% endfor %}{% endfor %}".to_owned(),
        deep("(", "1", ")", 100_000),
        deep("[", "1", "]", 100_000),
        deep("{'a': ", "1", "}", 100_000),
        deep("not ", "1", "", 100_000),
        deep("-", "1", "", 100_000),
        deep("a(", "1", ")", 100_000),
        chain(" + 1"),
        chain(" - 1"),
        chain(" * 1"),
        chain(" % 1"),
        chain(" ** 1"),
        chain(" ~ 1"),
        chain(" or 0"),
        chain(" < 1"),
        chain(".a"),
        chain("[0]"),
        chain("|abs"),
        chain(" if 1"),
        chain(" is odd and 1"),
        format!(
            "{{% if 1 %}}{}{{% endif %}}",
            "{% elif 1 %}".repeat(100_000)
        ),
        format!(
            "{}{}",
            "{% if 1 %}".repeat(10_000),
            "{% endif %}".repeat(10_000)
        ),
        format!(
            "{}{}",
            "{% generation %}".repeat(10_000),
            "{% endgeneration %}".repeat(10_000)
        ),
        format!("{{% for {}a in b %}}{{% endfor %}}", "(".repeat(100_000)),
        format!("{{{{ 1 }}}}{}", "a".repeat(10_000_000)),
    ];
    let begun = std::time::Instant::now();
    for source in hostile {
        let one = std::time::Instant::now();
        let error = rendered(&source).expect_err(&source[..source.len().min(80)]);
        assert!(error.len() < 1000, "{error}");
        println!(
            "{:>5} ms: {}: {error}",
            one.elapsed().as_millis(),
            &source[..source.len().min(60)]
        );
    }
    // Each alone takes no more than a second or two where it is compiled for speed.
    assert!(begun.elapsed().as_secs() < 300);
}

/// Objects within objects, far deeper than the stack would bear if each let go of the next.
#[test]
fn objects_within_objects_are_let_go() {
    for made in [
        "namespace(a=ns.x)",
        "cycler(ns.x)",
        "joiner(ns.x)",
        "{'a': ns.x}.items",
        "{'a': ns.x}.values()",
        "[ns.x] | map('default')",
        "[{'a': ns.x}] | groupby('b') | first",
    ] {
        let source = format!(
            "{{% set ns = namespace(x=1) %}}{{% for i in range(60000) %}}{{% set ns.x = {made} %}}{{% endfor %}}"
        );
        // The last of these are lists too, which are refused where they are deep.
        let done = rendered(&source);
        assert!(done.is_ok() || made.contains("groupby"), "{done:?}");
    }
}

/// `tool_use` among the templates of a model is that for conversations with tools.
#[test]
fn a_template_for_tools_is_used_with_tools() {
    let named = |names: &[&str]| {
        let source = |name: &&str| ((*name).to_owned(), format!("{{{{ '{name}' }}}}"));
        TemplateSources(names.iter().map(source).collect())
    };
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let user = [Message::new("user", "Hello")];
    let choose = |names: &[&str]| ChatTemplate::choose(&named(names), tokens());
    let both = choose(&["rag", "default", "tool_use"]).unwrap().unwrap();
    assert_eq!(both.render(&user, true).unwrap(), "default");
    let with_tools =
        |template: &ChatTemplate, tools| template.render_with(&user, true, Some(tools), None);
    assert_eq!(with_tools(&both, &tools).unwrap(), "tool_use");
    let one = choose(&["default"]).unwrap().unwrap();
    assert_eq!(with_tools(&one, &tools).unwrap(), "default");
    assert!(choose(&[]).unwrap().is_none());
    let error = choose(&["rag"]).map(drop).unwrap_err().to_string();
    assert!(error.contains("rag"), "{error}");
    // Tools are a list of objects.
    let error = with_tools(&one, &json!({"name": "f"}))
        .unwrap_err()
        .to_string();
    assert!(error.contains("tools"), "{error}");
}

/// Fields of messages and tools are shown in their order, numbers as they were written.
#[test]
fn what_is_given_comes_as_it_was() {
    let message = Message::new("assistant", "x")
        .with("zebra", json!({"b": 1, "a": [2.0, 1e20, true, null]}))
        .with("name", Value::Null);
    assert_eq!((message.role(), message.content()), ("assistant", "x"));
    let text = parse("{{ messages[0] | tojson }}")
        .unwrap()
        .render(std::slice::from_ref(&message), false);
    assert_eq!(
        text.unwrap(),
        r#"{"role": "assistant", "content": "x", "zebra": {"b": 1, "a": [2.0, 1e+20, true, null]}}"#
    );
    let again: Message = serde_json::from_str(&serde_json::to_string(&message).unwrap()).unwrap();
    assert_eq!(again, message);
    assert!(serde_json::from_str::<Message>("[1]").is_err());
}
