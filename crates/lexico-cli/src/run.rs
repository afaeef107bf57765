use std::io::{IsTerminal, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use lexico::shown::shown_path;
use lexico_llm::cache::{CacheSpec, Footprint};
use lexico_llm::chat::ChatTemplate;
use lexico_llm::generate::{Finish, GenerateOptions};
use lexico_llm::sample::{Sampler, Sampling};
use lexico_llm::saved::SavedGeneration;
use lexico_llm::session::{Answer, Session};
use lexico_llm::{Error, Model};
use rustyline::error::ReadlineError;
use serde_json::{Map, Value, json};

use crate::learn::LearnArguments;
use crate::lines::Lines;
use crate::memory::size;
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
    /// Read the prompt from a file, UTF-8; a byte order mark is no part of it, and CRLF is a line end
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    learn: LearnArguments,
    /// The cache method and its options (below) [default: lexico, or as it was saved]
    #[arg(long, value_name = "NAME[:key=value,...]")]
    cache: Option<CacheSpec>,
    /// Memory of the cache: positions stay dense while they fit, and as it fills the oldest become codes
    /// [default: none; the newest 128 stay dense]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    kv_memory: Option<usize>,
    /// Save the cache and the text at the end, also after Ctrl-C, SIGTERM or SIGHUP, for --load-cache
    #[arg(long, value_name = "FILE")]
    save_cache: Option<PathBuf>,
    /// Go on from a saved cache; the sampling settings are those given now
    ///
    /// Without a prompt the text goes on exactly where it stopped. A prompt is what follows the text, or the next
    /// question of a conversation; where it begins with all of the text so far, only what is new is read.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["compare", "system_prompt"])]
    load_cache: Option<PathBuf>,
    /// Tell the model this before the conversation; it needs a chat template
    #[arg(long, visible_alias = "system", value_name = "TEXT")]
    system_prompt: Option<String>,
    /// Take the prompt as plain text to go on from, although the model has a chat template
    #[arg(long, visible_alias = "no-conversation")]
    no_chat: bool,
    /// Max number of tokens to generate (-1: until the context is full)
    #[arg(short = 'n', long, visible_aliases = ["predict", "n-predict"], default_value = "256")]
    #[arg(value_name = "N", allow_hyphen_values = true)]
    #[arg(value_parser = |text: &str| count_from(1, text))]
    max_tokens: usize,
    /// Max number of positions of prompt and answer together (0: the model's context)
    #[arg(short, long, default_value_t = 0, value_name = "N")]
    ctx_size: usize,
    /// Temperature of the draws: 0 takes the likeliest token, higher is more varied
    #[arg(long, visible_alias = "temp", default_value_t = 0.0, value_name = "T")]
    temperature: f32,
    /// Draw from the K likeliest tokens only (0: all)
    #[arg(long, default_value_t = Sampling::default().top_k, value_name = "K")]
    top_k: usize,
    /// Draw from the likeliest tokens that together reach this probability only (1: all)
    #[arg(long, default_value_t = Sampling::default().top_p, value_name = "P")]
    top_p: f32,
    /// Draw from tokens at least this times as likely as the likeliest only (0: all)
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
    /// Number of last tokens that count as recent (-1: all)
    #[arg(
        long,
        default_value = "64",
        value_name = "N",
        allow_hyphen_values = true
    )]
    #[arg(value_parser = |text: &str| count_from(0, text))]
    repeat_last_n: usize,
    /// Seed of the draws (-1: another each time) [default: 0, or the saved draws go on]
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
    /// Also run `full` on the same prompt: how many tokens agree, how large each cache is
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
            return Err(Error::EmptyPrompt.into());
        }
        let spec = self.spec(saved.as_ref())?;
        let seed = saved
            .as_ref()
            .map_or(0, |saved| saved.header().progress.seed);
        let seed = self.seed.unwrap_or(seed);
        let sampling = self.sampling(seed);
        // A wrong setting is reported before the model is read.
        Sampler::new(sampling.clone())?;
        let started = Instant::now();
        let model = Arc::new(
            self.model
                .load_or(std::slice::from_ref(&spec), &mut |model, out| {
                    self.learn.learn(model, out)
                })?,
        );
        let load_seconds = started.elapsed().as_secs_f64();
        let chat = self.chat(&model)?;
        let plain = chat.is_none();
        let mut session = Session::new(model, spec, sampling.clone())?;
        if let Some(template) = chat {
            session = session.with_chat(template, self.system_prompt.as_deref());
        }
        if let Some(path) = &self.save_cache {
            session.check_save(path)?;
        }
        let goes_on = saved.is_some();
        if let Some(saved) = saved {
            session.resume(saved)?;
            if let (Some(text), true) = (&prompt, plain) {
                let new = session.new_part(text)?.to_owned();
                prompt = (!new.is_empty()).then_some(new);
            }
        }
        interrupt::listen()?;
        if prompt.is_none() && !goes_on {
            return self.talk(session, plain);
        }
        self.once(session, prompt.as_deref(), sampling, load_seconds)
    }

    /// Returns the cache that is asked for, or the saved one; where both are given they must be the same.
    fn spec(&self, saved: Option<&SavedGeneration>) -> anyhow::Result<CacheSpec> {
        let mut given = self.cache.clone();
        if let Some(bytes) = self.kv_memory {
            let spec = given.map_or_else(|| "lexico".parse(), Ok)?;
            if spec.method().name != "lexico" {
                bail!(
                    "--kv-memory is for --cache lexico, which makes codes of what does not fit; {spec} is as large as it is"
                );
            }
            let with = spec.with("memory", &format!("{bytes}B"));
            given = Some(with.context("--kv-memory")?);
        }
        match (&given, saved) {
            (Some(spec), Some(saved)) if !spec.same_as(saved.spec()) => bail!(
                "the cache was saved as {}, and {spec} is asked for; leave out --cache and --kv-memory",
                saved.spec()
            ),
            (_, Some(saved)) => Ok(saved.spec().clone()),
            (Some(spec), None) => Ok(spec.clone()),
            (None, None) => Ok("lexico".parse()?),
        }
    }

    fn prompt_text(&self) -> anyhow::Result<Option<String>> {
        let file = self.file.as_ref().filter(|path| path.as_os_str() != "-");
        let given = self.prompt.as_deref().or(self.prompt_flag.as_deref());
        let text = match (file, given) {
            (Some(path), _) => prompt_of(std::fs::read(path).map_err(Into::into))
                .with_context(|| shown_path(path))?,
            (None, Some(prompt)) if prompt != "-" => return Ok(Some(prompt.to_owned())),
            (None, None) if self.file.is_none() && std::io::stdin().is_terminal() => {
                return Ok(None);
            }
            _ => {
                let mut bytes = Vec::new();
                let read = std::io::stdin().read_to_end(&mut bytes);
                let read = read.map(|_| bytes).map_err(Into::into);
                prompt_of(read).context("the prompt on stdin")?
            }
        };
        Ok(Some(without_line_end(&text).to_owned()))
    }

    /// Returns the model's chat template, unless plain text is asked for.
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
            context: match self.ctx_size {
                0 => usize::MAX,
                size => size,
            },
            written: Vec::new(),
            goes_on: self.save_cache.is_some(),
        }
    }

    /// Generates what follows a prompt, or without one what follows the text so far, and prints it as it comes unless
    /// one document is wanted. What is generated is there also where it could not be printed.
    fn answer(
        &self,
        session: &mut Session,
        prompt: Option<&str>,
    ) -> anyhow::Result<(Answer, anyhow::Result<()>)> {
        let options = self.options(session.model());
        let mut printed = Ok(());
        let mut on_text = |text: &str| {
            if !self.json && !text.is_empty() && printed.is_ok() {
                printed = ui::print(text);
            }
            match printed {
                Ok(()) => interrupt::flow(),
                Err(_) => ControlFlow::Break(()),
            }
        };
        let answer = match prompt {
            Some(prompt) => session.prompt(prompt, &options, &mut on_text),
            None => session.go_on(&options, &mut on_text),
        };
        let answer = match answer {
            Err(error @ Error::PlainText) => Err(error).context("--no-chat goes on with it")?,
            answer => answer?,
        };
        if answer.generated.tokens.is_empty() {
            ui::note("the text had ended where it was saved; a prompt goes on from there");
        } else if !self.json && printed.is_ok() {
            printed = ui::line("");
        }
        Ok((answer, printed))
    }

    fn once(
        &self,
        mut session: Session,
        prompt: Option<&str>,
        sampling: Sampling,
        load_seconds: f64,
    ) -> anyhow::Result<()> {
        let (answer, printed) = self.answer(&mut session, prompt)?;
        let path = self.save_cache.as_deref();
        let saved = path.map(|path| save(path, &session)).transpose()?;
        printed?;
        let compare = self.compare && !interrupt::happened();
        let full = compare.then(|| self.full(&session, sampling));
        let full = full.transpose()?;
        // What was cut short says nothing about the caches.
        let full = full.filter(|_| !interrupt::happened());
        let report = Report::new(&session, &answer);
        let compared = full.as_ref().map(|(session, full)| {
            let [own, other] = [&answer, full].map(|answer| &answer.generated.tokens);
            let of = own.len().max(other.len());
            (Report::new(session, full), of, agreement(own, other))
        });
        if self.json {
            let mut document = report.json();
            document["model"] = session.model().name.as_str().into();
            document["load_seconds"] = load_seconds.into();
            if let Some((full, _, (agreeing, first))) = &compared {
                document["compare"] = json!({
                    "agreeing_tokens": agreeing, "first_difference": first, "full": full.json(),
                });
            }
            if let Some((_, saved)) = saved {
                document["saved"] = saved;
            }
            return ui::json(&document);
        }
        ui::note(&report.line());
        if let Some((saved, _)) = saved {
            ui::note(&saved);
        }
        if let Some((full, of, (agreeing, first))) = compared {
            ui::note(&full.line());
            let first = first.map_or(String::new(), |same| format!(", the first {same} in a row"));
            ui::note(&format!(
                "{agreeing} of {of} generated tokens agree with full{first}"
            ));
        } else if self.compare {
            ui::note("interrupted, so not compared");
        }
        Ok(())
    }

    /// Generates from the same prompt with the uncompressed cache.
    fn full(&self, session: &Session, sampling: Sampling) -> anyhow::Result<(Session, Answer)> {
        let (model, prompt) = (session.model(), session.prompt_tokens().to_vec());
        let mut full = Session::new(Arc::clone(model), "full".parse()?, sampling)?;
        let answer = full.complete(prompt, &self.options(model), &mut |_| interrupt::flow())?;
        Ok((full, answer))
    }

    /// Takes lines: each follows the text so far, or is the next question of a conversation.
    fn talk(&self, mut session: Session, plain: bool) -> anyhow::Result<()> {
        let lines = Lines::new()?;
        let manner = match plain {
            false => "It answers what you type.",
            true => "It goes on from what you type.",
        };
        ui::note(&format!(
            "{} with --cache {}. {manner}\n\
             /clear starts afresh, /exit or Ctrl-D leaves, Ctrl-C breaks an answer off.",
            session.model().name,
            session.spec()
        ));
        while !interrupt::ends_program() {
            interrupt::forget_ctrl_c();
            let line = match lines.next() {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => continue,
                Err(ReadlineError::Eof) => break,
                Err(error) => return Err(error.into()),
            };
            match line.trim() {
                "" => continue,
                "/exit" | "/quit" => break,
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
            let question = if plain { format!("{line}\n") } else { line };
            let mut answer = self.answer(&mut session, Some(&question));
            if answer.as_ref().is_err_and(is_context_full) {
                ui::note("The context is full: the conversation starts afresh with this.");
                session.clear()?;
                answer = self.answer(&mut session, Some(&question));
            }
            let printed = answer.and_then(|(answer, printed)| printed.map(|()| answer));
            if interrupt::ends_program() {
                break;
            }
            match printed {
                Ok(answer) => ui::note(&Report::new(&session, &answer).line()),
                Err(error) if ui::is_broken_pipe(&error) => return Err(error),
                Err(error) => {
                    ui::note(&format!(
                        "error: {error:#}\nThe conversation starts afresh."
                    ));
                    session.clear()?;
                }
            }
        }
        drop(lines);
        match &self.save_cache {
            Some(path) if !session.tokens().is_empty() => {
                ui::note(&save(path, &session)?.0);
            }
            Some(_) => ui::note("nothing was said, so nothing is saved"),
            None => {}
        }
        Ok(())
    }
}

/// Saves the cache; returns a line and a document on it.
fn save(path: &Path, session: &Session) -> anyhow::Result<(String, Value)> {
    let started = Instant::now();
    let bytes = session.save(path)?;
    let seconds = started.elapsed().as_secs_f64();
    let positions = session.cache().len();
    let fp16_bytes = session.model().decoder.config().fp16_cache_bytes(positions);
    let line = format!(
        "[saved {positions} positions, {} (dense {}), in {seconds:.2} s]",
        ui::bytes(bytes),
        ui::bytes(fp16_bytes),
    );
    let document = json!({
        "positions": positions, "bytes": bytes, "fp16_bytes": fp16_bytes, "seconds": seconds,
    });
    Ok((line, document))
}

fn is_context_full(error: &anyhow::Error) -> bool {
    let full =
        |error: &Error| matches!(error, Error::ContextFull { .. } | Error::MemoryFull { .. });
    error.downcast_ref().is_some_and(full)
}

/// Reads a count as llama.cpp does: -1 has no limit.
fn count_from(least: usize, text: &str) -> Result<usize, String> {
    if text == "-1" {
        return Ok(usize::MAX);
    }
    match text.parse() {
        Ok(count) if count >= least => Ok(count),
        _ => Err(format!("it must be a whole number from {least} on, or -1")),
    }
}

/// Reads a seed as llama.cpp does: -1 takes the clock.
fn seed(text: &str) -> Result<u64, String> {
    if text == "-1" {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        return Ok(now.map_or(0, |elapsed| elapsed.as_nanos() as u64));
    }
    text.parse()
        .map_err(|_| "it must be a whole number, or -1".to_owned())
}

/// The prompt in the bytes of a file: UTF-8 without the mark that some editors begin it with, and with line ends as models
/// know them.
fn prompt_of(bytes: anyhow::Result<Vec<u8>>) -> anyhow::Result<String> {
    let bytes = bytes?;
    let utf16 = bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]);
    if utf16 || bytes.contains(&0) {
        bail!("it is UTF-16 text, or no text; save it as UTF-8");
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let byte = e.utf8_error().valid_up_to();
        anyhow::anyhow!("it is not UTF-8 text (byte {byte}); save it as UTF-8")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    Ok(text.replace("\r\n", "\n"))
}

/// Removes the line end that editors and `echo` add: it is no part of a prompt.
fn without_line_end(text: &str) -> &str {
    let line = text
        .strip_suffix('\n')
        .map(|line| line.strip_suffix('\r').unwrap_or(line));
    line.unwrap_or(text)
}

/// Counts the places that have the same token; returns the first that has not, too.
fn agreement(a: &[u32], b: &[u32]) -> (usize, Option<usize>) {
    let agreeing = a.iter().zip(b).filter(|(a, b)| a == b).count();
    let first = a.iter().zip(b).position(|(a, b)| a != b);
    let shorter = a.len().min(b.len());
    (agreeing, first.or((a.len() != b.len()).then_some(shorter)))
}

/// Cost of an answer, and of the cache that it left.
struct Report<'a> {
    session: &'a Session,
    answer: &'a Answer,
    footprint: Footprint,
    positions: usize,
    fp16_bytes: usize,
    dictionary_bytes: usize,
}

impl<'a> Report<'a> {
    fn new(session: &'a Session, answer: &'a Answer) -> Self {
        let (model, positions) = (session.model(), session.cache().len());
        let dictionaries = model.dictionaries.as_ref();
        let dictionaries = dictionaries.filter(|_| session.spec().method().needs_dictionaries);
        Self {
            session,
            answer,
            footprint: session.cache().footprint(),
            positions,
            fp16_bytes: model.decoder.config().fp16_cache_bytes(positions),
            dictionary_bytes: dictionaries.map_or(0, |d| d.bytes()),
        }
    }

    fn ratio(&self) -> f64 {
        self.footprint.total() as f64 / self.fp16_bytes.max(1) as f64
    }

    /// The positions from which the cache and its dictionaries take less than FP16, at the cache's share so far.
    fn pays_from(&self) -> Option<usize> {
        let saved = self.fp16_bytes.checked_sub(self.footprint.total())?;
        let positions = (self.dictionary_bytes * self.positions).checked_div(saved)?;
        (self.dictionary_bytes > 0).then_some(positions + 1)
    }

    fn line(&self) -> String {
        let generated = &self.answer.generated;
        let prefill = self.answer.new_tokens as f64 / generated.prefill.as_secs_f64().max(1e-9);
        let decode = generated.decode_tokens_per_second();
        let decode = decode.map_or("-".to_owned(), |rate| format!("{rate:.0}"));
        let dictionaries = match self.dictionary_bytes {
            0 => String::new(),
            held => {
                let pays = self.pays_from().map_or(String::new(), |positions| {
                    format!(", less than FP16 together from {positions} positions on")
                });
                format!(", beside {} of dictionaries{pays}", ui::bytes(held))
            }
        };
        let capacity = self.session.cache().capacity();
        let memory_full = capacity.is_some_and(|capacity| capacity <= self.positions);
        let cut = match generated.finish {
            Finish::MaxTokens => "; stopped at --max-tokens",
            Finish::ContextFull if memory_full => "; the cache's memory is full",
            Finish::ContextFull => "; the context is full",
            Finish::Interrupted => "; interrupted",
            Finish::End | Finish::Stop => "",
        };
        let dense = self.session.cache().dense();
        let dense = dense.map_or(String::new(), |dense| format!(", {dense} of them dense"));
        format!(
            "[{}: {} for {} positions{dense}, {} of FP16{dictionaries}; prefill {prefill:.0} tokens/s, \
             decode {decode} tokens/s{cut}]",
            self.session.spec(),
            ui::bytes(self.footprint.total()),
            self.positions,
            ui::percent(self.ratio()),
        )
    }

    fn json(&self) -> Value {
        let (spec, generated) = (self.session.spec(), &self.answer.generated);
        let parts = self.footprint.parts.iter();
        let parts = parts.map(|&(name, bytes)| (name.to_owned(), bytes.into()));
        json!({
            "text": generated.text,
            "finish": generated.finish,
            "prompt_tokens": self.answer.new_tokens,
            "generated_tokens": generated.tokens.len(),
            "cache": {
                "method": spec.method().name,
                "spec": spec.to_string(),
                "positions": self.positions,
                "dense_positions": self.session.cache().dense(),
                "bytes": self.footprint.total(),
                "parts": parts.collect::<Map<String, Value>>(),
                "fp16_bytes": self.fp16_bytes,
                "ratio": self.ratio(),
                "dictionary_bytes": self.dictionary_bytes,
                "pays_from_positions": self.pays_from(),
            },
            "prefill_seconds": generated.prefill.as_secs_f64(),
            "decode_tokens_per_second": generated.decode_tokens_per_second(),
        })
    }
}
