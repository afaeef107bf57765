//! The tokenizer of a GGUF file: as the `tokenizer.json` that a folder would have describes it, but for the vocabulary and
//! its merges, which would be most of such a file and take longer to write and read again than all else.

mod roles;
mod sentence_pieces;
mod splits;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

use hashbrown::{HashMap, HashSet};
use lexico::shown::shown;
use serde_json::{Value, json};
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, Tokenizer as Inner};

use super::file::GgufFile;
use crate::error::Result;
use crate::tokenizer::sound;
use roles::{Kind, Roles};
use splits::{Split, byte_level};

/// A tokenizer, and the text of the `tokenizer_config.json` that would be beside it.
pub(crate) struct GgufTokenizer {
    pub(crate) inner: Inner,
    pub(crate) config: String,
    /// What is taken otherwise than the file says, for people.
    pub(crate) notes: Vec<String>,
}

/// Several times what the longest tokens of published vocabularies take.
const MAX_TOKEN_BYTES: usize = 4096;

pub(super) fn read(file: &GgufFile, size: usize) -> Result<GgufTokenizer> {
    let error = |reason: String| Err(file.error(reason));
    let Some(model) = file.text("tokenizer.ggml.model")? else {
        return error("it has no tokenizer (tokenizer.ggml.model)".to_owned());
    };
    let Some(vocabulary) = Vocabulary::read(file)? else {
        return error("it has no vocabulary (tokenizer.ggml.tokens)".to_owned());
    };
    let count = vocabulary.tokens.len();
    if count > size {
        return error(format!(
            "its vocabulary of {count} exceeds the model's {size}"
        ));
    }
    let mut notes = Vec::from_iter(vocabulary.roles.note(&vocabulary.tokens));
    let numbers = vocabulary.numbers()?;
    let (mut description, merges, begins) = match model {
        "gpt2" => {
            let split = vocabulary.split()?;
            let (merges, note) = vocabulary.merges(&numbers)?;
            notes.extend(note);
            (vocabulary.byte_level(split), merges, split.begins)
        }
        "llama" => (
            vocabulary.sentence_pieces()?,
            vocabulary.piece_merges(&numbers)?,
            true,
        ),
        other => {
            let reason = format!(
                "tokenizer \"{}\" is not supported; these are: gpt2, llama",
                shown(other)
            );
            return error(reason);
        }
    };

    let mut config = json!({});
    for name in ["bos_token", "eos_token"] {
        let id = token_id(file, &format!("{name}_id"))?;
        config[name] = json!(id.map(|id| &vocabulary.tokens[id]));
    }
    let begins = file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(begins);
    if begins && config["bos_token"].is_null() {
        return error("it does not name the token that texts begin with".to_owned());
    }
    config["add_bos_token"] = begins.into();
    if file.bool("tokenizer.ggml.add_eos_token")? == Some(true) {
        let Some(end) = token_id(file, "eos_token_id")? else {
            return error("it does not name the token that texts end with".to_owned());
        };
        description["post_processor"] = ending_with(&vocabulary.tokens[end], end);
    }
    config["chat_template"] = json!(file.text("tokenizer.chat_template")?);
    let added = vocabulary.added_tokens()?;
    let inner = sound(|| build(description, &numbers, &merges, added));
    Ok(GgufTokenizer {
        inner: inner.map_err(|e| file.error(format!("its tokenizer: {e}")))?,
        config: config.to_string(),
        notes,
    })
}

/// Tokens that end a text, by what the file says and by their own texts.
pub(super) fn end_tokens(file: &GgufFile) -> Result<Vec<u64>> {
    let vocabulary = Vocabulary::read(file)?;
    let ends = vocabulary.map_or_else(Default::default, |vocabulary| vocabulary.roles.ends);
    Ok(ends.into_iter().map(|id| id as u64).collect())
}

/// What a file writes for a token that it does not have: -1.
const NONE: u64 = u32::MAX as u64;

/// A special token by its entry's name, `bos_token_id` say; SentencePiece's own numbers where a file of
/// its kind names none, as in llama.cpp.
fn token_id(file: &GgufFile, name: &str) -> Result<Option<usize>> {
    let key = format!("tokenizer.ggml.{name}");
    let Some(tokens) = file.texts("tokenizer.ggml.tokens")? else {
        return Ok(None);
    };
    let count = tokens.len();
    let inside = |id: u64| usize::try_from(id).ok().filter(|&id| id < count);
    match file.unsigned(&key)?.filter(|&id| id != NONE) {
        Some(id) => {
            let outside = || format!("its {key:?} is {id}, outside its vocabulary of {count}");
            let inside = inside(id).map(Some);
            inside.ok_or_else(|| file.error(outside()))
        }
        None if file.text("tokenizer.ggml.model")? == Some("llama") => {
            let by_default = match name {
                "unknown_token_id" => Some(0),
                "bos_token_id" => Some(1),
                "eos_token_id" => Some(2),
                _ => None,
            };
            Ok(by_default.and_then(inside))
        }
        None => Ok(None),
    }
}

/// The step of `tokenizer.json` that puts a token after a text.
fn ending_with(token: &str, id: usize) -> Value {
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    json!({
        "type": "TemplateProcessing",
        "single": [sequence("A"), {"SpecialToken": {"id": token, "type_id": 0}}],
        "pair": [sequence("A"), sequence("B")],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    })
}

/// The vocabulary of a file.
struct Vocabulary<'a> {
    file: &'a GgufFile,
    /// Every token's text, or its name where it has none.
    tokens: Vec<Cow<'a, str>>,
    /// Tokens whose bytes are no UTF-8: no text holds them.
    not_utf8: HashSet<usize>,
    roles: Roles,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a GgufFile) -> Result<Option<Self>> {
        let Some(list) = file.texts("tokenizer.ggml.tokens")? else {
            return Ok(None);
        };
        let mut tokens: Vec<Cow<'a, str>> = list.iter().map(Cow::Borrowed).collect();
        for (id, token) in tokens.iter_mut().enumerate() {
            if token.is_empty() {
                // llama.cpp's name.
                *token = format!("[EMPTY_{id}]").into();
            }
        }
        let mut not_utf8 = HashSet::new();
        let sentence_pieces = file.text("tokenizer.ggml.model")? == Some("llama");
        let has = |name: &str| list.iter().any(|token| token == name);
        for (&id, bytes) in &list.not_utf8 {
            match bytes[..] {
                // llama.cpp falls back on it where there is no piece with the byte's name.
                [byte] if sentence_pieces && !has(&format!("<0x{byte:02X}>")) => {
                    tokens[id] = format!("<0x{byte:02X}>").into();
                }
                _ => {
                    let hexadecimal: String = bytes.iter().map(|b| format!("{b:02X}")).collect();
                    tokens[id] = format!("[BYTES_{hexadecimal}]").into();
                    not_utf8.insert(id);
                }
            }
        }
        let count = tokens.len();
        let kinds = match file.numbers("tokenizer.ggml.token_type")? {
            None => vec![Kind::Normal; count],
            Some(kinds) if kinds.len() >= count => {
                kinds[..count].iter().map(|&n| Kind::of(n)).collect()
            }
            Some(kinds) => {
                let with_kinds = kinds.len();
                let reason = format!("it has {count} tokens, but kinds of {with_kinds}");
                return Err(file.error(reason));
            }
        };
        let roles = Roles::find(file, &tokens, kinds)?;
        Ok(Some(Self {
            file,
            tokens,
            not_utf8,
            roles,
        }))
    }

    /// Numbers by token.
    fn numbers(&self) -> Result<HashMap<&str, usize>> {
        let mut numbers = HashMap::with_capacity(self.tokens.len());
        for (number, token) in self.tokens.iter().enumerate() {
            // Every way of splitting a piece is looked at.
            if token.len() > MAX_TOKEN_BYTES {
                let reason = format!("its token {number} is {} bytes long", token.len());
                return Err(self.file.error(reason));
            }
            if let Some(first) = numbers.insert(&**token, number) {
                let token = shown(token);
                let reason = format!("its tokens {first} and {number} are both \"{token}\"");
                return Err(self.file.error(reason));
            }
        }
        Ok(numbers)
    }

    /// Tokens that are found in a text before all else.
    fn added_tokens(&self) -> Result<Value> {
        let name = self.file.text("general.name")?.unwrap_or_default();
        let name = name.to_lowercase();
        // Phi-3's tokens take the spaces after them; files do not say so, llama.cpp knows it by the name.
        let phi3 = name.contains("phi-3") || name.contains("phi3");
        let takes_spaces =
            |token: &str| phi3 && !["<unk>", "<s>", "<|endoftext|>"].contains(&token);
        let kinds = self.tokens.iter().zip(&self.roles.kinds).enumerate();
        let added = kinds.filter(|(id, (token, kind))| {
            let special = matches!(kind, Kind::Unknown | Kind::Control | Kind::UserDefined);
            (special || phi3 && *token == "</s>") && !self.not_utf8.contains(id)
        });
        let added = added.map(|(id, (token, &kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": takes_spaces(token), "normalized": false, "special": kind != Kind::UserDefined,
            })
        });
        Ok(added.collect())
    }

    /// How text is split before its bytes are merged.
    fn split(&self) -> Result<&'static Split> {
        let Some(name) = self.file.text("tokenizer.ggml.pre")? else {
            let reason = "it does not say how text is split into words (tokenizer.ggml.pre): \
                          convert the model again with a newer llama.cpp";
            return Err(self.file.error(reason));
        };
        splits::by_name(name).map_err(|reason| self.file.error(reason))
    }

    /// Byte pairs as GPT-2 merges them.
    fn byte_level(&self, split: &Split) -> Value {
        let tokenizer = byte_level_tokenizer(split);
        let decoder = self.decoder(vec![tokenizer["decoder"].clone()]);
        with(tokenizer, "decoder", decoder)
    }

    /// Pairs of pieces in the order in which they are merged.
    fn merges(
        &self,
        vocabulary: &HashMap<&str, usize>,
    ) -> Result<(Vec<[&str; 2]>, Option<String>)> {
        let Some(list) = self.file.texts("tokenizer.ggml.merges")? else {
            let reason = "it has no merges (tokenizer.ggml.merges)";
            return Err(self.file.error(reason));
        };
        let mut merges = Vec::with_capacity(list.len());
        let mut seen = HashSet::with_capacity(list.len());
        let (mut joined, mut left_out) = (String::new(), 0);
        for (number, merge) in list.iter().enumerate() {
            // As in llama.cpp: the first piece may begin with a space, the second may hold any.
            let space = merge.char_indices().skip(1).find(|&(_, c)| c == ' ');
            let Some((space, _)) = space else {
                let merge = shown(merge);
                let reason = format!(
                    "its merge {number}, \"{merge}\", is not two pieces with a space between"
                );
                return Err(self.file.error(reason));
            };
            let (left, right) = (&merge[..space], &merge[space + 1..]);
            joined.clear();
            joined.extend([left, right]);
            // Where one is missing it makes no token.
            let known = |piece: &str| vocabulary.get(piece).copied();
            match (known(left), known(right), known(&joined)) {
                (Some(l), Some(r), Some(_)) => {
                    if seen.insert((l, r)) {
                        merges.push([left, right]);
                    }
                }
                _ => left_out += 1,
            }
        }
        let note = (left_out > 0).then(|| {
            let all = list.len();
            format!("{left_out} of its {all} merges name pieces that its vocabulary lacks: they are left out")
        });
        Ok((merges, note))
    }

    /// Decoders, after one that shows bytes of no character as a folder's tokenizer would.
    fn decoder(&self, mut steps: Vec<Value>) -> Value {
        if !self.not_utf8.is_empty() {
            let names = json!({"Regex": r"^\[BYTES_[0-9A-F]+\]$"});
            let shown = json!({"type": "Replace", "pattern": names, "content": "\u{fffd}"});
            steps.insert(0, shown);
        }
        json!({"type": "Sequence", "decoders": steps})
    }
}

/// A tokenizer of a description without vocabulary.
fn build(
    mut description: Value,
    vocabulary: &HashMap<&str, usize>,
    merges: &[[&str; 2]],
    added: Value,
) -> tokenizers::Result<Inner> {
    description["version"] = "1.0".into();
    description["model"]["type"] = "BPE".into();
    description["model"]["vocab"] = json!({});
    description["model"]["merges"] = json!([]);
    let mut inner: Inner = serde_json::from_value(description)?;
    let vocabulary = vocabulary
        .iter()
        .map(|(&token, &id)| (token.to_owned(), id as u32));
    let merges = merges
        .iter()
        .map(|[left, right]| ((*left).to_owned(), (*right).to_owned()));
    let mut model =
        BPE::builder().vocab_and_merges(vocabulary.collect::<Vocab>(), merges.collect());
    if let ModelWrapper::BPE(described) = inner.get_model() {
        model = model
            .fuse_unk(described.fuse_unk)
            .byte_fallback(described.byte_fallback)
            .ignore_merges(described.ignore_merges);
        if let Some(unknown) = &described.unk_token {
            model = model.unk_token(unknown.clone());
        }
    }
    inner.with_model(model.build()?);
    inner.add_tokens(serde_json::from_value::<Vec<AddedToken>>(added)?)?;
    Ok(inner)
}

/// The description of a byte-level tokenizer.
fn byte_level_tokenizer(split: &Split) -> Value {
    json!({
        "normalizer": if split.nfc { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": split.pre_tokenizer(),
        "decoder": byte_level(true),
        "model": {
            "byte_fallback": false, "fuse_unk": false, "ignore_merges": split.ignore_merges,
        },
    })
}

/// The value with another under `key`.
fn with(mut value: Value, key: &str, other: Value) -> Value {
    value[key] = other;
    value
}
