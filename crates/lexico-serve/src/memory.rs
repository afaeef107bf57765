//! The bytes that caches may take, and who has taken how many.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// A number of bytes for caches, and how many of them are taken.
#[derive(Debug)]
pub(crate) struct Memory {
    budget: usize,
    taken: AtomicUsize,
}

/// Some bytes of a [`Memory`], given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    memory: Arc<Memory>,
    bytes: usize,
}

impl Memory {
    pub(crate) fn new(budget: usize) -> Arc<Self> {
        let taken = AtomicUsize::new(0);
        Arc::new(Self { budget, taken })
    }

    pub(crate) fn budget(&self) -> usize {
        self.budget
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken.load(SeqCst)
    }

    /// Takes so many bytes where as many are left.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Option<Share> {
        let more = |taken: usize| {
            let taken = taken.checked_add(bytes)?;
            (taken <= self.budget).then_some(taken)
        };
        self.taken.fetch_update(SeqCst, SeqCst, more).ok()?;
        Some(Share {
            memory: Arc::clone(self),
            bytes,
        })
    }
}

impl Share {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Hands over so many of its bytes, or all where it has fewer.
    pub(crate) fn split(&mut self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self {
            memory: Arc::clone(&self.memory),
            bytes,
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.memory.taken.fetch_sub(self.bytes, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use super::*;

    #[test]
    fn what_is_taken_never_exceeds_the_budget_and_comes_back() {
        let memory = Memory::new(100);
        let mut first = memory.take(60).unwrap();
        assert!(memory.take(41).is_none() && memory.take(usize::MAX).is_none());
        let second = memory.take(40).unwrap();
        let part = first.split(50);
        assert_eq!((first.bytes(), part.bytes(), memory.taken()), (10, 50, 100));
        drop(first);
        drop(second);
        assert_eq!(memory.taken(), 50);
        drop(part);
        assert_eq!(memory.taken(), 0);
    }
}
