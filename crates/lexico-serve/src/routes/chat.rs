//! `/v1/chat/completions`

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use lexico_llm::chat::Message;
use llguidance::Matcher;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::body::Body;
use super::error::{ApiError, Refusal};
use super::fields::{MAX_LOGPROBS, WritingFields};
use super::writing::computed;
use super::{App, Service, new_id};
use crate::engine::{Event, Logprob};
use crate::tools::{self, CallReader, Style, Tool, ToolChoice};
use crate::worker::Order;

/// What a chat has beside the fields of all texts.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct ChatFields {
    /// The conversation: objects with a role and a content, which is a string or a list of text parts.
    #[schema(value_type = Vec<ChatMessage>, min_items = 1)]
    pub(crate) messages: Vec<Map<String, Value>>,
    /// Another name of `max_tokens`, which it comes before.
    pub(crate) max_completion_tokens: Option<usize>,
    /// Functions that the model may call.
    #[schema(value_type = Option<Vec<Object>>)]
    pub(crate) tools: Option<Vec<Map<String, Value>>>,
    /// `none`, `auto`, `required`, or the function to call.
    #[schema(value_type = Option<Object>)]
    pub(crate) tool_choice: Option<ToolChoiceField>,
    /// Whether several functions may be called at once.
    pub(crate) parallel_tool_calls: Option<bool>,
    /// The form of the answer: `text`, `json_object`, or `json_schema` with a schema.
    #[schema(value_type = Option<Object>)]
    pub(crate) response_format: Option<ResponseFormat>,
    /// Whether the log-probability of each token is told.
    pub(crate) logprobs: Option<bool>,
    /// Number of likeliest tokens that are told in each place.
    #[schema(minimum = 0, maximum = 20)]
    pub(crate) top_logprobs: Option<usize>,
    /// Values of variables of the chat template, `enable_thinking` say.
    #[schema(value_type = Option<Object>)]
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    /// Whether the answer's beginning follows the conversation; true by default.
    pub(crate) add_generation_prompt: Option<bool>,
}

/// A message, for the documentation.
#[derive(ToSchema)]
#[allow(dead_code, reason = "its fields are read by name")]
pub(crate) struct ChatMessage {
    #[schema(pattern = "^(system|developer|user|assistant|tool)$")]
    role: String,
    content: String,
}

/// A chat as the documentation shows it.
#[derive(ToSchema)]
#[allow(dead_code, reason = "both parts are read apart")]
pub(crate) struct ChatRequest {
    #[schema(inline)]
    #[serde(flatten)]
    chat: ChatFields,
    #[schema(inline)]
    #[serde(flatten)]
    writing: WritingFields,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}} is needed"
)]
pub(crate) enum ToolChoiceField {
    Word(String),
    Named { function: Name },
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Name {
    name: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: NamedSchema },
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct NamedSchema {
    schema: Option<Value>,
}

/// What the model is to answer, and how calls of tools are read out of it.
struct Prepared {
    tokens: Vec<u32>,
    structure: Option<Matcher>,
    /// The calls that the answer may have.
    tools: Option<Calls>,
}

/// The calls that an answer may have.
struct Calls {
    /// Whether it may have several.
    several: bool,
    /// The functions that may be called.
    names: Vec<String>,
}

impl Calls {
    fn reader(&self) -> CallReader {
        CallReader::new(self.names.clone())
    }
}

/// Write the next message of a conversation
///
/// As OpenAI's, with the fields of vLLM and llama.cpp that clients send besides. Fields that are not known are ignored.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "texts", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer, or a stream of its chunks", content(
            (Object = "application/json"), (String = "text/event-stream"))),
        Refusal<'static>,
    ),
)]
pub(super) async fn completions(
    State(app): State<Arc<App>>,
    body: Body,
) -> Result<Response, ApiError> {
    let service = app.service()?;
    let writing: WritingFields = body.read()?;
    let fields: ChatFields = body.read()?;
    drop(body);
    service.check_model(writing.model.as_deref())?;
    let top_logprobs = fields.top_logprobs.unwrap_or(0);
    let wanted = fields.logprobs.unwrap_or(false);
    if top_logprobs > MAX_LOGPROBS {
        let reason =
            format!("top_logprobs is {top_logprobs}, and it must be at most {MAX_LOGPROBS}");
        return Err(ApiError::field("top_logprobs", reason));
    }
    if top_logprobs > 0 && !wanted {
        let reason = "top_logprobs need logprobs to be true";
        return Err(ApiError::field("top_logprobs", reason));
    }
    let mut choice = writing.choice(service.worker.vocabulary)?;
    choice.logprobs = wanted.then_some(top_logprobs);
    let (n, streams) = (writing.answers()?, writing.streams()?);
    let mut stop = writing.stops()?;
    let ignore_end = writing.ignore_eos.unwrap_or(false);
    if !ignore_end {
        stop.extend(service.stop_texts.iter().cloned());
    }
    let max_tokens = fields.max_completion_tokens.or(writing.max_tokens);
    if max_tokens == Some(0) {
        let reason = "at least one token must be asked for";
        return Err(ApiError::field("max_tokens", reason));
    }
    let prepared = computed(&service, move |service| prepare(service, fields)).await?;
    choice.structure = prepared.structure.map(Box::new);
    let order = Order {
        prompts: vec![prepared.tokens],
        n,
        max_tokens,
        usual_max_tokens: app.options.max_tokens,
        choice,
        stop: stop.into(),
        ignore_end,
        prompt_logprobs: false,
    };
    let mut orders = service.order(order, "messages").await?;
    let frame = |object: &str| {
        json!({
            "id": new_id("chatcmpl-"), "object": object, "created": super::now(), "model": service.worker.name,
        })
    };
    let Some(options) = streams else {
        let written = orders.written().await?;
        let choices = written.into_iter().enumerate().map(|(index, written)| {
            let (calls, content) = match &prepared.tools {
                Some(of_tools) => calls_of(&written.text, of_tools),
                None => (Vec::new(), written.text),
            };
            let reason = written.reason.map_or("stop", |reason| reason.name());
            let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
            let reason = match calls.is_empty() {
                true => reason,
                false => {
                    if content.trim().is_empty() {
                        message["content"] = Value::Null;
                    }
                    message["tool_calls"] = calls.into();
                    "tool_calls"
                }
            };
            let logprobs = wanted.then(|| tokens_of(&service, &written.logprobs));
            json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": reason })
        });
        let mut document = frame("chat.completion");
        document["choices"] = choices.collect();
        document["usage"] = orders.usage.document();
        return Ok(Json(document).into_response());
    };
    let frame = frame("chat.completion.chunk");
    let mut chunks = Chunks {
        service: Arc::clone(&service),
        tools: prepared.tools,
        readers: HashMap::new(),
        logprobs: wanted,
    };
    Ok(orders.streamed(options, frame, move |index, event| chunks.of(index, event)))
}

/// Makes the chunks of a stream.
struct Chunks {
    service: Arc<Service>,
    tools: Option<Calls>,
    readers: HashMap<usize, CallReader>,
    logprobs: bool,
}

impl Chunks {
    fn of(&mut self, index: usize, event: Event) -> Vec<Value> {
        let chunk = |delta: Value, logprobs: Value, reason: Value| json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason });
        let plain = |delta: Value| chunk(delta, Value::Null, Value::Null);
        match event {
            Event::Read { .. } => vec![plain(json!({ "role": "assistant", "content": "" }))],
            Event::Token { text, logprob, .. } => {
                let text = match &self.tools {
                    Some(calls) => {
                        let reader = self.readers.entry(index);
                        reader.or_insert_with(|| calls.reader()).push(&text)
                    }
                    None => text,
                };
                let logprobs = match logprob.filter(|_| self.logprobs) {
                    Some(logprob) => tokens_of(&self.service, &[logprob]),
                    None if text.is_empty() => return Vec::new(),
                    None => Value::Null,
                };
                vec![chunk(json!({ "content": text }), logprobs, Value::Null)]
            }
            Event::Done { text, reason } => {
                let mut chunks = Vec::new();
                let (mut rest, mut reason) = (text, reason.name());
                if let Some(of_tools) = &self.tools {
                    let reader = self.readers.remove(&index);
                    let mut reader = reader.unwrap_or_else(|| of_tools.reader());
                    rest = reader.push(&rest);
                    let (calls, left) = reader.finish();
                    rest += &left;
                    if !calls.is_empty() {
                        reason = "tool_calls";
                        let calls = documents(calls, of_tools.several).into_iter().enumerate();
                        for (number, mut call) in calls {
                            call["index"] = number.into();
                            chunks.push(plain(json!({ "tool_calls": [call] })));
                        }
                    }
                }
                if !rest.is_empty() {
                    chunks.insert(0, plain(json!({ "content": rest })));
                }
                chunks.push(chunk(json!({}), Value::Null, reason.into()));
                chunks
            }
            Event::Failed(_) => Vec::new(),
        }
    }
}

/// The calls of a whole answer, and its text beside them.
fn calls_of(text: &str, of_tools: &Calls) -> (Vec<Value>, String) {
    let mut reader = of_tools.reader();
    let before = reader.push(text);
    let (calls, rest) = reader.finish();
    (documents(calls, of_tools.several), before + &rest)
}

fn documents(calls: Vec<tools::Call>, several: bool) -> Vec<Value> {
    let most = if several { usize::MAX } else { 1 };
    let document = |call: tools::Call| {
        json!({
            "id": new_id("call_"), "type": "function",
            "function": { "name": call.name, "arguments": call.arguments },
        })
    };
    calls.into_iter().take(most).map(document).collect()
}

/// Log-probabilities as chats tell them.
fn tokens_of(service: &Service, logprobs: &[Logprob]) -> Value {
    let token = |token: u32, logprob: f32| {
        let bytes = service.bytes(token);
        json!({ "token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes })
    };
    let content = logprobs.iter().map(|own| {
        let mut document = token(own.token, own.logprob);
        let top = own.top.iter().map(|&(t, logprob)| token(t, logprob));
        document["top_logprobs"] = top.collect();
        document
    });
    json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
}

/// Renders the conversation, and makes what the answer must follow.
fn prepare(service: &Service, fields: ChatFields) -> Result<Prepared, ApiError> {
    let messages = messages(fields.messages)?;
    let variables = fields.chat_template_kwargs.unwrap_or_default();
    let answer = fields.add_generation_prompt.unwrap_or(true);
    let several = fields.parallel_tool_calls.unwrap_or(true);
    let tools = checked_tools(fields.tools.as_deref().unwrap_or_default())?;
    let choice = checked_choice(fields.tool_choice, &tools)?;
    let calls = choice.is_some().then(|| Calls {
        several,
        names: tools.iter().map(|tool| tool.name.clone()).collect(),
    });
    let mut structure = match fields.response_format {
        None | Some(ResponseFormat::Text) => None,
        Some(ResponseFormat::JsonObject) => Some(json!({ "type": "object" })),
        Some(ResponseFormat::JsonSchema { json_schema }) => Some(
            json_schema
                .schema
                .unwrap_or_else(|| json!({ "type": "object" })),
        ),
    }
    .map(|schema| {
        let made = service.structures()?.schema(&schema);
        made.map_err(|reason| {
            let reason = format!("the schema cannot be followed: {reason}");
            ApiError::field("response_format", reason)
        })
    })
    .transpose()?;
    let failed = |error: lexico_llm::Error| ApiError::field("messages", error);
    let text = match choice {
        Some(choice) => {
            let list = fields.tools.unwrap_or_default().into_iter();
            let list = Value::Array(list.map(Value::Object).collect());
            let rendered = tools::render(&service.chat, &messages, answer, &list, &variables);
            let (text, style) = rendered.map_err(failed)?;
            if let Some(grammar) = forced(style, &choice, &tools, several) {
                let made = service.structures()?.grammar(grammar);
                structure = Some(made.map_err(|reason| {
                    let reason = format!("the parameters of a tool cannot be followed: {reason}");
                    ApiError::field("tools", reason)
                })?);
            }
            text
        }
        None => {
            let rendered = service
                .chat
                .render_given(&messages, answer, None, None, &variables);
            rendered.map_err(failed)?
        }
    };
    service.check_length("messages", &text)?;
    let tokens = service
        .worker
        .model
        .tokenizer
        .encode_more(&text)
        .map_err(failed)?;
    Ok(Prepared {
        tokens,
        structure,
        tools: calls,
    })
}

/// The grammar of the calls that must be made, where there must be some.
fn forced(style: Style, choice: &ToolChoice, tools: &[Tool], several: bool) -> Option<String> {
    match choice {
        ToolChoice::Auto => None,
        ToolChoice::Required => Some(tools::grammar(style, tools, several)),
        ToolChoice::Named(name) => {
            let own = tools.iter().filter(|tool| tool.name == *name);
            let own: Vec<Tool> = own.cloned().collect();
            Some(tools::grammar(style, &own, false))
        }
    }
}

fn checked_tools(fields: &[Map<String, Value>]) -> Result<Vec<Tool>, ApiError> {
    let mut tools = Vec::new();
    for (number, field) in fields.iter().enumerate() {
        let refused = |field: &str, reason: &str| {
            Err(ApiError::field(format!("tools[{number}].{field}"), reason))
        };
        if field.get("type").is_some_and(|kind| kind != "function") {
            return refused("type", "only functions can be called");
        }
        let Some(function) = field.get("function").and_then(Value::as_object) else {
            return refused("function", "a tool has a function, an object");
        };
        let name = function
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let sound = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if name.is_empty() || name.len() > 64 || !name.chars().all(sound) {
            let reason = "a name has 1 to 64 letters, digits, dots, dashes and underscores";
            return refused("function.name", reason);
        }
        let parameters = match function.get("parameters") {
            None | Some(Value::Null) => json!({ "type": "object", "properties": {} }),
            Some(parameters) if parameters.is_object() => parameters.clone(),
            Some(_) => return refused("function.parameters", "parameters are a JSON schema"),
        };
        tools.push(Tool {
            name: name.to_owned(),
            parameters,
        });
    }
    Ok(tools)
}

/// The choice of tools; `None` where there are none, or none is to be called.
fn checked_choice(
    field: Option<ToolChoiceField>,
    tools: &[Tool],
) -> Result<Option<ToolChoice>, ApiError> {
    let refused = |reason: &str| Err(ApiError::field("tool_choice", reason));
    let choice = match field {
        None => ToolChoice::Auto,
        Some(ToolChoiceField::Word(word)) => match word.as_str() {
            "none" => return Ok(None),
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => return refused("it must be none, auto, required, or a function"),
        },
        Some(ToolChoiceField::Named { function }) => {
            if !tools.iter().any(|tool| tool.name == function.name) {
                return refused("it names a function that is not among the tools");
            }
            ToolChoice::Named(function.name)
        }
    };
    match (tools.is_empty(), &choice) {
        (true, ToolChoice::Auto) => Ok(None),
        (true, _) => refused("there are no tools to call"),
        (false, _) => Ok(Some(choice)),
    }
}

/// Roles that there are.
const ROLES: [&str; 6] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
];

/// The messages as templates take them: contents as texts, arguments of calls as objects.
pub(super) fn messages(fields: Vec<Map<String, Value>>) -> Result<Vec<Message>, ApiError> {
    if fields.is_empty() {
        let reason = "a conversation has at least one message";
        return Err(ApiError::field("messages", reason));
    }
    let fields = fields.into_iter().enumerate();
    fields
        .map(|(number, message)| self::message(number, message))
        .collect()
}

fn message(number: usize, mut fields: Map<String, Value>) -> Result<Message, ApiError> {
    let refused = |field: &str, reason: &str| {
        Err(ApiError::field(
            format!("messages[{number}].{field}"),
            reason,
        ))
    };
    let role = fields
        .get("role")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let role = match role {
        // Models know it by its older name.
        "developer" => "system".to_owned(),
        role if ROLES.contains(&role) => role.to_owned(),
        _ => {
            let reason = format!("a role is one of {}", ROLES.join(", "));
            return refused("role", &reason);
        }
    };
    let content = match fields.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for (at, part) in parts.iter().enumerate() {
                match (part.get("type").and_then(Value::as_str), part.get("text")) {
                    (Some("text" | "input_text"), Some(Value::String(own))) => text += own,
                    _ => {
                        let field = format!("content[{at}]");
                        return refused(&field, "the model reads text parts alone");
                    }
                }
            }
            text
        }
        None | Some(Value::Null) if role == "assistant" => String::new(),
        _ => return refused("content", "a content is a string or a list of text parts"),
    };
    // Clients that send an answer back as they got it name the calls that there are not; some templates only ask whether the field is there.
    let calls = fields.get("tool_calls");
    if calls.is_some_and(|calls| calls.is_null() || calls.as_array().is_some_and(Vec::is_empty)) {
        fields.remove("tool_calls");
    }
    if let Some(calls) = fields.get_mut("tool_calls") {
        let Some(calls) = calls.as_array_mut() else {
            return refused("tool_calls", "calls are a list");
        };
        for (at, call) in calls.iter_mut().enumerate() {
            let arguments = call.pointer_mut("/function/arguments");
            let Some(arguments) = arguments else {
                let field = format!("tool_calls[{at}].function");
                return refused(&field, "a call has a function with a name and arguments");
            };
            if let Value::String(text) = arguments {
                let text = if text.trim().is_empty() { "{}" } else { text };
                // A model wrote them: what is no object stays as it is, so that the conversation can go on.
                if let Ok(object @ Value::Object(_)) = serde_json::from_str(text) {
                    *arguments = object;
                }
            }
        }
    }
    fields.remove("role");
    let message = Message::new(&role, &content);
    let fields = fields.into_iter();
    Ok(fields.fold(message, |message, (name, value)| message.with(&name, value)))
}
