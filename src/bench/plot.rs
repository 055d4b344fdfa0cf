//! Lines over guest sizes, as a picture for docs.

use std::fmt::Write;

/// A line: how much is written between two forks, and a time for each guest size.
pub struct Line {
    pub dirty_mib: u64,
    /// Guest memory in MiB, and milliseconds.
    pub points: Vec<(u64, f64)>,
}

/// One of the pictures that stand side by side.
pub struct Panel {
    pub title: &'static str,
    pub lines: Vec<Line>,
}

const WIDTH: f64 = 380.0;
const HEIGHT: f64 = 260.0;
/// Left, top, right and below of a panel's own field.
const MARGINS: [f64; 4] = [46.0, 34.0, 14.0, 40.0];
/// Distinct without colours too: each line's end is named.
const COLOURS: [&str; 4] = ["#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad"];

/// The panels as SVG, over a line that says where it was measured.
pub fn draw(panels: &[Panel], footnote: &str) -> String {
    let mut svg = String::new();
    let (width, height) = (WIDTH * panels.len() as f64, HEIGHT + 24.0);
    let head = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    svg.push_str(&head);
    for (number, panel) in panels.iter().enumerate() {
        panel.draw(&mut svg, WIDTH * number as f64);
    }
    text(&mut svg, (8.0, height - 8.0), "start", &escaped(footnote));
    svg.push_str("</svg>\n");
    svg
}

impl Panel {
    fn draw(&self, svg: &mut String, left: f64) {
        let [before, above, after, below] = MARGINS;
        let (x0, x1) = (left + before, left + WIDTH - after - 46.0);
        let (y0, y1) = (HEIGHT - below, above);
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let sizes: Vec<u64> = self.sizes();
        let top = points()
            .map(|(_, ms)| *ms)
            .fold(f64::MIN_POSITIVE, f64::max)
            * 1.1;
        let steps = (sizes.len().max(2) - 1) as f64;
        let x = |size: u64| {
            let at = sizes.iter().position(|one| *one == size).unwrap_or(0);
            x0 + (x1 - x0) * at as f64 / steps
        };
        let y = |ms: f64| y0 - (y0 - y1) * ms / top;
        text(svg, (left + before, 20.0), "start", self.title);
        for size in &sizes {
            text(svg, (x(*size), y0 + 16.0), "middle", &format!("{size}"));
        }
        text(
            svg,
            ((x0 + x1) / 2.0, y0 + 32.0),
            "middle",
            "guest memory, MiB",
        );
        for part in 0..=4 {
            let ms = top * f64::from(part) / 4.0;
            rule(svg, (x0, y(ms)), (x1, y(ms)), "#dddddd");
            text(svg, (x0 - 6.0, y(ms) + 4.0), "end", &format!("{ms:.1}"));
        }
        for (line, colour) in self.lines.iter().zip(COLOURS.iter().cycle()) {
            for pair in line.points.windows(2) {
                let [from, to] = [pair[0], pair[1]].map(|(size, ms)| (x(size), y(ms)));
                rule(svg, from, to, colour);
            }
            if let Some((size, ms)) = line.points.last() {
                let name = format!("{} MiB", line.dirty_mib);
                text(svg, (x(*size) + 5.0, y(*ms) + 4.0), "start", &name);
            }
        }
    }

    fn sizes(&self) -> Vec<u64> {
        let all = self.lines.iter().flat_map(|line| &line.points);
        let mut sizes: Vec<u64> = all.map(|(size, _)| *size).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }
}

/// Writing to a string does not fail.
fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, words: &str) {
    writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>"
    )
    .ok();
}

fn rule(svg: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64), colour: &str) {
    let ends = format!("x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"");
    writeln!(
        svg,
        "<line {ends} stroke=\"{colour}\" stroke-width=\"1.5\"/>"
    )
    .ok();
}

fn escaped(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_drawn_and_named() {
        let line = |dirty_mib| Line {
            dirty_mib,
            points: vec![(256, 0.5), (512, 0.6), (1024, 0.7)],
        };
        let panel = Panel {
            title: "pause, ms",
            lines: vec![line(4), line(16)],
        };
        let svg = draw(&[panel], "a <host>");
        assert_eq!(svg.matches("<line").count(), 5 + 4, "{svg}");
        for words in ["4 MiB", "16 MiB", "pause, ms", "1024", "a &lt;host>"] {
            assert!(svg.contains(words), "{words}: {svg}");
        }
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }
}
