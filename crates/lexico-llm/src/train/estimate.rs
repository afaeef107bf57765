//! How long learning takes here.

use std::time::{Duration, Instant};

use ::lexico::attention::NumberType;
use ::lexico::dictionary::{CodebookSizes, Codebooks};
use ::lexico::encode::{BeamSearch, Encoder};
use ::lexico::learn::CodebookOptions;
use ::lexico::threads::Rayon;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::TrainOptions;
use crate::cache::FullCache;
use crate::decoder::Logits;
use crate::error::Result;
use crate::model::Model;

/// Tokens that the model reads for the estimate.
const TOKENS: usize = 128;
/// Vectors that are coded for the estimate.
const VECTORS: usize = 2048;
/// Windows that the model reads more, measuring what each head costs: parts of four, and all of them three times.
const MEASURED: usize = 15;

/// Estimates how long [`train`](super::train) takes on this machine with codebooks alone, from a short reading by the
/// model and a short search; both take about a second for a model of half a billion parameters on two cores. Within a
/// third or so where nothing else is at work.
///
/// # Errors
/// Those of [`Decoder::forward`](crate::decoder::Decoder::forward) and of codes over random codebooks.
pub fn estimate(model: &Model, options: &TrainOptions) -> Result<Duration> {
    let config = model.decoder.config();
    let read = || -> Result<f64> {
        let mut cache = FullCache::new(config, NumberType::F32);
        let tokens: Vec<u32> = (0..TOKENS.min(config.context))
            .map(|t| t as u32 % 64)
            .collect();
        let began = Instant::now();
        model
            .decoder
            .forward_one(&tokens, &mut cache, Logits::Last)?;
        Ok(began.elapsed().as_secs_f64() / tokens.len() as f64)
    };
    // The first reading meets memory that was not touched yet.
    read()?;
    let a_token = read()?;
    let tokens = options.tokens + MEASURED * options.context.min(config.context);
    let reading = tokens as f64 * a_token;
    let Some(codebooks) = &options.codebooks else {
        return Ok(Duration::from_secs_f64(reading));
    };
    let m = config.head_dim;
    let vectors = options.vectors.min(options.tokens * config.kv_heads);
    let dictionaries = (2 * config.layers) as f64;
    let products = dictionaries * codebooks.products(vectors, m);
    let learning = products * a_product(m, codebooks.beam)?;
    Ok(Duration::from_secs_f64(reading + learning))
}

/// Seconds that one multiplication of a search takes, on all cores.
fn a_product(m: usize, beam: usize) -> Result<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut draw =
        |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random_range(-1f32..1.0)).collect() };
    let sizes = CodebookSizes { first: 256 };
    let codebooks = Codebooks::new(draw(sizes.atoms(8) * m), m, sizes)?;
    let search = BeamSearch::new(&codebooks, 8)?.with_beam_width(beam);
    let vectors = draw(VECTORS * m);
    search.encode_on(&vectors[..VECTORS / 4 * m], &Rayon)?;
    let began = Instant::now();
    search.encode_on(&vectors, &Rayon)?;
    let options = CodebookOptions {
        first: sizes.first,
        codebooks: 8,
        beam,
        ..CodebookOptions::of(m)
    };
    let products = options.products_of_a_search(VECTORS, m);
    Ok(began.elapsed().as_secs_f64() / products)
}
