//! The paper's adaptive dictionary: vectors that miss a tolerance join the dictionary as atoms of one session.
//!
//! Kim et al., *Lexico* (ICML 2025), section 3. It needs nothing of the codec but [`Dictionary`] and [`Pursuit`]. On the
//! texts measured it did not pay: an atom weighs as much as many codes, so the caches leave it out.
//!
//! ```sh
//! cargo run --release -p lexico --example adaptive
//! ```

use lexico::{Dictionary, DictionarySet, EncodedBatch, Encoder, Pursuit};

const EMBEDDED: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../models/tiny/dictionary.safetensors"
);
const TOLERANCE: f32 = 0.3;
const SPARSITY: usize = 8;
const MAX_ADDED: usize = 64;

/// Codes `vectors` `[n, m]`; those that miss the tolerance are added to the dictionary, up to `max_atoms` in all, and
/// then coded by themselves.
fn encode(
    dictionary: &mut Dictionary,
    vectors: &[f32],
    max_atoms: usize,
) -> lexico::Result<EncodedBatch> {
    let m = dictionary.head_dim();
    let coded = Pursuit::new(dictionary, SPARSITY)?
        .with_tolerance(TOLERANCE)?
        .encode(vectors)?;
    let missed = coded.relative_errors.iter().zip(vectors.chunks_exact(m));
    let missed = missed.filter(|(error, _)| **error > TOLERANCE);
    let room = max_atoms.saturating_sub(dictionary.len());
    let added: Vec<f32> = missed.take(room).flat_map(|(_, x)| x).copied().collect();
    if added.is_empty() {
        return Ok(coded);
    }
    let added = Dictionary::normalised(added, m)?;
    let atoms = [dictionary.atoms(), added.atoms()].concat();
    *dictionary = Dictionary::new(atoms, m)?;
    let pursuit = Pursuit::new(dictionary, SPARSITY)?.with_tolerance(TOLERANCE)?;
    pursuit.encode(vectors)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let layer = DictionarySet::load(EMBEDDED)?.layers.swap_remove(0);
    let own = layer
        .sparse
        .ok_or("the embedded model has dictionaries for sparse codes")?
        .keys;
    let mut dictionary = Dictionary::clone(&own);
    let m = dictionary.head_dim();
    let max_atoms = dictionary.len() + MAX_ADDED;
    let mut state = 1u32;
    let mut draw = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    for batch in 1..=4 {
        let vectors: Vec<f32> = (0..24 * m).map(&mut draw).collect();
        let before = Pursuit::new(&dictionary, SPARSITY)?.encode(&vectors)?;
        let after = encode(&mut dictionary, &vectors, max_atoms)?;
        println!(
            "batch {batch}: {} atoms, {} bytes of them added; mean relative error {:.3}, without {:.3}",
            dictionary.len(),
            2 * m * (dictionary.len() - own.len()),
            after.mean_relative_error(),
            before.mean_relative_error()
        );
    }
    Ok(())
}
