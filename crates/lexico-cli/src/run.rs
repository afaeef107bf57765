use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use lexico_llm::Model;
use lexico_llm::cache::{CacheSpec, KvCache};
use lexico_llm::chat::{ChatTemplate, Message};
use lexico_llm::generate::{Finish, GenerateOptions, Generated, generate};
use lexico_llm::sample::{Sampler, Sampling};
use rustyline::error::ReadlineError;
use serde_json::json;

use crate::model::ModelArguments;
use crate::{interrupt, ui};

#[derive(Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct Run {
    /// The prompt; "-" reads it from stdin. Without one: stdin where it is a pipe, else a session
    #[arg(conflicts_with_all = ["file", "prompt_flag"])]
    prompt: Option<String>,
    /// The prompt, as llama.cpp takes it
    #[arg(short, long = "prompt", value_name = "PROMPT", conflicts_with = "file")]
    prompt_flag: Option<String>,
    /// Read the prompt from a file
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArguments,
    /// The cache method and its options (below)
    #[arg(long, default_value = "lexico", value_name = "NAME[:key=value,...]")]
    cache: CacheSpec,
    /// What the model is told before the conversation, where it has a chat template
    #[arg(long, visible_alias = "system", value_name = "TEXT")]
    system_prompt: Option<String>,
    /// Take the prompt as plain text to go on from, although the model has a chat template
    #[arg(long, visible_alias = "no-conversation")]
    no_chat: bool,
    /// Most tokens to generate (-1: until the context is full)
    #[arg(short = 'n', long, visible_aliases = ["predict", "n-predict"], default_value = "256")]
    #[arg(value_name = "N", allow_hyphen_values = true)]
    #[arg(value_parser = |text: &str| count_from(1, text))]
    max_tokens: usize,
    /// Most positions of prompt and answer together (0: the model's context)
    #[arg(short, long, default_value_t = 0, value_name = "N")]
    ctx_size: usize,
    /// 0 takes the most likely token; higher is more varied
    #[arg(long, visible_alias = "temp", default_value_t = 0.0, value_name = "T")]
    temperature: f32,
    /// Only the K most likely tokens (0: all)
    #[arg(long, default_value_t = Sampling::default().top_k, value_name = "K")]
    top_k: usize,
    /// Only the most likely tokens that together reach this probability (1: all)
    #[arg(long, default_value_t = Sampling::default().top_p, value_name = "P")]
    top_p: f32,
    /// Only tokens at least this times as likely as the most likely (0: all)
    #[arg(long, default_value_t = Sampling::default().min_p, value_name = "P")]
    min_p: f32,
    /// Make recent tokens less likely (1: off)
    #[arg(
        long,
        visible_alias = "repetition-penalty",
        default_value_t = 1.0,
        value_name = "X"
    )]
    repeat_penalty: f32,
    /// How many of the last tokens count as recent (-1: all)
    #[arg(
        long,
        default_value = "64",
        value_name = "N",
        allow_hyphen_values = true
    )]
    #[arg(value_parser = |text: &str| count_from(0, text))]
    repeat_last_n: usize,
    /// Seed of the draws (-1: another one each time)
    #[arg(short, long, default_value = "0", allow_hyphen_values = true, value_parser = seed)]
    seed: u64,
    /// End at this text, \n meaning a new line; may be given several times [default: the model's own]
    #[arg(
        long,
        short = 'r',
        visible_alias = "reverse-prompt",
        value_name = "TEXT"
    )]
    stop: Vec<String>,
    /// Go on past the model's end-of-text tokens and its own stop texts
    #[arg(long)]
    ignore_eos: bool,
    /// Also run `full` on the same prompt: how many tokens agree, what each cache weighs
    #[arg(long)]
    compare: bool,
    /// Print one JSON document instead of text
    #[arg(long)]
    json: bool,
}

impl Run {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let prompt = self.prompt_text()?;
        if prompt.is_none() && (self.json || self.compare) {
            bail!("--json and --compare need a prompt: as an argument, with --file, or on stdin");
        }
        if prompt.as_deref().is_some_and(|p| p.trim().is_empty()) {
            return Err(lexico_llm::Error::EmptyPrompt.into());
        }
        let sampler = Sampler::new(self.sampling())?;
        let started = Instant::now();
        let model = self.model.load(std::slice::from_ref(&self.cache))?;
        let load_seconds = started.elapsed().as_secs_f64();
        // A wrong setting is reported before a session starts.
        let cache = model.cache(&self.cache)?;
        let chat = self.chat(&model)?;
        interrupt::listen()?;
        match prompt {
            Some(prompt) => {
                let tokens = match &chat {
                    Some(chat) => chat_tokens(&model, chat, &self.opening(&prompt))?,
                    None => model.tokenizer.encode_first(&prompt)?,
                };
                self.once(&model, cache, sampler, &tokens, load_seconds)
            }
            None => self.session(&model, chat, cache, sampler),
        }
    }

    fn prompt_text(&self) -> anyhow::Result<Option<String>> {
        let stdin_is_pipe = || !std::io::stdin().is_terminal();
        if let Some(path) = self.file.as_ref().filter(|path| path.as_os_str() != "-") {
            let text = std::fs::read_to_string(path);
            let text = text.with_context(|| path.display().to_string())?;
            return Ok(Some(without_line_end(text)));
        }
        match self.prompt.as_deref().or(self.prompt_flag.as_deref()) {
            Some(prompt) if prompt != "-" => Ok(Some(prompt.to_owned())),
            None if self.file.is_none() && !stdin_is_pipe() => Ok(None),
            _ => {
                let mut text = String::new();
                std::io::stdin()
                    .read_to_string(&mut text)
                    .context("the prompt on stdin")?;
                Ok(Some(without_line_end(text)))
            }
        }
    }

    /// The model's chat template, unless plain text is asked for.
    fn chat(&self, model: &Model) -> anyhow::Result<Option<ChatTemplate>> {
        if self.no_chat {
            return Ok(None);
        }
        let chat = model.chat_template().context("--no-chat does without it")?;
        if chat.is_none() && self.system_prompt.is_some() {
            bail!(
                "--system-prompt needs a chat template, and the model {} has none",
                model.name
            );
        }
        Ok(chat)
    }

    /// A conversation up to its first question.
    fn opening(&self, question: &str) -> Vec<Message> {
        let system = self
            .system_prompt
            .iter()
            .map(|text| Message::new("system", text));
        system.chain([Message::new("user", question)]).collect()
    }

    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            repetition_window: self.repeat_last_n,
            seed: self.seed,
        }
    }

    fn options(&self, model: &Model) -> GenerateOptions {
        let given = || self.stop.iter().map(|text| text.replace("\\n", "\n"));
        GenerateOptions {
            max_tokens: self.max_tokens,
            stop: match (self.stop.is_empty(), self.ignore_eos) {
                (false, _) => given().collect(),
                (true, false) => model.stop_texts.clone(),
                (true, true) => Vec::new(),
            },
            ignore_end: self.ignore_eos,
            context: if self.ctx_size == 0 {
                usize::MAX
            } else {
                self.ctx_size
            },
        }
    }

    fn once(
        &self,
        model: &Model,
        mut cache: Box<dyn KvCache>,
        mut sampler: Sampler,
        tokens: &[u32],
        load_seconds: f64,
    ) -> anyhow::Result<()> {
        let options = self.options(model);
        let generated = self.stream(model, cache.as_mut(), tokens, &mut sampler, &options)?;
        let report = Report::new(model, &self.cache, cache.as_ref(), tokens.len(), &generated);
        let mut full = if self.compare && !interrupt::happened() {
            let spec: CacheSpec = "full".parse()?;
            let mut cache = model.cache(&spec)?;
            let quiet = &mut |_: &str| interrupt::flow();
            let mut sampler = Sampler::new(self.sampling())?;
            let other = generate(model, cache.as_mut(), tokens, &mut sampler, &options, quiet)?;
            Some((
                Report::new(model, &spec, cache.as_ref(), tokens.len(), &other),
                other,
            ))
        } else {
            None
        };
        // What was cut short says nothing about the caches.
        if interrupt::happened() {
            full = None;
        }
        if self.json {
            let mut document = report.json(&generated);
            document["model"] = model.name.as_str().into();
            document["load_seconds"] = load_seconds.into();
            if let Some((full_report, full)) = &full {
                let (agreeing, first) = agreement(&generated.tokens, &full.tokens);
                document["compare"] = json!({
                    "agreeing_tokens": agreeing,
                    "first_difference": first,
                    "full": full_report.json(full),
                });
            }
            return ui::json(&document);
        }
        ui::note(&report.line());
        if self.compare && full.is_none() {
            ui::note("interrupted, so not compared");
        }
        if let Some((full_report, full)) = &full {
            ui::note(&full_report.line());
            let (agreeing, first) = agreement(&generated.tokens, &full.tokens);
            let of = generated.tokens.len().max(full.tokens.len());
            let first = first.map_or(String::new(), |same| format!(", the first {same} in a row"));
            ui::note(&format!(
                "{agreeing} of {of} generated tokens agree with full{first}"
            ));
        }
        Ok(())
    }

    /// Generates, printing the text as it comes unless one document is wanted.
    fn stream(
        &self,
        model: &Model,
        cache: &mut dyn KvCache,
        tokens: &[u32],
        sampler: &mut Sampler,
        options: &GenerateOptions,
    ) -> anyhow::Result<Generated> {
        let mut failed = None;
        let generated = generate(model, cache, tokens, sampler, options, &mut |text| {
            if !self.json
                && !text.is_empty()
                && let Err(error) = ui::print(text)
            {
                failed = Some(error);
                return std::ops::ControlFlow::Break(());
            }
            interrupt::flow()
        })?;
        match failed {
            Some(error) => Err(error),
            None if self.json => Ok(generated),
            None => ui::line("").map(|()| generated),
        }
    }

    /// Each line goes on from the text so far, or is the next question of a conversation.
    fn session(
        &self,
        model: &Model,
        chat: Option<ChatTemplate>,
        cache: Box<dyn KvCache>,
        sampler: Sampler,
    ) -> anyhow::Result<()> {
        let mut editor = rustyline::DefaultEditor::new()?;
        let manner = match chat {
            Some(_) => "It answers what you type.",
            None => "It goes on from what you type.",
        };
        ui::note(&format!(
            "{} with --cache {}. {manner}\n\
             /clear starts afresh, /exit or Ctrl-D leaves, Ctrl-C breaks an answer off.",
            model.name, self.cache
        ));
        let mut session = Session {
            run: self,
            model,
            chat,
            cache,
            sampler,
            messages: Vec::new(),
            tokens: Vec::new(),
        };
        loop {
            interrupt::forget();
            let line = match editor.readline("> ") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => continue,
                Err(ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            match line.trim() {
                "" => continue,
                "/exit" | "/quit" => return Ok(()),
                "/clear" => {
                    session.clear()?;
                    continue;
                }
                command if command.starts_with('/') => {
                    ui::note("there are /clear and /exit");
                    continue;
                }
                _ => {}
            }
            editor.add_history_entry(&line)?;
            let mut answer = session.answer(&line);
            if answer.as_ref().is_err_and(is_context_full) {
                ui::note("The context is full: the conversation starts afresh with this.");
                session.clear()?;
                answer = session.answer(&line);
            }
            match answer {
                Ok(report) => ui::note(&report.line()),
                Err(error) if ui::is_broken_pipe(&error) => return Err(error),
                Err(error) => {
                    // A cache cannot go on from a step that failed.
                    ui::note(&format!(
                        "error: {error:#}\nThe conversation starts afresh."
                    ));
                    session.clear()?;
                }
            }
        }
    }
}

/// A session and what was said in it.
struct Session<'a> {
    run: &'a Run,
    model: &'a Model,
    chat: Option<ChatTemplate>,
    cache: Box<dyn KvCache>,
    sampler: Sampler,
    /// With a chat template.
    messages: Vec<Message>,
    /// All tokens so far; the cache holds all but the last one.
    tokens: Vec<u32>,
}

impl Session<'_> {
    fn clear(&mut self) -> anyhow::Result<()> {
        self.cache = self.model.cache(&self.run.cache)?;
        self.messages.clear();
        self.tokens.clear();
        Ok(())
    }

    fn answer(&mut self, line: &str) -> anyhow::Result<Report> {
        let tokenizer = &self.model.tokenizer;
        let tokens = match &self.chat {
            Some(chat) => {
                if self.messages.is_empty() {
                    self.messages = self.run.opening(line);
                } else {
                    self.messages.push(Message::new("user", line));
                }
                chat_tokens(self.model, chat, &self.messages)?
            }
            None if self.tokens.is_empty() => tokenizer.encode_first(&format!("{line}\n"))?,
            None => {
                let more = tokenizer.encode_more(&format!("{line}\n"))?;
                [self.tokens.as_slice(), &more].concat()
            }
        };
        // A template may write the past anew, an answer without its thoughts, say.
        let mut held = self.cache.len();
        if !tokens.starts_with(&self.tokens[..held]) {
            self.cache = self.model.cache(&self.run.cache)?;
            held = 0;
        }
        let new = &tokens[held..];
        let options = self.run.options(self.model);
        let cache = self.cache.as_mut();
        let generated = self
            .run
            .stream(self.model, cache, new, &mut self.sampler, &options)?;
        self.messages
            .push(Message::new("assistant", &generated.text));
        let spec = &self.run.cache;
        let report = Report::new(self.model, spec, self.cache.as_ref(), new.len(), &generated);
        self.tokens = [tokens, generated.tokens].concat();
        Ok(report)
    }
}

fn is_context_full(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<lexico_llm::Error>();
    matches!(error, Some(lexico_llm::Error::ContextFull { .. }))
}

fn chat_tokens(
    model: &Model,
    chat: &ChatTemplate,
    messages: &[Message],
) -> anyhow::Result<Vec<u32>> {
    // The template writes the special tokens itself.
    Ok(model.tokenizer.encode_more(&chat.render(messages, true)?)?)
}

/// As llama.cpp counts: -1 has no limit.
fn count_from(least: usize, text: &str) -> Result<usize, String> {
    if text == "-1" {
        return Ok(usize::MAX);
    }
    match text.parse() {
        Ok(count) if count >= least => Ok(count),
        _ => Err(format!("it must be a whole number from {least} on, or -1")),
    }
}

/// As llama.cpp seeds: -1 takes the clock.
fn seed(text: &str) -> Result<u64, String> {
    if text == "-1" {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        return Ok(now.map_or(0, |elapsed| elapsed.as_nanos() as u64));
    }
    text.parse()
        .map_err(|_| "it must be a whole number, or -1".to_owned())
}

/// The line end that editors and `echo` add is no part of a prompt.
fn without_line_end(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    text
}

/// Tokens at the same place that are the same, and the first place where they are not.
fn agreement(a: &[u32], b: &[u32]) -> (usize, Option<usize>) {
    let agreeing = a.iter().zip(b).filter(|(a, b)| a == b).count();
    let first = a.iter().zip(b).position(|(a, b)| a != b);
    let shorter = a.len().min(b.len());
    (agreeing, first.or((a.len() != b.len()).then_some(shorter)))
}

/// What a generation cost.
struct Report {
    spec: String,
    method: &'static str,
    positions: usize,
    parts: Vec<(&'static str, usize)>,
    bytes: usize,
    fp16_bytes: usize,
    dictionary_bytes: usize,
    prompt_tokens: usize,
    generated_tokens: usize,
    prefill_seconds: f64,
    decode_tokens_per_second: Option<f64>,
    finish: Finish,
}

impl Report {
    fn new(
        model: &Model,
        spec: &CacheSpec,
        cache: &dyn KvCache,
        prompt_tokens: usize,
        generated: &Generated,
    ) -> Self {
        let footprint = cache.footprint();
        let method = spec.method().name;
        let dictionaries = model.dictionaries.as_ref().filter(|_| method == "lexico");
        Self {
            spec: spec.to_string(),
            method,
            positions: cache.len(),
            bytes: footprint.total(),
            parts: footprint.parts,
            fp16_bytes: model.decoder.config().fp16_cache_bytes(cache.len()),
            dictionary_bytes: dictionaries.map_or(0, |d| d.bytes()),
            prompt_tokens,
            generated_tokens: generated.tokens.len(),
            prefill_seconds: generated.prefill.as_secs_f64(),
            decode_tokens_per_second: generated.decode_tokens_per_second(),
            finish: generated.finish,
        }
    }

    fn ratio(&self) -> f64 {
        self.bytes as f64 / self.fp16_bytes.max(1) as f64
    }

    fn line(&self) -> String {
        let prefill = self.prompt_tokens as f64 / self.prefill_seconds.max(1e-9);
        let decode = self.decode_tokens_per_second;
        let decode = decode.map_or("-".to_owned(), |rate| format!("{rate:.0}"));
        let dictionaries = match self.dictionary_bytes {
            0 => String::new(),
            held => format!(", beside {} of dictionaries", ui::bytes(held)),
        };
        let cut = match self.finish {
            Finish::MaxTokens => "; stopped at --max-tokens",
            Finish::ContextFull => "; the context is full",
            Finish::Interrupted => "; interrupted",
            Finish::End | Finish::Stop => "",
        };
        format!(
            "[{}: {} for {} positions, {} of FP16{dictionaries}; prefill {prefill:.0} tokens/s, \
             decode {decode} tokens/s{cut}]",
            self.spec,
            ui::bytes(self.bytes),
            self.positions,
            ui::percent(self.ratio()),
        )
    }

    fn json(&self, generated: &Generated) -> serde_json::Value {
        let parts: serde_json::Map<String, serde_json::Value> = self
            .parts
            .iter()
            .map(|&(name, bytes)| (name.to_owned(), bytes.into()))
            .collect();
        let finish = match self.finish {
            Finish::End => "end",
            Finish::Stop => "stop",
            Finish::MaxTokens => "max_tokens",
            Finish::ContextFull => "context_full",
            Finish::Interrupted => "interrupted",
        };
        json!({
            "text": generated.text,
            "finish": finish,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "cache": {
                "method": self.method,
                "spec": self.spec,
                "positions": self.positions,
                "bytes": self.bytes,
                "parts": parts,
                "fp16_bytes": self.fp16_bytes,
                "ratio": self.ratio(),
                "dictionary_bytes": self.dictionary_bytes,
            },
            "prefill_seconds": self.prefill_seconds,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        })
    }
}
