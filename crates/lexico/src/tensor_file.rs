//! Safetensors files: read tensor by tensor without mapping, written beside their target and renamed.
//!
//! Tensors are read one by one rather than through a memory map: peak memory is one tensor, no `unsafe` is needed, and a
//! file cut short while it is open gives an error instead of a bus fault.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use positioned_io::ReadAt;
pub use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo, TensorView};

use crate::{Error, Result};

/// The largest header that is accepted, as in the `safetensors` crate.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open safetensors file, or one held in memory.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    source: Source,
    header: Metadata,
    /// Offset at which the tensors' bytes begin.
    data_start: u64,
}

#[derive(Debug)]
enum Source {
    File(File),
    Memory(&'static [u8]),
}

impl Source {
    /// Fills `out` from byte `at` on.
    fn read(&self, at: u64, out: &mut [u8]) -> std::io::Result<()> {
        match self {
            Self::Memory(bytes) => bytes.read_exact_at(at, out),
            Self::File(file) => file.read_exact_at(at, out),
        }
    }
}

impl TensorFile {
    /// Opens `path` and checks its header against its length.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read, [`Error::NotSafetensors`] where it is empty, cut
    /// short, too long or of another kind.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let file = File::open(&path).map_err(Error::io(&path))?;
        let metadata = file.metadata().map_err(Error::io(&path))?;
        if !metadata.is_file() {
            return Err(not_safetensors(&path, "it is not a regular file"));
        }
        Self::read(path, Source::File(file), metadata.len())
    }

    /// Reads a file that is embedded in the program; `name` stands for its path in messages.
    ///
    /// # Errors
    /// Those of [`TensorFile::open`].
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self> {
        Self::read(name.into(), Source::Memory(bytes), bytes.len() as u64)
    }

    fn read(path: PathBuf, source: Source, total: u64) -> Result<Self> {
        let mut length = [0; 8];
        if source.read(0, &mut length).is_err() {
            return Err(not_safetensors(&path, "it is shorter than 8 bytes"));
        }
        let header_bytes = u64::from_le_bytes(length);
        check_header_length(&path, header_bytes, total)?;
        let mut header = vec![0; header_bytes as usize];
        source.read(8, &mut header).map_err(Error::io(&path))?;
        let header: Metadata = serde_json::from_slice(&header)
            .map_err(|e| not_safetensors(&path, &format!("its header: {e}")))?;
        let data_start = 8 + header_bytes;
        let wanted = data_start + header.data_len() as u64;
        if wanted != total {
            let reason = format!("its header promises {wanted} bytes in all, the file has {total}");
            return Err(not_safetensors(&path, &reason));
        }
        Ok(Self {
            path,
            source,
            header,
            data_start,
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.header.offset_keys();
        names.sort();
        names
    }

    /// Bytes of all tensors together.
    pub fn data_bytes(&self) -> usize {
        self.header.data_len()
    }

    /// The free-form metadata.
    pub fn metadata(&self) -> HashMap<String, String> {
        self.header.metadata().clone().unwrap_or_default()
    }

    /// Checks that the metadata names one of `wanted`, the newest last, as the file's format; `cure` says what makes
    /// such files.
    pub(crate) fn check_format(&self, wanted: &[&'static str], cure: &'static str) -> Result<()> {
        let metadata = self.metadata();
        let found = metadata.get("format");
        if found.is_some_and(|f| wanted.contains(&f.as_str())) {
            return Ok(());
        }
        Err(Error::Format {
            path: self.path.clone(),
            found: found.map_or("none".to_owned(), |f| format!("{f:?}")),
            wanted: wanted.last().copied().unwrap_or_default(),
            cure,
        })
    }

    /// Reads an entry of the metadata.
    ///
    /// # Errors
    /// [`Error::Metadata`] where it is missing or `parse` refuses it.
    pub(crate) fn entry<T, E: ToString>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> std::result::Result<T, E>,
    ) -> Result<T> {
        let metadata = self.header.metadata().as_ref();
        let text = metadata.and_then(|metadata| metadata.get(key));
        let text = text.ok_or_else(|| self.bad_entry(key, "it is missing"))?;
        parse(text).map_err(|e| self.bad_entry(key, e.to_string()))
    }

    /// Returns the error that an entry of the metadata cannot be.
    pub(crate) fn bad_entry(&self, key: &'static str, reason: impl Into<String>) -> Error {
        Error::Metadata {
            path: self.path.clone(),
            key,
            reason: reason.into(),
        }
    }

    /// Number type and shape of a tensor.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn info(&self, name: &str) -> Result<(Dtype, &[usize])> {
        let info = self.tensor_info(name)?;
        Ok((info.dtype, &info.shape))
    }

    fn tensor_info(&self, name: &str) -> Result<&TensorInfo> {
        self.header.info(name).ok_or_else(|| {
            let names = self.names();
            let present = match names.len() {
                0 => "none".to_owned(),
                1..=8 => names.join(", "),
                count => format!("{} and {} more", names[..8].join(", "), count - 8),
            };
            Error::MissingTensor {
                path: self.path.clone(),
                name: name.to_owned(),
                present,
            }
        })
    }

    /// The bytes of a tensor, as stored.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Io`].
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let (start, end) = self.tensor_info(name)?.data_offsets;
        let mut bytes = vec![0; end - start];
        self.read_bytes(name, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `out` with the bytes of a tensor from its byte `first` on.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Io`], and [`Error::Tensor`] where the tensor ends before.
    pub fn read_bytes(&self, name: &str, first: usize, out: &mut [u8]) -> Result<()> {
        let (start, end) = self.tensor_info(name)?.data_offsets;
        if first
            .checked_add(out.len())
            .is_none_or(|last| last > end - start)
        {
            let reason = format!("it has {} bytes, fewer than are asked for", end - start);
            return Err(Error::tensor(&self.path, name, reason));
        }
        let at = self.data_start + (start + first) as u64;
        self.source.read(at, out).map_err(Error::io(&self.path))
    }

    /// A floating-point tensor of `rank` dimensions, converted to f32.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Io`], and [`Error::Tensor`] where the rank or the number
    /// type is another (F16, BF16, F32 and F64 are read).
    pub fn f32_tensor(&self, name: &str, rank: usize) -> Result<(Vec<f32>, Vec<usize>)> {
        let (dtype, shape) = self.info(name)?;
        if shape.len() != rank {
            let reason = format!("its shape is {shape:?}, but {rank} dimensions are needed");
            return Err(Error::tensor(&self.path, name, reason));
        }
        let bytes = self.bytes(name)?;
        let numbers = floats_of_bytes(dtype, &bytes).ok_or_else(|| {
            let reason = format!("its numbers are {dtype:?}; F16, BF16, F32 or F64 are needed");
            Error::tensor(&self.path, name, reason)
        })?;
        Ok((numbers, shape.to_vec()))
    }
}

/// Converts stored floating-point numbers to f32; `None` for any other number type.
fn floats_of_bytes(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F16 => numbers(bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => numbers(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::F32 => numbers(bytes, f32::from_le_bytes),
        Dtype::F64 => numbers(bytes, |b| f64::from_le_bytes(b) as f32),
        _ => return None,
    })
}

/// Converts stored numbers of `N` bytes each.
pub(crate) fn numbers<T, const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> T) -> Vec<T> {
    let chunks = bytes.as_chunks::<N>().0.iter();
    chunks.map(|&chunk| convert(chunk)).collect()
}

fn check_header_length(path: &Path, header_bytes: u64, total: u64) -> Result<()> {
    if header_bytes > MAX_HEADER_BYTES || header_bytes > total.saturating_sub(8) {
        let zip = header_bytes.to_le_bytes().starts_with(b"PK\x03\x04");
        let reason = if zip {
            "it is a zip archive, as PyTorch writes; `lexico import` converts dictionaries"
                .to_owned()
        } else {
            format!("it claims a header of {header_bytes} bytes in a file of {total}")
        };
        return Err(not_safetensors(path, &reason));
    }
    Ok(())
}

fn not_safetensors(path: &Path, reason: &str) -> Error {
    Error::NotSafetensors {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
}

/// A tensor to be written: name, number type, shape, little-endian bytes.
#[derive(Debug, Clone)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Its number type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its numbers, little-endian.
    pub bytes: Vec<u8>,
}

impl NewTensor {
    /// An F32 tensor.
    pub fn f32(name: &str, shape: &[usize], numbers: &[f32]) -> Self {
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self::new(name, Dtype::F32, shape, bytes)
    }

    /// A tensor of any number type.
    pub fn new(name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            bytes,
        }
    }
}

/// Writes a safetensors file: whole, or not at all.
///
/// # Errors
/// [`Error::Io`] where the folder does not exist or cannot be written;
/// [`Error::Tensor`] where a tensor's bytes do not fill its shape.
pub fn write(
    path: impl AsRef<Path>,
    tensors: &[NewTensor],
    metadata: HashMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let mut views = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)
            .map_err(|e| Error::tensor(path, &tensor.name, e.to_string()))?;
        views.push((tensor.name.as_str(), view));
    }
    let bytes = safetensors::serialize(views, (!metadata.is_empty()).then_some(metadata))
        .map_err(|e| not_safetensors(path, &e.to_string()))?;
    write_atomically(path, &bytes)
}

/// Writes a safetensors file whose tensors are made one after the other, so that memory holds one at a time;
/// whole, or not at all. `tensors` are names, number types and shapes; `make` gives the bytes of each by its number,
/// or `None` to give up.
///
/// # Errors
/// [`Error::Io`], also where `make` gave up or what it gave does not fill the shape.
pub fn write_in_turn(
    path: &Path,
    tensors: &[(&str, Dtype, Vec<usize>)],
    mut make: impl FnMut(usize) -> Option<Vec<u8>>,
) -> Result<()> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    let mut lengths = Vec::with_capacity(tensors.len());
    for (name, dtype, shape) in tensors {
        let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let place = serde_json::json!({
            "dtype": dtype, "shape": shape, "data_offsets": [end, end + length],
        });
        header.insert((*name).to_owned(), place);
        end += length;
        lengths.push(length);
    }
    let mut header = serde_json::Value::Object(header).to_string();
    // Like the safetensors crate: tensors begin at multiples of eight bytes.
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    write_atomically_with(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for (number, length) in lengths.into_iter().enumerate() {
            match make(number) {
                Some(bytes) if bytes.len() == length => file.write_all(&bytes)?,
                _ => return Err(std::io::Error::other("a tensor could not be made")),
            }
        }
        Ok(())
    })
}

/// Writes `bytes` beside `path` and renames the result, so that `path` is never half written.
///
/// # Errors
/// [`Error::Io`], naming `path`.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically_with(path, |file| file.write_all(bytes))
}

/// Writes a file like [`write_atomically`], by `write`: its bytes need not be in memory as a whole.
///
/// # Errors
/// [`Error::Io`], naming `path`.
pub fn write_atomically_with(
    path: &Path,
    write: impl FnOnce(&mut File) -> std::io::Result<()>,
) -> Result<()> {
    let (path, folder) = &target(path)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".lexico-").suffix(".partial");
    #[cfg(unix)]
    {
        // A temporary file is private by default; the target should obey the umask like any other.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(folder).map_err(Error::io(path))?;
    write(file.as_file_mut())
        .and_then(|()| file.as_file().sync_all())
        .map_err(Error::io(path))?;
    file.persist(path).map_err(|e| Error::io(path)(e.error))?;
    // The new name too is to outlast a power cut; where a folder cannot be synced, nothing is lost but that.
    #[cfg(unix)]
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(())
}

/// Fails early where [`write_atomically`] would fail late: after an hour of training, say.
///
/// # Errors
/// [`Error::Io`], naming `path`.
pub fn check_writable(path: &Path) -> Result<()> {
    let (path, folder) = &target(path)?;
    tempfile::tempfile_in(folder)
        .map(drop)
        .map_err(Error::io(path))
}

/// Finds the path at which a file is really written, and its folder: links are followed, and only regular files are
/// ever replaced.
fn target(path: &Path) -> Result<(PathBuf, PathBuf)> {
    let path = match path.symlink_metadata() {
        Ok(there) if there.is_symlink() => path.canonicalize().map_err(Error::io(path))?,
        _ => path.to_owned(),
    };
    if path.metadata().is_ok_and(|there| !there.is_file()) {
        let reason = std::io::Error::other("it is there and not a regular file");
        return Err(Error::io(&path)(reason));
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((path, folder))
}
