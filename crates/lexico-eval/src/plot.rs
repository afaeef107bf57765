//! Line plots as SVG: panels in rows, each row with one legend.

use std::fmt::Write;

/// One plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel {
    /// What stands above it.
    pub title: String,
    /// What the horizontal axis shows. The places of the points are its ticks.
    pub x_label: String,
    /// Whether the horizontal axis is logarithmic.
    pub logarithmic: bool,
    /// What the vertical axis shows, which begins at 0.
    pub y_label: String,
    /// The lines.
    pub lines: Vec<Line>,
}

/// One line of a plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// What the legend calls it.
    pub name: String,
    /// Its points, `(x, y)`, `x` rising; on a logarithmic axis above 0.
    pub points: Vec<(f64, f64)>,
}

/// Width and height of a panel's frame, and of the room around it.
const FRAME: (f64, f64) = (300.0, 200.0);
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 48.0;
const PANEL: (f64, f64) = (LEFT + FRAME.0 + RIGHT, TOP + FRAME.1 + BOTTOM);
/// Height of a legend's entry, and width of a column of them.
const ENTRY: (f64, f64) = (100.0, 15.0);
/// Distance of ticks that can be told apart.
const TICK: f64 = 26.0;
/// Dark to light, as viridis goes: lines in order, so that neighbours look alike.
const COLOURS: [[f64; 3]; 5] = [
    [68.0, 1.0, 84.0],
    [59.0, 82.0, 139.0],
    [33.0, 145.0, 140.0],
    [94.0, 201.0, 98.0],
    [220.0, 190.0, 30.0],
];

/// Draws rows of panels. The lines of a row's panels have the same names in the same order.
#[must_use]
pub fn svg(rows: &[Vec<Panel>]) -> String {
    let lines = |row: &Vec<Panel>| row.first().map_or(0, |panel| panel.lines.len());
    let entries = ((PANEL.1 - TOP) / ENTRY.1) as usize;
    let widths = rows.iter().map(|row| {
        let columns = lines(row).div_ceil(entries);
        row.len() as f64 * PANEL.0 + columns as f64 * ENTRY.0
    });
    let width = widths.fold(0.0, f64::max);
    let height = rows.len() as f64 * PANEL.1;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (r, row) in rows.iter().enumerate() {
        let top = r as f64 * PANEL.1;
        for (p, panel) in row.iter().enumerate() {
            draw(&mut out, panel, p as f64 * PANEL.0 + LEFT, top + TOP);
        }
        let Some(first) = row.first() else { continue };
        for (i, line) in first.lines.iter().enumerate() {
            let x = row.len() as f64 * PANEL.0 + (i / entries) as f64 * ENTRY.0;
            let y = top + TOP + ((i % entries) as f64 + 0.5) * ENTRY.1;
            let colour = colour(i, first.lines.len());
            stroke(&mut out, &[(x, y), (x + 18.0, y)], &colour, 2.0);
            text(&mut out, x + 23.0, y + 4.0, "start", &line.name);
        }
    }
    out + "</svg>\n"
}

/// Draws a panel whose frame's upper left corner is at `(left, top)`.
fn draw(out: &mut String, panel: &Panel, left: f64, top: f64) {
    let (width, height) = FRAME;
    let points = || panel.lines.iter().flat_map(|line| &line.points);
    let scale = |x: f64| if panel.logarithmic { x.ln() } else { x };
    let mut places: Vec<f64> = points().map(|&(x, _)| x).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    let (first, last) = match places.as_slice() {
        [first, .., last] => (scale(*first), scale(*last)),
        // A single place stands in the middle.
        [only] => (scale(*only) - 1.0, scale(*only) + 1.0),
        [] => (0.0, 1.0),
    };
    let step = step(points().map(|&(_, y)| y).fold(0.0, f64::max));
    let most = step * (points().map(|&(_, y)| y).fold(0.0, f64::max) / step).ceil();
    let most = if most > 0.0 { most } else { step };
    let at_x = |x: f64| left + (scale(x) - first) / (last - first) * width;
    let at_y = |y: f64| top + height - y / most * height;

    let ticks = (most / step).round() as usize;
    for tick in 0..=ticks {
        let y = tick as f64 * step;
        let at = at_y(y);
        stroke(out, &[(left, at), (left + width, at)], "#ddd", 1.0);
        // No more digits than the steps have.
        let digits = (-step.log10()).ceil().max(0.0) as usize;
        text(out, left - 5.0, at + 4.0, "end", &format!("{y:.digits$}"));
    }
    let mut before = f64::NEG_INFINITY;
    for &place in &places {
        let at = at_x(place);
        let bottom = top + height;
        stroke(out, &[(at, bottom), (at, bottom + 4.0)], "#444", 1.0);
        if at - before >= TICK {
            text(out, at, bottom + 16.0, "middle", &place.to_string());
            before = at;
        }
    }
    let frame = [
        (left, top),
        (left, top + height),
        (left + width, top + height),
    ];
    stroke(out, &frame, "#444", 1.0);
    for (i, line) in panel.lines.iter().enumerate() {
        let colour = colour(i, panel.lines.len());
        let points: Vec<_> = line
            .points
            .iter()
            .map(|&(x, y)| (at_x(x), at_y(y)))
            .collect();
        stroke(out, &points, &colour, 1.8);
        for (x, y) in points {
            let _ = writeln!(
                out,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.4\" fill=\"{colour}\"/>"
            );
        }
    }
    text(out, left + width / 2.0, top - 12.0, "middle", &panel.title);
    text(
        out,
        left + width / 2.0,
        top + height + 34.0,
        "middle",
        &panel.x_label,
    );
    let (x, y) = (left - 44.0, top + height / 2.0);
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 {x:.1} {y:.1})\">{}</text>",
        escape(&panel.y_label)
    );
}

/// The distance of ticks, a 1, 2 or 5 of its power of ten, for an axis from 0 to `most`.
fn step(most: f64) -> f64 {
    if !(most.is_normal() && most > 0.0) {
        return 1.0;
    }
    let least = most / 5.0;
    let power = 10f64.powf(least.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
    steps
        .into_iter()
        .find(|&step| step >= least * (1.0 - 1e-9))
        .unwrap_or(10.0 * power)
}

fn colour(i: usize, of: usize) -> String {
    let along = i as f64 / (of.max(2) - 1) as f64 * (COLOURS.len() - 1) as f64;
    let from = (along as usize).min(COLOURS.len() - 2);
    let part = along - from as f64;
    let mix =
        |c: usize| (COLOURS[from][c] * (1.0 - part) + COLOURS[from + 1][c] * part).round() as u8;
    format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2))
}

// Writing to a string cannot fail.

fn stroke(out: &mut String, points: &[(f64, f64)], colour: &str, width: f64) {
    let points: Vec<String> = points
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    let _ = writeln!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"/>",
        points.join(" ")
    );
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
        escape(text)
    );
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            // Not allowed in XML, not even escaped.
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(lines: Vec<Line>) -> Panel {
        Panel {
            title: "keys < & \u{1}".to_owned(),
            x_label: "sparsity".to_owned(),
            logarithmic: true,
            y_label: "mean relative error".to_owned(),
            lines,
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
            assert!((step(most) - want).abs() < 1e-12, "{most}: {}", step(most));
        }
        assert_eq!(step(f64::NAN), 1.0);
    }

    #[test]
    fn every_line_has_its_points_and_its_name() {
        let line = |name: &str, points: &[(f64, f64)]| Line {
            name: name.to_owned(),
            points: points.to_vec(),
        };
        let lines = vec![
            line("layer 0", &[(4.0, 0.4), (8.0, 0.2), (16.0, 0.1)]),
            line("layer 1", &[(4.0, 0.3)]),
        ];
        let drawn = svg(&[vec![panel(lines.clone()), panel(lines)], vec![]]);
        assert_eq!(drawn.matches("<circle").count(), 8);
        assert_eq!(drawn.matches("layer 1").count(), 1);
        assert!(drawn.contains("keys &lt; &amp; \u{fffd}"));
        assert!(!drawn.contains("NaN") && !drawn.contains("inf"));
        // Nothing to draw draws nothing impossible either.
        for empty in [svg(&[]), svg(&[vec![panel(vec![])]])] {
            assert!(!empty.contains("NaN") && !empty.contains("inf"), "{empty}");
        }
        let flat = svg(&[vec![panel(vec![line("zero", &[(1.0, 0.0), (2.0, 0.0)])])]]);
        assert!(!flat.contains("NaN"), "{flat}");
    }
}
