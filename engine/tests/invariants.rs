//! What must hold of an engine (I1 to I4, I7, I10), on a small reference checkpoint.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use unmask_engine::policy::{Bound, Comparison, Order, Policy, Quota};
use unmask_engine::{
    Engine, Event, Limits, LoadOptions, Model, Reason, Refusal, Request, RequestId, Sampling, Settings,
};
use unmask_kernels::WeightType;

const STEPS_MAX: usize = 10_000;

fn model_with(family: &str, threads: usize, dtype: WeightType) -> Arc<Model> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(family);
    let options = LoadOptions { threads, dtype, ..LoadOptions::default() };
    Arc::new(Model::load(&dir, &options).unwrap())
}

fn model() -> Arc<Model> {
    model_with("sdar", 2, WeightType::F32)
}

const THRESHOLD: Policy = Policy::Threshold { tau: 0.6, comparison: Comparison::Strict, quota_steps: None };

fn request(id: u64, prompt_len: u32, policy: Policy) -> Request {
    Request::new(
        RequestId(id),
        (0..prompt_len).map(|i| (i * 37 + id as u32 * 11) % 290).collect(),
        Settings {
            sampling: Sampling { temperature: 0.8, top_p: 1.0, top_k: 0, seed: 7 + id },
            ..Settings::new(24, 4, policy)
        },
    )
}

#[derive(Debug, Default, Clone, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    finished: Option<(Reason, u32)>,
}

fn run(engine: &mut Engine) -> BTreeMap<RequestId, Answer> {
    let mut answers: BTreeMap<RequestId, Answer> = BTreeMap::new();
    let mut events = Vec::new();
    for _ in 0..STEPS_MAX {
        if !engine.has_work() {
            break;
        }
        engine.step(&mut events);
        for event in events.drain(..) {
            let answer = answers.entry(event.id()).or_default();
            match event {
                Event::Commit { tokens, .. } => answer.tokens.extend(tokens),
                Event::Finished { reason, nfe, completion_tokens, .. } => {
                    assert_eq!(completion_tokens as usize, answer.tokens.len());
                    answer.finished = Some((reason, nfe));
                }
                _ => {}
            }
        }
    }
    let load = engine.load();
    assert_eq!((load.active, load.queued, load.free_pages), (0, 0, load.total_pages), "pages leaked (I7)");
    answers
}

fn alone(model: &Arc<Model>, request: Request) -> Answer {
    let id = request.id;
    let mut engine = Engine::new(Arc::clone(model), Limits { pages: 64, ..Limits::default() });
    engine.submit(request).unwrap();
    run(&mut engine).remove(&id).unwrap()
}

fn policies() -> Vec<Policy> {
    vec![
        THRESHOLD,
        Policy::Fixed { steps: 2, order: Order::Margin, quota: Quota::Masks },
        Policy::Fixed { steps: 4, order: Order::Random, quota: Quota::Masks },
        Policy::Factor { factor: 1.0, last_falls: false },
        Policy::EntropyBounded { gamma: 1.0, bound: Bound::AllButLargest },
        Policy::Hierarchical { low: 0.4, high: 0.8 },
    ]
}

/// I1: what else is in the batch does not matter, for every policy.
#[test]
fn tokens_do_not_depend_on_the_batch() {
    let model = model();
    let requests: Vec<Request> =
        (0..16u64).map(|i| request(i, 1 + (i as u32 * 13) % 70, policies()[i as usize % 6])).collect();
    let mut engine = Engine::new(Arc::clone(&model), Limits { pages: 256, ..Limits::default() });
    for r in &requests {
        engine.submit(r.clone()).unwrap();
    }
    let together = run(&mut engine);
    for r in requests {
        assert_eq!(alone(&model, r.clone()), together[&r.id], "request {:?}", r.id);
    }
}

/// I1: neither threads nor the chunks in which a prompt comes matter.
#[test]
fn tokens_do_not_depend_on_threads_or_chunks() {
    let requests: Vec<Request> = (0..4).map(|i| request(i, 150, THRESHOLD)).collect();
    let mut seen = None;
    for (threads, rows_max) in [(1, 512), (2, 64), (3, 96), (4, 512)] {
        let limits = Limits { pages: 64, rows_max, ..Limits::default() };
        let mut engine = Engine::new(model_with("sdar", threads, WeightType::Bf16), limits);
        for r in &requests {
            engine.submit(r.clone()).unwrap();
        }
        let answers = run(&mut engine);
        assert_eq!(*seen.get_or_insert(answers.clone()), answers, "threads {threads}, rows {rows_max}");
    }
}

/// I1: a request that continues elsewhere from any of its commits gives the same tokens.
#[test]
fn a_continued_request_gives_the_same_tokens() {
    let model = model();
    for policy in policies() {
        let whole = alone(&model, request(3, 10, policy));
        for cut in 0..=whole.tokens.len() {
            let mut rest = request(3, 10, policy);
            rest.committed = whole.tokens[..cut].to_vec();
            let mut engine = Engine::new(Arc::clone(&model), Limits { pages: 64, ..Limits::default() });
            engine.submit(rest).unwrap();
            let mut tokens = whole.tokens[..cut].to_vec();
            let mut events = Vec::new();
            while engine.has_work() {
                engine.step(&mut events);
            }
            for event in events {
                if let Event::Commit { first_position, tokens: fresh, .. } = event {
                    tokens.truncate(first_position as usize - 10);
                    tokens.extend(fresh);
                }
            }
            assert_eq!(tokens, whole.tokens, "{policy:?} from {cut}");
        }
    }
}

/// I2: the seed decides, and only the seed.
#[test]
fn draws_depend_on_the_seed() {
    let model = model();
    let mut other = request(1, 20, THRESHOLD);
    let first = alone(&model, other.clone());
    assert_eq!(first, alone(&model, other.clone()));
    other.settings.sampling.seed += 1;
    assert_ne!(first.tokens, alone(&model, other.clone()).tokens);
    other.settings.sampling.temperature = 0.0;
    let greedy = alone(&model, other.clone());
    other.settings.sampling.seed += 1;
    assert_eq!(greedy, alone(&model, other));
}

#[test]
fn filters_that_keep_everything_change_nothing_and_top_1_is_greedy() {
    let model = model();
    let plain = alone(&model, request(1, 20, THRESHOLD));
    let mut filtered = request(1, 20, THRESHOLD);
    filtered.settings.sampling.top_k = 10_000;
    assert_eq!(plain, alone(&model, filtered.clone()));
    filtered.settings.sampling.top_k = 1;
    let mut greedy = request(1, 20, THRESHOLD);
    greedy.settings.sampling.temperature = 0.0;
    assert_eq!(alone(&model, greedy).tokens, alone(&model, filtered).tokens);
}

#[test]
fn length_is_exact_whatever_the_block() {
    let model = model();
    for max_tokens in [1, 3, 4, 5, 9] {
        let mut r = request(2, 7, THRESHOLD);
        r.settings.max_tokens = max_tokens;
        let answer = alone(&model, r);
        assert_eq!((answer.tokens.len() as u32, answer.finished.unwrap().0), (max_tokens, Reason::Length));
    }
}

#[test]
fn a_stop_id_ends_the_output_before_itself() {
    let model = model();
    let whole = alone(&model, request(5, 9, THRESHOLD));
    let mut r = request(5, 9, THRESHOLD);
    r.settings.stop_ids = vec![whole.tokens[6]];
    let at = whole.tokens.iter().position(|t| *t == whole.tokens[6]).unwrap();
    let answer = alone(&model, r);
    assert_eq!((answer.tokens, answer.finished.unwrap().0), (whole.tokens[..at].to_vec(), Reason::Stop));
}

#[test]
fn the_cap_drops_the_open_block() {
    let model = model();
    let whole = alone(&model, request(4, 8, THRESHOLD));
    for cap in 1..whole.finished.unwrap().1 {
        let mut r = request(4, 8, THRESHOLD);
        r.settings.nfe_cap = cap;
        let answer = alone(&model, r);
        assert_eq!(answer.finished, Some((Reason::NfeCap, cap)));
        assert_eq!(answer.tokens.len() % 4, 0);
        assert_eq!(answer.tokens, whole.tokens[..answer.tokens.len()]);
    }
}

/// A store rides along with the next block's first pass: no pass carries store rows alone.
#[test]
fn a_block_costs_its_steps_and_no_pass_more() {
    let model = model();
    let mut r = request(6, 8, Policy::Fixed { steps: 2, order: Order::Confidence, quota: Quota::Masks });
    r.settings.max_tokens = 16;
    r.raw = true; // no end-of-sequence
    let mut engine = Engine::new(model, Limits { pages: 64, ..Limits::default() });
    engine.submit(r).unwrap();
    let (mut passes, mut events) = (0, Vec::new());
    while engine.has_work() {
        let report = engine.step(&mut events);
        assert_eq!(report.open_rows, 4);
        passes += 1;
    }
    assert_eq!(passes, 4 * 2);
}

#[test]
fn autoregressive_is_one_row_per_token() {
    let model = model_with("qwen3", 1, WeightType::F32);
    let mut r = request(6, 8, Policy::Autoregressive);
    r.settings.max_tokens = 16;
    let mut engine = Engine::new(model, Limits { pages: 64, ..Limits::default() });
    engine.submit(r).unwrap();
    let mut rows = Vec::new();
    let mut events = Vec::new();
    while engine.has_work() {
        rows.push(engine.step(&mut events).rows);
    }
    assert_eq!(rows[0], 8);
    assert_eq!(rows[1..], [1; 15]);
}

/// I10: what is wrong with one request is said of that request, all of it, and stops no other.
#[test]
fn bad_requests_are_refused_with_every_reason() {
    let model = model();
    let expected = alone(&model, request(3, 5, THRESHOLD));
    let mut engine = Engine::new(model, Limits { pages: 8, queue_max: 1, ..Limits::default() });
    let mut bad = request(1, 0, Policy::Threshold { tau: 1.5, comparison: Comparison::Strict, quota_steps: None });
    bad.settings.block_size = 5;
    bad.settings.sampling.temperature = -1.0;
    bad.committed = vec![9999];
    let Err(Refusal::Invalid(found)) = engine.submit(bad) else { panic!("taken") };
    let fields: Vec<&str> = found.iter().map(|f| f.field.as_str()).collect();
    assert_eq!(fields, ["prompt", "committed", "temperature", "block_size", "policy.threshold.tau"]);
    let mut long = request(2, 200, THRESHOLD);
    long.settings.max_tokens = 400;
    assert!(matches!(engine.submit(long), Err(Refusal::TooLong { .. })));
    engine.submit(request(3, 5, THRESHOLD)).unwrap();
    assert_eq!(engine.submit(request(3, 5, THRESHOLD)), Err(Refusal::Duplicate(RequestId(3))));
    assert!(matches!(engine.submit(request(4, 5, THRESHOLD)), Err(Refusal::QueueFull { .. })));
    let answers = run(&mut engine);
    assert_eq!(answers, BTreeMap::from([(RequestId(3), expected)]));
}

/// I7: cancelling at any step leaves no page behind, and the others never notice.
#[test]
fn cancelling_frees_everything_at_once() {
    let model = model();
    let expected = alone(&model, request(1, 30, THRESHOLD));
    for at in 0..12 {
        let mut engine = Engine::new(Arc::clone(&model), Limits { pages: 64, ..Limits::default() });
        for id in 1..4 {
            engine.submit(request(id, 30, THRESHOLD)).unwrap();
        }
        let mut events = Vec::new();
        for _ in 0..at {
            engine.step(&mut events);
        }
        engine.cancel(RequestId(2));
        engine.cancel(RequestId(3));
        let held = engine.load().total_pages - engine.load().free_pages;
        assert!(held <= 2, "{held} pages held by one request");
        let mut tokens: Vec<u32> = Vec::new();
        while engine.has_work() {
            engine.step(&mut events);
        }
        for event in events {
            if let Event::Commit { id: RequestId(1), tokens: fresh, .. } = event {
                tokens.extend(fresh);
            }
        }
        assert_eq!(tokens, expected.tokens);
        assert_eq!(engine.load().free_pages, engine.load().total_pages);
    }
}

#[test]
fn a_paused_request_waits_and_the_others_go_on() {
    let mut engine = Engine::new(model(), Limits { pages: 64, ..Limits::default() });
    engine.submit(request(1, 5, THRESHOLD)).unwrap();
    engine.submit(request(2, 5, THRESHOLD)).unwrap();
    let mut events = Vec::new();
    engine.step(&mut events);
    engine.pause(RequestId(1), true);
    for _ in 0..STEPS_MAX {
        if !engine.has_work() {
            break;
        }
        engine.step(&mut events);
    }
    assert!(events.iter().any(|e| matches!(e, Event::Finished { id: RequestId(2), .. })));
    assert_eq!(engine.load().active, 1);
    engine.pause(RequestId(1), false);
    assert_eq!(run(&mut engine).len(), 1);
}
