//! Ctrl-C, SIGTERM and SIGHUP: the first asks the work to stop at the next safe place, a second Ctrl-C ends the program.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::Context;

/// Number of the signal that came, 0 for none.
static CAME: AtomicI32 = AtomicI32::new(0);
/// Number of SIGINT, which Ctrl-C sends.
const CTRL_C: i32 = 2;

/// Listens from now on; to be called where the work begins that asks [`flow`] whether to go on.
pub(crate) fn listen() -> anyhow::Result<()> {
    signals::listen().context("cannot listen for signals")
}

fn came(signal: i32) {
    // Whoever ends a job often sends more than one signal; only a person means it.
    let before = CAME.swap(signal, Ordering::SeqCst);
    if before != 0 && signal == CTRL_C {
        std::process::exit(128 + signal);
    }
}

/// The exit code of a program that a signal ended, where one came.
pub(crate) fn exit_code() -> Option<u8> {
    match CAME.load(Ordering::SeqCst) {
        0 => None,
        signal => u8::try_from(128 + signal).ok(),
    }
}

pub(crate) fn happened() -> bool {
    exit_code().is_some()
}

/// Returns true where the program is to end, not only its present work.
pub(crate) fn ends_program() -> bool {
    ![0, CTRL_C].contains(&CAME.load(Ordering::SeqCst))
}

/// Tells a callback whether to go on.
pub(crate) fn flow() -> ControlFlow<()> {
    if happened() {
        ControlFlow::Break(())
    } else {
        ControlFlow::Continue(())
    }
}

/// Forgets a signal that came after the work.
pub(crate) fn forget() {
    CAME.store(0, Ordering::SeqCst);
}

/// Forgets a Ctrl-C that only broke an answer off.
pub(crate) fn forget_ctrl_c() {
    let _ = CAME.compare_exchange(CTRL_C, 0, Ordering::SeqCst, Ordering::SeqCst);
}

#[cfg(unix)]
mod signals {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;

    pub(super) fn listen() -> std::io::Result<()> {
        let mut wanted = vec![SIGINT, SIGTERM];
        // Under nohup the work is to go on.
        if !is_ignored(SIGHUP) {
            wanted.push(SIGHUP);
        }
        let mut signals = Signals::new(wanted)?;
        std::thread::spawn(move || signals.forever().for_each(super::came));
        Ok(())
    }

    fn is_ignored(signal: i32) -> bool {
        let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: without a new action it only writes the present one, to memory of that type, for which zeros are valid.
        let action = unsafe {
            libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
            action.assume_init()
        };
        action.sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(not(unix))]
mod signals {
    pub(super) fn listen() -> Result<(), ctrlc::Error> {
        ctrlc::set_handler(|| super::came(super::CTRL_C))
    }
}
