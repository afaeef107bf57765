//! Tools that a model may call: what it is told of them, what it must write to call them, and what it wrote.

use lexico_llm::chat::{ChatTemplate, Message};
use serde_json::{Map, Value, json};

use crate::structure::with_white_space;

/// How a family of models writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`, as Hermes and Qwen do.
    Tagged,
    /// `{"name": …, "parameters": …}` and nothing else, as Llama 3 does.
    Object,
    /// `[{"name": …, "arguments": …}]`, as Mistral does.
    List,
}

/// A function that may be called.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    /// JSON schema of its arguments.
    pub(crate) parameters: Value,
}

/// A call that a model wrote.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Call {
    pub(crate) name: String,
    /// A JSON document.
    pub(crate) arguments: String,
}

/// Whether a model calls tools.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ToolChoice {
    /// As it likes.
    Auto,
    /// At least one.
    Required,
    /// The one of this name.
    Named(String),
}

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// Renders a conversation with tools; a template that does not know tools is given a message that explains them.
pub(crate) fn render(
    template: &ChatTemplate,
    messages: &[Message],
    answer: bool,
    tools: &Value,
    variables: &Map<String, Value>,
) -> lexico_llm::Result<(String, Style)> {
    let render = |messages: &[Message], tools: Option<&Value>| {
        template.render_given(messages, answer, tools, None, variables)
    };
    let with = render(messages, Some(tools))?;
    if with == render(messages, None)? {
        return Ok((render(&explain(messages, tools), None)?, Style::Tagged));
    }
    let style = if with.contains(OPEN) {
        Style::Tagged
    } else if with.contains("[AVAILABLE_TOOLS]") {
        Style::List
    } else {
        Style::Object
    };
    Ok((with, style))
}

/// The conversation with a first message that tells of the tools, and with calls and results as texts, in the words of Hermes' template.
fn explain(messages: &[Message], tools: &Value) -> Vec<Message> {
    let list = tools.as_array().into_iter().flatten();
    let list: Vec<String> = list.map(Value::to_string).collect();
    let told = format!(
        "You may call functions to answer. They are described within <tools></tools>:\n<tools>\n{}\n</tools>\nFor each \
         call write a JSON object within {OPEN}{CLOSE}:\n{OPEN}\n{{\"name\": <name>, \"arguments\": <arguments>}}\n{CLOSE}",
        list.join("\n")
    );
    let mut messages: Vec<Message> = messages.iter().map(in_words).collect();
    match messages.first_mut() {
        Some(first) if first.role() == "system" => first.push_content(&format!("\n\n{told}")),
        _ => messages.insert(0, Message::new("system", &told)),
    }
    messages
}

/// A message with its calls, or as the result of one, in words.
fn in_words(message: &Message) -> Message {
    if matches!(message.role(), "tool" | "function") {
        let result = format!("<tool_response>\n{}\n</tool_response>", message.content());
        return Message::new("user", &result);
    }
    let mut message = message.clone();
    let calls = message.get("tool_calls").and_then(Value::as_array).cloned();
    for call in calls.into_iter().flatten() {
        let function = &call["function"];
        let call = json!({ "name": function["name"], "arguments": function["arguments"] });
        let line = if message.content().is_empty() {
            ""
        } else {
            "\n"
        };
        message.push_content(&format!("{line}{OPEN}\n{call}\n{CLOSE}"));
    }
    message
}

/// The grammar of calls of some of the tools, in llguidance's kind of Lark.
pub(crate) fn grammar(style: Style, tools: &[Tool], several: bool) -> String {
    let arguments = match style {
        Style::Object => "parameters",
        Style::Tagged | Style::List => "arguments",
    };
    let call = |tool: &Tool| {
        json!({
            "type": "object",
            "properties": { "name": { "const": tool.name }, arguments: closed(&tool.parameters) },
            "required": ["name", arguments],
            "additionalProperties": false,
        })
    };
    let mut calls: Vec<Value> = tools.iter().map(call).collect();
    let one = match calls.len() {
        1 => calls.remove(0),
        _ => json!({ "anyOf": calls }),
    };
    let one = with_white_space(&one);
    let more = if several { " more*" } else { "" };
    match style {
        Style::Tagged => format!(
            "start: tagged{more}\nmore: \"\\n\" tagged\ntagged: \"{OPEN}\\n\" call \"\\n{CLOSE}\"\ncall: %json {one}\n"
        ),
        Style::Object => format!("start: %json {one}\n"),
        Style::List => {
            format!("start: \"[\" call{more} \"]\"\nmore: \", \" call\ncall: %json {one}\n")
        }
    }
}

/// A schema of arguments that has no others than it names, unless it says that it may.
fn closed(parameters: &Value) -> Value {
    let mut parameters = parameters.clone();
    if let Some(fields) = parameters.as_object_mut()
        && fields.contains_key("properties")
    {
        fields.entry("additionalProperties").or_insert(false.into());
    }
    parameters
}

/// Tells calls from the text around them as it comes.
pub(crate) struct CallReader {
    /// The functions that may be called: what names another is text.
    names: Vec<String>,
    /// Text that may belong to a call.
    held: String,
    /// True once a call has begun: all that follows is held.
    inside: bool,
    /// True once text was given out: a bare object is no call any more.
    begun: bool,
}

impl CallReader {
    pub(crate) fn new(names: Vec<String>) -> Self {
        Self {
            names,
            held: String::new(),
            inside: false,
            begun: false,
        }
    }

    /// Takes more text; returns what is no part of a call.
    pub(crate) fn push(&mut self, text: &str) -> String {
        self.held.push_str(text);
        if self.inside {
            return String::new();
        }
        if let Some(at) = self.held.find(OPEN) {
            self.inside = true;
            let held = self.held.split_off(at);
            let before = std::mem::replace(&mut self.held, held);
            return self.given(before);
        }
        let start = self.held.trim_start();
        if !self.begun && (start.is_empty() || start.starts_with(['{', '['])) {
            return String::new();
        }
        let mut starts = self.held.char_indices().map(|(at, _)| at);
        let may_begin = |&at: &usize| OPEN.starts_with(&self.held[at..]);
        let sure = starts.find(may_begin).unwrap_or(self.held.len());
        let held = self.held.split_off(sure);
        let before = std::mem::replace(&mut self.held, held);
        self.given(before)
    }

    fn given(&mut self, text: String) -> String {
        self.begun |= !text.trim().is_empty();
        text
    }

    /// Returns the calls of the whole text, and what is left of it that is none.
    pub(crate) fn finish(self) -> (Vec<Call>, String) {
        let found = match self.inside {
            true => tagged(&self.held),
            false => bare(&self.held).map(|calls| (calls, String::new())),
        };
        let offered = |call: &Call| self.names.contains(&call.name);
        match found {
            Some((calls, rest)) if !calls.is_empty() && calls.iter().all(offered) => (calls, rest),
            _ => (Vec::new(), self.held),
        }
    }
}

/// The calls of a text of tags, and the text after them; `None` where one is not as it should be.
fn tagged(text: &str) -> Option<(Vec<Call>, String)> {
    let (mut calls, mut rest) = (Vec::new(), String::new());
    for part in text.split(OPEN).skip(1) {
        let (inner, after) = part.split_once(CLOSE).unwrap_or((part, ""));
        calls.push(call(&serde_json::from_str(inner.trim()).ok()?)?);
        if !after.trim().is_empty() {
            rest += after;
        }
    }
    Some((calls, rest))
}

/// The calls of a text that is an object or a list of objects, or several objects with semicolons between.
fn bare(text: &str) -> Option<Vec<Call>> {
    match serde_json::from_str(text.trim()) {
        Ok(Value::Array(list)) => list.iter().map(call).collect(),
        Ok(value) => Some(vec![call(&value)?]),
        Err(_) => {
            let parts = text
                .split(';')
                .map(str::trim)
                .filter(|part| !part.is_empty());
            parts
                .map(|part| call(&serde_json::from_str(part).ok()?))
                .collect()
        }
    }
}

fn call(value: &Value) -> Option<Call> {
    let fields: &Map<String, Value> = value.as_object()?;
    let name = fields.get("name")?.as_str()?.to_owned();
    let arguments = fields
        .get("arguments")
        .or_else(|| fields.get("parameters"))?;
    let arguments = match arguments {
        // Some models write them as OpenAI does.
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    Some(Call { name, arguments })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use super::*;

    fn read(pieces: &[&str]) -> (String, Vec<Call>, String) {
        let mut reader = CallReader::new(vec!["sun".to_owned()]);
        let text: String = pieces.iter().map(|piece| reader.push(piece)).collect();
        let (calls, rest) = reader.finish();
        (text, calls, rest)
    }

    fn sun() -> Call {
        Call {
            name: "sun".to_owned(),
            arguments: r#"{"city":"Rome"}"#.to_owned(),
        }
    }

    #[test]
    fn calls_of_every_style_are_read_however_they_are_cut() {
        let object = r#"{"name": "sun", "arguments": {"city": "Rome"}}"#;
        let texts = [
            (format!("<tool_call>\n{object}\n</tool_call>"), 1),
            (
                format!("<tool_call>{object}</tool_call>\n<tool_call>{object}</tool_call>"),
                2,
            ),
            (object.replace("arguments", "parameters"), 1),
            (format!("\n[{object}, {object}]"), 2),
            (format!("{object}; {object}"), 2),
        ];
        for (text, count) in texts {
            for size in [1, 3, 7, text.len()] {
                let chars: Vec<char> = text.chars().collect();
                let pieces: Vec<String> = chars.chunks(size).map(|c| c.iter().collect()).collect();
                let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
                let (before, calls, rest) = read(&pieces);
                assert_eq!(before.trim(), "", "{text}");
                assert_eq!(calls, vec![sun(); count], "{text}");
                assert_eq!(rest, "", "{text}");
            }
        }
    }

    #[test]
    fn text_that_is_no_call_comes_through_whole() {
        for text in [
            "It rains. <tool",
            "{\"a\": 1}",
            "a < b, {x}",
            "[1, 2]",
            "<tool_call>{\"name\": </tool_call>",
            "{\"name\": \"Alice\", \"parameters\": {}}",
            "",
        ] {
            let pieces: Vec<String> = text.chars().map(String::from).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (before, calls, rest) = read(&pieces);
            assert_eq!(before + &rest, text);
            assert!(calls.is_empty(), "{text}");
        }
        let (before, calls, _) = read(&[
            "Let me see. ",
            r#"<tool_call>{"name": "sun", "arguments": {"city":"Rome"}}</tool_call>"#,
        ]);
        assert_eq!((before.as_str(), calls), ("Let me see. ", vec![sun()]));
        let object = r#"{"name": "sun", "arguments": {"city":"Rome"}}"#;
        let (_, calls, rest) = read(&[&format!(
            "<tool_call>{object}</tool_call>\n<tool_call>{object}</tool_call>\nThat is all."
        )]);
        assert_eq!((calls.len(), rest.trim()), (2, "That is all."));
    }

    #[test]
    fn a_template_without_tools_is_told_what_was_called_before() {
        let source = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}";
        let template = ChatTemplate::parse(source, Vec::new()).unwrap();
        let function = json!({ "name": "sun", "arguments": { "city": "Rome" } });
        let messages = [
            Message::new("user", "Does it shine?"),
            Message::new("assistant", "").with("tool_calls", json!([{ "function": function }])),
            Message::new("tool", "yes"),
        ];
        let tools = json!([{ "type": "function", "function": { "name": "sun" } }]);
        let (text, style) = render(&template, &messages, true, &tools, &Map::new()).unwrap();
        assert_eq!(style, Style::Tagged);
        let history = "[user] Does it shine?\n[assistant] <tool_call>\n{\"name\":\"sun\",\"arguments\":{\"city\":\"Rome\"}}\n</tool_call>\n\
                       [user] <tool_response>\nyes\n</tool_response>\n";
        assert!(text.ends_with(history), "{text}");
        assert!(text.starts_with("[system] You may call functions"));
    }
}
