//! Generations that stop, and go on later, in another process, exactly as if they had not stopped: the cache, the text
//! and the sampler's draws in one file.
//!
//! | bytes | |
//! |---|---|
//! | | `lexico-cache/1` and a line feed |
//! | 4 | length of the header |
//! | | header: JSON, with the name, length and CRC-32 of every block |
//! | 4 | CRC-32 of length and header |
//! | | blocks, one after the other, to the end of the file |
//!
//! Numbers are little-endian. Every byte is compared or under a checksum. The first block is the text's tokens, four
//! bytes each; the others are those of the cache's [`CacheState`], codes as
//! [`lexico::codes::stored`] has them.

use std::io::Write;
use std::path::{Path, PathBuf};

use lexico::tensor_file::{check_writable, write_atomically_with};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cache::{CacheSpec, CacheState, KvCache, METHODS};
use crate::chat::Message;
use crate::error::{Error, Result, io, refused};
use crate::generate::Finish;
use crate::model::Model;

/// First line of a file: the format, and the version that is written and read.
pub const FORMAT: &str = "lexico-cache/1";
/// Beginning of the first line of any version.
const NAME: &str = "lexico-cache/";

/// Name of the block of tokens.
const TOKENS: &str = "tokens";

/// State of a text that is being generated; by default one of which there is nothing yet.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Tokens so far. The cache holds all but the last.
    #[serde(skip)]
    pub tokens: Vec<u32>,
    /// Number of the first tokens that were given; those after them were generated last.
    pub prompt_tokens: usize,
    /// Reason why the generation stopped.
    pub finish: Finish,
    /// Messages of the conversation; none of plain text.
    pub messages: Vec<Message>,
    /// Seed of the draws.
    pub seed: u64,
    /// Number of random numbers drawn.
    pub draws: u64,
}

/// The header of a file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// Name of the model, for people.
    pub model: String,
    /// [`Model::fingerprint`] of the model.
    pub fingerprint: String,
    /// The cache, as [`CacheSpec`] is written.
    cache: String,
    /// Number of positions of the cache.
    pub positions: usize,
    /// Bytes of a dense FP16 cache of as many positions.
    pub fp16_bytes: usize,
    /// State of the text.
    pub progress: Progress,
    /// [`CacheState::facts`].
    facts: Value,
    blocks: Vec<Block>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Block {
    name: String,
    bytes: usize,
    crc32: u32,
}

/// Fails early where [`save`] would fail late.
///
/// # Errors
/// [`Error::File`] of a cache method that cannot be saved, and where the path is that of another kind of file; those
/// of writing.
pub fn check(path: &Path, spec: &CacheSpec, cache: &dyn KvCache) -> Result<()> {
    if cache.state().is_none() {
        return Err(cannot_be_saved(path, spec));
    }
    if path.metadata().is_ok_and(|there| there.len() > 0) && !SavedGeneration::is_one(path) {
        let reason = "there is a file that is no saved cache; name another";
        return Err(refused(path, reason));
    }
    Ok(check_writable(path)?)
}

/// Reason against the caches of a model that computes on a GPU.
const IN_DEVICE: &str = "caches in a GPU's memory are neither saved nor loaded; use --device cpu";

fn cannot_be_saved(path: &Path, spec: &CacheSpec) -> Error {
    let method = spec.method();
    if method.saves {
        return refused(path, IN_DEVICE);
    }
    let saved = METHODS.iter().filter(|other| other.saves);
    let saved: Vec<String> = saved.map(|other| format!("{:?}", other.name)).collect();
    let (name, saved) = (method.name, saved.join(" and "));
    let reason = format!("caches of method {name:?} cannot be saved, those of method {saved} can");
    refused(path, reason)
}

/// Writes the file, whole or not at all; returns its bytes.
///
/// # Errors
/// [`Error::File`] of a cache method that cannot be saved; those of writing.
pub fn save(
    path: &Path,
    model: &Model,
    spec: &CacheSpec,
    cache: &dyn KvCache,
    progress: &Progress,
) -> Result<usize> {
    let Some(state) = cache.state() else {
        return Err(cannot_be_saved(path, spec));
    };
    let tokens = progress.tokens.iter().flat_map(|token| token.to_le_bytes());
    let tokens = (TOKENS.to_owned(), tokens.collect());
    let blocks: Vec<(String, Vec<u8>)> = std::iter::once(tokens).chain(state.blocks).collect();
    let block = |(name, bytes): &(String, Vec<u8>)| Block {
        name: name.clone(),
        bytes: bytes.len(),
        crc32: crc32fast::hash(bytes),
    };
    let header = Header {
        model: model.name.clone(),
        fingerprint: model.fingerprint()?,
        cache: spec.to_string(),
        positions: cache.len(),
        fp16_bytes: model.decoder.config().fp16_cache_bytes(cache.len()),
        progress: progress.clone(),
        facts: state.facts,
        blocks: blocks.iter().map(block).collect(),
    };
    let json = serde_json::to_vec(&header).map_err(|error| refused(path, error.to_string()))?;
    let length = u32::try_from(json.len());
    let length = length.map_err(|_| refused(path, "its header is too long"))?;
    let mut start = length.to_le_bytes().to_vec();
    start.extend(json);
    let checksum = crc32fast::hash(&start);
    start.extend(checksum.to_le_bytes());
    let first = format!("{FORMAT}\n");
    let mut parts = vec![first.as_bytes(), &start];
    parts.extend(blocks.iter().map(|(_, bytes)| &bytes[..]));
    write_atomically_with(path, |file| {
        parts.iter().try_for_each(|part| file.write_all(part))
    })?;
    Ok(parts.iter().map(|part| part.len()).sum())
}

/// The cache of a file, as its options are called now: earlier versions kept no first positions dense, and did not say so.
fn cache_of(header: &Header) -> String {
    let settings = &header.facts["settings"];
    let cache = &header.cache;
    if !cache.starts_with("lexico") || !settings.is_object() || !settings["sinks"].is_null() {
        return cache.clone();
    }
    let separator = if cache.contains(':') { ',' } else { ':' };
    format!("{cache}{separator}sinks=0")
}

/// A saved generation, read and checked whole.
pub struct SavedGeneration {
    path: PathBuf,
    header: Header,
    spec: CacheSpec,
    /// Names and bytes, in the order of the header.
    blocks: Vec<(String, Vec<u8>)>,
}

impl SavedGeneration {
    /// Returns true of a file that begins as a saved generation of any version does.
    pub fn is_one(path: &Path) -> bool {
        let mut start = [0; NAME.len()];
        let read = std::fs::File::open(path).and_then(|mut file| {
            use std::io::Read;
            file.read_exact(&mut start)
        });
        read.is_ok() && start == *NAME.as_bytes()
    }

    /// Reads a file of [`save`].
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] where it is no such file, of another version, or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.metadata().map_err(io(path))?.is_file() {
            return Err(refused(path, "it is not a regular file"));
        }
        let bytes = std::fs::read(path).map_err(io(path))?;
        let (header, blocks) = parse(&bytes).map_err(|reason| refused(path, reason))?;
        let spec = cache_of(&header).parse().map_err(|error: Error| {
            let reason = format!("its cache {:?} cannot be made here: {error}", header.cache);
            refused(path, reason)
        })?;
        Ok(Self {
            path: path.to_owned(),
            header,
            spec,
            blocks,
        })
    }

    /// Method and options of its cache.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// Model, size and text.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns the bytes of the file's blocks by kind: tokens, codes, the window and added atoms.
    pub fn parts(&self) -> Vec<(&str, usize)> {
        let mut parts: Vec<(&str, usize)> = Vec::new();
        for (name, bytes) in &self.blocks {
            let kind = name.rsplit('.').next().unwrap_or(name);
            match parts.iter_mut().find(|part| part.0 == kind) {
                Some(part) => part.1 += bytes.len(),
                None => parts.push((kind, bytes.len())),
            }
        }
        parts
    }

    /// Returns the cache and the state of the text as they were saved.
    ///
    /// # Errors
    /// [`Error::File`] where the model, its dictionaries or the settings are others, or the file contradicts itself;
    /// those of making such a cache.
    pub fn resume(mut self, model: &Model) -> Result<(Box<dyn KvCache>, Progress)> {
        let refused = |reason: String| refused(&self.path, reason);
        if !model.decoder.device().is_cpu() {
            return Err(refused(IN_DEVICE.to_owned()));
        }
        let fingerprint = model.fingerprint()?;
        if fingerprint != self.header.fingerprint {
            return Err(refused(format!(
                "it is of another model: of {} with fingerprint {}, while {} here has {fingerprint}; load the \
                 model, quantised or not, that it was saved with",
                self.header.model, self.header.fingerprint, model.name
            )));
        }
        let mut cache = model.cache(&self.spec)?;
        let mut progress = self.header.progress;
        self.blocks.remove(0);
        let state = CacheState {
            facts: self.header.facts,
            blocks: self.blocks,
        };
        cache.resume(&state).map_err(refused)?;
        let vocabulary = model.decoder.config().vocabulary;
        let inside = |&token: &u32| (token as usize) < vocabulary;
        let held = [self.header.positions, progress.tokens.len().wrapping_sub(1)];
        if !progress.tokens.iter().all(inside) || held != [cache.len(); 2] {
            return Err(refused(
                "it contradicts itself: its tokens are not those of its cache".to_owned(),
            ));
        }
        progress.prompt_tokens = progress.prompt_tokens.min(progress.tokens.len());
        Ok((cache, progress))
    }
}

/// Returns the header and the blocks of a file, all of it checked.
fn parse(bytes: &[u8]) -> std::result::Result<(Header, Vec<(String, Vec<u8>)>), String> {
    let damaged = |part: &str| {
        format!(
            "it is damaged or cut short: {part}; a copy that is whole is needed, or the prompt anew"
        )
    };
    let Some(after) = bytes.strip_prefix(NAME.as_bytes()) else {
        return Err("it is no saved cache; `lexico run --save-cache` makes one".to_owned());
    };
    let rest = bytes.strip_prefix(FORMAT.as_bytes());
    let Some(rest) = rest.and_then(|rest| rest.strip_prefix(b"\n")) else {
        let line = after
            .split(|&byte| byte == b'\n')
            .next()
            .unwrap_or_default();
        let version = String::from_utf8_lossy(&line[..line.len().min(20)]);
        return Err(format!(
            "it is a saved cache of version {version:?}, and {FORMAT} is read here; use the program that saved it"
        ));
    };
    let short = || damaged("it ends within its header");
    let (length, _) = rest.split_first_chunk().ok_or_else(short)?;
    let end = 4 + u32::from_le_bytes(*length) as usize;
    let (start, rest) = rest.split_at_checked(end).ok_or_else(short)?;
    let (checksum, mut rest) = rest.split_first_chunk().ok_or_else(short)?;
    if crc32fast::hash(start) != u32::from_le_bytes(*checksum) {
        return Err(damaged("its header's checksum differs"));
    }
    let mut header: Header = serde_json::from_slice(&start[4..])
        .map_err(|error| format!("its header cannot be understood: {error}"))?;
    let mut blocks = Vec::with_capacity(header.blocks.len());
    for block in &header.blocks {
        let split = rest.split_at_checked(block.bytes);
        let (bytes, after) = split.ok_or_else(|| damaged("it ends before its last block"))?;
        if crc32fast::hash(bytes) != block.crc32 {
            let part = format!("the checksum of block {:?} differs", block.name);
            return Err(damaged(&part));
        }
        blocks.push((block.name.clone(), bytes.to_vec()));
        rest = after;
    }
    if !rest.is_empty() {
        return Err(damaged("there is more after its last block"));
    }
    match blocks.first() {
        Some((name, bytes)) if name == TOKENS && bytes.len() % 4 == 0 => {
            let tokens = bytes.as_chunks::<4>().0.iter();
            header.progress.tokens = tokens.map(|&b| u32::from_le_bytes(b)).collect();
        }
        _ => return Err(damaged("it has no tokens")),
    }
    Ok((header, blocks))
}
