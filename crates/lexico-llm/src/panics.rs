//! Libraries that panic on damaged files: what they say becomes an error.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};

thread_local! {
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Calls `work`, in which a library may panic; the error is what the panic said. See [`hide_caught_panics`].
///
/// # Errors
/// The place where it panics.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let before = CAUGHT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    CAUGHT.set(before);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        text.unwrap_or_else(|| "a panic without a word".to_owned())
    })
}

/// Keeps panics that end as an [`Error`](crate::Error) from being printed besides. For programs: it sets the
/// process's panic hook, before which the one at hand still runs for all others.
pub fn hide_caught_panics() {
    let others = take_hook();
    set_hook(Box::new(move |info| {
        if !CAUGHT.get() {
            others(info);
        }
    }));
}
