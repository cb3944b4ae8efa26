//! A small model through all four stages, on generated tasks: each has the effect that it is there for. Minutes of work, so
//! `.ci/nightly` runs it.

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
    tasks::Part,
};

const BLOCK: usize = 8;
const DECODED: Point = Point::threshold(BLOCK as u32, 0.9);

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
    fn order(&self, init: &Summary) -> Summary {
        let mut run: OrderRun = recipe::read(&recipe_of("order")).unwrap();
        self.shrink(&mut run.data, &mut run.stage, "order", 120, Some(init));
        run.stage.seed = 1;
        (run.order.texts, run.order.answers, run.order.orders) = (240, 800, 3);
        recipe::order(run).unwrap()
    }

    fn on_policy(&self, init: &Summary) -> Summary {
        let mut run: OnPolicyRun = recipe::read(&recipe_of("on-policy")).unwrap();
        self.shrink(&mut run.data, &mut run.stage, "on-policy", 200, Some(init));
        let own = &mut run.on_policy;
        (own.answers, own.answer_steps, own.round_steps, own.prompts) = (2000, 120, 40, 300);
        (own.cut_share, own.guard_tasks, own.guard_points) = (0.0, 200, 100.0);
        recipe::on_policy(run).unwrap()
    }

    /// Tokens per pass and pass rate on held-out tasks.
    fn decoded(&self, summary: &Summary) -> (f64, f64) {
        let file = self.dir.join("tasks.jsonl");
        if !file.exists() {
            recipe::write_tasks(&file, 3, Part::HeldOut, 300).unwrap();
        }
        let tokenizer = measure::tokenizer(self.tokenizer.parent().unwrap()).unwrap();
        let model = Arc::new(Model::load(&summary.model, &LoadOptions::default()).unwrap());
        let row = measure::measure(&model, &tokenizer, &measure::read_tasks(&file).unwrap(), DECODED, |_| {}).unwrap();
        (row.tpf, row.pass_rate)
    }
}

fn recipe_of(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/recipe").join(name).with_extension("toml")
}

fn repaired(summary: &Summary) -> Repair {
    recipe::repair_rates(&summary.model, 100, &[BLOCK], 0.05, 0.9).unwrap().remove(0)
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
    let (tpf, passing_masks) = place.decoded(&masks);
    eprintln!("masks: {passing_masks:.3} of the tasks at {tpf:.2} tokens per pass, {:?}", repaired(&masks));

    let edits = place.mask("edit", 250, Some(&masks));
    let (before, after) = (repaired(&masks), repaired(&edits));
    let (tpf, passing_edits) = place.decoded(&edits);
    eprintln!("edits: {passing_edits:.3} of the tasks at {tpf:.2} tokens per pass, {after:?}");

    let order = place.order(&edits);
    let (tpf_order, passing_order) = place.decoded(&order);
    eprintln!("order: {passing_order:.3} of the tasks at {tpf_order:.2} tokens per pass");

    let last = place.on_policy(&order);
    let (tpf_last, passing_last) = place.decoded(&last);
    eprintln!("on-policy: {passing_last:.3} of the tasks at {tpf_last:.2} tokens per pass");

    // Nothing was learnt before; most tasks pass.
    assert!(passing_masks > 0.4, "{passing_masks}");
    // Masks alone do not tell what a visible token means.
    assert!(
        before.false_edit_rate > 0.3 && after.false_edit_rate < 0.03 && after.repair_rate > 0.08,
        "{before:?} {after:?}"
    );
    assert!(before.calibration_error > 0.3 && after.calibration_error < 0.1, "{before:?} {after:?}");
    // States on likely orders make a careful model: more tasks pass.
    assert!(passing_order > passing_edits + 0.03, "{passing_edits} {passing_order}");
    // Fewer passes, and no fewer tasks.
    assert!(tpf_last > tpf_order + 0.2 && passing_last > passing_order - 0.05, "{tpf_order} {tpf_last}");
}
