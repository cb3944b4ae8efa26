//! The chart of a profile: step time by rows, and tokens per second by block size.

use super::svg::{Anchor, Axis, Plot, Svg};
use super::throughput::{Curve, Throughput};
use std::collections::BTreeSet;
use unmask_controller::policy::Profile;

const WIDTH: u32 = 1240;
const HEIGHT: u32 = 560;
/// Upper and lower end of both plots (pixels).
const TOP: f64 = 112.0;
const BOTTOM: f64 = 450.0;
/// Left and right end of each plot (pixels).
const LEFT_PANEL: (f64, f64) = (84.0, 484.0);
const RIGHT_PANEL: (f64, f64) = (700.0, 1100.0);
/// Told apart by lightness too; more lines than these begin again.
const COLOURS: [&str; 6] = ["#440154", "#3b528b", "#21918c", "#35b779", "#c8a415", "#d1495b"];

/// Draws the chart; the right panel only where quality was measured.
pub fn draw(profile: &Profile, throughput: Option<&Throughput>) -> String {
    let mut svg = Svg::default();
    let title = match throughput {
        Some(_) => format!("{}: step time, and tokens per second by block size", profile.model),
        None => format!("{}: step time", profile.model),
    };
    svg.text((24.0, 34.0), Anchor::Start, 20, &title);
    let device = format!(
        "{}, {}, {} threads, {} weights, {} keys and values",
        profile.device, profile.isa, profile.threads, profile.dtype, profile.kv_type
    );
    svg.text((24.0, 58.0), Anchor::Start, 13, &device);
    step_time(&mut svg, profile);
    if let Some(throughput) = throughput {
        tokens_per_second(&mut svg, throughput);
        footnote(&mut svg, throughput, profile);
    }
    svg.finish(WIDTH, HEIGHT)
}

fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

fn step_time(svg: &mut Svg, profile: &Profile) {
    let rows: BTreeSet<u32> = profile.points().iter().map(|point| point.rows).collect();
    let plot = Plot {
        x: Axis::of_ticks(rows.into_iter().map(f64::from).collect(), LEFT_PANEL.0, LEFT_PANEL.1),
        y: Axis::around(profile.points().iter().map(|point| point.ms), BOTTOM, TOP),
        title: "Time of a step",
        x_label: "rows of a step (positions, every one scored)",
        y_label: "step time (ms, median)",
    };
    plot.frame(svg);
    let mut entries = Vec::new();
    for (i, curve) in profile.points().chunk_by(|a, b| a.context == b.context).enumerate() {
        let points: Vec<_> = curve.iter().map(|point| plot.at(f64::from(point.rows), point.ms)).collect();
        svg.line(&points, colour(i), 2.0);
        points.iter().for_each(|&point| svg.circle(point, 2.5, colour(i), colour(i)));
        entries.push((format!("{} positions", curve[0].context), colour(i)));
    }
    plot.legend(svg, "context", &entries);
}

fn tokens_per_second(svg: &mut Svg, throughput: &Throughput) {
    let all = || throughput.curves.iter().flat_map(|curve: &Curve| &curve.spots);
    let sizes: BTreeSet<u32> = all().map(|spot| spot.block_size).collect();
    let plot = Plot {
        x: Axis::of_ticks(sizes.into_iter().map(f64::from).collect(), RIGHT_PANEL.0, RIGHT_PANEL.1),
        y: Axis::around(all().map(|spot| spot.tokens_per_s), BOTTOM, TOP),
        title: "Committed tokens per second",
        x_label: "block size (positions; 1 is autoregressive)",
        y_label: "tokens per second, all requests",
    };
    plot.frame(svg);
    let mut entries = Vec::new();
    for (i, curve) in throughput.curves.iter().enumerate() {
        let at = |block_size: u32, tokens: f64| plot.at(f64::from(block_size), tokens);
        let points: Vec<_> = curve.spots.iter().map(|spot| at(spot.block_size, spot.tokens_per_s)).collect();
        svg.line(&points, colour(i), 2.0);
        for (spot, &point) in curve.spots.iter().zip(&points) {
            if curve.chosen == Some(spot.way()) {
                svg.circle(point, 8.0, "none", colour(i));
            }
            svg.circle(point, 4.0, if spot.good { colour(i) } else { "#fff" }, colour(i));
        }
        entries.push((curve.concurrency.to_string(), colour(i)));
    }
    plot.legend(svg, "requests at a time", &entries);
}

fn footnote(svg: &mut Svg, throughput: &Throughput, profile: &Profile) {
    let Throughput { context, floor, .. } = throughput;
    let lines = [
        format!(
            "Predicted at {context} positions of context: requests x TPF / step time(requests x (block + TPF) rows), 1 row \
             if autoregressive; beyond {} rows the step time is extrapolated.",
            profile.rows_max()
        ),
        format!(
            "Per block size the fastest threshold whose pass rate is at least {:.1}% (95% lower bound); hollow: none is, \
             the best pass rate is shown. Ring: what the policy chooses.",
            100.0 * floor
        ),
    ];
    for (i, line) in lines.iter().enumerate() {
        svg.text((24.0, BOTTOM + 74.0 + 18.0 * i as f64), Anchor::Start, 12, line);
    }
}
