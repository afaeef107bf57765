//! Sizes in bytes as people write them.

/// The bytes that a text like `512MiB` names; units are `B`, `KiB`, `MiB` and `GiB`. `None` where it names none, or less than one.
///
/// ```
/// assert_eq!(lexico::parse_size("1.5KiB"), Some(1536.0));
/// assert_eq!(lexico::parse_size("512"), None);
/// ```
#[must_use]
pub fn parse_size(text: &str) -> Option<f64> {
    const UNITS: [(&str, f64); 4] = [
        ("KiB", 1024.0),
        ("MiB", 1024.0 * 1024.0),
        ("GiB", 1024.0 * 1024.0 * 1024.0),
        ("B", 1.0),
    ];
    let named = UNITS.iter().find_map(|(unit, factor)| {
        let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        Some(number * factor)
    });
    named.filter(|bytes| bytes.is_finite() && *bytes >= 1.0)
}
