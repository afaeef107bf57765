//! Dictionaries of the reference implementation: a `.pt` file with one tensor `[2·layers, m, N]`.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use candle_core::pickle::{Object, Stack};
use candle_core::{DType, Layout};
use half::{bf16, f16};
use lexico::dictionary::{LayerDictionaries, ModelIdentity, Training};
use lexico::{Dictionary, DictionarySet};

use crate::error::{Error, Result, io};

/// Reads a dictionary file of the reference implementation for a model of this identity: keys and
/// values interleaved layer by layer, one atom a column. Atoms are scaled to unit length.
///
/// # Errors
/// [`Error::Io`], and [`Error::Import`] where it is no PyTorch file of one such tensor.
pub fn import_reference(path: &Path, model: ModelIdentity) -> Result<DictionarySet> {
    let error = |reason: String| Error::Import {
        path: path.to_owned(),
        reason,
    };
    let (numbers, layout) = read_tensor(path)?;
    let wanted = 2 * model.layers;
    let shape = layout.dims();
    let (&[matrices, m, atoms], &[matrix_stride, row_stride, column_stride]) =
        (shape, layout.stride())
    else {
        return Err(error(format!(
            "its shape is {shape:?}, but [2·layers, m, N] is needed"
        )));
    };
    if matrices != wanted || m != model.head_dim || atoms == 0 {
        return Err(error(format!(
            "its shape is {shape:?}, but the model {} needs [{wanted}, {}, N]",
            model.name, model.head_dim
        )));
    }
    let last = [
        (matrices, matrix_stride),
        (m, row_stride),
        (atoms, column_stride),
    ]
    .into_iter()
    .try_fold(layout.start_offset(), |at, (size, stride)| {
        at.checked_add((size - 1).checked_mul(stride)?)
    });
    if last.is_none_or(|last| last >= numbers.len()) {
        return Err(error(format!(
            "it is cut short: {} numbers for {shape:?}",
            numbers.len()
        )));
    }
    let dictionary = |matrix: usize| {
        let first = layout.start_offset() + matrix * matrix_stride;
        let at = |j: usize, n: usize| numbers[first + j * row_stride + n * column_stride];
        let by_rows = (0..atoms).flat_map(|n| (0..m).map(move |j| at(j, n)));
        Dictionary::normalised(by_rows.collect(), m)
            .map_err(|e| error(format!("matrix {matrix}: {e}")))
    };
    let layers = (0..model.layers)
        .map(|l| {
            Ok(LayerDictionaries {
                keys: dictionary(2 * l)?,
                values: dictionary(2 * l + 1)?,
            })
        })
        .collect::<Result<_>>()?;
    Ok(DictionarySet {
        layers,
        training: Training {
            sparsity: (model.head_dim / 8).max(1),
            corpus: vec![format!("imported from {}", path.display())],
            tool: format!("lexico {} (import)", env!("CARGO_PKG_VERSION")),
            ..Training::default()
        },
        model,
    })
}

/// Storage and layout of the one tensor that `torch.save(tensor, path)` wrote, or the only one in a saved dict.
fn read_tensor(path: &Path) -> Result<(Vec<f32>, Layout)> {
    let error = |reason: String| Error::Import {
        path: path.to_owned(),
        reason,
    };
    let foreign = |e: &dyn std::fmt::Display| error(format!("not a PyTorch file: {e}"));
    let file = File::open(path).map_err(io(path))?;
    let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(|e| foreign(&e))?;
    let names: Vec<String> = archive
        .file_names()
        .flatten()
        .map(|n| n.into_owned())
        .collect();
    let pickle = names.into_iter().find(|name| name.ends_with("data.pkl"));
    let pickle = pickle.ok_or_else(|| error("not a PyTorch file: no data.pkl in it".to_owned()))?;
    let folder = PathBuf::from(pickle.trim_end_matches(".pkl"));
    let mut stack = Stack::empty();
    {
        let entry = archive.by_name(&pickle).map_err(|e| foreign(&e))?;
        stack
            .read_loop(&mut BufReader::new(entry))
            .map_err(|e| foreign(&e))?;
    }
    let mut object = stack.finalize().map_err(|e| foreign(&e))?;
    if let Object::Dict(mut entries) = object {
        if entries.len() != 1 {
            return Err(error(format!(
                "it holds {} objects, not one tensor",
                entries.len()
            )));
        }
        object = entries.remove(0).1;
    }
    let name = Object::Unicode("dictionary".to_owned());
    let info = object
        .into_tensor_info(name, &folder)
        .map_err(|e| foreign(&e))?;
    let info = info.ok_or_else(|| error("what it holds is not a tensor".to_owned()))?;

    let mut entry = archive.by_name(&info.path).map_err(|e| foreign(&e))?;
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(io(path))?;
    let storage: Vec<f32> = match info.dtype {
        DType::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b))
            .collect(),
        DType::F16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&b| f16::from_le_bytes(b).to_f32())
            .collect(),
        DType::BF16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&b| bf16::from_le_bytes(b).to_f32())
            .collect(),
        other => {
            return Err(error(format!(
                "its numbers are {other:?}; F32, F16 or BF16 are needed"
            )));
        }
    };
    Ok((storage, info.layout))
}
