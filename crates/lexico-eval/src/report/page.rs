//! A page without outside resources: plot, tables, prompts.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, Value, context};

use super::Report;
use super::overview::{Comparison, Overview};
use crate::evaluation::{Difference, Evaluation, Run};
use crate::plot::{Axis, Colours, Layout, Legend, Line, Panel, Scale, escape, svg};
use crate::task::{Band, Measure, unique};
use crate::tasks::reconstruction::Reconstruction;

/// Items that are shown with their prompts and answers.
const SHOWN: usize = 20;
/// Characters of a prompt or answer that are shown.
const CHARACTERS: usize = 6000;

impl Report for Evaluation {
    fn page(&self) -> Result<String, Error> {
        let items = self.runs.first().map_or(0, |run| run.items.len());
        let lead = format!(
            "{items} items, the same for every cache. Sizes are bytes as allocated at the end of an item over those of FP16, \
             mean over the items; dictionaries are not among them. Bars and intervals: 95 %."
        );
        let narrow = Layout {
            frame: (270.0, 240.0),
            legend: Legend::Below,
            colours: Colours::Distinct,
        };
        let mut tables = vec![runs(self)];
        if let Some((header, rows)) = self.by_position() {
            let curve = Value::from_safe_string(svg(&[vec![by_position(self)]], narrow));
            tables.push(context! { heading => "By position", header, rows, curve });
        }
        if let Some((header, rows)) = self.by_group() {
            tables.push(
                context! { heading => "By group", header => Serde(header), rows => Serde(rows) },
            );
        }
        let settings = self.settings.iter().chain(&self.seeds);
        let settings: Vec<_> = settings.chain(&self.versions).collect();
        let measure = self.measure;
        render(
            move |score| measure.print(score),
            context! {
                title => format!("{} with {}", self.task, self.model), lead, tables, settings => Serde(settings),
                wide => Value::from_safe_string(self.plot()),
                narrow => Value::from_safe_string(svg(&[vec![panel(self)]], narrow)),
                shown => SHOWN, prompts => Serde(&self.prompts), runs => Serde(&self.runs),
            },
        )
    }

    fn plot(&self) -> String {
        let layout = Layout {
            frame: (640.0, 360.0),
            legend: Legend::Beside,
            colours: Colours::Distinct,
        };
        svg(&[vec![panel(self)]], layout)
    }
}

impl Report for Reconstruction {
    fn page(&self) -> Result<String, Error> {
        let lead = format!(
            "What each cache holds of {} positions of the model's keys and values, as attention takes them, against the bits \
             that it allocates. The bound is for Gaussian vectors of the same covariance.",
            self.positions
        );
        let header = [
            "cache",
            "keys: bits",
            "relative error",
            "squared error",
            "values: bits",
            "relative error",
            "squared error",
        ];
        let rows = self.mean_rows();
        render(
            |score| score.to_string(),
            context! {
                title => format!("reconstruction with {}", self.model), lead,
                wide => Value::from_safe_string(self.curves(true)),
                narrow => Value::from_safe_string(self.curves(false)),
                tables => [context! { heading => "Caches, mean of the layers", header, rows }],
            },
        )
    }

    fn plot(&self) -> String {
        self.curves(true)
    }
}

impl Report for Overview {
    fn page(&self) -> Result<String, Error> {
        let lead = "Each task's score against the bytes that a cache allocates over FP16's. Of several trainings of dictionaries a \
                    point is the median, and its bar goes from the least to the most.";
        let tables = self.comparisons.iter().map(|comparison| {
            let (header, rows) = comparison.table();
            context! { heading => comparison.title(), header, rows }
        });
        let columns = |columns: usize, frame: (f64, f64)| {
            let layout = Layout {
                frame,
                legend: Legend::Below,
                colours: Colours::Distinct,
            };
            Value::from_safe_string(svg(&self.panels(columns), layout))
        };
        render(
            |score| score.to_string(),
            context! {
                title => "Quality against bytes", lead, tables => tables.collect::<Vec<_>>(),
                wide => columns(3, (270.0, 220.0)), narrow => columns(1, (270.0, 220.0)),
            },
        )
    }

    fn plot(&self) -> String {
        let layout = Layout {
            frame: (270.0, 220.0),
            legend: Legend::Below,
            colours: Colours::Distinct,
        };
        svg(&self.panels(3), layout)
    }
}

impl Overview {
    /// A panel for each comparison, so many in a row, all with the same lines.
    fn panels(&self, columns: usize) -> Vec<Vec<Panel>> {
        let caches = self.comparisons.iter().flat_map(|own| &own.caches);
        let families = unique(caches.map(|own| own.family.as_str()));
        let panels = self.comparisons.iter().map(|own| own.panel(&families));
        let panels: Vec<Panel> = panels.collect();
        panels.chunks(columns).map(<[_]>::to_vec).collect()
    }
}

impl Comparison {
    /// The score against the size, a line a family.
    fn panel(&self, families: &[&str]) -> Panel {
        let factor = if self.measure.is_share() { 100.0 } else { 1.0 };
        let line = |family: &&str| {
            let own = || self.caches.iter().filter(|own| own.family == *family);
            let points = own().map(|own| (100.0 * own.share, factor * own.median().score));
            let bars = own().filter_map(|own| {
                let (first, last) = (own.outcomes.first()?, own.outcomes.last()?);
                Some((factor * first.score, factor * last.score))
            });
            Line {
                name: (*family).to_owned(),
                points: points.collect(),
                bars: bars.collect(),
            }
        };
        let lines = families.iter().map(line).collect();
        let title = format!("{}, {}", self.task, self.model);
        score_panel(self.measure, title, Some(self.full), lines)
    }
}

/// Fills the template; `score` prints a score.
fn render(
    score: impl Fn(f64) -> String + Send + Sync + 'static,
    context: Value,
) -> Result<String, Error> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    environment.set_syntax(syntax.keep_trailing_newline(true).build()?);
    environment.set_formatter(|out, _, value| {
        let text = value.to_string();
        let text = if value.is_safe() { text } else { escape(&text) };
        Ok(out.write_str(&text)?)
    });
    environment.add_filter("clipped", clipped);
    environment.add_filter("score", score);
    environment.render_str(include_str!("page.html"), context)
}

/// The score against the size.
fn panel(evaluation: &Evaluation) -> Panel {
    let measure = evaluation.measure;
    let factor = if measure.is_share() { 100.0 } else { 1.0 };
    let others = || evaluation.runs.iter().skip(1);
    let families = unique(others().map(|run| run.family.as_str()));
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
    let full = evaluation.runs.first().map(|run| run.score);
    let title = format!("{} against memory", measure.name());
    score_panel(measure, title, full, families.iter().map(line).collect())
}

/// Lines of scores against sizes, `full` the score of the full cache.
fn score_panel(measure: Measure, title: String, full: Option<f64>, lines: Vec<Line>) -> Panel {
    let factor = if measure.is_share() { 100.0 } else { 1.0 };
    Panel {
        title,
        x: Axis::new("bytes over FP16's, %", Scale::FromZero),
        y: match measure {
            Measure::Divergence => Axis::new("KL divergence from full, nats", Scale::Logarithmic),
            Measure::Perplexity => Axis::new(measure.name(), Scale::Linear),
            _ => Axis::new(format!("{}, %", measure.name()), Scale::FromZero),
        },
        level: full
            .filter(|_| measure != Measure::Divergence)
            .map(|score| ("full".to_owned(), factor * score)),
        lines,
    }
}

/// The score against the position.
fn by_position(evaluation: &Evaluation) -> Panel {
    let measure = evaluation.measure;
    let runs = evaluation.runs.iter();
    let runs = runs.filter(|run| measure != Measure::Divergence || run.method != "full");
    let line = |run: &Run| Line {
        name: run.cache.clone(),
        points: run
            .bands
            .iter()
            .map(|band| (middle(band), band.score))
            .collect(),
        bars: run
            .bands
            .iter()
            .map(|band| {
                (
                    band.low.unwrap_or(band.score),
                    band.high.unwrap_or(band.score),
                )
            })
            .collect(),
    };
    Panel {
        title: format!("{} by position", measure.name()),
        x: Axis::new("position", Scale::LogarithmicPlaces),
        y: match measure {
            Measure::Divergence => Axis::new("KL divergence from full, nats", Scale::Logarithmic),
            _ => Axis::new(measure.name(), Scale::Linear),
        },
        level: None,
        lines: runs.map(line).collect(),
    }
}

/// The middle of a band.
fn middle(band: &Band) -> f64 {
    f64::midpoint(band.from as f64, band.to as f64).round()
}

/// The table of the runs.
fn runs(evaluation: &Evaluation) -> Value {
    let measure = evaluation.measure;
    let mut header = vec!["cache", "of FP16", measure.name(), "from", "to"];
    let first = evaluation.runs.first();
    let compared = evaluation.runs.iter().any(|run| run.beside_full.is_some());
    if compared {
        header.extend(["beside full", "from", "to"]);
    }
    if first.is_some_and(|run| run.kept.is_some()) {
        header.push("kept of full's");
    }
    if first.is_some_and(|run| run.distributions.is_some()) {
        header.extend(["99th percentile", "99.9th", "same token"]);
    }
    header.push("budget");
    let bound = |bound: Option<f64>| bound.map_or(String::new(), |x| measure.print(x));
    let rows = evaluation.runs.iter().map(|run| {
        let mut row = vec![
            run.cache.clone(),
            percent(run.share),
            measure.print(run.score),
            bound(run.low),
            bound(run.high),
        ];
        if compared {
            let beside = |of: fn(&Difference) -> Option<f64>| {
                let difference = run.beside_full.as_ref().and_then(of);
                difference.map_or(String::new(), |own| measure.print_beside(own))
            };
            row.extend([
                beside(|d| Some(d.value)),
                beside(|d| d.low),
                beside(|d| d.high),
            ]);
        }
        if let Some(kept) = run.kept {
            row.push(format!("{} of {}", kept.right, kept.of));
        }
        if let Some(distributions) = run.distributions {
            for percentile in [distributions.percentile_99, distributions.percentile_99_9] {
                row.push(measure.print(f64::from(percentile)));
            }
            row.push(percent(distributions.agreement));
        }
        row.push(run.budgets.join(", "));
        row
    });
    let skipped = Value::from(Serde(&evaluation.skipped));
    context! { heading => "Caches", header, rows => rows.collect::<Vec<_>>(), skipped }
}

/// Cuts a long text to its beginning and its end.
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

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
