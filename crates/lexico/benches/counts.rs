//! Runs one kind of work, named in the first argument, for `.ci/counts` to count its instructions.

mod common;

use std::process::ExitCode;

use lexico::attention::NumberType;

fn main() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    match name.as_str() {
        "pursuit" => count(common::pursuit(64, 4096, 16)),
        "coded-8" => count(common::coded(8192, 8, 4)),
        "coded-16" => count(common::coded(8192, 16, 4)),
        "beam-search" => count(common::beam_search(32, 12)),
        "additive-12" => count(common::additive(8192, 12, 4, false)),
        "rotary-12" => count(common::additive(8192, 12, 4, true)),
        "dense" => count(common::dense(8192, NumberType::F16, 4)),
        // `cargo test` and `cargo bench` name none.
        _ => return ExitCode::SUCCESS,
    }
    ExitCode::SUCCESS
}

/// Once for what is done only the first time, once to be counted.
fn count(mut work: impl FnMut()) {
    work();
    counted(&mut work);
}

/// Its name tells the counter when to count.
#[inline(never)]
fn counted(work: &mut impl FnMut()) {
    work();
}
