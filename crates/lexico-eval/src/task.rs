//! What a task is made of: prompts to go on from, and what is made of the text that goes on.

/// A text for the model to go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its name in the results.
    pub id: String,
    /// The text.
    pub prompt: String,
    /// Most tokens that the model may add.
    pub max_tokens: usize,
    /// Texts that end what it adds.
    pub stop: Vec<String>,
}

/// What a task makes of the text that the model added.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// From 0 to 1.
    pub score: f64,
    /// The answer in it, where there is one.
    pub answer: Option<String>,
    /// What was asked for.
    pub expected: String,
}
