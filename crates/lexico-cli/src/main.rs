//! The program `lexico`: arguments and printing around the libraries.

mod bench;
mod codes;
mod corpus;
mod eval;
mod export;
mod import;
mod inspect;
mod interrupt;
mod learn;
mod lines;
mod measure;
mod memory;
mod model;
mod publish;
mod run;
mod serve;
mod train;
mod ui;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Runs language models with a KV cache held as short codes over learned dictionaries.
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
    /// Generate text, the KV cache held as codes over dictionaries
    Run(run::Run),
    /// Serve a model to many at once, as OpenAI's API does
    Serve(serve::Serve),
    /// Learn a model's dictionaries from text
    Train(train::Train),
    /// Measure what coding each head costs with dictionaries made without it, as imported ones
    ///
    /// Best on texts that the dictionaries have not seen.
    Measure(measure::Measure),
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
    /// Write a dictionary as a file of the reference implementation (.pt)
    Export(export::Export),
    /// Make a folder of dictionaries to be uploaded to the Hugging Face hub
    Publish(publish::Publish),
    /// Show what a dictionary, code, saved cache or model file holds
    Inspect(inspect::Inspect),
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage; 130 interrupted by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP.";

fn main() -> ExitCode {
    lexico_llm::hide_caught_panics();
    let caches = ui::cache_help();
    let command = Arguments::command()
        .after_help(EXIT_CODES)
        .mut_subcommand("run", |c| c.after_help(caches.clone()))
        .mut_subcommand("serve", |c| c.after_help(caches.clone()))
        .mut_subcommand("bench", |c| c.after_help(caches.clone()))
        .mut_subcommand("eval", |c| c.after_help(caches.clone()));
    let arguments = match Arguments::from_arg_matches(&command.get_matches()) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    let done = work(arguments);
    let interrupted = interrupt::exit_code();
    match done {
        Ok(()) => ExitCode::from(interrupted.unwrap_or(0)),
        // Whoever read our output has enough of it.
        Err(error) if ui::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            ui::note(&format!("error: {error:#}"));
            ExitCode::from(interrupted.unwrap_or(1))
        }
    }
}

/// Rayon's pool and candle's take their size from the environment when they are first used, and a program
/// that runs cannot safely change its own: it starts itself anew, once.
fn with_threads(threads: u16) -> anyhow::Result<()> {
    const NAMES: [&str; 2] = ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"];
    let threads = threads.to_string();
    if NAMES
        .iter()
        .all(|name| std::env::var(name).as_ref() == Ok(&threads))
    {
        return Ok(());
    }
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1));
    command.envs(NAMES.map(|name| (name, &threads)));
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        Err(command.exec().into())
    }
    #[cfg(not(unix))]
    std::process::exit(command.status()?.code().unwrap_or(1))
}

fn work(arguments: Arguments) -> anyhow::Result<()> {
    lexico::kernels::check_level()?;
    if let Some(threads) = arguments.threads {
        with_threads(threads)?;
    }
    match arguments.command {
        Command::Run(run) => run.run(),
        Command::Serve(serve) => serve.run(),
        Command::Train(train) => train.run(),
        Command::Eval(eval) => eval.run(),
        Command::Bench(bench) => bench.run(),
        Command::Encode(encode) => encode.run(),
        Command::Decode(decode) => decode.run(),
        Command::Measure(measure) => measure.run(),
        Command::Import(import) => import.run(),
        Command::Export(export) => export.run(),
        Command::Publish(publish) => publish.run(),
        Command::Inspect(inspect) => inspect.run(),
    }
}
