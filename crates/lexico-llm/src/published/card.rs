//! The model card of published dictionaries, as the hub shows it.

use std::fmt::Write;

use indicatif::{HumanBytes, HumanCount};
use lexico::shown::shown;

use super::{CARD, INDEX, Index, Published, plain_name, repository_name};

impl Index {
    /// Writes the model card: what the hub reads of it, then each of the dictionaries.
    #[must_use]
    pub fn card(&self) -> String {
        let mut card = "---\nlibrary_name: lexico\n".to_owned();
        let all = || self.dictionaries.iter();
        let mut models: Vec<&str> = all().filter_map(|own| own.base_model.as_deref()).collect();
        models.sort_unstable();
        models.dedup();
        match models[..] {
            [] => {}
            [model] => line(&mut card, format_args!("base_model: {model}")),
            _ => {
                line(&mut card, format_args!("base_model:"));
                models
                    .iter()
                    .for_each(|m| line(&mut card, format_args!("- {m}")));
            }
        }
        line(&mut card, format_args!("license: {}", self.license));
        card += "tags:\n- lexico\n- kv-cache\n- kv-cache-compression\n---\n\n";
        let mut names: Vec<String> = all().map(name).collect();
        names.sort_unstable();
        names.dedup();
        line(
            &mut card,
            format_args!(
                "# Lexico dictionaries for {}\n",
                markdown(&names.join(", "))
            ),
        );
        card += "Lexico keeps the KV cache of a language model as short codes over dictionaries that are learned once for the \
                 model.\nThe method is that of [Lexico: Extreme KV Cache Compression via Sparse Coding over Universal \
                 Dictionaries](https://arxiv.org/abs/2412.08890).\nThese are such dictionaries. They hold no weights of \
                 the model.\n\n";
        all().for_each(|own| own.describe(&mut card));
        card += "## How they are checked\n\n";
        let _ = write!(
            card,
            "`{INDEX}` has the fingerprint of each model, the first 16 digits of a SHA-256 of the weights of its norms, which \
             its GGUF\nfiles hold too, and the SHA-256 of each file. Lexico takes the file that is for the model at hand, and \
             refuses one that is not what\nthe index says. `lexico publish` wrote this {CARD}.\n"
        );
        card
    }
}

impl Published {
    fn describe(&self, card: &mut String) {
        let model = &self.model;
        line(card, format_args!("## {}\n", self.file));
        line(card, format_args!("```sh"));
        let named = self.base_model.as_deref().unwrap_or("MODEL");
        line(
            card,
            format_args!(
                "lexico run --model {named} --dictionary hf://OWNER/{} \"Once upon a time\"",
                repository_name(self.base_model.as_deref().unwrap_or(&model.name))
            ),
        );
        line(
            card,
            format_args!("```\n\nOWNER is the owner of this repository.\n"),
        );
        let mut fact = |name: &str, value: String| {
            line(card, format_args!("| {name} | {value} |"));
        };
        fact("", String::new());
        fact("---", "---".to_owned());
        let of = match &self.base_model {
            Some(name) => format!("[{name}](https://huggingface.co/{name})"),
            None => markdown(&model.name),
        };
        fact(
            "model",
            format!(
                "{of}, {}: {} layers of {} KV heads, head dim {}",
                markdown(&model.architecture),
                model.layers,
                model.kv_heads,
                model.head_dim
            ),
        );
        fact(
            "fingerprint of the model",
            format!("`{}`", self.fingerprint),
        );
        if self.codebooks > 0 {
            let maps = if self.maps {
                ", behind a map of each head"
            } else {
                ""
            };
            fact(
                "for additive codes",
                format!(
                    "{} codebooks, the first of {} atoms{maps}",
                    self.codebooks,
                    HumanCount(self.first_atoms as u64)
                ),
            );
        }
        if self.sparse_atoms > 0 {
            let atoms = HumanCount(self.sparse_atoms as u64);
            fact("for sparse codes", format!("{atoms} atoms"));
        }
        let learned = &self.learned;
        let texts = markdown(&learned.corpus.join(", "));
        let checksum = learned.tokens_crc32.as_ref();
        let checksum = checksum.map_or_else(String::new, |sum| {
            format!(" (their CRC-32: {})", markdown(sum))
        });
        let from = match learned.tokens {
            // Imported dictionaries do not say.
            0 => texts,
            tokens => format!("{} tokens{checksum} of {texts}", HumanCount(tokens as u64)),
        };
        fact("learned from", from);
        let known = [
            (
                "vectors a dictionary",
                learned.vectors.map(|n| HumanCount(n as u64).to_string()),
            ),
            ("effort", learned.effort.as_deref().map(markdown)),
            ("seed", learned.seed.map(|seed| seed.to_string())),
            (
                "time it took",
                learned.seconds.map(|seconds| format!("{seconds:.0} s")),
            ),
        ];
        for (name, value) in known {
            if let Some(value) = value {
                fact(name, value);
            }
        }
        fact("learned by", markdown(&learned.tool));
        fact(
            "size",
            format!(
                "{} bytes; {} in memory",
                HumanCount(self.size),
                HumanBytes(self.memory)
            ),
        );
        fact("SHA-256", format!("`{}`", self.sha256));
        line(card, format_args!(""));
        self.show_measured(card);
    }

    fn show_measured(&self, card: &mut String) {
        let Some(measured) = &self.measured else {
            line(
                card,
                format_args!("What they keep was not measured when they were made.\n"),
            );
            return;
        };
        if let Some(error) = &measured.relative_error {
            line(
                card,
                format_args!(
                    "On text of the corpus that was held out, codes of {} atoms come within a mean relative error of {:.3} \
                     for keys and\n{:.3} for values.\n",
                    measured.sparsity, error.keys, error.values
                ),
            );
        }
        if measured.losses.is_empty() {
            return;
        }
        let m = self.model.head_dim.max(1);
        line(
            card,
            format_args!(
                "| atoms a code | bytes of a vector, of FP16 | loss in nats |\n|---:|---:|---:|"
            ),
        );
        for &(sparsity, loss) in &measured.losses {
            // Sparse codes with coefficients of 8 bits.
            let bytes = if self.codebooks > 0 {
                1 + sparsity
            } else {
                1 + 3 * sparsity
            };
            let share = 100.0 * bytes as f64 / (2 * m) as f64;
            line(
                card,
                format_args!("| {sparsity} | {share:.1} % | {loss:.4} |"),
            );
        }
        line(
            card,
            format_args!(
                "\nThe loss is the KL divergence of the next token's distribution from that without codes, on held-out text: \
                 the sum of what\ncoding the keys or the values of each head alone costs. The first and the newest tokens stay \
                 uncompressed, and count on top of the bytes.\n"
            ),
        );
    }
}

/// The model's name, for people.
fn name(own: &Published) -> String {
    plain_name(own.base_model.as_deref().unwrap_or(&own.model.name))
}

fn line(card: &mut String, text: std::fmt::Arguments<'_>) {
    // Nothing fails that writes to a string.
    let _ = writeln!(card, "{text}");
}

/// Text from outside as Markdown shows it, in a cell of a table too.
fn markdown(text: &str) -> String {
    let mut out = String::new();
    for c in shown(text).chars() {
        if r"\`*_[]<>|#&~".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}
