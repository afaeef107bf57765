//! Models by their hub name, `org/name`, `org/name@revision` or `org/name[@revision]/file.gguf`, data sets,
//! `hf://datasets/org/name[@revision][/path]`, and repositories of dictionaries, `hf://org/name[@revision][/path]`,
//! through the cache of `huggingface_hub`.
//!
//! The variables of `huggingface_hub` count: `HF_HOME` and `HF_HUB_CACHE` say where the cache is, `HF_TOKEN` who asks,
//! `HF_ENDPOINT` which hub, `HF_HUB_OFFLINE=1` keeps off the network, and `HF_HUB_ETAG_TIMEOUT` and
//! `HF_HUB_DOWNLOAD_TIMEOUT` bound the wait. What is in the cache is used without asking.

mod client;
mod settings;

use std::cell::OnceCell;
use std::fs::{File, TryLockError};
use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use lexico::shown::{shown, shown_path};
use serde::Deserialize;

use crate::error::{Error, Result, listed};
use crate::gguf::part_paths;
use crate::weights::{INDEX, SINGLE, shard_names};
use client::{Client, Metadata, Refusal};
use settings::Settings;

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";
/// Places of a chat template, beside the tokenizer's config.
const TEMPLATES: [&str; 2] = ["chat_template.jinja", "chat_template.json"];

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
pub(crate) fn plain(part: &str) -> bool {
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

/// A model's files on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The folder of the model's files, or its GGUF file.
    pub path: PathBuf,
    /// What the user should know: files that may be missing, a line each.
    pub notes: Vec<String>,
}

impl HubName {
    /// The folder of the model's files, or its GGUF file, which are downloaded where the cache lacks
    /// them; a download that broke off is taken up again. With `progress`, bars are drawn on stderr.
    ///
    /// What the cache has is not asked for again. Files that a model may do without are looked for on the hub once, unless
    /// the cache knows that they are not there; that they could not be looked for is no error, and stands in the notes.
    ///
    /// # Errors
    /// [`Error::Hub`], which tells apart a model that is not there, one whose licence must be
    /// accepted, a hub out of reach, and being offline.
    pub fn fetch(&self, progress: bool) -> Result<Fetched> {
        let (repository, revision) = (&self.repository, &self.revision);
        let shown = named(repository, revision, &self.file);
        let hub = Hub::new(Kind::Model, repository, revision, shown, progress)?;
        if let Some(file) = &self.file {
            let path = self.required(&hub, file)?;
            for part in part_paths(Path::new(file)).unwrap_or_default() {
                self.required(&hub, &part.to_string_lossy())?;
            }
            let notes = Vec::new();
            return Ok(Fetched { path, notes });
        }
        let config = self.required(&hub, CONFIG)?;
        self.required(&hub, "tokenizer.json")?;
        for file in self.weights(&hub)? {
            self.required(&hub, &file)?;
        }
        let notes = self.optional(&hub);
        let path = config.parent().map(PathBuf::from).unwrap_or_default();
        Ok(Fetched { path, notes })
    }

    /// The files of the weights: one, or as many as an index names.
    fn weights(&self, hub: &Hub) -> Result<Vec<String>> {
        let single = vec![SINGLE.to_owned()];
        if matches!(hub.cached(SINGLE), Found::Here(_)) {
            return Ok(single);
        }
        let mut index = hub.cached(INDEX);
        if !matches!(index, Found::Here(_)) {
            if !matches!(hub.file(SINGLE)?, Found::Absent) {
                return Ok(single);
            }
            index = hub.file(INDEX)?;
        }
        match index {
            Found::Here(index) => Ok(shard_names(&index)?.into_iter().collect()),
            _ => Ok(single),
        }
    }

    /// Gets what a model may do without; returns what has to be said of it.
    fn optional(&self, hub: &Hub) -> Vec<String> {
        let mut unknown = Vec::new();
        let mut why = None;
        let mut find = |file: &'static str| {
            let found = match why {
                None => hub.file(file),
                Some(_) => Ok(hub.cached(file)),
            };
            match found {
                Ok(Found::Here(path)) => return Some(path),
                Ok(Found::Absent) => return None,
                Ok(Found::Unknown) => {}
                // One wait for a hub out of reach is enough.
                Err(error) => why = Some(error),
            }
            unknown.push(file);
            None
        };
        find(GENERATION);
        let tokenizer = find(TOKENIZER);
        let tokenizer = tokenizer.and_then(|path| std::fs::read_to_string(path).ok());
        let tokenizer: serde_json::Value = tokenizer
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default();
        let has_tokens = ["bos_token", "eos_token"].map(|key| tokenizer.get(key).is_some());
        find(SPECIAL);
        let mut has_template = !tokenizer["chat_template"].is_null();
        let stated = has_template;
        for file in TEMPLATES {
            // The second place is an older one.
            if !has_template || file == TEMPLATES[0] {
                has_template |= find(file).is_some();
            }
        }
        // What another file says already is not missed.
        unknown.retain(|&file| match file {
            SPECIAL => has_tokens != [true; 2],
            GENERATION | TOKENIZER => true,
            _ => !stated && !has_template,
        });
        let name = &hub.shown;
        let mut notes = Vec::new();
        if !unknown.is_empty() {
            let reason = match why {
                Some(Error::Hub { reason, .. }) => reason,
                Some(error) => error.to_string(),
                None => format!("{} forbids to look for them on the hub", hub.forbidding()),
            };
            notes.push(format!(
                "{name}: the cache does not hold {}, with which the model may answer otherwise: {reason}",
                unknown.join(", ")
            ));
        } else if !has_template {
            notes.push(format!(
                "{name}: it has no chat template, so prompts are taken as plain text"
            ));
        }
        notes
    }

    fn required(&self, hub: &Hub, file: &str) -> Result<PathBuf> {
        match hub.file(file)? {
            Found::Here(path) => return Ok(path),
            Found::Unknown => return Err(hub.error(hub.not_cached(file))),
            Found::Absent => {}
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
        let asked = self.shown(&self.revision);
        let (repository, revision) = (&self.repository, &self.revision);
        let hub = Hub::new(Kind::Dataset, repository, revision, asked, progress)?;
        let cached = hub.cached_commit();
        if let (Some(path), Some(commit)) = (path, &cached) {
            let file = hub.snapshot(commit).join(path);
            if file.is_file() {
                return Ok(Dataset {
                    name: self.shown(commit),
                    files: vec![file],
                    ..Dataset::default()
                });
            }
        }
        let offline = hub.settings.offline.is_some();
        let (commit, all) = if offline {
            let commit = cached.ok_or_else(|| hub.error(hub.not_cached("it")))?;
            let files = files_in(&hub.snapshot(&commit));
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
            let cache = if offline { " in the cache" } else { "" };
            let reason = match path {
                Some(path) => format!("no file to read at {path:?}{cache}{}", listed(&there)),
                None => format!("no file to read{cache}{}", listed(&there)),
            };
            return Err(hub.error(reason));
        }
        let file = |name: &String| match hub.file_of(Some(&commit), name)? {
            Found::Here(path) => Ok(path),
            _ => Err(hub.error(format!(
                "the hub lists {} and does not have it",
                shown(name)
            ))),
        };
        Ok(Dataset {
            name: self.shown(&commit),
            files: names.iter().map(file).collect::<Result<_>>()?,
            skipped,
        })
    }

    fn shown(&self, revision: &str) -> String {
        let shown = named(&self.repository, revision, &self.path);
        format!("hf://datasets/{shown}")
    }
}

/// A repository of dictionaries on the hub, or a folder or file of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryName {
    /// `org/name`
    pub repository: String,
    /// A branch, tag or commit.
    pub revision: String,
    /// A folder or file of the repository.
    pub path: Option<String>,
}

impl FromStr for RepositoryName {
    type Err = ();

    /// Takes `hf://org/name[@revision][/path]`, as Hugging Face's own tools do for the repositories of models.
    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let name = text.strip_prefix("hf://").ok_or(())?;
        // Repositories of other kinds are named so.
        let other = ["datasets/", "spaces/", "buckets/"];
        if other.iter().any(|kind| name.starts_with(kind)) {
            return Err(());
        }
        let inside = |path: &str| path.split('/').all(plain);
        let parts = parts(name.trim_end_matches('/'), |_| true, inside);
        let (repository, revision, path) = parts.ok_or(())?;
        Ok(Self {
            repository,
            revision,
            path,
        })
    }
}

impl std::fmt::Display for RepositoryName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = named(&self.repository, &self.revision, &self.path);
        write!(f, "hf://{name}")
    }
}

impl RepositoryName {
    /// The file at `path` of the repository, downloaded where the cache lacks it and the hub says that its size in bytes
    /// is one of `sizes`. With `progress`, bars are drawn on stderr. What the cache has is not asked for again, whatever
    /// its size.
    ///
    /// # Errors
    /// [`Error::Hub`], as [`HubName::fetch`].
    pub fn fetch(&self, path: &str, sizes: RangeInclusive<u64>, progress: bool) -> Result<PathBuf> {
        let (repository, revision) = (&self.repository, &self.revision);
        let shown = named(repository, revision, &None);
        let hub = Hub::new(Kind::Dictionaries, repository, revision, shown, progress)?;
        match hub.sized_file(hub.cached_commit().as_deref(), path, Some(sizes))? {
            Found::Here(path) => Ok(path),
            Found::Unknown => Err(hub.error(hub.not_cached(path))),
            Found::Absent => Err(hub.error(format!("it has no {path}"))),
        }
    }
}

/// A repository, revision and path as people write them.
fn named(repository: &str, revision: &str, path: &Option<String>) -> String {
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

/// Kind of a repository.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Model,
    Dataset,
    /// To the hub a repository of a model.
    Dictionaries,
}

impl Kind {
    /// What the hub calls all repositories of the kind.
    fn plural(self) -> &'static str {
        match self {
            Self::Model | Self::Dictionaries => "models",
            Self::Dataset => "datasets",
        }
    }

    /// What its addresses begin with.
    fn prefix(self) -> &'static str {
        match self {
            Self::Model | Self::Dictionaries => "",
            Self::Dataset => "datasets/",
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "data set",
            Self::Dictionaries => "repository",
        }
    }
}

/// Place of a file of a repository.
enum Found {
    Here(PathBuf),
    /// The hub has no file of that name.
    Absent,
    /// The cache has none, and the hub may not be asked.
    Unknown,
}

/// The hub, for one repository.
struct Hub<'a> {
    revision: &'a str,
    kind: Kind,
    repository: &'a str,
    /// Name as it was asked for.
    shown: String,
    /// The repository's folder in the cache.
    folder: PathBuf,
    client: Client,
    settings: Settings,
    /// What the hub says of the revision, once it was asked.
    about: OnceCell<Option<Info>>,
}

impl<'a> Hub<'a> {
    fn new(
        kind: Kind,
        repository: &'a str,
        revision: &'a str,
        shown: String,
        progress: bool,
    ) -> Result<Self> {
        let settings = Settings::from_environment().map_err(|reason| Error::Hub {
            name: shown.clone(),
            reason,
        })?;
        let folder = format!("{}--{}", kind.plural(), repository.replace('/', "--"));
        Ok(Self {
            revision,
            kind,
            repository,
            shown,
            folder: settings.cache.join(folder),
            client: Client::new(&settings, progress),
            settings,
            about: OnceCell::new(),
        })
    }

    /// A file of the repository.
    fn file(&self, file: &str) -> Result<Found> {
        self.file_of(self.cached_commit().as_deref(), file)
    }

    /// A file of a commit, or where none is known yet of the one that the revision stands for.
    fn file_of(&self, commit: Option<&str>, file: &str) -> Result<Found> {
        self.sized_file(commit, file, None)
    }

    /// [`file_of`](Self::file_of) where the file's size matters.
    fn sized_file(
        &self,
        commit: Option<&str>,
        file: &str,
        sizes: Option<RangeInclusive<u64>>,
    ) -> Result<Found> {
        let found = self.cached_of(commit, file);
        if !matches!(found, Found::Unknown) || self.settings.offline.is_some() {
            return Ok(found);
        }
        let (path, metadata) = match self.ask(commit, file)? {
            Some(answer) => answer,
            None => return Ok(Found::Absent),
        };
        if let Some(sizes) = sizes {
            self.check_size(file, metadata.size, &sizes)?;
        }
        self.download(&path, &metadata, file).map(Found::Here)
    }

    fn check_size(&self, file: &str, size: Option<u64>, sizes: &RangeInclusive<u64>) -> Result<()> {
        let (least, max) = (sizes.start(), sizes.end());
        let reason = match size {
            Some(size) if sizes.contains(&size) => return Ok(()),
            Some(size) if least == max => {
                format!("{file} has {size} bytes there, and not the {max} that it should have")
            }
            Some(size) => format!("{file} has {size} bytes there, and may have at most {max}"),
            None => format!("the hub does not say how many bytes {file} has"),
        };
        Err(self.error(format!("{reason}; nothing of it was downloaded")))
    }

    /// A file as far as the cache knows.
    fn cached(&self, file: &str) -> Found {
        self.cached_of(self.cached_commit().as_deref(), file)
    }

    fn cached_of(&self, commit: Option<&str>, file: &str) -> Found {
        let Some(commit) = commit else {
            return Found::Unknown;
        };
        let path = self.snapshot(commit).join(file);
        if path.is_file() {
            Found::Here(path)
        } else if self.no_exist(commit).join(file).is_file() {
            Found::Absent
        } else {
            Found::Unknown
        }
    }

    /// What the hub says of a file, and the path to it there; `None` where it has none of that name.
    fn ask(&self, commit: Option<&str>, file: &str) -> Result<Option<(String, Metadata)>> {
        let prefix = self.kind.prefix();
        let path = |revision: &str| {
            let revision = revision.replace('/', "%2F");
            let file = escaped(file);
            format!("{prefix}{}/resolve/{revision}/{file}", self.repository)
        };
        // The branch may be further than the commit whose files the cache has.
        let mut asked = path(self.revision);
        let mut answer = self.client.metadata(&asked);
        let of = match &answer {
            Ok(metadata) => Some(&metadata.commit),
            Err(Refusal::Status { commit, .. }) => commit.as_ref(),
            Err(_) => None,
        };
        if let (Some(commit), Some(of)) = (commit, of)
            && commit != of
        {
            asked = path(commit);
            answer = self.client.metadata(&asked);
        }
        let (code, name, of) = match answer {
            Ok(metadata) if plain(&metadata.commit) => return Ok(Some((asked, metadata))),
            Ok(_) => return Err(self.error("the hub's X-Repo-Commit is no commit".to_owned())),
            Err(Refusal::Status {
                code,
                name,
                commit,
                wait: None,
            }) => (code, name, commit),
            Err(refusal) => return Err(self.refusal(refusal, file)),
        };
        let absent = match name.as_deref() {
            Some(name) => name == "EntryNotFound",
            None => code == 404 && self.about().is_some(),
        };
        if !absent {
            let refusal = Refusal::Status {
                code,
                name,
                commit: of,
                wait: None,
            };
            return Err(self.refusal(refusal, file));
        }
        if let Some(commit) = commit
            .map(str::to_owned)
            .or(of)
            .filter(|commit| plain(commit))
        {
            let place = self.no_exist(&commit).join(file);
            // As `huggingface_hub` does; where it cannot be written down, it is asked again.
            let folder = place.parent().map(std::fs::create_dir_all);
            let _ = folder
                .and_then(|made| made.ok())
                .map(|()| File::create(&place));
        }
        Ok(None)
    }

    /// Downloads a file to the cache, in the layout of `huggingface_hub`.
    fn download(&self, path: &str, metadata: &Metadata, file: &str) -> Result<PathBuf> {
        let (blobs, commit) = (self.folder.join("blobs"), &metadata.commit);
        let (blob, place) = (blobs.join(&metadata.etag), self.snapshot(commit).join(file));
        let part = blobs.join(format!("{}.incomplete", metadata.etag));
        let make = || -> std::io::Result<()> {
            std::fs::create_dir_all(&blobs)?;
            place.parent().map_or(Ok(()), std::fs::create_dir_all)
        };
        make().map_err(|e| self.unwritable(e))?;
        let lock = self.lock(&metadata.etag, &part)?;
        // Another program may have had it while we waited.
        if !blob.is_file() {
            let loaded = self.client.download(path, metadata, &part);
            loaded.map_err(|refusal| self.refusal(refusal, file))?;
            std::fs::rename(&part, &blob).map_err(|e| self.unwritable(e))?;
        }
        self.link(&blob, &place, file)
            .map_err(|e| self.unwritable(e))?;
        drop(lock);
        if self.cached_commit().is_none() && self.revision != commit {
            let reference = self.folder.join("refs").join(self.revision);
            let folder = reference.parent().map_or(Ok(()), std::fs::create_dir_all);
            let written = folder.and_then(|()| std::fs::write(&reference, commit));
            written.map_err(|e| self.unwritable(e))?;
        }
        Ok(place)
    }

    /// Puts a file's content where its name is: a link, or the content itself where links cannot be.
    fn link(&self, blob: &Path, place: &Path, file: &str) -> std::io::Result<()> {
        if place.is_file() {
            return Ok(());
        }
        // A link that leads nowhere.
        let _ = std::fs::remove_file(place);
        let up = "../".repeat(file.split('/').count() + 1);
        let name = blob.file_name().unwrap_or_default();
        let target = Path::new(&up).join("blobs").join(name);
        if self.settings.links && symlink(&target, place).is_ok() {
            return Ok(());
        }
        std::fs::rename(blob, place)
    }

    /// Waits while another program downloads the same; the lock lasts as long as what is returned.
    fn lock(&self, etag: &str, part: &Path) -> Result<Option<File>> {
        const POLL: Duration = Duration::from_millis(250);
        const PATIENCE: Duration = Duration::from_secs(60);
        let folder = self.folder.file_name().unwrap_or_default();
        let folder = self.settings.cache.join(".locks").join(folder);
        let path = folder.join(format!("{etag}.lock"));
        let file = std::fs::create_dir_all(&folder).and_then(|()| {
            // Not emptied: it may be another's.
            File::options().create(true).append(true).open(&path)
        });
        let file = file.map_err(|e| self.unwritable(e))?;
        let length = || std::fs::metadata(part).map_or(0, |metadata| metadata.len());
        let (mut grown, mut since) = (length(), Instant::now());
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                // Some file systems know no locks.
                Err(TryLockError::Error(_)) => return Ok(None),
                Err(TryLockError::WouldBlock) => {}
            }
            let now = length();
            if now != grown {
                (grown, since) = (now, Instant::now());
            }
            if since.elapsed() > PATIENCE {
                return Err(self.error(format!(
                    "another program has held {} for {} seconds and not gone on with the download; end it, or \
                     remove that file",
                    shown_path(&path),
                    PATIENCE.as_secs()
                )));
            }
            std::thread::sleep(POLL);
        }
    }

    /// The commit of the revision, and all files of it.
    fn listing(&self) -> Result<(String, Vec<String>)> {
        let what = "the list of its files";
        let text = self.client.page(&self.api_page());
        let text = text.map_err(|refusal| self.refusal(refusal, what))?;
        let info: Info = serde_json::from_str(&text)
            .map_err(|e| self.error(format!("{what} makes no sense: {}", shown(e))))?;
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
        (plain(&commit) && self.snapshot(&commit).is_dir()).then_some(commit)
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Where `huggingface_hub` writes down which files a commit does not have.
    fn no_exist(&self, commit: &str) -> PathBuf {
        self.folder.join(".no_exist").join(commit)
    }

    /// The GGUF files of the repository, as far as the hub says.
    fn gguf_files(&self) -> Vec<String> {
        let files = self.about().map_or(&[][..], |info| &info.siblings);
        let names = files.iter().map(|file| file.rfilename.clone());
        names.filter(|name| name.ends_with(".gguf")).collect()
    }

    /// The variable that keeps off the network.
    fn forbidding(&self) -> &'static str {
        self.settings.offline.unwrap_or("HF_HUB_OFFLINE")
    }

    fn not_cached(&self, file: &str) -> String {
        let variable = self.forbidding();
        format!("{file} is not in the cache, and {variable} forbids to download it")
    }

    fn refusal(&self, refusal: Refusal, file: &str) -> Error {
        let (code, wait) = match refusal {
            Refusal::Status { code, wait, .. } => (code, wait),
            Refusal::Unreachable(reason) => return self.unreachable(file, &reason),
            Refusal::Cache(reason) => return self.unwritable(reason),
        };
        if !matches!(code, 401 | 403 | 404) {
            let busy = match (code, wait) {
                (429, Some(wait)) => format!(
                    ": too many requests, it asks to wait {} seconds",
                    wait.as_secs()
                ),
                (429, None) => ": too many requests, wait a while".to_owned(),
                (500.., _) => ": it has a fault of its own, try again later".to_owned(),
                _ => String::new(),
            };
            return self.error(format!("the hub answered {code} for {file}{busy}"));
        }
        let token = match self.settings.token {
            Some(_) => "the account of your token",
            None => "an account, and set HF_TOKEN to a token of it",
        };
        // Gated or not, whatever the revision.
        let page = self.api_page();
        let page = page.split_once("/revision/");
        let open = [serde_json::Value::Null, false.into()];
        self.error(match page.and_then(|(page, _)| self.info(page)) {
            Some(info) if !open.contains(&info.gated) => {
                let (endpoint, prefix) = (&self.settings.endpoint, self.kind.prefix());
                let page = format!("{endpoint}/{prefix}{}", self.repository);
                format!("it is gated: accept its licence at {page} with {token}")
            }
            Some(_) => format!("it has no revision {:?}", self.revision),
            None => format!(
                "there is no such {}, or it is private and HF_TOKEN is not a token that may \
                 read it",
                self.kind.noun()
            ),
        })
    }

    fn unreachable(&self, file: &str, error: &str) -> Error {
        self.error(format!(
            "{file} could not be downloaded from {}: {error}. With no network only what is cached \
             (HF_HUB_OFFLINE=1), files and folders can be used",
            self.settings.endpoint
        ))
    }

    fn unwritable(&self, reason: impl std::fmt::Display) -> Error {
        let cache = shown_path(&self.settings.cache);
        self.error(format!(
            "the cache {cache} cannot be written: {reason}; HF_HUB_CACHE names another"
        ))
    }

    /// The page of the hub's interface on the revision.
    fn api_page(&self) -> String {
        let kinds = self.kind.plural();
        let revision = self.revision.replace('/', "%2F");
        format!("{kinds}/{}/revision/{revision}", self.repository)
    }

    /// What the hub says of the revision; `None` where it says nothing.
    fn about(&self) -> Option<&Info> {
        let ask = || self.info(&self.api_page());
        self.about.get_or_init(ask).as_ref()
    }

    /// Asks the hub about the repository; `None` where it says nothing.
    fn info(&self, page: &str) -> Option<Info> {
        serde_json::from_str(&self.client.page(page).ok()?).ok()
    }

    fn error(&self, reason: String) -> Error {
        Error::Hub {
            name: format!("{} {}", self.kind.noun(), self.shown),
            reason,
        }
    }
}

/// A path in an address: bytes that an address has no room for, as `%` and two digits.
fn escaped(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                out.push(char::from(byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(unix)]
fn symlink(target: &Path, place: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, place)
}

#[cfg(windows)]
fn symlink(target: &Path, place: &Path) -> std::io::Result<()> {
    std::os::windows::fs::symlink_file(target, place)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
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
    siblings: Vec<Sibling>,
}

/// A file on a repository's page.
#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
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
    fn repositories_of_dictionaries_are_named_as_hugging_face_names_them() {
        let name = |text: &str| {
            let name = text.parse::<RepositoryName>();
            name.map(|n| (n.repository, n.revision, n.path))
        };
        let named = |a: &str, b: &str, c: Option<&str>| {
            Ok((a.to_owned(), b.to_owned(), c.map(str::to_owned)))
        };
        for (text, revision, path) in [
            ("hf://org/m-lexico", "main", None),
            ("hf://org/m-lexico/", "main", None),
            ("hf://org/m-lexico@v2", "v2", None),
            ("hf://org/m-lexico@v2/a/b", "v2", Some("a/b")),
            (
                "hf://org/m-lexico/a/b.safetensors",
                "main",
                Some("a/b.safetensors"),
            ),
        ] {
            assert_eq!(name(text), named("org/m-lexico", revision, path), "{text}");
        }
        for text in [
            "org/m",
            "hf://org",
            "hf://org/",
            "hf:///m",
            "hf://org/m@",
            "hf://org/m/../a",
            "hf://org/m//a",
            "hf://org/m/.a",
            "hf://../m",
            "hf://datasets/org/set",
            "hf://spaces/org/app",
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
