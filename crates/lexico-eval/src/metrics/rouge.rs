use std::collections::HashSet;

use super::words;

/// ROUGE-L's F1 of summaries (Lin, 2004), as version 1.0.1 of Python's `rouge` has it.
///
/// Full stops end sentences. The longest common subsequence of every sentence of the answer with every one of the
/// prediction is taken; of all of these the different words count, against the different words of either text. 0
/// where a text has no sentence, as LongBench scores it. (There it is 0 also for a pair of sentences so long that
/// Python's recursion ends: about a thousand words. Not here.)
///
/// Complexity: the words of one times the words of the other.
pub fn rouge_l(prediction: &str, answer: &str) -> f64 {
    let (prediction, answer) = (sentences(prediction), sentences(answer));
    if prediction.is_empty() || answer.is_empty() {
        return 0.0;
    }
    let different = |sentences: &[Vec<&str>]| {
        let words: HashSet<&str> = sentences.iter().flatten().copied().collect();
        words.len() as f64
    };
    let mut common = HashSet::new();
    for of_answer in &answer {
        for of_prediction in &prediction {
            common.extend(common_subsequence(of_answer, of_prediction));
        }
    }
    let recall = common.len() as f64 / different(&answer);
    let precision = common.len() as f64 / different(&prediction);
    2.0 * (precision * recall / (precision + recall + 1e-8))
}

/// Sentences as words; one of white space is a single empty word.
fn sentences(text: &str) -> Vec<Vec<&str>> {
    let sentences = text.split('.').filter(|sentence| !sentence.is_empty());
    sentences
        .map(|sentence| {
            let words: Vec<&str> = words(sentence).collect();
            if words.is_empty() { vec![""] } else { words }
        })
        .collect()
}

/// A longest common subsequence: of several the one that is found from the end where, of two ways of one length,
/// `second`'s words are passed over first.
fn common_subsequence<'t>(first: &[&'t str], second: &[&'t str]) -> Vec<&'t str> {
    // Of every beginning of `first` with every one of `second`: whether to pass over the word of `first`.
    let mut over_first = vec![false; first.len() * second.len()];
    let mut row = vec![0_usize; second.len() + 1];
    for (word, over) in first.iter().zip(over_first.chunks_mut(second.len())) {
        let mut diagonal = 0;
        for (at, other) in second.iter().enumerate() {
            let above = row[at + 1];
            over[at] = above > row[at];
            row[at + 1] = if word == other {
                diagonal + 1
            } else {
                above.max(row[at])
            };
            diagonal = above;
        }
    }
    let mut found = Vec::with_capacity(row[second.len()]);
    let (mut i, mut j) = (first.len(), second.len());
    while i > 0 && j > 0 {
        if first[i - 1] == second[j - 1] {
            (i, j) = (i - 1, j - 1);
            found.push(first[i]);
        } else if over_first[(i - 1) * second.len() + j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
    found
}
