use half::f16;
use serde::{Deserialize, Serialize};

use super::layer::HeadRows;
use super::{LayerCache, Leaving};
use crate::attention::{DenseRows, NumberType};
use crate::codes::{CodeFormat, stored};
use crate::key_value::KeyValue;
use crate::tensor_file::numbers;
use crate::{Error, Result};

/// More positions than any text has.
const MAX_POSITIONS: usize = 1 << 40;

/// All that the cache of a layer holds, in a form to keep: codes [at rest](stored), the recent window as it is.
///
/// The codes of a batch that is leaving the recent window are not among them: coding it anew gives the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerState {
    /// The checksums of the dictionaries or codebooks that the codes are over.
    pub checksums: KeyValue<u32>,
    /// The number of positions that have come, those that were dropped included; 0 in states of earlier versions, which
    /// needed it for nothing.
    #[serde(default)]
    pub positions: usize,
    /// The steps since a batch began to leave the recent window, where one is leaving.
    pub leaving: Option<usize>,
    /// Whether all positions lie in the window as the model made them, as they may with a limit of memory.
    #[serde(default)]
    pub all_dense: bool,
    /// Names and bytes: `keys.codes`, as many times as there are blocks, `keys.sinks`, where first positions are kept
    /// dense, `keys.window`, and the same of the values.
    pub blocks: Vec<(String, Vec<u8>)>,
}

impl LayerCache {
    /// The checksums of the dictionaries or codebooks that the codes are over. `O(N·m)` the first time.
    pub fn checksums(&self) -> KeyValue<u32> {
        self.coders.as_ref().map(super::Coder::checksum)
    }

    /// All that an empty cache with the same dictionaries and settings needs to go on exactly as this one would.
    pub fn save(&self) -> LayerState {
        let heads = self.heads.iter().map(KeyValue::as_ref);
        let mut blocks = Vec::new();
        for (part, heads) in KeyValue::NAMES
            .into_iter()
            .zip(heads.collect::<KeyValue<Vec<_>>>())
        {
            let codes: Vec<_> = heads.iter().map(|rows| &rows.codes).collect();
            let codes = stored::write(&codes).into_iter();
            blocks.extend(codes.map(|block| (format!("{part}.codes"), block)));
            if self.settings.sinks > 0 {
                let sinks = heads.iter().flat_map(|rows| rows.sinks.to_bytes());
                blocks.push((format!("{part}.sinks"), sinks.collect()));
            }
            let recent = heads.iter().flat_map(|rows| rows.recent.to_bytes());
            blocks.push((format!("{part}.window"), recent.collect()));
        }
        LayerState {
            checksums: self.checksums(),
            positions: self.dropped + self.len(),
            leaving: self.leaving.as_ref().map(|leaving| leaving.age),
            all_dense: self.all_dense,
            blocks,
        }
    }

    /// Makes an empty cache one whose [`LayerCache::save`] this was.
    ///
    /// # Errors
    /// [`Error::OtherDictionary`] where the codes are over others; [`Error::Stored`] and [`Error::Dictionary`] where they
    /// are damaged or of other heads; [`Error::SavedLayer`] where the state contradicts itself. The cache is then as it
    /// was.
    pub fn load(&mut self, state: &LayerState) -> Result<()> {
        for (part, (own, saved)) in KeyValue::NAMES.zip(self.checksums().zip(state.checksums)) {
            if own != saved {
                return Err(Error::OtherDictionary(part.to_owned()));
            }
        }
        let known = |name: &str| {
            let (part, kind) = name.split_once('.').unwrap_or_default();
            KeyValue::NAMES.into_iter().any(|known| known == part)
                && (["codes", "window"].contains(&kind)
                    || kind == "sinks" && self.settings.sinks > 0)
        };
        if !state.blocks.iter().all(|(name, _)| known(name)) {
            return Err(Error::SavedLayer("the list of blocks"));
        }
        let formats = self.heads.iter();
        let formats: KeyValue<Vec<CodeFormat>> = formats
            .map(|head| head.as_ref().map(|rows| rows.codes.format()))
            .collect();
        let parts = KeyValue::NAMES.zip(formats.zip(self.atoms()));
        let rows = parts.try_map(|(part, (formats, atoms))| {
            let of_kind = |kind: &str| -> Vec<&[u8]> {
                let name = format!("{part}.{kind}");
                let own = state.blocks.iter().filter(|block| block.0 == name);
                own.map(|(_, bytes)| bytes.as_slice()).collect()
            };
            let [recent] = of_kind("window")[..] else {
                return Err(Error::SavedLayer("the rows of the window"));
            };
            let sinks = match (self.settings.sinks, &of_kind("sinks")[..]) {
                (0, _) => &[],
                (_, [sinks]) => *sinks,
                _ => return Err(Error::SavedLayer("the first positions")),
            };
            let codes = stored::read(&formats, of_kind("codes"))?;
            let dense = self.read_dense(sinks, 0)?.into_iter();
            let dense = dense.zip(self.read_dense(recent, state.positions)?);
            let rows = codes.into_iter().zip(dense);
            let rows = rows.map(|(codes, (sinks, recent))| {
                codes.check_atoms(atoms.len())?;
                Ok(HeadRows {
                    sinks,
                    codes,
                    recent,
                })
            });
            rows.collect::<Result<Vec<_>>>()
        })?;
        let lengths = rows.as_ref().into_iter().flatten();
        let lengths = lengths.map(|rows| [rows.sinks.len(), rows.codes.len(), rows.recent.len()]);
        let lengths: Vec<_> = lengths.collect();
        let held = lengths.first().copied().unwrap_or_default();
        if lengths.iter().any(|&lengths| lengths != held) || held[0] > self.settings.sinks {
            return Err(Error::SavedLayer("the number of positions"));
        }
        if state.all_dense && (self.settings.memory.is_none() || held[0] + held[1] > 0) {
            return Err(Error::SavedLayer("that all positions are dense"));
        }
        let possible = |&age: &usize| age <= self.settings.delay && held[2] >= self.settings.batch;
        if !state.leaving.as_ref().is_none_or(possible) {
            return Err(Error::SavedLayer("the batches that leave the window"));
        }
        let held: usize = held.iter().sum();
        if state.positions > MAX_POSITIONS || (1..held).contains(&state.positions) {
            return Err(Error::SavedLayer("the number of positions that have come"));
        }
        self.dropped = state.positions.saturating_sub(held);
        self.all_dense = state.all_dense;
        self.leaving = state.leaving.map(|age| Leaving { age, codes: None });
        let pairs = rows.keys.into_iter().zip(rows.values);
        let heads = pairs.map(|(keys, values)| KeyValue { keys, values });
        self.heads = heads.collect();
        Ok(())
    }

    /// The dense rows of every head out of the bytes of all, the newest of so many positions.
    fn read_dense(&self, bytes: &[u8], positions: usize) -> Result<Vec<DenseRows>> {
        let number_type = self.settings.number_type;
        let (heads, m) = (self.heads.len(), self.head_dim());
        if !bytes.len().is_multiple_of(heads * m * number_type.bytes()) {
            return Err(Error::SavedLayer("the dense rows"));
        }
        let numbers = match number_type {
            NumberType::F16 => numbers(bytes, |b| f16::from_le_bytes(b).to_f32()),
            NumberType::F32 => numbers(bytes, f32::from_le_bytes),
        };
        if numbers.iter().any(|x| !x.is_finite()) {
            return Err(Error::SavedLayer("a dense number"));
        }
        let each = numbers.len() / heads;
        let rows = (0..heads).map(|head| {
            let mut rows = DenseRows::new(m, number_type);
            rows.pass(positions.saturating_sub(each / m));
            rows.extend(&numbers[head * each..(head + 1) * each]);
            rows
        });
        Ok(rows.collect())
    }
}
