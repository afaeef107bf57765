//! A saved [`LexicoCache`]: facts, and the blocks of every layer's [`LayerState`] by the layer's number.

use ::lexico::KeyValue;
use ::lexico::attention::NumberType;
use ::lexico::cache::{Coding, LayerCache, LayerSettings, LayerState};
use ::lexico::encode::Fit;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::LexicoCache;
use crate::cache::CacheState;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Facts {
    /// Those that [`settings`] gives.
    settings: Map<String, Value>,
    /// CRC-32 of the dictionaries' atoms.
    dictionaries: String,
    positions: usize,
    /// The steps, layer by layer, since a batch began to leave its window, where one is leaving.
    leaving: Vec<Option<usize>>,
    /// Layer by layer, whether all positions are as the model made them; none in files of earlier versions.
    #[serde(default)]
    all_dense: Vec<bool>,
}

/// The settings by name: all that the codes and the steps to come depend on.
fn settings(cache: &LexicoCache) -> Map<String, Value> {
    let layers = || cache.layers.iter().map(LayerCache::settings);
    let sparsities: KeyValue<Vec<Value>> = layers()
        .map(|layer| layer.sparsities.as_ref().map(|part| json!(part)))
        .collect();
    let mut named = Map::new();
    let mut add = |name: &str, value: Value| drop(named.insert(name.to_owned(), value));
    add("key-sparsity", sparsities.keys.into());
    add("value-sparsity", sparsities.values.into());
    let Some(first) = layers().next() else {
        return named;
    };
    let LayerSettings {
        coding,
        fit,
        sinks,
        recent_window,
        memory,
        batch,
        number_type,
        sliding_window,
        ..
    } = first;
    let (format, beam_width, tolerance) = match *coding {
        Coding::Additive { beam_width } => ("additive", Some(beam_width), 0.0),
        Coding::Sparse {
            coefficients,
            tolerance,
        } => (coefficients.name(), None, tolerance),
    };
    let dense = match number_type {
        NumberType::F16 => "f16",
        NumberType::F32 => "f32",
    };
    add("tolerance", tolerance.into());
    add("unbiased", (*fit == Fit::Unbiased).into());
    add("sinks", (*sinks).into());
    match memory {
        Some(memory) => add("memory", memory.bytes().into()),
        None => add("window", (*recent_window).into()),
    }
    add("batch", (*batch).into());
    add("format", format.into());
    add("beam", beam_width.into());
    add("dense", dense.into());
    add("sliding window", (*sliding_window).into());
    named
}

/// The settings of a file, which may be of a version that had other names.
fn renamed(mut saved: Map<String, Value>) -> Result<Map<String, Value>, String> {
    if saved.get("format") == Some(&json!("packed")) {
        saved.insert("format".to_owned(), json!("additive"));
    }
    saved.entry("sinks").or_insert(json!(0));
    match saved.remove("adaptive") {
        Some(atoms) if atoms != json!(0) => Err(format!(
            "its codes are over atoms that its session added (adaptive={atoms}), which this version no longer does; \
             read the text anew"
        )),
        _ => Ok(saved),
    }
}

/// CRC-32 of the dictionaries that the codes are over.
fn checksum(layers: &[KeyValue<u32>]) -> String {
    let mut hasher = crc32fast::Hasher::new();
    for checksum in layers.iter().flat_map(|&layer| layer) {
        hasher.update(&checksum.to_le_bytes());
    }
    format!("{:08x}", hasher.finalize())
}

pub(super) fn state(cache: &LexicoCache) -> CacheState {
    let layers = cache.layers.par_iter().map(LayerCache::save);
    let layers: Vec<LayerState> = layers.collect();
    let checksums: Vec<_> = layers.iter().map(|layer| layer.checksums).collect();
    let facts = Facts {
        settings: settings(cache),
        dictionaries: checksum(&checksums),
        positions: cache.positions,
        leaving: layers.iter().map(|layer| layer.leaving).collect(),
        all_dense: layers.iter().map(|layer| layer.all_dense).collect(),
    };
    let blocks = layers.into_iter().enumerate().flat_map(|(l, layer)| {
        let blocks = layer.blocks.into_iter();
        blocks.map(move |(name, bytes)| (format!("layers.{l}.{name}"), bytes))
    });
    CacheState {
        // Facts are plain numbers and texts.
        facts: json!(facts),
        blocks: blocks.collect(),
    }
}

pub(super) fn resume(cache: &mut LexicoCache, state: &CacheState) -> Result<(), String> {
    let facts: Facts = Facts::deserialize(&state.facts)
        .map_err(|error| format!("its facts of the cache cannot be understood: {error}"))?;
    let (there, here) = (renamed(facts.settings)?, settings(cache));
    let only_there = there.keys().filter(|&name| !here.contains_key(name));
    let names = here
        .keys()
        .chain(only_there)
        .filter(|&name| there.get(name) != here.get(name));
    let text = |value: Option<&Value>| value.map_or("none".to_owned(), Value::to_string);
    let differ: Vec<String> = names
        .map(|name| {
            let (there, here) = (text(there.get(name)), text(here.get(name)));
            format!("{name} ({there} in the file, {here} here)")
        })
        .collect();
    if !differ.is_empty() {
        return Err(format!(
            "it is of a cache with other settings: {}; resume it with those that it was saved with",
            differ.join(", ")
        ));
    }
    let checksums = cache.layers.par_iter().map(LayerCache::checksums);
    let checksums: Vec<_> = checksums.collect();
    let dictionaries = checksum(&checksums);
    if facts.dictionaries != dictionaries {
        return Err(format!(
            "its codes are over other dictionaries: their CRC-32 is {}, that of the dictionaries here \
             {dictionaries}; name those that it was saved with (--dictionary)",
            facts.dictionaries
        ));
    }
    let damaged = |part: &str| format!("it contradicts itself: {part} cannot be right");
    if facts.leaving.len() != cache.layers.len() {
        return Err(damaged("the batches that leave the window"));
    }
    let states = checksums.into_iter().zip(facts.leaving).enumerate();
    let states = states.map(|(l, (checksums, leaving))| {
        let prefix = format!("layers.{l}.");
        let blocks = state.blocks.iter();
        let blocks = blocks.filter_map(|(name, bytes)| {
            Some((name.strip_prefix(&prefix)?.to_owned(), bytes.clone()))
        });
        LayerState {
            checksums,
            positions: facts.positions,
            leaving,
            all_dense: facts.all_dense.get(l).copied().unwrap_or_default(),
            blocks: blocks.collect(),
        }
    });
    let states: Vec<LayerState> = states.collect();
    let blocks: usize = states.iter().map(|state| state.blocks.len()).sum();
    if blocks != state.blocks.len() {
        return Err(damaged("the list of blocks"));
    }
    let layers = cache.layers.par_iter_mut().zip(&states);
    layers
        .map(|(layer, state)| layer.load(state).map_err(|error| error.to_string()))
        .collect::<Result<(), String>>()?;
    let held = cache.layers.first().map_or(0, LayerCache::len);
    let gone = facts.positions.saturating_sub(held);
    // Only behind a sliding window may positions be gone.
    let slides = |layer: &LayerCache| layer.settings().sliding_window.is_some();
    let alike =
        |layer: &LayerCache| layer.len() + gone == facts.positions && (gone == 0 || slides(layer));
    if !cache.layers.iter().all(alike) {
        return Err(damaged("the number of positions"));
    }
    cache.positions = facts.positions;
    Ok(())
}
