//! What a [`LexicoCache`] needs to go on, as facts and blocks: of every layer, for keys and then for values, the codes of
//! all heads, the atoms that the session has added where there are any, and the window's rows.
//!
//! Codes of a batch that is leaving the window are not among them: coding them anew gives the same.

use ::lexico::attention::{DenseRows, NumberType};
use ::lexico::codes::stored;
use ::lexico::dictionary::{Extension, LayerDictionaries};
use ::lexico::{CodeFormat, Codes, CoefficientFormat};
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    Added, Coding, Format, Head, Layer, LayerSparsities, Leaving, LexicoCache, LexicoSettings, Part,
};
use crate::cache::CacheState;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Facts {
    /// As [`settings`] has them.
    settings: Map<String, Value>,
    /// CRC-32 of the dictionaries' atoms.
    dictionaries: String,
    positions: usize,
    /// Of every layer, the steps since a batch began to leave its window, where one is leaving.
    leaving: Vec<Option<usize>>,
}

/// Keys or values: a layer's state has one part of each.
const PARTS: [(&str, fn(&Head) -> &Part); 2] =
    [("keys", |head| &head.keys), ("values", |head| &head.values)];

/// The settings by name: all that the codes and the steps to come depend on.
fn settings(cache: &LexicoCache) -> Map<String, Value> {
    let settings = &cache.settings;
    let of_part = |part: fn(&LayerSparsities) -> &Vec<usize>| -> Value {
        settings
            .sparsities
            .iter()
            .map(|layer| json!(part(layer)))
            .collect()
    };
    let (format, beam) = match settings.format {
        Format::Additive { beam } => ("packed", Some(beam)),
        Format::Sparse(CoefficientFormat::I8) => ("i8", None),
        Format::Sparse(CoefficientFormat::F8) => ("f8", None),
        Format::Sparse(_) => ("f32", None),
    };
    let dense = match settings.dense {
        NumberType::F16 => "f16",
        NumberType::F32 => "f32",
    };
    let pairs = [
        ("key-sparsity", of_part(|layer| &layer.keys)),
        ("value-sparsity", of_part(|layer| &layer.values)),
        ("tolerance", settings.tolerance.into()),
        ("unbiased", settings.unbiased.into()),
        ("adaptive", settings.adaptive.into()),
        ("window", settings.window.into()),
        ("batch", settings.batch.into()),
        ("format", format.into()),
        ("beam", beam.into()),
        ("dense", dense.into()),
        ("sliding window", cache.sliding_window.into()),
    ];
    pairs
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .collect()
}

/// CRC-32 of the dictionaries that the codes are over.
fn checksum(cache: &LexicoCache) -> String {
    let mut hasher = crc32fast::Hasher::new();
    for layer in &cache.dictionaries.layers {
        // A cache of such codes is only made where the dictionaries have them.
        for coding in cache.settings.codings(layer).iter().flatten() {
            hasher.update(&coding.checksum().to_le_bytes());
        }
    }
    format!("{:08x}", hasher.finalize())
}

pub(super) fn state(cache: &LexicoCache) -> CacheState {
    let facts = Facts {
        settings: settings(cache),
        dictionaries: checksum(cache),
        positions: cache.positions,
        leaving: cache
            .layers
            .iter()
            .map(|layer| layer.leaving.as_ref().map(|leaving| leaving.age))
            .collect(),
    };
    let layers = cache.layers.iter();
    // Batches on their way are no matter for threads.
    let layers: Vec<_> = layers
        .map(|layer| (&layer.heads[..], &layer.added))
        .collect();
    let dense = cache.settings.dense;
    let layers = layers.par_iter().enumerate();
    let blocks: Vec<_> = layers
        .map(|(l, (heads, added))| layer_blocks(l, heads, added, dense))
        .collect();
    CacheState {
        // Facts are plain numbers and texts.
        facts: json!(facts),
        blocks: blocks.concat(),
    }
}

fn layer_blocks(
    l: usize,
    heads: &[Head],
    added: &Added,
    dense: NumberType,
) -> Vec<(String, Vec<u8>)> {
    let mut blocks = Vec::new();
    for ((name, part), added) in PARTS.into_iter().zip([&added.keys, &added.values]) {
        let named = |kind: &str| format!("layers.{l}.{name}.{kind}");
        let codes: Vec<&Codes> = heads.iter().map(|head| &part(head).codes).collect();
        for block in stored::write(&codes) {
            blocks.push((named("codes"), block));
        }
        if !added.is_empty() {
            let atoms = added.atoms().iter().flat_map(|x| x.to_le_bytes());
            blocks.push((named("atoms"), atoms.collect()));
        }
        let mut rows = Vec::new();
        for head in heads {
            rows.extend(rows_bytes(&part(head).window.to_f32(), dense));
        }
        blocks.push((named("window"), rows));
    }
    blocks
}

/// Numbers of the window as they are stored there.
fn rows_bytes(numbers: &[f32], dense: NumberType) -> Vec<u8> {
    match dense {
        NumberType::F16 => {
            let halves = numbers.iter().map(|&x| f16::from_f32(x));
            halves.flat_map(f16::to_le_bytes).collect()
        }
        NumberType::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn rows_of_bytes(bytes: &[u8], dense: NumberType) -> Vec<f32> {
    match dense {
        NumberType::F16 => {
            let pairs = bytes.as_chunks::<2>().0.iter();
            pairs.map(|&b| f16::from_le_bytes(b).to_f32()).collect()
        }
        NumberType::F32 => {
            let quads = bytes.as_chunks::<4>().0.iter();
            quads.map(|&b| f32::from_le_bytes(b)).collect()
        }
    }
}

pub(super) fn resume(cache: &mut LexicoCache, state: &CacheState) -> Result<(), String> {
    let facts: Facts = Facts::deserialize(&state.facts)
        .map_err(|error| format!("its facts of the cache cannot be understood: {error}"))?;
    let (there, here) = (&facts.settings, settings(cache));
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
    let dictionaries = checksum(cache);
    if facts.dictionaries != dictionaries {
        return Err(format!(
            "its codes are over other dictionaries: their CRC-32 is {}, that of the dictionaries here \
             {dictionaries}; name those that it was saved with (--dictionary)",
            facts.dictionaries
        ));
    }
    if facts.leaving.len() != cache.layers.len() {
        return Err(damaged("the batches that leave the window"));
    }
    let fresh: Vec<&[Head]> = cache.layers.iter().map(|layer| &layer.heads[..]).collect();
    let (settings, dictionaries) = (&*cache.settings, &*cache.dictionaries);
    let layers = (0..fresh.len()).into_par_iter();
    let mut layers: Vec<Layer> = layers
        .map(|l| {
            let blocks: Vec<_> = layer_state(state, l).collect();
            resume_layer(settings, &dictionaries.layers[l], fresh[l], &blocks)
        })
        .collect::<Result<_, String>>()?;
    for (l, (layer, age)) in layers.iter_mut().zip(facts.leaving).enumerate() {
        layer.leaving = age.map(|age| Leaving { age, codes: None });
        let possible = |age| age <= cache.settings.due(l) && layer.window() >= cache.settings.batch;
        if !age.is_none_or(possible) {
            return Err(damaged("the batches that leave the window"));
        }
    }
    let held: Vec<usize> = layers
        .iter()
        .flat_map(|layer| &layer.heads)
        .flat_map(|head| [head.keys.len(), head.values.len()])
        .collect();
    // Only behind a sliding window may positions be gone.
    let gone = held
        .first()
        .map_or(0, |&held| facts.positions.saturating_sub(held));
    if held.iter().any(|held| held + gone != facts.positions)
        || (gone > 0 && cache.sliding_window.is_none())
    {
        return Err(damaged("the number of positions"));
    }
    let blocks: usize = (0..layers.len())
        .map(|l| layer_state(state, l).count())
        .sum();
    if blocks != state.blocks.len() {
        return Err(damaged("the list of blocks"));
    }
    cache.layers = layers;
    cache.positions = facts.positions;
    Ok(())
}

fn damaged(part: &str) -> String {
    format!("it contradicts itself: {part} cannot be right")
}

/// The blocks of layer `l`.
fn layer_state(state: &CacheState, l: usize) -> impl Iterator<Item = (&str, &[u8])> {
    let prefix = format!("layers.{l}.");
    let blocks = state.blocks.iter();
    blocks.filter_map(move |(name, bytes)| Some((name.strip_prefix(&prefix)?, bytes.as_slice())))
}

/// A layer out of its blocks, but for the batch that is leaving its window; `fresh` are its heads while empty.
fn resume_layer(
    settings: &LexicoSettings,
    dictionaries: &LayerDictionaries,
    fresh: &[Head],
    blocks: &[(&str, &[u8])],
) -> Result<Layer, String> {
    let known = |name: &str| {
        let (part, kind) = name.split_once('.').unwrap_or_default();
        PARTS.iter().any(|(name, _)| *name == part) && ["codes", "atoms", "window"].contains(&kind)
    };
    if !blocks.iter().all(|(name, _)| known(name)) {
        return Err(damaged("the list of blocks"));
    }
    let codings = settings
        .codings(dictionaries)
        .map_err(|error| error.to_string())?;
    let m = dictionaries.keys.head_dim();
    let part = |of: usize| -> Result<(Vec<Part>, Extension), String> {
        let (name, part) = PARTS[of];
        let of_kind = |kind: &str| {
            let name = format!("{name}.{kind}");
            let own = blocks.iter().filter(move |block| block.0 == name);
            own.map(|&(_, bytes)| bytes).collect::<Vec<_>>()
        };
        let formats: Vec<CodeFormat> = fresh.iter().map(|head| part(head).codes.format()).collect();
        resume_part(settings, codings[of], &formats, m, of_kind)
    };
    let (keys, added_keys) = part(0)?;
    let (values, added_values) = part(1)?;
    let heads = keys.into_iter().zip(values);
    let layer = Layer {
        heads: heads.map(|(keys, values)| Head { keys, values }).collect(),
        added: Added {
            keys: added_keys,
            values: added_values,
        },
        leaving: None,
    };
    let other = |part: &Part| part.window.len() != layer.window();
    if layer
        .heads
        .iter()
        .any(|head| other(&head.keys) || other(&head.values))
    {
        return Err(damaged("the rows of the window"));
    }
    Ok(layer)
}

/// The keys, or the values, of every head, and the atoms that were added for them, out of the blocks of a kind.
fn resume_part<'a>(
    settings: &LexicoSettings,
    coding: Coding<'_>,
    formats: &[CodeFormat],
    m: usize,
    of_kind: impl Fn(&str) -> Vec<&'a [u8]>,
) -> Result<(Vec<Part>, Extension), String> {
    let codes = stored::read(formats, of_kind("codes")).map_err(|error| error.to_string())?;
    let added = match of_kind("atoms").as_slice() {
        [] => Extension::new(m),
        [bytes] if bytes.len().is_multiple_of(2) => {
            let halves = bytes.as_chunks::<2>().0.iter();
            let atoms = halves.map(|&b| f16::from_le_bytes(b)).collect();
            Extension::of_atoms(atoms, m).map_err(|error| error.to_string())?
        }
        _ => return Err(damaged("the added atoms")),
    };
    if added.len() > settings.adaptive {
        return Err(damaged("the added atoms"));
    }
    let sparsities: Vec<usize> = formats.iter().map(|format| format.sparsity).collect();
    let atoms = coding.atoms(&added, &sparsities).len();
    let [rows] = of_kind("window")[..] else {
        return Err(damaged("the rows of the window"));
    };
    let dense = settings.dense;
    let numbers = rows_of_bytes(rows, dense);
    let whole = rows_bytes(&numbers, dense).len() == rows.len();
    let each = numbers.len() / codes.len().max(1);
    if !whole || each * codes.len() != numbers.len() || !each.is_multiple_of(m) {
        return Err(damaged("the rows of the window"));
    }
    if numbers.iter().any(|x| !x.is_finite()) {
        return Err(damaged("a number of the window"));
    }
    let mut parts = Vec::with_capacity(codes.len());
    let mut rest = numbers.as_slice();
    for codes in codes {
        codes
            .check_atoms(atoms)
            .map_err(|error| error.to_string())?;
        let (rows, after) = rest.split_at(each);
        rest = after;
        let mut window = DenseRows::new(m, dense);
        window.extend(rows);
        parts.push(Part { codes, window });
    }
    Ok((parts, added))
}
