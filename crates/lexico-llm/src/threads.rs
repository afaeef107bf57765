//! The threads that models compute on.
//!
//! A token's work is some hundred short loops, one after the other. rayon's threads fall asleep between two of them
//! and are slow to wake; those of candle are awake, but wait for each other however long another program keeps one from
//! its core. These stay awake for a moment, then sleep; tasks go to whoever asks next, a thread that did not come
//! is not waited for, and one that was kept from its core in the middle of a task is left out for a while.

#![allow(
    unsafe_code,
    reason = "a loop's body is lent to threads that outlive it"
)]

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use lexico::threads::Threads;

/// The threads that models and caches compute on.
pub(crate) struct ModelThreads;

/// Time that a thread stays awake without work: longer than what lies between two loops of a token, short beside the
/// time that the system gives a thread at once.
const AWAKE: Duration = Duration::from_micros(200);

/// Time that a thread is left out after the others had to wait for it.
const LEFT_OUT: Duration = Duration::from_millis(100);

/// Number of threads: as many as rayon has, unless the environment says otherwise.
static COUNT: LazyLock<usize> = LazyLock::new(rayon::current_num_threads);
static POOL: OnceLock<Pool> = OnceLock::new();

/// Threads that models and caches compute on.
pub fn threads_in_use() -> usize {
    *COUNT
}

/// Returns true where the processor has cores that [`ModelThreads`] does not use.
pub(crate) fn cores_to_spare() -> bool {
    thread::available_parallelism().is_ok_and(|cores| cores.get() > *COUNT)
}

thread_local! {
    /// True in a loop's body: a loop within a loop runs on its own thread.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Threads for ModelThreads {
    fn count(&self) -> usize {
        *COUNT
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || *COUNT == 1 || INSIDE.get() {
            return (0..tasks).for_each(task);
        }
        POOL.get_or_init(|| Pool::new(*COUNT - 1)).run(tasks, task);
    }
}

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// What all threads share.
struct Shared {
    /// Odd while a loop runs, and another number for each.
    round: AtomicUsize,
    /// The loop that runs; written between two rounds only.
    task: UnsafeCell<Option<Task<'static>>>,
    tasks: AtomicUsize,
    /// The next task to be taken.
    next: AtomicUsize,
    /// When the pool began.
    began: Instant,
    /// Threads that are in the loop, beside the one that began it.
    inside: AtomicUsize,
    /// The thread that began it, where it sleeps until all have left.
    waiting: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `task` is written only by the thread that holds the pool's lock, while no round is open and nobody is inside.
unsafe impl Sync for Shared {}

struct Pool {
    shared: &'static Shared,
    workers: Vec<Worker>,
    /// Held by the thread whose loop runs.
    lock: Mutex<()>,
}

struct Worker {
    thread: Thread,
    state: &'static WorkerState,
}

/// What others know of a thread of the pool.
#[derive(Default)]
struct WorkerState {
    asleep: AtomicBool,
    inside: AtomicBool,
    /// Microseconds from the pool's beginning until which it is left out.
    left_out_until: AtomicU64,
}

impl Pool {
    /// A pool with up to so many threads of its own: fewer where the system gives no more.
    fn new(count: usize) -> Self {
        let shared: &'static Shared = Box::leak(Box::new(Shared {
            round: AtomicUsize::new(0),
            task: UnsafeCell::new(None),
            tasks: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            began: Instant::now(),
            inside: AtomicUsize::new(0),
            waiting: Mutex::new(None),
            panic: Mutex::new(None),
        }));
        let worker = |number: usize| {
            let state: &'static WorkerState = Box::leak(Box::default());
            let builder = thread::Builder::new().name(format!("model-{number}"));
            let thread = builder.spawn(move || shared.work(state)).ok()?;
            Some(Worker {
                thread: thread.thread().clone(),
                state,
            })
        };
        Self {
            shared,
            workers: (0..count).map_while(worker).collect(),
            lock: Mutex::new(()),
        }
    }

    fn run(&self, tasks: usize, task: Task<'_>) {
        let _lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = self.shared;
        // SAFETY: the round is closed and everybody has left before this function returns or unwinds, so that nobody
        // uses the task longer than it lives; no round is open, so that nobody reads while it is written.
        unsafe { *shared.task.get() = Some(std::mem::transmute::<Task<'_>, Task<'static>>(task)) };
        shared.tasks.store(tasks, SeqCst);
        shared.next.store(0, SeqCst);
        shared.round.fetch_add(1, SeqCst);
        let started = Instant::now();
        let there = self.workers.iter();
        let there = there.filter(|worker| !shared.is_left_out(worker.state));
        for worker in there.take(tasks - 1) {
            if worker.state.asleep.swap(false, SeqCst) {
                worker.thread.unpark();
            }
        }
        shared.take_tasks(task);
        shared.round.fetch_add(1, SeqCst);
        shared.wait_until_left(&self.workers, started.elapsed());
        let panic = shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Shared {
    /// Takes tasks until there are none, and keeps the first panic of one.
    fn take_tasks(&self, task: Task<'_>) {
        INSIDE.set(true);
        let done = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let number = self.next.fetch_add(1, SeqCst);
                if number >= self.tasks.load(SeqCst) {
                    return;
                }
                task(number);
            }
        }));
        INSIDE.set(false);
        if let Err(panic) = done {
            // Nobody begins another.
            self.next.store(usize::MAX / 2, SeqCst);
            let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(panic);
        }
    }

    fn is_left_out(&self, worker: &WorkerState) -> bool {
        let until = worker.left_out_until.load(SeqCst);
        until > 0 && (self.began.elapsed().as_micros() as u64) < until
    }

    /// Waits, awake for a moment, until the others have left a round that is closed; `own` is what this thread's tasks
    /// took.
    fn wait_until_left(&self, workers: &[Worker], own: Duration) {
        let left = || self.inside.load(SeqCst) == 0;
        if awake_until(left) {
            return;
        }
        // Asleep, it leaves its core to a thread that another program keeps from its own.
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
        let patience = Instant::now() + 2 * own;
        while !left() && Instant::now() < patience {
            thread::park_timeout(patience.saturating_duration_since(Instant::now()));
        }
        let until = (self.began.elapsed() + LEFT_OUT).as_micros() as u64;
        for worker in workers
            .iter()
            .filter(|worker| worker.state.inside.load(SeqCst))
        {
            worker.state.left_out_until.store(until, SeqCst);
        }
        while !left() {
            thread::park();
        }
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What a thread of the pool does, forever.
    fn work(&self, state: &WorkerState) {
        let mut seen = 0;
        loop {
            let open = || {
                let round = self.round.load(SeqCst);
                round % 2 == 1 && round != seen && !self.is_left_out(state)
            };
            while !awake_until(open) {
                state.asleep.store(true, SeqCst);
                // A round may have begun before it was said.
                while state.asleep.load(SeqCst) && !open() {
                    thread::park();
                }
                state.asleep.store(false, SeqCst);
            }
            self.inside.fetch_add(1, SeqCst);
            state.inside.store(true, SeqCst);
            let round = self.round.load(SeqCst);
            if round % 2 == 1 {
                seen = round;
                // SAFETY: the round is open and this thread inside, so that it is not closed for good before it leaves.
                let task = unsafe { *self.task.get() };
                if let Some(task) = task {
                    self.take_tasks(task);
                }
            }
            state.inside.store(false, SeqCst);
            if self.inside.fetch_sub(1, SeqCst) == 1 && self.round.load(SeqCst).is_multiple_of(2) {
                let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(thread) = waiting.as_ref() {
                    thread.unpark();
                }
            }
        }
    }
}

/// Looks for [`AWAKE`] whether something has come about; returns false where it has not.
fn awake_until(happened: impl Fn() -> bool) -> bool {
    const LOOKS: usize = 32;
    let started = Instant::now();
    loop {
        for _ in 0..LOOKS {
            if happened() {
                return true;
            }
            std::hint::spin_loop();
        }
        if started.elapsed() > AWAKE {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = Pool::new(3);
        for tasks in [1, 2, 3, 7, 1000] {
            for _ in 0..50 {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|task| {
                    runs[task].fetch_add(1, SeqCst);
                });
                assert!(runs.iter().all(|runs| runs.load(SeqCst) == 1));
            }
        }
    }

    #[test]
    fn loops_of_several_threads_and_within_each_other_end() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(4, &|_| {
                            ModelThreads.run(5, &|_| {
                                sum.fetch_add(1, SeqCst);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.load(SeqCst), 3 * 100 * 4 * 5);
    }

    #[test]
    fn threads_that_fell_asleep_wake_up() {
        let pool = Pool::new(1);
        for _ in 0..5 {
            thread::sleep(5 * AWAKE);
            let other = AtomicUsize::new(0);
            let own = thread::current().id();
            // Each task waits for the other, so that one thread cannot do both.
            let came = std::sync::Barrier::new(2);
            pool.run(2, &|_| {
                came.wait();
                if thread::current().id() != own {
                    other.fetch_add(1, SeqCst);
                }
            });
            assert_eq!(other.load(SeqCst), 1);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(100, &|task| assert!(task != 40, "forty"));
        }));
        let panic = caught.unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"forty"));
        let runs = AtomicUsize::new(0);
        pool.run(10, &|_| {
            runs.fetch_add(1, SeqCst);
        });
        assert_eq!(runs.load(SeqCst), 10);
    }
}
