//! Folders of published dictionaries: they come back as they were, and every way in which one can lie has its error.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

mod common;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use common::{FAMILIES, family_folder};
use lexico::DictionarySet;
use lexico_llm::published::{CARD, INDEX, Index, Publication, Source};
use lexico_llm::shape::dictionaries;
use lexico_llm::{Model, Quantize};
use serde_json::{Value, json};

fn tiny() -> &'static Model {
    static TINY: OnceLock<Model> = OnceLock::new();
    TINY.get_or_init(|| Model::tiny().unwrap())
}

/// Small dictionaries of the embedded model, as if learned from so many tokens.
fn small(tokens: usize, change: impl FnOnce(&mut DictionarySet)) -> DictionarySet {
    let set = dictionaries(tiny().decoder.config(), 64, 4).unwrap();
    let mut set = Arc::unwrap_or_clone(set);
    set.training.tokens = tokens;
    set.training.corpus = vec!["text.txt".to_owned()];
    set.training.tool = "a test".to_owned();
    change(&mut set);
    set
}

/// Publishes dictionaries of the embedded model; returns the file's name.
fn publish(set: &DictionarySet, folder: &Path) -> String {
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("set.safetensors");
    set.save(&file).unwrap();
    let publication = Publication::open(folder, tiny(), None, None).unwrap();
    publication.add(&file, None).unwrap().file
}

fn load(place: &Path) -> Result<DictionarySet, String> {
    let source = Source::of(place).unwrap().unwrap();
    source.load(tiny(), false).map_err(|e| e.to_string())
}

fn index(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join(INDEX)).unwrap()).unwrap()
}

fn with_effort(name: &'static str) -> impl FnOnce(&mut DictionarySet) {
    move |set| set.training.effort = Some(name.to_owned())
}

/// The fingerprint is of the model, whatever file it comes from and however its matrices are held.
#[test]
fn every_file_of_a_model_has_its_fingerprint() {
    let mut all = Vec::new();
    for family in FAMILIES {
        let folder = family_folder(family);
        let of = |file: &str, quantize| {
            let model = Model::load(&folder.join(file), quantize).unwrap();
            model.weights_fingerprint().unwrap()
        };
        let own = of("", Quantize::None);
        assert_eq!(own.len(), 16);
        assert_eq!(of("", Quantize::Q8_0), own, "{family}");
        assert_eq!(of("f16.gguf", Quantize::None), own, "{family}");
        assert_eq!(of("q8_0.gguf", Quantize::None), own, "{family}");
        all.push(own);
    }
    all.push(tiny().weights_fingerprint().unwrap());
    let count = all.len();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), count, "models that differ");
}

#[test]
fn what_is_published_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("new");
    let set = small(100, |_| {});
    assert_eq!(publish(&set, &folder), "tiny.safetensors");
    assert_eq!(load(&folder).unwrap(), set);
    let own = &index(&folder)["dictionaries"][0];
    let bytes = std::fs::read(folder.join("tiny.safetensors")).unwrap();
    assert_eq!(own["size"], bytes.len());
    assert_eq!(own["model"]["layers"], 4);
    assert_eq!(own["sparse_atoms"], 64);
    assert_eq!(own["learned"]["tokens"], 100);

    // Other efforts lie beside it, and what learned from the most text is taken.
    let quick = small(50, with_effort("quick"));
    assert_eq!(publish(&quick, &folder), "tiny-quick.safetensors");
    assert_eq!(load(&folder).unwrap(), set);
    let normal = small(200, with_effort("normal"));
    assert_eq!(publish(&normal, &folder), "tiny-normal.safetensors");
    assert_eq!(load(&folder).unwrap(), normal);
    // The same again replaces it.
    let again = small(300, with_effort("normal"));
    publish(&again, &folder);
    assert_eq!(load(&folder).unwrap(), again);
    assert_eq!(index(&folder)["dictionaries"].as_array().unwrap().len(), 3);
    let card = std::fs::read_to_string(folder.join(CARD)).unwrap();
    for file in [
        "tiny.safetensors",
        "tiny-quick.safetensors",
        "tiny-normal.safetensors",
    ] {
        assert!(card.contains(&format!("## {file}\n")), "{card}");
    }
    // Nothing else is left behind.
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 5);

    // Codebooks serve the default codes, however many tokens the others have read.
    let file = family_folder("").join("../../../../../models/tiny/dictionary.safetensors");
    let publication =
        Publication::open(&folder, tiny(), Some("mit"), Some("org/Other-GGUF")).unwrap();
    let own = publication.add(&file, Some(12.4)).unwrap();
    assert_eq!(own.file, "Other.safetensors");
    assert!(own.codebooks > 0 && own.measured.unwrap().losses.len() == 4);
    assert_eq!(
        &load(&folder).unwrap(),
        tiny().dictionaries.as_deref().unwrap()
    );
    let json = index(&folder);
    assert_eq!(json["license"], "mit");
    // The license stays where none is named.
    publish(&set, &folder);
    assert_eq!(index(&folder)["license"], "mit");
}

#[test]
fn a_folder_that_cannot_be_published_in_is_refused_before_anything_is_learned() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |folder: &Path, license: Option<&str>, base: Option<&str>| {
        let opened = Publication::open(folder, tiny(), license, base);
        opened.err().map(|e| e.to_string()).unwrap_or_default()
    };
    let path = folder.path();
    let message = refused(path, Some("a license\nbase_model: x/y"), None);
    assert!(
        message.contains("license") && !message.contains('\n'),
        "{message}"
    );
    for name in [
        "tiny",
        "org/name/file.gguf",
        "org/name@v2",
        "a b/c",
        "org/name\nx",
    ] {
        let message = refused(path, None, Some(name));
        assert!(message.contains("ORG/NAME"), "{message}");
    }
    // A model's own folder, with its own card.
    std::fs::write(path.join(CARD), "a card").unwrap();
    let message = refused(path, None, None);
    assert!(
        message.contains(CARD) && message.contains(INDEX),
        "{message}"
    );
    assert_eq!(std::fs::read(path.join(CARD)).unwrap(), b"a card");
    let message = refused(&path.join(CARD), None, None);
    assert!(message.contains(CARD), "{message}");
}

#[test]
fn dictionaries_are_not_published_as_those_of_another_model() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("set.safetensors");
    let out = folder.path().join("out");
    let add = |set: &DictionarySet| {
        set.save(&file).unwrap();
        let publication = Publication::open(&out, tiny(), None, None).unwrap();
        publication.add(&file, None).map_err(|e| e.to_string())
    };
    let message = add(&small(1, |set| {
        set.training.model_fingerprint = Some("0".repeat(16))
    }));
    let message = message.unwrap_err();
    let own = tiny().weights_fingerprint().unwrap();
    assert!(
        message.contains(&own) && message.contains(&"0".repeat(16)),
        "{message}"
    );
    let message = add(&small(1, |set| set.model.architecture = "Other".to_owned())).unwrap_err();
    assert!(message.contains("architecture Other"), "{message}");
    add(&small(1, |set| set.training.model_fingerprint = Some(own))).unwrap();

    // A file of that name is not replaced unless the index has it as this model's.
    let mut json = index(&out);
    json["dictionaries"][0]["fingerprint"] = "0".repeat(16).into();
    std::fs::write(out.join(INDEX), json.to_string()).unwrap();
    let message = add(&small(1, |_| {})).unwrap_err();
    assert!(message.contains("another model"), "{message}");
    json["dictionaries"] = json!([]);
    std::fs::write(out.join(INDEX), json.to_string()).unwrap();
    let message = add(&small(1, |_| {})).unwrap_err();
    assert!(message.contains("does not name it"), "{message}");
    // It itself may be.
    let publication = Publication::open(&out, tiny(), None, None).unwrap();
    publication
        .add(&out.join("tiny.safetensors"), None)
        .unwrap();
    load(&out).unwrap();
}

/// Each lie about a folder, what it does to the index, and what the error names.
#[test]
fn a_folder_that_lies_is_refused_by_its_lie() {
    let whole = tempfile::tempdir().unwrap();
    publish(&small(100, |_| {}), whole.path());
    let sound = index(whole.path());
    let zeros = "0".repeat(64);
    type Lie<'a> = (&'a str, &'a dyn Fn(&mut Value), &'a [&'a str]);
    let own = |json: &mut Value, key: &str, value: Value| json["dictionaries"][0][key] = value;
    let lies: [Lie; 21] = [
        (
            "fingerprint",
            &|j| own(j, "fingerprint", zeros[..16].into()),
            &["tiny", "0000000000000000", "lexico train", "--dictionary"],
        ),
        (
            "fingerprint that is none",
            &|j| own(j, "fingerprint", "../x".into()),
            &["dictionaries[0].fingerprint"],
        ),
        (
            "digest",
            &|j| own(j, "sha256", zeros.clone().into()),
            &["SHA-256", &zeros, "publish it again"],
        ),
        (
            "digest that is none",
            &|j| own(j, "sha256", "xyz".into()),
            &["dictionaries[0].sha256", "64"],
        ),
        (
            "digest as a number",
            &|j| own(j, "sha256", 7.into()),
            &["dictionaries[0].sha256"],
        ),
        ("size", &|j| own(j, "size", 7.into()), &["bytes", "says 7"]),
        (
            "size below zero",
            &|j| own(j, "size", (-7).into()),
            &["dictionaries[0].size"],
        ),
        (
            "size beyond numbers",
            &|j| own(j, "size", json!(1e300)),
            &["dictionaries[0].size"],
        ),
        (
            "size of all",
            &|j| own(j, "size", u64::MAX.into()),
            &["bytes", "18446744073709551615"],
        ),
        (
            "path up",
            &|j| own(j, "file", "../tiny.safetensors".into()),
            &["dictionaries[0].file", "../tiny"],
        ),
        (
            "path down",
            &|j| own(j, "file", "a/tiny.safetensors".into()),
            &["dictionaries[0].file"],
        ),
        (
            "path from the root",
            &|j| own(j, "file", "/tiny.safetensors".into()),
            &["dictionaries[0].file"],
        ),
        (
            "path of Windows",
            &|j| own(j, "file", "a\\tiny.safetensors".into()),
            &["dictionaries[0].file"],
        ),
        (
            "hidden file",
            &|j| own(j, "file", ".safetensors".into()),
            &["dictionaries[0].file"],
        ),
        (
            "other kind of file",
            &|j| own(j, "file", "README.md".into()),
            &["dictionaries[0].file"],
        ),
        (
            "file that steers",
            &|j| own(j, "file", "\u{1b}[2J.safetensors".into()),
            &["dictionaries[0].file", "\\u{1b}"],
        ),
        (
            "long name",
            &|j| {
                own(
                    j,
                    "file",
                    (format!("{}.safetensors", "x".repeat(1 << 16))).into(),
                )
            },
            &["dictionaries[0].file"],
        ),
        (
            "missing file",
            &|j| own(j, "file", "other.safetensors".into()),
            &["no other.safetensors"],
        ),
        (
            "shape",
            &|j| j["dictionaries"][0]["model"]["layers"] = 5.into(),
            &["tiny.safetensors", "layers 5"],
        ),
        (
            "format",
            &|j| j["format"] = "lexico-published/2".into(),
            &["lexico-published/2", "lexico-published/1"],
        ),
        (
            "base model",
            &|j| own(j, "base_model", "a/b\nlicense: x".into()),
            &["dictionaries[0].base_model"],
        ),
    ];
    let index_is = |folder: &Path, bytes: &[u8]| {
        for file in std::fs::read_dir(whole.path()).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
        std::fs::write(folder.join(INDEX), bytes).unwrap();
    };
    let refused = |name: &str, folder: &Path, wanted: &[&str]| {
        let message = load(folder).unwrap_err();
        for word in wanted {
            assert!(message.contains(word), "{name}: {word} in {message}");
        }
        assert!(
            message.len() < 4000 && !message.contains(['\u{1b}', '\n']),
            "{name}: {message}"
        );
    };
    for (name, lie, wanted) in lies {
        let folder = tempfile::tempdir().unwrap();
        let mut json = sound.clone();
        lie(&mut json);
        index_is(folder.path(), json.to_string().as_bytes());
        refused(name, folder.path(), wanted);
    }
    let large = format!("{sound}{}", " ".repeat(1 << 20));
    let text = sound.to_string();
    let deep = "[".repeat(10_000);
    let none =
        json!({"format": "lexico-published/1", "license": "mit", "dictionaries": []}).to_string();
    let bytes: [(&str, &[u8], &[&str]); 8] = [
        (
            "list",
            b"[\"lexico-published/1\", \"mit\", []]",
            &["no JSON object"],
        ),
        ("text", b"\"lexico\"", &["no JSON object"]),
        ("nothing", b"", &["no JSON object"]),
        ("cut", &text.as_bytes()[..100], &[INDEX, "EOF"]),
        ("deep", deep.as_bytes(), &["no JSON object"]),
        ("large", large.as_bytes(), &["1048576 bytes"]),
        ("empty", none.as_bytes(), &["it names none"]),
        ("no UTF-8", b"{\"format\": \"\xff\"}", &[INDEX]),
    ];
    for (name, bytes, wanted) in bytes {
        let folder = tempfile::tempdir().unwrap();
        index_is(folder.path(), bytes);
        refused(name, folder.path(), wanted);
    }

    // The index is sound, and the file is not.
    type Damage<'a> = (&'a str, &'a dyn Fn(&mut Vec<u8>), &'a [&'a str]);
    let files: [Damage; 3] = [
        ("truncated", &|b| b.truncate(100), &["it has 100 bytes"]),
        ("empty", &|b| b.clear(), &["it has 0 bytes"]),
        ("changed", &|b| *b.last_mut().unwrap() ^= 1, &["SHA-256"]),
    ];
    for (name, lie, wanted) in files {
        let folder = tempfile::tempdir().unwrap();
        index_is(folder.path(), sound.to_string().as_bytes());
        let path = folder.path().join("tiny.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        lie(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        refused(name, folder.path(), wanted);
    }

    // The file was learned for another model than the index says.
    let folder = tempfile::tempdir().unwrap();
    publish(&small(100, |_| {}), folder.path());
    let other = small(100, |set| {
        set.training.model_fingerprint = Some("f".repeat(16))
    });
    let path = folder.path().join("tiny.safetensors");
    other.save(&path).unwrap();
    let mut json = index(folder.path());
    own(
        &mut json,
        "size",
        std::fs::metadata(&path).unwrap().len().into(),
    );
    own(&mut json, "sha256", sha256(&path).into());
    std::fs::write(folder.path().join(INDEX), json.to_string()).unwrap();
    refused(
        "other model",
        folder.path(),
        &["ffffffffffffffff", "publish it again"],
    );
}

fn sha256(path: &Path) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(std::fs::read(path).unwrap());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_place_is_a_folder_or_a_name_on_the_hub() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(
        Source::of(folder.path()).unwrap(),
        Some(Source::Folder(folder.path().to_owned()))
    );
    assert_eq!(Source::of(Path::new("a.safetensors")).unwrap(), None);
    assert!(matches!(
        Source::of(Path::new("hf://org/name-lexico@v2")),
        Ok(Some(Source::Hub(_)))
    ));
    for name in [
        "hf://org",
        "hf:org/name",
        "hf://datasets/org/name",
        "hf://org/a/../b",
    ] {
        let message = Source::of(Path::new(name)).unwrap_err().to_string();
        assert!(message.contains("hf://OWNER/NAME"), "{message}");
    }
    let message = load(folder.path()).unwrap_err();
    assert!(
        message.contains(INDEX) && message.contains("lexico publish"),
        "{message}"
    );
}

/// The card of two dictionaries, one with all that can be known of it and one with as little as can be; LEXICO_WRITE_CARD
/// in the environment writes it anew.
#[test]
fn the_card_reads_as_it_should() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/published_card.md");
    let model = json!({
        "name": "HuggingFaceTB/SmolLM2-135M-Instruct", "architecture": "LlamaForCausalLM", "layers": 30,
        "kv_heads": 3, "head_dim": 64, "rotary": {"kind": "default", "theta": 100_000.0},
    });
    let index: Index = serde_json::from_value(json!({
        "format": "lexico-published/1", "license": "apache-2.0",
        "dictionaries": [
            {
                "file": "SmolLM2-135M-Instruct-normal.safetensors", "size": 45_613_056, "sha256": "ab".repeat(32),
                "fingerprint": "0123456789abcdef", "model": model, "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
                "codebooks": 32, "first_atoms": 2048, "maps": true, "sparse_atoms": 0, "memory": 91_000_000,
                "learned": {
                    "corpus": ["hf://datasets/Salesforce/wikitext@b08601e/wikitext-103-raw-v1/validation-*.parquet (text)"],
                    "tokens": 98_304, "tokens_crc32": "89abcdef", "vectors": 131_072, "effort": "normal", "seed": 0,
                    "seconds": 1234.5, "tool": "lexico 0.1.0",
                },
                "measured": {
                    "sparsity": 12, "relative_error": {"keys": 0.1234, "values": 0.25},
                    "losses": [[8, 0.0625], [12, 0.03125], [24, 0.0078]],
                },
            },
            {
                "file": "other.safetensors", "size": 1000, "sha256": "cd".repeat(32),
                "fingerprint": "fedcba9876543210", "model": model, "codebooks": 0, "first_atoms": 0, "maps": false,
                "sparse_atoms": 4096, "memory": 2000,
                "learned": {"corpus": ["imported from a|b`<c>\n# x.pt"], "tokens": 0, "tool": "lexico 0.1.0 (import)"},
            },
        ],
    }))
    .unwrap();
    let card = index.card();
    if std::env::var_os("LEXICO_WRITE_CARD").is_some() {
        std::fs::write(&path, &card).unwrap();
    }
    assert_eq!(card, std::fs::read_to_string(path).unwrap());
}

/// A folder's path may be anything.
#[test]
fn folders_of_any_name_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let folder: PathBuf = folder.path().join("hf:").join("a b é");
    publish(&small(10, |_| {}), &folder);
    load(&folder).unwrap();
}
