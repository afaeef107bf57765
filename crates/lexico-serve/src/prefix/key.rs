//! Names of prefixes: a chain of SHA-256 over their tokens, chunk by chunk.

use std::fmt;

use sha2::{Digest, Sha256};

/// The name of a prefix: it differs where the tokens do, or the model, the dictionaries or the settings.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key([u8; 32]);

impl Key {
    /// The name of nothing read yet, by a server whose model and settings these facts tell apart.
    pub(crate) fn root(facts: &[&str]) -> Self {
        let mut hasher = Sha256::new();
        for fact in facts {
            hasher.update((fact.len() as u64).to_le_bytes());
            hasher.update(fact.as_bytes());
        }
        Self(hasher.finalize().into())
    }

    /// The name of the prefix with these tokens more.
    fn then(self, tokens: &[u32]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        tokens.iter().for_each(|t| hasher.update(t.to_le_bytes()));
        Self(hasher.finalize().into())
    }

    /// The names of a prompt's prefixes that end with a chunk, the shortest first. At least one token comes after each:
    /// what the model says next is not part of a prefix.
    pub(crate) fn of_prompt(self, prompt: &[u32], chunk: usize) -> Vec<Self> {
        let before_last = &prompt[..prompt.len().saturating_sub(1)];
        let mut key = self;
        let chunks = before_last.chunks_exact(chunk);
        chunks
            .map(|tokens| {
                key = key.then(tokens);
                key
            })
            .collect()
    }

    /// The first eight bytes, as routers name blocks.
    pub(crate) fn short(self) -> u64 {
        self.0.iter().take(8).fold(0, |n, &b| n << 8 | u64::from(b))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_in_tokens_before_them_and_in_the_server() {
        let root = Key::root(&["model", "settings"]);
        let prompt: Vec<u32> = (0..9).collect();
        let keys = root.of_prompt(&prompt, 4);
        assert_eq!(keys.len(), 2);
        assert_eq!(
            root.of_prompt(&prompt[..8], 4),
            keys[..1],
            "one token is left"
        );
        let mut other = prompt.clone();
        other[1] = 7;
        let others = root.of_prompt(&other, 4);
        assert!(keys[0] != others[0] && keys[1] != others[1]);
        other[1] = 1;
        other[5] = 7;
        assert_eq!(root.of_prompt(&other, 4)[0], keys[0]);
        assert_ne!(
            Key::root(&["models", "ettings"]).of_prompt(&prompt, 4)[0],
            keys[0]
        );
    }
}
