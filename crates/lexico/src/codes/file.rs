use std::path::Path;

use super::Leading;
use super::additive::AdditivePage;
use super::coefficients::Coefficients;
use super::{CodeFormat, Codes, CoefficientFormat, Page, SparsePage};
use crate::dictionary::{CodebookSizes, Dictionary};
use crate::tensor_file::{self, Dtype, NewTensor, TensorFile};
use crate::{Error, Result};

/// The `format` entry of a code file's metadata.
pub const FORMAT: &str = "lexico-codes/1";
/// Metadata of codes of one atom a group: atoms of the first.
const FIRST_GROUP: &str = "first_group";
const CURE: &str = "`lexico encode` makes such a file";

/// Codes in a file, and the dictionary they need.
///
/// Tensors: `indices` U16 `[n, s]`; `coefficients` `[n, s]`, F32, I8 or F8_E4M3; but with F32 `scales`
/// F8_E8M0 `[n]`, a coefficient being its number times its vector's scale; and where they
/// vary `lengths` U8 `[n]`, the rest of a row being zero. Codes of one atom a group instead: `first` U16 `[n]`
/// and `rest` U8 `[n, s − 1]`, numbers of atoms in their groups, with the scale in the highest five bits of `first`; `first_group` in the metadata says how many
/// atoms the first group has.
#[derive(Debug, Clone)]
pub struct CodeFile {
    /// The codes.
    pub codes: Codes,
    /// Name of the dictionary's tensor.
    pub tensor: String,
    /// [`Dictionary::checksum`] of the dictionary.
    pub checksum: u32,
    /// `m`.
    pub head_dim: usize,
}

impl CodeFile {
    /// Names the dictionary `tensor` as the one that `codes` were made with.
    pub fn new(codes: Codes, tensor: &str, dictionary: &Dictionary) -> Self {
        Self {
            codes,
            tensor: tensor.to_owned(),
            checksum: dictionary.checksum(),
            head_dim: dictionary.head_dim(),
        }
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut metadata = vec![
            ("format", FORMAT.to_owned()),
            ("tensor", self.tensor.clone()),
            ("dictionary_crc32", format!("{:08x}", self.checksum)),
            ("head_dim", self.head_dim.to_string()),
        ];
        let tensors = match self.codes.format.coefficients {
            CoefficientFormat::InAtoms(groups) => {
                metadata.push((FIRST_GROUP, groups.first.to_string()));
                self.additive_tensors()
            }
            _ => self.sparse_tensors(),
        };
        let metadata = metadata.into_iter();
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
        tensor_file::write(path, &tensors, metadata.collect())
    }

    fn additive_tensors(&self) -> Vec<NewTensor> {
        let (n, s) = (self.codes.len(), self.codes.format.sparsity);
        let (mut first, mut rest) = (Vec::new(), Vec::new());
        for page in &self.codes.pages {
            if let Page::Additive(page) = page {
                first.extend(page.first.iter().flat_map(|i| i.0.to_le_bytes()));
                rest.extend_from_slice(&page.rest);
            }
        }
        vec![
            NewTensor::new("first", Dtype::U16, &[n], first),
            NewTensor::new("rest", Dtype::U8, &[n, s - 1], rest),
        ]
    }

    fn sparse_tensors(&self) -> Vec<NewTensor> {
        let codes = &self.codes;
        let (n, s) = (codes.len(), codes.format.sparsity);
        let (mut indices, mut coefficients) = (Vec::new(), Vec::new());
        let (mut scales, mut lengths) = (Vec::new(), Vec::new());
        let (dtype, width) = match codes.format.coefficients {
            CoefficientFormat::I8 => (Dtype::I8, 1),
            CoefficientFormat::F8 => (Dtype::F8_E4M3, 1),
            CoefficientFormat::F32 | CoefficientFormat::InAtoms(_) => (Dtype::F32, 4),
        };
        for page in &codes.pages {
            let Page::Sparse(page) = page else {
                continue;
            };
            let each: Vec<usize> = (0..page.len)
                .map(|v| page.length(codes.format, v))
                .collect();
            let own = page.indices.iter().flat_map(|i| i.to_le_bytes());
            indices.extend(padded_rows(&own.collect::<Vec<_>>(), 2, &each, s));
            match &page.coefficients {
                Coefficients::I8 {
                    values,
                    scales: own,
                } => {
                    let values: Vec<u8> = values.iter().map(|&c| c as u8).collect();
                    coefficients.extend(padded_rows(&values, width, &each, s));
                    scales.extend_from_slice(own);
                }
                Coefficients::F8 {
                    values,
                    scales: own,
                } => {
                    coefficients.extend(padded_rows(values, width, &each, s));
                    scales.extend_from_slice(own);
                }
                Coefficients::F32(values) => {
                    let own = values.iter().flat_map(|c| c.to_le_bytes());
                    coefficients.extend(padded_rows(&own.collect::<Vec<_>>(), width, &each, s));
                }
            }
            lengths.extend_from_slice(&page.lengths);
        }
        let mut tensors = vec![
            NewTensor::new("indices", Dtype::U16, &[n, s], indices),
            NewTensor::new("coefficients", dtype, &[n, s], coefficients),
        ];
        if codes.format.coefficients != CoefficientFormat::F32 {
            tensors.push(NewTensor::new("scales", Dtype::F8_E8M0, &[n], scales));
        }
        if codes.format.variable {
            tensors.push(NewTensor::new("lengths", Dtype::U8, &[n], lengths));
        }
        tensors
    }

    /// Reads a code file and checks all of it but the indices against the dictionary, which
    /// [`Codes::decode`] does.
    ///
    /// # Errors
    /// Those of [`TensorFile`], [`Error::Format`], [`Error::Metadata`], [`Error::Tensor`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let file = TensorFile::open(path)?;
        file.check_format(FORMAT, CURE)?;
        let metadata = file.metadata();
        let entry = |key: &'static str| {
            metadata.get(key).ok_or_else(|| Error::Metadata {
                path: file.path().to_owned(),
                key,
                reason: "it is missing".to_owned(),
            })
        };
        let bad_entry = |key: &'static str, reason: String| Error::Metadata {
            path: file.path().to_owned(),
            key,
            reason,
        };
        let checksum = u32::from_str_radix(entry("dictionary_crc32")?, 16)
            .map_err(|e| bad_entry("dictionary_crc32", e.to_string()))?;
        let head_dim: usize = entry("head_dim")?
            .parse()
            .map_err(|e: std::num::ParseIntError| bad_entry("head_dim", e.to_string()))?;

        if !(1..=1 << 30).contains(&head_dim) {
            return Err(bad_entry("head_dim", format!("{head_dim} is impossible")));
        }
        if let Some(first) = metadata.get(FIRST_GROUP) {
            let first = first
                .parse()
                .map_err(|e: std::num::ParseIntError| bad_entry(FIRST_GROUP, e.to_string()))?;
            return Ok(Self {
                codes: read_additive(&file, CodebookSizes { first })?,
                tensor: entry("tensor")?.clone(),
                checksum,
                head_dim,
            });
        }
        let (_, shape) = file.info("indices")?;
        let &[n, s] = shape else {
            let reason = format!("its shape is {shape:?}, but [n, s] is needed");
            return Err(Error::tensor(file.path(), "indices", reason));
        };
        if s == 0 || s > usize::from(u16::MAX) {
            let reason = format!("a sparsity of {s} is impossible");
            return Err(Error::tensor(file.path(), "indices", reason));
        }
        let read = |name: &str, dtype: Dtype, wanted: &[usize]| {
            let (found, shape) = file.info(name)?;
            if found != dtype || shape != wanted {
                let reason =
                    format!("it is {found:?} {shape:?}, but {dtype:?} {wanted:?} is needed");
                return Err(Error::tensor(file.path(), name, reason));
            }
            file.bytes(name)
        };
        let variable = file.info("lengths").is_ok();
        let lengths = if variable {
            read("lengths", Dtype::U8, &[n])?
        } else {
            Vec::new()
        };
        if let Some(v) = lengths.iter().position(|&l| usize::from(l) > s) {
            let reason = format!("vector {v} has {} nonzeros in a row of {s}", lengths[v]);
            return Err(Error::tensor(file.path(), "lengths", reason));
        }
        let each: Vec<usize> = if variable {
            lengths.iter().map(|&l| usize::from(l)).collect()
        } else {
            vec![s; n]
        };
        let indices = used_rows(&read("indices", Dtype::U16, &[n, s])?, 2, &each, s);
        let indices: Vec<u16> = indices
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&b| u16::from_le_bytes(b))
            .collect();
        let scales = || read("scales", Dtype::F8_E8M0, &[n]);
        let dtype = file.info("coefficients")?.0;
        let coefficients = if dtype == Dtype::F32 {
            let bytes = used_rows(&read("coefficients", Dtype::F32, &[n, s])?, 4, &each, s);
            let bytes = bytes.as_chunks::<4>().0;
            Coefficients::F32(bytes.iter().map(|&b| f32::from_le_bytes(b)).collect())
        } else if dtype == Dtype::I8 {
            let values = used_rows(&read("coefficients", Dtype::I8, &[n, s])?, 1, &each, s);
            Coefficients::I8 {
                values: values.into_iter().map(|c| c as i8).collect(),
                scales: scales()?,
            }
        } else {
            Coefficients::F8 {
                values: used_rows(&read("coefficients", Dtype::F8_E4M3, &[n, s])?, 1, &each, s),
                scales: scales()?,
            }
        };
        if let Some((name, reason)) = coefficients.not_finite() {
            return Err(Error::tensor(file.path(), name, reason));
        }
        let format = CodeFormat {
            sparsity: s,
            variable,
            coefficients: match coefficients {
                Coefficients::I8 { .. } => CoefficientFormat::I8,
                Coefficients::F8 { .. } => CoefficientFormat::F8,
                Coefficients::F32(_) => CoefficientFormat::F32,
            },
        };
        let codes = Codes {
            format,
            len: n,
            largest_index: indices.iter().copied().max().unwrap_or(0),
            pages: vec![Page::Sparse(SparsePage {
                len: n,
                indices,
                coefficients,
                lengths,
            })],
        };
        Ok(Self {
            codes,
            tensor: entry("tensor")?.clone(),
            checksum,
            head_dim,
        })
    }

    /// Rebuilds the vectors, `[n, m]`.
    ///
    /// # Errors
    /// [`Error::OtherDictionary`] where `dictionary` is not the one that made the codes.
    pub fn decode(&self, dictionary: &Dictionary) -> Result<Vec<f32>> {
        if dictionary.checksum() != self.checksum || dictionary.head_dim() != self.head_dim {
            return Err(Error::OtherDictionary(self.tensor.clone()));
        }
        self.codes.decode(dictionary)
    }
}

/// The codes of a file whose codes have one atom a group.
fn read_additive(file: &TensorFile, groups: CodebookSizes) -> Result<Codes> {
    let (first_dtype, first_shape) = file.info("first")?;
    let (rest_dtype, rest_shape) = file.info("rest")?;
    let (&[n], &[rows, others]) = (first_shape, rest_shape) else {
        let reason =
            format!("shapes {first_shape:?} and {rest_shape:?}, but [n] and [n, s - 1] are needed");
        return Err(Error::tensor(file.path(), "rest", reason));
    };
    if rows != n || first_dtype != Dtype::U16 || rest_dtype != Dtype::U8 {
        let reason = format!(
            "it is {rest_dtype:?} {rest_shape:?} beside {first_dtype:?} {first_shape:?}, but U8 [n, s - 1] beside U16 [n] is needed"
        );
        return Err(Error::tensor(file.path(), "rest", reason));
    }
    let format = CodeFormat {
        sparsity: others.saturating_add(1),
        variable: false,
        coefficients: CoefficientFormat::InAtoms(groups),
    };
    let mut codes = Codes::new(format)?;
    let first = file.bytes("first")?;
    let first = first.as_chunks::<2>().0.iter();
    let first = first.map(|&bytes| Leading(u16::from_le_bytes(bytes)));
    let first: Vec<Leading> = first.collect();
    if let Some(v) = first.iter().position(|i| i.atom() >= groups.first) {
        let reason = format!(
            "vector {v} names atom {} of a group of {}",
            first[v].atom(),
            groups.first
        );
        return Err(Error::tensor(file.path(), "first", reason));
    }
    codes.push_page(Page::Additive(AdditivePage {
        first,
        rest: file.bytes("rest")?,
    }));
    Ok(codes)
}

/// Rows of `lengths[v]` elements of `width` bytes, each filled with zeros to `s` elements.
fn padded_rows(packed: &[u8], width: usize, lengths: &[usize], s: usize) -> Vec<u8> {
    let mut rows = Vec::with_capacity(lengths.len() * s * width);
    let mut rest = packed;
    for &length in lengths {
        let (row, after) = rest.split_at(length * width);
        rows.extend_from_slice(row);
        rows.extend(std::iter::repeat_n(0, (s - length) * width));
        rest = after;
    }
    rows
}

/// The first `lengths[v]` elements of each row of `s`, one after the other.
fn used_rows(rows: &[u8], width: usize, lengths: &[usize], s: usize) -> Vec<u8> {
    let rows = rows.chunks_exact(s * width).zip(lengths);
    rows.flat_map(|(row, &length)| &row[..length * width])
        .copied()
        .collect()
}
