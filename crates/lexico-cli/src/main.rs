//! The program `lexico`: arguments and printing around the libraries.

mod bench;
mod codes;
mod eval;
mod import;
mod inspect;
mod interrupt;
mod memory;
mod model;
mod run;
mod train;
mod ui;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Runs language models with a KV cache held as sparse codes over universal dictionaries.
#[derive(Parser)]
#[command(name = "lexico", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Threads to use [default: all cores]
    #[arg(short, long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=512))]
    threads: Option<u16>,
}

#[derive(Subcommand)]
enum Command {
    /// Generate text, the KV cache held as sparse codes
    Run(run::Run),
    /// Learn a model's dictionaries from text
    Train(train::Train),
    /// Compare cache methods on a task
    Eval(eval::Eval),
    /// Measure speed
    Bench(bench::Bench),
    /// Code the vectors of a file over a dictionary
    Encode(codes::Encode),
    /// Turn codes back into vectors
    Decode(codes::Decode),
    /// Convert a dictionary of the reference implementation (.pt)
    Import(import::Import),
    /// Show what a dictionary, code or model file holds
    Inspect(inspect::Inspect),
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.";

fn main() -> ExitCode {
    let caches = ui::cache_help();
    let command = Arguments::command()
        .after_help(EXIT_CODES)
        .mut_subcommand("run", |c| c.after_help(caches.clone()))
        .mut_subcommand("bench", |c| c.after_help(caches.clone()))
        .mut_subcommand("eval", |c| c.after_help(caches.clone()));
    let arguments = match Arguments::from_arg_matches(&command.get_matches()) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    match work(arguments) {
        Ok(()) if interrupt::happened() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has enough of it.
        Err(error) if ui::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            ui::note(&format!("error: {error:#}"));
            let interrupted = interrupt::happened();
            ExitCode::from(if interrupted { 130 } else { 1 })
        }
    }
}

fn work(arguments: Arguments) -> anyhow::Result<()> {
    if let Some(threads) = arguments.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into());
        pool.build_global()?;
    }
    match arguments.command {
        Command::Run(run) => run.run(),
        Command::Train(train) => train.run(),
        Command::Eval(eval) => eval.run(),
        Command::Bench(bench) => bench.run(),
        Command::Encode(encode) => encode.run(),
        Command::Decode(decode) => decode.run(),
        Command::Import(import) => import.run(),
        Command::Inspect(inspect) => inspect.run(),
    }
}
