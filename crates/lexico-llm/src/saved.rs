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

use crate::cache::{CacheSpec, CacheState, KvCache};
use crate::chat::Message;
use crate::error::{Error, Result, io};
use crate::generate::Finish;
use crate::model::Model;

/// What a file's first line says: the format, and the version that is written and read.
pub const FORMAT: &str = "lexico-cache/1";
/// The first line of any version begins so.
const NAME: &str = "lexico-cache/";

/// The name of the block of tokens.
const TOKENS: &str = "tokens";

/// How far a generation has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// The text so far. The cache holds all of it but the last token.
    #[serde(skip)]
    pub tokens: Vec<u32>,
    /// How many of the first tokens were given; those after them are what was generated from them.
    pub prompt_tokens: usize,
    /// Why the generation stopped.
    pub finish: Finish,
    /// The conversation, where it is one.
    pub messages: Vec<Message>,
    /// Seed of the draws.
    pub seed: u64,
    /// How many random numbers were drawn.
    pub draws: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    /// The model's name, for people.
    model: String,
    /// [`Model::fingerprint`].
    fingerprint: String,
    /// The cache, as [`CacheSpec`] is written.
    cache: String,
    positions: usize,
    /// What they take in a dense FP16 cache.
    fp16_bytes: usize,
    progress: Progress,
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
/// [`Error::Saved`] of a cache method that cannot be saved, and where the path is that of another kind of file; those
/// of writing.
pub fn check(path: &Path, spec: &CacheSpec, cache: &dyn KvCache) -> Result<()> {
    if cache.state().is_none() {
        return Err(cannot_be_saved(path, spec));
    }
    if path.metadata().is_ok_and(|there| there.len() > 0) && !SavedGeneration::is_one(path) {
        return Err(Error::Saved {
            path: path.to_owned(),
            reason: "it is there and no saved cache; name another file".to_owned(),
        });
    }
    Ok(check_writable(path)?)
}

/// Why caches of a model that computes elsewhere are neither saved nor loaded.
const IN_DEVICE: &str = "caches in a GPU's memory are neither saved nor loaded; use --device cpu";

fn cannot_be_saved(path: &Path, spec: &CacheSpec) -> Error {
    Error::Saved {
        path: path.to_owned(),
        reason: match spec.method().name {
            "lexico" => IN_DEVICE.to_owned(),
            name => {
                format!("caches of method {name:?} cannot be saved, those of method \"lexico\" can")
            }
        },
    }
}

/// Writes the file, whole or not at all; returns its bytes.
///
/// # Errors
/// [`Error::Saved`] of a cache method that cannot be saved; those of writing.
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
    let header = Header {
        model: model.name.clone(),
        fingerprint: model.fingerprint()?,
        cache: spec.to_string(),
        positions: cache.len(),
        fp16_bytes: model.decoder.config().fp16_cache_bytes(cache.len()),
        progress: progress.clone(),
        facts: state.facts,
        blocks: blocks
            .iter()
            .map(|(name, bytes)| Block {
                name: name.clone(),
                bytes: bytes.len(),
                crc32: crc32fast::hash(bytes),
            })
            .collect(),
    };
    let refused = |reason: String| Error::Saved {
        path: path.to_owned(),
        reason,
    };
    let json = serde_json::to_vec(&header).map_err(|error| refused(error.to_string()))?;
    let length = u32::try_from(json.len()).map_err(|_| refused("its header is too long".into()))?;
    let mut start = length.to_le_bytes().to_vec();
    start.extend(json);
    let checksum = crc32fast::hash(&start);
    start.extend(checksum.to_le_bytes());
    let first = format!("{FORMAT}\n");
    let total =
        first.len() + start.len() + blocks.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
    write_atomically_with(path, |file| {
        file.write_all(first.as_bytes())?;
        file.write_all(&start)?;
        blocks
            .iter()
            .try_for_each(|(_, bytes)| file.write_all(bytes))
    })?;
    Ok(total)
}

/// A saved generation, read and checked whole.
pub struct SavedGeneration {
    path: PathBuf,
    header: Header,
    spec: CacheSpec,
    /// In the order of the header.
    blocks: Vec<(String, Vec<u8>)>,
}

impl SavedGeneration {
    /// Whether a file begins as a saved generation of any version does.
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
    /// [`Error::Io`]; [`Error::Saved`] where it is no such file, of another version, or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let refused = |reason: String| Error::Saved {
            path: path.to_owned(),
            reason,
        };
        if !path.metadata().map_err(io(path))?.is_file() {
            return Err(refused("it is not a regular file".to_owned()));
        }
        let bytes = std::fs::read(path).map_err(io(path))?;
        let (header, blocks) = parse(&bytes).map_err(refused)?;
        let spec = header.cache.parse().map_err(|error: Error| {
            refused(format!(
                "its cache {:?} cannot be made here: {error}",
                header.cache
            ))
        })?;
        Ok(Self {
            path: path.to_owned(),
            header,
            spec,
            blocks,
        })
    }

    /// The cache that it is of.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// The name of the model that it is of.
    pub fn model(&self) -> &str {
        &self.header.model
    }

    /// [`Model::fingerprint`] of the model that it is of.
    pub fn fingerprint(&self) -> &str {
        &self.header.fingerprint
    }

    /// Positions that the cache held.
    pub fn positions(&self) -> usize {
        self.header.positions
    }

    /// What they take in a dense FP16 cache.
    pub fn fp16_bytes(&self) -> usize {
        self.header.fp16_bytes
    }

    /// How far the generation has come.
    pub fn progress(&self) -> &Progress {
        &self.header.progress
    }

    /// Bytes of the file's blocks by kind: tokens, codes, the window and added atoms.
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

    /// The cache as it was, and how far the generation had come.
    ///
    /// # Errors
    /// [`Error::Saved`] where it is of another model, of other dictionaries or settings, or contradicts itself; those
    /// of making such a cache.
    pub fn resume(mut self, model: &Model) -> Result<(Box<dyn KvCache>, Progress)> {
        let path = self.path.clone();
        let refused = |reason: String| Error::Saved {
            path: path.clone(),
            reason,
        };
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
        let outside = progress
            .tokens
            .iter()
            .any(|&token| token as usize >= vocabulary);
        if outside
            || cache.len() != self.header.positions
            || cache.len() + 1 != progress.tokens.len()
        {
            return Err(refused(
                "it contradicts itself: its tokens are not those of its cache".to_owned(),
            ));
        }
        progress.prompt_tokens = progress.prompt_tokens.min(progress.tokens.len());
        Ok((cache, progress))
    }
}

/// The header and the blocks of a file, all of it checked.
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
            return Err(damaged(&format!(
                "the checksum of block {:?} differs",
                block.name
            )));
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
