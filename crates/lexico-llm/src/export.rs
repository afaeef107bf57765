//! Dictionaries for the reference implementation: a `.pt` file with one tensor `[2·layers, m, N]`.

use std::io::{BufWriter, Write};
use std::path::Path;

use lexico::tensor_file::write_atomically_with;
use lexico::{Dictionary, DictionarySet};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use crate::error::{Result, refused};

/// Folder of all entries of the archive.
const ROOT: &str = "dictionary";

/// Writes a dictionary file of the reference implementation: one f32 tensor `[2·layers, m, N]`, keys
/// and values interleaved layer by layer, one atom a column, as `torch.save` writes it and
/// [`import_reference`](crate::import::import_reference) reads it. Atoms stay bit for bit as they are;
/// of the model and of how the dictionaries were learned such a file says nothing.
///
/// # Errors
/// [`Error::File`](crate::Error::File) where not all dictionaries have the same number of atoms;
/// [`lexico::Error::Io`] where the file cannot be written, which is then as it was.
pub fn export_reference(set: &DictionarySet, path: &Path) -> Result<()> {
    let error = |reason: String| refused(path, format!("cannot export to it: {reason}"));
    let sparse = || set.layers.iter().flat_map(|layer| &layer.sparse);
    let matrices = || sparse().flat_map(|both| both.as_ref());
    let Some(first) = matrices().next() else {
        let reason = "it has no dictionaries for sparse codes, which alone have a place in such a file; \
             `lexico train --atoms 4096` learns them";
        return Err(error(reason.to_owned()));
    };
    let (m, atoms) = (first.head_dim(), first.len());
    if let Some(other) = matrices().find(|d| d.len() != atoms || d.head_dim() != m) {
        let (others, length) = (other.len(), other.head_dim());
        return Err(error(format!(
            "one tensor holds dictionaries of one size, but of these one has {atoms} atoms of length {m} \
             and another {others} of length {length}"
        )));
    }
    let shape = [2 * set.layers.len(), m, atoms];
    let written = write_atomically_with(path, |file| {
        let mut archive = ZipWriter::new(BufWriter::new(file));
        // As torch does: nothing compressed, numbers where they can be mapped into memory.
        let stored = SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored)
            .with_alignment(64);
        for (name, content) in [
            ("data.pkl", pickle(shape).as_slice()),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ] {
            archive.start_file(format!("{ROOT}/{name}"), stored)?;
            archive.write_all(content)?;
        }
        archive.start_file(format!("{ROOT}/data/0"), stored.large_file(true))?;
        for dictionary in matrices() {
            archive.write_all(&columns(dictionary))?;
        }
        archive.finish()?.flush()
    });
    Ok(written?)
}

/// The atoms as columns, `[m, N]` in little-endian f32.
fn columns(dictionary: &Dictionary) -> Vec<u8> {
    let m = dictionary.head_dim();
    let atoms = dictionary.atoms();
    let numbers = (0..m).flat_map(|j| atoms.iter().skip(j).step_by(m));
    numbers.flat_map(|x| x.to_le_bytes()).collect()
}

/// The pickle of a contiguous f32 tensor: the call of `torch._utils._rebuild_tensor_v2` with storage `0`,
/// offset, shape, strides, no gradient and no hooks.
fn pickle(shape: [usize; 3]) -> Vec<u8> {
    let [_, rows, columns] = shape;
    let mut out = Vec::new();
    // PROTO 2; GLOBAL the function; MARK its arguments
    out.extend(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(");
    // MARK ('storage', FloatStorage, '0', 'cpu', elements) TUPLE, BINPERSID
    out.push(b'(');
    text(&mut out, "storage");
    out.extend(b"ctorch\nFloatStorage\n");
    text(&mut out, "0");
    text(&mut out, "cpu");
    number(&mut out, shape.iter().product());
    out.extend(b"tQ");
    number(&mut out, 0);
    for sizes in [shape, [rows * columns, columns, 1]] {
        sizes.into_iter().for_each(|size| number(&mut out, size));
        // TUPLE3
        out.push(0x87);
    }
    // NEWFALSE; OrderedDict(); TUPLE, REDUCE, STOP
    out.extend(b"\x89ccollections\nOrderedDict\n)RtR.");
    out
}

/// BINUNICODE
fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

/// BININT, or LONG1 of 8 bytes where that is too short.
fn number(out: &mut Vec<u8>, number: usize) {
    if let Ok(short) = i32::try_from(number) {
        out.push(b'J');
        out.extend(short.to_le_bytes());
    } else {
        out.extend([0x8a, 8]);
        out.extend((number as u64).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::read_tensor;

    #[test]
    fn numbers_beyond_32_bits_are_read_back() {
        for shape in [[1, 1, 1], [64, 128, 65_536], [4096, 1 << 15, 65_536]] {
            let tensor = read_tensor(&pickle(shape)).unwrap();
            assert_eq!(tensor.shape, shape);
            assert_eq!(tensor.strides, [shape[1] * shape[2], shape[2], 1]);
            assert_eq!((tensor.offset, tensor.key.as_str()), (0, "0"));
        }
    }
}
