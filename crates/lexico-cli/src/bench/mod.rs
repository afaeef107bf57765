//! Measurements of models of random weights, each repeated and its median taken.

mod decode;
mod load;

use clap::{Args, Subcommand};

#[derive(Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Tokens a second of whole decoding steps, random weights of a known shape
    Decode(decode::Decode),
    /// Time and peak memory of loading a model, and its memory once it has run
    Load(load::Load),
    /// Write a model of random weights of a known shape, to load where no other is to be had
    Model(load::RandomModel),
    #[command(hide = true)]
    Pursuit(Moved),
    #[command(hide = true)]
    Attention(Moved),
}

/// Arguments of a bench that has left the program.
#[derive(Args)]
struct Moved {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _arguments: Vec<String>,
}

impl Bench {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self.what {
            What::Decode(decode) => decode.run(),
            What::Load(load) => load.run(),
            What::Model(model) => model.run(),
            What::Pursuit(_) => moved("pursuit"),
            What::Attention(_) => moved("attention"),
        }
    }
}

fn moved(bench: &str) -> anyhow::Result<()> {
    anyhow::bail!(
        "lexico bench {bench} has left the program: in the source tree, run cargo bench -p lexico --bench {bench} -- \
         with the same flags"
    )
}

fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}
