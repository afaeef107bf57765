//! Figures for Prometheus: those of Lexico, and those of vLLM that routers and benchmarks read.

use std::sync::Arc;
use std::time::Duration;

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use crate::{Error, Options, Result};

/// The figures of one server.
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    prompt_tokens: [IntCounter; 2],
    generated_tokens: [IntCounter; 2],
    cached_tokens: IntCounter,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    prefixes: IntGauge,
    store_up: IntGauge,
    store_errors: IntCounterVec,
    sequences: IntGaugeVec,
    running: IntGauge,
    waiting: IntGauge,
    budget: IntGauge,
    reserved: IntGauge,
    held: IntGauge,
    fp16: IntGauge,
    usage: Gauge,
    first_token: Histogram,
    next_token: Histogram,
    request_seconds: Histogram,
}

/// Upper bounds of times, in seconds.
const SECONDS: [f64; 16] = [
    0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0,
];

impl Metrics {
    /// Figures of what has these settings.
    pub(crate) fn of(options: &Options) -> Result<Arc<Self>> {
        let metrics = Self::new(options.cache_bytes());
        let metrics = metrics.map_err(|error| Error::System(std::io::Error::other(error)))?;
        Ok(Arc::new(metrics))
    }

    /// Figures that are all 0.
    ///
    /// # Errors
    /// None in a sound build: names are constants.
    fn new(budget: usize) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let metrics = Self {
            requests: register(
                &registry,
                IntCounterVec::new(
                    Opts::new("lexico_requests_total", "Requests by route and status"),
                    &["route", "status"],
                )?,
            )?,
            prompt_tokens: [
                counter(&registry, "lexico_prompt_tokens_total", "Tokens of prompts")?,
                counter(&registry, "vllm:prompt_tokens_total", "Tokens of prompts")?,
            ],
            generated_tokens: [
                counter(&registry, "lexico_generated_tokens_total", "Tokens written")?,
                counter(&registry, "vllm:generation_tokens_total", "Tokens written")?,
            ],
            cached_tokens: counter(
                &registry,
                "lexico_cached_prompt_tokens_total",
                "Tokens of prompts that were not read anew",
            )?,
            prefix_queries: counter(
                &registry,
                "lexico_prefix_queries_total",
                "Prompts that were looked for among the prefixes kept",
            )?,
            prefix_hits: counter(
                &registry,
                "lexico_prefix_hits_total",
                "Prompts of which a prefix was kept",
            )?,
            prefixes: gauge(&registry, "lexico_prefixes", "Prefixes kept in memory")?,
            store_up: gauge(
                &registry,
                "lexico_prefix_store_up",
                "1 while the prefix store does what it is asked, 0 while it does not, or there is none",
            )?,
            store_errors: register(
                &registry,
                IntCounterVec::new(
                    Opts::new(
                        "lexico_prefix_store_errors_total",
                        "What the prefix store did not do, or not in time",
                    ),
                    &["operation"],
                )?,
            )?,
            sequences: register(
                &registry,
                IntGaugeVec::new(
                    Opts::new("lexico_sequences", "Texts by what is done with them"),
                    &["state"],
                )?,
            )?,
            running: gauge(
                &registry,
                "vllm:num_requests_running",
                "Texts that are read or written",
            )?,
            waiting: gauge(&registry, "vllm:num_requests_waiting", "Texts that wait")?,
            budget: gauge(
                &registry,
                "lexico_kv_budget_bytes",
                "Bytes that caches may take (24 of 25 parts of --kv-memory)",
            )?,
            reserved: gauge(
                &registry,
                "lexico_kv_reserved_bytes",
                "Bytes that running texts will take at their ends, and that prefixes take",
            )?,
            held: gauge(
                &registry,
                "lexico_kv_bytes",
                "Bytes that the caches of running texts take now",
            )?,
            fp16: gauge(
                &registry,
                "lexico_kv_fp16_bytes",
                "Bytes that the same positions would take in FP16",
            )?,
            usage: register(
                &registry,
                Gauge::new(
                    "vllm:kv_cache_usage_perc",
                    "Share of the caches' memory that is reserved, from 0 to 1",
                )?,
            )?,
            first_token: histogram(
                &registry,
                "lexico_time_to_first_token_seconds",
                "Time from a request to its first token",
            )?,
            next_token: histogram(
                &registry,
                "lexico_time_between_tokens_seconds",
                "Time from a token to the next",
            )?,
            request_seconds: histogram(
                &registry,
                "lexico_request_seconds",
                "Time from a request to the end of its answer's beginning",
            )?,
            registry,
        };
        metrics.budget.set(whole(budget));
        metrics.sequences(0, 0, 0);
        Ok(metrics)
    }

    /// All figures in Prometheus' text format.
    pub(crate) fn text(&self) -> std::result::Result<String, String> {
        let mut text = Vec::new();
        let encoded = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        encoded.map_err(|error| error.to_string())?;
        String::from_utf8(text).map_err(|error| error.to_string())
    }

    pub(crate) fn request(&self, route: &str, status: u16, time: Duration) {
        let labels = [route, &status.to_string()];
        self.requests.with_label_values(&labels).inc();
        self.request_seconds.observe(time.as_secs_f64());
    }

    pub(crate) fn prompt_tokens(&self, count: usize, cached: usize) {
        self.prompt_tokens
            .iter()
            .for_each(|c| c.inc_by(count as u64));
        self.cached_tokens.inc_by(cached as u64);
    }

    pub(crate) fn generated_token(&self) {
        self.generated_tokens.iter().for_each(IntCounter::inc);
    }

    pub(crate) fn prefix(&self, hit: bool) {
        self.prefix_queries.inc();
        self.prefix_hits.inc_by(u64::from(hit));
    }

    /// Prompts that were looked for among the prefixes kept, and those that were found.
    pub(crate) fn prefixes_found(&self) -> (u64, u64) {
        (self.prefix_queries.get(), self.prefix_hits.get())
    }

    pub(crate) fn store_up(&self, up: bool) {
        self.store_up.set(i64::from(up));
    }

    pub(crate) fn store_error(&self, operation: &str) {
        self.store_errors.with_label_values(&[operation]).inc();
    }

    pub(crate) fn first_token(&self, time: Duration) {
        self.first_token.observe(time.as_secs_f64());
    }

    pub(crate) fn next_token(&self, time: Duration) {
        self.next_token.observe(time.as_secs_f64());
    }

    pub(crate) fn sequences(&self, waiting: usize, reading: usize, writing: usize) {
        let states = [
            ("waiting", waiting),
            ("reading", reading),
            ("writing", writing),
        ];
        for (state, count) in states {
            self.sequences.with_label_values(&[state]).set(whole(count));
        }
        self.waiting.set(whole(waiting));
        self.running.set(whole(reading + writing));
    }

    pub(crate) fn reserved(&self, bytes: usize) {
        self.reserved.set(whole(bytes));
        self.usage
            .set(bytes as f64 / self.budget.get().max(1) as f64);
    }

    pub(crate) fn caches(&self, bytes: usize, fp16_bytes: usize, prefixes: usize) {
        self.held.set(whole(bytes));
        self.fp16.set(whole(fp16_bytes));
        self.prefixes.set(whole(prefixes));
    }
}

fn whole(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn register<C>(registry: &Registry, collector: C) -> prometheus::Result<C>
where
    C: prometheus::core::Collector + Clone + 'static,
{
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    register(registry, IntCounter::new(name, help)?)
}

fn gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntGauge> {
    register(registry, IntGauge::new(name, help)?)
}

fn histogram(registry: &Registry, name: &str, help: &str) -> prometheus::Result<Histogram> {
    let options = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
    register(registry, Histogram::with_opts(options)?)
}
