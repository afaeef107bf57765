use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use lexico_llm::Model;
use lexico_llm::cache::{CacheSpec, KvCache};
use lexico_llm::chat::{ChatTemplate, Message};
use lexico_llm::generate::{Finish, GenerateOptions, Generated, generate};
use lexico_llm::sample::{Sampler, Sampling};
use lexico_llm::saved::{self, Progress, SavedGeneration};
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
    /// The cache method and its options (below) [default: lexico, or as it was saved]
    #[arg(long, value_name = "NAME[:key=value,...]")]
    cache: Option<CacheSpec>,
    /// Save the cache and the text so far in the end, also where Ctrl-C ends it, for --load-cache
    #[arg(long, value_name = "FILE")]
    save_cache: Option<PathBuf>,
    /// Go on from a saved cache; the sampling settings are those given now
    ///
    /// Without a prompt the text goes on exactly where it stopped. A prompt is what follows the text, or the next
    /// question of a conversation; where it begins with all of the text so far, only what is new is read.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["compare", "system_prompt"])]
    load_cache: Option<PathBuf>,
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
    /// Seed of the draws (-1: another one each time) [default: 0, or the draws that were saved go on]
    #[arg(short, long, allow_hyphen_values = true, value_parser = seed)]
    seed: Option<u64>,
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
        let saved = self.load_cache.as_deref().map(SavedGeneration::open);
        let saved = saved.transpose()?;
        let mut prompt = self.prompt_text()?;
        if saved.is_some() {
            prompt = prompt.filter(|prompt| !prompt.is_empty());
        } else if prompt.is_none() && (self.json || self.compare) {
            bail!("--json and --compare need a prompt: as an argument, with --file, or on stdin");
        } else if prompt.as_deref().is_some_and(|p| p.trim().is_empty()) {
            return Err(lexico_llm::Error::EmptyPrompt.into());
        }
        let spec = self.spec(saved.as_ref())?;
        let seed = saved.as_ref().map_or(0, |saved| saved.progress().seed);
        let seed = self.seed.unwrap_or(seed);
        let sampler = Sampler::new(self.sampling(seed))?;
        let started = Instant::now();
        let model = self.model.load(std::slice::from_ref(&spec))?;
        let load_seconds = started.elapsed().as_secs_f64();
        let mut session = Session {
            run: &self,
            model: &model,
            chat: self.chat(&model)?,
            // A wrong setting is reported before a session starts.
            cache: model.cache(&spec)?,
            spec,
            seed,
            sampler,
            messages: Vec::new(),
            tokens: Vec::new(),
            prompt_tokens: 0,
            finish: Finish::MaxTokens,
        };
        if let Some(path) = &self.save_cache {
            saved::check(path, &session.spec, session.cache.as_ref())?;
        }
        let goes_on = saved.is_some();
        if let Some(saved) = saved {
            session.resume(saved)?;
            prompt = session.new_part(prompt)?;
        }
        interrupt::listen()?;
        if prompt.is_none() && !goes_on {
            return session.talk();
        }
        session.once(prompt.as_deref(), load_seconds)
    }

    /// The cache that is asked for, or that of a saved one, which has to be the same where both are given.
    fn spec(&self, saved: Option<&SavedGeneration>) -> anyhow::Result<CacheSpec> {
        match (&self.cache, saved) {
            (Some(spec), Some(saved)) if !spec.same_as(saved.spec()) => bail!(
                "the cache was saved as {}, and --cache is {spec}; leave --cache out",
                saved.spec()
            ),
            (_, Some(saved)) => Ok(saved.spec().clone()),
            (Some(spec), None) => Ok(spec.clone()),
            (None, None) => Ok("lexico".parse()?),
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

    fn sampling(&self, seed: u64) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            repetition_window: self.repeat_last_n,
            seed,
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
            written: Vec::new(),
            goes_on: self.save_cache.is_some(),
        }
    }

    /// Generates, printing the text as it comes unless one document is wanted; what is generated is there also
    /// where it could not be printed.
    fn stream(
        &self,
        model: &Model,
        cache: &mut dyn KvCache,
        tokens: &[u32],
        sampler: &mut Sampler,
        options: &GenerateOptions,
    ) -> anyhow::Result<(Generated, anyhow::Result<()>)> {
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
        let printed = match failed {
            Some(error) => Err(error),
            None if self.json => Ok(()),
            None => ui::line(""),
        };
        Ok((generated, printed))
    }
}

/// A text, or a conversation, and all that holds it.
struct Session<'a> {
    run: &'a Run,
    model: &'a Model,
    chat: Option<ChatTemplate>,
    spec: CacheSpec,
    cache: Box<dyn KvCache>,
    seed: u64,
    sampler: Sampler,
    /// With a chat template.
    messages: Vec<Message>,
    /// All tokens so far; the cache holds all but the last one.
    tokens: Vec<u32>,
    /// How many of them are not the last answer's.
    prompt_tokens: usize,
    /// Why the last answer ended.
    finish: Finish,
}

/// What came of a prompt.
struct Answer {
    report: Report,
    generated: Generated,
    /// Whether all of it could be printed.
    printed: anyhow::Result<()>,
}

impl Session<'_> {
    fn once(mut self, prompt: Option<&str>, load_seconds: f64) -> anyhow::Result<()> {
        let (run, model) = (self.run, self.model);
        let Answer {
            report,
            generated,
            printed,
        } = self.answer(prompt)?;
        let saved = run.save_cache.as_deref().map(|path| self.save(path));
        let saved = saved.transpose()?;
        printed?;
        let mut full = if run.compare && !interrupt::happened() {
            let spec: CacheSpec = "full".parse()?;
            let mut cache = model.cache(&spec)?;
            let quiet = &mut |_: &str| interrupt::flow();
            let mut sampler = Sampler::new(run.sampling(self.seed))?;
            let tokens = &self.tokens[..self.prompt_tokens];
            let options = run.options(model);
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
        if run.json {
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
            if let Some(saved) = &saved {
                document["saved"] = saved.json();
            }
            return ui::json(&document);
        }
        ui::note(&report.line());
        if let Some(saved) = &saved {
            ui::note(&saved.line());
        }
        if run.compare && full.is_none() {
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

    /// Each line goes on from the text so far, or is the next question of a conversation.
    fn talk(mut self) -> anyhow::Result<()> {
        let mut editor = rustyline::DefaultEditor::new()?;
        let manner = match self.chat {
            Some(_) => "It answers what you type.",
            None => "It goes on from what you type.",
        };
        ui::note(&format!(
            "{} with --cache {}. {manner}\n\
             /clear starts afresh, /exit or Ctrl-D leaves, Ctrl-C breaks an answer off.",
            self.model.name, self.spec
        ));
        loop {
            interrupt::forget();
            let line = match editor.readline("> ") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => continue,
                Err(ReadlineError::Eof) => break,
                Err(error) => return Err(error.into()),
            };
            match line.trim() {
                "" => continue,
                "/exit" | "/quit" => break,
                "/clear" => {
                    self.clear()?;
                    continue;
                }
                command if command.starts_with('/') => {
                    ui::note("there are /clear and /exit");
                    continue;
                }
                _ => {}
            }
            editor.add_history_entry(&line)?;
            let question = match self.chat {
                Some(_) => line,
                None => format!("{line}\n"),
            };
            let mut answer = self.answer(Some(&question));
            if answer.as_ref().is_err_and(is_context_full) {
                ui::note("The context is full: the conversation starts afresh with this.");
                self.clear()?;
                answer = self.answer(Some(&question));
            }
            let printed = answer.and_then(|answer| answer.printed.map(|()| answer.report));
            match printed {
                Ok(report) => ui::note(&report.line()),
                Err(error) if ui::is_broken_pipe(&error) => return Err(error),
                Err(error) => {
                    // A cache cannot go on from a step that failed.
                    ui::note(&format!(
                        "error: {error:#}\nThe conversation starts afresh."
                    ));
                    self.clear()?;
                }
            }
        }
        match &self.run.save_cache {
            Some(path) if !self.tokens.is_empty() => ui::note(&self.save(path)?.line()),
            Some(_) => ui::note("nothing was said, so nothing is saved"),
            None => {}
        }
        Ok(())
    }

    fn clear(&mut self) -> anyhow::Result<()> {
        self.cache = self.model.cache(&self.spec)?;
        self.messages.clear();
        self.tokens.clear();
        Ok(())
    }

    /// Takes the place of the session that was saved.
    fn resume(&mut self, saved: SavedGeneration) -> anyhow::Result<()> {
        let (cache, progress) = saved.resume(self.model)?;
        self.cache = cache;
        self.sampler.see(&progress.tokens);
        if self.seed == progress.seed {
            self.sampler.set_draws(progress.draws);
        }
        self.messages = progress.messages;
        self.tokens = progress.tokens;
        self.prompt_tokens = progress.prompt_tokens;
        self.finish = progress.finish;
        Ok(())
    }

    fn save(&self, path: &Path) -> anyhow::Result<Saved> {
        let started = Instant::now();
        let progress = Progress {
            tokens: self.tokens.clone(),
            prompt_tokens: self.prompt_tokens,
            finish: self.finish,
            messages: self.messages.clone(),
            seed: self.seed,
            draws: self.sampler.draws(),
        };
        let cache = self.cache.as_ref();
        let bytes = saved::save(path, self.model, &self.spec, cache, &progress)?;
        Ok(Saved {
            positions: cache.len(),
            bytes,
            fp16_bytes: self.model.decoder.config().fp16_cache_bytes(cache.len()),
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// What of a prompt is new, where it is plain text that begins with all of the text so far.
    fn new_part(&self, prompt: Option<String>) -> anyhow::Result<Option<String>> {
        let (Some(prompt), None) = (&prompt, &self.chat) else {
            return Ok(prompt);
        };
        let so_far = self.model.tokenizer.decode(&self.tokens)?;
        let new = prompt.strip_prefix(&so_far).unwrap_or(prompt);
        Ok((!new.is_empty()).then(|| new.to_owned()))
    }

    /// The text so far and then `prompt`, or the conversation with it.
    fn with(&mut self, prompt: &str) -> anyhow::Result<Vec<u32>> {
        let tokenizer = &self.model.tokenizer;
        let Some(chat) = &self.chat else {
            self.messages.clear();
            if self.tokens.is_empty() {
                return Ok(tokenizer.encode_first(prompt)?);
            }
            let more = tokenizer.encode_more(prompt)?;
            return Ok([self.tokens.as_slice(), &more].concat());
        };
        if !self.messages.is_empty() {
            self.messages.push(Message::new("user", prompt));
        } else if self.tokens.is_empty() {
            self.messages = self.run.opening(prompt);
        } else {
            bail!("what was saved is plain text and no conversation; --no-chat goes on with it");
        }
        chat_tokens(self.model, chat, &self.messages)
    }

    /// Generates what follows a prompt, or without one what follows the text so far.
    fn answer(&mut self, prompt: Option<&str>) -> anyhow::Result<Answer> {
        let mut options = self.run.options(self.model);
        let tokens = match prompt {
            Some(prompt) => self.with(prompt)?,
            None => {
                options.written = self.tokens[self.prompt_tokens..].to_vec();
                self.tokens.clone()
            }
        };
        // A template may write the past anew, an answer without its thoughts, say.
        let mut held = self.cache.len();
        if !tokens.starts_with(&self.tokens[..held]) {
            self.cache = self.model.cache(&self.spec)?;
            held = 0;
        }
        self.sampler.rewind(held);
        let ended = matches!(self.finish, Finish::End | Finish::Stop);
        let (new, cache) = (&tokens[held..], self.cache.as_mut());
        let (generated, printed) = if prompt.is_none() && ended && !options.ignore_end {
            ui::note("the text had ended where it was saved; a prompt goes on from there");
            (Generated::nothing(self.finish), Ok(()))
        } else {
            self.run
                .stream(self.model, cache, new, &mut self.sampler, &options)?
        };
        match self.messages.last_mut() {
            Some(last) if last.role == "assistant" => last.content.push_str(&generated.text),
            Some(_) => self
                .messages
                .push(Message::new("assistant", &generated.text)),
            None => {}
        }
        let cache = self.cache.as_ref();
        let report = Report::new(self.model, &self.spec, cache, new.len(), &generated);
        if prompt.is_some() {
            self.prompt_tokens = tokens.len();
        }
        self.tokens = [tokens, generated.tokens.clone()].concat();
        self.finish = generated.finish;
        Ok(Answer {
            report,
            generated,
            printed,
        })
    }
}

/// What saving a cache came to.
struct Saved {
    positions: usize,
    bytes: usize,
    fp16_bytes: usize,
    seconds: f64,
}

impl Saved {
    fn line(&self) -> String {
        format!(
            "[saved {} positions, {} (dense {}), in {:.2} s]",
            self.positions,
            ui::bytes(self.bytes),
            ui::bytes(self.fp16_bytes),
            self.seconds
        )
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "positions": self.positions, "bytes": self.bytes, "fp16_bytes": self.fp16_bytes,
            "seconds": self.seconds,
        })
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
