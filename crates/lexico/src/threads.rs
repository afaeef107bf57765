//! Threads that run tasks side by side.
//!
//! A program that keeps a pool of threads of its own busy, as tensor libraries do, is slowed down by a
//! second pool that wants the same cores: what is called between its own products runs on its threads.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

/// Threads that tasks can be spread over.
pub trait Threads: Sync {
    /// Number of threads.
    fn count(&self) -> usize;

    /// Runs `task` once for every number below `tasks`, in any order, and returns when all are done.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// The current rayon pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rayon;

impl Threads for Rayon {
    fn count(&self) -> usize {
        rayon::current_num_threads()
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).into_par_iter().for_each(task);
    }
}

/// The calling thread alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Threads for Alone {
    fn count(&self) -> usize {
        1
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

/// Does `work` on every item, the items spread over `threads`.
///
/// ```
/// let mut squares = [1, 2, 3];
/// lexico::threads::for_each(&lexico::threads::Rayon, &mut squares, |x| *x *= *x);
/// assert_eq!(squares, [1, 4, 9]);
/// ```
pub fn for_each<T: Send>(
    threads: &dyn Threads,
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) + Sync,
) {
    // Each is taken by one task; no lock is ever waited for.
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|x| Mutex::new(Some(x))).collect();
    threads.run(items.len(), &|number| {
        let item = items[number].lock();
        let item = item.unwrap_or_else(PoisonError::into_inner).take();
        if let Some(item) = item {
            work(item);
        }
    });
}
