//! Any bytes as a stored block of codes: it is read and comes back from its own writing as it was, or it is refused.
#![no_main]

use lexico::codes::stored;
use lexico::dictionary::CodebookSizes;
use lexico::{AdditiveFormat, CodeFormat, CoefficientFormat, SparseFormat};
use libfuzzer_sys::fuzz_target;

/// The formats of some heads, as a byte draws them.
fn formats(byte: u8) -> Vec<CodeFormat> {
    let heads = 1 + usize::from(byte & 1);
    let sparsities = (0..heads).map(|head| 1 + head + usize::from(byte >> 5));
    let coefficients = match byte >> 1 & 3 {
        0 => CoefficientFormat::I8,
        1 => CoefficientFormat::F8,
        2 => CoefficientFormat::F32,
        _ => {
            let sizes = CodebookSizes { first: 300 };
            return sparsities
                .map(|sparsity| AdditiveFormat { sparsity, sizes }.into())
                .collect();
        }
    };
    let variable = byte >> 3 & 1 == 1;
    let format = |sparsity| SparseFormat {
        sparsity,
        variable,
        coefficients,
    };
    sparsities.map(|sparsity| format(sparsity).into()).collect()
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&first, block)) = bytes.split_first() else {
        return;
    };
    let formats = formats(first);
    let Ok(codes) = stored::read(&formats, [block]) else {
        return;
    };
    let written = stored::write(&codes.iter().collect::<Vec<_>>());
    let blocks = written.iter().map(Vec::as_slice);
    let again = stored::read(&formats, blocks).unwrap();
    for (codes, again) in codes.iter().zip(&again) {
        assert_eq!(codes.len(), again.len());
    }
    assert_eq!(stored::write(&again.iter().collect::<Vec<_>>()), written);
});
