//! What tokens are for, by the file's numbers and by their texts: the rules of llama.cpp's `llama-vocab.cpp`.
//!
//! Converters write some special tokens as normal ones, and name one end of a text where a model has several.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashSet};

use super::super::file::GgufFile;
use super::token_id;
use crate::error::Result;
use lexico::shown::shown;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    /// Stands for what has no piece.
    Unknown,
    /// Steers the model and is not shown.
    Control,
    /// Found in a text before all else, and shown.
    UserDefined,
    /// A byte, an unused token, or a kind that is not known.
    Other,
}

impl Kind {
    /// Of ggml's number for it.
    pub(super) fn of(number: f64) -> Self {
        match number {
            1.0 => Kind::Normal,
            2.0 => Kind::Unknown,
            3.0 => Kind::Control,
            4.0 => Kind::UserDefined,
            _ => Kind::Other,
        }
    }
}

/// What tokens are for.
pub(super) struct Roles {
    /// The kind of every token.
    pub(super) kinds: Vec<Kind>,
    /// Tokens that end a text.
    pub(super) ends: BTreeSet<usize>,
    /// Tokens that the file gives another kind.
    overridden: Vec<usize>,
}

/// Texts of tokens that end a turn, a message or a text.
const ENDS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Tokens for filling in the middle of a text: the entries that name them, and their texts where none does.
struct Infill {
    entries: &'static [&'static str],
    texts: &'static [&'static str],
    /// True where it ends a text as well.
    ends: bool,
}

const INFILL: [Infill; 6] = [
    Infill {
        entries: &["fim_pre_token_id", "prefix_token_id"],
        texts: &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
        ends: false,
    },
    Infill {
        entries: &["fim_suf_token_id", "suffix_token_id"],
        texts: &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
        ends: false,
    },
    Infill {
        entries: &["fim_mid_token_id", "middle_token_id"],
        texts: &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
        ends: false,
    },
    Infill {
        entries: &["fim_pad_token_id"],
        texts: &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
        ends: true,
    },
    Infill {
        entries: &["fim_rep_token_id"],
        texts: &[
            "<|fim_repo|>",
            "<|repo_name|>",
            "<fim-repo>",
            "<REPO>",
            "<reponame>",
        ],
        ends: true,
    },
    Infill {
        entries: &["fim_sep_token_id"],
        texts: &["<|file_sep|>"],
        ends: true,
    },
];

/// Parts of gpt-oss's answers, which are shown.
const SHOWN: [&str; 4] = ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

impl Roles {
    pub(super) fn find(file: &GgufFile, tokens: &[Cow<'_, str>], kinds: Vec<Kind>) -> Result<Self> {
        let mut roles = Self {
            kinds,
            ends: BTreeSet::new(),
            overridden: Vec::new(),
        };
        // Few tokens have such a text, and each is looked at many times.
        let infill = INFILL.iter().flat_map(|infill| infill.texts);
        let telling: HashSet<&str> = ENDS.iter().chain(&SHOWN).chain(infill).copied().collect();
        let telling = tokens.iter().enumerate().filter_map(|(id, token)| {
            let text: &str = token;
            telling.contains(text).then_some((id, text))
        });
        let telling: Vec<(usize, &str)> = telling.collect();
        let first = |texts: &[&str]| {
            let mut found = telling.iter().filter(|(_, text)| texts.contains(text));
            found.next().map(|&(id, _)| id)
        };
        for infill in &INFILL {
            let mut named = None;
            for entry in infill.entries {
                named = token_id(file, entry)?.or(named);
            }
            let id = match named {
                Some(id) => Some(id),
                None => {
                    let found = first(infill.texts);
                    found.inspect(|&id| roles.set(id, Kind::Control))
                }
            };
            roles.ends.extend(id.filter(|_| infill.ends));
        }
        let own_end = token_id(file, "eos_token_id")?;
        for &(id, text) in &telling {
            if ENDS.contains(&text) {
                roles.ends.insert(id);
                // Qwen and Llama 3 have it from their training texts and end with another: not worth a note.
                if text == "</s>" && own_end.is_some_and(|own| own != id) {
                    roles.kinds[id] = Kind::Control;
                } else {
                    roles.set(id, Kind::Control);
                }
            } else if SHOWN.contains(&text) {
                roles.set(id, Kind::UserDefined);
            }
        }
        for entry in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            roles.ends.extend(token_id(file, entry)?);
        }
        // In gpt-oss and Solar Open <|end|> ends a part of an answer; Gemma 4 writes </s> as text.
        let end = |text: &str| {
            let ends = roles.ends.iter().copied();
            ends.into_iter().find(|&id| tokens[id] == text)
        };
        let calls = end("<|call|>").is_some() || end("<|calls|>").is_some();
        let parts = calls && (end("<|return|>").is_some() || end("<|flush|>").is_some());
        let part = end("<|end|>").filter(|_| parts);
        let text = end("</s>").filter(|_| end("<|tool_response>").is_some());
        for (id, kind) in [(part, Kind::UserDefined), (text, Kind::Normal)] {
            if let Some(id) = id {
                roles.ends.remove(&id);
                roles.set(id, kind);
            }
        }
        roles.overridden.sort_unstable();
        roles.overridden.dedup();
        Ok(roles)
    }

    fn set(&mut self, id: usize, kind: Kind) {
        if self.kinds[id] != kind {
            self.kinds[id] = kind;
            self.overridden.push(id);
        }
    }

    /// Says which tokens the file gives another kind.
    pub(super) fn note(&self, tokens: &[Cow<'_, str>]) -> Option<String> {
        let mut names = self.overridden.iter().map(|&id| {
            let token = &tokens[id];
            format!("\"{}\"", shown(token))
        });
        let some: Vec<String> = names.by_ref().take(8).collect();
        let more = names.count();
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        let some = some.join(", ");
        (!some.is_empty()).then(|| {
            format!("its tokens {some}{more} are of another kind than it says: their texts tell, as in llama.cpp")
        })
    }
}
