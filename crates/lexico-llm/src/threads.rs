use std::sync::LazyLock;

use candle_core::utils::barrier_pool;
use lexico::threads::Threads;

/// The threads of candle's quantised products. They spin for a while after each of them, so that work between
/// two products finds them awake, and a pool of others would find no core free.
pub(crate) struct CandleThreads;

/// Number of threads that candle uses: what rayon would, unless the environment says otherwise.
static COUNT: LazyLock<usize> = LazyLock::new(|| {
    let told = std::env::var("CANDLE_NUM_THREADS").ok();
    let told = told.and_then(|count| count.parse().ok());
    told.unwrap_or_else(rayon::current_num_threads)
});

/// Threads that models and caches compute on.
pub fn threads_in_use() -> usize {
    *COUNT
}

/// Returns true where the processor has cores that [`CandleThreads`] does not use.
pub(crate) fn cores_to_spare() -> bool {
    std::thread::available_parallelism().is_ok_and(|cores| cores.get() > *COUNT)
}

impl Threads for CandleThreads {
    fn count(&self) -> usize {
        *COUNT
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks == 1 {
            return task(0);
        }
        barrier_pool().execute_chunked(tasks, |numbers| numbers.for_each(task));
    }
}
