//! A GGUF file's vocabulary as the `tokenizer.json` that a folder would have.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::file::GgufFile;
use crate::error::Result;

/// The texts of `tokenizer.json` and `tokenizer_config.json`.
pub(crate) struct TokenizerTexts {
    pub(crate) tokenizer: String,
    pub(crate) config: String,
}

/// Kinds of tokens, as ggml numbers them.
const UNKNOWN: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// Several times what the longest tokens of published vocabularies take.
const MAX_TOKEN_BYTES: usize = 4096;

/// Bytes of the merges of pieces, at the most: several times what the largest published vocabularies
/// take, and low enough that a small file cannot make much memory.
const MAX_MERGE_BYTES: usize = 1 << 25;

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN_SPLIT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Splitting of text before its bytes are merged.
struct Split {
    names: &'static [&'static str],
    /// GPT-2's own where there is none.
    pattern: Option<&'static str>,
    /// Composed characters before all else.
    nfc: bool,
    /// Whole words of the vocabulary are tokens whatever the merges say.
    ignore_merges: bool,
    /// True where texts begin with the beginning token though the file does not say.
    begins: bool,
}

const SPLITS: [Split; 4] = [
    Split {
        names: &["llama-bpe", "llama3", "llama-v3"],
        pattern: Some(LLAMA3_SPLIT),
        nfc: false,
        ignore_merges: true,
        begins: true,
    },
    Split {
        names: &["qwen2", "deepseek-r1-qwen"],
        pattern: Some(QWEN2_SPLIT),
        nfc: true,
        ignore_merges: false,
        begins: false,
    },
    Split {
        names: &["tekken"],
        pattern: Some(TEKKEN_SPLIT),
        nfc: false,
        ignore_merges: true,
        begins: true,
    },
    Split {
        names: &["gpt-2", "gpt2"],
        pattern: None,
        nfc: false,
        ignore_merges: false,
        begins: false,
    },
];

/// The vocabulary of a file.
struct Vocabulary<'a> {
    file: &'a GgufFile,
    tokens: &'a [String],
    kinds: &'a [f64],
}

pub(super) fn read(file: &GgufFile, size: usize) -> Result<TokenizerTexts> {
    let error = |reason: String| Err(file.error(reason));
    let Some(model) = file.text("tokenizer.ggml.model")? else {
        return error("it has no tokenizer (tokenizer.ggml.model)".to_owned());
    };
    let Some(tokens) = file.texts("tokenizer.ggml.tokens")? else {
        return error("it has no vocabulary (tokenizer.ggml.tokens)".to_owned());
    };
    let kinds = file.numbers("tokenizer.ggml.token_type")?.unwrap_or(&[]);
    let (count, with_kinds) = (tokens.len(), kinds.len());
    if count > size {
        return error(format!(
            "its vocabulary of {count} exceeds the model's {size}"
        ));
    }
    if with_kinds != 0 && with_kinds != count {
        return error(format!("it has {count} tokens, but kinds of {with_kinds}"));
    }
    let vocabulary = Vocabulary {
        file,
        tokens,
        kinds,
    };
    let (mut tokenizer, begins) = match model {
        "gpt2" => vocabulary.byte_level()?,
        "llama" => (vocabulary.sentence_pieces()?, true),
        other => {
            let reason = format!("tokenizer {other:?} is not supported; these are: gpt2, llama");
            return error(reason);
        }
    };
    tokenizer["version"] = "1.0".into();
    tokenizer["added_tokens"] = vocabulary.added_tokens();

    let mut config = json!({});
    for name in ["bos_token", "eos_token"] {
        let id = token_id(file, &format!("{name}_id"))?;
        config[name] = json!(id.map(|id| &tokens[id]));
    }
    let begins = file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(begins);
    if begins && config["bos_token"].is_null() {
        return error("it does not name the token that texts begin with".to_owned());
    }
    config["add_bos_token"] = begins.into();
    config["chat_template"] = json!(file.text("tokenizer.chat_template")?);
    Ok(TokenizerTexts {
        tokenizer: tokenizer.to_string(),
        config: config.to_string(),
    })
}

/// A special token by its entry's name, `bos_token_id` say; SentencePiece's own numbers where a file of
/// its kind names none, as in llama.cpp.
pub(super) fn token_id(file: &GgufFile, name: &str) -> Result<Option<usize>> {
    let key = format!("tokenizer.ggml.{name}");
    let sentence_pieces = file.text("tokenizer.ggml.model")? == Some("llama");
    let by_default = match name {
        "bos_token_id" if sentence_pieces => Some(1),
        "eos_token_id" if sentence_pieces => Some(2),
        "unknown_token_id" if sentence_pieces => Some(0),
        _ => None,
    };
    let Some(id) = file.unsigned(&key)?.or(by_default) else {
        return Ok(None);
    };
    let Some(tokens) = file.texts("tokenizer.ggml.tokens")? else {
        return Ok(None);
    };
    let count = tokens.len();
    let inside = usize::try_from(id).ok().filter(|&id| id < count);
    let outside = || format!("its {key:?} is {id}, outside its vocabulary of {count}");
    inside.map(Some).ok_or_else(|| file.error(outside()))
}

impl Vocabulary<'_> {
    /// Numbers by token.
    fn numbers(&self) -> Result<HashMap<&str, usize>> {
        let mut numbers = HashMap::with_capacity(self.tokens.len());
        for (number, token) in self.tokens.iter().enumerate() {
            // Every way of splitting a piece is looked at.
            if token.len() > MAX_TOKEN_BYTES {
                let reason = format!("its token {number} is {} bytes long", token.len());
                return Err(self.file.error(reason));
            }
            if let Some(first) = numbers.insert(token.as_str(), number) {
                let reason = format!("its tokens {first} and {number} are both {token:?}");
                return Err(self.file.error(reason));
            }
        }
        Ok(numbers)
    }

    /// Tokens that are found in a text before all else.
    fn added_tokens(&self) -> Value {
        let kinds = self.tokens.iter().zip(self.kinds).enumerate();
        let added = kinds.filter(|(_, (token, kind))| {
            [UNKNOWN, CONTROL, USER_DEFINED].contains(kind) && !token.is_empty()
        });
        let added = added.map(|(id, (token, &kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind != USER_DEFINED,
            })
        });
        added.collect()
    }

    /// Byte pairs as GPT-2 merges them; and whether texts begin with the beginning token.
    fn byte_level(&self) -> Result<(Value, bool)> {
        let Some(name) = self.file.text("tokenizer.ggml.pre")? else {
            let reason = "it does not say how text is split into words (tokenizer.ggml.pre): \
                          convert the model again with a newer llama.cpp";
            return Err(self.file.error(reason));
        };
        let Some(split) = SPLITS.iter().find(|split| split.names.contains(&name)) else {
            let known = SPLITS.map(|split| split.names.join(", ")).join(", ");
            let reason = format!("splitting text as {name:?} is not supported; these are: {known}");
            return Err(self.file.error(reason));
        };
        let Some(merges) = self.file.texts("tokenizer.ggml.merges")? else {
            let reason = "it has no merges (tokenizer.ggml.merges)";
            return Err(self.file.error(reason));
        };
        let vocabulary = self.numbers()?;
        let merges: Vec<&str> = merges.iter().map(String::as_str).collect();
        let byte_level = |own_split: bool| {
            json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": own_split,
            })
        };
        let before = match split.pattern {
            None => byte_level(true),
            Some(pattern) => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                byte_level(false),
            ]}),
        };
        let tokenizer = json!({
            "normalizer": if split.nfc { json!({"type": "NFC"}) } else { Value::Null },
            "pre_tokenizer": before,
            "decoder": byte_level(true),
            "model": {
                "type": "BPE", "byte_fallback": false, "fuse_unk": false,
                "ignore_merges": split.ignore_merges, "vocab": vocabulary, "merges": merges,
            },
        });
        Ok((tokenizer, split.begins))
    }

    /// Pieces that are merged by their scores, as SentencePiece does; bytes where no piece fits.
    fn sentence_pieces(&self) -> Result<Value> {
        let numbers = self.numbers()?;
        let Some(scores) = self.file.numbers("tokenizer.ggml.scores")? else {
            let reason = "its pieces have no scores (tokenizer.ggml.scores)";
            return Err(self.file.error(reason));
        };
        let (with_scores, count) = (scores.len(), self.tokens.len());
        if with_scores != count {
            let reason = format!("it has {count} tokens, but scores of {with_scores}");
            return Err(self.file.error(reason));
        }
        let Some(merges) = merges(&numbers, scores) else {
            let reason = format!("merges of its pieces take over {MAX_MERGE_BYTES} bytes");
            return Err(self.file.error(reason));
        };
        let unknown = token_id(self.file, "unknown_token_id")?.map(|id| &self.tokens[id]);
        let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let prefix = json!({"type": "Prepend", "prepend": "▁"});
        let prefixed = self.file.bool("tokenizer.ggml.add_space_prefix")?;
        let prefixed = prefixed.unwrap_or(true);
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefixed {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Ok(json!({
            "normalizer": {
                "type": "Sequence",
                "normalizers": if prefixed { vec![prefix, space] } else { vec![space] },
            },
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "byte_fallback": true, "fuse_unk": true, "ignore_merges": false,
                "unk_token": unknown, "vocab": numbers, "merges": merges,
            },
        }))
    }
}

/// Every way of making a piece from two, the best score first: SentencePiece joins whichever pair of
/// neighbours makes the best piece, the leftmost of equals. `None` where they are too many.
fn merges(numbers: &HashMap<&str, usize>, scores: &[f64]) -> Option<Vec<[String; 2]>> {
    let mut found = Vec::new();
    let mut bytes = 0;
    for (&piece, &number) in numbers {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(&l), Some(&r)) = (numbers.get(left), numbers.get(right)) {
                bytes += piece.len();
                if bytes > MAX_MERGE_BYTES {
                    return None;
                }
                found.push((number, l, r, left, right));
            }
        }
    }
    found.sort_by(|a, b| {
        let by_score = scores[b.0].total_cmp(&scores[a.0]);
        by_score.then_with(|| (a.0, a.1, a.2).cmp(&(b.0, b.1, b.2)))
    });
    let pair = |(.., left, right): (_, _, _, &str, &str)| [left.to_owned(), right.to_owned()];
    Some(found.into_iter().map(pair).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small file must not make much memory.
    #[test]
    fn pieces_of_one_another_are_merged_up_to_a_limit() {
        let merges_up_to = |longest: usize| {
            let pieces: Vec<String> = (1..=longest).map(|n| "a".repeat(n)).collect();
            let numbers = pieces.iter().map(String::as_str).zip(0..).collect();
            merges(&numbers, &vec![0.0; longest])
        };
        let found = merges_up_to(4).unwrap();
        let found: Vec<[&str; 2]> = found.iter().map(|[l, r]| [l.as_str(), r]).collect();
        let all = [
            ["a", "a"],
            ["a", "aa"],
            ["aa", "a"],
            ["a", "aaa"],
            ["aa", "aa"],
            ["aaa", "a"],
        ];
        assert_eq!(found, all);
        assert!(merges_up_to(4096).is_none());
    }
}
