//! Lines that a person types, and an end to waiting for them where a signal comes.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use rustyline::error::ReadlineError;

use crate::interrupt;

/// Reads lines on a thread of its own: what waits for a line there hears no signal.
pub(crate) struct Lines {
    asks: Sender<()>,
    lines: Receiver<rustyline::Result<String>>,
    _terminal: Option<Terminal>,
}

impl Lines {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let terminal = Terminal::as_it_is();
        let (asks, asked) = channel();
        let (give, lines) = channel();
        let mut editor = rustyline::DefaultEditor::new()?;
        std::thread::spawn(move || {
            while asked.recv().is_ok() {
                let line = editor.readline("> ");
                if let Ok(line) = &line
                    && !line.trim().is_empty()
                    && !line.trim().starts_with('/')
                {
                    // A line that cannot be offered again is still a line.
                    let _ = editor.add_history_entry(line);
                }
                if give.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            asks,
            lines,
            _terminal: terminal,
        })
    }

    /// The next line; an end where the program is to end.
    pub(crate) fn next(&self) -> rustyline::Result<String> {
        const POLL: Duration = Duration::from_millis(100);
        if self.asks.send(()).is_err() {
            return Err(ReadlineError::Eof);
        }
        loop {
            match self.lines.recv_timeout(POLL) {
                // A terminal that was closed gives an error.
                Ok(Err(_)) if interrupt::ends_program() => return Err(ReadlineError::Eof),
                Ok(line) => return line,
                Err(RecvTimeoutError::Timeout) if !interrupt::ends_program() => {}
                Err(_) => return Err(ReadlineError::Eof),
            }
        }
    }
}

/// The terminal's settings, which come back when this goes: the thread that reads may still wait with its own.
struct Terminal {
    #[cfg(unix)]
    settings: libc::termios,
}

#[cfg(unix)]
impl Terminal {
    fn as_it_is() -> Option<Self> {
        let mut settings = std::mem::MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the settings are written to memory of their type, and read only where that was done.
        unsafe {
            let got = libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) == 0;
            got.then(|| Self {
                settings: settings.assume_init(),
            })
        }
    }
}

#[cfg(unix)]
impl Drop for Terminal {
    fn drop(&mut self) {
        // SAFETY: these are whole settings, of the same terminal.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSADRAIN, &self.settings) };
    }
}

#[cfg(not(unix))]
impl Terminal {
    fn as_it_is() -> Option<Self> {
        None
    }
}
