//! Which blocks of prompts a place holds, and the events that tell routers.

use std::collections::HashMap;

use super::Key;
use crate::kv_events::{KvEvent, KvEvents};

/// The blocks of the prefixes in one place.
pub(super) struct PromptBlocks {
    /// In how many prefixes each is.
    counts: HashMap<Key, usize>,
    events: Option<KvEvents>,
    /// The place, as events name it.
    medium: Option<&'static str>,
}

impl PromptBlocks {
    pub(super) fn new(events: Option<KvEvents>, medium: Option<&'static str>) -> Self {
        Self {
            counts: HashMap::new(),
            events,
            medium,
        }
    }

    /// Whether there is anybody to tell.
    pub(super) fn are_told(&self) -> bool {
        self.events.is_some()
    }

    /// Counts the blocks of a prefix of these tokens.
    pub(super) fn add(&mut self, keys: &[Key], tokens: &[u32]) {
        let block = tokens.len() / keys.len().max(1);
        let mut parent = None;
        for (key, tokens) in keys.iter().zip(tokens.chunks_exact(block.max(1))) {
            let count = self.counts.entry(*key).or_default();
            *count += 1;
            if let (1, Some(events)) = (*count, &self.events) {
                events.publish(KvEvent::stored(*key, parent, tokens, self.medium));
            }
            parent = Some(*key);
        }
    }

    /// Takes the blocks of a prefix off again.
    pub(super) fn remove(&mut self, keys: &[Key]) {
        for key in keys.iter().rev() {
            let Some(count) = self.counts.get_mut(key) else {
                continue;
            };
            *count -= 1;
            if *count == 0 {
                self.counts.remove(key);
                if let Some(events) = &self.events {
                    events.publish(KvEvent::removed(*key, self.medium));
                }
            }
        }
    }
}
