//! SentencePiece vocabularies: pieces that are merged by their scores, and bytes where no piece fits.

use hashbrown::HashMap;
use serde_json::{Value, json};

use super::{Vocabulary, token_id};
use crate::error::Result;

/// Bytes of the merges of pieces, at the most: several times what the largest published vocabularies
/// take, and low enough that a small file cannot make much memory.
const MAX_MERGE_BYTES: usize = 1 << 25;

impl Vocabulary<'_> {
    /// Every way of making a piece from two, in the order in which they are merged.
    pub(super) fn piece_merges<'n>(
        &self,
        numbers: &HashMap<&'n str, usize>,
    ) -> Result<Vec<[&'n str; 2]>> {
        let Some(scores) = self.file.numbers("tokenizer.ggml.scores")? else {
            let reason = "its pieces have no scores (tokenizer.ggml.scores)";
            return Err(self.file.error(reason));
        };
        let (with_scores, count) = (scores.len(), self.tokens.len());
        if with_scores < count {
            let reason = format!("it has {count} tokens, but scores of {with_scores}");
            return Err(self.file.error(reason));
        }
        let mut texts = numbers.clone();
        texts.retain(|_, id| !self.not_utf8.contains(id));
        merges(&texts, scores).ok_or_else(|| {
            let reason = format!("merges of its pieces take over {MAX_MERGE_BYTES} bytes");
            self.file.error(reason)
        })
    }

    /// The description of a SentencePiece tokenizer.
    pub(super) fn sentence_pieces(&self) -> Result<Value> {
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
            "decoder": self.decoder(decoders),
            "model": {
                "byte_fallback": true, "fuse_unk": true, "ignore_merges": false,
                "unk_token": unknown,
            },
        }))
    }
}

/// Every way of making a piece from two, the best score first: SentencePiece joins whichever pair of
/// neighbours makes the best piece, the leftmost of equals. `None` where they are too many.
pub(super) fn merges<'n>(
    numbers: &HashMap<&'n str, usize>,
    scores: &[f64],
) -> Option<Vec<[&'n str; 2]>> {
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
    let pairs = found.into_iter().map(|(.., left, right)| [left, right]);
    Some(pairs.collect())
}
