//! Chat templates: a conversation to the text that a model was trained to see.
//!
//! Templates are written in Jinja2, which is Python's; minijinja runs them. `docs/CHAT.md` says what of it is taken.

mod filters;
mod format;
mod functions;
mod json;
mod layout;
mod lexer;
mod macros;
mod markup;
mod methods;
mod operators;
mod python;
mod tests;
mod translate;

use lexico::shown::shown;
use minijinja::{Environment, UndefinedBehavior, Value};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};
use crate::panics::caught;

/// One message of a conversation: a role, a content, and whatever else its template knows, `tool_calls` or `name` say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Message(Map<String, Json>);

impl Message {
    /// Makes a message of this role, `system`, `user` or `assistant` say.
    pub fn new(role: &str, content: &str) -> Self {
        let fields = [("role", role), ("content", content)];
        let fields = fields.into_iter();
        Self(
            fields
                .map(|(name, text)| (name.to_owned(), text.into()))
                .collect(),
        )
    }

    /// The message with one more field, or another value of it.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Json>) -> Self {
        self.0.insert(name.to_owned(), value.into());
        self
    }

    /// A field of the message.
    pub fn get(&self, name: &str) -> Option<&Json> {
        self.0.get(name)
    }

    /// Who speaks; nothing where that is no text.
    pub fn role(&self) -> &str {
        self.get("role").and_then(Json::as_str).unwrap_or_default()
    }

    /// Its text; nothing where it has none, or parts.
    pub fn content(&self) -> &str {
        let content = self.get("content").and_then(Json::as_str);
        content.unwrap_or_default()
    }

    /// Adds to its text.
    pub fn push_content(&mut self, text: &str) {
        let content = self.content().to_owned() + text;
        self.0.insert("content".to_owned(), content.into());
    }

    /// The message as transformers gives it to templates.
    fn for_template(&self) -> Value {
        // A field that is null is as if it were not there.
        let given = self.0.iter().filter(|(_, value)| !value.is_null());
        let mut fields: Map<String, Json> = given.map(|(n, v)| (n.clone(), v.clone())).collect();
        // Reasoning goes by three names; templates read the first or the second.
        let names = ["reasoning_content", "thinking", "reasoning"];
        let reasoning = names.iter().find_map(|name| fields.get(*name)).cloned();
        if let Some(reasoning) = reasoning {
            let mut all = Map::from_iter([("thinking".to_owned(), reasoning.clone())]);
            all.extend(fields);
            all.insert("reasoning_content".to_owned(), reasoning);
            fields = all;
        }
        value_of(&Json::Object(fields))
    }
}

/// A template's special tokens by the names that it uses: `bos_token` and `eos_token`, say.
pub type SpecialTokens = Vec<(String, String)>;

/// The texts of a model's chat templates by name, as its folder has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TemplateSources(pub Vec<(String, String)>);

impl TemplateSources {
    fn named(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(known, _)| known == name);
        found.map(|(_, source)| source.as_str())
    }
}

/// A model's chat template, in Jinja as Hugging Face's tokenizers have it.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The source of another one, for conversations with tools.
    tool_use: Option<String>,
    tokens: SpecialTokens,
}

const NAME: &str = "chat template";

/// Steps that a rendering may take: a hundred times a long chat's. Memory counts too, 64 bytes as a step.
const FUEL: u64 = 10_000_000;

impl ChatTemplate {
    /// Parses a template; `tokens` are special tokens by name.
    ///
    /// # Errors
    /// [`Error::Chat`] where it does not parse.
    pub fn parse(source: &str, tokens: SpecialTokens) -> Result<Self> {
        let (environment, tool_use) = (environment(source)?, None);
        Ok(Self {
            environment,
            tool_use,
            tokens,
        })
    }

    /// The template among several: that of the name `default`, and beside it that of the name `tool_use`.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::parse`]; [`Error::Chat`] where none is the default.
    pub fn choose(sources: &TemplateSources, tokens: SpecialTokens) -> Result<Option<Self>> {
        if sources.0.is_empty() {
            return Ok(None);
        }
        let Some(source) = sources.named("default") else {
            let names = sources.0.iter().map(|(name, _)| shown(name));
            let names: Vec<String> = names.take(8).collect();
            let reason = format!("none of the model's templates is the default, only {names:?}");
            return Err(Error::Chat(reason));
        };
        let mut template = Self::parse(source, tokens)?;
        template.tool_use = sources.named("tool_use").map(str::to_owned);
        Ok(Some(template))
    }

    /// Returns the text of a conversation, and with `answer` the beginning of the model's next message.
    ///
    /// # Errors
    /// [`Error::Chat`] with the template's own words where it refuses the conversation.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        self.render_with(messages, answer, None, None)
    }

    /// [`ChatTemplate::render`] with tools that the model may call, and documents that it may look into: lists of
    /// objects, as transformers takes them.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::render`]; [`Error::Chat`] where one is no list of objects, or where the template for
    /// tools does not parse.
    pub fn render_with(
        &self,
        messages: &[Message],
        answer: bool,
        tools: Option<&Json>,
        documents: Option<&Json>,
    ) -> Result<String> {
        self.render_given(messages, answer, tools, documents, &Map::new())
    }

    /// [`ChatTemplate::render_with`] with values of variables that the template knows, `enable_thinking` say.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::render_with`].
    pub fn render_given(
        &self,
        messages: &[Message],
        answer: bool,
        tools: Option<&Json>,
        documents: Option<&Json>,
        variables: &Map<String, Json>,
    ) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::Chat(
                "a conversation has at least one message".into(),
            ));
        }
        let other = self.tool_use.as_deref().filter(|_| tools.is_some());
        let other = other.map(environment).transpose()?;
        let environment = other.as_ref().unwrap_or(&self.environment);
        let messages = messages.iter().map(Message::for_template);
        let mut context = vec![
            ("messages", Value::from_iter(messages)),
            ("tools", objects("tools", tools)?),
            ("documents", objects("documents", documents)?),
            ("add_generation_prompt", Value::from(answer)),
        ];
        let tokens = self.tokens.iter();
        context.extend(tokens.map(|(name, token)| (name.as_str(), Value::from(token.as_str()))));
        let variables = variables.iter();
        context.extend(variables.map(|(name, value)| (name.as_str(), value_of(value))));
        let context = Value::from_pairs(context);
        let rendered = caught(|| environment.get_template(NAME)?.render(context));
        let rendered = rendered.map_err(|panic| Error::Chat(bounded(&panic)))?;
        rendered.map_err(|error| Error::Chat(reason(&error)))
    }
}

/// An environment as transformers sets Jinja up, with a template.
fn environment(source: &str) -> Result<Environment<'static>> {
    // Some converters write the name of a template that llama.cpp has built in.
    if !source.contains("{{") && !source.contains("{%") {
        let reason = format!("it is no template, only the text \"{}\"", shown(source));
        return Err(Error::Chat(reason));
    }
    let failed = |why: String| Error::Chat(format!("it does not parse: {}", bounded(&why)));
    let mut environment = Environment::empty();
    // A template is a program from outside.
    environment.set_fuel(Some(FUEL));
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, _, value| Ok(out.write_str(&python::text(value)?)?));
    operators::add_to(&mut environment);
    filters::add_to(&mut environment);
    tests::add_to(&mut environment);
    functions::add_to(&mut environment);
    macros::add_to(&mut environment);
    markup::add_to(&mut environment);
    let translated = translate::translate(source, &environment).map_err(failed)?;
    // The translation ends as the template does.
    let mut syntax = minijinja::syntax::SyntaxConfig::builder();
    let syntax = syntax.keep_trailing_newline(true).build();
    environment.set_syntax(syntax.map_err(|e| failed(e.to_string()))?);
    let parsed = environment.add_template_owned(NAME, translated);
    parsed.map_err(|e| failed(format!("{e:#}")))?;
    Ok(environment)
}

/// What a template gave as its reason, or what went wrong.
fn reason(error: &minijinja::Error) -> String {
    let text = error
        .detail()
        .map_or_else(|| error.to_string(), str::to_owned);
    bounded(&text)
}

/// Words out of a template or a conversation, for a message: on one line, and not too long.
fn bounded(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if out.len() > 400 {
            out.push('…');
            break;
        }
        match c.is_control() {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// A list of objects, or `None` of Python where there is none.
fn objects(what: &str, given: Option<&Json>) -> Result<Value> {
    let Some(given) = given else {
        return Ok(Value::from(()));
    };
    let list = given
        .as_array()
        .filter(|list| list.iter().all(Json::is_object));
    if list.is_none() {
        return Err(Error::Chat(format!(
            "the {what} are no list of JSON objects"
        )));
    }
    Ok(value_of(given))
}

/// A value of JSON as a template sees it.
fn value_of(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), ..) => Value::from(number),
            (_, Some(number), _) => Value::from(number),
            (.., number) => Value::from(number.unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from_iter(items.iter().map(value_of)),
        Json::Object(fields) => Value::from_pairs(
            fields
                .iter()
                .map(|(name, value)| (name.clone(), value_of(value))),
        ),
    }
}
