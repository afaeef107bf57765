use ::lexico::attention::{Positions, Source};
use candle_core::Tensor;

use super::method::{CacheContext, Lengths, Method, Values, option};
use super::uniform::ByToken;
use super::window::Window;
use super::{CacheSpec, Decoded, Footprint, KvCache, Step, outside_window};
use crate::config::Config;
use crate::error::Result;

pub(super) static METHOD: Method = Method {
    name: "per-token",
    summary: "uniform quantisation of each key and value, in groups of channels",
    needs_dictionaries: false,
    options: &[
        option(
            "bits",
            Values::OneOf(&["2", "3", "4", "8"]),
            "4",
            "bits a number",
        ),
        option(
            "group",
            Values::Count,
            "32",
            "channels that share a scale and a zero point",
        ),
        option(
            "window",
            Values::Count,
            "128",
            "newest positions, kept dense",
        ),
    ],
    build: |spec, context| {
        let settings = Settings::new(spec)?;
        Ok(Box::new(PerTokenCache::new(context.config, settings)))
    },
    bytes: |spec, context, lengths| Ok(Settings::new(spec)?.bytes(context.config, lengths)),
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

#[derive(Clone, Copy)]
struct Settings {
    bits: u32,
    group: usize,
    window: usize,
}

impl Settings {
    fn new(spec: &CacheSpec) -> Result<Self> {
        Ok(Self {
            bits: spec.number("bits")?,
            group: spec.positive("group")?,
            window: spec.number("window")?,
        })
    }

    fn bytes(self, config: &Config, lengths: Lengths) -> f64 {
        let positions = lengths.end.min(config.window.unwrap_or(usize::MAX));
        let dense = positions.min(self.window);
        let coded = positions - dense;
        let each = 2 * ByToken::bytes_each(self.bits, config.head_dim, self.group);
        let head = size_of::<Head>() + coded * each + dense * 4 * config.head_dim;
        (config.layers * config.kv_heads * head) as f64
    }
}

/// Every key and value quantised uniformly from its smallest to its largest number, in groups of channels, with a scale
/// and a zero point each in f16; the newest positions dense.
///
/// The quantised cache that others are compared with: FlexGen (Sheng et al. 2023) in groups of 64 with 4 bits, the
/// per-token baseline of KIVI (Liu et al. 2024), `QuantizedCache` of Hugging Face transformers. New positions attend at
/// full precision to each other.
struct PerTokenCache {
    layers: Vec<Vec<Head>>,
    sliding_window: Option<usize>,
    positions: usize,
}

struct Head {
    coded: Coded,
    key_window: Window,
    value_window: Window,
}

struct Coded {
    keys: ByToken,
    values: ByToken,
}

impl Positions for Coded {
    fn len(&self) -> usize {
        self.keys.len()
    }

    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        self.keys.read(first, count, keys);
        self.values.read(first, count, values);
    }
}

impl PerTokenCache {
    fn new(config: &Config, settings: Settings) -> Self {
        let m = config.head_dim;
        let rows = || ByToken::new(settings.bits, m, settings.group);
        let head = || Head {
            coded: Coded {
                keys: rows(),
                values: rows(),
            },
            key_window: Window::new(m, settings.window),
            value_window: Window::new(m, settings.window),
        };
        let layer = || (0..config.kv_heads).map(|_| head()).collect();
        Self {
            layers: (0..config.layers).map(|_| layer()).collect(),
            sliding_window: config.window,
            positions: 0,
        }
    }
}

impl KvCache for PerTokenCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let window = self.sliding_window;
        let step = Step::new(q, k, v)?;
        step.check_finite(layer)?;
        if layer + 1 == self.layers.len() {
            self.positions += k.dim(1)?;
        }
        let heads = &mut self.layers[layer];
        let out = step.attend(heads, window, |head| {
            vec![
                Source::Decoded(&head.coded),
                Source::Dense {
                    keys: head.key_window.rows(),
                    values: head.value_window.rows(),
                },
            ]
        })?;
        for (head, (keys, values)) in heads.iter_mut().zip(step.heads()) {
            let coded = &mut head.coded;
            coded.keys.extend(&head.key_window.take(keys));
            coded.values.extend(&head.value_window.take(values));
            let held = coded.len() + head.key_window.rows().len();
            if let Some(outside) = outside_window(window, held) {
                let outside = outside.min(coded.len());
                coded.keys.drop_front(outside);
                coded.values.drop_front(outside);
            }
        }
        Ok(out)
    }

    fn len(&self) -> usize {
        self.positions
    }

    fn decoded(&self, layer: usize) -> Result<Option<Decoded>> {
        let mut decoded = Decoded::default();
        for head in &self.layers[layer] {
            let Coded { keys, values } = &head.coded;
            head.coded
                .read(0, head.coded.len(), &mut decoded.keys, &mut decoded.values);
            decoded.keys.extend(head.key_window.rows().to_f32());
            decoded.values.extend(head.value_window.rows().to_f32());
            decoded.bytes[0] += keys.bytes() + head.key_window.rows().bytes();
            decoded.bytes[1] += values.bytes() + head.value_window.rows().bytes();
        }
        Ok(Some(decoded))
    }

    fn footprint(&self) -> Footprint {
        let heads = || self.layers.iter().flatten();
        let coded = heads().map(|head| head.coded.keys.bytes() + head.coded.values.bytes());
        let window =
            heads().map(|head| head.key_window.rows().bytes() + head.value_window.rows().bytes());
        Footprint {
            parts: vec![
                ("codes", coded.sum()),
                ("window", window.sum()),
                ("bookkeeping", heads().count() * size_of::<Head>()),
            ],
        }
    }
}
