//! What the authors' formulas make of the same vectors: `tests/fixtures/make_rivals.py` writes it.

use serde_json::Value;

/// Channels of the vectors.
pub(super) const M: usize = 64;

/// Contents of `rivals.json` for a method.
pub(super) fn of(method: &str) -> Value {
    let all: Value =
        serde_json::from_str(include_str!("../../tests/fixtures/rivals.json")).unwrap();
    all[method].clone()
}

/// The vectors that the script draws.
pub(super) fn vectors(first: usize, count: usize) -> Vec<f32> {
    let number = |at: usize| {
        let mut drawn = (at as u64 * 2_654_435_761 + 12345) % (1 << 32);
        drawn ^= drawn >> 15;
        drawn = drawn * 2_246_822_519 % (1 << 32);
        let number = (drawn >> 8) as f64 / f64::from(1 << 23) - 1.0;
        (number * if (at % M).is_multiple_of(7) { 4.0 } else { 1.0 }) as f32
    };
    (first * M..(first + count) * M).map(number).collect()
}

/// Numbers of a list.
pub(super) fn numbers(value: &Value) -> Vec<f64> {
    let list = value.as_array().unwrap().iter();
    list.map(|x| x.as_f64().unwrap()).collect()
}

/// Asserts that numbers are those expected, but for `tolerance`.
pub(super) fn assert_close(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let off = (f64::from(*got) - expected).abs();
        assert!(off <= tolerance, "{got} for {expected} at {at}");
    }
}

/// Vectors that a list of coded ones stands for.
pub(super) fn read(coded: &impl super::stored::CodedVectors) -> Vec<f32> {
    let mut out = Vec::new();
    coded.read(0, coded.len(), &mut out);
    out
}
