//! Line plots as SVG: panels in rows, each row with one legend.

use std::fmt::Write;

/// One plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel {
    /// Title above it.
    pub title: String,
    /// The horizontal axis.
    pub x: Axis,
    /// The vertical axis.
    pub y: Axis,
    /// A dashed line across, and what it is called.
    pub level: Option<(String, f64)>,
    /// The lines.
    pub lines: Vec<Line>,
}

/// An axis of a plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    /// Label.
    pub label: String,
    /// Scale.
    pub scale: Scale,
}

impl Axis {
    /// Makes an axis.
    pub fn new(label: impl Into<String>, scale: Scale) -> Self {
        let label = label.into();
        Self { label, scale }
    }
}

/// Scale of an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Linear from 0 on, with ticks at round numbers.
    FromZero,
    /// Linear around the points, with ticks at round numbers.
    Linear,
    /// Powers of ten, and 2 and 5 of them where there is room. What is not above 0 is not drawn.
    Logarithmic,
    /// Linear, with the places of the points as ticks.
    Places,
    /// Logarithmic, with the places of the points as ticks; they are above 0.
    LogarithmicPlaces,
}

/// One line of a plot.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Line {
    /// Name in the legend.
    pub name: String,
    /// Points, `(x, y)`, `x` rising.
    pub points: Vec<(f64, f64)>,
    /// Ends of each point's bar; none where there are none.
    pub bars: Vec<(f64, f64)>,
}

/// Layout of panels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    /// Width and height of a panel's frame.
    pub frame: (f64, f64),
    /// Place of a row's legend.
    pub legend: Legend,
    /// Meaning of colours.
    pub colours: Colours,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            frame: (300.0, 200.0),
            legend: Legend::Beside,
            colours: Colours::Ordered,
        }
    }
}

/// Place of the legend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Legend {
    /// Right of the panels.
    Beside,
    /// Below them.
    Below,
}

/// Meaning of colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colours {
    /// Lines that are in order: neighbours look alike.
    Ordered,
    /// Lines that are not: each has a colour and a mark of its own.
    Distinct,
}

/// Room around a frame.
const LEFT: f64 = 66.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 48.0;
/// Height of a legend's entry.
const ENTRY: f64 = 15.0;
/// Distance of ticks that can be told apart.
const TICK: f64 = 30.0;
/// Dark to light, as viridis goes.
const ORDERED: [[f64; 3]; 5] = [
    [68.0, 1.0, 84.0],
    [59.0, 82.0, 139.0],
    [33.0, 145.0, 140.0],
    [94.0, 201.0, 98.0],
    [220.0, 190.0, 30.0],
];
/// Told apart by most eyes (Okabe & Ito 2008), the yellow darker.
const DISTINCT: [&str; 10] = [
    "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#000000", "#8a5a2b",
    "#6a3d9a", "#808080",
];

/// Draws rows of panels. The lines of a row's panels have the same names in the same order.
#[must_use]
pub fn svg(rows: &[Vec<Panel>], layout: Layout) -> String {
    let panel = (LEFT + layout.frame.0 + RIGHT, TOP + layout.frame.1 + BOTTOM);
    fn lines(row: &[Panel]) -> &[Line] {
        row.first().map_or(&[], |panel| &panel.lines)
    }
    let beside = layout.legend == Legend::Beside;
    // A column of entries is as wide as the longest name.
    let lines_of_all = rows.iter().flatten().flat_map(|panel| &panel.lines);
    let longest = lines_of_all.map(|line| line.name.chars().count()).max();
    let entry = 100f64.max(32.0 + 6.0 * longest.unwrap_or(0) as f64);
    // Entries of a column, or columns of entries.
    let entries = ((panel.1 - TOP) / ENTRY) as usize;
    let columns = |row: &Vec<Panel>| ((row.len() as f64 * panel.0 / entry) as usize).max(1);
    let width = rows.iter().map(|row| {
        let legend = lines(row).len().div_ceil(entries) as f64 * entry;
        row.len() as f64 * panel.0 + if beside { legend } else { 0.0 }
    });
    let width = width.fold(0.0, f64::max);
    let legend = |row: &Vec<Panel>| match layout.legend {
        Legend::Beside => 0.0,
        Legend::Below => lines(row).len().div_ceil(columns(row)) as f64 * ENTRY + 8.0,
    };
    let height: f64 = rows.iter().map(|row| panel.1 + legend(row)).sum();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut top = 0.0;
    for row in rows {
        for (p, own) in row.iter().enumerate() {
            draw(&mut out, own, layout, p as f64 * panel.0 + LEFT, top + TOP);
        }
        for (i, line) in lines(row).iter().enumerate() {
            let (x, y) = if beside {
                let x = row.len() as f64 * panel.0 + (i / entries) as f64 * entry;
                (x, top + TOP + ((i % entries) as f64 + 0.5) * ENTRY)
            } else {
                let column = (i % columns(row)) as f64;
                let y = top + panel.1 + ((i / columns(row)) as f64 + 0.5) * ENTRY;
                (12.0 + column * entry, y)
            };
            let style = Style::of(layout.colours, i, lines(row).len());
            stroke(&mut out, &[(x, y), (x + 18.0, y)], &style.colour, 2.0, "");
            if layout.colours == Colours::Distinct {
                style.mark(&mut out, x + 9.0, y);
            }
            text(&mut out, x + 23.0, y + 4.0, "start", &line.name);
        }
        top += panel.1 + legend(row);
    }
    out + "</svg>\n"
}

/// Draws a panel whose frame's upper left corner is at `(left, top)`.
fn draw(out: &mut String, panel: &Panel, layout: Layout, left: f64, top: f64) {
    let (width, height) = layout.frame;
    let points = || panel.lines.iter().flat_map(|line| &line.points);
    let bars = || panel.lines.iter().flat_map(|line| &line.bars);
    let level = panel.level.iter().map(|(_, y)| *y);
    let heights = points()
        .map(|&(_, y)| y)
        .chain(bars().flat_map(|&(a, b)| [a, b]));
    let x = Ticks::of(panel.x.scale, points().map(|&(x, _)| x), width / TICK);
    let y = Ticks::of(panel.y.scale, heights.chain(level), height / TICK);
    let at_x = |value: f64| left + x.along(value) * width;
    let at_y = |value: f64| top + height - y.along(value) * height;
    for (value, name) in &y.named {
        let at = at_y(*value);
        stroke(out, &[(left, at), (left + width, at)], "#ddd", 1.0, "");
        text(out, left - 5.0, at + 4.0, "end", name);
    }
    let mut before = f64::NEG_INFINITY;
    let bottom = top + height;
    for (value, name) in &x.named {
        let at = at_x(*value);
        stroke(out, &[(at, bottom), (at, bottom + 4.0)], "#444", 1.0, "");
        if at - before >= TICK - 4.0 {
            text(out, at, bottom + 16.0, "middle", name);
            before = at;
        }
    }
    let corner = [(left, top), (left, bottom), (left + width, bottom)];
    stroke(out, &corner, "#444", 1.0, "");
    if let Some((name, value)) = &panel.level
        && y.shows(*value)
    {
        let at = at_y(*value);
        stroke(
            out,
            &[(left, at), (left + width, at)],
            "#444",
            1.2,
            " stroke-dasharray=\"6 4\"",
        );
        // Above the line, or below it where the frame ends.
        let beside = if at - top < 14.0 { 13.0 } else { -5.0 };
        text(out, left + width - 2.0, at + beside, "end", name);
    }
    for (i, line) in panel.lines.iter().enumerate() {
        let style = Style::of(layout.colours, i, panel.lines.len());
        let shown = |&(a, b): &(f64, f64)| x.shows(a) && y.shows(b);
        let at = |&(a, b): &(f64, f64)| (at_x(a), at_y(b));
        for (&(place, _), &(low, high)) in line.points.iter().zip(&line.bars) {
            if x.shows(place) && y.shows(high) {
                let low = if y.shows(low) { at_y(low) } else { bottom };
                let ends = [(at_x(place), low), (at_x(place), at_y(high))];
                stroke(out, &ends, &style.colour, 1.0, "");
            }
        }
        let points: Vec<_> = line.points.iter().filter(|p| shown(p)).map(at).collect();
        stroke(out, &points, &style.colour, 1.8, "");
        for (x, y) in points {
            style.mark(out, x, y);
        }
    }
    let middle = left + width / 2.0;
    text(out, middle, top - 12.0, "middle", &panel.title);
    text(out, middle, bottom + 34.0, "middle", &panel.x.label);
    let (x, y) = (left - 50.0, top + height / 2.0);
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 {x:.1} {y:.1})\">{}</text>",
        escape(&panel.y.label)
    );
}

/// Range of an axis, and its ticks with their names.
struct Ticks {
    logarithmic: bool,
    first: f64,
    last: f64,
    named: Vec<(f64, String)>,
}

impl Ticks {
    /// Makes ticks for some values, with room for about `max` of them.
    fn of(scale: Scale, values: impl Iterator<Item = f64>, max: f64) -> Self {
        let logarithmic = matches!(scale, Scale::Logarithmic | Scale::LogarithmicPlaces);
        let mut values: Vec<f64> = values
            .filter(|v| v.is_finite() && (!logarithmic || *v > 0.0))
            .collect();
        values.sort_by(f64::total_cmp);
        values.dedup();
        let (low, high) = match values.as_slice() {
            [low, .., high] => (*low, *high),
            [only] => (*only, *only),
            [] => (1.0, 1.0),
        };
        let mut ticks = Self {
            logarithmic,
            first: low,
            last: high,
            named: Vec::new(),
        };
        match scale {
            Scale::FromZero | Scale::Linear => {
                let low = if scale == Scale::FromZero { 0.0 } else { low };
                let step = step(if high > low { high - low } else { high.abs() }, max);
                let first = (low / step + 1e-9).floor();
                let last = (high / step - 1e-9).ceil().max(first + 1.0);
                // No more digits than the steps have.
                let digits = (-step.log10()).ceil().max(0.0) as usize;
                ticks.named = (0..=(last - first) as usize)
                    .map(|i| (first + i as f64) * step)
                    .map(|value| (value, format!("{value:.digits$}")))
                    .collect();
                (ticks.first, ticks.last) = (first * step, last * step);
            }
            Scale::Logarithmic => {
                let (first, last) = (low.log10().floor(), high.log10().ceil());
                let last = last.max(first + 1.0);
                let digits: &[u8] = if (high / low).log10() * 3.0 <= max {
                    &[1, 2, 5]
                } else {
                    &[1]
                };
                for power in first as i32..=last as i32 {
                    for digit in digits {
                        let value = f64::from(*digit) * 10f64.powi(power);
                        if value <= 10f64.powf(last) * 1.001 {
                            let name = if (-4..6).contains(&power) {
                                value.to_string()
                            } else {
                                format!("{digit}e{power}")
                            };
                            ticks.named.push((value, name));
                        }
                    }
                }
                // Between the ticks around the values.
                let below = ticks.named.iter().rev().find(|(v, _)| *v <= low * 1.001);
                let above = ticks.named.iter().find(|(v, _)| *v >= high * 0.999);
                ticks.first = below.map_or(10f64.powf(first), |(v, _)| *v);
                ticks.last = above.map_or(10f64.powf(last), |(v, _)| *v);
                let (low, high) = (ticks.first * 0.999, ticks.last * 1.001);
                ticks.named.retain(|(v, _)| (low..=high).contains(v));
            }
            Scale::Places | Scale::LogarithmicPlaces => {
                ticks.named = values.iter().map(|v| (*v, v.to_string())).collect();
            }
        }
        ticks
    }

    /// Returns true where a value has a place on the axis.
    fn shows(&self, value: f64) -> bool {
        value.is_finite() && (!self.logarithmic || value > 0.0)
    }

    /// Place of a value along the axis, from 0 to 1; a single one is in the middle.
    fn along(&self, value: f64) -> f64 {
        let scale = |x: f64| if self.logarithmic { x.ln() } else { x };
        let (first, last) = (scale(self.first), scale(self.last));
        if last > first {
            (scale(value) - first) / (last - first)
        } else {
            0.5
        }
    }
}

/// The distance of ticks, a 1, 2 or 5 of its power of ten, for a range with room for `max` of them.
fn step(range: f64, max: f64) -> f64 {
    if !(range.is_normal() && range > 0.0) {
        return 1.0;
    }
    let min = range / max.clamp(2.0, 8.0);
    let power = 10f64.powf(min.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
    steps
        .into_iter()
        .find(|&step| step >= min * (1.0 - 1e-9))
        .unwrap_or(10.0 * power)
}

/// Look of a line and its points.
struct Style {
    colour: String,
    /// 0 is a disc.
    mark: usize,
}

impl Style {
    fn of(colours: Colours, i: usize, of: usize) -> Self {
        match colours {
            Colours::Distinct => Self {
                colour: DISTINCT[i % DISTINCT.len()].to_owned(),
                mark: (i % DISTINCT.len() + i / DISTINCT.len()) % 4,
            },
            Colours::Ordered => {
                let along = i as f64 / (of.max(2) - 1) as f64 * (ORDERED.len() - 1) as f64;
                let from = (along as usize).min(ORDERED.len() - 2);
                let part = along - from as f64;
                let mix = |c: usize| {
                    (ORDERED[from][c] * (1.0 - part) + ORDERED[from + 1][c] * part).round() as u8
                };
                Self {
                    colour: format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2)),
                    mark: 0,
                }
            }
        }
    }

    fn mark(&self, out: &mut String, x: f64, y: f64) {
        let colour = &self.colour;
        let corners: &[(f64, f64)] = match self.mark {
            1 => &[(-3.0, -3.0), (3.0, -3.0), (3.0, 3.0), (-3.0, 3.0)],
            2 => &[(0.0, -4.0), (3.6, 2.6), (-3.6, 2.6)],
            3 => &[(0.0, -4.2), (4.2, 0.0), (0.0, 4.2), (-4.2, 0.0)],
            _ => {
                let _ = writeln!(
                    out,
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\" fill=\"{colour}\"/>"
                );
                return;
            }
        };
        let corners = joined(corners.iter().map(|(dx, dy)| (x + dx, y + dy)));
        let _ = writeln!(out, "<polygon points=\"{corners}\" fill=\"{colour}\"/>");
    }
}

// Writing to a string cannot fail.

/// Points as an attribute of SVG has them.
fn joined(points: impl Iterator<Item = (f64, f64)>) -> String {
    let points: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    points.join(" ")
}

/// Draws a line through points; `dashes` is an attribute, or empty.
fn stroke(out: &mut String, points: &[(f64, f64)], colour: &str, width: f64, dashes: &str) {
    let points = joined(points.iter().copied());
    let _ = writeln!(
        out,
        "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"{dashes}/>"
    );
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
        escape(text)
    );
}

/// Text as XML and HTML have it.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            // Not allowed in XML, not even escaped.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(lines: Vec<Line>) -> Panel {
        let axis = |label: &str, scale| Axis {
            label: label.to_owned(),
            scale,
        };
        Panel {
            title: "keys < & \u{1}".to_owned(),
            x: axis("sparsity", Scale::LogarithmicPlaces),
            y: axis("mean relative error", Scale::FromZero),
            level: None,
            lines,
        }
    }

    fn line(name: &str, points: &[(f64, f64)]) -> Line {
        Line {
            name: name.to_owned(),
            points: points.to_vec(),
            bars: Vec::new(),
        }
    }

    #[test]
    fn steps_are_round() {
        for (most, want) in [
            (0.23, 0.05),
            (1.0, 0.2),
            (0.5, 0.1),
            (0.0, 1.0),
            (37.0, 10.0),
        ] {
            assert!(
                (step(most, 5.0) - want).abs() < 1e-12,
                "{most}: {}",
                step(most, 5.0)
            );
        }
        assert_eq!(step(f64::NAN, 5.0), 1.0);
    }

    #[test]
    fn ticks_enclose_the_values() {
        for (scale, values, names) in [
            (
                Scale::FromZero,
                vec![0.07, 0.31],
                vec!["0.0", "0.1", "0.2", "0.3", "0.4"],
            ),
            (
                Scale::Linear,
                vec![86.0, 93.1],
                vec!["86", "88", "90", "92", "94"],
            ),
            (Scale::Linear, vec![5.0], vec!["5", "6"]),
            (
                Scale::Logarithmic,
                vec![0.003, 0.2, 0.0],
                vec!["0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2"],
            ),
            (
                Scale::Logarithmic,
                vec![1e-9, 1.0],
                vec![
                    "1e-9", "1e-8", "1e-7", "1e-6", "1e-5", "0.0001", "0.001", "0.01", "0.1", "1",
                ],
            ),
            (Scale::Places, vec![8.0, 4.0, 8.0], vec!["4", "8"]),
            (Scale::Places, vec![], vec![]),
        ] {
            let ticks = Ticks::of(scale, values.iter().copied(), 6.0);
            let got: Vec<&str> = ticks.named.iter().map(|(_, name)| name.as_str()).collect();
            assert_eq!(got, names, "{scale:?} {values:?}");
            for value in values.into_iter().filter(|v| ticks.shows(*v)) {
                assert!(
                    (-1e-3..=1.001).contains(&ticks.along(value)),
                    "{scale:?}: {value}"
                );
            }
        }
    }

    #[test]
    fn every_line_has_its_points_and_its_name() {
        let lines = vec![
            line("layer 0", &[(4.0, 0.4), (8.0, 0.2), (16.0, 0.1)]),
            line("layer 1", &[(4.0, 0.3)]),
        ];
        let rows = [vec![panel(lines.clone()), panel(lines)], vec![]];
        for legend in [Legend::Beside, Legend::Below] {
            let layout = Layout {
                legend,
                ..Layout::default()
            };
            let drawn = svg(&rows, layout);
            assert_eq!(drawn.matches("<circle").count(), 8);
            assert_eq!(drawn.matches("layer 1").count(), 1);
            assert!(drawn.contains("keys &lt; &amp; \u{fffd}"));
            assert!(!drawn.contains("NaN") && !drawn.contains("inf"));
        }
    }

    /// Nothing to draw, or what has no place on an axis, draws nothing impossible.
    #[test]
    fn impossible_numbers_are_left_out() {
        let mut odd = panel(vec![
            line("zero", &[(1.0, 0.0), (2.0, 0.0)]),
            Line {
                bars: vec![(0.0, 3.0), (f64::NAN, f64::INFINITY)],
                ..line("bars", &[(1.0, 1.0), (f64::NAN, 2.0)])
            },
        ]);
        odd.level = Some(("full".to_owned(), 1.5));
        let mut logarithmic = odd.clone();
        logarithmic.y.scale = Scale::Logarithmic;
        for rows in [
            vec![],
            vec![vec![panel(vec![])]],
            vec![vec![odd, logarithmic]],
        ] {
            for colours in [Colours::Ordered, Colours::Distinct] {
                let layout = Layout {
                    colours,
                    ..Layout::default()
                };
                let drawn = svg(&rows, layout);
                assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
            }
        }
    }
}
