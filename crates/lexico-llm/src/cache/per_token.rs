use ::lexico::KeyValue;

use super::CacheSpec;
use super::dense_parts::{DENSE_LAYERS, DenseParts, SINKS};
use super::method::{CacheContext, Method, Values, option};
use super::stored::{CodedHead, StoredCache};
use super::uniform::{Block, Quantised};
use crate::error::Result;

/// Every key and value quantised uniformly from its smallest to its largest number, in groups of channels, with a scale
/// and a zero point each in f16; the newest positions dense.
///
/// The quantised cache that others are compared with: FlexGen (Sheng et al. 2023) in groups of 64 with 4 bits, the
/// per-token baseline of KIVI (Liu et al. 2024), `QuantizedCache` of Hugging Face transformers. New positions attend at
/// full precision to each other.
pub(super) static METHOD: Method = Method {
    name: "per-token",
    summary: "uniform quantisation of each key and value, in groups of channels",
    needs_dictionaries: false,
    saves: false,
    options: &[
        option("bits", Values::OneOf(&["2", "3", "4", "8"]), "4").about("bits a number"),
        option("group", Values::Count, "32").about("channels that share a scale and a zero point"),
        option("window", Values::Count, "128").about("newest positions, kept dense"),
        SINKS,
        DENSE_LAYERS,
    ],
    build: |spec, context| {
        let (bits, block) = bits_and_block(spec)?;
        let (m, window) = (context.config.head_dim, spec.number("window")?);
        let dense = DenseParts::new(spec, context.config)?;
        let head = |layer| {
            let coded = || Quantised::new(bits, m, block);
            let head = CodedHead::new(m, window, KeyValue::new(coded(), coded()));
            dense.around(layer, m, head)
        };
        Ok(Box::new(StoredCache::with_heads(context.config, (), head)))
    },
    bytes: |spec, context, lengths| {
        let (bits, block) = bits_and_block(spec)?;
        let vector = Quantised::bytes_of(1, bits, context.config.head_dim, block);
        let (config, window) = (context.config, spec.number("window")?);
        let dense = DenseParts::new(spec, config)?;
        let head = |l| CodedHead::<Quantised>::expected_bytes(config, l, window, 2 * vector);
        Ok(dense.expected_bytes::<CodedHead<Quantised>>(config, lengths, head))
    },
    settings: |_, context, budget| {
        let mut settings = Vec::new();
        for bits in ["8", "4", "3", "2"] {
            for group in groups(context) {
                for window in budget.windows(context.config) {
                    settings.push(vec![
                        ("bits", bits.to_owned()),
                        ("group", group.to_string()),
                        ("window", window.to_string()),
                    ]);
                }
            }
        }
        settings
    },
};

/// Sizes of groups of channels worth trying, the best first: none that is the same as the one before.
pub(super) fn groups(context: &CacheContext<'_>) -> impl Iterator<Item = usize> + use<> {
    let head_dim = context.config.head_dim;
    [32, 64, 128]
        .into_iter()
        .filter(move |&group| group == 32 || group / 2 < head_dim)
}

fn bits_and_block(spec: &CacheSpec) -> Result<(u32, Block)> {
    let block = Block::Channels(spec.positive("group")?);
    Ok((spec.number("bits")?, block))
}
