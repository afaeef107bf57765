use super::{Coder, Coding, MemoryLimit};
use crate::attention::NumberType;
use crate::dictionary::{LayerDictionaries, LayerSparsities};
use crate::encode::Fit;
use crate::key_value::KeyValue;
use crate::{Error, Result};

/// The settings of the cache of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSettings {
    /// The kind of codes, and how they are found.
    pub coding: Coding,
    /// The length of what codes stand for.
    pub fit: Fit,
    /// Max atoms of each KV head's keys and values.
    pub sparsities: LayerSparsities,
    /// The first positions, kept dense: models attend to them out of proportion (attention sinks: Xiao et al., ICLR
    /// 2024).
    pub sinks: usize,
    /// `n_b`: the newest positions, kept dense.
    pub recent_window: usize,
    /// Keeps as many of the newest positions dense as the memory holds, rather than [`recent_window`](Self::recent_window).
    pub memory: Option<MemoryLimit>,
    /// `n_a`: the positions that leave the recent window at once.
    pub batch: usize,
    /// The steps of decode between the one at which a batch begins to leave the recent window and the one at which it
    /// takes its place among the codes. Layers with delays of their own do not all make the same token wait. One less than
    /// the batch at the most: a longer one counts as that, or more would come than leaves.
    pub delay: usize,
    /// The numbers of the recent window.
    pub number_type: NumberType,
    /// The positions that a query sees, its own included, where the model's attention is limited to so many.
    pub sliding_window: Option<usize>,
    /// Codes a batch that leaves on another thread while the next tokens are decoded, rather than at the step that it
    /// is due at. Results are the same.
    pub background: bool,
}

impl LayerSettings {
    /// The usual settings, those of `lexico` in `--cache` too: additive codes, the first 4 positions dense, a recent window of 128 positions, of which 16 leave at
    /// once, in f16.
    #[must_use]
    pub fn new(sparsities: LayerSparsities) -> Self {
        Self {
            coding: Coding::default(),
            fit: Fit::default(),
            sparsities,
            sinks: 4,
            recent_window: 128,
            memory: None,
            batch: 16,
            delay: 4,
            number_type: NumberType::default(),
            sliding_window: None,
            background: false,
        }
    }

    /// The coders of a layer's keys and values, once all settings are known to be possible: what cannot be is refused
    /// before the first window is full.
    pub(crate) fn coders(&self, dictionaries: &LayerDictionaries) -> Result<KeyValue<Coder>> {
        if self.batch == 0 {
            let reason = "at least one position leaves the window at once";
            return Err(Error::setting("batch", "0", reason));
        }
        let sparsities = &self.sparsities;
        if sparsities.keys.is_empty() || sparsities.keys.len() != sparsities.values.len() {
            let reason = "one for every head's keys and values is needed";
            let given = format!(
                "{} for keys, {} for values",
                sparsities.keys.len(),
                sparsities.values.len()
            );
            return Err(Error::setting("sparsity", given, reason));
        }
        let coders = self.coding.coders(dictionaries)?;
        for (coder, sparsities) in coders.as_ref().zip(sparsities.as_ref()) {
            sparsities.iter().try_for_each(|&s| coder.check(s))?;
            let Some(maps) = coder.maps() else {
                continue;
            };
            if maps.heads() != sparsities.len() {
                let given = sparsities.len().to_string();
                let reason = format!("there are maps of {} heads", maps.heads());
                return Err(Error::setting("sparsity", given, &reason));
            }
            if maps.head_dim() != dictionaries.head_dim() {
                return Err(Error::Dictionary(format!(
                    "the maps are of head dim {}, the atoms of {}",
                    maps.head_dim(),
                    dictionaries.head_dim()
                )));
            }
        }
        Ok(coders)
    }

    /// The steps that a batch waits: the next one begins to leave when this one is gone, and by then no more than a batch may
    /// have come.
    pub(crate) fn wait(&self) -> usize {
        let most = self.memory.map_or(usize::MAX, |memory| memory.wait());
        self.delay.min(self.batch.saturating_sub(1)).min(most)
    }

    /// The newest positions that are kept dense when `positions` are held.
    pub(crate) fn window(&self, positions: usize) -> usize {
        let of_memory = self.memory.map(|memory| memory.window(positions));
        of_memory.unwrap_or(self.recent_window)
    }

    /// Whether a batch begins to leave the window where `held` positions are dense and some `older` are held too.
    pub(crate) fn begins(&self, older: usize, held: usize) -> bool {
        held >= self.window(older + held).saturating_add(self.batch)
    }

    /// The positions to code at once when `new` ones come to `held` dense ones and some `older` in a prompt: those that the
    /// recent window cannot hold, unless they are fewer than leave it at once.
    pub(crate) fn surplus(&self, older: usize, held: usize, new: usize) -> usize {
        let surplus = (held + new).saturating_sub(self.window(older + held + new));
        if surplus < self.batch { 0 } else { surplus }
    }

    /// The bytes that the cache is expected to hold after `positions`, within a few per cent.
    #[must_use]
    pub fn expected_bytes(&self, head_dim: usize, positions: usize) -> f64 {
        // Batches leave whole, each layer's at its own step, and the window keeps the room that it needed for them.
        let leaving = self.batch.saturating_mul(3) / 2;
        let dense = self.sinks.saturating_add(self.window(positions));
        let dense = positions.min(dense.saturating_add(leaving)) as f64;
        let coded = positions as f64 - dense;
        let numbers = 2 * self.sparsities.keys.len() * head_dim;
        // Codes grow by a 64th, at least by four vectors; half of that is empty.
        let grown = coded + (coded / 128.0).max(2.0).min(coded);
        // A batch that is coded in the background is held in f32 too, half of the time.
        let background = if self.background && self.batch > 1 {
            self.batch.min(positions)
        } else {
            0
        };
        let copied = background as f64 * numbers as f64 * size_of::<f32>() as f64 / 2.0;
        grown * self.code_bytes() as f64
            + dense * self.dense_bytes(head_dim) as f64
            + copied
            + super::layer::bookkeeping(&self.sparsities) as f64
    }

    /// The bytes of a position of all heads, coded.
    pub(super) fn code_bytes(&self) -> usize {
        let heads = self.sparsities.keys.iter().chain(&self.sparsities.values);
        heads.map(|&s| self.coding.bytes(s)).sum()
    }

    /// The bytes of a position of all heads, dense.
    pub(super) fn dense_bytes(&self, head_dim: usize) -> usize {
        2 * self.sparsities.keys.len() * head_dim * self.number_type.bytes()
    }
}
