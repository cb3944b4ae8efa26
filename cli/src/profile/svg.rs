//! A small writer of line charts as SVG. By hand, because two panels of lines need less code than a drawing library
//! has dependencies.

use std::fmt::Write;

/// Ticks of a decade on logarithmic axes.
const DECADE: [f64; 3] = [1.0, 2.0, 5.0];
/// Height of a line of text (pixels).
const LINE: f64 = 18.0;

/// Shapes drawn so far.
#[derive(Default)]
pub struct Svg {
    body: String,
}

/// Where text stands relative to its point.
#[derive(Clone, Copy)]
pub enum Anchor {
    /// Begins there.
    Start,
    /// Is centred there.
    Middle,
    /// Ends there.
    End,
}

impl Svg {
    /// Text whose baseline is at `y`.
    pub fn text(&mut self, (x, y): (f64, f64), anchor: Anchor, size: u32, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escape(text);
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" font-size="{size}" text-anchor="{anchor}">{text}</text>"#
        );
    }

    /// Text that runs upwards, centred at the point.
    pub fn upward(&mut self, (x, y): (f64, f64), size: u32, text: &str) {
        let text = escape(text);
        let place = format!(r#"transform="translate({x:.1} {y:.1}) rotate(-90)""#);
        let _ = writeln!(self.body, r#"<text {place} font-size="{size}" text-anchor="middle">{text}</text>"#);
    }

    /// Straight lines through the points.
    pub fn line(&mut self, points: &[(f64, f64)], colour: &str, width: f64) {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let points = points.join(" ");
        let _ = writeln!(
            self.body,
            r#"<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>"#
        );
    }

    /// A circle.
    pub fn circle(&mut self, (x, y): (f64, f64), radius: f64, fill: &str, stroke: &str) {
        let _ = writeln!(
            self.body,
            r#"<circle cx="{x:.1}" cy="{y:.1}" r="{radius}" fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>"#
        );
    }

    /// The whole picture, on white.
    pub fn finish(self, width: u32, height: u32) -> String {
        let body = self.body;
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="system-ui, 'DejaVu Sans', sans-serif" fill="#222">
<rect width="{width}" height="{height}" fill="#fff"/>
{body}</svg>
"##
        )
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A logarithmic axis: values `low..high` over pixels `from..to`.
#[derive(Debug, Clone)]
pub struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// With the given ticks, all positive and ascending, the outermost a little inside the ends.
    pub fn of_ticks(ticks: Vec<f64>, from: f64, to: f64) -> Self {
        let low = ticks.first().copied().unwrap_or(1.0) / 1.3;
        let high = ticks.last().copied().unwrap_or(1.0) * 1.3;
        Self { low, high, from, to, ticks }
    }

    /// Around positive values, with ticks at 1, 2 and 5 of each decade.
    pub fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (low, high) = values.fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
        let (low, high) = if low.is_finite() { (low / 1.25, high * 1.25) } else { (0.5, 2.0) };
        let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
        let ticks = decades.flat_map(|power| DECADE.map(|digit| digit * 10f64.powi(power)));
        Self { low, high, from, to, ticks: ticks.filter(|tick| (low..=high).contains(tick)).collect() }
    }

    /// Pixel of a value.
    pub fn at(&self, value: f64) -> f64 {
        self.from + (self.to - self.from) * (value / self.low).ln() / (self.high / self.low).ln()
    }
}

/// A plot: axes, what they show, and the panel's title.
pub struct Plot<'a> {
    /// Horizontal.
    pub x: Axis,
    /// Vertical; `from` is the lower end.
    pub y: Axis,
    /// Above the plot.
    pub title: &'a str,
    /// Below it, with the unit.
    pub x_label: &'a str,
    /// Left of it, with the unit.
    pub y_label: &'a str,
}

impl Plot<'_> {
    /// Pixel of a point.
    pub fn at(&self, x: f64, y: f64) -> (f64, f64) {
        (self.x.at(x), self.y.at(y))
    }

    /// Draws grid, ticks and labels.
    pub fn frame(&self, svg: &mut Svg) {
        let (x, y) = (&self.x, &self.y);
        for &tick in &x.ticks {
            svg.line(&[(x.at(tick), y.from), (x.at(tick), y.to)], "#e6e6e6", 1.0);
            svg.text((x.at(tick), y.from + LINE), Anchor::Middle, 12, &label(tick));
        }
        for &tick in &y.ticks {
            svg.line(&[(x.from, y.at(tick)), (x.to, y.at(tick))], "#e6e6e6", 1.0);
            svg.text((x.from - 8.0, y.at(tick) + 4.0), Anchor::End, 12, &label(tick));
        }
        svg.line(&[(x.from, y.to), (x.from, y.from), (x.to, y.from)], "#666", 1.0);
        let middle = (x.from + x.to) / 2.0;
        svg.text((x.from, y.to - 14.0), Anchor::Start, 15, self.title);
        svg.text((middle, y.from + 2.4 * LINE), Anchor::Middle, 13, self.x_label);
        svg.upward((x.from - 56.0, (y.from + y.to) / 2.0), 13, self.y_label);
    }

    /// A legend right of the plot: its title, and a name and colour per line.
    pub fn legend(&self, svg: &mut Svg, title: &str, entries: &[(String, &str)]) {
        let left = self.x.to + 16.0;
        let mut y = self.y.to + 4.0;
        svg.text((left, y), Anchor::Start, 12, title);
        // The last lines drawn lie highest.
        for (name, colour) in entries.iter().rev() {
            y += LINE + 2.0;
            svg.line(&[(left, y - 4.0), (left + 20.0, y - 4.0)], colour, 2.5);
            svg.text((left + 28.0, y), Anchor::Start, 12, name);
        }
    }
}

/// A tick's number, thousands with a k.
fn label(value: f64) -> String {
    if value >= 1_000.0 { format!("{}k", value / 1e3) } else { format!("{value}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let axis = Axis::around([0.3, 70.0].into_iter(), 0.0, 100.0);
        assert_eq!(axis.ticks.iter().map(|&tick| label(tick)).collect::<Vec<_>>().join(" "), "0.5 1 2 5 10 20 50");
        assert!(axis.at(axis.low).abs() < 1e-9 && (axis.at(axis.high) - 100.0).abs() < 1e-9);
        assert_eq!((label(2000.0), label(50_000.0)), ("2k".into(), "50k".into()));
    }

    #[test]
    fn text_cannot_break_out() {
        let mut svg = Svg::default();
        svg.text((0.0, 0.0), Anchor::Start, 12, "a < b & c");
        assert!(svg.finish(1, 1).contains("a &lt; b &amp; c"));
    }
}
