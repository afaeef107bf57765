//! Texts of every format as chunks: each text once, from everywhere where not all is read, and a word
//! about what cannot be read.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use lexico_llm::{Corpus, Model, Tokenizer};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const CONTEXT: usize = 64;

fn tokenizer() -> Tokenizer {
    Model::tiny().unwrap().tokenizer
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/parquet")
        .join(name)
}

fn row(i: usize) -> String {
    format!("Row {i} is of the lobster, which had {} eggs.\n", 7 * i)
}

/// The rows of `rows` as a file of this extension.
fn write(folder: &Path, extension: &str, rows: impl Iterator<Item = usize>) -> PathBuf {
    let path = folder.join(format!("rows.{extension}"));
    let objects = rows.map(|i| serde_json::json!({"id": i, "text": row(i), "tags": ["a"]}));
    let objects: Vec<serde_json::Value> = objects.collect();
    let line = |object: &serde_json::Value| match extension {
        "txt" => object["text"].as_str().unwrap().to_owned(),
        _ => format!("{object}\n"),
    };
    let text = match extension {
        "json" => serde_json::to_string_pretty(&objects).unwrap(),
        _ => objects.iter().map(line).collect(),
    };
    std::fs::write(&path, text).unwrap();
    path
}

fn open(inputs: &[&Path]) -> Corpus {
    Corpus::open(inputs, None, false).unwrap()
}

fn chunks(corpus: &Corpus, tokens: usize, seed: u64) -> Vec<Vec<u32>> {
    let tokenizer = tokenizer();
    let chunks = corpus.chunks(&tokenizer, CONTEXT, tokens, seed);
    chunks.unwrap().map(Result::unwrap).collect()
}

/// The text of all chunks.
fn text(chunks: &[Vec<u32>]) -> String {
    let tokenizer = tokenizer();
    let begin = tokenizer.encode_first("").unwrap();
    let bodies = chunks.iter().map(|w| w.strip_prefix(&begin[..]).unwrap());
    tokenizer
        .decode(&bodies.collect::<Vec<_>>().concat())
        .unwrap()
}

/// The numbers of the rows in a text.
fn rows(text: &str) -> Vec<usize> {
    let numbers = text.split("Row ").skip(1);
    let number = |rest: &str| rest.split_once(" is of")?.0.parse().ok();
    numbers.filter_map(number).collect()
}

fn refusal(input: &Path, field: Option<&str>) -> String {
    let corpus = Corpus::open(&[input], field, false);
    let error = corpus.err().map(|e| e.to_string());
    error.unwrap_or_else(|| panic!("{} was taken", input.display()))
}

#[test]
fn a_text_that_fits_is_cut_as_it_stands() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "txt", 0..500);
    let tokenizer = tokenizer();
    let begin = tokenizer.encode_first("").unwrap();
    let whole = std::fs::read_to_string(&path).unwrap();
    assert!(whole.len() < 1 << 16, "one piece");
    let tokens = tokenizer.encode_more(&whole).unwrap();
    let bodies = tokens.chunks(CONTEXT - begin.len());
    let expected: Vec<Vec<u32>> = bodies.map(|body| [&begin, body].concat()).collect();
    let corpus = open(&[&path]);
    assert_eq!(corpus.names(), ["rows.txt"]);
    // Blocks of a text that surely fits follow each other; line ends are where they meet.
    let chunks = chunks(&corpus, 1 << 16, 0);
    assert_eq!(chunks.concat(), expected.concat());
}

#[test]
fn every_text_is_read_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut inputs: Vec<(PathBuf, Vec<usize>)> = ["txt", "jsonl", "json"]
        .map(|extension| {
            (
                write(folder.path(), extension, 0..1200),
                (0..1200).collect(),
            )
        })
        .into();
    let present = |i: &usize| i % 50 != 7 && i % 5 != 1;
    for name in ["snappy", "zstd-v2", "gzip"] {
        let path = fixture(&format!("{name}.parquet"));
        inputs.push((path, (0..1200).filter(present).collect()));
    }
    for (path, expected) in &inputs {
        // In order where it surely fits, else in another order.
        for (tokens, in_order) in [(1 << 20, true), (45_000, false)] {
            let chunks = chunks(&open(&[path]), tokens, 3);
            let text = text(&chunks);
            let mut found = rows(&text);
            assert_eq!(found.is_sorted(), in_order, "{}", path.display());
            found.sort_unstable();
            assert_eq!(&found, expected, "{}, {tokens} tokens", path.display());
        }
    }
    let paths: Vec<&Path> = inputs.iter().map(|(path, _)| path.as_path()).collect();
    let all: usize = inputs.iter().map(|(_, rows)| rows.len()).sum();
    assert_eq!(rows(&text(&chunks(&open(&paths), 1 << 22, 0))).len(), all);
}

#[test]
fn a_bounded_run_sees_text_from_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let txt = write(folder.path(), "txt", 0..20_000);
    let jsonl = write(folder.path(), "jsonl", 20_000..40_000);
    let json = write(folder.path(), "json", 40_000..60_000);
    let corpus = open(&[&txt, &jsonl, &json]);
    let tokens = 30_000;
    let drawn = chunks(&corpus, tokens, 1);
    assert_eq!(drawn.len(), tokens / CONTEXT);
    assert!(drawn.iter().all(|chunk| chunk.len() == CONTEXT));
    let seen = rows(&text(&drawn));
    let tenths: BTreeSet<usize> = seen.iter().map(|i| i / 2000).collect();
    assert_eq!(tenths.len(), 30, "{tenths:?}");
    // Also in the first half: a run that is broken off has seen as much.
    let half = rows(&text(&drawn[..drawn.len() / 2]));
    let tenths: BTreeSet<usize> = half.iter().map(|i| i / 2000).collect();
    assert!(tenths.len() > 25, "{tenths:?}");
    let distinct: BTreeSet<usize> = seen.iter().copied().collect();
    assert_eq!(distinct.len(), seen.len(), "no row twice");

    assert_eq!(chunks(&corpus, tokens, 1), drawn);
    assert_eq!(chunks(&open(&[&txt, &jsonl, &json]), tokens, 1), drawn);
    assert_ne!(chunks(&corpus, tokens, 2), drawn);
    let tokenizer = tokenizer();
    // One of nine may be longer, for the same tokens in all.
    for (times, tokens) in [(1, tokens), (4, tokens), (8, tokens), (8, 7 * CONTEXT)] {
        let longer = corpus.chunks_with_longer(&tokenizer, CONTEXT, times, tokens, 1);
        let longer = longer.unwrap();
        let most = longer.total();
        let lengths: Vec<usize> = longer.map(|chunk| chunk.unwrap().len()).collect();
        let (last, whole) = lengths.split_last().unwrap();
        for (number, &length) in whole.iter().enumerate() {
            // What the tokenizer begins a text with, once.
            let begin = tokenizer.encode_first("").unwrap().len();
            let bodies = if number % 9 == 4 { times } else { 1 };
            assert_eq!(length, begin + bodies * (CONTEXT - begin), "{times}");
        }
        let all: usize = lengths.iter().sum();
        assert!(
            all <= most && all <= tokens && *last <= times * CONTEXT,
            "{times}: {all}"
        );
        let left = tokens - all;
        assert!(left < times * CONTEXT, "{times}: {left} of {tokens}");
    }
    let again = corpus.chunks(&tokenizer, CONTEXT, tokens, 1).unwrap();
    let rest: Vec<Vec<u32>> = again.skip(200).map(Result::unwrap).collect();
    assert_eq!(rest, drawn[200..]);
}

#[test]
fn long_texts_are_entered_in_the_middle() {
    let folder = tempfile::tempdir().unwrap();
    let words = |count: usize| {
        let words = (0..count).map(|i| format!("word{i}"));
        words.collect::<Vec<_>>().join(" ")
    };
    let line = |text: &str| format!("{}\n", serde_json::json!({"text": text}));
    let jsonl = folder.path().join("long.jsonl");
    let lines = [line("first"), line(&words(20_000)), line("last")];
    std::fs::write(&jsonl, lines.concat()).unwrap();
    let txt = folder.path().join("long.txt");
    std::fs::write(&txt, words(20_000)).unwrap();
    let cases = [
        (jsonl, 20_000),
        (txt, 20_000),
        (fixture("long.parquet"), 3000),
    ];
    for (path, count) in &cases {
        let path = path.as_path();
        // Each word once, whether in order or not; where texts meet, a word may touch another.
        for tokens in [1 << 20, 8 * count] {
            let read = text(&chunks(&open(&[path]), tokens, 0));
            let found: Vec<usize> = read
                .split("word")
                .skip(1)
                .map(|rest| {
                    let digits = rest.find(|c: char| !c.is_ascii_digit());
                    rest[..digits.unwrap_or(rest.len())].parse().unwrap()
                })
                .collect();
            let distinct: BTreeSet<usize> = found.iter().copied().collect();
            assert_eq!(found.len(), *count, "{}", path.display());
            assert_eq!(distinct.len(), *count, "{}", path.display());
            if tokens == 1 << 20 {
                assert!(found.is_sorted());
            }
        }
        let read = text(&chunks(&open(&[path]), 200 * CONTEXT, 0));
        let numbers = read
            .split("word")
            .filter_map(|rest| rest.split(' ').next()?.parse().ok());
        let tenths: BTreeSet<usize> = numbers.map(|i: usize| i * 10 / count).collect();
        assert!(tenths.len() >= 8, "{}: {tenths:?}", path.display());
    }
}

#[test]
fn characters_are_not_cut() {
    let folder = tempfile::tempdir().unwrap();
    for (name, unit) in [
        ("a", "é"),
        ("b", "日本"),
        ("c", "🦞"),
        ("d", "aé\u{300}🦞日"),
    ] {
        let path = folder.path().join(format!("{name}.txt"));
        let whole = unit.repeat(30_000 / unit.len());
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(text(&chunks(&open(&[&path]), 1 << 20, 0)), whole);
        let path = folder.path().join(format!("{name}.jsonl"));
        std::fs::write(&path, serde_json::json!({"text": whole}).to_string()).unwrap();
        assert_eq!(text(&chunks(&open(&[&path]), 1 << 20, 0)).trim_end(), whole);
    }
}

#[test]
fn chunks_say_how_many_tokens_are_to_come() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "txt", 0..3000);
    let tokenizer = tokenizer();
    // All of the text, about all of it, and a part.
    for most in [1 << 20, 80_000, 10_000] {
        let corpus = open(&[&path]);
        let mut chunks = corpus.chunks(&tokenizer, CONTEXT, most, 0).unwrap();
        let mut tokens = 0;
        let mut totals = Vec::new();
        while let Some(chunk) = chunks.next() {
            assert!(chunks.total() > tokens);
            tokens += chunk.unwrap().len();
            totals.push(chunks.total());
        }
        assert_eq!(totals.last(), Some(&tokens));
        assert!(tokens <= most);
        for total in totals {
            let ratio = total as f64 / tokens as f64;
            assert!((0.8..1.2).contains(&ratio), "{total} of {tokens}");
        }
    }
}

#[test]
fn folders_are_walked_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("set");
    for inner in ["b", "a/deep", ".git", "empty"] {
        std::fs::create_dir_all(root.join(inner)).unwrap();
    }
    write(&root.join("b"), "txt", 0..10);
    write(&root.join("a/deep"), "JSONL", 10..20);
    write(&root, "json", 20..30);
    std::fs::copy(fixture("snappy.parquet"), root.join("z.parquet")).unwrap();
    for name in [
        "README.md",
        ".gitattributes",
        "dataset_infos.json",
        ".git/x.txt",
        "a/data.bin",
    ] {
        std::fs::write(root.join(name), "nothing").unwrap();
    }
    std::fs::write(root.join("blank.txt"), "\n").unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(&root, root.join("b/loop")).unwrap();
    let corpus = open(&[&root]);
    let inside = |path: &Path| {
        path.strip_prefix(&root)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    };
    let files: Vec<String> = corpus.files().into_iter().map(inside).collect();
    assert_eq!(
        files,
        [
            "a/deep/rows.JSONL",
            "b/rows.txt",
            "blank.txt",
            "rows.json",
            "z.parquet"
        ]
    );
    let skipped = corpus.skipped().iter().map(|path| inside(Path::new(path)));
    assert_eq!(
        skipped.collect::<Vec<_>>(),
        [
            ".git",
            ".gitattributes",
            "README.md",
            "a/data.bin",
            "dataset_infos.json"
        ]
    );
    assert_eq!(corpus.names(), ["set (text)"]);
    // A file that is named is read, whatever it is called.
    assert_eq!(open(&[&root.join("README.md")]).names(), ["README.md"]);
}

#[test]
fn what_cannot_be_read_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let long = "x".repeat(100_000);
    let late = format!(
        "{}\n{{\"body\": 1}}\n",
        format!("{{\"text\": \"{long}\"}}\n").repeat(3)
    );
    let late_bytes = [long.as_bytes(), b"\xc3"].concat();
    let whole = std::fs::read(fixture("snappy.parquet")).unwrap();
    let cut = &whole[..whole.len() / 2];
    let footer = [&whole[..100], &whole[whole.len() - 4000..]].concat();
    let files: [(&str, &[u8], &[&str]); 26] = [
        ("empty.txt", b"", &["no text"]),
        ("blank.txt", b" \n\n", &["no text"]),
        (
            "binary.txt",
            b"abc\xff\xfe",
            &["byte 3", "UTF-8", ".parquet"],
        ),
        ("wide.txt", b"\xff\xfea\0b\0", &["byte 0"]),
        ("end.txt", b"abc\xc3", &["byte 3"]),
        ("late.txt", &late_bytes, &["byte 100000"]),
        ("empty.jsonl", b"", &["no text"]),
        ("null.jsonl", b"{\"text\": null}\n\n", &["no text"]),
        (
            "b.jsonl",
            b"{\"text\": \"one\"}\nnot json\n",
            &["line 2", "not JSON"],
        ),
        (
            "cut.jsonl",
            b"{\"text\": \"one\"}\n\n{\"text\": \"tw",
            &["line 3", "not JSON"],
        ),
        (
            "two.jsonl",
            b"{\"text\": \"one\"} {\"text\": \"two\"}\n",
            &["line 1", "not JSON"],
        ),
        (
            "c.jsonl",
            b"{\"body\": \"one\", \"id\": 2}\n",
            &["line 1", "--field", "body, id"],
        ),
        ("none.jsonl", b"{}\n", &["line 1", "--field"]),
        (
            "d.jsonl",
            b"{\"text\": 3}\n",
            &["line 1", "\"text\" holds no text"],
        ),
        (
            "list.jsonl",
            b"\"text\"\n",
            &["line 1", "an object with a field"],
        ),
        ("e.jsonl", b"{\"text\": \"\xff\"}\n", &["line 1"]),
        ("surrogate.jsonl", b"{\"text\": \"\\ud800\"}\n", &["line 1"]),
        ("late.jsonl", late.as_bytes(), &["line 5", "body"]),
        (
            "f.json",
            b"[{\"text\": \"one\"}, {\"body\": \"two\"}]",
            &["body", "--field", "line 1"],
        ),
        (
            "g.json",
            b"[{\"text\": \"one\"}, {\"text\": \"two\"}",
            &["list"],
        ),
        ("h.json", b"[\"one\"]", &["an object with a field"]),
        ("i.json", b"[]", &["no text"]),
        ("empty.parquet", b"", &["not a whole parquet file"]),
        (
            "text.parquet",
            b"This is prose, and no parquet file.",
            &["not a whole parquet file"],
        ),
        ("cut.parquet", cut, &["not a whole parquet file"]),
        ("footer.parquet", &footer, &["not a whole parquet file"]),
    ];
    for (name, bytes, words) in files {
        let path = at(name);
        std::fs::write(&path, bytes).unwrap();
        let corpus = Corpus::open(&[&path], None, false);
        // What lies far in is found where it is read.
        let error = corpus.and_then(|corpus| {
            let tokenizer = tokenizer();
            let chunks = corpus.chunks(&tokenizer, CONTEXT, 1 << 20, 0)?;
            chunks.collect::<Result<Vec<_>, _>>()
        });
        let message = error.unwrap_err().to_string();
        for word in [name].iter().chain(words) {
            assert!(message.contains(word), "{name}: {message:?} lacks {word:?}");
        }
    }
    for (input, field, words) in [
        (
            fixture("snappy.parquet"),
            "body",
            &["id, text, tags.list.element", "--field"][..],
        ),
        (
            fixture("snappy.parquet"),
            "id",
            &["\"id\" holds no texts", "--field"],
        ),
        (
            fixture("snappy.parquet"),
            "tags.list.element",
            &["holds no texts"],
        ),
        (
            fixture("bytes.parquet"),
            "text",
            &["row 1 of row group 0", "UTF-8"],
        ),
        (fixture("brotli.parquet"), "text", &["brotli"]),
        (
            at("nowhere"),
            "text",
            &["no such file or folder", "hf://datasets"],
        ),
        (
            at("nowhere/at/all.jsonl"),
            "text",
            &["no such file or folder"],
        ),
        (
            "hf://datasets/one".into(),
            "text",
            &["hf://datasets/ORG/NAME"],
        ),
        ("hf://org/name".into(), "text", &["hf://datasets/ORG/NAME"]),
    ] {
        let message = refusal(&input, Some(field));
        let path = input.display().to_string();
        for word in [path.as_str()].iter().chain(words) {
            assert!(message.contains(word), "{path}: {message:?} lacks {word:?}");
        }
    }
    let inner = at("inner");
    std::fs::create_dir(&inner).unwrap();
    assert!(refusal(&inner, None).contains("the folder is empty"));
    std::fs::write(inner.join("README.md"), "text").unwrap();
    let message = refusal(&inner, None);
    assert!(
        message.contains("no file in it is .txt") && message.contains("README.md"),
        "{message}"
    );
    std::fs::write(inner.join("blank.txt"), "\n\n").unwrap();
    assert!(refusal(&inner, None).contains("no text"));
}

#[test]
fn too_little_text_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("short.txt");
    let tokenizer = tokenizer();
    let begin = tokenizer.encode_first("").unwrap().len();
    let short = |tokens: usize| {
        std::fs::write(&path, " lobster".repeat(tokens)).unwrap();
        let found = tokenizer
            .encode_more(&" lobster".repeat(tokens))
            .unwrap()
            .len();
        let corpus = open(&[&path]);
        let chunks = corpus.chunks(&tokenizer, CONTEXT, 10_000, 0);
        (found, chunks.map(|w| w.count()).map_err(|e| e.to_string()))
    };
    let mut refused = 0;
    for count in 1..60 {
        let (found, chunks) = short(count);
        if found <= CONTEXT - begin {
            let message = chunks.unwrap_err();
            assert!(
                message.contains("short.txt")
                    && message.contains(&format!("its {found} tokens"))
                    && message.contains("--context"),
                "{message}"
            );
            refused += 1;
        } else {
            assert_eq!(chunks.unwrap(), found.div_ceil(CONTEXT - begin));
        }
    }
    assert!(refused > 5 && refused < 50, "{refused}");
}

#[cfg(unix)]
#[test]
fn a_file_larger_than_memory_is_read_in_parts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.txt");
    std::fs::write(&path, (0..1000).map(row).collect::<String>()).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    // A hole of 4 TiB: all but its beginning are zeros, which are text.
    if file.set_len(1 << 42).is_err() {
        println!("SKIPPED: no file of that size here");
        return;
    }
    assert_eq!(chunks(&open(&[&path]), 1000, 0).len(), 1000 / CONTEXT);
}

#[cfg(unix)]
#[test]
fn pipes_are_read_from_their_beginning() {
    let folder = tempfile::tempdir().unwrap();
    let txt = write(folder.path(), "txt", 0..5000);
    let tokenizer = tokenizer();
    let piped = |content: &str, field: Option<&str>, tokens: usize, beside: &[&Path]| {
        let pipe = folder.path().join("pipe");
        let _ = std::fs::remove_file(&pipe);
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        let inputs: Vec<&Path> = beside.iter().copied().chain([pipe.as_path()]).collect();
        let corpus = Corpus::open(&inputs, field, false).unwrap();
        let (content, to) = (content.to_owned(), pipe.clone());
        // It is closed early where not all is read.
        let writer = std::thread::spawn(move || drop(std::fs::write(to, content)));
        let chunks = corpus.chunks(&tokenizer, CONTEXT, tokens, 0);
        let chunks = chunks.and_then(Iterator::collect::<Result<Vec<_>, _>>);
        writer.join().unwrap();
        chunks.map(|w| rows(&text(&w))).map_err(|e| e.to_string())
    };
    let plain: String = (10_000..14_000).map(row).collect();
    let found = piped(&plain, None, 1 << 20, &[]).unwrap();
    assert_eq!(found, (10_000..14_000).collect::<Vec<_>>());
    let first = piped(&plain, None, 10_000, &[]).unwrap();
    assert_eq!(first, (10_000..10_000 + first.len()).collect::<Vec<_>>());
    let mut lines = String::new();
    for i in 10_000..14_000 {
        writeln!(lines, "{}", serde_json::json!({"body": row(i)})).unwrap();
    }
    let found = piped(&lines, Some("body"), 1 << 20, &[]).unwrap();
    assert_eq!(found, (10_000..14_000).collect::<Vec<_>>());
    // With a file, each has a share; the one that is short leaves the rest of it to the other.
    let both = piped(&plain, None, 40_000, &[&txt]).unwrap();
    let of_pipe = both.iter().filter(|&&i| i >= 10_000).count();
    assert!(of_pipe * 10 > both.len() * 4 && of_pipe * 10 < both.len() * 6);
    let both = piped(&plain[..2000], None, 40_000, &[&txt]).unwrap();
    assert!(both.len() > 1000, "{}", both.len());

    lines.push_str("{\"text\": \"other\"}\n");
    let message = piped(&lines, Some("body"), 1 << 20, &[]).unwrap_err();
    assert!(
        message.contains("line 4001") && message.contains("pipe"),
        "{message}"
    );
    let message = piped("", None, 10_000, &[]).unwrap_err();
    assert!(message.contains("no text"), "{message}");
    // Characters that end a piece are not cut, nor forgotten where they are never whole.
    for (end, byte) in [("", None), ("\u{fffd}", Some(200_000))] {
        let content = [&"é".repeat(100_000), end].concat();
        let mut bytes = content.into_bytes();
        if byte.is_some() {
            bytes.pop();
        }
        let pipe = folder.path().join("bytes");
        let _ = std::fs::remove_file(&pipe);
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        let corpus = Corpus::open(&[&pipe], None, false).unwrap();
        let writer = std::thread::spawn(move || std::fs::write(pipe, bytes));
        let chunks = corpus.chunks(&tokenizer, CONTEXT, 1 << 20, 0);
        let chunks = chunks.and_then(Iterator::collect::<Result<Vec<_>, _>>);
        writer.join().unwrap().unwrap();
        match byte {
            None => assert_eq!(text(&chunks.unwrap()), "é".repeat(100_000)),
            Some(byte) => {
                let message = chunks.unwrap_err().to_string();
                assert!(message.contains(&format!("byte {byte}")), "{message}");
            }
        }
    }
}

#[test]
fn damaged_parquet_files_are_refused_or_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.parquet");
    let tokenizer = tokenizer();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for name in ["snappy", "zstd-v2", "gzip", "long"] {
        let whole = std::fs::read(fixture(&format!("{name}.parquet"))).unwrap();
        for round in 0..100 {
            let mut bytes = whole.clone();
            // The footer says where all else is.
            let from = if round % 2 == 0 {
                whole.len() - 1000
            } else {
                0
            };
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(from..whole.len());
                bytes[at] = rng.random();
            }
            std::fs::write(&path, bytes).unwrap();
            let Ok(corpus) = Corpus::open(&[&path], None, false) else {
                continue;
            };
            if let Ok(chunks) = corpus.chunks(&tokenizer, CONTEXT, 20_000, 0) {
                for chunk in chunks {
                    if let Err(error) = chunk {
                        assert!(error.to_string().contains("damaged.parquet"));
                    }
                }
            }
        }
    }
}

#[test]
fn a_parquet_file_that_the_reader_breaks_off_at_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pages.parquet");
    let whole = std::fs::read(fixture("snappy.parquet")).unwrap();
    // The headers of dictionaries say that they are of another kind, which is passed over.
    let headers = whole.windows(3).enumerate();
    let headers: Vec<usize> = headers
        .filter_map(|(at, bytes)| (bytes == [0x15, 0x04, 0x15]).then_some(at + 1))
        .collect();
    let mut messages = String::new();
    for header in headers {
        let mut bytes = whole.clone();
        bytes[header] = 0x02;
        std::fs::write(&path, bytes).unwrap();
        if let Err(error) = Corpus::open(&[&path], None, false) {
            messages += &error.to_string();
        }
    }
    assert!(
        messages.contains("its pages contradict each other"),
        "{messages}"
    );
}
