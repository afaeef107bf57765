//! Output for people: text on stdout, notes and progress on stderr.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use comfy_table::{CellAlignment, Row, Table, presets};
use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressState, ProgressStyle};
use lexico::dictionary::FORMATS;
use lexico::shown::escaped_lines;
use lexico::tensor_file::{TensorFile, check_writable};
use lexico_llm::cache::{METHODS, Values};

/// Writes to stdout at once; a closed pipe is an error, not a panic.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.context("stdout")
}

/// A line on stdout, or a table: names from outside stand in both.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    print(&format!("{}\n", escaped_lines(text)))
}

/// One JSON document on stdout.
pub(crate) fn json(document: &serde_json::Value) -> anyhow::Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(document)?))
}

/// A line on stderr; nothing is to be done where that fails.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{}", escaped_lines(text));
}

pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|e| e.downcast_ref::<io::Error>());
    io.is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// A table whose first column is text and whose others are numbers.
pub(crate) fn table(header: impl Into<Row>, rows: Vec<impl Into<Row>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(header);
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// A progress bar on stderr with rate and time left, of work of which `begun` was done before; hidden where stderr is no terminal.
pub(crate) fn progress(begun: u64, total: u64, unit: &str) -> ProgressBar {
    let template =
        format!("{{msg:18}} {{bar:30}} {{human_pos}}/{{human_len}} {unit}, {{rate}}/s{{left}}");
    // Nothing is to be done where a progress bar cannot be drawn.
    let rate = move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        let rate = state.pos().saturating_sub(begun) as f64 / state.elapsed().as_secs_f64();
        let _ = match rate {
            _ if !rate.is_finite() => write!(out, "-"),
            _ if rate < 10.0 => write!(out, "{rate:.1}"),
            _ => write!(out, "{}", HumanCount(rate as u64)),
        };
    };
    let left = move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        let done = [begun, state.pos(), state.len().unwrap_or(0)];
        if let Some(left) = time_left(done, state.elapsed()) {
            let _ = write!(out, ", {} left", HumanDuration(left));
        }
    };
    let bar = ProgressBar::new(total);
    bar.set_position(begun);
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style.with_key("rate", rate).with_key("left", left));
    }
    bar
}

/// The time that the rest of some work takes at the mean rate so far; `None` before anything is done, and at the end. Newer steps
/// do not count more: those of an evaluation differ a hundredfold, as prompts are read and tokens written.
fn time_left([begun, done, total]: [u64; 3], elapsed: Duration) -> Option<Duration> {
    let made = done.checked_sub(begun).filter(|&made| made > 0)?;
    let rest = total.checked_sub(done).filter(|&rest| rest > 0)?;
    Duration::try_from_secs_f64(elapsed.as_secs_f64() * rest as f64 / made as f64).ok()
}

/// Progress bars, one after the other: each ends when all of its work is done. Where stderr is no terminal, lines instead.
#[derive(Default)]
pub(crate) struct Bars {
    /// True where a bar that has ended is removed.
    clear: bool,
    bar: Option<ProgressBar>,
    /// What was done of its work before it was shown.
    begun: u64,
    /// The time of the last line where stderr is no terminal.
    line: Option<Instant>,
    /// What the last bar that ended was of: it is not begun anew by being told again that all is done.
    ended: Option<(String, usize)>,
}

/// Seconds between two lines of progress where stderr is no terminal.
const BETWEEN_LINES: u64 = 15;

impl Bars {
    /// Makes bars that are removed when they end.
    pub(crate) fn cleared() -> Self {
        Self {
            clear: true,
            ..Self::default()
        }
    }

    /// Shows that `done` of `total` is done, on a new bar where none is shown.
    pub(crate) fn show(&mut self, message: String, done: usize, total: usize, unit: &str) {
        if done == total && self.bar.is_none() && self.ended == Some((message.clone(), total)) {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            self.line = None;
            self.begun = done as u64;
            progress(self.begun, total as u64, unit)
        });
        bar.set_message(message.clone());
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        if bar.is_hidden() && !self.clear {
            let due = |line: Instant| line.elapsed().as_secs() >= BETWEEN_LINES;
            if self.line.is_none_or(due) || done == total {
                let steps = [self.begun, done as u64, total as u64];
                let left = match time_left(steps, bar.elapsed()) {
                    Some(left) => format!(", {} left", HumanDuration(left)),
                    None => String::new(),
                };
                self.line = Some(Instant::now());
                note(&format!("{}: {done}/{total} {unit}{left}", bar.message()));
            }
        }
        if done == total {
            self.finish();
            self.ended = Some((message, total));
        }
    }

    pub(crate) fn finish(&mut self) {
        match self.bar.take() {
            Some(bar) if self.clear => bar.finish_and_clear(),
            Some(bar) => bar.abandon(),
            None => {}
        }
    }
}

/// Refuses to write over what is read: a lossy result must not replace its source.
pub(crate) fn check_out(out: &Path, inputs: &[&Path]) -> anyhow::Result<()> {
    check_writable(out)?;
    let same = |input: &&&Path| {
        let (a, b) = (input.canonicalize(), out.canonicalize());
        matches!((a, b), (Ok(a), Ok(b)) if a == b)
    };
    if let Some(input) = inputs.iter().find(same) {
        bail!(
            "{} is read here and would be replaced; name another --out",
            input.display()
        );
    }
    Ok(())
}

/// Refuses to write a dictionary over a safetensors file that is none: a model's weights, say.
pub(crate) fn check_dictionary_out(out: &Path, inputs: &[&Path]) -> anyhow::Result<()> {
    check_out(out, inputs)?;
    if let Ok(there) = TensorFile::open(out)
        && there
            .metadata()
            .get("format")
            .is_none_or(|f| !FORMATS.contains(&f.as_str()))
    {
        bail!(
            "{} is there and no dictionary; name another --out",
            out.display()
        );
    }
    Ok(())
}

/// Refuses as [`check_out`] does, for the vectors of a training whose dictionaries go to `dictionary`: of files with tensors only
/// earlier vectors are replaced.
pub(crate) fn check_vectors_out(
    out: &Path,
    dictionary: &Path,
    inputs: &[&Path],
) -> anyhow::Result<()> {
    check_out(out, inputs)?;
    if out == dictionary {
        bail!("--keep-vectors and --out are both {}", out.display());
    }
    if let Ok(there) = TensorFile::open(out) {
        let vectors = there.names().iter().all(|name| name.starts_with("layers."));
        if !vectors || there.metadata().contains_key("format") {
            bail!(
                "{} is there and holds no vectors of a training; name another --keep-vectors",
                out.display()
            );
        }
    }
    Ok(())
}

pub(crate) fn bytes(count: usize) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let power = (count.max(1).ilog2() as usize / 10).min(UNITS.len());
    match power.checked_sub(1) {
        Some(unit) => {
            let value = count as f64 / 1024f64.powi(power as i32);
            format!("{value:.1} {}", UNITS[unit])
        }
        None => format!("{count} bytes"),
    }
}

pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Lists the cache methods and their options, as the registry has them.
pub(crate) fn cache_help() -> String {
    let mut help = "Caches, as NAME[:key=value,...]:\n".to_owned();
    for method in METHODS {
        help += &format!("  {:<16} {}\n", method.name, method.summary);
        for option in method.options {
            let choices = match option.values {
                Values::OneOf(words) => format!(", {}", words.join(" or ")),
                Values::Count | Values::Number | Values::Size => String::new(),
            };
            let (name, summary, default) = (option.name, option.summary, option.default);
            help += &format!("    {name:<14} {summary}{choices} [default: {default}]\n");
        }
    }
    help
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_takes_as_long_a_step_as_what_was_done() {
        let left = |begun, done, total| time_left([begun, done, total], Duration::from_secs(60));
        assert_eq!(left(0, 30, 40), Some(Duration::from_secs(20)));
        // What an interrupted run had done took no time of this one.
        assert_eq!(left(20, 30, 40), Some(Duration::from_secs(60)));
        for nothing_to_say in [
            (0, 0, 40),
            (20, 20, 40),
            (0, 40, 40),
            (5, 3, 40),
            (0, 50, 40),
        ] {
            let (begun, done, total) = nothing_to_say;
            assert_eq!(left(begun, done, total), None, "{nothing_to_say:?}");
        }
        assert_eq!(time_left([0, 1, u64::MAX], Duration::MAX), None);
    }
}
