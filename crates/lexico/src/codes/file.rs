use std::path::Path;

use super::additive::{AdditiveFormat, AdditivePage};
use super::coefficients::{self, Coefficients};
use super::pages::Pages;
use super::sparse::{SparseFormat, SparsePage};
use super::{Codes, CoefficientFormat, FamilyPages};
use crate::dictionary::{Atoms, CodebookSizes, HeadMaps};
use crate::kernels::additive::Leading;
use crate::tensor_file::{self, Dtype, NewTensor, TensorFile, numbers};
use crate::{Error, Result};

/// The `format` entry of a code file's metadata.
pub const FORMAT: &str = "lexico-codes/1";
/// Metadata of additive codes: the atoms of the first codebook.
const FIRST_CODEBOOK: &str = "first_group";
/// Metadata of codes behind maps: the KV head that the vectors are of.
const HEAD: &str = "head";
const CURE: &str = "`lexico encode` makes such a file";

/// Codes in a file, and the dictionary they need.
///
/// Tensors: `indices` U16 `[n, s]`; `coefficients` `[n, s]`, F32, I8 or F8_E4M3; but with F32 `scales`
/// F8_E8M0 `[n]`, a coefficient being its number times its vector's scale; and where they
/// vary `lengths` U8 `[n]`, the rest of a row being zero. Additive codes instead: `first` U16 `[n]`
/// and `rest` U8 `[n, s − 1]`, numbers of atoms in their codebooks, with the scale in the highest five bits of `first`;
/// `first_group` in the metadata says how many atoms the first codebook has. Where they were found behind the map of a KV
/// head, `head` says of which; the vectors are then those of consecutive positions, from 0 on.
#[derive(Debug, Clone)]
pub struct CodeFile {
    /// The codes.
    pub codes: Codes,
    /// Name of the dictionary's tensor.
    pub tensor: String,
    /// [`Atoms::checksum`] of the dictionary or the codebooks; where there are maps, that of both
    /// ([`Coder::checksum`](crate::cache::Coder::checksum)).
    pub checksum: u32,
    /// The KV head behind whose map the codes were found, where there are maps.
    pub head: Option<usize>,
    /// `m`.
    pub head_dim: usize,
}

impl CodeFile {
    /// Names the dictionary `tensor` as the one that `codes` were made with.
    pub fn new<'a>(codes: Codes, tensor: &str, atoms: impl Into<Atoms<'a>>) -> Self {
        let atoms = atoms.into();
        Self {
            codes,
            tensor: tensor.to_owned(),
            checksum: atoms.checksum(),
            head: None,
            head_dim: atoms.head_dim(),
        }
    }

    /// Says that the codes were found behind the map of this KV head.
    #[must_use]
    pub fn behind(mut self, maps: &HeadMaps, head: usize) -> Self {
        self.checksum ^= maps.checksum();
        self.head = Some(head);
        self
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
        if let Some(head) = self.head {
            metadata.push((HEAD, head.to_string()));
        }
        let tensors = match &self.codes.0 {
            FamilyPages::Sparse(pages) => sparse_tensors(pages),
            FamilyPages::Additive(pages) => {
                metadata.push((FIRST_CODEBOOK, pages.format().sizes.first.to_string()));
                additive_tensors(pages)
            }
        };
        let metadata = metadata.into_iter();
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
        tensor_file::write(path, &tensors, metadata.collect())
    }

    /// Reads a code file and checks all of it but the indices against the dictionary, which
    /// [`Codes::decode`] does.
    ///
    /// # Errors
    /// Those of [`TensorFile`], [`Error::Format`], [`Error::Metadata`], [`Error::Tensor`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let file = TensorFile::open(path)?;
        file.check_format(&[FORMAT], CURE)?;
        let checksum = file.entry("dictionary_crc32", |text| u32::from_str_radix(text, 16))?;
        let head_dim: usize = file.entry("head_dim", str::parse)?;
        if !(1..=1 << 30).contains(&head_dim) {
            return Err(file.bad_entry("head_dim", format!("{head_dim} is impossible")));
        }
        let has_head = file.metadata().contains_key(HEAD);
        let head = has_head.then(|| file.entry(HEAD, str::parse)).transpose()?;
        let pages = if file.metadata().contains_key(FIRST_CODEBOOK) {
            let first = file.entry(FIRST_CODEBOOK, str::parse)?;
            FamilyPages::Additive(read_additive(&file, CodebookSizes { first })?)
        } else {
            FamilyPages::Sparse(read_sparse(&file)?)
        };
        Ok(Self {
            codes: Codes(pages),
            tensor: file.entry("tensor", str::parse)?,
            checksum,
            head,
            head_dim,
        })
    }

    /// Rebuilds the vectors, `[n, m]`, of codes that no maps are needed for.
    ///
    /// # Errors
    /// Those of [`CodeFile::decode_behind`].
    pub fn decode<'a>(&self, atoms: impl Into<Atoms<'a>>) -> Result<Vec<f32>> {
        self.decode_behind(atoms, None)
    }

    /// Rebuilds the vectors, `[n, m]`. `maps` are those of the dictionary file, if it has any; codes of a KV head need
    /// them, others leave them alone.
    ///
    /// # Errors
    /// [`Error::OtherDictionary`] where the atoms, or the maps, are not those that made the codes;
    /// [`Error::Dictionary`] where the maps have no such head.
    pub fn decode_behind<'a>(
        &self,
        atoms: impl Into<Atoms<'a>>,
        maps: Option<&HeadMaps>,
    ) -> Result<Vec<f32>> {
        let atoms = atoms.into();
        let own = self.head.and(maps);
        let checksum = atoms.checksum() ^ own.map_or(0, HeadMaps::checksum);
        let mut dims = [Some(atoms.head_dim()), own.map(HeadMaps::head_dim)]
            .into_iter()
            .flatten();
        if checksum != self.checksum
            || dims.any(|m| m != self.head_dim)
            || self.head.is_some() != own.is_some()
        {
            return Err(Error::OtherDictionary(format!("tensor {:?}", self.tensor)));
        }
        let decoded = self.codes.decode(atoms)?;
        match self.head.zip(own) {
            Some((head, maps)) if head >= maps.heads() => Err(Error::Dictionary(format!(
                "the codes are of KV head {head}, and there are maps of {} heads",
                maps.heads()
            ))),
            Some((head, maps)) => Ok(maps.from_coded(head, 0.., decoded)),
            None => Ok(decoded),
        }
    }
}

fn additive_tensors(pages: &Pages<AdditivePage>) -> Vec<NewTensor> {
    let (n, s) = (pages.len(), pages.format().sparsity);
    let own = pages.pages();
    let first = own.clone().flat_map(|page| &page.first);
    let first = first.flat_map(|leading| leading.0.to_le_bytes());
    let rest = own.flat_map(|page| page.rest.iter().copied());
    vec![
        NewTensor::new("first", Dtype::U16, &[n], first.collect()),
        NewTensor::new("rest", Dtype::U8, &[n, s - 1], rest.collect()),
    ]
}

fn sparse_tensors(pages: &Pages<SparsePage>) -> Vec<NewTensor> {
    let format = pages.format();
    let (n, s) = (pages.len(), format.sparsity);
    let (mut indices, mut numbers) = (Vec::new(), Vec::new());
    let (mut scales, mut lengths) = (Vec::new(), Vec::new());
    for page in pages.pages() {
        let each: Vec<usize> = format.each(&page.lengths, page.len).collect();
        let own = page.indices.iter().flat_map(|i| i.to_le_bytes());
        indices.extend(padded_rows(&own.collect::<Vec<_>>(), 2, &each, s));
        let mut values = Vec::new();
        coefficients::write(page.coefficients.slices(), &mut values, &mut scales);
        numbers.extend(padded_rows(&values, format.coefficients.bytes(), &each, s));
        lengths.extend_from_slice(&page.lengths);
    }
    let mut tensors = vec![
        NewTensor::new("indices", Dtype::U16, &[n, s], indices),
        NewTensor::new("coefficients", dtype(format.coefficients), &[n, s], numbers),
    ];
    if format.coefficients.is_scaled() {
        tensors.push(NewTensor::new("scales", Dtype::F8_E8M0, &[n], scales));
    }
    if format.variable {
        tensors.push(NewTensor::new("lengths", Dtype::U8, &[n], lengths));
    }
    tensors
}

/// Returns the shape of a tensor of two dimensions.
fn matrix(file: &TensorFile, name: &str, wanted: &str) -> Result<[usize; 2]> {
    let (_, shape) = file.info(name)?;
    <[usize; 2]>::try_from(shape).map_err(|_| {
        let reason = format!("its shape is {shape:?}, but {wanted} is needed");
        Error::tensor(file.path(), name, reason)
    })
}

/// Reads a tensor that must be of this number type and shape.
fn read(file: &TensorFile, name: &str, dtype: Dtype, wanted: &[usize]) -> Result<Vec<u8>> {
    let (found, shape) = file.info(name)?;
    if found != dtype || shape != wanted {
        let reason = format!("it is {found:?} {shape:?}, but {dtype:?} {wanted:?} is needed");
        return Err(Error::tensor(file.path(), name, reason));
    }
    file.bytes(name)
}

/// The number type of coefficients in a file.
fn dtype(format: CoefficientFormat) -> Dtype {
    match format {
        CoefficientFormat::I8 => Dtype::I8,
        CoefficientFormat::F8 => Dtype::F8_E4M3,
        CoefficientFormat::F32 => Dtype::F32,
    }
}

/// Reads the sparse codes of a file.
fn read_sparse(file: &TensorFile) -> Result<Pages<SparsePage>> {
    let [n, s] = matrix(file, "indices", "[n, s]")?;
    if s == 0 || s > usize::from(u16::MAX) {
        let reason = format!("a sparsity of {s} is impossible");
        return Err(Error::tensor(file.path(), "indices", reason));
    }
    let variable = file.info("lengths").is_ok();
    let lengths = if variable {
        read(file, "lengths", Dtype::U8, &[n])?
    } else {
        Vec::new()
    };
    if let Some(v) = lengths.iter().position(|&l| usize::from(l) > s) {
        let reason = format!("vector {v} has {} nonzeros in a row of {s}", lengths[v]);
        return Err(Error::tensor(file.path(), "lengths", reason));
    }
    let found = file.info("coefficients")?.0;
    let coefficients = [CoefficientFormat::I8, CoefficientFormat::F32]
        .into_iter()
        .find(|&format| dtype(format) == found)
        .unwrap_or(CoefficientFormat::F8);
    let format = SparseFormat {
        sparsity: s,
        variable,
        coefficients,
    };
    let each: Vec<usize> = format.each(&lengths, n).collect();
    let indices = used_rows(&read(file, "indices", Dtype::U16, &[n, s])?, 2, &each, s);
    let values = read(file, "coefficients", dtype(coefficients), &[n, s])?;
    let values = used_rows(&values, coefficients.bytes(), &each, s);
    let scales = if coefficients.is_scaled() {
        read(file, "scales", Dtype::F8_E8M0, &[n])?
    } else {
        Vec::new()
    };
    let coefficients = Coefficients::read(coefficients, values, scales)
        .map_err(|(name, reason)| Error::tensor(file.path(), name, reason))?;
    let mut pages = Pages::new(format.check()?);
    pages.push(SparsePage {
        format,
        len: n,
        indices: numbers(&indices, u16::from_le_bytes),
        coefficients,
        lengths,
    });
    Ok(pages)
}

/// Reads the additive codes of a file.
fn read_additive(file: &TensorFile, sizes: CodebookSizes) -> Result<Pages<AdditivePage>> {
    let [n, others] = matrix(file, "rest", "[n, s - 1]")?;
    let format = AdditiveFormat {
        sparsity: others.saturating_add(1),
        sizes,
    };
    let mut pages = Pages::new(format.check()?);
    let first = read(file, "first", Dtype::U16, &[n])?;
    let first = numbers(&first, |bytes| Leading(u16::from_le_bytes(bytes)));
    if let Some(v) = first.iter().position(|i| i.atom() >= sizes.first) {
        let (atom, size) = (first[v].atom(), sizes.first);
        let reason = format!("vector {v} names atom {atom} of a codebook of {size}");
        return Err(Error::tensor(file.path(), "first", reason));
    }
    pages.push(AdditivePage {
        format,
        first,
        rest: read(file, "rest", Dtype::U8, &[n, others])?,
    });
    Ok(pages)
}

/// Rows of `lengths[v]` elements of `width` bytes, each filled with zeros to `s` elements.
fn padded_rows(used: &[u8], width: usize, lengths: &[usize], s: usize) -> Vec<u8> {
    let mut rows = Vec::with_capacity(lengths.len() * s * width);
    let mut rest = used;
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
