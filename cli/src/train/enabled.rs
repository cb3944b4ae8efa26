//! The stages, each from one file of settings.

use crate::args::{MeasureArgs, RepairArgs, TasksArgs, TrainArgs, TrainCommand};
use crate::models::OverrideArgs;
use crate::raw::load;
use crate::{models, output};
use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use std::process::ExitCode;
use std::sync::Arc;
use unmask_engine::Model;
use unmask_text::Tokenizer;
use unmask_trainer::measure::{Cuts, Edits, Point, Quality, Row, Rule, cuts, measure, read_tasks, tokenizer};
use unmask_trainer::tasks::{Part, Task};
use unmask_trainer::{Summary, recipe};

/// Runs a stage.
///
/// # Errors
/// Its settings, all at once; files; the stage's own.
pub fn run(args: TrainArgs) -> anyhow::Result<ExitCode> {
    match args.stage {
        TrainCommand::Tokenizer(args) => recipe::tokenizer(&recipe::read(&args.config)?)?,
        TrainCommand::Tasks(args) => tasks(&args)?,
        TrainCommand::Mask(args) => made(&recipe::mask(recipe::read(&args.config)?)?)?,
        TrainCommand::Order(args) => made(&recipe::order(recipe::read(&args.config)?)?)?,
        TrainCommand::OnPolicy(args) => made(&recipe::on_policy(recipe::read(&args.config)?)?)?,
        TrainCommand::Measure(args) => measure_model(&args)?,
        TrainCommand::Repair(args) => repair(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Says where the model is.
fn made(summary: &Summary) -> anyhow::Result<()> {
    Ok(output::out(&format!("{}\n", summary.model.display()))?)
}

fn tasks(args: &TasksArgs) -> anyhow::Result<()> {
    let part = if args.held_out { Part::HeldOut } else { Part::Training };
    let written = recipe::write_tasks(&args.out, args.seed, part, args.count)?;
    output::note(&format!("{written} tasks in {}", args.out.display()));
    Ok(())
}

fn repair(args: &RepairArgs) -> anyhow::Result<()> {
    anyhow::ensure!((0.0..=1.0).contains(&args.edits), "--edits: must be in [0, 1], is {}", args.edits);
    anyhow::ensure!(args.block_sizes.iter().all(|size| *size > 0), "--block-sizes: each must be at least 1");
    let dir = models::find(Some(&args.model))?;
    let rates = recipe::repair_rates(&dir, args.documents, &args.block_sizes, args.edits, args.tau_edit)?;
    if args.json {
        output::out(&(serde_json::to_string_pretty(&rates)? + "\n"))?;
        return Ok(());
    }
    output::out("block   wrong  repaired    right  falsely changed  calibration error  of masks\n")?;
    for r in rates {
        output::out(&format!(
            "{:5} {:7} {:8.1}% {:8} {:15.2}% {:18.4} {:9.4}\n",
            r.block_size,
            r.wrong,
            100.0 * r.repair_rate,
            r.right,
            100.0 * r.false_edit_rate,
            r.calibration_error,
            r.masked_calibration_error
        ))?;
    }
    Ok(())
}

fn measure_model(args: &MeasureArgs) -> anyhow::Result<()> {
    let mut tasks = read_tasks(&args.tasks)?;
    tasks.truncate(args.limit.unwrap_or(usize::MAX));
    let dir = models::find(Some(&args.model))?;
    let model = load(&args.model, args.dtype, &OverrideArgs::default())?;
    let tokenizer = tokenizer(&dir)?;
    let mut rows: Vec<Row> = Vec::new();
    let said = |text: &str| if args.json { Ok(()) } else { output::out(text) };
    said("policy            block  threshold      n   pass   (low)  parse    TPF  rows\n")?;
    for point in points(args) {
        let bar = ProgressBar::new(tasks.len() as u64).with_style(style()?);
        bar.set_message(format!("{} block {} at {}", point.name(), point.block_size, point.threshold));
        let row = measure(&model, &tokenizer, &tasks, point, |done| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        said(&line(&row))?;
        rows.push(row);
    }
    let cut_prompts = if args.cuts == 0 { None } else { Some(measure_cuts(args, &model, &tokenizer, &tasks)?) };
    let command: Vec<String> = ["unmask".into()].into_iter().chain(std::env::args().skip(1)).collect();
    let quality = Quality { format: "unmask.quality/1".into(), command: command.join(" "), rows, cut_prompts };
    let text = serde_json::to_string_pretty(&quality)? + "\n";
    if args.write {
        let path = dir.join("quality.json");
        std::fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.json {
        output::out(&text)?;
    }
    Ok(())
}

fn measure_cuts(args: &MeasureArgs, model: &Arc<Model>, tokenizer: &Tokenizer, tasks: &[Task]) -> anyhow::Result<Cuts> {
    let point = match points(args)[..] {
        [point] => point,
        _ => Point::of(model),
    };
    let all = cuts(model, tokenizer, &tasks[..args.cuts.min(tasks.len())], point, |_| {})?;
    let (n, running) = (all.len(), all.iter().filter(|cut| cut.running).count());
    if !args.json {
        let Point { block_size, threshold, .. } = point;
        output::out(&format!(
            "cut prompts ({}, block {block_size}, threshold {threshold}): {running} of {n} become running functions\n",
            point.name()
        ))?;
    }
    if let Some(path) = &args.failures {
        let lines: Vec<String> =
            all.iter().filter(|cut| !cut.running).map(serde_json::to_string).collect::<Result<_, _>>()?;
        std::fs::write(path, lines.join("\n") + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(Cuts { n, running })
}

/// The baseline once, every other block size at every threshold, and drafting so far ahead.
fn points(args: &MeasureArgs) -> Vec<Point> {
    let mut points = Vec::new();
    for &block_size in &args.block_sizes {
        if block_size == 1 {
            points.push(Point::AUTOREGRESSIVE);
        } else {
            let edits = |tau| Rule::JointEdit(Edits { tau, post_steps: args.post_steps });
            let rule = args.tau_edit.map_or(Rule::Threshold, edits);
            points.extend(args.thresholds.iter().map(|&threshold| Point { block_size, threshold, rule }));
            points.extend(args.self_speculative.iter().map(|&tau| Point::self_speculative(block_size, tau)));
        }
    }
    points
}

fn line(row: &Row) -> String {
    let threshold = row.threshold.map_or_else(|| "-".to_owned(), |tau| format!("{tau:.2}"));
    format!(
        "{:17} {:5} {threshold:>10} {:6}  {:5.1}%  {:5.1}%  {:5.1}%  {:5.2}  {:4.1}\n",
        row.policy,
        row.block_size,
        row.n,
        100.0 * row.pass_rate,
        100.0 * row.pass_rate_low,
        100.0 * row.parse_rate,
        row.tpf,
        row.rows
    )
}

fn style() -> anyhow::Result<ProgressStyle> {
    Ok(ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}")?)
}
