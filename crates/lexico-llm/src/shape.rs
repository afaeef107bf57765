//! Models of a known shape with random weights, for measuring speed and memory where no weights are.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor};
use lexico::dictionary::{LayerDictionaries, Training};
use lexico::tensor_file::{self, Dtype, NewTensor};
use lexico::{Dictionary, DictionarySet, KeyValue};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cache::KvCache;
use crate::config::{Config, LLAMA3, Llama3Scaling, Rotary, RotaryScaling};
use crate::decoder::Decoder;
use crate::error::{Result, io};
use crate::weights::{INDEX, Quantize, Weights};

/// Names of the shapes there are.
pub const SHAPES: [&str; 4] = ["llama-3.2-1b", "llama-3.1-8b", "mistral-7b", "qwen2.5-7b"];

/// Positions that [`fill`] adds at a time.
const CHUNK: usize = 512;

/// The config of a known model; `None` for a name that is not among [`SHAPES`].
pub fn config(name: &str) -> Option<Config> {
    let llama3 = |factor| Rotary {
        theta: 500_000.0,
        scaling: RotaryScaling::Llama3(Llama3Scaling { factor, ..LLAMA3 }),
    };
    let (
        family,
        [
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocabulary,
            context,
        ],
    ) = match name {
        "llama-3.2-1b" => ("Llama", [2048, 8192, 16, 32, 8, 64, 128_256, 131_072]),
        "llama-3.1-8b" => ("Llama", [4096, 14_336, 32, 32, 8, 128, 128_256, 131_072]),
        "mistral-7b" => ("Mistral", [4096, 14_336, 32, 32, 8, 128, 32_768, 32_768]),
        "qwen2.5-7b" => ("Qwen2", [3584, 18_944, 28, 28, 4, 128, 152_064, 32_768]),
        _ => return None,
    };
    let rotary = match name {
        "llama-3.2-1b" => llama3(32.0),
        "llama-3.1-8b" => llama3(8.0),
        _ => Rotary {
            theta: 1_000_000.0,
            scaling: RotaryScaling::None,
        },
    };
    Some(Config {
        architecture: format!("{family}ForCausalLM"),
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocabulary,
        context,
        norm_epsilon: 1e-5,
        rotary,
        biases: family == "Qwen2",
        head_norms: false,
        window: None,
        tied_head: name == "llama-3.2-1b",
        end_tokens: Vec::new(),
    })
}

impl Decoder {
    /// A decoder of this shape with random weights, the same for the same config, that computes on a device.
    ///
    /// # Errors
    /// Where memory or the tensor library fails.
    pub fn random(config: Config, quantize: Quantize, device: &Device) -> Result<Self> {
        Self::load(config, &Weights::Random, quantize, device)
    }
}

/// Writes a model of this shape with the random weights of [`Decoder::random`], a shard a layer, into
/// a new folder; no tokenizer. Asks `go_on` after every shard; `false` where that ended the work.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) where the folder is there already or cannot be written.
pub fn save(
    config: &Config,
    folder: &Path,
    go_on: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<bool> {
    std::fs::create_dir(folder).map_err(io(folder))?;
    let count = config.layers + 1;
    let mut index = serde_json::Map::new();
    for shard in 0..count {
        let file = format!("model-{:05}-of-{count:05}.safetensors", shard + 1);
        let mut tensors = Vec::new();
        for (name, shape) in config.weights(shard.checked_sub(1)) {
            let rows = if shape.len() == 2 { shape[0] } else { 1 };
            let norm = Weights::Random.number_type(&name, &shape)? == GgmlDType::F32;
            let (dtype, bytes_each) = [(Dtype::F16, 2), (Dtype::F32, 4)][usize::from(norm)];
            let mut bytes = vec![0; shape.iter().product::<usize>() * bytes_each];
            Weights::Random.read_rows(&name, 0..rows, &mut bytes)?;
            index.insert(name.clone(), file.as_str().into());
            tensors.push(NewTensor::new(&name, dtype, &shape, bytes));
        }
        tensor_file::write(folder.join(file), &tensors, HashMap::new())?;
        if go_on().is_break() {
            return Ok(false);
        }
    }
    let index = serde_json::json!({"weight_map": index}).to_string();
    tensor_file::write_atomically(&folder.join(INDEX), index.as_bytes())?;
    tensor_file::write_atomically(&folder.join("config.json"), config.to_json().as_bytes())?;
    Ok(true)
}

/// Dictionaries of random atoms for a model of this shape.
///
/// # Errors
/// [`lexico::Error::Dictionary`] for a number of atoms that is impossible.
pub fn dictionaries(config: &Config, atoms: usize, sparsity: usize) -> Result<Arc<DictionarySet>> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut dictionary = || {
        let numbers = (0..atoms * config.head_dim).map(|_| rng.random_range(-1f32..1.0));
        Dictionary::normalised(numbers.collect(), config.head_dim)?.in_half_precision()
    };
    let layers = (0..config.layers).map(|_| {
        Ok(LayerDictionaries {
            sparse: Some(KeyValue::new(dictionary()?.into(), dictionary()?.into())),
            ..LayerDictionaries::default()
        })
    });
    Ok(Arc::new(DictionarySet {
        layers: layers.collect::<Result<_>>()?,
        model: config.identity("random"),
        training: Training {
            sparsity,
            ..Training::default()
        },
    }))
}

/// Fills a cache with random keys and values of a device, as if so many positions had been read.
///
/// # Errors
/// Result that the cache returns.
pub fn fill(
    cache: &mut dyn KvCache,
    config: &Config,
    positions: usize,
    device: &Device,
) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for first in (0..positions).step_by(CHUNK) {
        let t = CHUNK.min(positions - first);
        let shape = (config.kv_heads, t, config.head_dim);
        let mut draw = || {
            let count = config.kv_heads * t * config.head_dim;
            let numbers: Vec<f32> = (0..count).map(|_| rng.random_range(-1f32..1.0)).collect();
            Tensor::from_vec(numbers, shape, device)
        };
        let (k, v) = (draw()?, draw()?);
        // What attention computes here is thrown away: one query head a KV head will do, but for a single position.
        let group = config.heads / config.kv_heads;
        let heads = if t == 1 { group } else { 1 };
        let q = Tensor::cat(&vec![&k; heads], 0)?;
        for layer in 0..config.layers {
            cache.attend(layer, &q, &k, &v)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{CacheContext, CacheSpec};
    use crate::decoder::{Logits, Sequence};

    #[test]
    fn a_shape_that_is_saved_loads_as_it_was_drawn() {
        let mut config = config("qwen2.5-7b").unwrap();
        (config.hidden, config.intermediate, config.layers) = (32, 48, 2);
        (config.heads, config.kv_heads, config.head_dim) = (4, 2, 8);
        config.vocabulary = 50;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        assert!(save(&config, &path, &mut || ControlFlow::Continue(())).unwrap());
        assert_eq!(Config::load(&path).unwrap(), config);
        let logits = |decoder: Decoder| -> Vec<f32> {
            let context = CacheContext {
                model: "drawn",
                config: decoder.config(),
                dictionaries: None,
                calibration: None,
                device: decoder.device(),
            };
            let spec: CacheSpec = "full".parse().unwrap();
            let mut cache = spec.build(&context).unwrap();
            let mut step = [Sequence {
                tokens: &[1, 2, 3],
                cache: cache.as_mut(),
            }];
            let logits = decoder.forward(&mut step, Logits::All).unwrap();
            logits.flatten_all().unwrap().to_vec1().unwrap()
        };
        let saved = logits(Decoder::open(&path, Quantize::Q8_0).unwrap());
        assert_eq!(
            saved,
            logits(Decoder::random(config.clone(), Quantize::Q8_0, &Device::Cpu).unwrap())
        );
        // What is there is never written over.
        assert!(save(&config, &path, &mut || ControlFlow::Continue(())).is_err());
    }

    #[test]
    fn every_shape_is_known_and_possible() {
        for name in SHAPES {
            let config = config(name).unwrap();
            assert!(config.heads.is_multiple_of(config.kv_heads), "{name}");
        }
        assert!(config("llama-9").is_none());
        // Llama 3.1 8B keeps 128 KiB a token in FP16.
        assert_eq!(
            config("llama-3.1-8b").unwrap().fp16_cache_bytes(1),
            128 * 1024
        );
    }
}
