//! Models by their hub name, `org/name`, `org/name@revision` or `org/name[@revision]/file.gguf`, and data
//! sets, `hf://datasets/org/name[@revision][/path]`, through the hub's own cache.
//!
//! `HF_HOME` says where that cache is, `HF_TOKEN` who asks, `HF_ENDPOINT` which hub, and
//! `HF_HUB_OFFLINE=1` keeps off the network. What is in the cache is used without asking.

use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use hf_hub::api::Siblings;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

use crate::error::{Error, Result, listed};
use crate::gguf::part_paths;
use crate::weights::{INDEX, SINGLE, shard_names};

/// Files that a model may have.
const OPTIONAL: [&str; 3] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];
/// Reason why a file cannot be had offline.
const NOT_CACHED: &str = "is not in the cache, and HF_HUB_OFFLINE forbids to download it";
/// Values of `HF_HUB_OFFLINE` that keep off the network.
const YES: [&str; 4] = ["1", "on", "yes", "true"];
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
        let gguf = |file: &str| file.ends_with(".gguf");
        let file = |file: &str| gguf(file) && file.split('/').all(plain);
        // A revision may have slashes of its own, as `refs/pr/1`.
        let parts = parts(text, gguf, file);
        let (repository, revision, file) = parts.ok_or(())?;
        Ok(Self {
            repository,
            revision,
            file,
        })
    }
}

/// The repository, the revision and the path of `org/name[@revision][/path]`; `None` where this is no such name. What
/// follows the `@` is a revision as a whole unless it `holds_path`.
fn parts(
    text: &str,
    holds_path: impl Fn(&str) -> bool,
    is_path: impl Fn(&str) -> bool,
) -> Option<(String, String, Option<String>)> {
    let (org, rest) = text.split_once('/')?;
    let (name, revision, path) = match rest.split_once('@') {
        Some((name, at)) if plain(name) && holds_path(at) => {
            let (revision, path) = split_first(at, if at.starts_with("refs/") { 3 } else { 1 });
            (name, revision, path)
        }
        Some((name, revision)) if plain(name) => (name, revision, None),
        _ => {
            let (name, path) = split_first(rest, 1);
            (name, "main", path)
        }
    };
    let named = plain(org) && plain(name) && revision.split('/').all(plain);
    (named && path.is_none_or(is_path)).then(|| {
        let repository = format!("{org}/{name}");
        (repository, revision.to_owned(), path.map(str::to_owned))
    })
}

/// Returns true where a part of a name between slashes is as the hub has them.
fn plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
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
        let (repository, revision) = (&self.repository, &self.revision);
        let shown = shown(repository, revision, &self.file);
        let mut hub = Hub::new(RepoType::Model, repository, revision, shown, progress)?;
        let forbidden = std::mem::replace(&mut hub.offline, true);
        // Weights come last: where the cache has them, it has all that the hub had to give.
        if let Ok(path) = self.gather(&hub) {
            return Ok(path);
        }
        hub.offline = forbidden;
        self.gather(&hub)
    }

    /// The folder of the model's files, or its GGUF file, once all of it is there.
    fn gather(&self, hub: &Hub) -> Result<PathBuf> {
        if let Some(file) = &self.file {
            let path = self.required(hub, file)?;
            for part in part_paths(Path::new(file)).unwrap_or_default() {
                self.required(hub, &part.to_string_lossy())?;
            }
            return Ok(path);
        }
        let config = self.required(hub, "config.json")?;
        self.required(hub, "tokenizer.json")?;
        for file in OPTIONAL {
            hub.file(file)?;
        }
        let weights = match hub.file(INDEX)? {
            Some(index) => shard_names(&index)?,
            None => [SINGLE.to_owned()].into(),
        };
        for file in weights {
            self.required(hub, &file)?;
        }
        Ok(config.parent().map(PathBuf::from).unwrap_or_default())
    }

    fn required(&self, hub: &Hub, file: &str) -> Result<PathBuf> {
        if let Some(path) = hub.file(file)? {
            return Ok(path);
        }
        if hub.offline {
            return Err(hub.error(format!("{file} {NOT_CACHED}")));
        }
        let gguf = hub.gguf_files();
        let mut reason = format!("it has no {file}");
        if self.file.is_none() && !gguf.is_empty() {
            reason += ": its weights are GGUF files, name one of them as ";
            reason += &format!("{}/FILE.gguf", self.repository);
        }
        Err(hub.error(reason + &listed(&gguf)))
    }
}

/// A data set on the hub, or some of its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetName {
    /// `org/name`
    pub repository: String,
    /// A branch, tag or commit.
    pub revision: String,
    /// A folder or file of the repository; `*` stands for any characters but a slash.
    pub path: Option<String>,
}

impl FromStr for DatasetName {
    type Err = ();

    /// Takes `hf://datasets/org/name[@revision][/path]`, as Hugging Face's own tools do.
    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let name = text.strip_prefix("hf://datasets/").ok_or(())?;
        let inside = |path: &str| path.split('/').all(|part| !matches!(part, "" | "." | ".."));
        let parts = parts(name.trim_end_matches('/'), |_| true, inside);
        let (repository, revision, path) = parts.ok_or(())?;
        Ok(Self {
            repository,
            revision,
            path,
        })
    }
}

/// The files of a data set, or of another input, on this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dataset {
    /// The data set's name with the commit that the files are of.
    pub name: String,
    /// The files, in sorted order.
    pub files: Vec<PathBuf>,
    /// Files of the repository, or of a folder, that are not of interest.
    pub skipped: Vec<String>,
}

impl DatasetName {
    /// The files that are `wanted` by their path in the repository, or the one that is named in full,
    /// downloaded where the cache lacks them. With `progress`, bars are drawn on stderr.
    ///
    /// The hub is asked which files there are, unless one is named in full that the cache has; with
    /// `HF_HUB_OFFLINE=1` those in the cache are all there are.
    ///
    /// # Errors
    /// [`Error::Hub`], as [`HubName::fetch`], and where there is no such file.
    pub fn fetch(&self, wanted: &dyn Fn(&str) -> bool, progress: bool) -> Result<Dataset> {
        let path = self.path.as_deref();
        let shown = self.shown(&self.revision);
        let (repository, revision) = (&self.repository, &self.revision);
        let hub = Hub::new(RepoType::Dataset, repository, revision, shown, progress)?;
        let cached = hub.cached_commit();
        if let (Some(path), Some(commit)) = (path, &cached) {
            let file = hub.cache.pointer_path(commit).join(path);
            if file.is_file() {
                return Ok(Dataset {
                    name: self.shown(commit),
                    files: vec![file],
                    ..Dataset::default()
                });
            }
        }
        let (commit, all) = if hub.offline {
            let commit = cached.ok_or_else(|| hub.error(format!("it {NOT_CACHED}")))?;
            let files = files_in(&hub.cache.pointer_path(&commit));
            (commit, files)
        } else {
            hub.listing()?
        };
        let is_named = |file: &String| path.is_none_or(|path| selects(path, file));
        let (named, others): (Vec<String>, Vec<String>) = all.into_iter().partition(is_named);
        let full = |file: &str| path == Some(file);
        let wanted = |file: &String| full(file) || wanted(file);
        let (mut names, skipped): (Vec<String>, Vec<String>) = named.into_iter().partition(wanted);
        names.sort();
        if names.is_empty() {
            let there = if skipped.is_empty() { others } else { skipped };
            let cache = if hub.offline { " in the cache" } else { "" };
            let reason = match path {
                Some(path) => format!("no file to read at {path:?}{cache}{}", listed(&there)),
                None => format!("no file to read{cache}{}", listed(&there)),
            };
            return Err(hub.error(reason));
        }
        let snapshot = hub.cache.pointer_path(&commit);
        let file = |name: &String| {
            let cached = snapshot.join(name);
            if cached.is_file() {
                return Ok(cached);
            }
            let missing = || hub.error(format!("the hub lists {name} and does not have it"));
            hub.file(name)?.ok_or_else(missing)
        };
        Ok(Dataset {
            name: self.shown(&commit),
            files: names.iter().map(file).collect::<Result<_>>()?,
            skipped,
        })
    }

    fn shown(&self, revision: &str) -> String {
        let shown = shown(&self.repository, revision, &self.path);
        format!("hf://datasets/{shown}")
    }
}

/// A repository, revision and path as people write them.
fn shown(repository: &str, revision: &str, path: &Option<String>) -> String {
    match path {
        Some(path) => format!("{repository}@{revision}/{path}"),
        None => format!("{repository}@{revision}"),
    }
}

/// Returns true where `path`, in which `*` stands for any characters but a slash, names `file` or a folder that
/// it is in.
fn selects(path: &str, file: &str) -> bool {
    let mut parts = file.split('/');
    path.split('/')
        .all(|pattern| parts.next().is_some_and(|part| matches(pattern, part)))
}

fn matches(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(text) = text.strip_prefix(first) else {
        return false;
    };
    let mut places = text.char_indices().map(|(at, _)| at).chain([text.len()]);
    places.any(|at| matches(rest, &text[at..]))
}

/// The files in a folder and those in it, as paths from there.
fn files_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files = Vec::new();
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() {
            let inner = files_in(&entry.path());
            files.extend(inner.iter().map(|file| format!("{name}/{file}")));
        } else {
            files.push(name);
        }
    }
    files
}

/// The hub, for one repository.
struct Hub<'a> {
    revision: &'a str,
    repo: Repo,
    /// `model` or `data set`, and its name as it was asked for.
    noun: &'static str,
    shown: String,
    cache: hf_hub::CacheRepo,
    /// The repository's folder in the cache.
    folder: PathBuf,
    remote: ApiRepo,
    endpoint: String,
    token: Option<String>,
    /// True where only the cache is looked in.
    offline: bool,
}

impl<'a> Hub<'a> {
    fn new(
        kind: RepoType,
        repository: &'a str,
        revision: &'a str,
        shown: String,
        progress: bool,
    ) -> Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let offline = variable("HF_HUB_OFFLINE");
        let cache = Cache::from_env();
        let token = variable("HF_TOKEN").or_else(|| cache.token());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let repo = Repo::with_revision(repository.to_owned(), kind, revision.to_owned());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(endpoint.clone())
            .with_token(token.clone())
            .with_progress(progress)
            .with_retries(2);
        let api = api.build().map_err(|e| Error::Hub {
            name: shown.clone(),
            reason: e.to_string(),
        })?;
        Ok(Self {
            revision,
            noun: match kind {
                RepoType::Dataset => "data set",
                _ => "model",
            },
            shown,
            folder: cache.path().join(repo.folder_name()),
            cache: cache.repo(repo.clone()),
            remote: api.repo(repo.clone()),
            repo,
            endpoint,
            token,
            offline: offline.is_some_and(|told| YES.contains(&told.to_ascii_lowercase().as_str())),
        })
    }

    /// A file of the repository, `None` where it has none of that name.
    fn file(&self, file: &str) -> Result<Option<PathBuf>> {
        if let Some(path) = self.cache.get(file) {
            return Ok(Some(path));
        }
        if self.offline {
            return Ok(None);
        }
        match self.remote.download(file) {
            Ok(path) => Ok(Some(path)),
            Err(error) => match status(&error) {
                Some(404) if self.info(&self.repo.api_url()).is_some() => Ok(None),
                Some(code) => Err(self.refusal(code, file)),
                None => Err(self.unreachable(file, &error.to_string())),
            },
        }
    }

    /// The commit of the revision, and all files of it.
    fn listing(&self) -> Result<(String, Vec<String>)> {
        let what = "the list of its files";
        let text = self.get(&self.repo.api_url());
        let text = text.map_err(|error| match error {
            ureq::Error::StatusCode(code) => self.refusal(code, what),
            error => self.unreachable(what, &error.to_string()),
        })?;
        let info: Info = serde_json::from_str(&text)
            .map_err(|e| self.error(format!("{what} cannot be understood: {e}")))?;
        let files = info.siblings.into_iter().map(|file| file.rfilename);
        // A path that leads out of the cache is no file of a repository.
        let inside = |path: &String| {
            let mut parts = Path::new(path).components();
            parts.all(|part| matches!(part, Component::Normal(_)))
        };
        match info.sha {
            Some(commit) if plain(&commit) => Ok((commit, files.filter(inside).collect())),
            _ => Err(self.error(format!("{what} names no commit"))),
        }
    }

    /// The commit that the revision was of when the cache was last filled.
    fn cached_commit(&self) -> Option<String> {
        let reference = std::fs::read_to_string(self.folder.join("refs").join(self.revision));
        let commit = reference.unwrap_or_else(|_| self.revision.to_owned());
        let commit = commit.trim().to_owned();
        (plain(&commit) && self.cache.pointer_path(&commit).is_dir()).then_some(commit)
    }

    /// The GGUF files of the repository, as far as the hub says.
    fn gguf_files(&self) -> Vec<String> {
        let info = self.info(&self.repo.api_url());
        let files = info.map(|info| info.siblings).unwrap_or_default();
        let names = files.into_iter().map(|file| file.rfilename);
        names.filter(|name| name.ends_with(".gguf")).collect()
    }

    fn refusal(&self, code: u16, file: &str) -> Error {
        if !matches!(code, 401 | 403 | 404) {
            return self.error(format!("the hub answered {code} for {file}"));
        }
        let token = match self.token {
            Some(_) => "the account of your token",
            None => "an account, and set HF_TOKEN to a token of it",
        };
        // Gated or not, whatever the revision.
        let page = self.repo.api_url();
        let page = page.split_once("/revision/");
        let open = [serde_json::Value::Null, false.into()];
        self.error(match page.and_then(|(page, _)| self.info(page)) {
            Some(info) if !open.contains(&info.gated) => {
                let page = format!("{}/{}", self.endpoint, self.repo.url());
                format!("it is gated: accept its licence at {page} with {token}")
            }
            Some(_) => format!("it has no revision {:?}", self.revision),
            None => format!(
                "there is no such {}, or it is private and HF_TOKEN is not a token that may \
                 read it",
                self.noun
            ),
        })
    }

    fn unreachable(&self, file: &str, error: &str) -> Error {
        self.error(format!(
            "{file} could not be downloaded from {}: {error}. With no network only what is cached \
             (HF_HUB_OFFLINE=1), files and folders can be used",
            self.endpoint
        ))
    }

    /// Asks the hub about the repository; `None` where it says nothing.
    fn info(&self, page: &str) -> Option<Info> {
        serde_json::from_str(&self.get(page).ok()?).ok()
    }

    fn get(&self, page: &str) -> std::result::Result<String, ureq::Error> {
        /// Bytes of an answer: some data sets have a hundred thousand files.
        const MAX: u64 = 1 << 27;
        let mut request = ureq::get(format!("{}/api/{page}", self.endpoint));
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let mut answer = request.call()?;
        answer.body_mut().with_config().limit(MAX).read_to_string()
    }

    fn error(&self, reason: String) -> Error {
        Error::Hub {
            name: format!("{} {}", self.noun, self.shown),
            reason,
        }
    }
}

/// A repository's page, as far as it is of interest.
#[derive(Deserialize)]
struct Info {
    /// The commit.
    sha: Option<String>,
    /// `false`, or how access is granted.
    #[serde(default)]
    gated: serde_json::Value,
    /// Files.
    #[serde(default)]
    siblings: Vec<Siblings>,
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

    #[test]
    fn data_sets_are_named_as_hugging_face_names_them() {
        let name = |text: &str| {
            let name = text.parse::<DatasetName>();
            name.map(|n| (n.repository, n.revision, n.path))
        };
        let named = |a: &str, b: &str, c: Option<&str>| {
            Ok((a.to_owned(), b.to_owned(), c.map(str::to_owned)))
        };
        for (text, revision, path) in [
            ("hf://datasets/org/set", "main", None),
            ("hf://datasets/org/set/", "main", None),
            ("hf://datasets/org/set@v2", "v2", None),
            ("hf://datasets/org/set/a/b.txt", "main", Some("a/b.txt")),
            ("hf://datasets/org/set/a/b@2.txt", "main", Some("a/b@2.txt")),
            ("hf://datasets/org/set@v2/a *.txt", "v2", Some("a *.txt")),
            (
                "hf://datasets/org/set@refs/convert/parquet/main/train",
                "refs/convert/parquet",
                Some("main/train"),
            ),
        ] {
            assert_eq!(name(text), named("org/set", revision, path), "{text}");
        }
        for text in [
            "org/set",
            "datasets/org/set",
            "hf://org/set",
            "hf://datasets/set",
            "hf://datasets/org/",
            "hf://datasets/org/set@",
            "hf://datasets/org/set/../a",
            "hf://datasets/org/set//a",
            "hf://datasets/../set",
        ] {
            assert_eq!(name(text), Err(()), "{text}");
        }
    }

    #[test]
    fn paths_select_files_and_folders() {
        for (path, file, is) in [
            ("a", "a", true),
            ("a", "a/b/c", true),
            ("a/b", "a/b", true),
            ("a/b", "a", false),
            ("a", "ab", false),
            ("*", "a", true),
            ("a/train-*.parquet", "a/train-0.parquet", true),
            ("a/train-*.parquet", "a/test-0.parquet", false),
            ("a/train-*", "a/train-0/x", true),
            ("*-v1/*", "raw-v1/train", true),
            ("*/train", "a/b/train", false),
            ("é*é", "éé", true),
            ("é*é", "é", false),
        ] {
            assert_eq!(selects(path, file), is, "{path} {file}");
        }
    }
}
