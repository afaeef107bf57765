//! A level that this processor does not have, named in the environment, is an error wherever work begins.

use std::process::Command;

use lexico::dictionary::CodebookSizes;
use lexico::kernels::check_level;
use lexico::learn::CodebookOptions;
use lexico::{AdditiveFormat, Codebooks, Codes, Dictionary, Error};

const WRONG: &str = "avx3";

/// Runs in a process of its own, whose level is chosen when it is first needed.
#[test]
#[ignore = "the other test runs it"]
fn with_a_wrong_level() {
    let refused = |result: Result<(), Error>| match result {
        Err(Error::Level(error)) => error.found == WRONG && error.known.contains(&"portable"),
        _ => false,
    };
    let sizes = CodebookSizes { first: 1 };
    let codes = Codes::new(AdditiveFormat { sparsity: 1, sizes });
    assert!(refused(check_level().map_err(Error::Level)));
    assert!(refused(Dictionary::new(vec![1.0], 1).map(drop)));
    assert!(refused(Codebooks::new(vec![1.0], 1, sizes).map(drop)));
    assert!(refused(codes.map(drop)));
    assert!(refused(CodebookOptions::of(8).check()));
}

#[test]
fn a_wrong_level_is_an_error_wherever_work_begins() {
    let program = std::env::current_exe().unwrap();
    // An emulator of another processor may not start processes.
    let list = Command::new(&program).arg("--list").output();
    if !list.is_ok_and(|list| list.status.success()) {
        eprintln!("SKIPPED: a test's own program cannot be started here");
        return;
    }
    let status = Command::new(program)
        .args(["--exact", "with_a_wrong_level", "--ignored"])
        .env("LEXICO_LEVEL", WRONG)
        .status();
    assert!(status.unwrap().success());
}
