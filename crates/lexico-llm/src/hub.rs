//! Models by their hub name, `org/name`, `org/name@revision` or `org/name[@revision]/file.gguf`, through
//! the hub's own cache.
//!
//! `HF_HOME` says where that cache is, `HF_TOKEN` who asks, `HF_ENDPOINT` which hub, and
//! `HF_HUB_OFFLINE=1` keeps off the network. What is in the cache is used without asking.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::gguf::part_paths;
use crate::weights::{INDEX, SINGLE, shard_names};

/// Files that every model must have.
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
/// Files that a model may have.
const OPTIONAL: [&str; 3] = [
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];
const ENDPOINT: &str = "https://huggingface.co";

/// A model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// `org/name`
    pub repository: String,
    /// A branch, tag or commit.
    pub revision: String,
    /// A GGUF file of the repository, in folders of it perhaps.
    pub file: Option<String>,
}

impl FromStr for HubName {
    type Err = ();

    /// Takes `org/name`, `org/name@revision`, and either with `/file.gguf`; anything else is no hub
    /// name.
    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let plain = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
        };
        // A revision may have slashes of its own, as `refs/pr/1`.
        let (named, at) = match text.split_once('@') {
            Some((named, at)) => (named, Some(at)),
            None => (text, None),
        };
        let (org, rest) = named.split_once('/').ok_or(())?;
        let (name, revision, file) = match at {
            None => {
                let (name, file) = split_first(rest, 1);
                (name, "main", file)
            }
            Some(at) if at.ends_with(".gguf") => {
                let (revision, file) = split_first(at, if at.starts_with("refs/") { 3 } else { 1 });
                (rest, revision, file)
            }
            Some(revision) => (rest, revision, None),
        };
        let gguf = |file: &str| file.ends_with(".gguf") && file.split('/').all(plain);
        let named = plain(org) && plain(name) && revision.split('/').all(plain);
        if !named || !file.is_none_or(gguf) {
            return Err(());
        }
        Ok(Self {
            repository: format!("{org}/{name}"),
            revision: revision.to_owned(),
            file: file.map(str::to_owned),
        })
    }
}

/// The first `count` parts between slashes, and the rest where there is one.
fn split_first(text: &str, count: usize) -> (&str, Option<&str>) {
    match text.match_indices('/').nth(count - 1) {
        Some((at, _)) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    }
}

impl HubName {
    /// The folder of the model's files, or its GGUF file, which are downloaded where the cache lacks
    /// them; a download that broke off is taken up again. With `progress`, bars are drawn on stderr.
    ///
    /// # Errors
    /// [`Error::Hub`], which tells apart a model that is not there, one whose licence must be
    /// accepted, a hub out of reach, and being offline.
    pub fn fetch(&self, progress: bool) -> Result<PathBuf> {
        let mut hub = Hub::new(self, progress)?;
        let forbidden = std::mem::replace(&mut hub.offline, true);
        // Weights come last: where the cache has them, it has all that the hub had to give.
        if let Ok(path) = hub.gather() {
            return Ok(path);
        }
        hub.offline = forbidden;
        hub.gather()
    }
}

/// The hub, for one model.
struct Hub<'a> {
    name: &'a HubName,
    cache: hf_hub::CacheRepo,
    remote: ApiRepo,
    endpoint: String,
    token: Option<String>,
    /// Whether to look in the cache only.
    offline: bool,
}

impl<'a> Hub<'a> {
    fn new(name: &'a HubName, progress: bool) -> Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let cache = Cache::from_env();
        let token = variable("HF_TOKEN").or_else(|| cache.token());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let repository = Repo::with_revision(
            name.repository.clone(),
            RepoType::Model,
            name.revision.clone(),
        );
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(endpoint.clone())
            .with_token(token.clone())
            .with_progress(progress)
            .with_retries(2)
            .build();
        let api = api.map_err(|e| name.error(e.to_string()))?;
        Ok(Self {
            name,
            cache: cache.repo(repository.clone()),
            remote: api.repo(repository),
            endpoint,
            token,
            offline: variable("HF_HUB_OFFLINE").is_some_and(|v| {
                let yes = ["1", "on", "yes", "true"];
                yes.contains(&v.to_ascii_lowercase().as_str())
            }),
        })
    }

    /// The folder of the model's files, or its GGUF file, once all of it is there.
    fn gather(&self) -> Result<PathBuf> {
        if let Some(file) = &self.name.file {
            let path = self.file(file)?;
            for part in part_paths(Path::new(file)).unwrap_or_default() {
                self.file(&part.to_string_lossy())?;
            }
            return Ok(path);
        }
        let config = self.file(REQUIRED[0])?;
        for file in &REQUIRED[1..] {
            self.file(file)?;
        }
        for file in OPTIONAL {
            self.optional(file)?;
        }
        match self.optional(INDEX)? {
            Some(index) => {
                for shard in shard_names(&index)? {
                    self.file(&shard)?;
                }
            }
            None => {
                self.file(SINGLE)?;
            }
        }
        Ok(config.parent().map(PathBuf::from).unwrap_or_default())
    }

    fn file(&self, file: &str) -> Result<PathBuf> {
        self.optional(file)?.ok_or_else(|| {
            let reason = if self.offline {
                format!("{file} is not in the cache, and HF_HUB_OFFLINE forbids to download it")
            } else {
                let gguf = self.gguf_files();
                if self.name.file.is_some() || gguf.is_empty() {
                    format!("it has no {file}{}", listed(&gguf))
                } else {
                    format!(
                        "it has no {file}: its weights are GGUF files, name one of them as \
                         {}/FILE.gguf{}",
                        self.name.repository,
                        listed(&gguf)
                    )
                }
            };
            self.name.error(reason)
        })
    }

    /// A file of the model, `None` where the model has none of that name.
    fn optional(&self, file: &str) -> Result<Option<PathBuf>> {
        if let Some(path) = self.cache.get(file) {
            return Ok(Some(path));
        }
        if self.offline {
            return Ok(None);
        }
        match self.remote.download(file) {
            Ok(path) => Ok(Some(path)),
            Err(error) => match status(&error) {
                Some(404) if self.info_at_revision().is_some() => Ok(None),
                Some(401 | 403 | 404) => Err(self.name.error(self.why_refused())),
                Some(code) => Err(self
                    .name
                    .error(format!("the hub answered {code} for {file}"))),
                None => Err(self.name.error(format!(
                    "{file} could not be downloaded from {}: {error}. With no network only cached \
                     models and folders can be used",
                    self.endpoint
                ))),
            },
        }
    }

    /// The GGUF files of the repository, as far as the hub says.
    fn gguf_files(&self) -> Vec<String> {
        let info = self.info_at_revision();
        let files = info.map(|info| info.siblings).unwrap_or_default();
        let names = files.into_iter().map(|file| file.rfilename);
        names.filter(|name| name.ends_with(".gguf")).collect()
    }

    fn why_refused(&self) -> String {
        let token = match self.token {
            Some(_) => "the account of your token",
            None => "an account, and set HF_TOKEN to a token of it",
        };
        match self.info("") {
            Some(info) if info.is_gated() => format!(
                "it is gated: accept its licence at {}/{} with {token}",
                self.endpoint, self.name.repository
            ),
            Some(_) => format!("it has no revision {:?}", self.name.revision),
            None => {
                "there is no such model, or it is private and HF_TOKEN is not a token that may \
                     read it"
                    .to_owned()
            }
        }
    }

    fn info_at_revision(&self) -> Option<Info> {
        let revision = self.name.revision.replace('/', "%2F");
        self.info(&format!("/revision/{revision}"))
    }

    /// What the hub says of the model, gated or not; `None` where it says nothing. `at` is empty, or
    /// names a revision.
    fn info(&self, at: &str) -> Option<Info> {
        let url = format!("{}/api/models/{}{at}", self.endpoint, self.name.repository);
        let mut request = ureq::get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let text = request.call().ok()?.body_mut().read_to_string().ok()?;
        serde_json::from_str(&text).ok()
    }
}

/// A model's page, as far as it is of interest.
#[derive(Deserialize)]
struct Info {
    /// `false`, or how access is granted.
    #[serde(default)]
    gated: serde_json::Value,
    /// Its files.
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The end of a message that names files there are.
fn listed(files: &[String]) -> String {
    const MOST: usize = 12;
    match files {
        [] => String::new(),
        _ if files.len() > MOST => format!("; there are {} and more", files[..MOST].join(", ")),
        _ => format!("; there are {}", files.join(", ")),
    }
}

impl Info {
    fn is_gated(&self) -> bool {
        !matches!(
            self.gated,
            serde_json::Value::Bool(false) | serde_json::Value::Null
        )
    }
}

impl HubName {
    fn error(&self, reason: String) -> Error {
        Error::Hub {
            name: match &self.file {
                Some(file) => format!("{}@{}/{file}", self.repository, self.revision),
                None => format!("{}@{}", self.repository, self.revision),
            },
            reason,
        }
    }
}

/// The status with which the hub refused a request, where it came to that.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match error.as_ref() {
            ureq::Error::StatusCode(code) => Some(*code),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        let name = |text: &str| {
            let name = text.parse::<HubName>();
            name.map(|n| (n.repository, n.revision, n.file))
        };
        let named = |a: &str, b: &str, c: Option<&str>| {
            Ok((a.to_owned(), b.to_owned(), c.map(str::to_owned)))
        };
        assert_eq!(
            name("org/model-1.5_b"),
            named("org/model-1.5_b", "main", None)
        );
        assert_eq!(name("org/model@v2"), named("org/model", "v2", None));
        assert_eq!(
            name("org/model/m-q8_0.gguf"),
            named("org/model", "main", Some("m-q8_0.gguf"))
        );
        assert_eq!(
            name("org/model@v2/Q8/m.gguf"),
            named("org/model", "v2", Some("Q8/m.gguf"))
        );
        assert_eq!(
            name("org/model@refs/pr/1"),
            named("org/model", "refs/pr/1", None)
        );
        assert_eq!(
            name("org/model@refs/pr/1/a/m.gguf"),
            named("org/model", "refs/pr/1", Some("a/m.gguf"))
        );
        for text in [
            "model",
            "org/model@m.gguf/",
            "org/a/b@main",
            "/org/model",
            "./model",
            "../model",
            "a/b/c",
            "a/b/c.safetensors",
            "a/b/../c.gguf",
            "a/b//c.gguf",
            "org/",
            "org/m@",
            "o rg/m",
        ] {
            assert_eq!(name(text), Err(()), "{text}");
        }
    }
}
