//! Learning dictionaries of the tiny model from a little text.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::ops::ControlFlow;

use lexico::learn::LearnOptions;
use lexico_llm::train::{Corpus, TrainOptions, TrainProgress, train};
use lexico_llm::{Error, Model};

fn corpus() -> Vec<Corpus> {
    let sentence = |i: usize| {
        format!(
            "In the year {i} the lobster of the north had {} eggs. ",
            i * 7
        )
    };
    vec![Corpus {
        name: "lobsters".to_owned(),
        text: (0..60).map(sentence).collect(),
    }]
}

fn options() -> TrainOptions {
    TrainOptions {
        tokens: 2000,
        context: 128,
        vectors: 1500,
        learn: LearnOptions {
            atoms: 96,
            sparsity: 4,
            epochs: 4,
            batch: 128,
            ..LearnOptions::default()
        },
    }
}

#[test]
fn learns_saves_and_serves() {
    let mut model = Model::tiny().unwrap();
    let mut learned = 0;
    let mut read = (0, 0);
    let trained = train(&model, &corpus(), &options(), &mut |progress| {
        match progress {
            TrainProgress::Reading { tokens, total } => read = (tokens, total),
            TrainProgress::Learned { .. } => learned += 1,
            TrainProgress::Learning { .. } => {}
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(learned, 8);
    assert_eq!(read.0, read.1);
    let training = &trained.dictionaries.training;
    assert_eq!((training.sparsity, training.tokens), (4, read.0));
    for (l, errors) in training.relative_error.iter().enumerate() {
        assert!(
            errors.keys > 0.0 && errors.keys < 0.7,
            "layer {l}: keys {}",
            errors.keys
        );
        assert!(
            errors.values > 0.0 && errors.values < 0.7,
            "layer {l}: values {}",
            errors.values
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.safetensors");
    trained.dictionaries.save(&path).unwrap();
    model
        .set_dictionaries(lexico::DictionarySet::load(&path).unwrap())
        .unwrap();
    model.cache(&"lexico:window=4".parse().unwrap()).unwrap();

    let again = train(&model, &corpus(), &options(), &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(
        again.dictionaries, trained.dictionaries,
        "the same seed, the same dictionaries"
    );
}

#[test]
fn stops_when_asked() {
    let model = Model::tiny().unwrap();
    let mut calls = 0;
    let stopped = train(&model, &corpus(), &options(), &mut |_| {
        calls += 1;
        if calls == 20 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    assert!(matches!(
        stopped,
        Err(Error::Codec(lexico::Error::Interrupted))
    ));
    assert_eq!(calls, 20);
}

#[test]
fn texts_that_cannot_serve_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        Corpus::read(&path, "text")
            .map(|c| c.text)
            .map_err(|e| e.to_string())
    };
    assert_eq!(
        write("a.jsonl", b"{\"text\": \"one\"}\n\n{\"text\": \"two\"}\n").unwrap(),
        "one\n\ntwo"
    );
    for (name, bytes, word) in [
        ("empty.txt", &b""[..], "no text"),
        ("blank.txt", b" \n\n", "no text"),
        ("binary.txt", b"abc\xff\xfe", "byte 3"),
        ("b.jsonl", b"{\"text\": \"one\"}\nnot json\n", "line 2"),
        ("c.jsonl", b"{\"body\": \"one\"}\n", "--field"),
        ("d.jsonl", b"{\"text\": 3}\n", "\"text\""),
    ] {
        let message = write(name, bytes).unwrap_err();
        assert!(
            message.contains(word) && message.contains(name),
            "{message:?}"
        );
    }
    let model = Model::tiny().unwrap();
    let short = [Corpus {
        name: "short".to_owned(),
        text: "one word".to_owned(),
    }];
    let error = train(&model, &short, &options(), &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap_err();
    assert!(error.to_string().contains("too little text"), "{error}");
    let mut many = options();
    many.learn.atoms = 4000;
    let error = train(&model, &corpus(), &many, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().contains("4000 atoms"), "{error}");
}
