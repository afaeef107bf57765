//! Text to tokens and back.

use std::collections::HashMap;
use std::path::Path;

use lexico::shown::shown;
use tokenizers::Tokenizer as Inner;

use crate::chat::{SpecialTokens, TemplateSources};
use crate::error::{Error, Result, refused};
use crate::panics::caught;
use crate::tokenizer_config::{TokenizerConfig, TokenizerFiles};

/// A model's tokenizer.
pub struct Tokenizer {
    inner: Inner,
    /// Put first where the tokenizer does not do so itself.
    begin: Option<u32>,
    /// Put first by the tokenizer itself.
    own_begin: Option<u32>,
    /// Texts of special tokens, which decoding leaves out.
    hidden: HashMap<u32, String>,
    /// Special tokens by the names that chat templates use.
    pub(crate) special: SpecialTokens,
    /// The sources of chat templates.
    pub(crate) templates: TemplateSources,
}

impl Tokenizer {
    /// Takes the texts of `tokenizer.json` and of the files beside it.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn parse(json: &[u8], files: TokenizerFiles, path: &Path) -> Result<Self> {
        let error = |reason: String| refused(path, reason);
        let not_one = |e: tokenizers::Error| error(format!("not a tokenizer: {e}"));
        Self::new(
            sound(|| Inner::from_bytes(json)).map_err(not_one)?,
            files,
            path,
        )
    }

    /// Takes a tokenizer, and the texts of the files that are beside its own.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn new(mut inner: Inner, files: TokenizerFiles, path: &Path) -> Result<Self> {
        let error = |reason: String| refused(path, reason);
        let not_one = |e: tokenizers::Error| error(format!("not a tokenizer: {e}"));
        // Files keep what training cut and padded texts to; a prompt is never cut.
        inner.with_truncation(None).map_err(not_one)?;
        inner.with_padding(None);
        let config = TokenizerConfig::parse(files, path)?;
        // A template that adds the beginning token itself needs no help. Where there is none, Llama
        // tokenizers add it unless told not to; those of other families do not.
        let class = config.class.as_deref();
        let class = class.unwrap_or("PreTrainedTokenizerFast");
        let llama = class.starts_with("Llama") || class == "PreTrainedTokenizerFast";
        let by_itself = llama && inner.get_post_processor().is_none();
        let wanted = config.add_bos_token.unwrap_or(by_itself);
        let begin = config.token("bos_token").filter(|_| wanted).map(|token| {
            let id = inner.token_to_id(token);
            id.ok_or_else(|| error(format!("its vocabulary lacks \"{}\"", shown(token))))
        });
        let added = inner.get_added_tokens_decoder().into_iter();
        let hidden = added.filter(|(_, token)| token.special);
        let hidden: HashMap<u32, String> = hidden.map(|(id, token)| (id, token.content)).collect();
        let own_begin = match inner.get_post_processor() {
            Some(_) => {
                let empty = sound(|| inner.encode_fast("", true)).map_err(not_one)?;
                let first = empty.get_ids().first().copied();
                first.filter(|token| hidden.contains_key(token))
            }
            None => None,
        };
        Ok(Self {
            begin: begin.transpose()?,
            own_begin,
            hidden,
            inner,
            special: config.tokens,
            templates: config.templates,
        })
    }

    /// Tokens of the beginning of a text: with the beginning-of-text token where the model has one, once, also where the
    /// text begins with its name.
    ///
    /// # Errors
    /// [`Error::File`] where the tokenizer cannot encode it.
    pub fn encode_first(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = self.encode_with(text, true)?;
        if let Some(begin) = self.begin
            && tokens.first() != Some(&begin)
        {
            tokens.insert(0, begin);
        }
        if let (Some(begin), [first, second, ..]) = (self.own_begin, tokens.as_slice())
            && [*first, *second] == [begin; 2]
        {
            tokens.remove(0);
        }
        Ok(tokens)
    }

    /// The token of this text, where it is one.
    pub(crate) fn id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// Number of its tokens.
    pub(crate) fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The text of a token that decoding leaves out, a special one.
    pub(crate) fn hidden_text(&self, token: u32) -> Option<&str> {
        self.hidden.get(&token).map(String::as_str)
    }

    /// Tokens of a text that goes on from another.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode_first`].
    pub fn encode_more(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = sound(|| self.inner.encode_fast(text, special)).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of some tokens, special ones left out.
    ///
    /// # Errors
    /// [`Error::File`] where the tokenizer cannot decode them.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        sound(|| self.inner.decode(tokens, true)).map_err(failed)
    }

    /// What every token stands for, by its number.
    pub fn pieces(&self) -> Vec<TokenPiece> {
        let decoder = serde_json::to_string(&self.inner.get_decoder()).unwrap_or_default();
        let added = self.inner.get_added_tokens_decoder();
        let count = self.vocabulary() as u32;
        let piece = |token: u32| {
            let special = self.hidden.contains_key(&token);
            let bytes = match self.inner.id_to_token(token) {
                None => Vec::new(),
                Some(text) if added.contains_key(&token) => text.into_bytes(),
                Some(text) if decoder.contains("ByteLevel") => bytes_of_characters(&text),
                Some(text) => bytes_of_sentence_piece(&text),
            };
            TokenPiece { bytes, special }
        };
        (0..count).map(piece).collect()
    }

    /// The token that texts begin with, where the model has one.
    pub fn begin_token(&self) -> Option<u32> {
        self.begin.or(self.own_begin)
    }

    /// The special tokens by the names that chat templates use, `eos_token` say.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// Decodes token by token: characters that span tokens come whole.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream {
            tokenizer: self,
            tokens: Vec::new(),
            shown: 0,
        }
    }
}

/// What a token stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenPiece {
    /// Bytes of text, which need not be whole characters; the name of a special token.
    pub bytes: Vec<u8>,
    /// True of a special token, which decoding leaves out.
    pub special: bool,
}

/// The bytes of a token of a byte-level vocabulary, whose characters stand for one byte each, as GPT-2 has it: printable ones
/// of Latin-1 for themselves, those from U+0100 on for the others in order.
fn bytes_of_characters(text: &str) -> Vec<u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=u8::MAX).filter(|byte| !printable(byte));
    let byte = |c: char| match u8::try_from(u32::from(c)) {
        Ok(byte) if printable(&byte) => Some(byte),
        _ => others
            .clone()
            .nth((u32::from(c) as usize).checked_sub(256)?),
    };
    let bytes: Option<Vec<u8>> = text.chars().map(byte).collect();
    // A character that stands for no byte: the token is plain text.
    bytes.unwrap_or_else(|| text.as_bytes().to_vec())
}

/// The bytes of a token of SentencePiece: `<0x0A>` is one byte, and `▁` a space.
fn bytes_of_sentence_piece(text: &str) -> Vec<u8> {
    let hexadecimal = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    match hexadecimal.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
        Some(byte) => vec![byte],
        None => text.replace('\u{2581}', " ").into_bytes(),
    }
}

/// Calls the tokenizers crate, which panics on some contradictory files.
pub(crate) fn sound<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    caught(work).unwrap_or_else(|panic| Err(format!("it contradicts itself: {panic}").into()))
}

pub(crate) fn failed(error: tokenizers::Error) -> Error {
    refused(Path::new("tokenizer"), error.to_string())
}

/// Text that grows with its tokens.
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    /// Tokens whose text may still change with the next one: from the last clean cut on.
    tokens: Vec<u32>,
    /// Bytes of their text that were given out.
    shown: usize,
}

impl TextStream<'_> {
    /// Takes a token; returns the text that is certain now and was not before.
    ///
    /// # Errors
    /// Those of [`Tokenizer::decode`].
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        // The replacement character stands for a character whose bytes are not all there yet.
        if text.ends_with('\u{fffd}') || text.len() < self.shown {
            return Ok(String::new());
        }
        let new = self.rest(&text);
        self.shown = text.len();
        self.cut(&text)?;
        Ok(new)
    }

    /// Returns what is left at the end: incomplete characters as replacement characters.
    ///
    /// # Errors
    /// Those of [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.tokens)?;
        Ok(self.rest(&text))
    }

    /// The text after what was given out. A byte of no character can turn the characters before it into
    /// replacement characters, so that what was given out need not end where a character does now.
    fn rest(&self, text: &str) -> String {
        text[text.ceil_char_boundary(self.shown)..].to_owned()
    }

    /// Forgets all but the last tokens, lest decoding grow with the length: some decoders treat the
    /// first token specially, so a few are kept as its context.
    fn cut(&mut self, text: &str) -> Result<()> {
        const KEPT: usize = 4;
        if self.tokens.len() < 8 * KEPT || self.shown != text.len() {
            return Ok(());
        }
        let tail = self.tokens.split_off(self.tokens.len() - KEPT);
        let shown = self.tokenizer.decode(&tail)?;
        if text.ends_with(&shown) {
            self.tokens = tail;
            self.shown = shown.len();
        } else {
            // The tail reads differently on its own: keep all of it until it does not.
            self.tokens.extend(tail);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Entries that the tokenizers crate takes, or panics on when it meets a text.
    #[test]
    fn no_tokenizer_file_makes_a_panic() {
        let tiny = include_bytes!("../../../models/tiny/tokenizer.json");
        let tiny: Value = serde_json::from_slice(tiny).expect("JSON");
        let template = |pieces: Value| json!({"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}});
        let lies = [
            ("normalizer", json!({"type": "Prepend", "prepend": ""})),
            (
                "normalizer",
                json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
            ),
            (
                "normalizer",
                json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            ),
            ("pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
            (
                "post_processor",
                template(json!([{"SpecialToken": {"id": "<none>", "type_id": 0}}])),
            ),
            (
                "post_processor",
                template(json!([{"Sequence": {"id": "B", "type_id": 0}}])),
            ),
        ];
        let mut refused = 0;
        for (entry, lie) in lies {
            let mut file = tiny.clone();
            file[entry] = lie.clone();
            let bytes = serde_json::to_vec(&file).expect("JSON");
            let tokens = Tokenizer::parse(
                &bytes,
                TokenizerFiles::default(),
                Path::new("tokenizer.json"),
            )
            .and_then(|tokenizer| tokenizer.encode_first("How many coins?"));
            match tokens {
                Ok(_) => println!("{lie}: taken"),
                Err(error) => {
                    println!("{lie}: {error}");
                    refused += 1;
                }
            }
        }
        assert!(refused >= 3, "{refused} were refused");
    }
}
