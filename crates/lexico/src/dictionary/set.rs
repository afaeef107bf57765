use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use half::f16;
use serde::{Deserialize, Serialize};

use super::allocation::MAX_ALLOCATED;
use super::{CODEBOOK_ATOMS, CodebookSizes, Codebooks, CodingLosses, Dictionary, LayerSparsities};
use crate::tensor_file::{self, Dtype, NewTensor, TensorFile};
use crate::{Error, Result};

/// The `format` entry of a dictionary file's metadata.
pub const FORMAT: &str = "lexico-dictionary/1";
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
    /// How its keys are rotated: keys are coded after rotary embedding.
    pub rotary: RotaryIdentity,
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

/// How a dictionary set was learned.
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
    /// What coding one head alone costs, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub losses: Option<CodingLosses>,
    /// Held-out mean relative error of each layer with codes of [`additive_sparsity`] atoms, one a group, where there
    /// are groups.
    #[serde(
        rename = "grouped_relative_error",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub additive_relative_error: Option<Vec<LayerErrors>>,
    /// What coding one head alone costs with codes of one atom a group.
    #[serde(
        rename = "grouped_losses",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub additive_losses: Option<CodingLosses>,
}

/// The usual sparsity of codes of one atom a group, beside dictionaries trained at sparsity `trained`: about as near as
/// so many nonzeros of a pursuit that may choose any atom. At least 1, at most `groups` where there are any.
#[must_use]
pub fn additive_sparsity(trained: usize, groups: usize) -> usize {
    (trained.saturating_mul(3) / 2).clamp(1, groups.max(1))
}

/// Held-out mean relative error of one layer at the training sparsity, f32 coefficients.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerErrors {
    /// Of keys.
    pub keys: f32,
    /// Of values.
    pub values: f32,
}

/// One layer's two dictionaries, shared by all its KV heads.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerDictionaries {
    /// For keys after rotary embedding.
    pub keys: Dictionary,
    /// For values.
    pub values: Dictionary,
    /// The same for codes of one atom a group, where they were learned.
    pub codebooks: Option<LayerCodebooks>,
}

/// One layer's two dictionaries for codes of one atom a group, shared by all its KV heads.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerCodebooks {
    /// For keys after rotary embedding.
    pub keys: Codebooks,
    /// For values.
    pub values: Codebooks,
}

impl LayerCodebooks {
    /// The largest sparsity that both dictionaries allow.
    pub fn max_atoms(&self) -> usize {
        self.keys.len().min(self.values.len())
    }
}

impl LayerDictionaries {
    /// The largest sparsity that both dictionaries allow.
    pub fn max_nonzeros(&self) -> usize {
        let most = |dictionary: &Dictionary| dictionary.head_dim().min(dictionary.len());
        most(&self.keys).min(most(&self.values))
    }
}

/// The dictionaries of every layer of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct DictionarySet {
    /// Layer by layer.
    pub layers: Vec<LayerDictionaries>,
    /// The model they serve.
    pub model: ModelIdentity,
    /// How they were learned.
    pub training: Training,
}

impl DictionarySet {
    /// Opens a `.safetensors` dictionary file and checks all of it.
    ///
    /// # Errors
    /// Those of [`TensorFile`]; [`Error::Format`], [`Error::Metadata`], and [`Error::Tensor`] for
    /// a tensor that is not finite, not of unit rows, or not of the head dim the metadata gives.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::read(&TensorFile::open(path)?)
    }

    /// Reads an open dictionary file; see [`DictionarySet::load`].
    ///
    /// # Errors
    /// As [`DictionarySet::load`].
    pub fn read(file: &TensorFile) -> Result<Self> {
        file.check_format(FORMAT, CURE)?;
        let metadata = file.metadata();
        let model: ModelIdentity = json_entry(file, &metadata, "model")?;
        let training: Training = json_entry(file, &metadata, "training")?;
        // A hostile layer count must not drive the loop: every layer needs tensors in the file.
        let names = file.names();
        let has_codebooks = names.iter().any(|name| name.ends_with(FIRST));
        let each = if has_codebooks { 6 } else { 2 };
        let tensors = model.layers.saturating_mul(each);
        if model.layers == 0 || tensors != names.len() {
            let reason = format!(
                "it promises {} layers, so {tensors} tensors, but the file holds {}",
                model.layers,
                names.len()
            );
            return Err(Error::Metadata {
                path: file.path().to_owned(),
                key: "model",
                reason,
            });
        }
        let mut losses = training.losses.iter().chain(&training.additive_losses);
        if let Some(reason) = losses.find_map(|l| l.refuse(model.layers, model.kv_heads)) {
            return Err(Error::Metadata {
                path: file.path().to_owned(),
                key: "training",
                reason,
            });
        }
        let read = |name: String| {
            let dictionary = Dictionary::read(file, &name)?;
            if dictionary.head_dim() != model.head_dim {
                let reason = format!(
                    "its atoms have length {}, but the metadata gives head dim {}",
                    dictionary.head_dim(),
                    model.head_dim
                );
                return Err(Error::tensor(file.path(), &name, reason));
            }
            Ok(dictionary)
        };
        let layers = (0..model.layers)
            .map(|l| {
                let codebooks = |part| {
                    let name = format!("layers.{l}.{part}");
                    Codebooks::read(file, &name, model.head_dim)
                };
                let codebooks = || {
                    Ok(LayerCodebooks {
                        keys: codebooks("keys")?,
                        values: codebooks("values")?,
                    })
                };
                Ok(LayerDictionaries {
                    keys: read(format!("layers.{l}.keys"))?,
                    values: read(format!("layers.{l}.values"))?,
                    codebooks: has_codebooks.then(codebooks).transpose()?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            layers,
            model,
            training,
        })
    }

    /// Writes the set, atoms in f16; the file is whole or absent.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut tensors = Vec::with_capacity(2 * self.layers.len());
        for (l, layer) in self.layers.iter().enumerate() {
            for (part, dictionary) in [("keys", &layer.keys), ("values", &layer.values)] {
                let shape = [dictionary.len(), dictionary.head_dim()];
                let name = format!("layers.{l}.{part}");
                tensors.push(halves(&name, &shape, dictionary.atoms()));
            }
            if let Some(codebooks) = &layer.codebooks {
                tensors.extend(codebooks.keys.tensors(&format!("layers.{l}.keys")));
                tensors.extend(codebooks.values.tensors(&format!("layers.{l}.values")));
            }
        }
        let path = path.as_ref();
        let mut metadata = HashMap::from([("format".to_owned(), FORMAT.to_owned())]);
        let mut put = |key: &'static str, json: serde_json::Result<String>| {
            let json = json.map_err(|e| Error::Metadata {
                path: path.to_owned(),
                key,
                reason: e.to_string(),
            })?;
            metadata.insert(key.to_owned(), json);
            Ok(())
        };
        put("model", serde_json::to_string(&self.model))?;
        put("training", serde_json::to_string(&self.training))?;
        let atoms = self.layers.first().map_or(0, |layer| layer.keys.len());
        put("atoms", Ok(atoms.to_string()))?;
        tensor_file::write(path, &tensors, metadata)
    }

    /// Checks that the set serves a model of this identity. The name is for people and may differ.
    ///
    /// # Errors
    /// [`Error::OtherModel`], saying which property differs.
    pub fn check_fits(&self, model: &ModelIdentity) -> Result<()> {
        let own = &self.model;
        let differ = |what: &str, own: &dyn std::fmt::Display, other: &dyn std::fmt::Display| {
            Err(Error::OtherModel(format!(
                "it was learned for {} ({what} {own}), the model {} has {what} {other}",
                self.model.name, model.name
            )))
        };
        if own.architecture != model.architecture {
            return differ("architecture", &own.architecture, &model.architecture);
        }
        if own.layers != model.layers {
            return differ("layers", &own.layers, &model.layers);
        }
        if own.kv_heads != model.kv_heads {
            return differ("KV heads", &own.kv_heads, &model.kv_heads);
        }
        if own.head_dim != model.head_dim {
            return differ("head dim", &own.head_dim, &model.head_dim);
        }
        if own.rotary != model.rotary {
            let text = |r: &RotaryIdentity| {
                format!("{} with theta {} {:?}", r.kind, r.theta, r.parameters)
            };
            return differ("rotary embedding", &text(&own.rotary), &text(&model.rotary));
        }
        Ok(())
    }

    /// The largest sparsity that all dictionaries allow.
    pub fn max_nonzeros(&self) -> usize {
        let layers = self.layers.iter().map(LayerDictionaries::max_nonzeros);
        layers.min().unwrap_or(0)
    }

    /// Sparsities of all heads' keys and values whose mean is at most `mean`, by what coding each of them costs;
    /// `None` where that was not measured.
    pub fn allocate(&self, mean: f64) -> Option<Vec<LayerSparsities>> {
        let most = MAX_ALLOCATED.max(mean.ceil() as usize);
        let losses = self.training.losses.as_ref()?;
        Some(losses.allocate(mean, most.min(self.max_nonzeros())))
    }

    /// As [`DictionarySet::allocate`], for codes of one atom a group; `None` too where there are no groups.
    pub fn allocate_additive(&self, mean: f64) -> Option<Vec<LayerSparsities>> {
        let losses = self.training.additive_losses.as_ref()?;
        let most = self.max_codebooks();
        (most > 0).then(|| losses.allocate(mean, most))
    }

    /// The largest sparsity that all dictionaries allow for codes of one atom a group; 0 where there are none.
    pub fn max_codebooks(&self) -> usize {
        let layers = self.layers.iter().map(|layer| layer.codebooks.as_ref());
        let most = layers.map(|codebooks| codebooks.map_or(0, LayerCodebooks::max_atoms));
        most.min().unwrap_or(0)
    }

    /// Bytes held by all dictionaries.
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter();
        layers
            .map(|layer| {
                let codebooks = layer.codebooks.as_ref();
                let codebooks = codebooks.map_or(0, |g| g.keys.bytes() + g.values.bytes());
                layer.keys.bytes() + layer.values.bytes() + codebooks
            })
            .sum()
    }
}

/// Ends of the names of a codebooks dictionary's tensors: atoms of the first group, and of the others.
const FIRST: &str = ".first";
const OTHERS: &str = ".others";

impl Codebooks {
    /// Reads the atoms of one dictionary file's keys or values, `name` as in `layers.0.keys`. Of the metadata
    /// only `format` is needed.
    ///
    /// # Errors
    /// Those of [`TensorFile`], [`Error::Format`], and [`Error::Tensor`] where the tensors are no groups of atoms.
    pub fn load(path: impl AsRef<Path>, name: &str) -> Result<Self> {
        let file = TensorFile::open(path)?;
        file.check_format(FORMAT, CURE)?;
        let (_, shape) = file.info(&format!("{name}{FIRST}"))?;
        let head_dim = shape.get(1).copied().unwrap_or(0);
        Self::read(&file, name, head_dim)
    }

    /// Reads two tensors, `[N, m]` atoms of the first group and `[groups, 256, m]` of the others.
    fn read(file: &TensorFile, name: &str, head_dim: usize) -> Result<Self> {
        let (mut atoms, first) = file.f32_tensor(&format!("{name}{FIRST}"), 2)?;
        let others_name = format!("{name}{OTHERS}");
        let (others, shape) = file.f32_tensor(&others_name, 3)?;
        if first[1] != head_dim || shape[1..] != [CODEBOOK_ATOMS, head_dim] {
            let reason = format!(
                "shapes {first:?} and {shape:?}, but [N, {head_dim}] and [groups, {CODEBOOK_ATOMS}, {head_dim}] are needed"
            );
            return Err(Error::tensor(file.path(), &others_name, reason));
        }
        atoms.extend(others);
        let groups = CodebookSizes { first: first[0] };
        Self::new(atoms, head_dim, groups)
            .map_err(|e| Error::tensor(file.path(), &others_name, e.to_string()))
    }

    fn tensors(&self, name: &str) -> [NewTensor; 2] {
        let m = self.head_dim();
        let first = self.groups().first;
        let (own, others) = self.dictionary().atoms().split_at(first * m);
        [
            halves(&format!("{name}{FIRST}"), &[first, m], own),
            halves(
                &format!("{name}{OTHERS}"),
                &[self.len() - 1, CODEBOOK_ATOMS, m],
                others,
            ),
        ]
    }

    fn bytes(&self) -> usize {
        self.dictionary().bytes()
    }
}

/// Numbers in half precision.
fn halves(name: &str, shape: &[usize], numbers: &[f32]) -> NewTensor {
    let bytes = numbers.iter();
    let bytes = bytes.flat_map(|&x| f16::from_f32(x).to_le_bytes());
    NewTensor::new(name, Dtype::F16, shape, bytes.collect())
}

fn json_entry<T: for<'a> Deserialize<'a>>(
    file: &TensorFile,
    metadata: &HashMap<String, String>,
    key: &'static str,
) -> Result<T> {
    let error = |reason: String| Error::Metadata {
        path: file.path().to_owned(),
        key,
        reason,
    };
    let text = metadata
        .get(key)
        .ok_or_else(|| error("it is missing".to_owned()))?;
    serde_json::from_str(text).map_err(|e| error(e.to_string()))
}
