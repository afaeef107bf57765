//! Prefixes on disk or in an object store, for later starts and for other servers.
//!
//! An object is one prefix, whole, in a file `KEY.prefix`:
//!
//! | bytes | |
//! |---|---|
//! | 16 | `lexico-prefix/1` and a line end |
//! | 4 | bytes of the header, little-endian |
//! | | header: JSON of the key, the facts of the cache, and the name and bytes of each block |
//! | | blocks: the tokens, four bytes each, then the cache's, codes [at rest](lexico::codes::stored) |
//! | 32 | SHA-256 of all before |
//!
//! An object is read only where its key, its tokens, its settings and dictionaries are those of the prompt at hand. Whatever
//! is wrong with one makes it a miss.

use std::collections::HashMap;
use std::path::Path as FilePath;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures::future::join_all;
use lexico::shown::{shown, shown_path};
use lexico_llm::cache::{CacheState, KvCache};
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, RetryConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::blocks::PromptBlocks;
use super::{Key, Prefix, shared_and_own};
use crate::engine::Setup;
use crate::kv_events::KvEvents;
use crate::metrics::Metrics;

const MAGIC: &[u8; 16] = b"lexico-prefix/1\n";
const ENDING: &str = ".prefix";
/// Bytes of the checksum.
const CHECKSUM: usize = 32;
/// Prefixes that are written, and such that are read, at once.
const AT_ONCE: usize = 4;
/// Time that an answer of the store may take, and that all prefixes of a call may.
const PATIENCE: Duration = Duration::from_secs(10);
/// Prefixes of a prompt that are looked for by their names, the longest of those that are not known to be there.
const LOOK_UPS: usize = 16;
/// Time that such a look-up may take: it stands before every long prompt that is new.
const LOOK_UP_PATIENCE: Duration = Duration::from_secs(1);
/// Time for which a store is left alone that did not answer.
const REST: Duration = Duration::from_secs(60);
/// Time between two looks at what others have written.
const LOOK: Duration = Duration::from_secs(10);
/// Age from which a file that was not finished is a leftover.
const LEFTOVER: Duration = Duration::from_secs(3600);

/// A store of prefixes.
#[derive(Clone)]
pub(crate) struct PrefixStore(Arc<Inner>);

struct Inner {
    objects: Arc<dyn ObjectStore>,
    place: Path,
    /// What is there, by key.
    index: Mutex<HashMap<String, Object>>,
    /// When those that are of no use were written: they are not read again, and may be written anew.
    useless: Mutex<HashMap<String, SystemTime>>,
    looking_rests: Rest,
    reading_rests: Rest,
    writing_rests: Rest,
    max_bytes: u64,
    /// Number of tokens of which an object was too large.
    too_long: AtomicUsize,
    writing: AtomicUsize,
    reading: Arc<Semaphore>,
    runtime: tokio::runtime::Handle,
    /// What of it does not work.
    failing: Mutex<Vec<Operation>>,
    /// Whether it was said that prefixes in it were damaged.
    said_damaged: AtomicBool,
    metrics: Arc<Metrics>,
    told: Mutex<Told>,
}

/// What a store is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    List,
    Read,
    Write,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// The prefixes that routers were told of.
struct Told {
    /// The names of the blocks of each, by its own.
    prefixes: HashMap<String, Vec<Key>>,
    blocks: PromptBlocks,
}

/// Time for which a store is left alone that did not do what it was asked.
#[derive(Default)]
struct Rest(Mutex<Option<Instant>>);

impl Rest {
    fn begin(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + REST);
    }

    fn is_on(&self) -> bool {
        let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }
}

struct Object {
    bytes: u64,
    written: SystemTime,
}

impl Object {
    fn of(meta: &ObjectMeta) -> Self {
        Self {
            bytes: meta.size,
            written: meta.last_modified.into(),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    key: String,
    facts: Value,
    blocks: Vec<(String, usize)>,
}

impl PrefixStore {
    /// Opens a folder, which is made where it is not there, or a place in S3.
    ///
    /// # Errors
    /// The reason why it cannot be used.
    pub(crate) async fn open(
        place: &str,
        max_bytes: u64,
        metrics: Arc<Metrics>,
        events: Option<KvEvents>,
    ) -> Result<Self, String> {
        let (objects, path) = open(place)?;
        let medium = if place.starts_with(S3) {
            "EXTERNAL"
        } else {
            "DISK"
        };
        metrics.store_up(true);
        let store = Self(Arc::new(Inner {
            objects,
            place: path,
            index: Mutex::default(),
            useless: Mutex::default(),
            looking_rests: Rest::default(),
            reading_rests: Rest::default(),
            writing_rests: Rest::default(),
            max_bytes,
            too_long: AtomicUsize::new(usize::MAX),
            writing: AtomicUsize::new(0),
            reading: Arc::new(Semaphore::new(AT_ONCE)),
            runtime: tokio::runtime::Handle::current(),
            failing: Mutex::default(),
            said_damaged: AtomicBool::new(false),
            metrics,
            told: Mutex::new(Told {
                prefixes: HashMap::new(),
                blocks: PromptBlocks::new(events, Some(medium)),
            }),
        }));
        store.look().await;
        let looks = Arc::downgrade(&store.0);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                let Some(inner) = looks.upgrade() else {
                    return;
                };
                Self(inner).look().await;
            }
        });
        Ok(store)
    }

    /// Brings the longest prefixes of prompts into memory that are there and that memory does not have.
    pub(crate) async fn fetch(&self, setup: &Arc<Setup>, prompts: &[Vec<u32>]) {
        let all = async {
            for prompt in prompts {
                self.look_up(setup, prompt).await;
                while self.bring(setup, prompt).await {}
            }
        };
        // What has not come by then is read anew.
        let _ = timeout(PATIENCE, all).await;
    }

    /// Looks for prefixes of a prompt by their names, which others may have written since the last look.
    async fn look_up(&self, setup: &Arc<Setup>, prompt: &[u32]) {
        if self.0.looking_rests.is_on() || self.0.reading_rests.is_on() {
            return;
        }
        let keys = setup.root.of_prompt(prompt, setup.chunk);
        let in_memory = setup.prefixes().longest(&keys);
        let unknown: Vec<String> = {
            let (index, useless) = (self.index(), self.useless());
            let names = keys[in_memory..].iter().rev().map(Key::to_string);
            let longer = names.take_while(|name| !index.contains_key(name));
            let unknown = longer.filter(|name| !useless.contains_key(name));
            unknown.take(LOOK_UPS).collect()
        };
        let look_ups = unknown.into_iter().map(|name| async move {
            let meta = self.0.objects.head(&self.path(&name)).await;
            meta.map(|meta| (name, Object::of(&meta)))
        });
        let Ok(found) = timeout(LOOK_UP_PATIENCE, join_all(look_ups)).await else {
            self.0.looking_rests.begin();
            return self.fails(Operation::Read, "a prefix was not looked up in time");
        };
        for found in found {
            match found {
                Ok((name, object)) => drop(self.index().insert(name, object)),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => {
                    self.0.looking_rests.begin();
                    let reason = format!("a prefix could not be looked up: {error}");
                    return self.fails(Operation::Read, &reason);
                }
            }
        }
    }

    /// Brings the longest prefix of a prompt; true where it was of no use, and a shorter one may be there.
    async fn bring(&self, setup: &Arc<Setup>, prompt: &[u32]) -> bool {
        let keys = setup.root.of_prompt(prompt, setup.chunk);
        let missing = || {
            if self.0.reading_rests.is_on() {
                return None;
            }
            let index = self.index();
            let stored = |(at, key): (usize, &Key)| {
                let object = index.get(&key.to_string())?;
                Some((at + 1, object.bytes))
            };
            let (number, bytes) = keys.iter().enumerate().rev().find_map(stored)?;
            drop(index);
            (number > setup.prefixes().longest(&keys)).then_some((number, bytes))
        };
        if missing().is_none() {
            return false;
        }
        let Ok(turn) = Arc::clone(&self.0.reading).acquire_owned().await else {
            return false;
        };
        // Another request may have brought it meanwhile.
        let Some((number, bytes)) = missing() else {
            return false;
        };
        let keys = keys[..number].to_vec();
        let Some(key) = keys.last().copied() else {
            return false;
        };
        // What there is no memory for is not read to be thrown away.
        let room = setup.prefixes().make_room(bytes as usize);
        let Some(room) = room else {
            return false;
        };
        let read = async {
            let object = self.0.objects.get(&self.path(&key.to_string())).await?;
            object.bytes().await
        };
        let bytes = match timeout(PATIENCE / 2, read).await {
            Ok(Ok(bytes)) => {
                self.works(Operation::Read);
                bytes
            }
            Ok(Err(object_store::Error::NotFound { .. })) => {
                self.index().remove(&key.to_string());
                return true;
            }
            Ok(Err(error)) => {
                self.0.reading_rests.begin();
                let reason = format!("a prefix could not be read: {error}");
                self.fails(Operation::Read, &reason);
                return false;
            }
            Err(_) => {
                self.0.reading_rests.begin();
                self.fails(Operation::Read, "a prefix was not read in time");
                return false;
            }
        };
        let tokens = prompt[..number * setup.chunk].to_vec();
        let own = Arc::clone(setup);
        let (names, read) = (keys.clone(), tokens.clone());
        let resumed = tokio::task::spawn_blocking(move || {
            // The work goes on where the client leaves, and so its turn ends here.
            let _turn = turn;
            let cache = resume(&own, key, &tokens, &bytes)?;
            drop((bytes, room));
            let mut prefixes = own.prefixes();
            let (coded, _) = shared_and_own(cache.as_ref());
            let Some(codes) = prefixes.make_room(coded) else {
                return Ok(());
            };
            let prefix = Prefix {
                positions: tokens.len(),
                cache,
                chunks: vec![Arc::new(codes)],
            };
            keys.iter().for_each(|&key| prefixes.see(key));
            prefixes.keep(&keys, prefix, &tokens);
            Ok(())
        });
        let reason = match resumed.await {
            Ok(Ok(())) => {
                self.tell(&names, &read);
                return false;
            }
            Ok(Err(reason)) => reason,
            Err(panic) => panic.to_string(),
        };
        if let Some(object) = self.index().remove(&key.to_string()) {
            self.useless().insert(key.to_string(), object.written);
        }
        let reason = format!("{key}{ENDING} is of no use, and the prompt is read anew: {reason}");
        if !self.0.said_damaged.swap(true, SeqCst) {
            let reason = shown(reason);
            tracing::warn!(reason, "a prefix of the store is not as it should be");
        }
        true
    }

    /// Writes a prefix in the background, unless it is there or too many are being written.
    pub(crate) fn write(&self, keys: &[Key], prefix: &Prefix, tokens: &[u32]) {
        let Some(&key) = keys.last() else {
            return;
        };
        let there = self.index().contains_key(&key.to_string());
        let too_long = tokens.len() >= self.0.too_long.load(SeqCst);
        if there {
            self.tell(keys, tokens);
        }
        if there || too_long || self.0.writing_rests.is_on() {
            return;
        }
        let store = self.clone();
        if store.0.writing.fetch_add(1, SeqCst) >= AT_ONCE {
            store.0.writing.fetch_sub(1, SeqCst);
            return;
        }
        let (prefix, tokens, keys) = (prefix.fork(), tokens.to_vec(), keys.to_vec());
        self.0.runtime.spawn(async move {
            let own = tokens.clone();
            let made = move || object(key, &prefix?, &own);
            let bytes = tokio::task::spawn_blocking(made).await;
            if let Ok(Some(bytes)) = bytes
                && store.put(key, tokens.len(), bytes).await
            {
                store.tell(&keys, &tokens);
                store.shrink().await;
            }
            store.0.writing.fetch_sub(1, SeqCst);
        });
    }

    /// Writes an object of a prefix of so many tokens; true where it is there.
    async fn put(&self, key: Key, tokens: usize, bytes: Vec<u8>) -> bool {
        let size = bytes.len() as u64;
        if size > self.0.max_bytes {
            self.0.too_long.fetch_min(tokens, SeqCst);
            return false;
        }
        let key = key.to_string();
        let path = self.path(&key);
        let written = self.0.objects.put(&path, bytes.into());
        match timeout(PATIENCE, written).await {
            Ok(Ok(_)) => self.works(Operation::Write),
            Ok(Err(error)) => {
                self.0.writing_rests.begin();
                let reason = format!("a prefix could not be written: {error}");
                self.fails(Operation::Write, &reason);
                return false;
            }
            Err(_) => {
                self.0.writing_rests.begin();
                self.fails(Operation::Write, "a prefix was not written in time");
                return false;
            }
        }
        let now = Object {
            bytes: size,
            written: SystemTime::now(),
        };
        self.useless().remove(&key);
        self.index().insert(key, now);
        true
    }

    /// Tells routers that the prefix of these tokens, whose blocks have these names, is here.
    fn tell(&self, keys: &[Key], tokens: &[u32]) {
        let mut told = self.told();
        if let (true, Some(key)) = (told.blocks.are_told(), keys.last())
            && told
                .prefixes
                .insert(key.to_string(), keys.to_vec())
                .is_none()
        {
            told.blocks.add(keys, tokens);
        }
    }

    /// Tells routers of those that are here no more.
    fn tell_gone(&self, is_here: impl Fn(&str) -> bool) {
        let mut told = self.told();
        let Told { prefixes, blocks } = &mut *told;
        prefixes.retain(|key, keys| {
            let here = is_here(key);
            if !here {
                blocks.remove(keys);
            }
            here
        });
    }

    /// Waits until all that is being written is written, or a while.
    pub(crate) async fn flush(&self) {
        let written = async {
            while self.0.writing.load(SeqCst) > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let _ = timeout(PATIENCE, written).await;
    }

    /// Removes the oldest prefixes beyond the size that is allowed.
    async fn shrink(&self) {
        loop {
            let oldest = {
                let index = self.index();
                let bytes: u64 = index.values().map(|object| object.bytes).sum();
                if bytes <= self.0.max_bytes {
                    return;
                }
                let oldest = index.iter().min_by_key(|(_, object)| object.written);
                oldest.map(|(key, _)| key.clone())
            };
            let Some(key) = oldest else {
                return;
            };
            self.index().remove(&key);
            self.tell_gone(|other| other != key);
            // Another server may have removed it; what stays is seen again at the next look.
            let _ = timeout(PATIENCE, self.0.objects.delete(&self.path(&key))).await;
        }
    }

    /// Takes note of what is there.
    async fn look(&self) {
        let place = Some(&self.0.place).filter(|place| !place.as_ref().is_empty());
        // What lies in folders below is not of this store.
        let listed = self.0.objects.list_with_delimiter(place);
        let listed = match timeout(PATIENCE, listed).await {
            Ok(Ok(listed)) => listed,
            Ok(Err(error)) => {
                return self.fails(Operation::List, &format!("it cannot be listed: {error}"));
            }
            Err(_) => return self.fails(Operation::List, "it was not listed in time"),
        };
        self.works(Operation::List);
        let found = listed.objects.into_iter().filter_map(|meta| {
            let key = meta.location.filename()?.strip_suffix(ENDING)?.to_owned();
            Some((key, Object::of(&meta)))
        });
        let mut found: HashMap<String, Object> = found.collect();
        let mut useless = self.useless();
        useless.retain(|key, written| found.get(key).is_some_and(|o| o.written == *written));
        found.retain(|key, _| !useless.contains_key(key));
        self.tell_gone(|key| found.contains_key(key));
        *self.index() = found;
    }

    fn path(&self, key: &str) -> Path {
        self.0.place.clone().join(format!("{key}{ENDING}"))
    }

    fn useless(&self) -> MutexGuard<'_, HashMap<String, SystemTime>> {
        let useless = self.0.useless.lock();
        useless.unwrap_or_else(PoisonError::into_inner)
    }

    fn index(&self) -> MutexGuard<'_, HashMap<String, Object>> {
        self.0.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failing(&self) -> MutexGuard<'_, Vec<Operation>> {
        let failing = self.0.failing.lock();
        failing.unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what it did not do, and says so where all went well before.
    fn fails(&self, operation: Operation, reason: &str) {
        self.0.metrics.store_error(operation.name());
        let mut failing = self.failing();
        if failing.is_empty() {
            let reason = shown(reason);
            tracing::warn!(
                reason,
                "the prefix store does not do what it is asked; texts are written without it"
            );
        }
        if !failing.contains(&operation) {
            failing.push(operation);
        }
        self.0.metrics.store_up(false);
    }

    /// Notes what it did, and says so where nothing else has failed since the line that told of a fault.
    fn works(&self, operation: Operation) {
        let mut failing = self.failing();
        if failing.is_empty() {
            return;
        }
        // Whether what can be listed can be read shows at the next text, which may be long in coming.
        failing.retain(|&other| {
            other != operation && (operation, other) != (Operation::List, Operation::Read)
        });
        if failing.is_empty() {
            self.0.metrics.store_up(true);
            tracing::info!("the prefix store does what it is asked again");
        }
    }
}

/// The beginning of the names of places in S3, and in what speaks as it does.
const S3: &str = "s3://";

/// The store at a place, and the path of what is kept in it.
fn open(place: &str) -> Result<(Arc<dyn ObjectStore>, Path), String> {
    if let Some(place) = place.strip_prefix(S3) {
        return open_s3(place);
    }
    if place.contains("://") {
        return Err(format!(
            "{}: only folders and s3://BUCKET/FOLDER can be prefix stores",
            shown(place)
        ));
    }
    let folder = FilePath::new(place);
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", shown_path(folder));
    std::fs::create_dir_all(folder).map_err(|e| failed(&e))?;
    remove_leftovers(folder);
    let files = LocalFileSystem::new_with_prefix(folder).map_err(|e| failed(&e))?;
    Ok((Arc::new(files), Path::default()))
}

/// A bucket, with a folder after a slash where there is one. Keys, region and endpoint are those of the usual variables:
/// `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`, `AWS_ALLOW_HTTP`.
fn open_s3(place: &str) -> Result<(Arc<dyn ObjectStore>, Path), String> {
    let (bucket, folder) = place.split_once('/').unwrap_or((place, ""));
    let failed =
        |reason: &dyn std::fmt::Display| format!("{S3}{}: {}", shown(place), shown(reason));
    if bucket.is_empty() {
        return Err(failed(
            &"it names no bucket; write s3://BUCKET or s3://BUCKET/FOLDER",
        ));
    }
    let path = Path::parse(folder.trim_end_matches('/')).map_err(|e| failed(&e))?;
    // Where another is set already it serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let bucket = AmazonS3Builder::from_env().with_bucket_name(bucket);
    // Beyond a while the prompt is read anew rather than that the store is asked again.
    let retries = RetryConfig {
        retry_timeout: PATIENCE,
        ..RetryConfig::default()
    };
    let store = bucket.with_retry(retries).build().map_err(|e| failed(&e))?;
    Ok((Arc::new(store), path))
}

/// Removes what was being written when a server was killed: files that have the ending and a number.
fn remove_leftovers(folder: &FilePath) {
    let Ok(entries) = folder.read_dir() else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let ours = name.to_string_lossy().contains(&format!("{ENDING}#"));
        let modified = entry.metadata().and_then(|meta| meta.modified());
        let old = modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > LEFTOVER));
        if ours && old {
            // It does no harm where it stays.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// The bytes of an object; `None` of a cache that cannot be saved.
fn object(key: Key, prefix: &Prefix, tokens: &[u32]) -> Option<Vec<u8>> {
    let state = prefix.cache.state()?;
    let tokens = tokens.iter().flat_map(|token| token.to_le_bytes());
    let tokens = ("tokens".to_owned(), tokens.collect::<Vec<u8>>());
    let blocks: Vec<(String, Vec<u8>)> = std::iter::once(tokens).chain(state.blocks).collect();
    let header = Header {
        key: key.to_string(),
        facts: state.facts,
        blocks: blocks
            .iter()
            .map(|(name, bytes)| (name.clone(), bytes.len()))
            .collect(),
    };
    let header = serde_json::to_vec(&header).ok()?;
    let mut object = MAGIC.to_vec();
    object.extend(u32::try_from(header.len()).ok()?.to_le_bytes());
    object.extend(header);
    blocks.iter().for_each(|(_, bytes)| object.extend(bytes));
    let checksum = Sha256::digest(&object);
    object.extend(checksum);
    Some(object)
}

/// The cache of an object, where that is the prefix of this name and these tokens.
fn resume(
    setup: &Setup,
    key: Key,
    tokens: &[u32],
    object: &[u8],
) -> Result<Box<dyn KvCache>, String> {
    let (header, blocks) = parse(object)?;
    if header.key != key.to_string() {
        return Err("it is another prefix".to_owned());
    }
    let mut blocks = blocks.into_iter();
    let own = tokens.iter().flat_map(|token| token.to_le_bytes());
    let Some((_, stored)) = blocks.next() else {
        return Err("it has no tokens".to_owned());
    };
    if !own.eq(stored) {
        return Err("its tokens are not those of the prompt".to_owned());
    }
    let state = CacheState {
        facts: header.facts,
        blocks: blocks.collect(),
    };
    let mut cache = setup.model.cache(&setup.spec).map_err(|e| e.to_string())?;
    cache.resume(&state)?;
    match cache.len() == tokens.len() {
        true => Ok(cache),
        false => Err("it holds another number of positions".to_owned()),
    }
}

/// Names and bytes of the blocks of an object.
type Blocks = Vec<(String, Vec<u8>)>;

fn parse(object: &[u8]) -> Result<(Header, Blocks), String> {
    let damaged = || "it is damaged or cut short".to_owned();
    let (content, checksum) = object
        .len()
        .checked_sub(CHECKSUM)
        .map(|at| object.split_at(at))
        .ok_or_else(damaged)?;
    let Some(rest) = content.strip_prefix(MAGIC) else {
        return Err("it is no prefix of this version".to_owned());
    };
    if Sha256::digest(content).as_slice() != checksum {
        return Err(damaged());
    }
    let (length, rest) = rest.split_first_chunk().ok_or_else(damaged)?;
    let length = u32::from_le_bytes(*length) as usize;
    let (header, mut rest) = rest.split_at_checked(length).ok_or_else(damaged)?;
    let header: Header = serde_json::from_slice(header).map_err(shown)?;
    let mut blocks = Vec::with_capacity(header.blocks.len());
    for (name, bytes) in &header.blocks {
        let (block, after) = rest.split_at_checked(*bytes).ok_or_else(damaged)?;
        blocks.push((name.clone(), block.to_vec()));
        rest = after;
    }
    if !rest.is_empty() {
        return Err(damaged());
    }
    Ok((header, blocks))
}
