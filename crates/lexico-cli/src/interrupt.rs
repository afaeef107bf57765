//! Ctrl-C: the first one asks the work to stop at the next safe place, the second ends the program.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

static HAPPENED: AtomicBool = AtomicBool::new(false);

/// Listens from now on; to be called where the work begins that asks [`flow`] whether to go on.
pub(crate) fn listen() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if HAPPENED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .context("cannot listen for Ctrl-C")
}

pub(crate) fn happened() -> bool {
    HAPPENED.load(Ordering::SeqCst)
}

/// Tells a callback whether to go on.
pub(crate) fn flow() -> ControlFlow<()> {
    if happened() {
        ControlFlow::Break(())
    } else {
        ControlFlow::Continue(())
    }
}

/// Forgets a Ctrl-C after which work goes on, or that came after the work.
pub(crate) fn forget() {
    HAPPENED.store(false, Ordering::SeqCst);
}
