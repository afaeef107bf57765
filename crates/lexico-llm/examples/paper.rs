//! Learns a model's dictionaries by the recipe of the paper (Kim et al., ICML 2025, arXiv 2412.08890): Adam on unit
//! atoms with orthogonal matching pursuit, 20 epochs in minibatches of 64 at a rate of 1e-4, from random atoms, none of
//! which is replaced.
//!
//! ```sh
//! cargo run --release -p lexico-llm --example paper -- MODEL CORPUS OUT
//! lexico run --model MODEL --dictionary OUT --cache lexico:format=f8 PROMPT
//! ```
//!
//! `MODEL` is a folder in Hugging Face layout or a GGUF file, `CORPUS` a file or a folder of texts, `OUT` the dictionary
//! file to write.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;

use lexico::learn::{InitialAtoms, LearnOptions};
use lexico_llm::train::{TrainOptions, TrainProgress, train};
use lexico_llm::{Corpus, Model, Quantize};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, corpus, out] = &arguments[..] else {
        return Err("usage: paper MODEL CORPUS OUT".into());
    };
    let model = Model::load(Path::new(model), Quantize::None)?;
    let corpus = Corpus::open(&[corpus], None, true)?;
    let options = TrainOptions {
        learn: LearnOptions {
            atoms: 4096,
            sparsity: (model.decoder.config().head_dim / 8).max(1),
            epochs: 20,
            batch: 64,
            learning_rate: 1e-4,
            initial: InitialAtoms::Random,
            reseed: false,
            patience: 0,
            seed: 0,
        },
        codebooks: None,
        ..TrainOptions::default()
    };
    let trained = train(&model, &corpus, &options, &mut |step| {
        if let TrainProgress::Learned {
            layer,
            part,
            held_out_error,
        } = step
        {
            println!("layer {layer}, {part}: held-out relative error {held_out_error:.4}");
        }
        ControlFlow::Continue(())
    })?;
    trained.dictionaries.save(out)?;
    Ok(())
}
