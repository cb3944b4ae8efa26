//! The stages after masks, on a toy language and on the bundled model: each has the effect it is for.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod toy;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use toy::Copies;
use unmask_trainer::{
    RawMaskStage, Sources, Summary,
    checkpoint::{Vocabulary, read_shape, read_weights},
    data::{Documents, MixtureConfig},
    measure::{self, read_tasks},
    model::Model,
    noise::{self, Filled},
    order::{Sampling, best_orders},
    progress::{EvalRecord, Record, RoundRecord},
    recipe,
    repair::{Repair, repair},
    stage_on_policy::OnPolicyStage,
    stage_order::{OrderStage, RawOrder, train_order},
    step::Spread,
    tasks::Part,
    train_mask,
    trajectory::{Answer, Trajectory, read, write},
};

fn stage(out: &Path, steps: usize, more: &str) -> RawMaskStage {
    let mut raw = toy::stage(out, steps, more);
    (raw.optimizer.warm_up, raw.optimizer.average) = (10, None);
    raw
}

fn train(raw: RawMaskStage, dir: &Path) -> Summary {
    let vocabulary = Vocabulary::standard(14);
    let sources = Sources { train: &Copies, held_out: &Copies, vocabulary: &vocabulary, tokenizer: dir };
    train_mask(&raw.validate().unwrap(), sources).unwrap()
}

fn load(folder: &Path) -> Model {
    let shape = read_shape(folder).unwrap();
    Model::new(shape.clone(), &read_weights(&shape, folder).unwrap(), Vocabulary::standard(14).mask).unwrap()
}

fn texts(count: usize, block: usize, rng: &mut ChaCha8Rng) -> Vec<Filled> {
    (0..count).map(|i| noise::fill(Copies.encode(i, rng), block, 0)).collect()
}

fn judge(folder: &Path) -> Repair {
    let documents = texts(200, 8, &mut ChaCha8Rng::seed_from_u64(1));
    repair(&load(folder), documents, 8, 0.1, 0.5, &mut ChaCha8Rng::seed_from_u64(2)).unwrap()
}

#[test]
fn edits_teach_to_repair_and_orders_are_found_and_learnt() {
    let dir = tempfile::tempdir().unwrap();
    let masks = train(stage(&dir.path().join("mask"), 250, ""), dir.path());
    let init = |from: &Summary| format!("init = {{ checkpoint = {:?} }}", from.model.display().to_string());

    let edits = "edits = { share = 1.0, alpha = 0.1, masked = 0.5 }";
    let edited = train(stage(&dir.path().join("edit"), 150, &format!("{}\n{edits}", init(&masks))), dir.path());
    let (before, after) = (judge(&masks.model), judge(&edited.model));
    // Half of the wrong tokens stand where nothing tells what was there; the other half copies what can be seen.
    assert!(after.repair_rate > before.repair_rate + 0.15, "{before:?}\n{after:?}");
    assert!(after.false_edit_rate < 0.02 && after.false_edit_rate < before.false_edit_rate, "{before:?}\n{after:?}");
    assert!(after.calibration_error < before.calibration_error, "{before:?}\n{after:?}");

    // Both parts by one command.
    let both = "edits = { share = 0.375, alpha = 0.1, masked = 0.5, rate = 4e-3, warm_up = 20 }";
    let whole = judge(&train(stage(&dir.path().join("whole"), 400, both), dir.path()).model);
    assert!(whole.repair_rate > before.repair_rate + 0.15 && whole.false_edit_rate < 0.02, "{before:?}\n{whole:?}");

    the_best_of_sampled_orders_beats_a_random_one(&load(&masks.model));

    let vocabulary = Vocabulary::standard(14);
    let sources = Sources { train: &Copies, held_out: &Copies, vocabulary: &vocabulary, tokenizer: dir.path() };
    let own = RawOrder {
        texts: 16,
        answers: 0,
        tasks: None,
        orders: 3,
        keep: 0.5,
        temperature: 0.5,
        alpha: 0.05,
        replay: 0.3,
    };
    let out = dir.path().join("order");
    let order = OrderStage::new(own, stage(&out, 12, &init(&masks))).unwrap();
    train_order(&order, sources).unwrap();
    let file = std::fs::read_to_string(out.join("orders.jsonl")).unwrap();
    let paths: Vec<Trajectory> = file.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(paths.len(), 8, "the best half of eight texts at each of two block sizes");
    for path in &paths {
        assert_eq!(path.reveal.len(), path.tokens.len());
        assert!(path.reveal.iter().all(|pass| (1..=path.block as u16).contains(pass)), "{path:?}");
    }
}

fn the_best_of_sampled_orders_beats_a_random_one(model: &Model) {
    let spread = Spread { micro_rows: 1000, threads: 2 };
    let mean = |orders, temperature| {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let texts: Vec<Answer> = (0..100).map(|i| Answer { tokens: Copies.encode(i, &mut rng), prompt: 0 }).collect();
        let Vocabulary { mask, end, .. } = Vocabulary::standard(14);
        let sampling = Sampling { orders, temperature, mask, end };
        let found = best_orders(model, &texts, 8, sampling, spread, &mut ChaCha8Rng::seed_from_u64(4)).unwrap();
        found.iter().map(|(_, elbo)| elbo).sum::<f64>() / found.len() as f64
    };
    let (random, best) = (mean(1, 1e6), mean(6, 0.5));
    assert!(best > random + 0.02, "random {random}, best of six {best}");
}

#[test]
fn settings_of_later_stages_name_every_wrong_key() {
    let dir = tempfile::tempdir().unwrap();
    let own = RawOrder {
        texts: 0,
        answers: 0,
        tasks: Some("tasks.jsonl".into()),
        orders: 1,
        keep: 2.0,
        temperature: -1.0,
        alpha: 0.0,
        replay: 0.0,
    };
    let error = OrderStage::new(own, stage(dir.path(), 0, "")).unwrap_err().to_string();
    for key in ["order.texts", "order.tasks", "order.keep", "order.temperature", "stage.init.checkpoint", "steps"] {
        assert!(error.contains(key), "{key} in {error}");
    }
}

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
}

/// Files that people copy are read and pass their checks.
#[test]
fn every_recipe_is_usable() {
    let recipe = |name: &str| models().join("recipe").join(name).with_extension("toml");
    recipe::read::<recipe::TokenizerStage>(&recipe("tokenizer")).unwrap();
    for name in ["mask", "edit", "curriculum", "twin", "own-code"] {
        recipe::read::<recipe::MaskRun>(&recipe(name)).unwrap().stage.validate().unwrap();
    }
    let order: recipe::OrderRun = recipe::read(&recipe("order")).unwrap();
    OrderStage::new(order.order, order.stage).unwrap();
    for name in ["on-policy", "on-policy-2", "infill", "on-policy-4", "own-tasks"] {
        let run: recipe::OnPolicyRun = recipe::read(&recipe(name)).unwrap();
        OnPolicyStage::new(run.on_policy, run.stage).unwrap();
    }
    let files = std::fs::read_dir(models().join("recipe")).unwrap().count();
    assert_eq!(files, 12, "every file is read above");
}

fn few_steps_from_bundled(data: &mut MixtureConfig, stage: &mut RawMaskStage, steps: usize, dir: &Path) {
    let folder = models().join(std::fs::read_to_string(models().join("default")).unwrap().trim());
    data.tokenizer = folder.join("tokenizer.json");
    stage.init.checkpoint = Some(folder);
    stage.out = dir.join("out");
    (stage.steps, stage.batch.tokens, stage.optimizer.warm_up, stage.eval.documents) = (steps, 512, 1, 2);
}

/// Orders of what the bundled model answers by itself: prompts are given, answers fall, and their texts pass.
#[test]
fn orders_are_found_for_the_models_own_answers() {
    let dir = tempfile::tempdir().unwrap();
    let mut run: recipe::OrderRun = recipe::read(&models().join("recipe/order.toml")).unwrap();
    few_steps_from_bundled(&mut run.data, &mut run.stage, 2, dir.path());
    run.order = RawOrder {
        texts: 16,
        answers: 12,
        tasks: None,
        orders: 2,
        keep: 0.5,
        temperature: 0.5,
        alpha: 0.05,
        replay: 0.3,
    };
    let out = run.stage.out.clone();
    assert_eq!(recipe::order(run).unwrap().steps, 2);
    let answers: Vec<Answer> = read(&out.join("answers.jsonl")).unwrap();
    let paths: Vec<Trajectory> = read(&out.join("orders.jsonl")).unwrap();
    assert!(answers.len() > 6 && paths.len() == 8, "{} answers, {} paths", answers.len(), paths.len());
    for path in &paths {
        let text = &path.tokens[..path.length];
        let answer = answers.iter().find(|answer| answer.tokens == text).expect("the text is an answer");
        let first = answer.prompt / path.block * path.block;
        assert_eq!(path.reveal.len(), path.tokens.len() - first);
        let given = answer.prompt - first;
        assert!(path.reveal[..given].iter().all(|pass| *pass == 0), "{path:?}");
        assert!(path.reveal[given..].iter().all(|pass| (1..=path.block as u16).contains(pass)), "{path:?}");
    }
}

/// A step on answers, then up to two rounds of a step, with so many prompts and guarded tasks.
fn few_rounds_from_bundled(prompts: usize, dir: &Path) -> recipe::OnPolicyRun {
    let mut run: recipe::OnPolicyRun = recipe::read(&models().join("recipe/on-policy.toml")).unwrap();
    few_steps_from_bundled(&mut run.data, &mut run.stage, 3, dir);
    (run.on_policy.answers, run.on_policy.answer_steps) = (16, 1);
    (run.on_policy.round_steps, run.on_policy.prompts, run.on_policy.guard_tasks) = (1, prompts, prompts);
    run
}

fn records(out: &Path) -> impl Iterator<Item = Record> {
    let log = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
    log.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<_>>().into_iter()
}

fn rounds(out: &Path) -> Vec<RoundRecord> {
    records(out).filter_map(|record| if let Record::Round(round) = record { Some(round) } else { None }).collect()
}

/// A few steps of the last stage on the bundled model: rounds are measured and logged, the paths that are learnt from
/// are shorter than what the model does by default, and the result still solves its tasks.
#[test]
fn on_policy_training_learns_from_shorter_paths() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = few_rounds_from_bundled(24, dir.path());
    run.on_policy.thresholds = vec![0.95, 0.7];
    run.on_policy.guard_points = 30.0;
    let out = run.stage.out.clone();
    let summary = recipe::on_policy(run).unwrap();
    assert_eq!(summary.steps, 3);
    let rounds = rounds(&out);
    assert_eq!(rounds.iter().map(|round| round.step).collect::<Vec<_>>(), [1, 2, 3]);
    for round in rounds {
        assert!(round.kept * 2 > round.prompts && round.pass_rate > 0.5, "{round:?}");
        assert!(round.kept_tpf > 1.3 && round.passing.iter().all(|share| *share > 0.3), "{round:?}");
    }
    assert!(summary.model.join("model.safetensors").exists());
}

/// The guard ends the stage before the first round when nobody can pass it; what is exported is the model before.
#[test]
fn the_guard_keeps_the_model_before() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = few_rounds_from_bundled(8, dir.path());
    run.on_policy.guard_points = -101.0;
    let start = run.stage.init.checkpoint.clone().unwrap();
    let summary = recipe::on_policy(run).unwrap();
    assert_eq!(summary.steps, 1, "the answers' step, no round");
    let weights = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    assert!(weights(&summary.model) == weights(&start), "the model that it started from");
}

/// A folder of code that looks like nothing before: what is held out of it becomes likelier.
#[test]
fn own_code_is_learnt() {
    let dir = tempfile::tempdir().unwrap();
    let code = dir.path().join("code");
    std::fs::create_dir(&code).unwrap();
    for i in 0..24 {
        let text = format!(
            "def load_{i}(registry, request):\n    with registry.lock:\n        entry = registry.lookup(request.key + {i})\n    \
             return entry.unwrap_or(request.fallback)\n"
        );
        std::fs::write(code.join(format!("module_{i}.py")), text).unwrap();
    }
    let mut run: recipe::MaskRun = recipe::read(&models().join("recipe/own-code.toml")).unwrap();
    few_steps_from_bundled(&mut run.data, &mut run.stage, 24, dir.path());
    (run.data.real, run.data.real_share, run.data.infill_share) = (Some(code), 1.0, 0.0);
    let out = run.stage.out.clone();
    recipe::mask(run).unwrap();
    let evals: Vec<EvalRecord> =
        records(&out).filter_map(|record| if let Record::Eval(eval) = record { Some(eval) } else { None }).collect();
    assert_eq!(evals.iter().map(|eval| eval.step).collect::<Vec<_>>(), [0, 24]);
    let [before, after] = [0, 1].map(|i| (evals[i].mask_loss[1].mean, evals[i].next_loss));
    assert!(after.0 < 0.6 * before.0 && after.1 < 0.6 * before.1, "{before:?} {after:?}");
}

/// Tasks of a file, without solutions: the guard has some of them for itself, the others are learnt.
#[test]
fn own_tasks_are_learnt_and_watched() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tasks.jsonl");
    recipe::write_tasks(&file, 5, Part::HeldOut, 30).unwrap();
    let mut tasks = read_tasks(&file).unwrap();
    for task in &mut tasks {
        (task.canonical_solution, task.skeleton) = (String::new(), String::new());
    }
    write(&tasks, &file).unwrap();
    let mut run = few_rounds_from_bundled(100, dir.path());
    (run.on_policy.tasks, run.on_policy.answers, run.on_policy.cut_share) = (Some(file.clone()), 100, 0.0);
    (run.on_policy.guard_points, run.stage.steps) = (100.0, 2);
    let (out, tokenizer) = (run.stage.out.clone(), measure::tokenizer(run.data.tokenizer.parent().unwrap()).unwrap());
    let again = run.clone();
    recipe::on_policy(run).unwrap();
    assert!(rounds(&out).iter().all(|round| round.prompts == 24 && round.kept > 12), "{:?}", rounds(&out));
    let prompts: HashSet<&str> = tasks.iter().map(|task| task.prompt.as_str()).collect();
    let answers: Vec<Answer> = read(&out.join("answers.jsonl")).unwrap();
    let asked: HashSet<String> = answers.iter().map(|a| tokenizer.decode(&a.tokens[..a.prompt], true)).collect();
    assert!(asked.len() > 12 && asked.len() <= 24 && asked.iter().all(|prompt| prompts.contains(&prompt[..])));

    tasks[3].prompt = "# too long ".repeat(1000);
    write(&tasks, &file).unwrap();
    let error = format!("{:#}", recipe::on_policy(again).unwrap_err());
    assert!(error.contains(&tasks[3].task_id) && error.contains("1 of 30 tasks"), "{error}");
}
