//! Several reports beside each other.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::{Path, PathBuf};

use lexico_eval::report::Report;
use lexico_eval::report::overview::Overview;
use serde_json::{Value, json};

/// A run as an evaluation's results have it.
fn run(cache: &str, family: &str, share: f64, score: f64) -> Value {
    json!({
        "cache": cache, "method": family, "family": family, "share": share, "score": score, "low": null, "high": null,
        "percentile_99": 2.0 * score, "percentile_99.9": 3.0 * score, "agreement": 1.0 - score, "seconds": 1.0,
        "items": [],
    })
}

/// Writes a report of the divergence of some caches from full.
fn report(
    folder: &Path,
    name: &str,
    context: usize,
    dictionaries: &str,
    runs: &[Value],
) -> PathBuf {
    let path = folder.join(name);
    std::fs::create_dir(&path).unwrap();
    let full = run("full", "full", 1.0, 0.0);
    let runs: Vec<&Value> = std::iter::once(&full).chain(runs).collect();
    let results = json!({
        "task": "divergence", "model": "M", "measure": "divergence", "versions": {}, "seeds": {}, "skipped": [],
        "settings": {
            "context": context, "texts": ["a"], "tokens_crc32": "0", "threads": 2, "caches": [name],
            "dictionaries_crc32": dictionaries,
        },
        "runs": runs,
    });
    std::fs::write(path.join("results.json"), results.to_string()).unwrap();
    path
}

#[test]
fn trainings_are_spread_and_rivals_counted_once() {
    let folder = tempfile::tempdir().unwrap();
    let kivi = run("kivi:bits=2", "kivi", 0.22, 0.15);
    let of = |score: f64| run("lexico:sparsity=8", "lexico", 0.12, score);
    let reports = [(0.05, "1"), (0.03, "2"), (0.04, "3")].map(|(score, dictionaries)| {
        let runs = [kivi.clone(), of(score)];
        report(folder.path(), dictionaries, 1024, dictionaries, &runs)
    });
    let longer = report(folder.path(), "4", 4096, "1", &[of(0.06)]);
    let overview = Overview::read(&[&reports[..], &[longer]].concat()).unwrap();
    let [short, long] = &overview.comparisons[..] else {
        panic!("{overview:?}");
    };
    assert_eq!(short.title(), "divergence, M; context 1024; texts a");
    assert_eq!(long.caches[0].outcomes.len(), 1);
    let (header, rows) = short.table();
    let columns = [
        "cache",
        "of FP16",
        "KL divergence",
        "least",
        "most",
        "trainings",
        "99.9th",
        "same token",
    ];
    assert_eq!(header, columns);
    let lexico = [
        "lexico:sparsity=8",
        "12.0 %",
        "0.04000",
        "0.03000",
        "0.05000",
        "3",
        "0.12000",
        "96.0 %",
    ];
    assert_eq!(rows[0], lexico);
    let kivi = [
        "kivi:bits=2",
        "22.0 %",
        "0.15000",
        "",
        "",
        "1",
        "0.45000",
        "85.0 %",
    ];
    assert_eq!(rows[1], kivi);
    let page = overview.page().unwrap();
    for text in [&lexico[..], &kivi[..], &["context 4096", "<svg"]].concat() {
        assert!(page.contains(text), "{text} is not in {page}");
    }
    // A panel for each comparison, and both methods in the legend.
    assert_eq!(overview.plot().matches("divergence, M").count(), 2);
    assert!(overview.plot().contains(">kivi<"));
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |reports: &[PathBuf]| Overview::read(reports).unwrap_err().to_string();
    let of = |score: f64| [run("lexico", "lexico", 0.12, score)];
    let first = report(folder.path(), "first", 1024, "1", &of(0.05));
    let same = report(folder.path(), "same", 1024, "1", &of(0.04));
    let error = refused(&[first.clone(), same]);
    assert!(
        error.contains("another outcome of lexico") && error.contains("same dictionaries"),
        "{error}"
    );
    // The same report twice says nothing new.
    assert_eq!(
        Overview::read(&[first.clone(), first.clone()])
            .unwrap()
            .comparisons
            .len(),
        1
    );
    let error = refused(&[folder.path().join("nowhere")]);
    assert!(error.contains("results.json"), "{error}");
    for (name, text) in [
        ("empty", ""),
        ("list", "[]"),
        ("other", r#"{"task": "divergence"}"#),
    ] {
        let path = folder.path().join(name);
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("results.json"), text).unwrap();
        let error = refused(&[path]);
        assert!(error.contains("no results of `lexico eval`"), "{error}");
    }
    let other = report(folder.path(), "other text", 1024, "2", &of(0.04));
    let changed = std::fs::read_to_string(other.join("results.json")).unwrap();
    let changed = changed.replacen("\"score\":0.0", "\"score\":0.5", 1);
    std::fs::write(other.join("results.json"), changed).unwrap();
    let error = refused(&[first, other]);
    assert!(
        error.contains("the full cache scores 0.5 here and 0 in"),
        "{error}"
    );
}
