//! Prefixes of prompts that were read before, kept by recency.
//!
//! A prompt is read in chunks of a fixed length. What a cache holds at the end of a chunk depends on the tokens so far and
//! on nothing else, so that a text that begins from a kept prefix is the text that reading the prompt anew would give.
//! The codes of kept prefixes and of running sequences are shared; only the newest positions, which are dense, are copied.
//! They weigh more than a chunk's codes. So a prefix is kept where it is likely to be needed: at the last whole chunk of a
//! prompt, and where a prompt parts from one that was read before.

mod blocks;
mod key;
mod store;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use lexico_llm::cache::KvCache;

use crate::kv_events::KvEvents;
use crate::memory::{Memory, Share};
use blocks::PromptBlocks;
pub(crate) use key::Key;
pub(crate) use store::PrefixStore;

/// Chunks that are remembered at the most, twice.
const SEEN: usize = 1 << 16;

/// Prefixes in memory.
pub(crate) struct Prefixes {
    memory: Arc<Memory>,
    kept: HashMap<Key, Kept>,
    /// The chunks of those that are kept.
    blocks: PromptBlocks,
    /// Chunks that were read, those of late and those before them.
    seen: [HashSet<Key>; 2],
    /// Counts uses.
    clock: u64,
}

pub(crate) struct Kept {
    prefix: Prefix,
    /// The names of the prefixes that end with each of its chunks.
    keys: Vec<Key>,
    /// The bytes of what is dense.
    own: Share,
    used: u64,
}

/// The beginning of a prompt, as a cache holds it.
pub(crate) struct Prefix {
    pub(crate) positions: usize,
    pub(crate) cache: Box<dyn KvCache>,
    /// The bytes of the codes, chunk by chunk, which others may share.
    pub(crate) chunks: Vec<Arc<Share>>,
}

impl Prefix {
    /// The bytes of its codes.
    pub(crate) fn shared(&self) -> usize {
        shared_bytes(&self.chunks)
    }

    /// A copy that goes on by itself.
    pub(crate) fn fork(&self) -> Option<Self> {
        Some(Self {
            positions: self.positions,
            cache: self.cache.fork()?,
            chunks: self.chunks.clone(),
        })
    }
}

/// The bytes of codes that are told chunk by chunk.
pub(crate) fn shared_bytes(chunks: &[Arc<Share>]) -> usize {
    chunks.iter().map(|chunk| chunk.bytes()).sum()
}

/// The bytes of a cache's codes, which copies share, and of all else.
pub(crate) fn shared_and_own(cache: &dyn KvCache) -> (usize, usize) {
    let footprint = cache.footprint();
    let codes = footprint.parts.iter().filter(|(name, _)| *name == "codes");
    let codes = codes.map(|(_, bytes)| bytes).sum();
    (codes, footprint.total() - codes)
}

impl Prefixes {
    pub(crate) fn new(memory: Arc<Memory>, events: Option<KvEvents>) -> Self {
        Self {
            memory,
            kept: HashMap::new(),
            blocks: PromptBlocks::new(events, None),
            seen: Default::default(),
            clock: 0,
        }
    }

    /// The number of chunks of the longest of these prefixes, the shortest first, that is kept.
    pub(crate) fn longest(&self, keys: &[Key]) -> usize {
        let found = keys.iter().rposition(|key| self.kept.contains_key(key));
        found.map_or(0, |at| at + 1)
    }

    /// The longest of these prefixes, the shortest first, that is kept.
    pub(crate) fn find(&mut self, keys: &[Key]) -> Option<Prefix> {
        self.touch(keys)?.prefix.fork()
    }

    /// Counts a use of the longest of these prefixes that is kept.
    pub(crate) fn touch(&mut self, keys: &[Key]) -> Option<&Kept> {
        let longest = keys.get(self.longest(keys).checked_sub(1)?)?;
        self.clock += 1;
        let kept = self.kept.get_mut(longest)?;
        kept.used = self.clock;
        Some(kept)
    }

    /// The number of chunks at the beginning that were read before.
    pub(crate) fn seen(&self, keys: &[Key]) -> usize {
        let seen = |key: &&Key| self.seen.iter().any(|seen| seen.contains(key));
        keys.iter().take_while(seen).count()
    }

    /// Remembers that a chunk was read.
    pub(crate) fn see(&mut self, key: Key) {
        if self.seen[0].len() >= SEEN {
            self.seen.swap(0, 1);
            self.seen[0].clear();
        }
        self.seen[0].insert(key);
    }

    /// Keeps the prefix of these tokens, whose chunks have these names, where there is room or others that were used longer
    /// ago can make some.
    pub(crate) fn keep(&mut self, keys: &[Key], prefix: Prefix, tokens: &[u32]) {
        let Some(&key) = keys.last() else {
            return;
        };
        if self.kept.contains_key(&key) {
            return;
        }
        let (_, own) = shared_and_own(prefix.cache.as_ref());
        let Some(own) = self.make_room(own) else {
            return;
        };
        self.blocks.add(keys, tokens);
        self.clock += 1;
        let kept = Kept {
            prefix,
            keys: keys.to_vec(),
            own,
            used: self.clock,
        };
        self.kept.insert(key, kept);
    }

    /// Takes memory for a text that takes so many bytes at its end, and the longest of these prefixes of its prompt that is
    /// kept. What the text shares with it is not taken again.
    pub(crate) fn begin(&mut self, keys: &[Key], bytes: usize) -> Option<(Share, Option<Prefix>)> {
        // While they are held, giving the prefix up makes no room.
        let held = self.touch(keys).map(|kept| kept.prefix.chunks.clone());
        if let Some(held) = held {
            let shared = shared_bytes(&held);
            if let Some(own) = self.make_room(bytes.saturating_sub(shared))
                && let Some(prefix) = self.find(keys)
                && prefix.shared() == shared
            {
                return Some((own, Some(prefix)));
            }
        }
        let mut own = self.make_room(bytes)?;
        let prefix = self.find(keys);
        if let Some(prefix) = &prefix {
            drop(own.split(prefix.shared()));
        }
        Some((own, prefix))
    }

    /// Takes so many bytes of memory, for which prefixes that were used longest ago are given up, unless all of them would
    /// not be enough.
    pub(crate) fn make_room(&mut self, bytes: usize) -> Option<Share> {
        if let Some(share) = self.memory.take(bytes) {
            return Some(share);
        }
        let left = self.memory.budget().saturating_sub(self.memory.taken());
        if left + self.reclaimable() < bytes {
            return None;
        }
        loop {
            let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.used);
            let oldest = *oldest?.0;
            self.give_up(oldest);
            if let Some(share) = self.memory.take(bytes) {
                return Some(share);
            }
        }
    }

    /// The bytes that no running sequence shares.
    fn reclaimable(&self) -> usize {
        let mut chunks: HashMap<*const Share, (usize, &Arc<Share>)> = HashMap::new();
        for chunk in self.kept.values().flat_map(|kept| &kept.prefix.chunks) {
            chunks.entry(Arc::as_ptr(chunk)).or_insert((0, chunk)).0 += 1;
        }
        let only_here = chunks.into_values();
        let only_here = only_here.filter(|(count, chunk)| Arc::strong_count(chunk) == *count);
        let codes: usize = only_here.map(|(_, chunk)| chunk.bytes()).sum();
        codes
            + self
                .kept
                .values()
                .map(|kept| kept.own.bytes())
                .sum::<usize>()
    }

    fn give_up(&mut self, key: Key) {
        if let Some(kept) = self.kept.remove(&key) {
            self.blocks.remove(&kept.keys);
        }
    }

    /// The number of prefixes kept.
    pub(crate) fn len(&self) -> usize {
        self.kept.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use lexico_llm::Model;

    use super::*;

    /// Prefixes within a budget, one of them kept, whose codes take so many bytes.
    fn kept(budget: usize, codes: usize, tokens: &[u32]) -> (Prefixes, Vec<Key>) {
        let memory = Memory::new(budget);
        let mut prefixes = Prefixes::new(Arc::clone(&memory), None);
        let keys = Key::root(&[]).of_prompt(tokens, 2);
        let model = Model::tiny().unwrap();
        let prefix = Prefix {
            positions: 4,
            cache: model.cache(&"lexico".parse().unwrap()).unwrap(),
            chunks: vec![Arc::new(memory.take(codes).unwrap())],
        };
        prefixes.keep(&keys, prefix, &tokens[..4]);
        assert_eq!(prefixes.longest(&keys), 2);
        (prefixes, keys)
    }

    #[test]
    fn a_text_takes_only_what_it_does_not_share_with_its_prefix() {
        const BUDGET: usize = 100_000_000;
        let (mut prefixes, keys) = kept(BUDGET, 60_000_000, &[1, 2, 3, 4, 5]);
        // It would not fit beside the prefix.
        let (own, prefix) = prefixes.begin(&keys, 90_000_000).unwrap();
        assert_eq!(own.bytes(), 30_000_000);
        assert_eq!(prefix.unwrap().shared(), 60_000_000);
        drop(own);
        // Others get room that the prefix gives up.
        let (own, prefix) = prefixes.begin(&[], 90_000_000).unwrap();
        assert_eq!((own.bytes(), prefix.is_none()), (90_000_000, true));
        assert_eq!(prefixes.longest(&keys), 0);
        assert!(prefixes.begin(&keys, 20_000_000).is_none());
        drop(own);
        assert_eq!(prefixes.memory.taken(), 0);
        // Nor does a prefix stand in its own text's way.
        let (mut prefixes, keys) = kept(BUDGET, 60_000_000, &[1, 2, 3, 4, 5]);
        let (own, _) = prefixes.begin(&keys, BUDGET).unwrap();
        assert!(own.bytes() <= BUDGET && prefixes.memory.taken() <= BUDGET);
    }
}
