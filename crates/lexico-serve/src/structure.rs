//! Structures that a text must follow: JSON schemas and grammars, by llguidance.

use std::sync::Arc;

use lexico::shown::shown;
use lexico_llm::TokenPiece;
use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

/// White space between the parts of a document, a space or a line's end and beginning: small models that may write more go
/// on with it for long.
const WHITE_SPACE: &str = r" |\n {0,8}";

/// Makes structures over a model's vocabulary.
pub(crate) struct Structures {
    factory: ParserFactory,
}

impl Structures {
    /// Takes what the tokens stand for, the number of the model's logits, and the tokens that end a text.
    ///
    /// # Errors
    /// The reason why the vocabulary cannot be used.
    pub(crate) fn new(
        pieces: &[TokenPiece],
        vocabulary: usize,
        ends: &[u32],
    ) -> Result<Self, String> {
        let bytes = |piece: &TokenPiece| match piece.special {
            true => [&[TokTrie::SPECIAL_TOKEN_MARKER], &piece.bytes[..]].concat(),
            false => piece.bytes.clone(),
        };
        let mut words: Vec<Vec<u8>> = pieces.iter().map(bytes).collect();
        words.resize(vocabulary, Vec::new());
        let size = u32::try_from(vocabulary).map_err(|e| e.to_string())?;
        let known: Vec<u32> = ends.iter().copied().filter(|&t| t < size).collect();
        let Some(&first) = known.first() else {
            return Err("the model has no token that ends a text".to_owned());
        };
        let trie = TokTrie::from(&TokRxInfo::new(size, first), &words).with_eos_tokens(&known);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|e| e.to_string())?;
        factory.quiet();
        Ok(Self { factory })
    }

    /// Text that is a document of a JSON schema.
    ///
    /// # Errors
    /// The reason why the schema cannot be followed.
    pub(crate) fn schema(&self, schema: &Value) -> Result<Matcher, String> {
        self.matcher(TopLevelGrammar::from_json_schema(with_white_space(schema)))
    }

    /// Text that follows a grammar in llguidance's kind of Lark.
    ///
    /// # Errors
    /// The reason why the grammar cannot be followed.
    pub(crate) fn grammar(&self, grammar: String) -> Result<Matcher, String> {
        self.matcher(TopLevelGrammar::from_lark(grammar))
    }

    fn matcher(&self, grammar: TopLevelGrammar) -> Result<Matcher, String> {
        let parser = lexico_llm::caught(|| self.factory.create_parser(grammar))?;
        let mut matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(error) => Err(shown(error)),
            // What is impossible shows at the first token.
            None => match matcher.compute_mask() {
                Ok(_) => Ok(matcher),
                Err(error) => Err(shown(error)),
            },
        }
    }
}

/// A schema that allows a little white space.
pub(crate) fn with_white_space(schema: &Value) -> Value {
    let mut schema = match schema {
        Value::Object(_) => schema.clone(),
        // `true` allows everything.
        other => json!({ "allOf": [other] }),
    };
    if let Some(fields) = schema.as_object_mut() {
        let own = json!({ "whitespace_pattern": WHITE_SPACE });
        fields.entry("x-guidance").or_insert(own);
    }
    schema
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use lexico_llm::Model;

    use super::*;

    /// Whether a text is taken to its end.
    fn takes(matcher: &Matcher, model: &Model, text: &str) -> bool {
        let mut matcher = matcher.deep_clone();
        let tokens = model.tokenizer.encode_more(text).unwrap();
        let allowed = tokens.iter().all(|&token| {
            let mask = matcher.compute_mask_or_eos().unwrap();
            mask.is_allowed(token) && matcher.consume_token(token).is_ok()
        });
        allowed && matcher.is_accepting().unwrap()
    }

    #[test]
    fn only_documents_of_the_schema_are_taken() {
        let model = Model::tiny().unwrap();
        let vocabulary = model.decoder.config().vocabulary;
        let structures =
            Structures::new(&model.tokenizer.pieces(), vocabulary, &model.end_tokens).unwrap();
        let schema = json!({
            "type": "object",
            "properties": { "coins": { "type": "integer" } },
            "required": ["coins"],
            "additionalProperties": false,
        });
        let matcher = structures.schema(&schema).unwrap();
        for (text, good) in [
            (r#"{"coins": 12}"#, true),
            (r#"{"coins":12}"#, true),
            ("{\n  \"coins\": 12\n}", true),
            (r#"{"coins": "12"}"#, false),
            (r#"{"coins": 12"#, false),
            (r#"{"apples": 12}"#, false),
        ] {
            assert_eq!(takes(&matcher, &model, text), good, "{text}");
        }
        let any = structures.schema(&json!({ "type": "object" })).unwrap();
        assert!(takes(&any, &model, r#"{"a": [1, null], "b": {"c": "d"}}"#));
        for impossible in [
            json!({ "type": "no such type" }),
            json!({ "$ref": "#/nowhere" }),
        ] {
            assert!(structures.schema(&impossible).is_err(), "{impossible}");
        }
        assert!(structures.grammar("start: \"a".to_owned()).is_err());
    }
}
