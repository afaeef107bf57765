//! LongBench (Bai et al., 2024): long texts to answer questions on, to summarise and to go on from, the sixteen data
//! sets in English and of code.
//!
//! Prompts and the lengths of answers are read from the benchmark's published files. What becomes of a prompt that
//! is too long, and the scores, are as in its published scripts, `pred.py` and `eval.py`; there and here the chat
//! template is for some data sets only.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lexico::tensor_file::write_atomically;
use lexico_llm::Tokenizer;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::data::{self, Record};
use crate::error::{Error, Result, refused};
use crate::metrics::{
    classification, code_line, code_similarity, count, paragraph, qa_f1, retrieval, rouge_l,
};
use crate::questions::{Item, Questions, Verdict};
use crate::task::{Measure, named};

/// Metric of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// [`qa_f1`]
    QaF1,
    /// [`rouge_l`]
    RougeL,
    /// [`classification`]
    Classification,
    /// [`retrieval`]
    Retrieval,
    /// [`count`]
    Count,
    /// [`code_similarity`]
    CodeSimilarity,
}

/// Form of a data set's prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Questions and tasks, which may be put as a message to a model that chats; other forms are always plain text.
    Asked,
    /// Examples that the model goes on from: only the first line of a prediction counts, line ends before it left out.
    Shown,
    /// Code that the model goes on with.
    Code,
}

/// A data set of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dataset {
    /// Name, also of the file.
    pub name: &'static str,
    /// Form of its prompts.
    pub form: Form,
    /// Metric of the predictions.
    pub metric: Metric,
}

/// The data sets.
pub const DATASETS: [Dataset; 16] = [
    dataset("narrativeqa", Form::Asked, Metric::QaF1),
    dataset("qasper", Form::Asked, Metric::QaF1),
    dataset("multifieldqa_en", Form::Asked, Metric::QaF1),
    dataset("hotpotqa", Form::Asked, Metric::QaF1),
    dataset("2wikimqa", Form::Asked, Metric::QaF1),
    dataset("musique", Form::Asked, Metric::QaF1),
    dataset("gov_report", Form::Asked, Metric::RougeL),
    dataset("qmsum", Form::Asked, Metric::RougeL),
    dataset("multi_news", Form::Asked, Metric::RougeL),
    dataset("trec", Form::Shown, Metric::Classification),
    dataset("triviaqa", Form::Shown, Metric::QaF1),
    dataset("samsum", Form::Shown, Metric::RougeL),
    dataset("passage_count", Form::Asked, Metric::Count),
    dataset("passage_retrieval_en", Form::Asked, Metric::Retrieval),
    dataset("lcc", Form::Code, Metric::CodeSimilarity),
    dataset("repobench-p", Form::Code, Metric::CodeSimilarity),
];

const fn dataset(name: &'static str, form: Form, metric: Metric) -> Dataset {
    Dataset { name, form, metric }
}

impl Dataset {
    /// The data set of that name.
    ///
    /// # Errors
    /// [`Error::Options`] where there is none.
    pub fn named(name: &str) -> Result<Self> {
        let found = DATASETS.into_iter().find(|dataset| dataset.name == name);
        found.ok_or_else(|| {
            let names: Vec<&str> = DATASETS.iter().map(|dataset| dataset.name).collect();
            Error::Options(format!(
                "no data set {name:?} of LongBench in English; there are {}",
                names.join(", ")
            ))
        })
    }

    fn score(&self, prediction: &str, answer: &str, classes: &[String]) -> f64 {
        match self.metric {
            Metric::QaF1 => qa_f1(prediction, answer),
            Metric::RougeL => rouge_l(prediction, answer),
            Metric::Classification => classification(prediction, answer, classes),
            Metric::Retrieval => retrieval(prediction, answer),
            Metric::Count => count(prediction, answer),
            Metric::CodeSimilarity => code_similarity(prediction, answer),
        }
    }
}

/// Published prompts, and max tokens of answers.
#[derive(Debug, Clone)]
pub struct Prompts {
    path: PathBuf,
    prompts: Map<String, Value>,
    lengths: Map<String, Value>,
}

impl Prompts {
    /// The file of the prompts in the benchmark's folder `config`.
    pub const FILE: &str = "dataset2prompt.json";
    /// The file of the answers' lengths.
    pub const LENGTHS: &str = "dataset2maxlen.json";

    /// Address of the published files: a folder of one commit of the repository `THUDM/LongBench`.
    pub const PUBLISHED: &str = "https://raw.githubusercontent.com/THUDM/LongBench/\
                                 2e00731f8d0bff23dc4325161044d0ed8af94c1e/LongBench/config";
    /// The SHA-256 of the published files.
    const CHECKSUMS: [(&str, &str); 2] = [
        (
            Self::FILE,
            "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30",
        ),
        (
            Self::LENGTHS,
            "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022",
        ),
    ];

    /// Reads the published files from `folder`, after downloading those that it lacks from `address`,
    /// [`Prompts::PUBLISHED`] or a mirror.
    ///
    /// # Errors
    /// [`Error::File`] where one cannot be downloaded or saved, or is not what was published.
    pub fn fetch(address: &str, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|e| refused(folder, e))?;
        for (file, checksum) in Self::CHECKSUMS {
            let path = folder.join(file);
            let is_published = |bytes: &[u8]| format!("{:x}", Sha256::digest(bytes)) == checksum;
            if std::fs::read(&path).is_ok_and(|bytes| is_published(&bytes)) {
                continue;
            }
            let url = format!("{address}/{file}");
            let help =
                "download it from the benchmark's repository and name its folder with --prompts";
            let bytes =
                download(&url).map_err(|e| refused(&path, format!("{url}: {e}; {help}")))?;
            if !is_published(&bytes) {
                let reason = format!("{url} is not the file that was published; {help}");
                return Err(refused(&path, reason));
            }
            write_atomically(&path, &bytes).map_err(|e| refused(&path, e))?;
        }
        Self::read(folder)
    }

    /// Reads both files of a folder: `LongBench/config` of the repository `THUDM/LongBench`. They are not in the
    /// data set on the hub.
    ///
    /// # Errors
    /// [`Error::File`] where one is not there or not a JSON object.
    pub fn read(folder: &Path) -> Result<Self> {
        let object = |file: &str| {
            let path = folder.join(file);
            let text = data::read_text(&path)?;
            serde_json::from_str(&text)
                .map_err(|e| refused(&path, format!("not a JSON object of data sets: {e}")))
        };
        Ok(Self {
            path: folder.to_owned(),
            prompts: object(Self::FILE)?,
            lengths: object(Self::LENGTHS)?,
        })
    }

    /// Returns the template of a data set, and the max tokens of its answers.
    fn of(&self, dataset: &Dataset) -> Result<(&str, usize)> {
        let name = dataset.name;
        let lacks = |file, what: &str| {
            refused(&self.path.join(file), format!("it has no {what} of {name}"))
        };
        let prompt = self.prompts.get(name).and_then(Value::as_str);
        let length = self.lengths.get(name).and_then(Value::as_u64);
        let length = length.and_then(|length| usize::try_from(length).ok());
        let length = length.filter(|&length| length > 0);
        Ok((
            prompt.ok_or_else(|| lacks(Self::FILE, "prompt"))?,
            length.ok_or_else(|| lacks(Self::LENGTHS, "number of tokens above 0"))?,
        ))
    }

    /// A template with a record's fields in place of `{their names}`, as Python's `str.format` has it.
    fn filled(&self, template: &str, record: &Record) -> Result<String> {
        let refused = |reason: String| refused(&self.path.join(Self::FILE), reason);
        let mut prompt = String::with_capacity(template.len());
        let mut rest = template;
        while let Some(at) = rest.find(['{', '}']) {
            prompt += &rest[..at];
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix("{{") {
                prompt.push('{');
                rest = after;
            } else if let Some(after) = rest.strip_prefix("}}") {
                prompt.push('}');
                rest = after;
            } else if let Some((name, after)) =
                rest.strip_prefix('{').and_then(|rest| rest.split_once('}'))
            {
                match record.value(name) {
                    Ok(Value::String(text)) => prompt += text,
                    Ok(Value::Number(number)) => prompt += &number.to_string(),
                    Ok(_) => return Err(record.refused(format!("field {name:?} holds no text"))),
                    Err(error) => {
                        return Err(refused(format!(
                            "a prompt has the placeholder {{{name}}}: {error}"
                        )));
                    }
                }
                rest = after;
            } else {
                return Err(refused(format!(
                    "a prompt has a single brace: {template:?}"
                )));
            }
        }
        Ok(prompt + rest)
    }
}

/// Cuts a prompt to `max` tokens: of a longer one the first and the last half, each decoded without
/// special tokens.
///
/// # Errors
/// Those of the tokenizer.
pub fn without_middle(prompt: String, tokenizer: &Tokenizer, max: usize) -> Result<String> {
    let tokens = tokenizer.encode_first(&prompt)?;
    if tokens.len() <= max {
        return Ok(prompt);
    }
    let half = max / 2;
    let start = tokenizer.decode(&tokens[..half])?;
    Ok(start + &tokenizer.decode(&tokens[tokens.len() - half..])?)
}

fn download(url: &str) -> std::result::Result<Vec<u8>, ureq::Error> {
    let config = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(60)));
    let mut response = ureq::Agent::from(config.build()).get(url).call()?;
    response.body_mut().read_to_vec()
}

/// Min tokens that a prompt may be cut down to.
const MIN_CONTEXT: usize = 64;

/// Settings of [`read`].
#[derive(Debug, Clone)]
pub struct LongBenchOptions {
    /// The data sets.
    pub datasets: Vec<Dataset>,
    /// Items of each data set, from the first on; all where there are fewer.
    pub items: usize,
    /// Puts the items of each data set in a random order before the first are taken.
    pub seed: Option<u64>,
    /// Max tokens of a prompt, the chat template's not counted.
    pub context: usize,
}

/// Answers that a prediction is scored against.
#[derive(Debug)]
struct Key {
    dataset: Dataset,
    answers: Vec<String>,
    classes: Vec<String>,
}

/// Takes the data sets from `source`: a folder that holds `NAME.jsonl` of each, or the benchmark's `data.zip`.
///
/// # Errors
/// [`Error::Data`] and [`Error::File`] where a file cannot be read or lacks what a prompt needs, and those of the
/// tokenizer.
pub fn read(
    source: &Path,
    prompts: &Prompts,
    tokenizer: &Tokenizer,
    options: &LongBenchOptions,
) -> Result<Questions> {
    let (mut items, mut keys) = (Vec::new(), Vec::new());
    if options.context < MIN_CONTEXT {
        let context = options.context;
        let reason = format!(
            "prompts of {context} tokens are too short to ask anything: at least {MIN_CONTEXT}"
        );
        return Err(Error::Options(reason));
    }
    let mut names: Vec<&str> = Vec::new();
    for dataset in &options.datasets {
        let name = dataset.name;
        if names.contains(&name) {
            let reason = format!("the data set {name} is named twice");
            return Err(Error::Options(reason));
        }
        names.push(name);
        let (template, max_tokens) = prompts.of(dataset)?;
        let file = format!("{name}.jsonl");
        let records = if source.is_dir() {
            data::read(&source.join(file))?
        } else {
            data::read_zipped(source, &file)?
        };
        let mut order: Vec<usize> = (0..records.len()).collect();
        if let Some(seed) = options.seed {
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        }
        for number in order.into_iter().take(options.items) {
            let record = &records[number];
            let prompt = prompts.filled(template, record)?;
            let key = key(*dataset, record)?;
            items.push(Item {
                id: match record.text("_id") {
                    Ok(id) => format!("{name}/{id}"),
                    Err(_) => format!("{name}/{number}"),
                },
                group: Some(name.to_owned()),
                prompt: without_middle(prompt, tokenizer, options.context)?,
                begun: String::new(),
                is_message: dataset.form == Form::Asked,
                max_tokens,
                // pred.py ends samsum's at a line end, but for the first token: its first line is what counts.
                stop: Vec::new(),
                expected: key.answers.join(" | "),
            });
            keys.push(key);
        }
    }
    Ok(Questions {
        name: "longbench",
        measure: Measure::GroupMean,
        settings: named([("datasets", json!(names))]),
        items,
        judge: Box::new(move |number, _, text| keys[number].judge(text)),
    })
}

/// The benchmark's `data.zip` in `THUDM/LongBench` on the hub, downloaded where its cache lacks it. With
/// `progress`, bars are drawn on stderr.
///
/// # Errors
/// Those of [`DatasetName::fetch`](lexico_llm::hub::DatasetName::fetch).
pub fn fetch(progress: bool) -> Result<PathBuf> {
    super::fetch_one("THUDM/LongBench", "data.zip", progress)
}

impl Key {
    fn judge(&self, text: &str) -> Verdict {
        let dataset = self.dataset;
        let prediction = match dataset.form {
            Form::Shown => {
                let line = text.trim_start_matches('\n').split('\n').next();
                line.unwrap_or_default()
            }
            _ => text,
        };
        let scores = self.answers.iter();
        let scores = scores.map(|answer| dataset.score(prediction, answer, &self.classes));
        let answer = match dataset.form {
            Form::Code => code_line(prediction),
            _ => prediction.trim(),
        };
        Verdict {
            score: scores.fold(0.0, f64::max),
            answer: (!answer.is_empty()).then(|| answer.to_owned()),
        }
    }
}

fn key(dataset: Dataset, record: &Record) -> Result<Key> {
    let answers = record.texts("answers")?;
    if answers.is_empty() {
        return Err(record.refused("field \"answers\" is empty".to_owned()));
    }
    if dataset.metric == Metric::Retrieval
        && let Some(answer) = answers.iter().find(|answer| paragraph(answer).is_none())
    {
        let reason = format!("field \"answers\" has {answer:?}, which is no \"Paragraph NUMBER\"");
        return Err(record.refused(reason));
    }
    let classes = match dataset.metric {
        Metric::Classification => record.texts("all_classes")?,
        _ => Vec::new(),
    };
    let owned = |texts: Vec<&str>| texts.into_iter().map(str::to_owned).collect();
    Ok(Key {
        dataset,
        answers: owned(answers),
        classes: owned(classes),
    })
}

#[cfg(test)]
mod tests {
    use lexico_llm::Model;

    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    /// Templates and lengths of two data sets.
    fn prompts(template: &str) -> tempfile::TempDir {
        let templates = serde_json::json!({"trec": template, "qasper": "{context}? {input}", "samsum": "{{{input}}}"});
        folder(&[
            (Prompts::FILE, &templates.to_string()),
            (
                Prompts::LENGTHS,
                r#"{"trec": 64, "qasper": 128, "samsum": 0, "lcc": 64}"#,
            ),
        ])
    }

    fn options(datasets: &[&str], context: usize) -> LongBenchOptions {
        LongBenchOptions {
            datasets: datasets
                .iter()
                .map(|name| Dataset::named(name).unwrap())
                .collect(),
            items: 2,
            seed: None,
            context,
        }
    }

    const TREC: &str = concat!(
        r#"{"input": "Q: ü?", "context": "{x}", "answers": ["Date", "City"], "all_classes": ["Date", "City"], "#,
        r#""length": 7, "_id": "ab"}"#,
        "\n",
        r#"{"input": "i", "context": "c", "answers": ["City"], "all_classes": ["City"], "length": 8}"#,
        "\n",
        r#"{"input": "none reads this one"}"#,
    );

    fn read(prompts: &Path, source: &Path, options: &LongBenchOptions) -> Result<Questions> {
        let model = Model::tiny().unwrap();
        super::read(source, &Prompts::read(prompts)?, &model.tokenizer, options)
    }

    #[test]
    fn prompts_are_filled_and_predictions_judged() {
        let prompts = prompts("{{T}} {context}\n{input} {length}");
        let source = folder(&[("trec.jsonl", TREC)]);
        let set = read(prompts.path(), source.path(), &options(&["trec"], 1000)).unwrap();
        let items = &set.items;
        assert_eq!(items.len(), 2);
        assert_eq!(items[0].prompt, "{T} {x}\nQ: ü? 7");
        assert_eq!(
            (items[0].id.as_str(), items[1].id.as_str()),
            ("trec/ab", "trec/1")
        );
        assert_eq!(items[0].max_tokens, 64);
        assert!(!items[0].is_message);

        let verdict = set.judge(0, "\n\nit is a City\nDate");
        assert_eq!(verdict.score, 1.0);
        assert_eq!(verdict.answer.as_deref(), Some("it is a City"));
        assert_eq!(items[0].expected, "Date | City");
        assert_eq!(set.judge(0, "\n").answer, None);
        assert_eq!(set.judge(1, "Date").score, 0.0);
    }

    /// A server that answers each request with the next of these bodies.
    fn server(bodies: Vec<Vec<u8>>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/config", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for body in bodies {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).unwrap();
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    body.len()
                );
                stream.write_all(head.as_bytes()).unwrap();
                stream.write_all(&body).unwrap();
            }
        });
        address
    }

    #[test]
    fn only_the_published_prompts_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("a/b");
        let error = Prompts::fetch(&server(vec![b"{}".to_vec()]), &own).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("not the file that was published") && error.contains("--prompts"),
            "{error}"
        );
        assert!(!own.join(Prompts::FILE).exists());
        let error = Prompts::fetch("http://127.0.0.1:9/none", &own)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("http://127.0.0.1:9/none/dataset2prompt.json"),
            "{error}"
        );
        let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/longbench");
        if !shared.exists() {
            eprintln!("SKIPPED: {} is not there", shared.display());
            return;
        }
        let files =
            [Prompts::FILE, Prompts::LENGTHS].map(|f| std::fs::read(shared.join(f)).unwrap());
        let address = server(files.to_vec());
        let fetched = Prompts::fetch(&address, &own).unwrap();
        assert_eq!(
            fetched.prompts.len(),
            Prompts::read(&shared).unwrap().prompts.len()
        );
        // The server has ended: what is there is not asked for again.
        Prompts::fetch(&address, &own).unwrap();
    }

    #[test]
    fn archives_hold_the_same_as_folders() {
        let prompts = prompts("{context}\n{input}");
        let source = folder(&[("trec.jsonl", TREC)]);
        let archive = source.path().join("data.zip");
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&archive).unwrap());
        let deflated = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Deflated);
        zip.start_file("data/trec.jsonl", deflated).unwrap();
        std::io::Write::write_all(&mut zip, TREC.as_bytes()).unwrap();
        zip.finish().unwrap();
        let options = options(&["trec"], 1000);
        let (a, b) = (
            read(prompts.path(), source.path(), &options).unwrap(),
            read(prompts.path(), &archive, &options).unwrap(),
        );
        assert_eq!(a.items, b.items);
    }

    #[test]
    fn the_middle_of_long_prompts_is_left_out() {
        let tokenizer = Model::tiny().unwrap().tokenizer;
        let words: Vec<String> = (0..400).map(|n| format!("coin{n}")).collect();
        let prompt = words.join(" ");
        let tokens = tokenizer.encode_first(&prompt).unwrap();
        assert_eq!(
            without_middle(prompt.clone(), &tokenizer, tokens.len()).unwrap(),
            prompt
        );
        for most in [0, 1, 2, 100, 101, tokens.len() - 1] {
            let short = without_middle(prompt.clone(), &tokenizer, most).unwrap();
            let half = most / 2;
            let start = tokenizer.decode(&tokens[..half]).unwrap();
            let end = tokenizer.decode(&tokens[tokens.len() - half..]).unwrap();
            assert_eq!(short, format!("{start}{end}"));
            assert!(prompt.starts_with(&start) && prompt.ends_with(&end));
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        let good = prompts("{context}");
        let error = |prompts: &Path, name: &str, text: &str| {
            let source = folder(&[(&format!("{name}.jsonl"), text)]);
            let set = read(prompts, source.path(), &options(&[name], 1000));
            set.map(|_| ()).unwrap_err().to_string()
        };
        for (template, expected) in [
            (
                "{foo}",
                "dataset2prompt.json: a prompt has the placeholder {foo}: ",
            ),
            ("{foo}", "no field \"foo\"; there are "),
            ("{}", "placeholder {}: "),
            ("{input!r}", "no field \"input!r\""),
            ("a { b", "a prompt has a single brace: \"a { b\""),
            ("a } b", "a prompt has a single brace"),
            ("{answers}", "line 1: field \"answers\" holds no text"),
        ] {
            let error = error(prompts(template).path(), "trec", TREC);
            assert!(error.contains(expected), "{template}: {error}");
        }
        for (name, text, expected) in [
            (
                "qasper",
                "{\"input\": \"\", \"context\": \"\"}",
                "line 1: no field \"answers\"",
            ),
            (
                "qasper",
                r#"{"input": "", "context": "", "answers": "x"}"#,
                "holds no list of texts",
            ),
            (
                "qasper",
                r#"{"input": "", "context": "", "answers": []}"#,
                "\"answers\" is empty",
            ),
            (
                "trec",
                r#"{"input": "", "context": "", "answers": ["x"], "all_classes": null}"#,
                "\"all_classes\" holds no list",
            ),
            (
                "narrativeqa",
                "{}",
                "dataset2prompt.json: it has no prompt of narrativeqa",
            ),
            ("lcc", "{}", "dataset2prompt.json: it has no prompt of lcc"),
            (
                "samsum",
                "{}",
                "dataset2maxlen.json: it has no number of tokens above 0 of samsum",
            ),
        ] {
            let error = error(good.path(), name, text);
            assert!(error.contains(expected), "{name}: {error}");
        }
        let nothing = folder(&[]);
        let source = read(good.path(), nothing.path(), &options(&["trec"], 99))
            .err()
            .unwrap();
        assert!(source.to_string().contains("trec.jsonl: "), "{source}");
        let source = read(
            good.path(),
            &nothing.path().join("data.zip"),
            &options(&["trec"], 99),
        );
        assert!(source.err().unwrap().to_string().contains("data.zip: "));
        let prompts = Prompts::read(nothing.path()).unwrap_err().to_string();
        assert!(prompts.contains("dataset2prompt.json: "), "{prompts}");
        let list = folder(&[(Prompts::FILE, "[]"), (Prompts::LENGTHS, "{}")]);
        let prompts = Prompts::read(list.path()).unwrap_err().to_string();
        assert!(prompts.contains("not a JSON object"), "{prompts}");
        let name = Dataset::named("dureader").unwrap_err().to_string();
        assert!(name.contains("there are narrativeqa, qasper,"), "{name}");
    }

    #[test]
    fn answers_of_retrieval_name_a_paragraph() {
        let record = |answer: &str| {
            let folder = folder(&[("d.jsonl", &format!(r#"{{"answers": ["{answer}"]}}"#))]);
            data::read(&folder.path().join("d.jsonl"))
                .unwrap()
                .remove(0)
        };
        let dataset = Dataset::named("passage_retrieval_en").unwrap();
        assert!(key(dataset, &record("Paragraph 7")).is_ok());
        let error = key(dataset, &record("7")).unwrap_err().to_string();
        assert!(error.contains("has \"7\", which is no"), "{error}");
    }
}
