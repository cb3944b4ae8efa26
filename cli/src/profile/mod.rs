//! `unmask profile`: measures step time, joins it with the model's quality, writes both as JSON and as a chart.
//!
//! [`throughput`] joins, [`chart`] draws with [`svg`], and this file measures and reports.

pub mod chart;
pub mod svg;
#[cfg(test)]
mod tests;
pub mod throughput;

use crate::args::ModelArgs;
use crate::policy::TYPICAL_CONTEXT;
use crate::{models, output};
use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use throughput::Throughput;
use unmask_controller::policy::{Profile, Quality};
use unmask_engine::profile::{Grid, measure};
use unmask_engine::{Engine, Model};

/// `unmask profile`
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// The model, and how it runs
    #[command(flatten)]
    pub model: ModelArgs,
    /// Measured quality; default: quality.json in the model's folder, where there is one
    #[arg(long, value_name = "FILE")]
    pub quality: Option<PathBuf>,
    /// Folder to write profile.json and profile.svg to
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub out: PathBuf,
    /// Measure few points, in about a second for small models
    #[arg(long)]
    pub short: bool,
    /// Print the profile and the predictions as JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// The model or its quality cannot be read, or results cannot be written.
pub fn run(args: &ProfileArgs) -> anyhow::Result<ExitCode> {
    let dir = models::find(args.model.model.as_deref())?;
    // What cannot be read must not be found out after minutes of measuring.
    let quality = read_quality(&dir, args.quality.as_deref())?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("--out: cannot create {}", args.out.display()))?;
    let model = Arc::new(Model::load(&dir, &args.model.overrides.load_options(args.model.dtype, args.model.threads))?);
    let length = model.config().context_length;
    let grid = if args.short { Grid::short(length) } else { Grid::full(length) };
    let measured = measured(&model, &grid)?;
    let json = serde_json::to_string_pretty(&measured)? + "\n";
    let profile = Profile::parse(&json)?;
    let context = TYPICAL_CONTEXT.min(length);
    let throughput = quality.as_ref().and_then(|quality| Throughput::new(&profile, quality, context));
    if throughput.is_none() {
        output::note("no quality was measured with these weights: tokens per second are not predicted");
    }
    write(&args.out.join("profile.json"), &json)?;
    write(&args.out.join("profile.svg"), &chart::draw(&profile, throughput.as_ref()))?;
    output::out(&if args.json {
        let all = serde_json::json!({ "profile": measured, "throughput": throughput });
        format!("{all:#}\n")
    } else {
        report(&profile, throughput.as_ref())
    })?;
    Ok(ExitCode::SUCCESS)
}

fn read_quality(dir: &Path, given: Option<&Path>) -> anyhow::Result<Option<Quality>> {
    let own = dir.join("quality.json");
    let Some(path) = given.or_else(|| own.is_file().then_some(&own)) else { return Ok(None) };
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Some(Quality::parse(&text).with_context(|| path.display().to_string())?))
}

fn measured(model: &Arc<Model>, grid: &Grid) -> anyhow::Result<unmask_engine::profile::Profile> {
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template("steps {wide_bar} {pos}/{len} {eta}")?);
    let start = Instant::now();
    let mut engine = Engine::new(Arc::clone(model), grid.limits());
    let profile = measure(&mut engine, grid, &mut || start.elapsed(), &mut |done, of| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    Ok(profile)
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    output::note(&format!("wrote {}", path.display()));
    Ok(())
}

fn report(profile: &Profile, throughput: Option<&Throughput>) -> String {
    let mut text = format!(
        "{} on {} ({}, {} threads, {} weights)\n\nstep time (ms) by rows and positions of context\n  rows",
        profile.model, profile.device, profile.isa, profile.threads, profile.dtype
    );
    let contexts: BTreeSet<u32> = profile.points().iter().map(|point| point.context).collect();
    let rows: BTreeSet<u32> = profile.points().iter().map(|point| point.rows).collect();
    for context in &contexts {
        let _ = write!(text, "{context:>10}");
    }
    for &rows in &rows {
        let _ = write!(text, "\n{rows:6}");
        for point in profile.points().iter().filter(|point| point.rows == rows) {
            let _ = write!(text, "{:10.3}", point.ms);
        }
    }
    text.push('\n');
    if let Some(throughput) = throughput {
        predictions(&mut text, throughput);
    }
    text
}

/// One line per block size, one column per concurrency.
fn predictions(text: &mut String, throughput: &Throughput) {
    let Throughput { context, floor, curves } = throughput;
    let _ = write!(
        text,
        "\ntokens/s by block size and requests at a time, at {context} positions of context\n(> the policy's choice; - \
         no pass rate is sure to reach {:.1}%)\n block",
        100.0 * floor
    );
    for curve in curves {
        let _ = write!(text, "{:>10}", curve.concurrency);
    }
    for line in 0..curves.first().map_or(0, |curve| curve.spots.len()) {
        let _ = write!(text, "\n{:6}", curves[0].spots[line].block_size);
        for curve in curves {
            let spot = &curve.spots[line];
            let mark = match spot {
                spot if curve.chosen == Some(spot.way()) => '>',
                spot if !spot.good => '-',
                _ => ' ',
            };
            let number = format!("{mark}{:.0}", spot.tokens_per_s);
            let _ = write!(text, "{number:>10}");
        }
    }
    text.push('\n');
}
