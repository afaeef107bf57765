//! Learning of all dictionaries for sparse codes, side by side.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lexico::Dictionary;
use lexico::learn::{InMemory, Learner, Vectors};
use lexico::threads::{Alone, Rayon, Threads};

use super::reading::{Reading, name};
use super::rows::OnDisk;
use super::state::{State, damaged};
use super::{Epoch, OnProgress, PARTS, TrainOptions, TrainProgress, go_on};
use crate::error::{Error, Result};

/// Max bytes of vectors that all dictionaries at work hold in memory together; more are read as they are needed.
const IN_MEMORY: usize = 1 << 30;

/// Learned dictionary, with the epochs that led to it.
pub(super) struct Learned {
    pub(super) dictionary: Dictionary,
    pub(super) held_out_error: f32,
    pub(super) epochs: Vec<Epoch>,
}

/// Work that is shared by the threads.
struct Work<'a, 'p> {
    reading: &'a Reading,
    options: &'a TrainOptions,
    state: &'a State,
    progress: Mutex<&'a mut OnProgress<'p>>,
    /// The next dictionary to be learned.
    next: AtomicUsize,
    /// Threads that still learn one.
    working: AtomicUsize,
    threads: usize,
    /// Holds vectors in memory, rather than reading them when they are needed.
    in_memory: bool,
    stop: AtomicBool,
}

/// Learns the keys' and the values' dictionary of every layer.
pub(super) fn learn_all(
    reading: &Reading,
    options: &TrainOptions,
    state: &State,
    progress: &mut OnProgress<'_>,
) -> Result<Vec<[Learned; 2]>> {
    let count = reading.samples.len();
    let threads = Rayon.count();
    let workers = threads.min(count);
    let bytes = reading.count() * reading.head_dim * size_of::<f32>();
    let work = Work {
        reading,
        options,
        state,
        progress: Mutex::new(progress),
        next: AtomicUsize::new(0),
        working: AtomicUsize::new(workers),
        threads,
        in_memory: workers.saturating_mul(bytes) <= IN_MEMORY,
        stop: AtomicBool::new(false),
    };
    let done: Vec<Mutex<Option<Result<Learned>>>> = (0..count).map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let number = work.next.fetch_add(1, Ordering::SeqCst);
                    let Some(place) = done.get(number) else { break };
                    let learned = work.learn(number);
                    if learned.is_err() {
                        work.stop.store(true, Ordering::SeqCst);
                    }
                    *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(learned);
                }
                work.working.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    let mut all = Vec::with_capacity(count);
    let mut interrupted = false;
    for learned in done {
        match learned.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(Ok(learned)) => all.push(learned),
            // What broke off because of another's error is not the one to tell of.
            None | Some(Err(Error::Codec(lexico::Error::Interrupted))) => interrupted = true,
            Some(Err(error)) => return Err(error),
        }
    }
    if interrupted {
        return Err(lexico::Error::Interrupted.into());
    }
    let mut all = all.into_iter();
    let pairs = std::iter::from_fn(|| Some([all.next()?, all.next()?]));
    Ok(pairs.collect())
}

impl Work<'_, '_> {
    fn tell(&self, progress: TrainProgress) -> Result<()> {
        let mut tell = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if self.stop.load(Ordering::SeqCst) {
            return Err(lexico::Error::Interrupted.into());
        }
        go_on(tell(progress))
    }

    fn learn(&self, number: usize) -> Result<Learned> {
        let held_out = self.reading.held_out(number)?.vectors;
        let head_dim = self.reading.head_dim;
        if !self.in_memory {
            let rows = &self.reading.samples[number].train.rows;
            let vectors = OnDisk {
                rows,
                count: self.reading.count(),
                head_dim,
            };
            return self.learn_from(number, &vectors, &held_out);
        }
        let vectors = self.reading.vectors(number)?.vectors;
        let vectors = InMemory::new(&vectors, head_dim)?;
        self.learn_from(number, &vectors, &held_out)
    }

    fn learn_from(
        &self,
        number: usize,
        vectors: &dyn Vectors,
        held_out: &[f32],
    ) -> Result<Learned> {
        let (layer, part) = (number / 2, PARTS[number % 2]);
        let head_dim = self.reading.head_dim;
        let mut options = self.options.learn.clone();
        options.seed = options.seed.wrapping_add(number as u64);
        let file = format!("{}.learning", name(number));
        let mut course = Course::default();
        let mut learner = match self.state.load(&file)? {
            Some(saved) => {
                let rest = course.load(&saved);
                let rest = rest.ok_or_else(|| damaged(&self.state.path(&file)))?;
                Learner::resume(vectors, held_out, head_dim, &options, rest)?
            }
            None => Learner::new(vectors, held_out, head_dim, &options)?,
        };
        let save = |learner: &Learner<'_>, course: &Course| {
            self.state.save(&file, &course.save(&learner.save()))
        };
        let mut saved = Instant::now();
        while !learner.is_done() {
            // One core each, until there are more cores than dictionaries.
            let alone = self.working.load(Ordering::SeqCst) >= self.threads;
            let threads: &dyn Threads = if alone { &Alone } else { &Rayon };
            let began = Instant::now();
            let progress = learner.step(threads)?;
            course.spent += began.elapsed();
            if let Some(held_out_error) = progress.held_out_error {
                course.epochs.push(Epoch {
                    seconds: course.spent.as_secs_f64(),
                    held_out_error,
                });
            }
            let told = self.tell(TrainProgress::Learning {
                layer,
                part,
                progress,
            });
            if told.is_err() || learner.is_done() || saved.elapsed() >= self.state.every {
                save(&learner, &course)?;
                saved = Instant::now();
            }
            told?;
        }
        let learned = learner.finish();
        // A corpus has at least two chunks, of which one is held out.
        let held_out_error = learned.held_out_error.unwrap_or(f32::NAN);
        self.tell(TrainProgress::Learned {
            layer,
            part,
            held_out_error,
        })?;
        Ok(Learned {
            dictionary: learned.dictionary,
            held_out_error,
            epochs: course.epochs,
        })
    }
}

/// Time and epochs of a dictionary so far.
#[derive(Default)]
struct Course {
    spent: Duration,
    epochs: Vec<Epoch>,
}

impl Course {
    fn save(&self, learner: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(learner.len() + 16 + 12 * self.epochs.len());
        out.extend_from_slice(&self.spent.as_secs_f64().to_le_bytes());
        out.extend_from_slice(&(self.epochs.len() as u64).to_le_bytes());
        for epoch in &self.epochs {
            out.extend_from_slice(&epoch.seconds.to_le_bytes());
            out.extend_from_slice(&epoch.held_out_error.to_le_bytes());
        }
        out.extend_from_slice(learner);
        out
    }

    /// Takes what was saved and returns the learner's part of it.
    fn load<'a>(&mut self, saved: &'a [u8]) -> Option<&'a [u8]> {
        let (spent, saved) = saved.split_first_chunk()?;
        self.spent = Duration::try_from_secs_f64(f64::from_le_bytes(*spent)).ok()?;
        let (count, mut saved) = saved.split_first_chunk()?;
        for _ in 0..u64::from_le_bytes(*count) {
            let (seconds, rest) = saved.split_first_chunk()?;
            let (held_out_error, rest) = rest.split_first_chunk()?;
            self.epochs.push(Epoch {
                seconds: f64::from_le_bytes(*seconds),
                held_out_error: f32::from_le_bytes(*held_out_error),
            });
            saved = rest;
        }
        Some(saved)
    }
}
