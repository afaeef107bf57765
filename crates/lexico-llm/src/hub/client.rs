//! Requests to the hub: bounded in time, tried again where that may help, and downloads that go on where they broke off.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use lexico::shown::shown;
use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, Uri, header::HeaderMap};
use ureq::{Agent, Body};

use super::settings::Settings;

/// Times that a request is tried again, and a download that brings nothing new.
const AGAIN: u32 = 4;
/// Longest wait that a hub may ask for; one that asks for more is not waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Statuses that may be gone the next time.
const PASSING: [u16; 6] = [408, 429, 500, 502, 503, 504];
const REDIRECTS: usize = 10;

/// What the hub says of a file, before any of it is read.
#[derive(Debug)]
pub(super) struct Metadata {
    pub(super) commit: String,
    /// Name of its content.
    pub(super) etag: String,
    pub(super) size: Option<u64>,
    /// The content's SHA-256, where the hub knows it.
    sha256: Option<String>,
}

/// Reason why the hub gave no answer.
#[derive(Debug)]
pub(super) enum Refusal {
    /// A status that is an error.
    Status {
        code: u16,
        /// The hub's own name of the error.
        name: Option<String>,
        /// The commit that was looked in.
        commit: Option<String>,
        /// How long it asks to wait.
        wait: Option<Duration>,
    },
    /// No answer, or none that makes sense.
    Unreachable(String),
    /// The cache's folder cannot be written.
    Cache(String),
}

/// Asks a hub.
pub(super) struct Client {
    /// Follows no redirect.
    asking: Agent,
    /// Follows redirects, and takes the token only to the same host.
    loading: Agent,
    endpoint: String,
    token: Option<String>,
    bars: bool,
}

impl Client {
    pub(super) fn new(settings: &Settings, progress: bool) -> Self {
        let agent = |redirects: u32, wait: Duration| {
            let config = Agent::config_builder()
                .http_status_as_error(false)
                .max_redirects(redirects)
                .max_redirects_will_error(redirects > 0)
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .timeout_resolve(Some(wait))
                .timeout_connect(Some(wait))
                .timeout_send_request(Some(wait))
                .timeout_recv_response(Some(wait))
                .timeout_per_read(Some(wait))
                .user_agent(concat!("lexico/", env!("CARGO_PKG_VERSION")));
            config.build().new_agent()
        };
        Self {
            asking: agent(0, settings.answer),
            loading: agent(REDIRECTS as u32, settings.more),
            endpoint: settings.endpoint.clone(),
            token: settings.token.clone(),
            bars: progress && settings.bars,
        }
    }

    /// A page of the hub's interface, as text.
    pub(super) fn page(&self, page: &str) -> Result<String, Refusal> {
        /// Bytes of an answer: some data sets have a hundred thousand files.
        const MAX: u64 = 1 << 27;
        let url = format!("{}/api/{page}", self.endpoint);
        let mut answer = self.get(&self.loading, &url, None, true)?;
        let text = answer.body_mut().with_config().limit(MAX).read_to_string();
        text.map_err(|e| Refusal::Unreachable(shown(e)))
    }

    /// Asks about the file at `path`, `org/name/resolve/main/file`.
    pub(super) fn metadata(&self, path: &str) -> Result<Metadata, Refusal> {
        let mut url = format!("{}/{path}", self.endpoint);
        let (mut commit, mut etag, mut sha256, mut size) = (None, None, None, None);
        for _ in 0..REDIRECTS {
            let own = same_host(&url, &self.endpoint);
            let answer = self.get(&self.asking, &url, Some("bytes=0-0"), own)?;
            let headers = answer.headers();
            // The hub's own words come first; a redirect leads to a store that knows less.
            let linked = text(headers, "x-linked-etag").map(plain_etag);
            let found = linked
                .clone()
                .or_else(|| text(headers, "etag").map(plain_etag));
            sha256 = sha256.or(linked.filter(|etag| is_sha256(etag)));
            commit = commit.or_else(|| text(headers, "x-repo-commit").map(str::to_owned));
            etag = etag.or(found.filter(|etag| !etag.is_empty()));
            let linked_size = text(headers, "x-linked-size").and_then(|size| size.parse().ok());
            size = size.or(linked_size);
            if answer.status().is_redirection() {
                if commit.is_some() && etag.is_some() && size.is_some() {
                    break;
                }
                let place = text(headers, "location").and_then(|place| joined(&url, place));
                let nowhere = || Refusal::Unreachable("it redirects to nowhere".to_owned());
                url = place.ok_or_else(nowhere)?;
                continue;
            }
            size = size.or_else(|| whole_size(&answer));
            break;
        }
        let lacks = |what: &str| {
            Refusal::Unreachable(format!(
                "its answer has no {what}, as a hub's has: is it one?"
            ))
        };
        Ok(Metadata {
            commit: commit.ok_or_else(|| lacks("X-Repo-Commit"))?,
            etag: etag.ok_or_else(|| lacks("ETag"))?,
            size,
            sha256,
        })
    }

    /// Downloads the file at `path` to `part`, going on where `part` ends. What is there at the end has the size, and
    /// the checksum, that the hub promised.
    pub(super) fn download(
        &self,
        path: &str,
        metadata: &Metadata,
        part: &Path,
    ) -> Result<(), Refusal> {
        let url = format!("{}/{path}", self.endpoint);
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(part);
        let mut file = file.map_err(unwritable)?;
        let bar = self.bar(path, metadata.size);
        let begun = length(&file)?;
        let mut loaded = self.load(&url, metadata, &mut file, &bar);
        if loaded.is_ok() && begun > 0 && !is_sound(metadata, &mut file)? {
            // What was there was of another file, or had holes.
            file.set_len(0).map_err(unwritable)?;
            loaded = self.load(&url, metadata, &mut file, &bar);
        }
        bar.finish_and_clear();
        loaded?;
        if !is_sound(metadata, &mut file)? {
            file.set_len(0).map_err(unwritable)?;
            let reason = "what came is not what the hub promised, by its checksum";
            return Err(Refusal::Unreachable(reason.to_owned()));
        }
        file.sync_all().map_err(unwritable)
    }

    /// Reads until all is there, or nothing new comes.
    fn load(
        &self,
        url: &str,
        metadata: &Metadata,
        file: &mut File,
        bar: &ProgressBar,
    ) -> Result<(), Refusal> {
        let (mut most, mut tries) = (length(file)?, 0);
        loop {
            let part = length(file)?;
            if metadata.size.is_some_and(|size| part > size) {
                file.set_len(0).map_err(unwritable)?;
                continue;
            }
            if metadata.size == Some(part) {
                return Ok(());
            }
            let broken = match self.load_rest(url, metadata.size, file, bar) {
                Ok(())
                    if metadata
                        .size
                        .is_none_or(|size| length(file).is_ok_and(|l| l == size)) =>
                {
                    return Ok(());
                }
                Ok(()) => Refusal::Unreachable(format!(
                    "it ended after {} of {} bytes",
                    length(file)?,
                    metadata.size.unwrap_or(0)
                )),
                Err(broken @ Refusal::Unreachable(_)) => broken,
                Err(refused) => return Err(refused),
            };
            let part = length(file)?;
            tries = if part > most { 0 } else { tries + 1 };
            most = most.max(part);
            if tries > AGAIN {
                return Err(broken);
            }
            std::thread::sleep(wait(tries));
        }
    }

    /// Reads what follows the bytes that are there, up to `size` in all; all anew where the hub answers with all of it.
    fn load_rest(
        &self,
        url: &str,
        size: Option<u64>,
        file: &mut File,
        bar: &ProgressBar,
    ) -> Result<(), Refusal> {
        let part = length(file)?;
        let range = format!("bytes={part}-");
        let range = (part > 0).then_some(range.as_str());
        let mut answer = self.get(&self.loading, url, range, true)?;
        let start = match answer.status().as_u16() {
            206 => text(answer.headers(), "content-range").and_then(first_byte),
            _ => Some(0),
        };
        if start != Some(part) {
            file.set_len(0).map_err(unwritable)?;
        }
        if start != Some(part) && start != Some(0) {
            let reason = "it sends other bytes than those asked for".to_owned();
            return Err(Refusal::Unreachable(reason));
        }
        let mut body = answer.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 18];
        loop {
            bar.set_position(length(file)?);
            let read = body.read(&mut buffer);
            let read = read.map_err(|e| Refusal::Unreachable(shown(e)))?;
            if read == 0 {
                return Ok(());
            }
            file.write_all(&buffer[..read]).map_err(unwritable)?;
            // Whoever sends more than promised could fill the disk.
            if size.is_some_and(|size| length(file).is_ok_and(|length| length > size)) {
                file.set_len(0).map_err(unwritable)?;
                let reason = "it sends more bytes than it promised".to_owned();
                return Err(Refusal::Unreachable(reason));
            }
        }
    }

    /// Sends a request, again where the hub is busy; the answer is no error.
    fn get(
        &self,
        agent: &Agent,
        url: &str,
        range: Option<&str>,
        with_token: bool,
    ) -> Result<Response<Body>, Refusal> {
        let mut tries = 0;
        loop {
            let mut request = agent.get(url).header("Accept-Encoding", "identity");
            if let Some(token) = self.token.as_ref().filter(|_| with_token) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if let Some(range) = range {
                request = request.header("Range", range);
            }
            let answer = request.call();
            let answer = answer.map_err(|e| Refusal::Unreachable(shown(e)))?;
            let (code, headers) = (answer.status().as_u16(), answer.headers());
            // An empty file has no first byte.
            let empty = code == 416 && text(headers, "content-range") == Some("bytes */0");
            if code < 400 || empty {
                return Ok(answer);
            }
            let passing = PASSING.contains(&code);
            let asked = asked_wait(headers, code).filter(|_| passing);
            tries += 1;
            if !passing || tries > AGAIN || asked > Some(LONGEST_WAIT) {
                return Err(Refusal::Status {
                    code,
                    name: text(headers, "x-error-code").map(str::to_owned),
                    commit: text(headers, "x-repo-commit").map(str::to_owned),
                    wait: asked,
                });
            }
            std::thread::sleep(asked.unwrap_or_else(|| wait(tries)));
        }
    }

    fn bar(&self, path: &str, size: Option<u64>) -> ProgressBar {
        let bar = match (self.bars, size) {
            (false, _) => ProgressBar::hidden(),
            (true, Some(size)) => ProgressBar::new(size),
            (true, None) => ProgressBar::no_length(),
        };
        let template = "{msg} {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(shown(path.rsplit('/').next().unwrap_or(path)));
        bar
    }
}

/// Half a second, and twice as long each time.
fn wait(tries: u32) -> Duration {
    Duration::from_millis(250 << tries.min(AGAIN))
}

/// The wait that an answer asks for: `Retry-After`, or after too many requests the `t=` seconds of the hub's `RateLimit`,
/// which stands on every answer.
fn asked_wait(headers: &HeaderMap, code: u16) -> Option<Duration> {
    let after = text(headers, "retry-after").and_then(|after| after.trim().parse().ok());
    let limit = || {
        let mut parts = text(headers, "ratelimit")?.split(';');
        parts.find_map(|part| part.trim().strip_prefix("t=")?.parse().ok())
    };
    after
        .or_else(|| limit().filter(|_| code == 429))
        .map(Duration::from_secs)
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// An etag as the name of a file: without the mark of a weak one and its quotes.
fn plain_etag(etag: &str) -> String {
    let etag = etag.trim();
    let etag = etag.strip_prefix("W/").unwrap_or(etag);
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let plain = etag.chars().filter(|c| *c != '"');
    plain
        .map(|c| if allowed(c) { c } else { '_' })
        .take(128)
        .collect()
}

fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Size of the whole file of which an answer holds a part or all.
fn whole_size(answer: &Response<Body>) -> Option<u64> {
    let headers = answer.headers();
    match text(headers, "content-range") {
        Some(range) => range.rsplit_once('/')?.1.parse().ok(),
        None => text(headers, "content-length")?.parse().ok(),
    }
}

/// The first byte of `bytes 5-9/10`.
fn first_byte(range: &str) -> Option<u64> {
    let (first, _) = range.trim().strip_prefix("bytes ")?.split_once('-')?;
    first.trim().parse().ok()
}

/// Returns true where a token for one address may be sent to the other.
fn same_host(a: &str, b: &str) -> bool {
    let place = |url: &str| {
        let uri: Uri = url.parse().ok()?;
        Some((uri.scheme()?.clone(), uri.authority()?.clone()))
    };
    let (a, b) = (place(a), place(b));
    a.is_some() && a == b
}

/// The address that a redirect from `url` leads to.
fn joined(url: &str, place: &str) -> Option<String> {
    if place.contains("://") {
        return Some(place.to_owned());
    }
    let uri: Uri = url.parse().ok()?;
    let path = place.starts_with('/').then_some(place)?;
    Some(format!("{}://{}{path}", uri.scheme()?, uri.authority()?))
}

fn unwritable(error: std::io::Error) -> Refusal {
    Refusal::Cache(error.to_string())
}

fn length(file: &File) -> Result<u64, Refusal> {
    Ok(file.metadata().map_err(unwritable)?.len())
}

/// Returns true where the file is what the hub promised, as far as it did.
fn is_sound(metadata: &Metadata, file: &mut File) -> Result<bool, Refusal> {
    if metadata
        .size
        .is_some_and(|size| length(file).is_ok_and(|l| l != size))
    {
        return Ok(false);
    }
    let Some(promised) = &metadata.sha256 else {
        return Ok(true);
    };
    file.seek(SeekFrom::Start(0)).map_err(unwritable)?;
    let mut hasher = Sha256::new();
    std::io::copy(file, &mut hasher).map_err(unwritable)?;
    let sum = hasher.finalize();
    let sum: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(sum.eq_ignore_ascii_case(promised))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_they_are_written() {
        assert_eq!(plain_etag("W/\"ab-c\""), "ab-c");
        assert_eq!(plain_etag("\"../../x\""), "______x");
        assert_eq!(first_byte("bytes 5-9/10"), Some(5));
        assert_eq!(first_byte("bytes */10"), None);
        let headers = |name: &'static str, value: &'static str| {
            let pair = (name.parse().unwrap(), value.parse().unwrap());
            HeaderMap::from_iter([pair])
        };
        let seconds = |name, value| asked_wait(&headers(name, value), 429).map(|w| w.as_secs());
        assert_eq!(seconds("retry-after", "7"), Some(7));
        assert_eq!(seconds("ratelimit", "\"api\";r=0;t=55"), Some(55));
        assert_eq!(
            seconds("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT"),
            None
        );
    }

    #[test]
    fn a_token_goes_to_its_own_host_only() {
        assert!(same_host("https://a.b/x", "https://a.b"));
        for other in [
            "http://a.b",
            "https://a.b:1",
            "https://c.a.b",
            "https://a.b.c",
            "a.b",
        ] {
            assert!(!same_host(other, "https://a.b"), "{other}");
        }
        let from = "https://a.b/x/y";
        assert_eq!(joined(from, "/z?q").as_deref(), Some("https://a.b/z?q"));
        assert_eq!(joined(from, "http://c/d").as_deref(), Some("http://c/d"));
        assert_eq!(joined(from, "z"), None);
    }
}
