//! A server of the embedded model in this process, and a client of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic
#![allow(dead_code, reason = "each test uses some of it")]

use std::io::BufRead;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lexico_llm::Model;
use lexico_serve::{Options, Server};
use serde_json::{Value, json};
use tokio::sync::Notify;
use ureq::Agent;
use ureq::http::Response;

/// Time after which what should have come about will not.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Running {
    pub(crate) base: String,
    agent: Agent,
    stop: Arc<Notify>,
    thread: Option<JoinHandle<lexico_serve::Result<()>>>,
}

/// An answer: its status, its headers and its document.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: ureq::http::HeaderMap,
    pub(crate) document: Value,
}

/// Options under which the embedded model codes much of a short prompt, and reads it in several steps.
pub(crate) fn small() -> Options {
    Options {
        address: ("127.0.0.1".to_owned(), 0),
        cache: "lexico:window=16,batch=4".parse().unwrap(),
        kv_memory: 64 << 20,
        chunk: 32,
        ..Options::default()
    }
}

impl Running {
    pub(crate) fn start(options: Options) -> Self {
        let server = Server::bind(options).unwrap();
        let base = format!("http://{}", server.address());
        let stop = Arc::new(Notify::new());
        let stopped = Arc::clone(&stop);
        let run = move || {
            let stop = move || {
                let stopped = Arc::clone(&stopped);
                async move { stopped.notified().await }
            };
            server.run(Model::tiny, stop)
        };
        let agent = Agent::config_builder().http_status_as_error(false).build();
        let running = Self {
            base,
            agent: agent.into(),
            stop,
            thread: Some(std::thread::spawn(run)),
        };
        running.until("it is ready", || running.get("/health").status == 200);
        running
    }

    /// Waits until something has come about.
    pub(crate) fn until(&self, what: &str, mut happened: impl FnMut() -> bool) {
        let started = Instant::now();
        while !happened() {
            assert!(started.elapsed() < PATIENCE, "waited in vain until {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        read(
            self.agent
                .get(format!("{}{path}", self.base))
                .call()
                .unwrap(),
        )
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, &body.to_string())
    }

    pub(crate) fn post_text(&self, path: &str, body: &str) -> Answer {
        read(self.send(path, body, &[]))
    }

    pub(crate) fn post_with(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> Answer {
        read(self.send(path, &body.to_string(), headers))
    }

    pub(crate) fn send(
        &self,
        path: &str,
        body: &str,
        headers: &[(&str, &str)],
    ) -> Response<ureq::Body> {
        let mut request = self.agent.post(format!("{}{path}", self.base));
        request = request.header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send(body).unwrap()
    }

    /// A completion, which must be one.
    pub(crate) fn complete(&self, body: &Value) -> Value {
        let answer = self.post("/v1/completions", body);
        assert_eq!(answer.status, 200, "{}", answer.document);
        answer.document
    }

    /// A chat's answer, which must be one.
    pub(crate) fn chat(&self, body: &Value) -> Value {
        let answer = self.post("/v1/chat/completions", body);
        assert_eq!(answer.status, 200, "{}", answer.document);
        answer.document
    }

    /// The chunks of a stream, which must end as streams do.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let mut response = self.send(path, &body.to_string(), &[]);
        assert_eq!(response.status(), 200);
        let kind = response.headers()["content-type"]
            .to_str()
            .unwrap()
            .to_owned();
        assert!(kind.starts_with("text/event-stream"), "{kind}");
        let lines = std::io::BufReader::new(response.body_mut().as_reader()).lines();
        let data: Vec<String> = lines
            .map(Result::unwrap)
            .filter_map(|line| Some(line.strip_prefix("data: ")?.to_owned()))
            .collect();
        let (done, chunks) = data.split_last().unwrap();
        assert_eq!(done, "[DONE]");
        chunks
            .iter()
            .map(|chunk| serde_json::from_str(chunk).unwrap())
            .collect()
    }

    /// A figure of `/metrics`.
    pub(crate) fn figure(&self, name: &str) -> f64 {
        let text = self.get("/metrics").document;
        let text = text.as_str().unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no figure {name}"))
            .parse()
            .unwrap()
    }

    /// Asks it to stop.
    pub(crate) fn ask_to_stop(&self) {
        self.stop.notify_one();
    }

    /// Stops it and waits until it has.
    pub(crate) fn stop(mut self) {
        self.ask_to_stop();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }

    /// Waits until it has stopped.
    pub(crate) fn stopped(mut self) {
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.notify_one();
    }
}

fn read(mut response: Response<ureq::Body>) -> Answer {
    let text = response.body_mut().read_to_string().unwrap();
    Answer {
        status: response.status().as_u16(),
        headers: response.headers().clone(),
        document: serde_json::from_str(&text).unwrap_or(Value::String(text)),
    }
}

/// A word problem as the embedded model knows them.
pub(crate) fn problem(number: usize) -> String {
    let names = ["Ana", "Ben", "Eva", "Tom", "Mia", "Leo"];
    let things = ["coins", "apples", "books", "cards"];
    let (a, b) = (names[number % 6], names[(number + 1 + number / 6) % 6]);
    let thing = things[number % 4];
    let (x, y) = (3 + number % 17, 2 + number % 11);
    format!(
        "Question: {a} has {x} {thing}. {b} gives {a} {y} more. How many {thing} does {a} have now?\n"
    )
}

/// The text of the first choice.
pub(crate) fn text(document: &Value) -> &str {
    let choice = &document["choices"][0];
    let text = choice.get("text").unwrap_or(&choice["message"]["content"]);
    text.as_str().unwrap_or_default()
}
