//! A small model through all four stages, on generated tasks: each has the effect that it is there for, the last two beside
//! the same training without what they are named for. Minutes of work, so `.ci/nightly` runs it.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use unmask_engine::{LoadOptions, Model};
use unmask_trainer::{
    RawMaskStage, Summary,
    config::RawModel,
    data::MixtureConfig,
    measure::{self, Point},
    recipe::{self, MaskRun, OnPolicyRun, OrderRun},
    repair::Repair,
    stage_on_policy::RawOnPolicy,
    stage_order::RawOrder,
    tasks::Part,
};

const BLOCK: usize = 8;
const DECODED: Point = Point::threshold(BLOCK as u32, 0.9);
/// Confidences at which a visible token may change, and the share of right ones that may.
const TAUS: [f32; 6] = [0.5, 0.8, 0.9, 0.99, 0.999, 0.9999];
const FALSE_EDITS_MAX: f64 = 0.02;

/// Where everything is written, and the bundled model's tokenizer.
struct Place {
    dir: PathBuf,
    tokenizer: PathBuf,
}

impl Place {
    /// 0.8 million parameters, small steps, little to measure on the way.
    fn shrink(
        &self,
        data: &mut MixtureConfig,
        stage: &mut RawMaskStage,
        name: &str,
        steps: usize,
        init: Option<&Summary>,
    ) {
        data.tokenizer.clone_from(&self.tokenizer);
        stage.out = self.dir.join(name);
        stage.steps = steps;
        stage.init.checkpoint = init.map(|before| before.model.clone());
        stage.model = RawModel {
            hidden_size: 128,
            intermediate_size: 320,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            ..stage.model.clone()
        };
        (stage.batch.tokens, stage.batch.block_sizes, stage.batch.next_token) = (2048, vec![4, BLOCK], 1.0);
        (stage.eval.every, stage.eval.documents, stage.checkpoint.every) = (steps, 16, steps);
        (stage.decode.block_size, stage.decode.tau, stage.decode.self_speculative) = (BLOCK, 0.9, false);
    }

    /// Masks or edits, as the recipe of that name says.
    fn mask(&self, name: &str, steps: usize, init: Option<&Summary>) -> Summary {
        let mut run: MaskRun = recipe::read(&recipe_of(name)).unwrap();
        self.shrink(&mut run.data, &mut run.stage, name, steps, init);
        (run.data.infill_share, run.data.cut_share) = (0.0, 0.0);
        recipe::mask(run).unwrap()
    }

    /// Constrained order on the model's own answers.
    fn order(&self, name: &str, init: &Summary, change: impl FnOnce(&mut RawOrder)) -> Summary {
        let mut run: OrderRun = recipe::read(&recipe_of("order")).unwrap();
        self.shrink(&mut run.data, &mut run.stage, name, 120, Some(init));
        run.stage.seed = 1;
        (run.order.texts, run.order.answers, run.order.orders) = (240, 800, 3);
        change(&mut run.order);
        recipe::order(run).unwrap()
    }

    /// Five rounds after `answer_steps` steps on answers, as far as the latter leave some of 320 steps.
    fn on_policy(&self, name: &str, init: &Summary, answer_steps: usize) -> Summary {
        let mut run: OnPolicyRun = recipe::read(&recipe_of("on-policy")).unwrap();
        self.shrink(&mut run.data, &mut run.stage, name, 320, Some(init));
        run.on_policy = RawOnPolicy {
            answers: 2000,
            answer_steps,
            round_steps: 40,
            prompts: 300,
            cut_share: 0.0,
            guard_tasks: 200,
            guard_points: 100.0,
            ..run.on_policy
        };
        recipe::on_policy(run).unwrap()
    }

    /// Tokens per pass and pass rate on held-out tasks.
    fn decoded(&self, name: &str, summary: &Summary) -> (f64, f64) {
        let file = self.dir.join("tasks.jsonl");
        if !file.exists() {
            recipe::write_tasks(&file, 3, Part::HeldOut, 300).unwrap();
        }
        let tokenizer = measure::tokenizer(self.tokenizer.parent().unwrap()).unwrap();
        let model = Arc::new(Model::load(&summary.model, &LoadOptions::default()).unwrap());
        let row = measure::measure(&model, &tokenizer, &measure::read_tasks(&file).unwrap(), DECODED, |_| {}).unwrap();
        eprintln!("{name}: {:.3} of the tasks at {:.2} tokens per pass", row.pass_rate, row.tpf);
        (row.tpf, row.pass_rate)
    }
}

fn recipe_of(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/recipe").join(name).with_extension("toml")
}

fn repaired(summary: &Summary, tau: f32) -> Repair {
    recipe::repair_rates(&summary.model, 100, &[BLOCK], 0.05, tau).unwrap().remove(0)
}

/// Share of wrong tokens that are put right where hardly a right one may change.
fn careful_repairs(summary: &Summary) -> f64 {
    let rates = TAUS.map(|tau| repaired(summary, tau));
    rates.iter().filter(|r| r.false_edit_rate < FALSE_EDITS_MAX).map(|r| r.repair_rate).fold(0.0, f64::max)
}

#[test]
#[ignore = "minutes of training: .ci/nightly"]
fn each_stage_has_its_effect() {
    let dir = tempfile::tempdir().unwrap();
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
    let default = std::fs::read_to_string(bundled.join("default")).unwrap();
    let tokenizer = bundled.join(default.trim()).join("tokenizer.json");
    let place = Place { dir: dir.path().to_owned(), tokenizer };

    let masks = place.mask("mask", 1000, None);
    let edits = place.mask("edit", 250, Some(&masks));
    let order = place.order("order", &edits, |_| {});
    let random = place.order("random", &edits, |own| {
        (own.texts, own.orders, own.keep, own.temperature) = (120, 1, 1.0, 1e6);
    });
    let last = place.on_policy("on-policy", &order, 120);
    let answers = place.on_policy("answers", &order, 320);

    let (_, passing_masks) = place.decoded("masks", &masks);
    let (_, passing_edits) = place.decoded("edits", &edits);
    let (tpf_order, passing_order) = place.decoded("likely orders", &order);
    let (_, passing_random) = place.decoded("random orders", &random);
    let (tpf_last, passing_last) = place.decoded("on-policy", &last);
    let (tpf_answers, passing_answers) = place.decoded("answers alone", &answers);

    // Nothing was learnt before; most tasks pass.
    assert!(passing_masks > 0.4, "{passing_masks}");
    // Masks alone do not tell what a visible token means: they change it, right or wrong.
    let (before, after) = (repaired(&masks, 0.9), repaired(&edits, 0.9));
    eprintln!("{before:?}\n{after:?}");
    assert!(before.false_edit_rate > 0.3 && after.false_edit_rate < 0.03, "{before:?} {after:?}");
    assert!(before.calibration_error > 0.3 && after.calibration_error < 0.1, "{before:?} {after:?}");
    let (before, after) = (careful_repairs(&masks), careful_repairs(&edits));
    eprintln!("put right with few false edits: {before:.3} after masks, {after:.3} after edits");
    assert!(after > before + 0.08, "{before} {after}");
    // States on likely orders make a careful model, and those on random orders of the same answers do not: more tasks pass.
    assert!(passing_order > passing_edits + 0.03, "{passing_edits} {passing_order}");
    assert!(passing_order > passing_random + 0.05, "{passing_random} {passing_order}");
    // Fewer passes, and no fewer tasks; also than after as many steps without rounds.
    assert!(tpf_last > tpf_order + 0.2 && passing_last > passing_order - 0.05, "{tpf_order} {tpf_last}");
    assert!(tpf_last > tpf_answers + 0.1 && passing_last > passing_answers - 0.03, "{tpf_answers} {tpf_last}");
}
