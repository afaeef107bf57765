//! Any bytes as a dictionary file: it loads, codes vectors of both families and attends to them, or it is refused.
#![no_main]

use lexico::cache::Coding;
use lexico::dictionary::{CodeFamily, LayerSparsities};
use lexico::threads::Alone;
use lexico::{DictionarySet, KeyValue, LayerCache, LayerSettings};
use lexico_fuzz::in_file;
use libfuzzer_sys::fuzz_target;

const POSITIONS: usize = 5;

fuzz_target!(|bytes: &[u8]| {
    let Ok(set) = in_file("fuzzed.safetensors", bytes, |path| {
        DictionarySet::load(path)
    }) else {
        return;
    };
    for layer in &set.layers {
        let m = layer.head_dim();
        let heads = layer.maps.as_ref().map_or(1, |maps| maps.keys.heads());
        let numbers = 0..heads * POSITIONS * m;
        let vectors: Vec<f32> = numbers.map(|i| (i as f32).sin()).collect();
        for family in [CodeFamily::Sparse, CodeFamily::Additive] {
            let max = layer.max_sparsity(family);
            if max == 0 {
                continue;
            }
            let sparsity = set.usual_sparsity(family).clamp(1, max);
            let settings = LayerSettings {
                coding: Coding::usual(family),
                recent_window: 1,
                batch: 1,
                delay: 0,
                ..LayerSettings::new(LayerSparsities::same(heads, sparsity, sparsity))
            };
            let mut cache = LayerCache::new(layer, settings).unwrap();
            let new = KeyValue::new(&vectors[..], &vectors[..]);
            let taken = cache.append(new, &Alone);
            if layer.maps.is_some() && taken.is_err() {
                // Behind a map of huge numbers vectors may not be finite, which is said.
                continue;
            }
            taken.unwrap();
            let mut out = vec![f32::NAN; heads * m];
            cache.attend(&vectors[..heads * m], None, &mut out, &Alone);
            // Nor may what comes back.
            assert!(layer.maps.is_some() || out.iter().all(|x| x.is_finite()));
        }
    }
});
