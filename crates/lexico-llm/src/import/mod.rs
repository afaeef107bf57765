//! Dictionaries of the reference implementation: a `.pt` file with one tensor `[2·layers, m, N]`.

mod pickle;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use candle_core::quantized::GgmlDType;
use lexico::dictionary::{LayerDictionaries, MAX_ATOMS, ModelIdentity, Training};
use lexico::{Dictionary, DictionarySet, KeyValue};

use crate::error::{Result, io, refused};
use crate::weights::numbers;
use pickle::SavedTensor;
#[cfg(test)]
pub(crate) use pickle::read_tensor;

/// The pickle of a saved tensor takes a few hundred bytes.
const MAX_PICKLE_BYTES: u64 = 1 << 20;

/// Reads a dictionary file of the reference implementation for a model of this identity: keys and
/// values interleaved layer by layer, one atom a column. Atoms are scaled to unit length, those of a
/// matrix that already are of it as nearly as a dictionary file's stay bit for bit as they are.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io), and [`Error::File`](crate::Error::File) where it is no PyTorch file of one such tensor.
pub fn import_reference(path: &Path, model: ModelIdentity) -> Result<DictionarySet> {
    let error = |reason: String| refused(path, format!("cannot import it: {reason}"));
    let (tensor, numbers) = read(path, model.layers.saturating_mul(2), model.head_dim)?;
    let (shape, strides, offset) = (&tensor.shape, &tensor.strides, tensor.offset);
    let wanted = 2 * model.layers;
    let (&[matrices, m, atoms], &[matrix_stride, row_stride, column_stride]) =
        (shape.as_slice(), strides.as_slice())
    else {
        return Err(error(format!(
            "its shape is {shape:?}, but [2·layers, m, N] is needed"
        )));
    };
    if matrices != wanted || m != model.head_dim || !(1..=MAX_ATOMS).contains(&atoms) {
        return Err(error(format!(
            "its shape is {shape:?}, but the model {} needs [{wanted}, {}, N], N up to {MAX_ATOMS}",
            model.name, model.head_dim
        )));
    }
    let mut dimensions = shape.iter().zip(strides);
    let last = dimensions.try_fold(offset, |at, (size, stride)| {
        at.checked_add((size - 1).checked_mul(*stride)?)
    });
    if last.is_none_or(|last| last >= numbers.len()) {
        return Err(error(format!(
            "it is cut short: {} numbers for {shape:?}",
            numbers.len()
        )));
    }
    let dictionary = |matrix: usize| {
        let first = offset + matrix * matrix_stride;
        let at = |j: usize, n: usize| numbers[first + j * row_stride + n * column_stride];
        let by_rows = || (0..atoms).flat_map(|n| (0..m).map(move |j| at(j, n)));
        Dictionary::new(by_rows().collect(), m)
            .or_else(|_| Dictionary::normalised(by_rows().collect(), m))
            .map_err(|e| error(format!("matrix {matrix}: {e}")))
    };
    let layers = (0..model.layers)
        .map(|l| {
            Ok(LayerDictionaries {
                sparse: Some(KeyValue::new(
                    dictionary(2 * l)?.into(),
                    dictionary(2 * l + 1)?.into(),
                )),
                ..LayerDictionaries::default()
            })
        })
        .collect::<Result<_>>()?;
    let file = path
        .file_name()
        .map_or_else(Default::default, |name| name.to_string_lossy());
    Ok(DictionarySet {
        layers,
        training: Training {
            sparsity: (model.head_dim / 8).max(1),
            corpus: vec![format!("imported from {file}")],
            tool: format!("lexico {} (import)", env!("CARGO_PKG_VERSION")),
            losses: None,
            ..Training::default()
        },
        model,
    })
}

/// The one tensor that `torch.save` wrote, and all numbers of its storage.
fn read(path: &Path, matrices: usize, head_dim: usize) -> Result<(SavedTensor, Vec<f32>)> {
    let error = |reason: String| refused(path, format!("cannot import it: {reason}"));
    let foreign = |e: &dyn std::fmt::Display| error(format!("not a PyTorch file: {e}"));
    let file = File::open(path).map_err(io(path))?;
    let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(|e| foreign(&e))?;
    let names = archive.file_names().flatten().map(|n| n.into_owned());
    let names: Vec<String> = names.collect();
    let pickle = names.iter().find(|name| name.ends_with("data.pkl"));
    let pickle = pickle.ok_or_else(|| foreign(&"no data.pkl in it"))?;
    let mut entry = |name: &str, most: u64| -> Result<Vec<u8>> {
        let entry = archive.by_name(name).map_err(|e| foreign(&e))?;
        let mut bytes = Vec::new();
        entry.take(most).read_to_end(&mut bytes).map_err(io(path))?;
        Ok(bytes)
    };
    let tensor = pickle::read_tensor(&entry(pickle, MAX_PICKLE_BYTES)?).map_err(error)?;
    let stored = match tensor.storage.as_str() {
        "FloatStorage" => GgmlDType::F32,
        "HalfStorage" => GgmlDType::F16,
        "BFloat16Storage" => GgmlDType::BF16,
        other => {
            let reason = format!("its numbers are a {other}; f32, f16 or bf16 are needed");
            return Err(error(reason));
        }
    };
    let data = pickle.trim_end_matches("data.pkl");
    // A compressed entry could unpack without end: no dictionaries of this model take more, even
    // as a part of something larger.
    let most =
        (matrices as u64).saturating_mul((head_dim * MAX_ATOMS * stored.type_size() * 4) as u64);
    let bytes = entry(&format!("{data}data/{}", tensor.key), most)?;
    Ok((tensor, numbers(stored, &bytes)))
}
