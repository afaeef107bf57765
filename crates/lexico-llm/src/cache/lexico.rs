use std::sync::Arc;

use ::lexico::attention::{DenseRows, NumberType, Source};
use ::lexico::dictionary::Dictionary;
use ::lexico::{CodeFormat, Codes, CoefficientFormat, DictionarySet, Pursuit};
use candle_core::Tensor;

use super::{Footprint, KvCache, Step, outside_window};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::threads::CandleThreads;

/// Settings of [`LexicoCache`].
#[derive(Debug, Clone, PartialEq)]
pub struct LexicoSettings {
    /// Most nonzeros of a key.
    pub key_sparsity: usize,
    /// Most nonzeros of a value.
    pub value_sparsity: usize,
    /// `δ`: relative error at which the pursuit stops early; 0 never does.
    pub tolerance: f32,
    /// `n_b`: the newest positions, kept dense.
    pub window: usize,
    /// `n_a`: how many positions leave the window at once.
    pub batch: usize,
    /// How coefficients are stored.
    pub coefficients: CoefficientFormat,
    /// How the window is stored.
    pub dense: NumberType,
}

/// Keys and values as sparse codes over the model's dictionaries, the newest ones dense.
///
/// Kim, Park, Cho, Papailiopoulos: *Lexico* (ICML 2025). New positions attend at full precision
/// to each other and to the window, and on the codes to all that came before; what the window
/// cannot hold is coded right after, so that at most one layer of a prompt is ever dense.
pub struct LexicoCache {
    dictionaries: Arc<DictionarySet>,
    settings: LexicoSettings,
    layers: Vec<Vec<Head>>,
    /// The model's sliding window.
    sliding_window: Option<usize>,
    positions: usize,
}

struct Head {
    keys: Part,
    values: Part,
}

/// The keys, or the values, of one KV head: the past as codes, then the window.
struct Part {
    codes: Codes,
    window: DenseRows,
}

impl LexicoCache {
    /// An empty cache for a model of this shape.
    ///
    /// # Errors
    /// [`lexico::Error::OtherModel`](::lexico::Error::OtherModel) where the dictionaries are of
    /// another shape; where a sparsity or the tolerance is impossible.
    pub fn new(
        config: &Config,
        dictionaries: Arc<DictionarySet>,
        settings: LexicoSettings,
    ) -> Result<Self> {
        dictionaries.check_fits(&config.identity("at hand"))?;
        if settings.batch == 0 {
            return Err(Error::OptionValue {
                method: "lexico",
                option: "batch",
                value: "0".to_owned(),
                reason: "at least one position leaves the window at once".to_owned(),
            });
        }
        let part = |sparsity: usize, dictionary: &Dictionary| -> Result<Part> {
            // Refuses impossible settings now rather than at the first full window.
            Pursuit::new(dictionary, sparsity)?.with_tolerance(settings.tolerance)?;
            Ok(Part {
                codes: Codes::new(CodeFormat {
                    sparsity,
                    variable: settings.tolerance > 0.0,
                    coefficients: settings.coefficients,
                })?,
                window: DenseRows::new(config.head_dim, settings.dense),
            })
        };
        let mut layers = Vec::with_capacity(config.layers);
        for layer in &dictionaries.layers {
            let mut heads = Vec::with_capacity(config.kv_heads);
            for _ in 0..config.kv_heads {
                heads.push(Head {
                    keys: part(settings.key_sparsity, &layer.keys)?,
                    values: part(settings.value_sparsity, &layer.values)?,
                });
            }
            layers.push(heads);
        }
        Ok(Self {
            dictionaries,
            settings,
            layers,
            sliding_window: config.window,
            positions: 0,
        })
    }
}

impl Part {
    /// Takes new vectors into the window, and gives back those that the window cannot hold, the oldest.
    fn take(&mut self, new: &[f32], head_dim: usize, settings: &LexicoSettings) -> Vec<f32> {
        let new_count = new.len() / head_dim;
        let surplus = (self.window.len() + new_count).saturating_sub(settings.window);
        if surplus == 0 || surplus < settings.batch {
            self.window.extend(new);
            return Vec::new();
        }
        // The oldest ones leave: those of the window first, then new ones that never enter it.
        let mut leaving = self.window.take_front(surplus.min(self.window.len()));
        let (passing, staying) = new.split_at(surplus * head_dim - leaving.len());
        leaving.extend_from_slice(passing);
        self.window.extend(staying);
        leaving
    }

    fn len(&self) -> usize {
        self.codes.len() + self.window.len()
    }
}

impl KvCache for LexicoCache {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let dictionaries = &self.dictionaries.layers[layer];
        let (settings, sliding) = (&self.settings, self.sliding_window);
        if layer + 1 == self.layers.len() {
            self.positions += k.dim(1)?;
        }
        let step = Step::new(q, k, v)?;
        let heads = &mut self.layers[layer];
        let out = step.attend(heads, sliding, |head| {
            vec![
                Source::Codes {
                    keys: &head.keys.codes,
                    values: &head.values.codes,
                    key_dictionary: &dictionaries.keys,
                    value_dictionary: &dictionaries.values,
                },
                Source::Dense {
                    keys: &head.keys.window,
                    values: &head.values.window,
                },
            ]
        })?;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (head, (new_keys, new_values)) in heads.iter_mut().zip(step.heads()) {
            let m = dictionaries.keys.head_dim();
            keys.extend(head.keys.take(new_keys, m, settings));
            values.extend(head.values.take(new_values, m, settings));
        }
        // All heads at once: every reading of the dictionary serves as many vectors as there are.
        let code = |dictionary: &Dictionary, sparsity: usize, leaving: &[f32], part| {
            let coded = Pursuit::new(dictionary, sparsity)
                .and_then(|pursuit| pursuit.with_tolerance(settings.tolerance))
                .and_then(|pursuit| pursuit.encode_on(leaving, &CandleThreads));
            coded.map_err(|reason| Error::Coding {
                layer,
                part,
                reason,
            })
        };
        let keys = code(&dictionaries.keys, settings.key_sparsity, &keys, "key")?;
        let values = code(
            &dictionaries.values,
            settings.value_sparsity,
            &values,
            "value",
        )?;
        let each = keys.len() / heads.len();
        for (number, head) in heads.iter_mut().enumerate() {
            if each > 0 {
                head.keys.codes.extend(&keys.part(number * each, each));
                head.values.codes.extend(&values.part(number * each, each));
            }
            if let Some(outside) = outside_window(sliding, head.keys.len()) {
                let outside = outside.min(head.keys.codes.len());
                head.keys.codes.drop_front(outside);
                head.values.codes.drop_front(outside);
            }
        }
        Ok(out)
    }

    fn len(&self) -> usize {
        self.positions
    }

    fn footprint(&self) -> Footprint {
        let heads = || self.layers.iter().flatten();
        let parts = || heads().flat_map(|head| [&head.keys, &head.values]);
        Footprint {
            parts: vec![
                ("codes", parts().map(|part| part.codes.bytes()).sum()),
                ("window", parts().map(|part| part.window.bytes()).sum()),
                ("bookkeeping", heads().count() * size_of::<Head>()),
            ],
        }
    }
}
