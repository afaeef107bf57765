//! Prompts of given lengths that are drawn from a seed: what the tasks that hide something in a long text share.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::questions::Item;

/// Max tokens of a prompt: more than any model's context.
const MAX_LENGTH: usize = 1 << 24;
/// Number of sizes that are tried.
const TRIES: usize = 12;
/// Max prompts that are made.
const MAX_PROMPTS: usize = 10_000;
/// Max tokens of an answer.
const MAX_TOKENS: usize = 32;

/// Random numbers for the prompt of a number, the same whatever the prompts before it have drawn.
pub(super) fn random(seed: u64, stream: usize) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream as u64);
    random
}

/// A prompt, and its answer; texts of `stop` end what the model writes.
pub(super) fn item(
    id: String,
    group: String,
    prompt: String,
    stop: &[&str],
    expected: String,
) -> Item {
    Item {
        id,
        group: Some(group),
        prompt,
        begun: String::new(),
        is_message: true,
        max_tokens: MAX_TOKENS,
        stop: stop.iter().map(|&text| text.to_owned()).collect(),
        expected,
    }
}

/// Refuses grids of too many prompts, each of whose `cells` has so many repeats, and lengths that are named twice.
pub(super) fn check_count(lengths: &[usize], cells: usize, repeats: usize) -> Result<()> {
    if cells.saturating_mul(repeats) > MAX_PROMPTS {
        return Err(Error::Options(format!(
            "{repeats} repeats of {cells} kinds of prompts are too many: at most {MAX_PROMPTS} in all"
        )));
    }
    let twice = |(number, length): &(usize, &usize)| lengths[..*number].contains(length);
    match lengths.iter().enumerate().find(twice) {
        Some((_, length)) => Err(Error::Options(format!(
            "a length of {length} is named twice"
        ))),
        None => Ok(()),
    }
}

/// The prompt that `build` makes of as many pieces as fit `length` tokens, or of one or a few less where pieces are
/// of uneven length. `count` counts tokens.
///
/// # Errors
/// [`Error::Options`] where the prompt with `least` pieces does not fit, and those of `count`.
pub(super) fn fitted(
    length: usize,
    least: usize,
    build: impl Fn(usize) -> String,
    count: &dyn Fn(&str) -> Result<usize>,
) -> Result<String> {
    if length > MAX_LENGTH {
        return Err(Error::Options(format!(
            "prompts of {length} tokens are impossible: at most {MAX_LENGTH}"
        )));
    }
    let mut prompt = build(least);
    let mut tokens = count(&prompt)?;
    if tokens > length {
        return Err(Error::Options(format!(
            "prompts of {length} tokens are impossible: the shortest has {tokens}"
        )));
    }
    let mut pieces = least;
    // The first size that is known not to fit.
    let mut end = usize::MAX;
    // At first a few are tried.
    let mut a_piece = ((length - tokens) as f64 / 8.0).max(1.0);
    for _ in 0..TRIES {
        let more = ((length - tokens) as f64 / a_piece) as usize;
        // No more than several times what was tried: pieces further on may be far longer.
        let next = (pieces + more.clamp(1, 8 * (pieces + 1))).min(end - 1);
        if next == pieces || (more == 0 && end < usize::MAX) {
            break;
        }
        let longer = build(next);
        let of_longer = count(&longer)?;
        // What a piece takes is known the better the more of them there are.
        a_piece = (of_longer.saturating_sub(tokens) as f64 / (next - pieces) as f64).max(1.0);
        if of_longer > length {
            end = next;
        } else {
            (prompt, tokens, pieces) = (longer, of_longer, next);
        }
    }
    Ok(prompt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_as_long_as_fits() {
        for (a_piece, least) in [(1, 0), (7, 0), (7, 3), (40, 1), (500, 0)] {
            for length in [50 + least * a_piece, 997 + least * a_piece, 100_000] {
                let build = |pieces: usize| "x".repeat(50 + pieces * a_piece);
                let prompt = fitted(length, least, build, &|text| Ok(text.len())).unwrap();
                assert!(
                    prompt.len() <= length && prompt.len() + a_piece > length,
                    "{a_piece} {length}"
                );
            }
        }
    }

    #[test]
    fn uneven_pieces_come_near() {
        let build = |pieces: usize| {
            (0..pieces)
                .map(|n| "x".repeat(n * 37 % 29))
                .collect::<String>()
        };
        for length in [100, 1_000, 12_345, 100_000] {
            let prompt = fitted(length, 0, build, &|text| Ok(text.len())).unwrap();
            assert!(
                prompt.len() <= length && prompt.len() + 60 > length,
                "{length}: {}",
                prompt.len()
            );
        }
    }

    #[test]
    fn prompts_that_are_tried_are_not_far_longer() {
        // Short pieces, and then long ones.
        let build = |pieces: usize| "x".repeat(pieces + 1_000 * pieces.saturating_sub(100));
        let count = |text: &str| {
            assert!(text.len() < 1_000_000);
            Ok(text.len())
        };
        let prompt = fitted(100_000, 0, build, &count).unwrap();
        assert!(prompt.len() > 90_000, "{}", prompt.len());
    }

    #[test]
    fn impossible_lengths_are_refused() {
        let build = |pieces: usize| "x".repeat(50 + pieces);
        let error = |length, least| {
            let prompt = fitted(length, least, build, &|text| Ok(text.len()));
            prompt.unwrap_err().to_string()
        };
        assert!(error(0, 0).contains("the shortest has 50"));
        assert!(error(50, 1).contains("the shortest has 51"));
        assert!(error(usize::MAX, 0).contains("at most 16777216"));
    }
}
