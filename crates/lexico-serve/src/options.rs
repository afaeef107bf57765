use std::time::Duration;

use lexico_llm::cache::CacheSpec;

use crate::{Error, Result};

/// Settings of a [`Server`](crate::Server), and of a [`Worker`](crate::Worker), which has no use for those of HTTP.
#[derive(Debug, Clone)]
pub struct Options {
    /// Address to listen on: a host, and a port, 0 for any that is free.
    pub address: (String, u16),
    /// The name that clients call the model by; its own by default.
    pub model_name: Option<String>,
    /// The cache of every text.
    pub cache: CacheSpec,
    /// Bytes that all caches, and the prefixes kept in memory, may take together, with what the allocator leaves between them:
    /// a twenty-fifth is set aside for that.
    pub kv_memory: usize,
    /// Max number of texts that are read or written at once.
    pub parallel: usize,
    /// Max number of texts that wait; more are turned away.
    pub queue: usize,
    /// Time that a text waits for its turn at the most.
    pub queue_timeout: Duration,
    /// Max number of tokens of a text, its prompt included; the model's own context is a limit too.
    pub context: usize,
    /// Tokens of a prompt that are read in one step. What a prompt's reading gives depends on it a little, so that
    /// prefixes are kept apart by it.
    pub chunk: usize,
    /// Max number of tokens of an answer where a request names none.
    pub max_tokens: usize,
    /// The key that requests must bear.
    pub api_key: Option<String>,
    /// A chat template, in Jinja, in place of the model's own.
    pub chat_template: Option<String>,
    /// Where prefixes are kept: a folder, or `s3://BUCKET/FOLDER`.
    pub prefix_store: Option<String>,
    /// Bytes that the prefix store may take.
    pub prefix_store_bytes: u64,
    /// The endpoint at which events of the kept prefixes are published over ZMQ, `tcp://127.0.0.1:5557` say; port 0 takes any that is
    /// free.
    pub kv_events: Option<String>,
    /// Origins whose pages may ask; `*` for all.
    pub allowed_origins: Vec<String>,
    /// Max bytes of a request's body.
    pub body_bytes: usize,
    /// Time that texts at hand are given to end once the server is to stop.
    pub drain: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: ("127.0.0.1".to_owned(), 8080),
            model_name: None,
            cache: CacheSpec::default(),
            kv_memory: 2 << 30,
            parallel: 32,
            queue: 1024,
            queue_timeout: Duration::from_secs(60),
            context: usize::MAX,
            chunk: 256,
            max_tokens: 2048,
            api_key: None,
            chat_template: None,
            prefix_store: None,
            prefix_store_bytes: 16 << 30,
            kv_events: None,
            allowed_origins: vec!["*".to_owned()],
            body_bytes: 16 << 20,
            drain: Duration::from_secs(30),
        }
    }
}

impl Options {
    /// Refuses numbers that cannot be.
    pub(crate) fn check(&self) -> Result<()> {
        let positive = [
            ("--parallel", self.parallel),
            ("--ubatch-size", self.chunk),
            ("--kv-memory", self.kv_memory),
            ("--ctx-size", self.context),
            ("--n-predict", self.max_tokens),
        ];
        for (setting, value) in positive {
            if value == 0 {
                let reason = "it must be at least 1".to_owned();
                return Err(Error::Setting { setting, reason });
            }
        }
        Ok(())
    }

    /// Bytes that caches and kept prefixes may hold, by their own count.
    pub(crate) fn cache_bytes(&self) -> usize {
        self.kv_memory - self.kv_memory / 25
    }
}
