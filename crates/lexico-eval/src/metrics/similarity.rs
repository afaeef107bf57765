use std::collections::HashMap;
use std::ops::Range;

/// Frequent characters of a text this long are not looked for.
const LONG: usize = 200;

/// Likeness of two texts, in whole per cent: `fuzz.ratio` of Python's `fuzzywuzzy` over 100.
///
/// It is twice the characters in matching blocks over the characters of both (Ratcliff and Metzener, 1988), by
/// Python's `difflib`, which passes over characters that make up more than a hundredth of a `second` of 200 or
/// more. `fuzzywuzzy` takes another distance where `python-Levenshtein` is installed; LongBench's requirements do
/// not have it.
///
/// Complexity: quadratic in the lengths, cubic for the worst texts.
pub fn ratio(first: &str, second: &str) -> f64 {
    if first == second {
        return 1.0;
    }
    if first.is_empty() || second.is_empty() {
        return 0.0;
    }
    let (first, second): (Vec<char>, Vec<char>) =
        (first.chars().collect(), second.chars().collect());
    let ratio = 2.0 * matching(&first, &second) as f64 / (first.len() + second.len()) as f64;
    (100.0 * ratio).round_ties_even() / 100.0
}

/// Characters in matching blocks: the longest one, and those to its left and to its right in the same way.
fn matching(first: &[char], second: &[char]) -> usize {
    let mut places: HashMap<char, Vec<usize>> = HashMap::new();
    for (place, &c) in second.iter().enumerate() {
        places.entry(c).or_default().push(place);
    }
    if second.len() >= LONG {
        places.retain(|_, places| places.len() <= second.len() / 100 + 1);
    }
    let mut matching = 0;
    let mut left = vec![(0..first.len(), 0..second.len())];
    while let Some((a, b)) = left.pop() {
        let (i, j, length) = longest(first, second, &places, a.clone(), b.clone());
        if length > 0 {
            matching += length;
            left.push((a.start..i, b.start..j));
            left.push((i + length..a.end, j + length..b.end));
        }
    }
    matching
}

/// The longest block that is in both ranges, the first of several: where it begins in either, and its length.
fn longest(
    first: &[char],
    second: &[char],
    places: &HashMap<char, Vec<usize>>,
    a: Range<usize>,
    b: Range<usize>,
) -> (usize, usize, usize) {
    let (mut i, mut j, mut length) = (a.start, b.start, 0);
    // Of the blocks that end at the last character of `first`: their lengths, by where they end in `second`.
    let mut ending: HashMap<usize, usize> = HashMap::new();
    for at in a.clone() {
        let mut now = HashMap::new();
        let found = places.get(&first[at]).map_or(&[][..], Vec::as_slice);
        let found = &found[found.partition_point(|&place| place < b.start)..];
        for &place in found.iter().take_while(|&&place| place < b.end) {
            let before = place.checked_sub(1).and_then(|before| ending.get(&before));
            let of_this = before.copied().unwrap_or(0) + 1;
            now.insert(place, of_this);
            if of_this > length {
                (i, j, length) = (at + 1 - of_this, place + 1 - of_this, of_this);
            }
        }
        ending = now;
    }
    // Frequent characters beside it belong to it though they are not looked for.
    while i > a.start && j > b.start && first[i - 1] == second[j - 1] {
        (i, j, length) = (i - 1, j - 1, length + 1);
    }
    while i + length < a.end && j + length < b.end && first[i + length] == second[j + length] {
        length += 1;
    }
    (i, j, length)
}
