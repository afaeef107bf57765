//! Work that Python waits for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::OnceLock;

use pyo3::prelude::*;

use crate::error::LexicoError;

/// The process that the threads were begun in.
static PROCESS: OnceLock<u32> = OnceLock::new();

/// Does `work` while other threads of Python go on. A panic, which would be a fault of this library, is an exception.
///
/// # Errors
/// `LexicoError` in a process that was forked after its parent had begun: the threads are not in it, and whoever waits for
/// them waits for ever.
pub(crate) fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    if *PROCESS.get_or_init(process::id) != process::id() {
        return Err(LexicoError::new_err(
            "this process was forked from one that had used lexico, whose threads are not in it; \
             start processes with the method \"spawn\" or \"forkserver\" of multiprocessing",
        ));
    }
    let done = py.detach(|| catch_unwind(AssertUnwindSafe(work)));
    done.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let text = text.unwrap_or_default();
        LexicoError::new_err(format!("a fault of lexico, please report it: {text}"))
    })
}
