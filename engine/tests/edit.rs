//! Editing a given text: what may change does, the rest stays, the count is kept.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use unmask_engine::request::DraftText;
use unmask_engine::{Engine, Event, Limits, LoadOptions, Model, Policy, Reason, Refusal, Request, RequestId, Settings};

const POLICY: Policy = Policy::JointEdit { tau: 0.5, tau_edit: 0.3, max_post_steps: 4, at_least: 1 };
const LEN: u32 = 37;

fn model(path: &str) -> Arc<Model> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    Arc::new(Model::load(&dir, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap())
}

/// Drawn ids, every fifth of which may not change and some of which are to be filled.
fn draft() -> DraftText {
    DraftText {
        tokens: (0..LEN).map(|i| 20 + i * 31 % 250).collect(),
        masked: (0..LEN).map(|i| i % 7 == 3 && i % 5 != 0).collect(),
        fixed: (0..LEN).map(|i| i % 5 == 0).collect(),
    }
}

fn request(draft: DraftText) -> Request {
    let settings = Settings::new(draft.tokens.len() as u32, 8, POLICY);
    Request { draft: Some(draft), ..Request::new(RequestId(1), Vec::new(), settings) }
}

/// What a run commits and why it ends.
fn run(model: &Arc<Model>, request: Request) -> (Vec<u32>, Reason) {
    let mut next = request.committed.len() as u32;
    let mut engine = Engine::new(Arc::clone(model), Limits::default());
    engine.submit(request).unwrap();
    let (mut tokens, mut events) = (Vec::new(), Vec::new());
    loop {
        assert!(engine.has_work(), "it ends with an event");
        engine.step(&mut events);
        for event in events.drain(..) {
            match event {
                Event::Commit { first_position, tokens: fresh, .. } => {
                    assert_eq!(first_position, next);
                    next += fresh.len() as u32;
                    tokens.extend(fresh);
                }
                Event::Finished { reason, .. } => return (tokens, reason),
                _ => {}
            }
        }
    }
}

#[test]
fn what_may_change_does_and_the_count_is_kept() {
    for path in ["models/python-tasks-3m", "tests/golden/llada2_moe"] {
        let (model, draft) = (model(path), draft());
        let mut request = request(draft.clone());
        request.settings.block_size = model.config().decode.block_size;
        request.raw = path.contains("golden");
        let (tokens, reason) = run(&model, request.clone());
        assert_eq!((tokens.len() as u32, reason), (LEN, Reason::Length));
        let kept = tokens.iter().zip(&draft.tokens).zip(&draft.fixed).filter(|(_, fixed)| **fixed);
        assert!(kept.clone().count() > 5 && kept.into_iter().all(|((new, old), _)| new == old), "{path}");
        let changed = |i: usize| tokens[i] != draft.tokens[i];
        assert!((0..LEN as usize).any(|i| changed(i) && !draft.masked[i]), "{path}: nothing given has changed");
        // Continued from what another run had committed, to the same end.
        let whole = request.settings.block_size as usize;
        let (rest, _) = run(&model, Request { committed: tokens[..whole].to_vec(), ..request });
        assert_eq!(rest, tokens[whole..], "{path}");
    }
}

#[test]
fn a_text_that_is_all_fixed_costs_a_pass_a_block_and_stays() {
    let model = model("models/python-tasks-3m");
    let draft = DraftText { masked: vec![false; LEN as usize], fixed: vec![true; LEN as usize], ..draft() };
    assert_eq!(run(&model, request(draft.clone())), (draft.tokens, Reason::Length));
}

#[test]
fn what_cannot_be_edited_is_refused_with_every_reason() {
    let own = model("models/python-tasks-3m");
    let mut wrong = request(DraftText { masked: vec![true; LEN as usize], ..draft() });
    wrong.settings.policy = Policy::Threshold { tau: 0.9, comparison: Default::default(), quota_steps: None };
    wrong.settings.max_tokens = 3;
    let mut engine = Engine::new(own, Limits::default());
    let Err(Refusal::Invalid(found)) = engine.submit(wrong) else { panic!() };
    let text: String = found.iter().map(|invalid| format!("{invalid}\n")).collect();
    for part in ["draft: its lists must have max_tokens (3)", "draft.fixed: ", "policy: must be joint_edit"] {
        assert!(text.contains(part), "{text}");
    }
    let mut autoregressive = request(draft());
    autoregressive.settings.policy = Policy::Autoregressive;
    let Err(Refusal::Invalid(found)) = engine.submit(autoregressive) else { panic!() };
    assert!(found.iter().any(|invalid| invalid.field == "policy"), "{found:?}");
    let mut engine = Engine::new(model("tests/golden/sdar"), Limits::default());
    assert!(matches!(engine.submit(request(draft())), Err(Refusal::Invalid(_))), "not trained to edit");
    let mut engine = Engine::new(model("tests/golden/llada"), Limits::default());
    let Err(Refusal::Invalid(found)) = engine.submit(Request { raw: true, ..request(draft()) }) else { panic!() };
    assert!(found.iter().any(|invalid| invalid.field == "draft"), "{found:?}");
}
