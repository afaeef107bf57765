//! A serving engine's view of one layer's cache: append, attend, save, load, attend again to the same numbers.
//!
//! ```sh
//! cargo run --release -p lexico --example serving [DICTIONARY_FILE]
//! ```

use lexico::cache::Coding;
use lexico::dictionary::LayerSparsities;
use lexico::threads::Rayon;
use lexico::{DictionarySet, KeyValue, LayerCache, LayerSettings};

const EMBEDDED: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../models/tiny/dictionary.safetensors"
);
/// Query heads that share a KV head.
const GROUP: usize = 2;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1);
    let dictionaries = DictionarySet::load(path.as_deref().unwrap_or(EMBEDDED))?;
    let (heads, m) = (dictionaries.model.kv_heads, dictionaries.model.head_dim);
    let family = dictionaries.usual_family();
    let sparsity = dictionaries.usual_sparsity(family);
    let settings = LayerSettings {
        coding: Coding::usual(family),
        background: true,
        ..LayerSettings::new(LayerSparsities::same(heads, sparsity, sparsity))
    };
    let layer = &dictionaries.layers[0];
    let mut cache = LayerCache::new(layer, settings.clone())?;

    // A prompt of 1,000 positions, then 100 of decode. New positions are attended to at full precision and appended;
    // all but the newest become codes.
    let mut state = 1;
    for positions in [1000].into_iter().chain([1; 100]) {
        let keys = numbers(&mut state, heads * positions * m);
        let values = numbers(&mut state, heads * positions * m);
        let queries = numbers(&mut state, heads * GROUP * positions * m);
        let new = KeyValue::new(&keys[..], &values[..]);
        let mut out = vec![0.0; queries.len()];
        cache.attend(&queries, Some(new), &mut out, &Rayon);
        cache.append(new, &Rayon)?;
    }

    // The saved state goes to a disk or another machine; an empty cache takes it up.
    let saved = cache.save();
    let mut loaded = LayerCache::new(layer, settings)?;
    loaded.load(&saved)?;
    let queries = numbers(&mut state, heads * GROUP * m);
    let [before, after] = [&cache, &loaded].map(|cache| {
        let mut out = vec![0.0; queries.len()];
        cache.attend(&queries, None, &mut out, &Rayon);
        out
    });
    assert_eq!(before, after, "the same numbers");

    let (positions, coded) = (cache.len(), cache.coded());
    println!("{positions} positions, {coded} of them as codes of {sparsity} atoms");
    println!("FP16   {:>8} bytes", 2 * 2 * heads * positions * m);
    println!("cache  {:>8} bytes", cache.footprint().total());
    let bytes: usize = saved.blocks.iter().map(|(_, block)| block.len()).sum();
    println!("saved  {bytes:>8} bytes, and attention after loading gives the same numbers");
    Ok(())
}

/// Numbers from -1 to 1, in place of a model's.
fn numbers(state: &mut u32, count: usize) -> Vec<f32> {
    let next = |_| {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}
