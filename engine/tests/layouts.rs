//! Families whose rows score the position after them, and families that read everything at once: the engine gives what
//! the plainest loop gives, which computes all rows anew in every pass.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use unmask_engine::model::{DecodeDefaults, Family, row_end};
use unmask_engine::policy::{Comparison, Policy};
use unmask_engine::request::Cache;
use unmask_engine::{
    Engine, Event, Limits, LoadOptions, Model, ModelConfig, Reach, Request, RequestId, Settings, StepReport,
};
use unmask_kernels::{Draw, HeadShape, PAGE_SLOTS, Record, Row, RowTable};

const TAU: f32 = 0.004;
const POLICY: Policy = Policy::Threshold { tau: TAU, comparison: Comparison::Strict, quota_steps: None };
const BLOCK: u32 = 8;
const MAX_TOKENS: u32 = 24;
const MASK: u32 = 1;
const STEPS_MAX: usize = 1000;

fn model(reach: Reach, shift: bool) -> Arc<Model> {
    let config = ModelConfig {
        name: "drawn".into(),
        architecture: "drawn".into(),
        family: Family::own(),
        layers: 2,
        hidden: 48,
        ffn: 64,
        moe: None,
        heads: HeadShape { heads: 4, kv_heads: 2, head_dim: 16 },
        vocab_rows: 400,
        tokenizer_size: 400,
        rms_eps: 1e-6,
        rope_theta: 1e4,
        rotary_dim: 16,
        qk_norm: true,
        qkv_bias: false,
        tied: false,
        context_length: 256,
        block_sizes: vec![BLOCK],
        open_reach: reach,
        kept_reach: reach,
        shift,
        mask_id: Some(MASK),
        eos_ids: Vec::new(),
        infill: None,
        heal: false,
        edit: true,
        decode: DecodeDefaults { block_size: BLOCK, policy: POLICY, max_tokens: MAX_TOKENS, temperature: 0.0 },
        entries: Vec::new(),
    };
    Arc::new(Model::drawn(config, &LoadOptions { threads: 1, ..LoadOptions::default() }, 11).unwrap())
}

fn request(id: u64, prompt_len: u32) -> Request {
    Request::new(
        RequestId(id),
        (0..prompt_len).map(|i| 2 + (i * 37 + id as u32 * 11) % 390).collect(),
        Settings::new(MAX_TOKENS, BLOCK, POLICY),
    )
}

/// Records of all rows of a pass over `ids`.
fn records(model: &Model, ids: &[u32]) -> Vec<Record> {
    let reach = model.config().open_reach;
    let pages: Vec<u32> = (0..ids.len().div_ceil(PAGE_SLOTS) as u32).collect();
    let (mut kv, mut scratch) = (model.new_kv(pages.len()), model.new_scratch(ids.len()));
    let row = |position: u32| Row { sequence: 0, position, end: row_end(reach, position, BLOCK, ids.len() as u32) };
    let rows: Vec<Row> = (0..ids.len() as u32).map(row).collect();
    let outputs: Vec<u32> = (0..ids.len() as u32).collect();
    model.forward(ids, &RowTable { rows: &rows, tables: &[&pages] }, &outputs, &mut kv, &mut scratch);
    let mut records = vec![Record::default(); ids.len()];
    model.reduce(&scratch, &model.bans(), &vec![Draw::default(); ids.len()], &mut records);
    records
}

/// The plainest loop. Returns the tokens after the prompt, denoise passes, and passes that gave a block its first token.
fn plain(model: &Model, prompt: &[u32], max_tokens: u32, block: u32) -> (Vec<u32>, u32, u32) {
    let (whole, shift) = (model.config().open_reach == Reach::Bidirectional, model.config().shift);
    let (len, limit) = (prompt.len(), prompt.len() + max_tokens as usize);
    let origin = if whole { len } else { 0 };
    let mut canvas = prompt.to_vec();
    canvas.resize(origin + (limit - origin).next_multiple_of(block as usize), MASK);
    let (mut passes, mut firsts) = (0, 0);
    let mut masked: Vec<bool> = (0..canvas.len()).map(|i| i >= len).collect();
    let first_block = if whole { len } else { len - len % block as usize };
    for start in (first_block..canvas.len()).step_by(block as usize) {
        let end = start + block as usize;
        if shift && !whole && masked[start] {
            canvas[start] = records(model, &canvas[..start])[start - 1].argmax;
            masked[start] = false;
            firsts += 1;
            if start + 1 == limit {
                break;
            }
        }
        while masked[start..end].contains(&true) {
            let all = records(model, &canvas[..if whole { canvas.len() } else { end }]);
            let scored = |p: usize| (p, all[p - usize::from(shift)]);
            let open: Vec<(usize, Record)> = (start..end).filter(|&p| masked[p]).map(scored).collect();
            let mut best = open[0];
            for &(p, r) in &open {
                if r.confidence() > best.1.confidence() {
                    best = (p, r);
                }
            }
            for (p, r) in open {
                if r.confidence() > TAU || p == best.0 {
                    (canvas[p], masked[p]) = (r.argmax, false);
                }
            }
            passes += 1;
        }
    }
    (canvas[len..limit].to_vec(), passes, firsts)
}

/// As Dream's authors do: the whole output is one block, longer than one that others may have.
#[test]
fn one_block_can_be_the_whole_output() {
    for shift in [false, true] {
        let model = model(Reach::Bidirectional, shift);
        let prompt: Vec<u32> = request(0, 21).prompt;
        let mut whole = request(0, 21);
        (whole.raw, whole.settings.max_tokens, whole.settings.block_size) = (true, 100, 100);
        let (answers, reports) = run(&mut Engine::new(Arc::clone(&model), limits(64)), &[whole.clone()]);
        let (tokens, passes, _) = plain(&model, &prompt, 100, 100);
        assert_eq!(answers[0], (tokens, passes), "shift {shift}");
        assert!(reports.iter().all(|report| report.open_rows == 121));
        // Beyond the context there are no positions.
        whole.settings.block_size = 640;
        let wide = Limits { rows_max: 1024, ..limits(64) };
        let refusal = Engine::new(Arc::clone(&model), wide).submit(whole).unwrap_err().to_string();
        assert!(refusal.contains("block_size: the last block of 640 would end at 661"), "{refusal}");
    }
}

/// Tokens and passes of each request, and what the steps carried.
fn run(engine: &mut Engine, requests: &[Request]) -> (Vec<(Vec<u32>, u32)>, Vec<StepReport>) {
    requests.iter().for_each(|r| engine.submit(r.clone()).unwrap());
    let mut answers = vec![(Vec::new(), 0); requests.len()];
    let (mut events, mut reports) = (Vec::new(), Vec::new());
    for _ in 0..STEPS_MAX {
        if !engine.has_work() {
            break;
        }
        reports.push(engine.step(&mut events));
        for event in events.drain(..) {
            let answer = &mut answers[event.id().0 as usize];
            match event {
                Event::Commit { tokens, .. } => answer.0.extend(tokens),
                Event::Finished { nfe, .. } => answer.1 = nfe,
                _ => {}
            }
        }
    }
    assert_eq!((engine.load().active, engine.load().free_pages), (0, engine.load().total_pages));
    (answers, reports)
}

fn limits(pages: usize) -> Limits {
    Limits { pages, ..Limits::default() }
}

#[test]
fn every_layout_gives_the_tokens_of_the_plainest_loop() {
    for (reach, shift) in [(Reach::Block, true), (Reach::Bidirectional, false), (Reach::Bidirectional, true)] {
        let model = model(reach, shift);
        // Prompts that end at the end of a block, behind it, and before it; one shorter than a block.
        let requests: Vec<Request> = [16, 17, 31, 3, 40].iter().zip(0..).map(|(&len, id)| request(id, len)).collect();
        let (together, _) = run(&mut Engine::new(Arc::clone(&model), limits(64)), &requests);
        // So few pages that requests are sent back and go on later (I1).
        let (tight, _) = run(&mut Engine::new(Arc::clone(&model), limits(4)), &requests);
        for (request, answer) in requests.iter().zip(&together) {
            let (tokens, passes, firsts) = plain(&model, &request.prompt, MAX_TOKENS, BLOCK);
            assert_eq!(answer, &(tokens, passes + firsts), "{reach:?}, shift {shift}, {} tokens", request.prompt.len());
        }
        assert_eq!(together, tight, "{reach:?}, shift {shift}");
    }
}

/// I1 where keys and values are reused within a block: being sent back and going on later changes no token.
#[test]
fn reused_keys_do_not_depend_on_being_sent_back() {
    for (reach, shift) in [(Reach::Block, true), (Reach::Bidirectional, false), (Reach::Bidirectional, true)] {
        let model = model(reach, shift);
        for cache in [Cache::Prefix, Cache::Dual] {
            if reach == Reach::Block && cache == Cache::Prefix {
                continue;
            }
            let sub_block = Some(if reach == Reach::Block { BLOCK / 2 } else { 0 });
            let with_cache = |(&len, id): (&u32, u64)| {
                let mut request = request(id, len);
                (request.settings.manner.cache, request.settings.manner.sub_block) = (cache, sub_block);
                request
            };
            let requests: Vec<Request> = [16, 17, 31, 3, 40].iter().zip(0..).map(with_cache).collect();
            let (together, reports) = run(&mut Engine::new(Arc::clone(&model), limits(64)), &requests);
            let (tight, _) = run(&mut Engine::new(Arc::clone(&model), limits(4)), &requests);
            assert_eq!(together, tight, "{reach:?}, shift {shift}, {cache:?}");
            let plain: Vec<Request> = [16, 17, 31, 3, 40].iter().zip(0..).map(|(&len, id)| request(id, len)).collect();
            let (_, all) = run(&mut Engine::new(Arc::clone(&model), limits(64)), &plain);
            let rows = |reports: &[StepReport]| reports.iter().map(|report| report.rows).sum::<u32>();
            assert!(rows(&reports) < rows(&all), "{reach:?}, shift {shift}, {cache:?}: fewer rows are computed");
        }
    }
}

/// The exception to a store that rides along: a shifted family's last stored row gives the next block its first token.
#[test]
fn a_shifted_block_costs_its_steps_and_one_store() {
    let model = model(Reach::Block, true);
    let (answers, reports) = run(&mut Engine::new(Arc::clone(&model), limits(64)), &[request(0, 16)]);
    let (_, denoise, firsts) = plain(&model, &request(0, 16).prompt, MAX_TOKENS, BLOCK);
    assert_eq!(firsts, MAX_TOKENS / BLOCK);
    assert_eq!(answers[0].1, denoise + firsts);
    assert_eq!(reports.len() as u32, denoise + firsts, "one pass each, the prompt's being the first store");
    assert!(reports.iter().all(|report| report.kept_rows == 0 || report.open_rows == 0), "{reports:?}");
}

/// The exception for families that read everything at once: nothing is kept, every pass computes the canvas.
#[test]
fn a_bidirectional_pass_computes_the_canvas() {
    let model = model(Reach::Bidirectional, false);
    let (_, reports) = run(&mut Engine::new(Arc::clone(&model), limits(64)), &[request(0, 17)]);
    assert_eq!(reports.len() as u32, plain(&model, &request(0, 17).prompt, MAX_TOKENS, BLOCK).1);
    assert!(reports.iter().all(|report| (report.kept_rows, report.open_rows) == (0, 17 + MAX_TOKENS)));
}

#[test]
fn what_a_layout_cannot_do_is_refused() {
    let mut edits = request(0, 8);
    edits.settings.policy = Policy::JointEdit { tau: 0.9, tau_edit: 0.9, max_post_steps: 1, at_least: 1 };
    let refusal = Engine::new(model(Reach::Block, true), limits(64)).submit(edits).unwrap_err().to_string();
    assert!(refusal.contains("joint_edit"), "{refusal}");
    let mut empty = request(0, 8);
    empty.settings.block_size = 0;
    let refusal = Engine::new(model(Reach::Bidirectional, false), limits(64)).submit(empty).unwrap_err().to_string();
    assert!(refusal.contains("block_size"), "{refusal}");
    let narrow = Limits { rows_max: 64, ..limits(64) };
    let refusal = Engine::new(model(Reach::Bidirectional, false), narrow).submit(request(0, 40)).unwrap_err();
    assert!(refusal.to_string().contains("at most 48 fit a step"), "{refusal}");
}
