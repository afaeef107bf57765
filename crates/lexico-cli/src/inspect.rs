use std::path::{Path, PathBuf};

use clap::Args;
use lexico::codes::{self, CodeFile};
use lexico::dictionary::{self, CODEBOOK_ATOMS, CodeFamily, LayerErrors, LayerSparsities};
use lexico::tensor_file::TensorFile;
use lexico::{CodeFormat, DictionarySet};
use lexico_llm::config::Config;
use lexico_llm::gguf::GgufModel;
use lexico_llm::saved::{FORMAT, SavedGeneration};
use serde_json::{Value, json};

use crate::model::beside;
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
        let beside = beside(&self.file).is_file();
        let report = if self.file.is_dir() {
            model(&Config::load(&self.file)?, beside, None)
        } else if self.file.extension().is_some_and(|e| e == "gguf") {
            let gguf = GgufModel::open(&self.file)?;
            model(gguf.config(), beside, Some(&gguf))
        } else if SavedGeneration::is_one(&self.file) {
            saved(&SavedGeneration::open(&self.file)?)
        } else {
            let file = TensorFile::open(&self.file)?;
            match file.metadata().get("format").map(String::as_str) {
                Some(format) if dictionary::FORMATS.contains(&format) => dictionaries(&file)?,
                Some(codes::FORMAT) => codes(&self.file)?,
                _ => tensors(&file)?,
            }
        };
        let (text, json) = report;
        match self.json {
            true => ui::json(&json),
            false => ui::line(&text),
        }
    }
}

/// Text for people, and the same as JSON.
type Report = (String, Value);

/// Writes names and values in lines, aligned.
fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = facts.iter();
    let lines = lines.map(|(name, value)| format!("{name:<width$}  {value}"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Errors and sparsities of the dictionaries for one family of codes.
struct Measured<'a> {
    errors: Option<&'a Vec<LayerErrors>>,
    allocation: Option<Vec<LayerSparsities>>,
}

impl Measured<'_> {
    /// Returns the held-out error of a layer's keys and values.
    fn errors(&self, layer: usize) -> [Option<f32>; 2] {
        let errors = self.errors.and_then(|errors| errors.get(layer));
        [errors.map(|e| e.keys), errors.map(|e| e.values)]
    }

    /// Returns the sparsities of each head's keys and values.
    fn sparsities(&self, layer: usize) -> [Option<&Vec<usize>>; 2] {
        let own = self.allocation.as_ref().and_then(|all| all.get(layer));
        [own.map(|own| &own.keys), own.map(|own| &own.values)]
    }

    /// Returns a row of a table, with how many atoms the layer's two dictionaries have.
    fn row(&self, layer: usize, atoms: [String; 2]) -> Vec<String> {
        let errors = self.errors(layer);
        let errors = errors.map(|error| error.map_or("-".to_owned(), |e| format!("{e:.4}")));
        let heads = self.sparsities(layer).map(|heads| {
            heads.map_or("same for all".to_owned(), |heads| {
                let heads: Vec<String> = heads.iter().map(usize::to_string).collect();
                heads.join(" ")
            })
        });
        let row = [layer.to_string()].into_iter();
        row.chain(atoms).chain(errors).chain(heads).collect()
    }
}

fn table(atoms: &str, nonzeros: &str, rows: Vec<Vec<String>>) -> String {
    let header = [
        "layer".to_owned(),
        format!("key {atoms}"),
        format!("value {atoms}"),
        "key error".to_owned(),
        "value error".to_owned(),
        format!("key {nonzeros} by head"),
        format!("value {nonzeros} by head"),
    ];
    ui::table(header, rows)
}

fn dictionaries(file: &TensorFile) -> anyhow::Result<Report> {
    let set = DictionarySet::read(file)?;
    let (model, training) = (&set.model, &set.training);
    let sparse = Measured {
        errors: Some(&training.relative_error),
        allocation: set.allocate(CodeFamily::Sparse, training.sparsity as f64),
    };
    let codebooks = set.max_sparsity(CodeFamily::Additive);
    let additive_sparsity = set.usual_sparsity(CodeFamily::Additive);
    let additive = Measured {
        errors: training.additive_relative_error.as_ref(),
        allocation: set.allocate(CodeFamily::Additive, additive_sparsity as f64),
    };
    let layers = || set.layers.iter().enumerate();
    let rows = layers().filter_map(|(l, layer)| {
        let both = layer.sparse.as_ref()?;
        let atoms = [both.keys.len(), both.values.len()];
        Some(sparse.row(l, atoms.map(|atoms| atoms.to_string())))
    });
    let rows: Vec<_> = rows.collect();
    let mut tables = Vec::new();
    let mut sparse_fact = "none".to_owned();
    if !rows.is_empty() {
        tables.push(table("atoms", "nonzeros", rows));
        sparse_fact = format!("{} nonzeros on average by default", training.sparsity);
    }
    let rows = layers().filter_map(|(l, layer)| {
        let codebooks = layer.codebooks.as_ref()?;
        let sizes = [&codebooks.keys, &codebooks.values].map(|codebooks| {
            let (count, first) = (codebooks.len(), codebooks.sizes().first);
            format!("{first} + {} × {CODEBOOK_ATOMS}", count - 1)
        });
        Some(additive.row(l, sizes))
    });
    let rows: Vec<_> = rows.collect();
    let mut additive_fact = "none".to_owned();
    if !rows.is_empty() {
        let title = "Additive codes, one atom of each codebook:";
        tables.push(format!("{title}\n{}", table("atoms", "atoms a code", rows)));
        additive_fact =
            format!("{codebooks} codebooks, {additive_sparsity} atoms on average by default");
    }
    let maps = set.layers.iter().any(|layer| layer.maps.is_some());
    if maps {
        additive_fact += ", behind maps of the heads";
    }
    let joint = set.joint();
    if joint.heads > 1 {
        additive_fact += &format!(", {} heads together", joint.heads);
    }
    if joint.layers > 1 {
        additive_fact += &format!(", {} layers together", joint.layers);
    }
    let rotary = format!("{}, theta {}", model.rotary.kind, model.rotary.theta);
    let text = facts(&[
        ("kind", "dictionaries".to_owned()),
        ("model", format!("{} ({})", model.name, model.architecture)),
        ("layers", model.layers.to_string()),
        ("KV heads", model.kv_heads.to_string()),
        ("head dim", model.head_dim.to_string()),
        ("rotary", rotary),
        ("sparse codes", sparse_fact),
        ("additive codes", additive_fact),
        ("corpus", training.corpus.join(", ")),
        ("tokens", training.tokens.to_string()),
        ("made by", training.tool.clone()),
        ("in the file", ui::bytes(file.data_bytes())),
        ("in memory", ui::bytes(set.bytes())),
    ]);
    let layers = layers().map(|(l, layer)| {
        let part = |part: usize| {
            let sparse_atoms = layer.sparse.as_ref();
            let atoms = sparse_atoms.map(|own| [&own.keys, &own.values][part].len());
            let codebooks = layer.codebooks.as_ref();
            let codebooks = codebooks.map(|own| [&own.keys, &own.values][part]);
            let codebooks = codebooks.map(|codebooks| {
                json!({
                    "groups": codebooks.len(), "first": codebooks.sizes().first,
                    "relative_error": additive.errors(l)[part], "sparsities": additive.sparsities(l)[part],
                })
            });
            json!({
                "atoms": atoms, "relative_error": sparse.errors(l)[part],
                "sparsities": sparse.sparsities(l)[part], "packed": codebooks,
            })
        };
        json!({"layer": l, "keys": part(0), "values": part(1)})
    });
    let layers: Vec<Value> = layers.collect();
    let json = json!({
        "kind": "dictionaries",
        "model": {
            "name": model.name, "architecture": model.architecture, "layers": model.layers,
            "kv_heads": model.kv_heads, "head_dim": model.head_dim,
            "rotary": {"kind": model.rotary.kind, "theta": model.rotary.theta},
        },
        "sparsity": training.sparsity, "groups": codebooks, "packed_sparsity": (codebooks > 0).then_some(additive_sparsity),
        "maps": maps, "joint_heads": joint.heads, "joint_layers": joint.layers, "corpus": training.corpus, "tokens": training.tokens,
        "made_by": training.tool, "file_bytes": file.data_bytes(), "bytes": set.bytes(),
        "layers": layers,
    });
    Ok((format!("{text}\n{}", tables.join("\n\n")), json))
}

fn codes(path: &Path) -> anyhow::Result<Report> {
    let file = CodeFile::load(path)?;
    let codes = &file.codes;
    let format = codes.format();
    let numbers = (codes.len() * file.head_dim).max(1);
    let bits = 8.0 * codes.bytes_used() as f64 / numbers as f64;
    let (name, variable) = match format {
        CodeFormat::Sparse(format) => (format.coefficients.name(), format.variable),
        CodeFormat::Additive(_) => ("additive", false),
    };
    let lengths = if variable { "variable" } else { "fixed" };
    let checksum = format!("{:08x}", file.checksum);
    let vectors = format!("{} of length {}", codes.len(), file.head_dim);
    let dictionary = format!("tensor {}, CRC-32 {checksum}", file.tensor);
    let vectors = match file.head {
        Some(head) => format!("{vectors}, of KV head {head}"),
        None => vectors,
    };
    let bytes = ui::bytes(codes.bytes_used());
    let text = facts(&[
        ("kind", "codes".to_owned()),
        ("vectors", vectors),
        ("sparsity", format!("{} ({lengths})", format.sparsity())),
        ("format", name.to_owned()),
        ("dictionary", dictionary),
        (
            "bytes",
            format!("{bytes} in memory ({bits:.2} bits a number)"),
        ),
    ]);
    let json = json!({
        "kind": "codes", "vectors": codes.len(), "head_dim": file.head_dim,
        "sparsity": format.sparsity(), "variable": variable, "coefficients": name,
        "tensor": file.tensor, "dictionary_crc32": checksum, "head": file.head,
        "bytes": codes.bytes_used(), "bits_per_number": bits,
    });
    Ok((text, json))
}

fn saved(saved: &SavedGeneration) -> Report {
    let (header, parts) = (saved.header(), saved.parts());
    let progress = &header.progress;
    let bytes: usize = parts.iter().map(|(_, bytes)| bytes).sum();
    // A name from outside must not steer the terminal.
    let model = header.model.escape_debug();
    let fingerprint = header.fingerprint.escape_debug();
    let listed = parts.iter().map(|(kind, own)| {
        let kind = kind.escape_debug();
        format!("{kind} {}", ui::bytes(*own))
    });
    let listed = listed.collect::<Vec<_>>().join(", ");
    let share = ui::percent(bytes as f64 / header.fp16_bytes.max(1) as f64);
    let tokens = progress.tokens.len();
    let generated = tokens.saturating_sub(progress.prompt_tokens);
    let text = facts(&[
        ("kind", "saved cache".to_owned()),
        ("format", FORMAT.to_owned()),
        ("model", format!("{model}, fingerprint {fingerprint}")),
        ("cache", saved.spec().to_string()),
        (
            "tokens",
            format!("{tokens}, {generated} of them generated last"),
        ),
        ("positions", header.positions.to_string()),
        ("messages", progress.messages.len().to_string()),
        (
            "bytes",
            format!("{}, {share} of FP16: {listed}", ui::bytes(bytes)),
        ),
    ]);
    let parts = parts
        .iter()
        .map(|&(kind, bytes)| (kind.to_owned(), bytes.into()));
    let parts: serde_json::Map<String, Value> = parts.collect();
    let json = json!({
        "kind": "saved cache", "format": FORMAT, "model": header.model,
        "fingerprint": header.fingerprint, "cache": saved.spec().to_string(),
        "tokens": tokens, "prompt_tokens": progress.prompt_tokens,
        "positions": header.positions, "messages": progress.messages.len(),
        "fp16_bytes": header.fp16_bytes, "bytes": bytes, "parts": parts,
    });
    (text, json)
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
    ]);
    let table = ui::table(["tensor", "numbers", "shape"], rows);
    let json = json!({
        "kind": "tensors", "bytes": file.data_bytes(),
        "metadata": file.metadata(), "tensors": list,
    });
    Ok((format!("{text}\n{table}"), json))
}

/// Shows a model's shape, and what a GGUF file says beyond it.
fn model(config: &Config, dictionaries: bool, gguf: Option<&GgufModel>) -> Report {
    let per_token = config.fp16_cache_bytes(1);
    let heads = format!("{} on {} KV heads", config.heads, config.kv_heads);
    let beside = if dictionaries { "beside it" } else { "none" };
    let mut lines = vec![
        ("kind", "model".to_owned()),
        ("architecture", config.architecture.clone()),
        ("layers", config.layers.to_string()),
        ("heads", heads),
        ("head dim", config.head_dim.to_string()),
        ("hidden", config.hidden.to_string()),
        ("vocabulary", config.vocabulary.to_string()),
        ("context", config.context.to_string()),
        ("dictionaries", beside.to_owned()),
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
    (facts(&lines), json)
}
