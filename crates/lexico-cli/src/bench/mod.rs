//! Measurements on drawn numbers, each repeated and its median taken.

mod attention;
mod decode;
mod gpu;
mod load;
mod pursuit;

use clap::{Args, Subcommand};

#[derive(Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Microseconds that coding a vector takes, and its error beside the f64 oracle's
    Pursuit(pursuit::Pursuit),
    /// Microseconds that a layer's attention takes in a decoding step, on codes and on f16
    Attention(attention::Attention),
    /// Tokens a second of whole decoding steps, random weights of a known shape
    Decode(decode::Decode),
    /// Time and peak memory of loading a model, and its memory once it has run
    Load(load::Load),
    /// Write a model of random weights of a known shape, to load where no other is to be had
    Model(load::RandomModel),
}

impl Bench {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self.what {
            What::Pursuit(pursuit) => pursuit.run(),
            What::Attention(attention) => attention.run(),
            What::Decode(decode) => decode.run(),
            What::Load(load) => load.run(),
            What::Model(model) => model.run(),
        }
    }
}

fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}
