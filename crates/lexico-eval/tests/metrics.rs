//! Metrics as LongBench's published code computes them: pairs made by `fixtures/make_metrics.py`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use lexico_eval::metrics::{
    classification, code_similarity, count, qa_f1, ratio, retrieval, rouge_l,
};

fn agrees(golden: &str, metric: fn(&str, &str) -> f64) {
    let cases: Vec<(String, String, f64)> = serde_json::from_str(golden).unwrap();
    assert_eq!(cases.len(), 500);
    for (prediction, answer, expected) in cases {
        let score = metric(&prediction, &answer);
        assert!(
            (score - expected).abs() < 1e-9,
            "{prediction:?} for {answer:?}: {score}, not {expected}"
        );
    }
}

#[test]
fn scores_are_those_of_the_published_code() {
    agrees(include_str!("fixtures/metrics/qa_f1.json"), qa_f1);
    agrees(include_str!("fixtures/metrics/rouge.json"), rouge_l);
    agrees(
        include_str!("fixtures/metrics/code_sim.json"),
        code_similarity,
    );
    agrees(include_str!("fixtures/metrics/count.json"), count);
    agrees(include_str!("fixtures/metrics/retrieval.json"), retrieval);
}

#[test]
fn classes_score_as_in_the_published_code() {
    let golden = include_str!("fixtures/metrics/classification.json");
    let cases: Vec<(String, String, f64, Vec<String>)> = serde_json::from_str(golden).unwrap();
    assert_eq!(cases.len(), 500);
    for (prediction, answer, expected, classes) in cases {
        let score = classification(&prediction, &answer, &classes);
        assert!(
            (score - expected).abs() < 1e-9,
            "{prediction:?} for {answer:?} of {classes:?}: {score}, not {expected}"
        );
    }
}

#[test]
fn answers_that_published_data_does_not_have_score_nothing() {
    assert_eq!(retrieval("Paragraph 3", "3"), 0.0);
    assert_eq!(retrieval("Paragraph 3", "Paragraph x, Paragraph 3"), 1.0);
    assert_eq!(classification("Animal", "Animal", &[]), 0.0);
}

#[test]
fn long_texts_are_scored() {
    let text = "one two ".repeat(3_000);
    let other = "two three ".repeat(3_000);
    // Sentences on which the published code gives up, for the depth of its recursion.
    assert!((rouge_l(&text, &text) - 1.0).abs() < 1e-7);
    assert!((rouge_l(&text, &other) - 0.5).abs() < 1e-7);
    assert_eq!(ratio(&text[..2_000], &text[..2_000]), 1.0);
}
