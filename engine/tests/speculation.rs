//! Self-speculative decoding: the tokens of autoregressive decoding, in fewer passes, whatever happens (I1).
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use unmask_engine::opening::{Choice, Opening};
use unmask_engine::policy::{Comparison, Policy};
use unmask_engine::{
    Engine, Event, Limits, LoadOptions, Model, Reason, Refusal, Request, RequestId, Sampling, Settings,
};

fn load(path: &str) -> Arc<Model> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    Arc::new(Model::load(&dir, &LoadOptions { threads: 2, ..LoadOptions::default() }).unwrap())
}

fn model() -> &'static Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    MODEL.get_or_init(|| load("models/python-tasks-3m"))
}

/// Ids that mean nothing together.
fn prompt(len: u32, id: u64) -> Vec<u32> {
    (0..len).map(|i| 5 + (i * 37 + id as u32 * 11) % 900).collect()
}

fn request(id: u64, prompt_len: u32, block_size: u32, policy: Policy, temperature: f32) -> Request {
    let mut settings = Settings::new(48, block_size, policy);
    settings.sampling = Sampling { temperature, seed: id, ..Sampling::GREEDY };
    Request::new(RequestId(id), prompt(prompt_len, id), settings)
}

#[derive(Debug, Default, Clone, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    end: Option<(Reason, u32)>,
}

/// Steps to the end; `between` sees the engine after each step, with the number of steps.
fn run(engine: &mut Engine, between: impl Fn(&mut Engine, u64)) -> BTreeMap<u64, Answer> {
    let (mut answers, mut events, mut steps) = (BTreeMap::<u64, Answer>::new(), Vec::new(), 0);
    while engine.has_work() {
        engine.step(&mut events);
        steps += 1;
        between(engine, steps);
        for event in events.drain(..) {
            let answer = answers.entry(event.id().0).or_default();
            match event {
                Event::Commit { tokens, .. } => answer.tokens.extend(tokens),
                Event::Finished { reason, nfe, .. } => answer.end = Some((reason, nfe)),
                _ => {}
            }
        }
    }
    let load = engine.load();
    assert_eq!((load.active, load.queued, load.free_pages), (0, 0, load.total_pages), "pages leaked (I7)");
    answers
}

fn alone(request: Request) -> Answer {
    let mut engine = Engine::new(Arc::clone(model()), Limits { pages: 64, ..Limits::default() });
    engine.submit(request).unwrap();
    run(&mut engine, |_, _| {}).into_values().next().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Block size and bound change how many passes it takes, and nothing else.
    #[test]
    fn tokens_are_those_of_autoregressive_decoding(
        id in 0u64..1000,
        prompt_len in 1u32..70,
        block_size in prop::sample::select(vec![4u32, 8, 16, 32]),
        tau in prop::sample::select(vec![0.05f32, 0.4, 0.9, 1.0]),
        temperature in prop::sample::select(vec![0.0f32, 0.7, 1.5]),
    ) {
        let one_by_one = alone(request(id, prompt_len, 1, Policy::Autoregressive, temperature));
        let drafted = alone(request(id, prompt_len, block_size, Policy::SelfSpeculative { tau }, temperature));
        prop_assert_eq!(&drafted.tokens, &one_by_one.tokens);
        let ((reason, passes), (same, most)) = (drafted.end.unwrap(), one_by_one.end.unwrap());
        prop_assert_eq!(reason, same);
        prop_assert!(passes <= most, "{} passes where one token each takes {}", passes, most);
    }
}

const POLICY: Policy = Policy::SelfSpeculative { tau: 0.4 };

/// The prompt that `unmask generate` is first tried with.
fn sum_of_squares() -> Request {
    let text = "def sum_of_squares(numbers):";
    let json = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/python-tasks-3m/tokenizer.json"));
    let json: serde_json::Value = serde_json::from_slice(&json.unwrap()).unwrap();
    let vocabulary = json["model"]["vocab"].as_object().unwrap();
    // One token per byte: the tokenizer's own words are not needed to see that drafts are right.
    let ids = text.chars().map(|c| if c == ' ' { 'Ġ' } else { c });
    let ids = ids.map(|c| vocabulary[&c.to_string()].as_u64().unwrap() as u32).collect();
    Request::new(RequestId(1), ids, Settings::new(48, 16, POLICY))
}

#[test]
fn a_pass_gives_several_tokens() {
    let answer = alone(sum_of_squares());
    let (reason, passes) = answer.end.unwrap();
    assert_eq!(reason, Reason::Eos);
    assert!(answer.tokens.len() > 8 && answer.tokens.len() as u32 >= 2 * passes, "{passes} passes: {answer:?}");
}

/// I1: passes too are the same beside others, with little room, and when pages are given up in between.
#[test]
fn passes_do_not_depend_on_others_nor_on_pre_emption() {
    let requests: Vec<Request> =
        (0..12u64).map(|id| request(id, 1 + id as u32 * 6, [4, 8, 16, 32][id as usize % 4], POLICY, 0.6)).collect();
    let expected: BTreeMap<u64, Answer> = requests.iter().map(|r| (r.id.0, alone(r.clone()))).collect();
    for (pages, rows_max, every) in [(256, 512, 0), (14, 256, 0), (256, 256, 3)] {
        let mut engine = Engine::new(Arc::clone(model()), Limits { pages, rows_max, ..Limits::default() });
        requests.iter().for_each(|r| engine.submit(r.clone()).unwrap());
        let answers = run(&mut engine, |engine, step| {
            if every > 0 && step.is_multiple_of(every) {
                engine.preempt(RequestId(step % 12));
            }
        });
        assert_eq!(answers, expected, "{pages} pages, {rows_max} rows, sent back every {every} steps");
        assert!(every == 0 || engine.load().preemptions > 0);
    }
}

/// I1: it goes on from any token of an earlier run.
#[test]
fn a_continued_request_gives_the_same_tokens() {
    let whole = alone(request(5, 9, 16, POLICY, 0.8));
    for cut in 0..=whole.tokens.len() {
        let mut rest = request(5, 9, 16, POLICY, 0.8);
        rest.committed = whole.tokens[..cut].to_vec();
        let answer = alone(rest);
        assert_eq!([&whole.tokens[..cut], &answer.tokens].concat(), whole.tokens, "cut at {cut}");
    }
}

#[test]
fn drafts_are_shown_to_who_asks_and_never_contradict_the_order() {
    let mut engine = Engine::new(Arc::clone(model()), Limits { pages: 64, ..Limits::default() });
    engine.submit(Request { drafts: true, ..sum_of_squares() }).unwrap();
    let mut events = Vec::new();
    while engine.has_work() {
        engine.step(&mut events);
    }
    let (mut next, mut drafts) = (sum_of_squares().prompt.len() as u32, 0);
    for event in events {
        match event {
            Event::Commit { first_position, tokens, .. } => {
                assert_eq!(first_position, next);
                next += tokens.len() as u32;
            }
            Event::Draft { first_position, masked, .. } => {
                assert!(first_position == next && !masked.contains(&true));
                drafts += 1;
            }
            _ => {}
        }
    }
    assert!(drafts > 0);
}

#[test]
fn what_it_cannot_honour_is_refused_by_name() {
    let refused = |model: &Arc<Model>, request: Request| {
        let mut engine = Engine::new(Arc::clone(model), Limits { pages: 64, ..Limits::default() });
        let Err(Refusal::Invalid(found)) = engine.submit(request) else { panic!("is taken") };
        found.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    let mut capped = request(1, 4, 8, POLICY, 0.0);
    capped.settings.nfe_cap = 3;
    assert!(refused(model(), capped).contains("nfe_cap"));
    assert!(refused(model(), request(1, 4, 5, POLICY, 0.0)).contains("block_size"));
    assert!(refused(model(), request(1, 4, 8, Policy::SelfSpeculative { tau: 0.0 }, 0.0)).contains("tau"));
    for family in ["sdar", "qwen3", "llada"] {
        let mut other = request(1, 4, 4, POLICY, 0.0);
        other.prompt = vec![7, 8, 9];
        assert!(refused(&load(&format!("tests/golden/{family}")), other).contains("policy"), "{family}");
    }
}

/// Some ways to spell four units, by tokens that mean nothing.
fn opening() -> Opening {
    let place = |place: u32| {
        let choice = |i: u32| Choice { token: 20 + (place * 53 + i * 17) % 900, next: place + 1 + i % 3 };
        let mut choices: Vec<Choice> = (0..12).map(choice).collect();
        choices.sort_by_key(|choice| choice.token);
        choices.dedup_by_key(|choice| choice.token);
        choices
    };
    Opening::new((0..4).map(place).collect()).unwrap()
}

/// An output begins as it must, goes on as it would have from there, and drafts change none of it.
#[test]
fn an_opening_is_kept_whatever_decides() {
    for (id, temperature) in [(1u64, 0.0), (2, 0.0), (3, 0.9), (4, 1.5)] {
        let ask = |policy: Policy, block_size: u32| {
            let mut asked = request(id, 9, block_size, policy, temperature);
            asked.opening = Some(opening());
            asked
        };
        let one_by_one = alone(ask(Policy::Autoregressive, 1));
        let spelled = (0..).find(|&n| opening().after(&one_by_one.tokens[..n]).is_none()).unwrap();
        for n in 0..spelled {
            let (opening, next) = (opening(), one_by_one.tokens[n]);
            let choices = opening.after(&one_by_one.tokens[..n]).unwrap();
            assert!(choices.iter().any(|choice| choice.token == next), "{next} in place {n}");
        }
        assert!(spelled >= 2, "four units, at most three at a time");
        let drafted = alone(ask(POLICY, 16));
        assert_eq!(drafted.tokens, one_by_one.tokens);
        for cut in 0..=one_by_one.tokens.len() {
            let mut rest = ask(POLICY, 16);
            rest.committed = one_by_one.tokens[..cut].to_vec();
            assert_eq!([&one_by_one.tokens[..cut], &alone(rest).tokens].concat(), one_by_one.tokens, "cut at {cut}");
        }
        let mut behind = request(id, 9, 1, Policy::Autoregressive, temperature);
        behind.committed = one_by_one.tokens[..spelled].to_vec();
        assert_eq!(alone(behind).tokens, one_by_one.tokens[spelled..]);
    }
}

#[test]
fn an_opening_needs_causal_rows_and_known_tokens() {
    let refused = |request: Request| {
        let mut engine = Engine::new(Arc::clone(model()), Limits { pages: 64, ..Limits::default() });
        match engine.submit(request) {
            Err(Refusal::Invalid(found)) => found[0].to_string(),
            other => panic!("{other:?}"),
        }
    };
    let threshold = Policy::Threshold { tau: 0.9, comparison: Comparison::Strict, quota_steps: None };
    let blocks = Request { opening: Some(opening()), ..request(1, 4, 8, threshold, 0.0) };
    assert!(refused(blocks).starts_with("opening: needs a policy"));
    let unknown = Opening::new(vec![vec![Choice { token: 5000, next: 1 }]]).unwrap();
    let unknown = Request { opening: Some(unknown), ..request(1, 4, 8, POLICY, 0.0) };
    assert!(refused(unknown).starts_with("opening: token 5000 is out of range"));
}
