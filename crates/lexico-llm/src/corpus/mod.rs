//! Texts to learn from: files, folders, data sets of the hub and what is piped in, cut into chunks.

mod find;
mod json;
mod parquet;
mod stream;
mod text;

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result, refused};
use crate::tokenizer::Tokenizer;
use stream::Stream;

/// Bytes that are tokenised at once: tokenizers take many times a text's size.
const PIECE: usize = 1 << 16;
/// Bytes of a token in prose, about.
const TOKEN: usize = 4;
/// Min chunks that a block is meant to fill.
const BLOCK_CHUNKS: usize = 4;
/// Places that a text is read at, about, however many tokens are asked for.
const PLACES: usize = 1024;
/// Distance from where a text is to be cut in which a line end or a space is looked for.
const LOOK: usize = 4096;
/// The longest line, and the largest list, of JSON: each is held in memory as a whole.
const MAX_JSON: u64 = 1 << 28;

/// A file of texts that can be entered anywhere.
trait Texts: Send + Sync {
    /// Bytes of the whole, as a measure of how much text there is.
    fn length(&self) -> u64;

    /// The text of a block of these bytes; blocks of one length that lie end to end yield every text
    /// once. The last one may reach past the end.
    fn read(&self, block: Range<u64>) -> Result<String>;
}

/// Texts to learn from: files, folders, data sets of the hub and what is piped in, cut into chunks.
///
/// Files are read in blocks of a few chunks, one at a time, so that memory does not grow with them. The
/// blocks are visited in steps of the golden ratio of their count, from one that the seed names: at every
/// moment those read so far lie evenly over all files, and wherever the tokens asked for are reached, text
/// from everywhere was seen and all text was equally likely to be. What surely fits, having no more bytes
/// than tokens are asked for, is read from beginning to end. The same texts, settings and seed give the
/// same chunks.
pub struct Corpus {
    names: Vec<String>,
    files: Vec<Box<dyn Texts>>,
    /// Path of each file.
    paths: Vec<PathBuf>,
    /// Streams, which can be read but once: stdin (`-`) and pipes.
    streams: Vec<PathBuf>,
    /// The field of every line of a stream; without one it is plain text.
    stream_field: Option<String>,
    skipped: Vec<String>,
}

impl Corpus {
    /// Opens each of `inputs`: a file, a folder of files, `-` for stdin, or a data set on the hub (see
    /// [`DatasetName`](crate::hub::DatasetName)), which is downloaded where the cache lacks it, with
    /// bars on stderr where `progress` says so.
    ///
    /// `.parquet` files give their column `field`, `.jsonl`, `.ndjson` and `.json` files the field of that
    /// name of every object, by default `text`; any other file is plain text. Folders are walked in sorted
    /// order, and what in them is neither these nor `.txt`, `.text`, `.raw` or `.tokens` is
    /// [skipped](Corpus::skipped). Stdin and pipes are plain text, or lines of JSON where a `field` is named.
    ///
    /// Every file's beginning is read, so that what cannot be used is found before anything is computed.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Hub`], and [`Error::File`] where an input holds no text, is not UTF-8, or
    /// not what its name says.
    pub fn open(inputs: &[impl AsRef<Path>], field: Option<&str>, progress: bool) -> Result<Self> {
        let mut corpus = Self {
            names: Vec::new(),
            files: Vec::new(),
            paths: Vec::new(),
            streams: Vec::new(),
            stream_field: field.map(str::to_owned),
            skipped: Vec::new(),
        };
        let field = field.unwrap_or("text");
        for input in inputs {
            let input = input.as_ref();
            let found = match find::find(input, progress)? {
                find::Source::Files(found) => found,
                find::Source::Stream(_) if corpus.streams.iter().any(|s| s == input) => {
                    return Err(refused(input, "it can be read but once"));
                }
                find::Source::Stream(name) => {
                    corpus.names.push(name);
                    corpus.streams.push(input.to_owned());
                    continue;
                }
            };
            let mut with_text = false;
            let mut with_field = false;
            for path in &found.files {
                let format = find::Format::of(path).unwrap_or(find::Format::Text);
                let file: Box<dyn Texts> = match format {
                    find::Format::Text => Box::new(text::TextFile::open(path)?),
                    find::Format::Json => json::open(path, field)?,
                    find::Format::Parquet => Box::new(parquet::ParquetFile::open(path, field)?),
                };
                with_field |= format != find::Format::Text;
                with_text |= has_text(file.as_ref())?;
                corpus.files.push(file);
            }
            if !with_text {
                return Err(refused(input, "it holds no text"));
            }
            corpus.names.push(if with_field {
                format!("{} ({field})", found.name)
            } else {
                found.name
            });
            corpus.paths.extend(found.files);
            corpus.skipped.extend(found.skipped);
        }
        Ok(corpus)
    }

    /// Name of each input in a dictionary file: files without their folders, data sets with their commit.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The files that are read; stdin and pipes are none.
    #[must_use]
    pub fn files(&self) -> Vec<&Path> {
        self.paths.iter().map(PathBuf::as_path).collect()
    }

    /// Files of folders and data sets whose extension is of no text.
    #[must_use]
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    /// Cuts the texts into chunks of `context` tokens, at most `tokens` in all.
    ///
    /// Every chunk begins with what the tokenizer begins a text with; only the last one may be shorter.
    /// Texts follow each other in a chunk, with a blank line between them where the format tells them
    /// apart. Stdin and pipes come first, from their beginning, each with an even share of the
    /// inputs' tokens.
    ///
    /// Chunks that were already used are passed over by [`Iterator::skip`], at the cost of tokenising them.
    ///
    /// # Errors
    /// [`Error::File`] where there is less than two chunks of text; those of reading, here and from the
    /// iterator, after which it ends.
    pub fn chunks<'a>(
        &'a self,
        tokenizer: &'a Tokenizer,
        context: usize,
        tokens: usize,
        seed: u64,
    ) -> Result<Chunks<'a>> {
        self.chunks_with_longer(tokenizer, context, 1, tokens, seed)
    }

    /// [`Corpus::chunks`] of which one of nine has the tokens of `times` others.
    ///
    /// # Errors
    /// Those of [`Corpus::chunks`].
    pub fn chunks_with_longer<'a>(
        &'a self,
        tokenizer: &'a Tokenizer,
        context: usize,
        times: usize,
        tokens: usize,
        seed: u64,
    ) -> Result<Chunks<'a>> {
        let times = times.max(1);
        let begin = tokenizer.encode_first("")?;
        let body = context.saturating_sub(begin.len()).max(1);
        let wanted = tokens / context.max(1);
        // A longer chunk is of one place too, or nearly.
        let block = TOKEN * context * (wanted / PLACES).max(BLOCK_CHUNKS).max(times);
        let streams = self.streams.iter().enumerate().map(|(number, path)| {
            let until = wanted * body * (number + 1) / self.names.len();
            Ok((Stream::open(path, self.stream_field.clone())?, until))
        });
        let mut chunks = Chunks {
            tokenizer,
            begin,
            body,
            times,
            wanted: chunks_of(wanted, times),
            given: 0,
            given_tokens: 0,
            streams: streams.collect::<Result<_>>()?,
            blocks: Blocks::new(&self.files, block as u64, tokens as u64, seed),
            text: String::new(),
            place: 0,
            tokens: VecDeque::new(),
            bytes: 0,
            read: 0,
        };
        chunks.fill(body + 1)?;
        let found = chunks.tokens.len();
        if found <= body {
            let reason = if found == 0 {
                "it holds no text".to_owned()
            } else {
                format!(
                    "too little text: its {found} tokens fill less than two chunks of {context}; add text or \
                     lower --context"
                )
            };
            return Err(refused(Path::new(&self.names.join(", ")), reason));
        }
        Ok(chunks)
    }
}

/// Of so many chunks one may be longer than the others.
pub(crate) const LONG_EVERY: usize = 9;

/// Returns whether chunk `number` is a longer one, where there are some.
fn is_long(number: usize) -> bool {
    number % LONG_EVERY == LONG_EVERY / 2
}

/// Counts the chunks that have the tokens of `short` short ones in all, or fewer.
fn chunks_of(short: usize, times: usize) -> usize {
    let cycles = short / (LONG_EVERY - 1 + times);
    let mut left = short % (LONG_EVERY - 1 + times);
    let mut count = cycles * LONG_EVERY;
    loop {
        let next = if is_long(count) { times } else { 1 };
        if next > left {
            return count;
        }
        left -= next;
        count += 1;
    }
}

/// The chunks of a [`Corpus`].
pub struct Chunks<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens that every chunk begins with.
    begin: Vec<u32>,
    /// The tokens of a chunk after that.
    body: usize,
    /// How many times the tokens of the others some chunks have; see [`LONG_EVERY`].
    times: usize,
    wanted: usize,
    given: usize,
    given_tokens: usize,
    /// Rest of the streams, each with the count of tokens read at which it has had its share.
    streams: VecDeque<(Stream, usize)>,
    blocks: Blocks<'a>,
    /// Text that is read, of which all from `place` on is to be tokenised.
    text: String,
    place: usize,
    tokens: VecDeque<u32>,
    /// Bytes that were tokenised, and the tokens that they gave.
    bytes: usize,
    read: usize,
}

impl Chunks<'_> {
    /// Estimates the tokens that all chunks are likely to have together; exact once the last one is given.
    #[must_use]
    pub fn total(&self) -> usize {
        let left = self.text.len() - self.place;
        let ended = left == 0 && self.streams.is_empty() && self.blocks.left == 0;
        if self.given == self.wanted || (ended && self.tokens.is_empty()) {
            return self.given_tokens;
        }
        let long = (0..self.wanted).filter(|&number| is_long(number)).count();
        let bodies = self.wanted + long * (self.times - 1);
        let most = self.wanted * self.begin.len() + bodies * self.body;
        if !self.streams.is_empty() {
            return most;
        }
        let bytes = self.bytes as f64;
        let of_text = self.read as f64 * (bytes + left as f64) / bytes.max(1.0);
        let visited = (self.blocks.count - self.blocks.left).max(1);
        let of_all = of_text * self.blocks.count as f64 / visited as f64;
        let chunks = of_all / self.body as f64;
        let tokens = of_all + chunks.ceil() * self.begin.len() as f64;
        (tokens as usize).clamp(self.given_tokens + 1, most)
    }

    /// Reads until there are `count` tokens, or no more text.
    fn fill(&mut self, count: usize) -> Result<()> {
        while self.tokens.len() < count {
            if self.place == self.text.len() {
                match self.next_text()? {
                    Some(text) => self.text = text,
                    None => break,
                }
                self.place = 0;
            }
            let rest = &self.text[self.place..];
            let piece = &rest[..piece(rest)];
            let tokens = self.tokenizer.encode_more(piece)?;
            self.place += piece.len();
            self.bytes += piece.len();
            self.read += tokens.len();
            self.tokens.extend(tokens);
            if let Some((_, until)) = self.streams.front()
                && self.read > *until
            {
                let over = self.read - until;
                self.tokens.truncate(self.tokens.len() - over);
                self.read = *until;
                self.place = self.text.len();
            }
        }
        Ok(())
    }

    fn next_text(&mut self) -> Result<Option<String>> {
        while let Some((stream, until)) = self.streams.front_mut() {
            if self.read < *until
                && let Some(text) = stream.next()?
            {
                return Ok(Some(text));
            }
            self.streams.pop_front();
        }
        self.blocks.next()
    }
}

impl Iterator for Chunks<'_> {
    type Item = Result<Vec<u32>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.given == self.wanted {
            return None;
        }
        let body = match is_long(self.given) {
            true => self.body * self.times,
            false => self.body,
        };
        // One more than is given says whether more is to come.
        if let Err(error) = self.fill(body + 1) {
            self.wanted = self.given;
            return Some(Err(error));
        }
        let count = body.min(self.tokens.len());
        if count == 0 {
            return None;
        }
        let body = self.tokens.drain(..count);
        let chunk: Vec<u32> = self.begin.iter().copied().chain(body).collect();
        self.given += 1;
        self.given_tokens += chunk.len();
        Some(Ok(chunk))
    }
}

/// All files cut into blocks, and the order in which they are read.
struct Blocks<'a> {
    files: &'a [Box<dyn Texts>],
    /// Bytes of a block.
    size: u64,
    /// Number of blocks up to the end of each file.
    ends: Vec<u64>,
    count: u64,
    next: u64,
    step: u64,
    left: u64,
}

impl<'a> Blocks<'a> {
    fn new(files: &'a [Box<dyn Texts>], size: u64, tokens: u64, seed: u64) -> Self {
        let size = size.max(1);
        let mut ends = Vec::with_capacity(files.len());
        let (mut count, mut bytes) = (0_u64, 0_u64);
        for file in files {
            count = count.saturating_add(file.length().div_ceil(size));
            bytes = bytes.saturating_add(file.length());
            ends.push(count);
        }
        // A token has a byte at the least.
        let (next, step) = if bytes <= tokens {
            (0, 1)
        } else {
            let first = ChaCha8Rng::seed_from_u64(seed).random_range(0..count);
            (first, golden_step(count))
        };
        Self {
            files,
            size,
            ends,
            count,
            next,
            step,
            left: count,
        }
    }

    fn next(&mut self) -> Result<Option<String>> {
        if self.left == 0 {
            return Ok(None);
        }
        let block = self.next;
        self.next = ((u128::from(block) + u128::from(self.step)) % u128::from(self.count)) as u64;
        self.left -= 1;
        let file = self.ends.partition_point(|&end| end <= block);
        let first = file.checked_sub(1).map_or(0, |before| self.ends[before]);
        let start = (block - first) * self.size;
        let block = start..start.saturating_add(self.size);
        self.files[file].read(block).map(Some)
    }
}

/// The step near the golden ratio of `count` that comes by every number below it.
fn golden_step(count: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let mut step = ((count as f64 * 0.618_033_988_749_895) as u64).max(1);
    while gcd(count, step) != 1 {
        step += 1;
    }
    step
}

/// The length of the first piece of `text` to tokenise: all, or up to the last line end, space or
/// character in [`PIECE`] bytes.
fn piece(text: &str) -> usize {
    if text.len() <= PIECE {
        return text.len();
    }
    let most = text.floor_char_boundary(PIECE);
    if let Some(end) = text[..most].rfind('\n') {
        // Line ends that follow each other may be one token.
        let more = text[end..].bytes().take_while(|&b| b == b'\n').count();
        return end + more;
    }
    match text[..most].rfind(' ') {
        Some(space) if space > 0 => space,
        _ => most,
    }
}

/// Finds where text that begins with `bytes` is best cut after its first byte: behind the first line end, else
/// before the first space, else before the next character.
fn cut(bytes: &[u8]) -> usize {
    let bytes = &bytes[..bytes.len().min(LOOK)];
    if let Some(end) = bytes.iter().position(|&b| b == b'\n') {
        return end + 1;
    }
    if let Some(space) = bytes.iter().position(|&b| b == b' ') {
        return space;
    }
    let begins = |&b: &u8| b & 0xc0 != 0x80;
    let next = bytes.iter().skip(1).position(begins);
    next.map_or(bytes.len(), |next| next + 1)
}

/// [`cut`] at about byte `at` of `text`.
fn cut_at(text: &str, at: usize) -> usize {
    match at.checked_sub(1) {
        Some(before) if at < text.len() => before + cut(&text.as_bytes()[before..]),
        Some(_) => text.len(),
        None => 0,
    }
}

/// Adds a text to those before it, a blank line behind it.
fn add(texts: &mut String, text: &str) {
    add_share(texts, text, &(0..0), &(0..1));
}

/// Adds the part of a text that belongs to `block` where the text lies at `place` in its file: all of it in
/// the block where it begins, and of a text longer than a block every block its own share.
fn add_share(texts: &mut String, text: &str, place: &Range<u64>, block: &Range<u64>) {
    let text = text.trim_end_matches(['\n', '\r']);
    if text.trim().is_empty() {
        return;
    }
    let length = place.end - place.start;
    let part = if length > block.end - block.start {
        let at = |byte: u64| {
            let offset = byte.clamp(place.start, place.end) - place.start;
            let at = text.len() as u128 * u128::from(offset) / u128::from(length);
            cut_at(text, at as usize)
        };
        at(block.start)..at(block.end)
    } else if block.contains(&place.start) {
        0..text.len()
    } else {
        return;
    };
    texts.push_str(&text[part.clone()]);
    if !part.is_empty() && part.end == text.len() {
        texts.push_str("\n\n");
    }
}

/// Returns true where there is text in a file: read from the beginning, and at a thousand places where it is long.
fn has_text(file: &dyn Texts) -> Result<bool> {
    let size = PIECE as u64;
    let step = size.max(file.length() / PLACES as u64);
    let mut start = 0;
    while start < file.length() {
        let block = start..start.saturating_add(size);
        if !file.read(block)?.trim().is_empty() {
            return Ok(true);
        }
        start = start.saturating_add(step);
    }
    Ok(false)
}

fn not_text(path: &Path, byte: u64) -> Error {
    let known = "a corpus is plain text, .jsonl, .json or .parquet";
    let reason =
        format!("it is not UTF-8 text (byte {byte}; UTF-16 is to be converted first); {known}");
    refused(path, reason)
}
