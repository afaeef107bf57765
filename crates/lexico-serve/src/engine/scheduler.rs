//! The steps of the engine.
//!
//! A step reads a chunk of one prompt, then writes a token of every text whose prompt is read. Prompts take turns. A text
//! is admitted when its cache at its end fits the memory that is left; until then it waits. Calls are admitted in the order of
//! arrival, but each further text of a call lets one more call go before it.
//!
//! A row of a matrix product does not depend on the rows beside it, and a chunk's boundaries not on other texts, so that a
//! text is the same whoever is served beside it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use lexico_llm::cache::KvCache;
use lexico_llm::decoder::{self, Logits};
use lexico_llm::{Result, caught, give_back_free_memory};
use rayon::prelude::*;

use super::guarded::Guarded;
use super::request::{Event, Failure, Request};
use super::sequence::Sequence;
use super::{Call, Setup};
use crate::memory::Share;
use crate::prefix::{Prefix, shared_and_own, shared_bytes};

/// Time after which waiting requests are looked at again while nothing else happens.
const LOOK: Duration = Duration::from_millis(100);
/// Time between two measurements of the caches.
const NOW_AND_THEN: Duration = Duration::from_millis(500);
/// Time between two moments at which free memory is given back to the system, and without work before it is: what texts leave between
/// those that go on would add a fifth to what the caches take.
const GIVE_BACK: Duration = Duration::from_secs(2);

pub(super) struct Scheduler<'s> {
    setup: &'s Setup,
    calls: Receiver<Call>,
    /// In the order in which they are admitted.
    waiting: VecDeque<Waiting>,
    /// Number of calls so far.
    count: u64,
    running: Vec<Sequence<'s>>,
    /// Counts turns of reading.
    turn: usize,
    /// True once no request can come any more.
    closed: bool,
    measured: Instant,
    /// When free memory is to be given back.
    give_back: Instant,
}

/// A text that waits to be admitted.
struct Waiting {
    request: Request,
    asked: Instant,
    /// Number of its call.
    call: u64,
    /// The call before whose first text it is admitted at the latest.
    turn: u64,
    /// Whether another text of its call was admitted: the call is then answered, however long that takes.
    begun: bool,
}

impl<'s> Scheduler<'s> {
    pub(super) fn new(setup: &'s Setup, calls: Receiver<Call>) -> Self {
        Self {
            setup,
            calls,
            waiting: VecDeque::new(),
            count: 0,
            running: Vec::new(),
            turn: 0,
            closed: false,
            measured: Instant::now(),
            give_back: Instant::now() + GIVE_BACK,
        }
    }

    /// Works until no request is left and none can come.
    pub(super) fn run(mut self) {
        while !self.closed || !self.running.is_empty() || !self.waiting.is_empty() {
            self.take_requests();
            self.running.retain(|sequence| !sequence.is_gone());
            self.admit();
            self.read();
            self.write();
            self.running.retain(|sequence| !sequence.over);
            self.measure();
        }
    }

    /// Takes what has come, and waits for it where there is nothing else to do.
    fn take_requests(&mut self) {
        if self.running.is_empty() && !self.closed {
            self.measure();
            let next = match self.waiting.is_empty() {
                true => self.next_call(),
                false => self.calls.recv_timeout(LOOK),
            };
            match next {
                Ok(call) => self.line_up(call),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.closed = true,
            }
        }
        loop {
            match self.calls.try_recv() {
                Ok(call) => self.line_up(call),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.closed = true;
                    return;
                }
            }
        }
    }

    /// Waits for a call while there is nothing else to do.
    fn next_call(&self) -> std::result::Result<Call, RecvTimeoutError> {
        match self.calls.recv_timeout(GIVE_BACK) {
            Err(RecvTimeoutError::Timeout) => {
                // Perhaps none comes for long.
                give_back_free_memory();
                let next = self.calls.recv();
                next.map_err(|_| RecvTimeoutError::Disconnected)
            }
            next => next,
        }
    }

    fn line_up(&mut self, Call { requests, asked }: Call) {
        let call = self.count;
        self.count += 1;
        for (turn, request) in (call..).zip(requests) {
            let before = |other: &Waiting| (other.turn, other.call) < (turn, call);
            let at = self.waiting.partition_point(before);
            let waiting = Waiting {
                request,
                asked,
                call,
                turn,
                begun: false,
            };
            self.waiting.insert(at, waiting);
        }
    }

    /// Admits those that wait, as far as places and memory reach, and turns away the calls that came last where too many
    /// texts are left.
    fn admit(&mut self) {
        let patience = self.setup.patience;
        self.waiting.retain(|waiting| {
            let late = !waiting.begun && waiting.asked.elapsed() > patience;
            if late {
                fail(&waiting.request, Failure::Busy);
            }
            !late && !waiting.request.events.is_closed()
        });
        while self.running.len() < self.setup.parallel
            && let Some(Waiting { request, .. }) = self.waiting.front()
        {
            let keys = self.setup.root.of_prompt(&request.prompt, self.setup.chunk);
            // Logits of all its tokens need all of them read.
            let usable = if request.prompt_logprobs {
                0
            } else {
                keys.len()
            };
            let room = self.setup.prefixes().begin(&keys[..usable], request.bytes);
            let Some(room) = room else {
                break;
            };
            let Some(admitted) = self.waiting.pop_front() else {
                break;
            };
            let Waiting {
                request,
                asked,
                call,
                ..
            } = admitted;
            for other in &mut self.waiting {
                other.begun |= other.call == call;
            }
            let (index, events) = (request.index, request.events.clone());
            let made = self.setup.model.cache(&self.setup.spec).and_then(|cache| {
                let cache = Guarded::new(cache);
                Sequence::new(&self.setup.model, request, keys, cache, room, asked)
            });
            match made {
                Ok(sequence) => self.running.push(sequence),
                Err(error) => {
                    let failure = Failure::Internal(error.to_string());
                    let _ = events.send((index, Event::Failed(failure)));
                }
            }
        }
        while self.waiting.len() > self.setup.queue {
            let not_begun = self.waiting.iter().filter(|waiting| !waiting.begun);
            let Some(last) = not_begun.map(|waiting| waiting.call).max() else {
                break;
            };
            self.waiting.retain(|waiting| {
                let turned_away = waiting.call == last;
                if turned_away {
                    fail(&waiting.request, Failure::Busy);
                }
                !turned_away
            });
        }
    }

    /// Reads a chunk of the prompt whose turn it is.
    fn read(&mut self) {
        let count = self.running.len();
        let order = (0..count).map(|i| (self.turn + 1 + i) % count.max(1));
        let Some(next) = order.into_iter().find(|&i| self.may_read(i)) else {
            return;
        };
        self.turn = next;
        let setup = self.setup;
        let sequence = &mut self.running[next];
        if !sequence.begun {
            begin(setup, sequence);
        }
        let from = sequence.read;
        let to = (from / setup.chunk + 1) * setup.chunk;
        let to = to.min(sequence.prompt.len());
        let done = read_tokens(setup, sequence, from, to);
        let done = done.and_then(|logits| match sequence.cache.failed() {
            Some(reason) => Err(reason.to_owned()),
            None => Ok(logits),
        });
        match done {
            Err(reason) => sequence.fail(reason),
            Ok(logits) => {
                sequence.read = to;
                if to.is_multiple_of(setup.chunk) {
                    end_chunk(setup, sequence);
                }
                if !sequence.reads() {
                    sequence.take_first(logits, setup.context, &setup.metrics);
                }
            }
        }
    }

    /// Whether a sequence has something to read, and no other one is reading the same prompt, whose prefix it could begin
    /// from.
    fn may_read(&self, i: usize) -> bool {
        let own = &self.running[i];
        let same = |other: &Sequence<'_>| other.begun && other.reads() && other.keys == own.keys;
        let waits = !own.begun && !own.keys.is_empty() && self.running.iter().any(same);
        own.reads() && !waits
    }

    /// Writes a token of every text whose prompt is read.
    fn write(&mut self) {
        let setup = self.setup;
        let writing = self.running.iter_mut();
        let writing = writing.filter(|s| !s.reads() && !s.over);
        let mut writing: Vec<&mut Sequence<'s>> = writing.collect();
        for together in writing.chunks_mut(setup.model.decoder.rows_alike()) {
            write_tokens(setup, together);
        }
    }

    /// Tells the figures: what takes long to find out only now and then.
    fn measure(&mut self) {
        let setup = self.setup;
        let reading = self.running.iter().filter(|s| s.reads()).count();
        let writing = self.running.len() - reading;
        setup
            .metrics
            .sequences(self.waiting.len(), reading, writing);
        setup.metrics.reserved(setup.memory.taken());
        if self.measured.elapsed() < NOW_AND_THEN && !self.running.is_empty() {
            return;
        }
        self.measured = Instant::now();
        // Codes that texts share count once.
        let mut chunks: HashMap<*const Share, usize> = HashMap::new();
        let own = self.running.iter().map(|sequence| {
            let shared = sequence.chunks.iter();
            chunks.extend(shared.map(|chunk| (Arc::as_ptr(chunk), chunk.bytes())));
            let total = sequence.cache.footprint().total();
            total.saturating_sub(shared_bytes(&sequence.chunks))
        });
        let own: usize = own.sum();
        let held = own + chunks.into_values().sum::<usize>();
        let config = setup.model.decoder.config();
        let fp16 = self
            .running
            .iter()
            .map(|s| config.fp16_cache_bytes(s.cache.len()));
        let prefixes = setup.prefixes().len();
        setup.metrics.caches(held, fp16.sum(), prefixes);
        if Instant::now() >= self.give_back {
            let started = Instant::now();
            give_back_free_memory();
            // No more than a hundredth of the time, however much memory there is.
            self.give_back = Instant::now() + GIVE_BACK.max(100 * started.elapsed());
        }
    }
}

fn fail(request: &Request, failure: Failure) {
    // Where the client has gone nobody has to know.
    let _ = request.events.send((request.index, Event::Failed(failure)));
}

/// Runs tokens through the model; returns a row of logits each.
fn forward(
    setup: &Setup,
    sequences: &mut [decoder::Sequence<'_>],
    wanted: Logits,
) -> std::result::Result<Vec<Vec<f32>>, String> {
    let run = || -> Result<Vec<Vec<f32>>> {
        let logits = setup.model.decoder.forward(sequences, wanted)?;
        Ok(logits.to_vec2()?)
    };
    caught(run)?.map_err(|error| error.to_string())
}

/// Begins a prompt from the longest prefix kept, and decides which of its own to keep.
fn begin(setup: &Setup, sequence: &mut Sequence<'_>) {
    sequence.begun = true;
    let mut prefixes = setup.prefixes();
    let parts = prefixes.seen(&sequence.keys);
    let whole = sequence.keys.len();
    sequence.keep_after = vec![whole];
    if (1..whole).contains(&parts) {
        sequence.keep_after.push(parts);
    }
    let admitted = sequence.prefix.take();
    let (chunks, taken) = admitted.as_ref().map_or((0, 0), |prefix| {
        (prefix.positions / setup.chunk, prefix.shared())
    });
    // Others may have read more of it since it was admitted.
    let more = !sequence.prompt_logprobs && prefixes.longest(&sequence.keys) > chunks;
    let found = match more {
        true => prefixes.find(&sequence.keys).or(admitted),
        false => admitted,
    };
    drop(prefixes);
    setup.metrics.prefix(found.is_some());
    let Some(prefix) = found else {
        return;
    };
    drop(sequence.own.split(prefix.shared().saturating_sub(taken)));
    store(setup, sequence, &prefix);
    sequence.read = prefix.positions;
    sequence.cached = prefix.positions;
    sequence.coded_bytes = shared_and_own(prefix.cache.as_ref()).0;
    sequence.chunks = prefix.chunks;
    sequence.cache = Guarded::new(prefix.cache);
}

/// Writes a prefix of a text's prompt to the store, which may have been too busy, or away, when it was read.
fn store(setup: &Setup, sequence: &Sequence<'_>, prefix: &Prefix) {
    if let Some(store) = &setup.store {
        let keys = &sequence.keys[..prefix.positions / setup.chunk];
        store.write(keys, prefix, &sequence.prompt[..prefix.positions]);
    }
}

/// Reads the prompt's tokens `from..to`; returns the logits of the last.
fn read_tokens(
    setup: &Setup,
    sequence: &mut Sequence<'_>,
    from: usize,
    to: usize,
) -> std::result::Result<Vec<f32>, String> {
    let all = sequence.prompt_logprobs;
    let tokens = sequence.prompt[from..to].to_vec();
    let wanted = if all { Logits::All } else { Logits::Last };
    let mut sequences = [decoder::Sequence {
        tokens: &tokens,
        cache: &mut sequence.cache,
    }];
    let mut logits = forward(setup, &mut sequences, wanted)?;
    if all {
        sequence.take_prompt_logits(from, &logits);
    }
    Ok(logits.pop().unwrap_or_default())
}

/// Accounts for a chunk that was read, and keeps the prefix that ends with it where it is to be kept.
fn end_chunk(setup: &Setup, sequence: &mut Sequence<'_>) {
    let number = sequence.read / setup.chunk;
    let Some(keys) = sequence.keys.get(..number) else {
        return;
    };
    let (coded, _) = shared_and_own(sequence.cache.inner());
    let bytes = coded.saturating_sub(sequence.coded_bytes);
    sequence.coded_bytes = coded;
    let chunk = sequence.own.split(bytes);
    sequence.chunks.push(Arc::new(chunk));
    let mut prefixes = setup.prefixes();
    if let Some(&key) = keys.last() {
        prefixes.see(key);
    }
    if !sequence.keep_after.contains(&number) {
        return;
    }
    let Some(cache) = sequence.cache.fork() else {
        return;
    };
    let prefix = Prefix {
        positions: sequence.read,
        cache,
        chunks: sequence.chunks.clone(),
    };
    store(setup, sequence, &prefix);
    prefixes.keep(keys, prefix, &sequence.prompt[..sequence.read]);
}

/// Writes a token of each of some texts.
fn write_tokens(setup: &Setup, writing: &mut [&mut Sequence<'_>]) {
    let last: Vec<[u32; 1]> = writing.iter().map(|s| [s.last.unwrap_or(0)]).collect();
    let mut sequences = Vec::with_capacity(writing.len());
    for (sequence, tokens) in writing.iter_mut().zip(&last) {
        sequences.push(decoder::Sequence {
            tokens,
            cache: &mut sequence.cache,
        });
    }
    let logits = forward(setup, &mut sequences, Logits::Last);
    drop(sequences);
    let logits = match logits {
        Ok(logits) => logits,
        Err(reason) => {
            writing.iter_mut().for_each(|s| s.fail(reason.clone()));
            return;
        }
    };
    let both = writing.par_iter_mut().zip(logits);
    let chosen = both.map(|(sequence, logits)| match sequence.cache.failed() {
        Some(reason) => Err(reason.to_owned()),
        None => sequence.choose(logits),
    });
    let chosen: Vec<_> = chosen.collect();
    for (sequence, chosen) in writing.iter_mut().zip(chosen) {
        sequence.take(chosen, setup.context, &setup.metrics);
    }
}
