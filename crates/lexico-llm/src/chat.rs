//! Chat templates: a conversation to the text that a model was trained to see.

use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text of the message.
    pub content: String,
}

impl Message {
    /// Makes a message of this role.
    pub fn new(role: &str, content: &str) -> Self {
        Self {
            role: role.to_owned(),
            content: content.to_owned(),
        }
    }
}

/// A model's chat template, in Jinja as Hugging Face's tokenizers have it.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Special tokens by the names that templates use.
    tokens: Vec<(&'static str, String)>,
}

const NAME: &str = "chat template";

impl ChatTemplate {
    /// Parses a template; `tokens` are special tokens by name, `bos_token` and `eos_token` say.
    ///
    /// # Errors
    /// [`Error::Chat`] where it does not parse.
    pub fn parse(source: &str, tokens: Vec<(&'static str, String)>) -> Result<Self> {
        // Some converters write the name of a template that llama.cpp has built in.
        if !source.contains("{{") && !source.contains("{%") {
            let start: String = source.chars().take(40).collect();
            let reason = format!("it is no template, only the text {start:?}");
            return Err(Error::Chat(reason));
        }
        let mut environment = Environment::new();
        // As transformers sets Jinja up.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        // A template is a program from outside; this many steps are a thousand times a long chat's.
        // Steps are counted, not bytes: text that a template doubles again and again is not.
        environment.set_fuel(Some(50_000_000));
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        let parsed = environment.add_template_owned(NAME, source.to_owned());
        parsed.map_err(|e| Error::Chat(format!("it does not parse: {e:#}")))?;
        Ok(Self {
            environment,
            tokens,
        })
    }

    /// Returns the text of a conversation, and with `answer` the beginning of the model's next message.
    ///
    /// # Errors
    /// [`Error::Chat`] with the template's own words where it refuses the conversation.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        let refused = |e: minijinja::Error| {
            Error::Chat(e.detail().map_or_else(|| e.to_string(), str::to_owned))
        };
        let mut context = vec![
            ("messages", Value::from_serialize(messages)),
            ("add_generation_prompt", Value::from(answer)),
        ];
        let tokens = self.tokens.iter();
        context.extend(tokens.map(|(name, token)| (*name, Value::from(token.as_str()))));
        let context: Value = context.into_iter().collect();
        let template = self.environment.get_template(NAME).map_err(refused)?;
        template.render(context).map_err(refused)
    }
}

/// Refuses a conversation with the template's words.
fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// The time of day where the program runs, as transformers gives it to templates.
fn strftime_now(format: String) -> std::result::Result<String, minijinja::Error> {
    let text = jiff::fmt::strtime::format(&format, &jiff::Zoned::now());
    text.map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// `tojson` as transformers has it: no HTML escapes, `indent` where it is asked for.
fn tojson(value: Value, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let failed =
        |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let Some(indent) = indent else {
        return serde_json::to_string(&value)
            .map(python_spacing)
            .map_err(failed);
    };
    let space = " ".repeat(indent.min(16));
    let formatter = serde_json::ser::PrettyFormatter::with_indent(space.as_bytes());
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    value.serialize(&mut serializer).map_err(failed)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Python's `json.dumps` puts a space after commas and colons outside of strings.
fn python_spacing(json: String) -> String {
    let mut out = String::with_capacity(json.len() + json.len() / 8);
    let (mut in_string, mut escaped) = (false, false);
    for c in json.chars() {
        out.push(c);
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            ',' | ':' if !in_string => out.push(' '),
            _ => {}
        }
    }
    out
}
