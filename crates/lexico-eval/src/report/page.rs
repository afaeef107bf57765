//! A page without outside resources: plot, tables, prompts.

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::evaluation::{Evaluation, Run};
use crate::plot::{Axis, Colours, Layout, Legend, Line, Panel, Scale, escape, svg};
use crate::task::{Detail, Measure, groups};
use crate::tasks::reconstruction::{BOUND, Reconstruction};

/// Items that are shown with their prompts and answers.
const SHOWN: usize = 20;
/// Characters of a prompt or answer that are shown.
const CHARACTERS: usize = 6000;

const STYLE: &str = "
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.lead { color: #555; margin: 0 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: #f5f5f5; }
svg { max-width: 100%; height: auto; display: block; }
.narrow { display: none; }
@media (max-width: 640px) { .wide { display: none; } .narrow { display: block; } body { padding: .6rem; } }
details { border: 1px solid #ddd; border-radius: .3rem; margin: .4rem 0; padding: .3rem .6rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7; padding: .5rem; margin: .3rem 0; font-size: .82rem; }
.right { color: #00704a; } .wrong { color: #b30000; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
";

/// The page of an evaluation.
pub(super) fn of_evaluation(evaluation: &Evaluation) -> String {
    let items = evaluation.runs.first().map_or(0, |run| run.items.len());
    let lead = format!(
        "{items} items, the same for every cache. Sizes are bytes as allocated at the end of an item over those of FP16, \
         mean over the items; dictionaries are not among them. Bars and intervals: 95 %."
    );
    let mut out = begin(
        &format!("{} with {}", evaluation.task, evaluation.model),
        &lead,
    );
    plots(&mut out, evaluation);
    heading(&mut out, "Caches");
    runs(&mut out, evaluation);
    for skipped in &evaluation.skipped {
        let text = format!("Left out at {}: {}.", skipped.budget, skipped.reason);
        let _ = writeln!(out, "<p>{}</p>", escape(&text));
    }
    by_group(&mut out, evaluation);
    answers(&mut out, evaluation);
    heading(&mut out, "Settings");
    let _ = writeln!(out, "<dl>");
    for settings in [
        &evaluation.settings,
        &evaluation.seeds,
        &evaluation.versions,
    ] {
        describe(&mut out, settings);
    }
    let _ = writeln!(out, "</dl>");
    out + END
}

/// The page of a reconstruction.
pub(super) fn of_reconstruction(found: &Reconstruction) -> String {
    let lead = format!(
        "What each cache holds of {} positions of the model's keys and values, as attention takes them, against the bits \
         that it allocates. The bound is for Gaussian vectors of the same covariance.",
        found.positions
    );
    let mut out = begin(&format!("reconstruction with {}", found.model), &lead);
    for (class, beside) in [("wide", true), ("narrow", false)] {
        let _ = writeln!(out, "<div class=\"{class}\">{}</div>", found.curves(beside));
    }
    heading(&mut out, "Caches, mean of the layers");
    let header = [
        "cache",
        "keys: bits",
        "relative error",
        "squared error",
        "values: bits",
        "relative error",
        "squared error",
    ];
    let formats = found
        .formats()
        .into_iter()
        .filter(|format| *format != BOUND);
    let rows = formats.map(|format| {
        let mut row = vec![format.to_owned()];
        for part in ["keys", "values"] {
            let [bits, relative, squared] = found.mean(format, part);
            row.extend([
                format!("{bits:.2}"),
                format!("{relative:.4}"),
                format!("{squared:.5}"),
            ]);
        }
        row
    });
    table(&mut out, &header, rows.collect());
    out + END
}

const END: &str = "</body>\n</html>\n";

fn begin(title: &str, lead: &str) -> String {
    let (title, lead) = (escape(title), escape(lead));
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p class=\"lead\">{lead}</p>\n"
    )
}

fn heading(out: &mut String, text: &str) {
    let _ = writeln!(out, "<h2>{}</h2>", escape(text));
}

/// The score against the size, drawn for screens and for phones.
fn plots(out: &mut String, evaluation: &Evaluation) {
    let narrow = Layout {
        frame: (270.0, 240.0),
        legend: Legend::Below,
        colours: Colours::Distinct,
    };
    let narrow = svg(&[vec![panel(evaluation)]], narrow);
    for (class, drawn) in [("wide", plot(evaluation)), ("narrow", narrow)] {
        let _ = writeln!(out, "<div class=\"{class}\">{drawn}</div>");
    }
}

/// The score against the size.
pub(super) fn plot(evaluation: &Evaluation) -> String {
    let layout = Layout {
        frame: (640.0, 360.0),
        legend: Legend::Beside,
        colours: Colours::Distinct,
    };
    svg(&[vec![panel(evaluation)]], layout)
}

fn panel(evaluation: &Evaluation) -> Panel {
    let measure = evaluation.measure;
    let factor = if measure.is_share() { 100.0 } else { 1.0 };
    let others = || evaluation.runs.iter().skip(1);
    let mut families: Vec<&str> = Vec::new();
    for run in others() {
        if !families.contains(&run.family.as_str()) {
            families.push(&run.family);
        }
    }
    let line = |family: &&str| {
        let mut runs: Vec<&Run> = others().filter(|run| run.family == *family).collect();
        runs.sort_by(|a, b| a.share.total_cmp(&b.share));
        let points = runs
            .iter()
            .map(|run| (100.0 * run.share, factor * run.score));
        // A bar of no length where nothing is known.
        let bound = |run: &&Run, bound: Option<f64>| factor * bound.unwrap_or(run.score);
        let bars = runs
            .iter()
            .map(|run| (bound(run, run.low), bound(run, run.high)));
        Line {
            name: (*family).to_owned(),
            points: points.collect(),
            bars: bars.collect(),
        }
    };
    let unit = if measure.is_share() { ", %" } else { "" };
    let full = evaluation.runs.first();
    Panel {
        title: format!("{} against memory", measure.name()),
        x: Axis {
            label: "bytes over FP16's, %".to_owned(),
            scale: Scale::FromZero,
        },
        y: Axis {
            label: match measure {
                Measure::Divergence => "KL divergence from full, nats".to_owned(),
                _ => format!("{}{unit}", measure.name()),
            },
            scale: match measure {
                Measure::Divergence => Scale::Logarithmic,
                Measure::Perplexity => Scale::Linear,
                _ => Scale::FromZero,
            },
        },
        level: full
            .filter(|_| measure != Measure::Divergence)
            .map(|run| ("full".to_owned(), factor * run.score)),
        lines: families.iter().map(line).collect(),
    }
}

fn runs(out: &mut String, evaluation: &Evaluation) {
    let measure = evaluation.measure;
    let mut header = vec!["cache", "of FP16", measure.name(), "from", "to"];
    let first = evaluation.runs.first();
    if first.is_some_and(|run| run.kept.is_some()) {
        header.push("kept of full's");
    }
    if first.is_some_and(|run| run.distributions.is_some()) {
        header.extend(["99th percentile", "same token"]);
    }
    header.extend(["budget", "seconds"]);
    let bound = |bound: Option<f64>| bound.map_or(String::new(), |x| measure.print(x));
    let rows = evaluation.runs.iter().map(|run| {
        let mut row = vec![
            run.cache.clone(),
            percent(run.share),
            measure.print(run.score),
            bound(run.low),
            bound(run.high),
        ];
        if let Some(kept) = run.kept {
            row.push(format!("{} of {}", kept.right, kept.of));
        }
        if let Some(distributions) = run.distributions {
            row.push(measure.print(f64::from(distributions.percentile_99)));
            row.push(percent(distributions.agreement));
        }
        row.extend([run.budgets.join(", "), format!("{:.1}", run.seconds)]);
        row
    });
    table(out, &header, rows.collect());
}

fn by_group(out: &mut String, evaluation: &Evaluation) {
    let measure = evaluation.measure;
    let names: Vec<&str> = match evaluation.runs.first() {
        Some(run) => groups(&run.items)
            .into_iter()
            .map(|(name, _)| name)
            .collect(),
        None => return,
    };
    if names.is_empty() {
        return;
    }
    heading(out, "By group");
    let mut header = vec!["cache"];
    header.extend(&names);
    let rows = evaluation.runs.iter().map(|run| {
        let mut row = vec![run.cache.clone()];
        for (_, of_group) in groups(&run.items) {
            row.push(measure.print(measure.of(of_group).value));
        }
        row
    });
    table(out, &header, rows.collect());
}

fn table(out: &mut String, header: &[&str], rows: Vec<Vec<String>>) {
    let cells = |cells: &mut dyn Iterator<Item = &str>, tag: &str| -> String {
        cells
            .map(|text| format!("<{tag}>{}</{tag}>", escape(text)))
            .collect()
    };
    let head = cells(&mut header.iter().copied(), "th");
    let _ = writeln!(
        out,
        "<div class=\"scroll\"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>"
    );
    for row in &rows {
        let row = cells(&mut row.iter().map(String::as_str), "td");
        let _ = writeln!(out, "<tr>{row}</tr>");
    }
    let _ = writeln!(out, "</tbody></table></div>");
}

/// The first items' prompts and what each cache made of them.
fn answers(out: &mut String, evaluation: &Evaluation) {
    if evaluation.prompts.is_empty() {
        return;
    }
    heading(out, "Prompts and answers");
    let items = evaluation.prompts.len();
    if items > SHOWN {
        let _ = writeln!(
            out,
            "<p>The first {SHOWN} of {items}; results.json has the answers to all.</p>"
        );
    }
    for (number, prompt) in evaluation.prompts.iter().take(SHOWN).enumerate() {
        let first = evaluation.runs.first();
        let Some(first) = first.and_then(|run| run.items.get(number)) else {
            continue;
        };
        let Detail::Answer { expected, .. } = &first.detail else {
            continue;
        };
        let _ = writeln!(
            out,
            "<details><summary>{}, expected {}</summary>\n<pre>{}</pre>",
            escape(&first.id),
            escape(&clipped(expected)),
            escape(&clipped(prompt))
        );
        for run in &evaluation.runs {
            let Some(outcome) = run.items.get(number) else {
                continue;
            };
            let Detail::Answer { text, .. } = &outcome.detail else {
                continue;
            };
            let class = if outcome.score >= 1.0 {
                "right"
            } else {
                "wrong"
            };
            let _ = writeln!(
                out,
                "<div class=\"{class}\">{}: {}</div><pre>{}</pre>",
                escape(&run.cache),
                evaluation.measure.print(outcome.score),
                escape(&clipped(text))
            );
        }
        let _ = writeln!(out, "</details>");
    }
}

/// Its beginning and its end, where a text is long.
fn clipped(text: &str) -> String {
    let count = text.chars().count();
    if count <= CHARACTERS {
        return text.to_owned();
    }
    let half = CHARACTERS / 2;
    let begin: String = text.chars().take(half).collect();
    let end: String = text.chars().skip(count - half).collect();
    format!("{begin}\n[… {} characters …]\n{end}", count - 2 * half)
}

fn describe(out: &mut String, settings: &Map<String, Value>) {
    for (name, value) in settings {
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Array(values) if values.is_empty() => continue,
            Value::Array(values) => {
                let texts = values.iter().map(|value| match value {
                    Value::String(text) => text.clone(),
                    value => value.to_string(),
                });
                texts.collect::<Vec<_>>().join(", ")
            }
            Value::Null => continue,
            value => value.to_string(),
        };
        let _ = writeln!(out, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(&text));
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
