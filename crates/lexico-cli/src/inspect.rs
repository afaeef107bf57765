use std::path::{Path, PathBuf};

use clap::Args;
use lexico::DictionarySet;
use lexico::codes::{self, CodeFile};
use lexico::dictionary::{
    self, CODEBOOK_ATOMS, LayerCodebooks, LayerErrors, LayerSparsities, additive_sparsity,
};
use lexico::tensor_file::TensorFile;
use lexico_llm::DICTIONARY_FILE;
use lexico_llm::config::Config;
use lexico_llm::gguf::GgufModel;
use lexico_llm::saved::{FORMAT, SavedGeneration};
use serde_json::{Value, json};

use crate::ui;

#[derive(Args)]
pub(crate) struct Inspect {
    /// A dictionary, code or model file (.safetensors, .gguf), a saved cache, or a model folder
    file: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let report = if self.file.is_dir() {
            let beside = self.file.join(DICTIONARY_FILE).is_file();
            model(&Config::load(&self.file)?, beside, None)
        } else if self.file.extension().is_some_and(|e| e == "gguf") {
            let beside = self.file.with_file_name(DICTIONARY_FILE).is_file();
            let gguf = GgufModel::open(&self.file)?;
            model(gguf.config(), beside, Some(&gguf))
        } else if SavedGeneration::is_one(&self.file) {
            saved(&SavedGeneration::open(&self.file)?)
        } else {
            let file = TensorFile::open(&self.file)?;
            match file.metadata().get("format").map(String::as_str) {
                Some(dictionary::FORMAT) => dictionaries(&file)?,
                Some(codes::FORMAT) => codes(&self.file)?,
                _ => tensors(&file)?,
            }
        };
        if self.json {
            ui::json(&report.json)
        } else {
            ui::line(&report.text)
        }
    }
}

struct Report {
    text: String,
    json: Value,
}

/// `name: value` lines, aligned.
fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = facts
        .iter()
        .map(|(name, value)| format!("{name:<width$}  {value}\n"));
    lines.collect()
}

/// What is known of the dictionaries for one kind of codes.
struct Listed<'a> {
    errors: Option<&'a Vec<LayerErrors>>,
    allocation: Option<Vec<LayerSparsities>>,
}

impl Listed<'_> {
    /// Held-out error of a layer's keys (part 0) or values.
    fn error(&self, layer: usize, part: usize) -> Option<f32> {
        let errors = self.errors?.get(layer)?;
        Some([errors.keys, errors.values][part])
    }

    /// Sparsities of each head's keys or values.
    fn sparsities(&self, layer: usize, part: usize) -> Option<&Vec<usize>> {
        let layer = self.allocation.as_ref()?.get(layer)?;
        Some([&layer.keys, &layer.values][part])
    }

    /// A row of a table, with how many atoms the layer's two dictionaries have.
    fn row(&self, layer: usize, atoms: [String; 2]) -> Vec<String> {
        let error = |part| {
            let error = self.error(layer, part);
            error.map_or("-".to_owned(), |e| format!("{e:.4}"))
        };
        let own = |part| {
            let text = |heads: &Vec<usize>| {
                let heads: Vec<String> = heads.iter().map(usize::to_string).collect();
                heads.join(" ")
            };
            let heads = self.sparsities(layer, part);
            heads.map_or("same for all".to_owned(), text)
        };
        let mut row = vec![layer.to_string()];
        row.extend(atoms);
        row.extend([error(0), error(1), own(0), own(1)]);
        row
    }
}

fn header(atoms: &str, nonzeros: &str) -> [String; 7] {
    [
        "layer".to_owned(),
        format!("key {atoms}"),
        format!("value {atoms}"),
        "key error".to_owned(),
        "value error".to_owned(),
        format!("key {nonzeros} by head"),
        format!("value {nonzeros} by head"),
    ]
}

fn dictionaries(file: &TensorFile) -> anyhow::Result<Report> {
    let set = DictionarySet::read(file)?;
    let (model, training) = (&set.model, &set.training);
    let plain = Listed {
        errors: Some(&training.relative_error),
        allocation: set.allocate(training.sparsity as f64),
    };
    let groups = set.max_codebooks();
    let additive_atoms = additive_sparsity(training.sparsity, groups);
    let packed = Listed {
        errors: training.additive_relative_error.as_ref(),
        allocation: set.allocate_additive(additive_atoms as f64),
    };
    let rows = set.layers.iter().enumerate().map(|(l, layer)| {
        let atoms = [layer.keys.len(), layer.values.len()];
        plain.row(l, atoms.map(|atoms| atoms.to_string()))
    });
    let mut table = ui::table(header("atoms", "nonzeros"), rows.collect());
    let layers = set.layers.iter().enumerate();
    let rows = layers.filter_map(|(l, layer)| {
        let codebooks = layer.codebooks.as_ref()?;
        let sizes = [&codebooks.keys, &codebooks.values].map(|dictionary| {
            let (groups, first) = (dictionary.len(), dictionary.groups().first);
            format!("{first} + {} × {CODEBOOK_ATOMS}", groups - 1)
        });
        Some(packed.row(l, sizes))
    });
    let rows: Vec<_> = rows.collect();
    let mut additive_fact = "none".to_owned();
    if !rows.is_empty() {
        table += "\n\nPacked codes, one atom of each group:\n";
        table += &ui::table(header("atoms", "atoms a code"), rows);
        additive_fact = format!("{groups} groups, {additive_atoms} atoms on average by default");
    }
    let rotary = format!("{}, theta {}", model.rotary.kind, model.rotary.theta);
    let text = facts(&[
        ("kind", "dictionaries".to_owned()),
        ("model", format!("{} ({})", model.name, model.architecture)),
        ("layers", model.layers.to_string()),
        ("KV heads", model.kv_heads.to_string()),
        ("head dim", model.head_dim.to_string()),
        ("rotary", rotary),
        (
            "sparsity",
            format!("{} on average by default", training.sparsity),
        ),
        ("packed codes", additive_fact),
        ("corpus", training.corpus.join(", ")),
        ("tokens", training.tokens.to_string()),
        ("made by", training.tool.clone()),
        ("in the file", ui::bytes(file.data_bytes())),
        ("in memory", ui::bytes(set.bytes())),
    ]) + &table;
    let layers = set.layers.iter().enumerate();
    let layers = layers.map(|(l, layer)| {
        let packed = |codebooks: &LayerCodebooks| {
            [(&codebooks.keys, 0), (&codebooks.values, 1)].map(|(dictionary, part)| {
                json!({
                    "groups": dictionary.len(), "first": dictionary.groups().first,
                    "relative_error": packed.error(l, part), "sparsities": packed.sparsities(l, part),
                })
            })
        };
        let [additive_keys, additive_values] = match &layer.codebooks {
            Some(codebooks) => packed(codebooks),
            None => [Value::Null, Value::Null],
        };
        json!({
            "layer": l,
            "keys": {
                "atoms": layer.keys.len(), "relative_error": plain.error(l, 0),
                "sparsities": plain.sparsities(l, 0), "packed": additive_keys,
            },
            "values": {
                "atoms": layer.values.len(), "relative_error": plain.error(l, 1),
                "sparsities": plain.sparsities(l, 1), "packed": additive_values,
            },
        })
    });
    let layers: Vec<Value> = layers.collect();
    let json = json!({
        "kind": "dictionaries",
        "model": {
            "name": model.name, "architecture": model.architecture, "layers": model.layers,
            "kv_heads": model.kv_heads, "head_dim": model.head_dim,
            "rotary": {"kind": model.rotary.kind, "theta": model.rotary.theta},
        },
        "sparsity": training.sparsity, "groups": groups, "additive_sparsity": (groups > 0).then_some(additive_atoms),
        "corpus": training.corpus, "tokens": training.tokens,
        "made_by": training.tool, "file_bytes": file.data_bytes(), "bytes": set.bytes(),
        "layers": layers,
    });
    Ok(Report { text, json })
}

fn codes(path: &Path) -> anyhow::Result<Report> {
    let file = CodeFile::load(path)?;
    let codes = &file.codes;
    let format = codes.format();
    let numbers = (codes.len() * file.head_dim).max(1);
    let bits = 8.0 * codes.bytes_used() as f64 / numbers as f64;
    let coefficients = match format.coefficients {
        lexico::CoefficientFormat::I8 => "i8",
        lexico::CoefficientFormat::F8 => "f8",
        lexico::CoefficientFormat::F32 => "f32",
        lexico::CoefficientFormat::InAtoms(_) => "packed",
    };
    let lengths = if format.variable { "variable" } else { "fixed" };
    let checksum = format!("{:08x}", file.checksum);
    let text = facts(&[
        ("kind", "codes".to_owned()),
        (
            "vectors",
            format!("{} of length {}", codes.len(), file.head_dim),
        ),
        ("sparsity", format!("{} ({lengths})", format.sparsity)),
        ("coefficients", coefficients.to_owned()),
        (
            "dictionary",
            format!("tensor {}, CRC-32 {checksum}", file.tensor),
        ),
        (
            "bytes",
            format!(
                "{} in memory ({bits:.2} bits a number)",
                ui::bytes(codes.bytes_used())
            ),
        ),
    ]);
    let json = json!({
        "kind": "codes", "vectors": codes.len(), "head_dim": file.head_dim,
        "sparsity": format.sparsity, "variable": format.variable, "coefficients": coefficients,
        "tensor": file.tensor, "dictionary_crc32": checksum,
        "bytes": codes.bytes_used(), "bits_per_number": bits,
    });
    Ok(Report {
        text: text.trim_end().to_owned(),
        json,
    })
}

fn saved(saved: &SavedGeneration) -> Report {
    let (progress, parts) = (saved.progress(), saved.parts());
    let bytes: usize = parts.iter().map(|(_, bytes)| bytes).sum();
    // A name from outside must not steer the terminal.
    let model = saved.model().escape_debug().to_string();
    let listed = parts.iter().map(|(kind, own)| {
        let kind = kind.escape_debug();
        format!("{kind} {}", ui::bytes(*own))
    });
    let text = facts(&[
        ("kind", "saved cache".to_owned()),
        ("format", FORMAT.to_owned()),
        (
            "model",
            format!(
                "{model}, fingerprint {}",
                saved.fingerprint().escape_debug()
            ),
        ),
        ("cache", saved.spec().to_string()),
        (
            "tokens",
            format!(
                "{}, {} of them generated last",
                progress.tokens.len(),
                progress.tokens.len().saturating_sub(progress.prompt_tokens)
            ),
        ),
        ("positions", saved.positions().to_string()),
        ("messages", progress.messages.len().to_string()),
        (
            "bytes",
            format!(
                "{}, {} of FP16: {}",
                ui::bytes(bytes),
                ui::percent(bytes as f64 / saved.fp16_bytes().max(1) as f64),
                listed.collect::<Vec<_>>().join(", ")
            ),
        ),
    ]);
    let parts: serde_json::Map<String, Value> = parts
        .iter()
        .map(|&(kind, bytes)| (kind.to_owned(), bytes.into()))
        .collect();
    let json = json!({
        "kind": "saved cache", "format": FORMAT, "model": saved.model(),
        "fingerprint": saved.fingerprint(), "cache": saved.spec().to_string(),
        "tokens": progress.tokens.len(), "prompt_tokens": progress.prompt_tokens,
        "positions": saved.positions(), "messages": progress.messages.len(),
        "fp16_bytes": saved.fp16_bytes(), "bytes": bytes, "parts": parts,
    });
    Report {
        text: text.trim_end().to_owned(),
        json,
    }
}

fn tensors(file: &TensorFile) -> anyhow::Result<Report> {
    let mut rows = Vec::new();
    let mut list = Vec::new();
    for name in file.names() {
        let (dtype, shape) = file.info(&name)?;
        rows.push([name.clone(), format!("{dtype:?}"), format!("{shape:?}")]);
        list.push(json!({"name": name, "dtype": format!("{dtype:?}"), "shape": shape}));
    }
    let text = facts(&[
        ("kind", "tensors".to_owned()),
        ("tensors", rows.len().to_string()),
        ("bytes", ui::bytes(file.data_bytes())),
    ]) + &ui::table(["tensor", "numbers", "shape"], rows);
    let json = json!({
        "kind": "tensors", "bytes": file.data_bytes(),
        "metadata": file.metadata(), "tensors": list,
    });
    Ok(Report { text, json })
}

/// A model's shape, and what a GGUF file says beyond it.
fn model(config: &Config, dictionaries: bool, gguf: Option<&GgufModel>) -> Report {
    let per_token = config.fp16_cache_bytes(1);
    let mut lines = vec![
        ("kind", "model".to_owned()),
        ("architecture", config.architecture.clone()),
        ("layers", config.layers.to_string()),
        (
            "heads",
            format!("{} on {} KV heads", config.heads, config.kv_heads),
        ),
        ("head dim", config.head_dim.to_string()),
        ("hidden", config.hidden.to_string()),
        ("vocabulary", config.vocabulary.to_string()),
        ("context", config.context.to_string()),
        (
            "dictionaries",
            if dictionaries { "beside it" } else { "none" }.to_owned(),
        ),
        ("FP16 cache", format!("{} a token", ui::bytes(per_token))),
    ];
    let mut json = json!({
        "kind": "model", "architecture": config.architecture, "layers": config.layers,
        "heads": config.heads, "kv_heads": config.kv_heads, "head_dim": config.head_dim,
        "hidden": config.hidden, "vocabulary": config.vocabulary, "context": config.context,
        "dictionaries": dictionaries, "fp16_cache_bytes_per_token": per_token,
    });
    if let Some(gguf) = gguf {
        let types = gguf.number_types();
        let counts = types.iter().map(|(name, count)| format!("{count} {name}"));
        // A name from outside must not steer the terminal.
        lines.insert(1, ("name", gguf.name().escape_debug().to_string()));
        lines.push(("tensors", counts.collect::<Vec<_>>().join(", ")));
        json["name"] = gguf.name().into();
        json["tensors"] = json!(types);
    }
    Report {
        text: facts(&lines).trim_end().to_owned(),
        json,
    }
}
