use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use lexico::shown::shown_path;
use lexico_llm::cache::CacheSpec;
use lexico_serve::{Options, Server, signalled};
use tracing::Level;

use crate::learn::LearnArguments;
use crate::memory::size;
use crate::model::ModelArguments;

/// Variable that holds the key, which a command line would show to other users.
const KEY: &str = "LEXICO_API_KEY";

#[derive(Args)]
pub(crate) struct Serve {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    learn: LearnArguments,
    /// The cache method and its options (below)
    #[arg(long, default_value = "lexico", value_name = "NAME[:key=value,...]")]
    cache: CacheSpec,
    /// Memory that the caches of all texts, and the prefixes kept, may take together
    #[arg(long, default_value = "2GiB", value_name = "SIZE", value_parser = size)]
    kv_memory: usize,
    /// Address to listen on; 0.0.0.0 takes connections of other machines too
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    host: String,
    /// Port to listen on (0: any that is free)
    #[arg(long, default_value_t = 8080, value_name = "PORT")]
    port: u16,
    /// Key that requests must bear [default: that of LEXICO_API_KEY, else none]
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Name that clients call the model by [default: its own]
    #[arg(short, long, visible_alias = "served-model-name", value_name = "NAME")]
    alias: Option<String>,
    /// Max number of texts that are read or written at once; others wait
    #[arg(
        long,
        visible_alias = "max-num-seqs",
        default_value_t = 32,
        value_name = "N"
    )]
    #[arg(value_parser = positive)]
    parallel: usize,
    /// Max number of positions of prompt and answer together (0: the model's context)
    #[arg(
        short,
        long,
        visible_alias = "max-model-len",
        default_value_t = 0,
        value_name = "N"
    )]
    ctx_size: usize,
    /// Max number of tokens of a chat's answer where the request names none
    #[arg(short, long, default_value_t = 2048, value_name = "N", value_parser = positive)]
    n_predict: usize,
    /// Tokens of a prompt that are read in one step, between the others' tokens; prefixes end where such steps do
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = positive)]
    ubatch_size: usize,
    /// Jinja template of chats, a file, in place of the model's own
    #[arg(long, visible_alias = "chat-template-file", value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Where prefixes of prompts are kept, compressed, for later starts and other servers: a folder, or s3://BUCKET/FOLDER
    #[arg(long, value_name = "FOLDER|s3://BUCKET")]
    prefix_store: Option<String>,
    /// Size of the prefix store, beyond which the oldest are removed
    #[arg(long, default_value = "16GiB", value_name = "SIZE", value_parser = size)]
    prefix_store_size: usize,
    /// Publish events of kept prefixes for routers, in vLLM's format over ZMQ, at tcp://HOST:PORT
    #[arg(long, value_name = "ENDPOINT")]
    kv_events: Option<String>,
    /// Origins whose web pages may ask, with commas between; * for all
    #[arg(
        long,
        default_value = "*",
        value_delimiter = ',',
        value_name = "ORIGIN"
    )]
    allowed_origins: Vec<String>,
    /// Max size of a request's body
    #[arg(long, default_value = "16MiB", value_name = "SIZE", value_parser = size)]
    max_body: usize,
    /// Max number of texts that wait; more are answered by 429
    #[arg(long, default_value_t = 1024, value_name = "N")]
    max_waiting: usize,
    /// Seconds that a text waits for memory or a place before it is answered by 429
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    queue_timeout: u64,
    /// Seconds that texts at hand are given to end after SIGTERM or Ctrl-C; a second signal ends them at once
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    drain_timeout: u64,
    /// Form of the log on stderr
    #[arg(long, default_value = "text", value_name = "FORM")]
    log_format: LogFormat,
    /// Least of what the log tells
    #[arg(long, default_value = "info", value_name = "error|warn|info|debug")]
    log_level: Level,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    /// Lines for people
    Text,
    /// A JSON document a line
    Json,
}

impl Serve {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let log = tracing_subscriber::fmt()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .with_max_level(self.log_level);
        match self.log_format {
            LogFormat::Text => log.init(),
            LogFormat::Json => log.json().flatten_event(true).init(),
        }
        let chat_template = match &self.chat_template {
            Some(path) => {
                let read = std::fs::read_to_string(path);
                Some(read.with_context(|| shown_path(path))?)
            }
            None => None,
        };
        let of_environment = || std::env::var(KEY).ok().filter(|key| !key.is_empty());
        let spec = self.cache.clone();
        let server = Server::bind(Options {
            address: (self.host, self.port),
            model_name: self.alias,
            cache: self.cache,
            kv_memory: self.kv_memory,
            parallel: self.parallel,
            queue: self.max_waiting,
            queue_timeout: Duration::from_secs(self.queue_timeout),
            context: match self.ctx_size {
                0 => usize::MAX,
                size => size,
            },
            chunk: self.ubatch_size,
            max_tokens: self.n_predict,
            api_key: self.api_key.or_else(of_environment),
            chat_template,
            prefix_store: self.prefix_store,
            prefix_store_bytes: self.prefix_store_size as u64,
            kv_events: self.kv_events,
            allowed_origins: self.allowed_origins,
            body_bytes: self.max_body,
            drain: Duration::from_secs(self.drain_timeout),
        })?;
        let (model, learn) = (self.model, self.learn);
        let load = move || {
            model.load_or(std::slice::from_ref(&spec), &mut |model, out| {
                learn.learn(model, out)
            })
        };
        Ok(server.run(load, signalled)?)
    }
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => Err("it must be a whole number from 1 on".to_owned()),
    }
}
