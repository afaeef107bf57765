//! Learning dictionaries of the tiny model from a little text.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::ops::ControlFlow;

use lexico::dictionary::CodingLosses;
use lexico::learn::{CodebookOptions, LearnOptions};
use lexico_llm::decoder::Logits;
use lexico_llm::train::{StateOptions, TrainOptions, TrainProgress, train};
use lexico_llm::{Corpus, Error, Model};

fn corpus() -> Corpus {
    let sentence = |i: usize| {
        format!(
            "In the year {i} the lobster of the north had {} eggs. ",
            i * 7
        )
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lobsters.json");
    let text: String = (0..60).map(sentence).collect();
    // A list of JSON is read as it is opened.
    let list = serde_json::json!([{"text": text}]);
    std::fs::write(&path, list.to_string()).unwrap();
    Corpus::open(&[path], None, false).unwrap()
}

fn options() -> TrainOptions {
    TrainOptions {
        tokens: 2000,
        context: 128,
        vectors: 1500,
        sparse: true,
        learn: LearnOptions {
            atoms: 96,
            sparsity: 4,
            epochs: 4,
            batch: 128,
            ..LearnOptions::default()
        },
        codebooks: Some(CodebookOptions {
            first: 64,
            codebooks: 2,
            sparsity: 2,
            ..CodebookOptions::default()
        }),
        ..TrainOptions::default()
    }
}

/// The losses of all heads together at the sparsity of this place.
fn of_all_heads(losses: &CodingLosses, place: usize) -> f32 {
    let layers = losses.layers.iter();
    let heads = layers.flat_map(|layer| layer.keys.iter().chain(&layer.values));
    heads.map(|head| head[place]).sum()
}

#[test]
fn learns_saves_and_serves() {
    let mut model = Model::tiny().unwrap();
    let (mut learned, mut learned_codebooks) = (0, 0);
    let (mut read, mut measured) = ((0, 0), (0, 0));
    let trained = train(&model, &corpus(), &options(), &mut |progress| {
        match progress {
            TrainProgress::Reading { tokens, total } => read = (tokens, total),
            TrainProgress::Learned { .. } => learned += 1,
            TrainProgress::LearnedCodebooks { .. } => learned_codebooks += 1,
            TrainProgress::Learning { .. }
            | TrainProgress::LearningCodebooks { .. }
            | TrainProgress::Weighing { .. } => {}
            TrainProgress::Measuring { done, total } => measured = (done, total),
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((learned, learned_codebooks), (8, 8));
    assert_eq!(read.0, read.1);
    assert!(measured.0 > 0 && measured.0 == measured.1);
    let training = &trained.dictionaries.training;
    assert_eq!((training.sparsity, training.tokens), (4, read.0));
    let additive = training.additive_relative_error.as_ref().unwrap();
    assert_eq!((training.relative_error.len(), additive.len()), (4, 4));
    for (l, errors) in training.relative_error.iter().chain(additive).enumerate() {
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
    let losses = training.losses.as_ref().unwrap();
    assert_eq!(losses.layers.len(), 4);
    for layer in &losses.layers {
        for head in layer.keys.iter().chain(&layer.values) {
            // One atom hurts, sixteen by far less, whatever the head.
            assert!(head[0] > 0.0 && head[5] < 0.5 * head[0], "{losses:?}");
        }
    }
    assert!(of_all_heads(losses, 5) < 0.2 * of_all_heads(losses, 0));
    let losses = training.additive_losses.as_ref().unwrap();
    assert_eq!(losses.sparsities, [1, 2]);
    for layer in &losses.layers {
        let mut heads = layer.keys.iter().chain(&layer.values);
        assert!(heads.all(|head| head[0] > 0.0), "{losses:?}");
    }
    assert!(of_all_heads(losses, 1) < of_all_heads(losses, 0));
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

/// Reads a text with the caches of these dictionaries; how far the predictions are from those of the full cache.
fn divergence(model: &mut Model, dictionaries: lexico::DictionarySet, spec: &str) -> f64 {
    model.set_dictionaries(dictionaries).unwrap();
    let text = "In the year 12 the lobster of the north had 84 eggs. ".repeat(4);
    let tokens = model.tokenizer.encode_first(&text).unwrap();
    let (prompt, rest) = tokens.split_at(tokens.len() / 2);
    let logits = |spec: &str| -> Vec<Vec<f32>> {
        let mut cache = model.cache(&spec.parse().unwrap()).unwrap();
        let mut read = |tokens: &[u32]| -> Vec<f32> {
            let logits = model.decoder.forward_one(tokens, &mut *cache, Logits::Last);
            let logits = candle_nn::ops::log_softmax(&logits.unwrap(), 1).unwrap();
            logits.flatten_all().unwrap().to_vec1().unwrap()
        };
        // A prompt in two pieces, and then token after token.
        read(&prompt[..10]);
        read(&prompt[10..]);
        rest.chunks(1).map(read).collect()
    };
    let (full, coded) = (logits("full:dense=f32"), logits(spec));
    let rows = full.iter().zip(&coded);
    let terms = rows.flat_map(|(p, q)| p.iter().zip(q));
    let sum: f64 = terms.map(|(&p, &q)| f64::from(p.exp() * (p - q))).sum();
    sum / full.len() as f64
}

#[test]
fn heads_and_layers_are_coded_together() {
    let mut model = Model::tiny().unwrap();
    let options = TrainOptions {
        sparse: false,
        ..options()
    };
    let learned = |options: &TrainOptions| {
        let mut weighed = false;
        let trained = train(&model, &corpus(), options, &mut |progress| {
            weighed |= matches!(progress, TrainProgress::Weighing { .. });
            ControlFlow::Continue(())
        });
        let joint = options.joint_heads * options.joint_layers > 1;
        assert_eq!(weighed, joint);
        let trained = trained.unwrap();
        assert_eq!(trained.attention.len(), 4);
        trained.dictionaries
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.safetensors");
    let mut all = Vec::new();
    for (heads, layers) in [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4)] {
        let options = TrainOptions {
            joint_heads: heads,
            joint_layers: layers,
            ..options.clone()
        };
        let set = learned(&options);
        assert_eq!(set.layers.len(), 4 / layers);
        set.save(&path).unwrap();
        let back = lexico::DictionarySet::load(&path).unwrap();
        assert_eq!(back, set);
        let joint = back.joint();
        assert_eq!(
            (joint.heads, joint.layers, joint.kv_heads),
            (heads, layers, 2)
        );
        let losses = set.training.additive_losses.as_ref();
        assert!(losses.is_none_or(|l| l.layers.len() == 4 / layers));
        all.push(set);
    }
    for set in all {
        let joint = set.joint();
        // Everything dense: as the full cache.
        let dense = divergence(&mut model, set.clone(), "lexico:window=500,dense=f32");
        assert!(dense.abs() < 1e-4, "{joint:?}: {dense}");
        let coded = divergence(
            &mut model,
            set,
            "lexico:window=4,batch=2,sinks=2,sparsity=2",
        );
        assert!(coded > 1e-5 && coded < 1.5, "{joint:?}: {coded}");
    }
}

#[test]
fn what_cannot_be_coded_together_is_refused() {
    let model = Model::tiny().unwrap();
    let config = model.decoder.config();
    let with = |heads, layers, sparse| TrainOptions {
        joint_heads: heads,
        joint_layers: layers,
        sparse,
        ..options()
    };
    for (options, words) in [
        (with(0, 1, false), "2 KV heads"),
        (with(3, 1, false), "3 heads together"),
        (with(1, 0, false), "4 layers"),
        (with(1, 3, false), "3 layers together"),
        (with(1, 2, true), "sparse codes"),
    ] {
        let refused = options.check(config).unwrap_err().to_string();
        assert!(refused.contains(words), "{refused}");
    }
    assert!(with(2, 2, false).check(config).is_ok());
    assert!(with(2, 1, true).check(config).is_ok());
}

#[test]
fn codebooks_are_added_to_dictionaries_that_are_kept() {
    let model = Model::tiny().unwrap();
    let whole = train(&model, &corpus(), &options(), &mut |_| {
        ControlFlow::Continue(())
    });
    let whole = whole.unwrap().dictionaries;
    let mut plain = whole.clone();
    plain.training.additive_relative_error = None;
    plain.training.additive_losses = None;
    plain
        .layers
        .iter_mut()
        .for_each(|layer| layer.codebooks = None);
    let mut with_kept = TrainOptions {
        kept: Some(plain.clone()),
        ..options()
    };
    let added = train(&model, &corpus(), &with_kept, &mut |progress| {
        assert!(!matches!(progress, TrainProgress::Learning { .. }));
        ControlFlow::Continue(())
    });
    assert_eq!(added.unwrap().dictionaries, whole);
    with_kept.codebooks = None;
    let nothing = train(&model, &corpus(), &with_kept, &mut |_| {
        ControlFlow::Continue(())
    });
    assert!(
        nothing
            .unwrap_err()
            .to_string()
            .contains("nothing to learn")
    );
    let mut other = plain;
    other.model.layers = 5;
    let options = TrainOptions {
        kept: Some(other),
        ..options()
    };
    let refused = train(&model, &corpus(), &options, &mut |_| {
        ControlFlow::Continue(())
    });
    assert!(matches!(
        refused,
        Err(Error::Codec(lexico::Error::OtherModel(_)))
    ));
}

#[test]
fn stops_when_asked() {
    let model = Model::tiny().unwrap();
    let mut calls = 0;
    let stopped = train(&model, &corpus(), &options(), &mut |_| {
        calls += 1;
        if calls >= 20 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    assert!(matches!(
        stopped,
        Err(Error::Codec(lexico::Error::Interrupted))
    ));
    // Every dictionary that was at work has asked once more.
    assert!((20..40).contains(&calls), "{calls}");
}

#[test]
fn more_atoms_than_vectors_are_refused() {
    let model = Model::tiny().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let state = StateOptions {
        folder: folder.path().join("state"),
        ..StateOptions::default()
    };
    let mut many = options();
    many.learn.atoms = 4000;
    many.state = Some(state.clone());
    // As the settings show, and as the text shows.
    for (vectors, word) in [(3999, "there are 3999"), (5000, "4000 atoms need")] {
        many.vectors = vectors;
        let error = train(&model, &corpus(), &many, &mut |_| ControlFlow::Continue(()));
        let error = error.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert!(!state.folder.exists());
    }
}
