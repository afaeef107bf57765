use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use half::f16;
use serde::{Deserialize, Serialize};

use super::allocation::MAX_ALLOCATED;
use super::{
    CODEBOOK_ATOMS, CodeFamily, CodebookSizes, Codebooks, CodingLosses, Dictionary, HeadMaps,
    JointBasis, JointLayers, LayerSparsities, RotaryMeans,
};
use crate::key_value::KeyValue;
use crate::tensor_file::{self, Dtype, NewTensor, TensorFile};
use crate::{Error, Result};

/// Formats of a dictionary file, as its metadata names them: the first always has dictionaries for sparse codes and
/// never maps of heads; the third alone has [`RotaryMeans`], and the last [`JointBasis`] too.
pub const FORMATS: [&str; 4] = [
    "lexico-dictionary/1",
    "lexico-dictionary/2",
    "lexico-dictionary/3",
    "lexico-dictionary/4",
];
pub(super) const CURE: &str = "`lexico train` makes such a file";

/// The model that a dictionary set was learned for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// The model's name, for people.
    pub name: String,
    /// Its architecture, as its config names it.
    pub architecture: String,
    /// Decoder layers.
    pub layers: usize,
    /// KV heads a layer.
    pub kv_heads: usize,
    /// `m`.
    pub head_dim: usize,
    /// Rotary embedding of its keys, which are coded after it.
    pub rotary: RotaryIdentity,
}

impl ModelIdentity {
    /// Checks that what was learned for this model serves another. The name is for people and may differ.
    ///
    /// # Errors
    /// [`Error::OtherModel`], saying which property differs.
    pub fn check_fits(&self, model: &ModelIdentity) -> Result<()> {
        let properties = |model: &ModelIdentity| {
            let RotaryIdentity {
                kind,
                theta,
                parameters,
            } = &model.rotary;
            [
                ("architecture", model.architecture.clone()),
                ("layers", model.layers.to_string()),
                ("KV heads", model.kv_heads.to_string()),
                ("head dim", model.head_dim.to_string()),
                (
                    "rotary embedding",
                    format!("{kind} with theta {theta} {parameters:?}"),
                ),
            ]
        };
        let mut pairs = properties(self).into_iter().zip(properties(model));
        let Some(((what, own), (_, other))) = pairs.find(|(own, other)| own != other) else {
            return Ok(());
        };
        Err(Error::OtherModel(format!(
            "it was learned for {} ({what} {own}), the model {} has {what} {other}",
            self.name, model.name
        )))
    }
}

/// The settings of a model's rotary embedding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RotaryIdentity {
    /// Kind of scaling, `default` for none.
    pub kind: String,
    /// Base of the frequencies.
    pub theta: f64,
    /// Parameters of the scaling, by name.
    #[serde(default)]
    pub parameters: BTreeMap<String, f64>,
}

/// Record of how a dictionary set was learned.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Training {
    /// Nonzeros a vector during learning.
    pub sparsity: usize,
    /// Names of the texts.
    pub corpus: Vec<String>,
    /// Tokens that the model read.
    pub tokens: usize,
    /// Held-out mean relative error of each layer.
    pub relative_error: Vec<LayerErrors>,
    /// The program and version that learned it.
    pub tool: String,
    /// How much was spent on learning, by its name: `quick`, `normal` or `thorough`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effort: Option<String>,
    /// Vectors that each dictionary learned from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vectors: Option<usize>,
    /// Seed of every random choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// CRC-32 of all tokens that the model read, in order, 4 bytes each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_crc32: Option<String>,
    /// Fingerprint of the model's weights, which tells it from others of its shape.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_fingerprint: Option<String>,
    /// Losses of coding one head alone by sparse codes, where they were measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub losses: Option<CodingLosses>,
    /// Held-out mean relative error of each layer with additive codes of [`additive_sparsity`] atoms, where there are
    /// codebooks.
    #[serde(
        rename = "grouped_relative_error",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub additive_relative_error: Option<Vec<LayerErrors>>,
    /// Losses of coding one head alone by additive codes, where they were measured.
    #[serde(
        rename = "grouped_losses",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub additive_losses: Option<CodingLosses>,
}

/// The usual sparsity of additive codes beside dictionaries learned at sparsity `trained`: so many atoms come about as
/// near as sparse codes of that sparsity. At least 1, at most `codebooks` where there are any.
#[must_use]
pub fn additive_sparsity(trained: usize, codebooks: usize) -> usize {
    (trained.saturating_mul(3) / 2).clamp(1, codebooks.max(1))
}

/// The held-out mean relative error of one layer at the training sparsity, f32 coefficients.
pub type LayerErrors = KeyValue<f32>;

/// What one layer's keys, after rotary embedding, and values are coded with, shared by all its KV heads and by all
/// sequences: dictionaries, codebooks or both.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerDictionaries {
    /// Dictionaries for sparse codes, where they were learned.
    pub sparse: Option<KeyValue<Arc<Dictionary>>>,
    /// Codebooks for additive codes, where they were learned.
    pub codebooks: Option<KeyValue<Arc<Codebooks>>>,
    /// The maps behind which additive codes are found; none in files of earlier versions.
    pub maps: Option<KeyValue<Arc<HeadMaps>>>,
}

impl LayerDictionaries {
    /// Returns whether keys are coded without their means before the rotary embedding.
    fn has_rotary_means(&self) -> bool {
        let maps = self.maps.as_ref();
        maps.is_some_and(|maps| maps.keys.rotary_means().is_some())
    }

    /// Heads whose keys, and whose values, are coded together, of all layers that are; 1 where each is coded alone.
    pub fn joint_heads(&self) -> usize {
        let basis = self.maps.as_ref().and_then(|maps| maps.keys.basis());
        basis.map_or(1, JointBasis::together)
    }

    /// `m`, the length of a vector; 0 where there are neither dictionaries nor codebooks.
    pub fn head_dim(&self) -> usize {
        let sparse = self.sparse.as_ref().map(|both| both.keys.head_dim());
        let codebooks = || self.codebooks.as_ref().map(|both| both.keys.head_dim());
        sparse.or_else(codebooks).unwrap_or(0)
    }

    /// The largest sparsity of codes of a family over both dictionaries, or both codebooks; 0 where there are none.
    pub fn max_sparsity(&self, family: CodeFamily) -> usize {
        match family {
            CodeFamily::Sparse => {
                let max = |dictionary: &Dictionary| dictionary.head_dim().min(dictionary.len());
                let sparse = self.sparse.as_ref();
                sparse.map_or(0, |both| max(&both.keys).min(max(&both.values)))
            }
            CodeFamily::Additive => {
                let codebooks = self.codebooks.as_ref();
                codebooks.map_or(0, |both| both.keys.len().min(both.values.len()))
            }
        }
    }
}

/// The dictionaries of every layer of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct DictionarySet {
    /// Layer by layer; of layers that are coded together one for all, see [`DictionarySet::joint`].
    pub layers: Vec<LayerDictionaries>,
    /// The model they serve.
    pub model: ModelIdentity,
    /// Record of how they were learned.
    pub training: Training,
}

impl DictionarySet {
    /// Opens a `.safetensors` dictionary file and checks all of it.
    ///
    /// # Errors
    /// Those of [`TensorFile`]; [`Error::Format`], [`Error::Metadata`], and [`Error::Tensor`] for
    /// a tensor that is not finite, whose rows are not of unit length, or not of the head dim that the metadata gives,
    /// and for maps of other heads, that cannot be inverted, or without codebooks.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::read(&TensorFile::open(path)?)
    }

    /// Reads an open dictionary file; see [`DictionarySet::load`].
    ///
    /// # Errors
    /// Those of [`DictionarySet::load`].
    pub fn read(file: &TensorFile) -> Result<Self> {
        file.check_format(&FORMATS, CURE)?;
        let model: ModelIdentity = file.entry("model", |text| serde_json::from_str(text))?;
        let training: Training = file.entry("training", |text| serde_json::from_str(text))?;
        // A hostile layer count must not drive the loop: every layer needs tensors in the file.
        let names = file.names();
        let has = |ending: &str| names.iter().any(|name| name.ends_with(ending));
        let (has_codebooks, has_maps) = (has(FIRST), has(MEANS));
        let (has_rotary, has_basis) = (has(FREQUENCIES), has(BASIS));
        // Files of earlier versions always have them.
        let has_sparse = has(".keys") || !has_codebooks;
        let each = 2 * usize::from(has_sparse)
            + 4 * usize::from(has_codebooks)
            + 4 * usize::from(has_maps)
            + 2 * usize::from(has_rotary)
            + 2 * usize::from(has_basis);
        let joint = match file.metadata().contains_key(JOINT_LAYERS) {
            true => file.entry(JOINT_LAYERS, str::parse)?,
            false => 1,
        };
        if joint == 0 || !model.layers.is_multiple_of(joint) || (joint > 1 && !has_basis) {
            let reason = format!(
                "{joint} layers together are impossible for {} layers",
                model.layers
            );
            return Err(file.bad_entry(JOINT_LAYERS, reason));
        }
        let (count, heads) = (model.layers / joint, model.kv_heads.saturating_mul(joint));
        let tensors = count.saturating_mul(each);
        if count == 0 || tensors != names.len() {
            let reason = format!(
                "it promises {count} layers, so {tensors} tensors, but the file holds {}",
                names.len()
            );
            return Err(file.bad_entry("model", reason));
        }
        if let (false, Some(name)) = (
            has_codebooks,
            names.iter().find(|name| name.ends_with(MEANS)),
        ) {
            let reason = "codes behind maps are over codebooks, and the file has none";
            return Err(Error::tensor(file.path(), name, reason.to_owned()));
        }
        let mut losses = training.losses.iter().chain(&training.additive_losses);
        if let Some(reason) = losses.find_map(|l| l.refuse(count, heads)) {
            return Err(file.bad_entry("training", reason));
        }
        let read = |name: &String| {
            let dictionary = Dictionary::read(file, name)?;
            if dictionary.head_dim() != model.head_dim {
                let reason = format!(
                    "its atoms have length {}, but the metadata gives head dim {}",
                    dictionary.head_dim(),
                    model.head_dim
                );
                return Err(Error::tensor(file.path(), name, reason));
            }
            Ok(Arc::new(dictionary))
        };
        let layers = (0..count).map(|l| {
            let names = KeyValue::NAMES.map(|part| format!("layers.{l}.{part}"));
            let codebooks =
                |name: &String| Codebooks::read(file, name, model.head_dim).map(Arc::new);
            let m = model.head_dim;
            let maps = |name: &String| HeadMaps::read(file, name, heads, m).map(Arc::new);
            let sparse = has_sparse.then(|| names.as_ref().try_map(read));
            let codebooks = has_codebooks.then(|| names.as_ref().try_map(codebooks));
            let maps = has_maps.then(|| names.as_ref().try_map(maps)).transpose()?;
            let together = |maps: &HeadMaps| maps.basis().map_or(1, JointBasis::together);
            if let Some(KeyValue { keys, values }) = &maps
                && (together(keys) != together(values) || !together(keys).is_multiple_of(joint))
            {
                let reason = format!(
                    "of keys {} heads are coded together, of values {}, of {joint} layers",
                    together(keys),
                    together(values)
                );
                let name = format!("layers.{l}.values{BASIS}");
                return Err(Error::tensor(file.path(), &name, reason));
            }
            Ok(LayerDictionaries {
                sparse: sparse.transpose()?,
                codebooks: codebooks.transpose()?,
                maps,
            })
        });
        let layers = layers.collect::<Result<_>>()?;
        Ok(Self {
            layers,
            model,
            training,
        })
    }

    /// Checks that every layer has the same parts, all of them of the model's shape; a file of others cannot
    /// be read again.
    ///
    /// # Errors
    /// [`Error::Layers`], saying which layer differs in what.
    pub fn check_alike(&self) -> Result<()> {
        let ModelIdentity {
            layers,
            kv_heads,
            head_dim,
            ..
        } = self.model;
        let joint = self.joint();
        if joint.layers * self.layers.len() != layers {
            let reason = format!("{} layers for a model of {layers}", self.layers.len());
            return Err(Error::Layers(reason));
        }
        let parts = |layer: &LayerDictionaries| {
            let (sparse, maps) = (layer.sparse.is_some(), layer.maps.is_some());
            (sparse, layer.codebooks.is_some(), maps, layer.joint_heads())
        };
        let first = self.layers.first().map(parts);
        for (number, layer) in self.layers.iter().enumerate() {
            let wrong = |what: String| Err(Error::Layers(format!("layer {number}: {what}")));
            match parts(layer) {
                own if Some(own) != first => {
                    return wrong("it has other parts than the first layer".to_owned());
                }
                (false, false, ..) => {
                    return wrong("it has neither dictionaries nor codebooks".to_owned());
                }
                (_, false, true, _) => {
                    let reason = "codes behind maps are over codebooks, and it has none";
                    return wrong(reason.to_owned());
                }
                _ => (),
            }
            let sparse = layer.sparse.iter().flat_map(KeyValue::as_ref);
            let codebooks = layer.codebooks.iter().flat_map(KeyValue::as_ref);
            let maps = layer.maps.iter().flat_map(KeyValue::as_ref);
            let mut dims = (sparse.map(|own| own.head_dim()))
                .chain(codebooks.map(|own| own.head_dim()))
                .chain(maps.clone().map(|own| own.head_dim()));
            if let Some(other) = dims.find(|&own| own != head_dim) {
                let reason =
                    format!("vectors of length {other}, and the model's head dim is {head_dim}");
                return wrong(reason);
            }
            let mut heads = maps.map(|own| own.heads());
            let kv_heads = joint.layers * kv_heads;
            if let Some(other) = heads.find(|&own| own != kv_heads) {
                let reason = format!("maps of {other} KV heads, and the model has {kv_heads}");
                return wrong(reason);
            }
        }
        Ok(())
    }

    /// Writes the set, atoms in f16; the file is whole or absent.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut tensors = Vec::with_capacity(2 * self.layers.len());
        for (l, layer) in self.layers.iter().enumerate() {
            let names = KeyValue::NAMES.map(|part| format!("layers.{l}.{part}"));
            if let Some(sparse) = &layer.sparse {
                for (name, dictionary) in names.as_ref().zip(sparse.as_ref()) {
                    let shape = [dictionary.len(), dictionary.head_dim()];
                    tensors.push(halves(name, &shape, &dictionary.atoms()));
                }
            }
            if let Some(codebooks) = &layer.codebooks {
                let codebooks = names.as_ref().zip(codebooks.as_ref()).into_iter();
                tensors.extend(codebooks.flat_map(|(name, own)| own.tensors(name)));
            }
            if let Some(maps) = &layer.maps {
                let maps = names.as_ref().zip(maps.as_ref()).into_iter();
                tensors.extend(maps.flat_map(|(name, own)| own.tensors(name)));
            }
        }
        let path = path.as_ref();
        let json = |key, json: serde_json::Result<String>| {
            json.map_err(|e| Error::Metadata {
                path: path.to_owned(),
                key,
                reason: e.to_string(),
            })
        };
        let first = self.layers.first();
        let sparse = first.and_then(|layer| layer.sparse.as_ref());
        // Earlier versions read what they can use.
        let format = match first {
            Some(layer) if layer.joint_heads() > 1 => FORMATS[3],
            Some(layer) if layer.has_rotary_means() => FORMATS[2],
            Some(layer) if layer.maps.is_some() || sparse.is_none() => FORMATS[1],
            _ => FORMATS[0],
        };
        let atoms = sparse.map_or(0, |both| both.keys.len());
        let joint = self.joint().layers;
        let joint = (joint > 1).then(|| (JOINT_LAYERS, joint.to_string()));
        let metadata = [
            ("format", format.to_owned()),
            ("model", json("model", serde_json::to_string(&self.model))?),
            (
                "training",
                json("training", serde_json::to_string(&self.training))?,
            ),
            ("atoms", atoms.to_string()),
        ];
        let metadata = metadata.into_iter().chain(joint);
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
        tensor_file::write(path, &tensors, metadata.collect())
    }

    /// Which layers and heads are coded together.
    pub fn joint(&self) -> JointLayers {
        let first = self.layers.first();
        let together = first.map_or(1, LayerDictionaries::joint_heads);
        let (all, count) = (self.model.layers, self.layers.len());
        let layers = all.checked_div(count).filter(|&layers| {
            layers > 0 && layers * count == all && together.is_multiple_of(layers)
        });
        // Where they are not those of the model, nothing is coded together; see `check_alike`.
        let layers = layers.unwrap_or(1);
        JointLayers {
            layers,
            heads: together / layers,
            kv_heads: self.model.kv_heads,
        }
    }

    /// Checks that the set serves a model of this identity. The name is for people and may differ.
    ///
    /// # Errors
    /// [`Error::OtherModel`], saying which property differs.
    pub fn check_fits(&self, model: &ModelIdentity) -> Result<()> {
        self.model.check_fits(model)
    }

    /// The largest sparsity of codes of a family in every layer; 0 where there is nothing that they could be over.
    pub fn max_sparsity(&self, family: CodeFamily) -> usize {
        let layers = self.layers.iter();
        layers.map(|l| l.max_sparsity(family)).min().unwrap_or(0)
    }

    /// The losses of coding each head by codes of a family, where they were measured.
    pub fn losses(&self, family: CodeFamily) -> Option<&CodingLosses> {
        match family {
            CodeFamily::Sparse => self.training.losses.as_ref(),
            CodeFamily::Additive => self.training.additive_losses.as_ref(),
        }
    }

    /// The family of codes that serves best: additive codes where there are codebooks, else sparse ones.
    pub fn usual_family(&self) -> CodeFamily {
        match self.max_sparsity(CodeFamily::Additive) {
            0 => CodeFamily::Sparse,
            _ => CodeFamily::Additive,
        }
    }

    /// The usual sparsity of codes of a family: that of learning, and [`additive_sparsity`] beside it.
    pub fn usual_sparsity(&self, family: CodeFamily) -> usize {
        let trained = self.training.sparsity;
        match family {
            CodeFamily::Sparse => trained,
            CodeFamily::Additive => additive_sparsity(trained, self.max_sparsity(family)),
        }
    }

    /// Sparsities of all heads' keys and values whose mean is at most `mean`, by what coding each of them costs;
    /// `None` where that was not measured, or there is nothing that such codes could be over.
    pub fn allocate(&self, family: CodeFamily, mean: f64) -> Option<Vec<LayerSparsities>> {
        let losses = self.losses(family)?;
        let possible = self.max_sparsity(family);
        let max = match family {
            CodeFamily::Sparse => possible.min(MAX_ALLOCATED.max(mean.ceil() as usize)),
            CodeFamily::Additive => possible,
        };
        (max > 0).then(|| losses.allocate(mean, max))
    }

    /// The loss of codes of a family whose sparsities [`allocate`](Self::allocate) gave: the summed losses of all heads,
    /// in nats; `None` where they were not measured.
    pub fn summed_loss(&self, family: CodeFamily, sparsities: &[LayerSparsities]) -> Option<f64> {
        Some(self.losses(family)?.summed(sparsities))
    }

    /// Bytes held by all dictionaries.
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter();
        let bytes = layers.map(|layer| {
            let sparse = layer.sparse.iter().flat_map(KeyValue::as_ref);
            let codebooks = layer.codebooks.iter().flat_map(KeyValue::as_ref);
            let maps = layer.maps.iter().flat_map(KeyValue::as_ref);
            sparse.map(|own| own.bytes()).sum::<usize>()
                + codebooks.map(|own| own.bytes()).sum::<usize>()
                + maps.map(|own| own.bytes()).sum::<usize>()
        });
        bytes.sum()
    }
}

/// Ends of the names of the tensors of maps, and of what keys are without before their rotary embedding.
const MEANS: &str = ".means";
const MATRICES: &str = ".matrices";
const ROTARY_MEANS: &str = ".rotary-means";
const FREQUENCIES: &str = ".frequencies";
const BASIS: &str = ".basis";
/// Entry of the metadata: layers that are coded together.
const JOINT_LAYERS: &str = "joint_layers";

impl HeadMaps {
    /// Returns whether a dictionary file has maps for keys or values, `name` as in `layers.0.keys`.
    pub fn are_in(file: &TensorFile, name: &str) -> bool {
        file.info(&format!("{name}{MEANS}")).is_ok()
    }

    /// Reads the maps of one dictionary file's keys or values, `name` as in `layers.0.keys`, where it has some. Of the
    /// metadata only `format` is needed.
    ///
    /// # Errors
    /// Those of [`TensorFile`], [`Error::Format`], and [`Error::Tensor`] where the tensors are no maps.
    pub fn load(path: impl AsRef<Path>, name: &str) -> Result<Option<Self>> {
        let file = TensorFile::open(path)?;
        file.check_format(&FORMATS, CURE)?;
        if !Self::are_in(&file, name) {
            return Ok(None);
        }
        let (_, shape) = file.info(&format!("{name}{MEANS}"))?;
        let part = |place: usize| shape.get(place).copied().unwrap_or(0);
        Self::read(&file, name, part(0), part(1)).map(Some)
    }

    /// Reads two tensors, the means `[heads, m]` and the matrices `[heads, m, m]`; and where there are some, the means before
    /// the rotary embedding `[heads, m]` and the angles a position `[pairs]`, and the basis of heads that are coded together
    /// `[groups, h·m, h·m]`.
    fn read(file: &TensorFile, name: &str, heads: usize, m: usize) -> Result<Self> {
        let maps = Self::read_without_basis(file, name, heads, m)?;
        let basis_name = format!("{name}{BASIS}");
        let Ok((_, shape)) = file.info(&basis_name) else {
            return Ok(maps);
        };
        let together = shape.get(1).map_or(0, |length| length / m);
        let wanted = [
            heads.checked_div(together).unwrap_or(0),
            together * m,
            together * m,
        ];
        if together < 2 || shape != wanted {
            let reason = format!(
                "shape {shape:?}, but [groups, h·{m}, h·{m}] for {heads} heads, h together, is needed"
            );
            return Err(Error::tensor(file.path(), &basis_name, reason));
        }
        let (numbers, _) = file.f32_tensor(&basis_name, 3)?;
        let basis = JointBasis::new(&numbers, heads, together, m);
        let maps = basis.and_then(|basis| maps.with_basis(basis));
        maps.map_err(|e| Error::tensor(file.path(), &basis_name, e.to_string()))
    }

    fn read_without_basis(file: &TensorFile, name: &str, heads: usize, m: usize) -> Result<Self> {
        let (means, means_shape) = file.f32_tensor(&format!("{name}{MEANS}"), 2)?;
        let matrices_name = format!("{name}{MATRICES}");
        let (matrices, shape) = file.f32_tensor(&matrices_name, 3)?;
        if means_shape != [heads, m] || shape != [heads, m, m] {
            let reason = format!(
                "shapes {means_shape:?} and {shape:?}, but [{heads}, {m}] and [{heads}, {m}, {m}] are needed"
            );
            return Err(Error::tensor(file.path(), &matrices_name, reason));
        }
        let maps = Self::new(&means, &matrices, m)
            .map_err(|e| Error::tensor(file.path(), &matrices_name, e.to_string()))?;
        let rotary_name = format!("{name}{ROTARY_MEANS}");
        if file.info(&rotary_name).is_err() {
            return Ok(maps);
        }
        let refused = |reason| Error::tensor(file.path(), &rotary_name, reason);
        if !name.ends_with(".keys") {
            let reason = "the rotary embedding turns keys alone";
            return Err(refused(reason.to_owned()));
        }
        let (frequencies, _) = file.f32_tensor(&format!("{name}{FREQUENCIES}"), 1)?;
        let (means, shape) = file.f32_tensor(&rotary_name, 2)?;
        if shape != [heads, m] {
            return Err(refused(format!(
                "shape {shape:?}, but [{heads}, {m}] is needed"
            )));
        }
        let means = RotaryMeans::new(&frequencies, &means, m);
        let maps = means.and_then(|means| maps.with_rotary_means(means));
        maps.map_err(|e| refused(e.to_string()))
    }

    fn tensors(&self, name: &str) -> Vec<NewTensor> {
        let (heads, m) = (self.heads(), self.head_dim());
        let (means, matrices) = self.numbers();
        let mut tensors = vec![
            NewTensor::f32(&format!("{name}{MEANS}"), &[heads, m], &means),
            NewTensor::f32(&format!("{name}{MATRICES}"), &[heads, m, m], &matrices),
        ];
        if let Some(rotary) = self.rotary_means() {
            let frequencies = rotary.frequencies();
            let angles = format!("{name}{FREQUENCIES}");
            let means = format!("{name}{ROTARY_MEANS}");
            tensors.push(NewTensor::f32(&angles, &[frequencies.len()], frequencies));
            tensors.push(NewTensor::f32(&means, &[heads, m], rotary.means()));
        }
        if let Some(basis) = self.basis() {
            let length = basis.together() * m;
            let shape = [heads / basis.together(), length, length];
            tensors.push(NewTensor::f32(
                &format!("{name}{BASIS}"),
                &shape,
                &basis.numbers(),
            ));
        }
        tensors
    }
}

/// Ends of the names of the tensors of codebooks: atoms of the first codebook, and of the others.
const FIRST: &str = ".first";
const OTHERS: &str = ".others";

impl Codebooks {
    /// Returns whether a dictionary file has codebooks for keys or values, `name` as in `layers.0.keys`.
    pub fn are_in(file: &TensorFile, name: &str) -> bool {
        file.info(&format!("{name}{FIRST}")).is_ok()
    }

    /// Reads the codebooks of one dictionary file's keys or values, `name` as in `layers.0.keys`. Of the metadata
    /// only `format` is needed.
    ///
    /// # Errors
    /// Those of [`TensorFile`], [`Error::Format`], and [`Error::Tensor`] where the tensors are no codebooks.
    pub fn load(path: impl AsRef<Path>, name: &str) -> Result<Self> {
        let file = TensorFile::open(path)?;
        file.check_format(&FORMATS, CURE)?;
        let (_, shape) = file.info(&format!("{name}{FIRST}"))?;
        let head_dim = shape.get(1).copied().unwrap_or(0);
        Self::read(&file, name, head_dim)
    }

    /// Reads two tensors, `[N, m]` atoms of the first codebook and `[codebooks - 1, 256, m]` of the others.
    fn read(file: &TensorFile, name: &str, head_dim: usize) -> Result<Self> {
        let (mut atoms, first) = file.f32_tensor(&format!("{name}{FIRST}"), 2)?;
        let others_name = format!("{name}{OTHERS}");
        let (others, shape) = file.f32_tensor(&others_name, 3)?;
        if first[1] != head_dim || shape[1..] != [CODEBOOK_ATOMS, head_dim] {
            let reason = format!(
                "shapes {first:?} and {shape:?}, but [N, {head_dim}] and [codebooks, {CODEBOOK_ATOMS}, {head_dim}] are needed"
            );
            return Err(Error::tensor(file.path(), &others_name, reason));
        }
        atoms.extend(others);
        let sizes = CodebookSizes { first: first[0] };
        Self::new(atoms, head_dim, sizes)
            .map_err(|e| Error::tensor(file.path(), &others_name, e.to_string()))
    }

    fn tensors(&self, name: &str) -> [NewTensor; 2] {
        let m = self.head_dim();
        let first = self.sizes().first;
        let atoms = self.atoms();
        let (own, others) = atoms.split_at(first * m);
        [
            halves(&format!("{name}{FIRST}"), &[first, m], own),
            halves(
                &format!("{name}{OTHERS}"),
                &[self.len() - 1, CODEBOOK_ATOMS, m],
                others,
            ),
        ]
    }
}

/// Numbers in half precision.
fn halves(name: &str, shape: &[usize], numbers: &[f32]) -> NewTensor {
    let bytes = numbers.iter();
    let bytes = bytes.flat_map(|&x| f16::from_f32(x).to_le_bytes());
    NewTensor::new(name, Dtype::F16, shape, bytes.collect())
}
