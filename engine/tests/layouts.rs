//! Families whose rows score the position after them, and families that read everything at once: the engine gives what
//! the plainest loop gives, which computes all rows anew in every pass.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use unmask_engine::model::{DecodeDefaults, Family, row_end};
use unmask_engine::policy::{Comparison, Order, Policy, Quota};
use unmask_engine::request::Cache;
use unmask_engine::{
    Engine, Event, Limits, LoadOptions, Model, ModelConfig, Reach, Request, RequestId, Settings, StepReport,
};
use unmask_kernels::{Draw, HeadShape, PAGE_SLOTS, Record, Row, RowTable};

const TAU: f32 = 0.004;
const POLICY: Policy = Policy::Threshold { tau: TAU, comparison: Comparison::Strict, quota_steps: None };
const AT_ONCE: Policy = Policy::Fixed { steps: 1, order: Order::Confidence, quota: Quota::Masks };
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
    plain_between(model, prompt, max_tokens, block, &[])
}

/// The same with `suffix` right behind the output, whose last block is then as long as is left.
fn plain_between(model: &Model, prompt: &[u32], max_tokens: u32, block: u32, suffix: &[u32]) -> (Vec<u32>, u32, u32) {
    let (whole, shift) = (model.config().open_reach == Reach::Bidirectional, model.config().shift);
    let (len, limit) = (prompt.len(), prompt.len() + max_tokens as usize);
    let origin = if whole { len } else { 0 };
    let mut canvas = prompt.to_vec();
    let rounded = origin + (limit - origin).next_multiple_of(block as usize);
    let output_end = if suffix.is_empty() { rounded } else { limit };
    canvas.resize(output_end, MASK);
    canvas.extend(suffix);
    let (mut passes, mut firsts) = (0, 0);
    let mut masked: Vec<bool> = (0..canvas.len()).map(|i| (len..output_end).contains(&i)).collect();
    let first_block = if whole { len } else { len - len % block as usize };
    for start in (first_block..output_end).step_by(block as usize) {
        let end = (start + block as usize).min(output_end);
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

/// Masks between two texts: both are read in every pass, and the gap is exactly as long as was asked.
#[test]
fn gaps_are_filled_by_what_stands_on_both_sides() {
    let suffix: Vec<u32> = request(5, 13).prompt;
    for shift in [false, true] {
        let model = model(Reach::Bidirectional, shift);
        let mut differ = 0;
        for (id, max_tokens, block) in [(0, MAX_TOKENS, BLOCK), (1, 19, BLOCK), (2, 5, BLOCK), (3, 19, 19)] {
            let mut between = request(0, 17 + id);
            between.settings = Settings::new(max_tokens, block, POLICY);
            (between.suffix, between.raw) = (suffix.clone(), true);
            let (answers, reports) = run(&mut Engine::new(Arc::clone(&model), limits(64)), &[between.clone()]);
            let (tokens, passes, _) = plain_between(&model, &between.prompt, max_tokens, block, &suffix);
            assert_eq!(answers[0], (tokens.clone(), passes), "shift {shift}, {max_tokens} tokens in blocks of {block}");
            let rows = 17 + id + max_tokens + suffix.len() as u32;
            assert!(reports.iter().all(|report| report.open_rows == rows), "{reports:?}");
            differ += u32::from(tokens != plain(&model, &between.prompt, max_tokens, block).0);
            // Going on elsewhere changes nothing (I1).
            between.committed = tokens[..tokens.len() / 2].to_vec();
            let (resumed, _) = run(&mut Engine::new(Arc::clone(&model), limits(64)), &[between.clone()]);
            let from = tokens.len() / 2 / block as usize * block as usize;
            assert_eq!(resumed[0].0, tokens[from..]);
            // An earlier pass that stands for the rest has all of it in it: here the whole gap falls in its first pass.
            between.committed.clear();
            (between.settings.manner.cache, between.settings.policy) = (Cache::Prefix, AT_ONCE);
            if max_tokens <= block && !shift {
                let (cached, _) = run(&mut Engine::new(Arc::clone(&model), limits(64)), &[between.clone()]);
                between.settings.manner.cache = Cache::None;
                let (anew, _) = run(&mut Engine::new(Arc::clone(&model), limits(64)), &[between]);
                assert_eq!(cached, anew);
            }
        }
        assert!(differ >= 2, "what stands behind a gap matters");
    }
}

/// Reused rows of what stands behind a gap, and little room: being sent back changes no token.
#[test]
fn gaps_with_reused_keys_do_not_depend_on_being_sent_back() {
    for (shift, cache) in [(false, Cache::Prefix), (false, Cache::Dual), (true, Cache::Prefix), (true, Cache::Dual)] {
        let model = model(Reach::Bidirectional, shift);
        let gap = |(&len, id): (&u32, u64)| {
            let mut request = request(id, len);
            request.suffix = (0..len % 7).map(|i| 50 + i).collect();
            request.settings.manner.cache = cache;
            request
        };
        let requests: Vec<Request> = [16, 17, 31, 3, 40].iter().zip(0..).map(gap).collect();
        let (together, _) = run(&mut Engine::new(Arc::clone(&model), limits(64)), &requests);
        let (tight, _) = run(&mut Engine::new(Arc::clone(&model), limits(5)), &requests);
        assert_eq!(together, tight, "shift {shift}, {cache:?}");
    }
}

#[test]
fn what_a_layout_cannot_do_is_refused() {
    let mut behind = request(0, 8);
    behind.suffix = vec![5];
    let refusal = Engine::new(model(Reach::Block, false), limits(64)).submit(behind.clone()).unwrap_err().to_string();
    assert!(refusal.contains("suffix: drawn reads nothing behind"), "{refusal}");
    // A text may begin with the gap, unless its first position is scored by one before it.
    behind.prompt.clear();
    assert!(Engine::new(model(Reach::Bidirectional, false), limits(64)).submit(behind.clone()).is_ok());
    let refusal = Engine::new(model(Reach::Bidirectional, true), limits(64)).submit(behind.clone()).unwrap_err();
    assert!(refusal.to_string().contains("prompt: is empty"), "{refusal}");
    behind.suffix = (0..240).collect();
    let refusal = Engine::new(model(Reach::Bidirectional, false), limits(64)).submit(behind).unwrap_err().to_string();
    assert!(refusal.contains("max_tokens: prompt and suffix (240 tokens) and max_tokens (24)"), "{refusal}");
    let mut edits = request(0, 8);
    edits.settings.policy = Policy::JointEdit { tau: 0.9, tau_edit: 0.9, max_post_steps: 1, at_least: 1 };
    let refusal = Engine::new(model(Reach::Block, true), limits(64)).submit(edits).unwrap_err().to_string();
    assert!(refusal.contains("joint_edit"), "{refusal}");
    for (reach, most) in
        [(Reach::Bidirectional, u32::MAX), (Reach::Bidirectional, u32::MAX - 8), (Reach::Block, u32::MAX)]
    {
        let mut endless = request(0, 8);
        endless.settings.max_tokens = most;
        let refusal = Engine::new(model(reach, false), limits(64)).submit(endless).unwrap_err().to_string();
        assert!(refusal.contains("exceed the context of 256"), "{refusal}");
    }
    let mut empty = request(0, 8);
    empty.settings.block_size = 0;
    let refusal = Engine::new(model(Reach::Bidirectional, false), limits(64)).submit(empty).unwrap_err().to_string();
    assert!(refusal.contains("block_size"), "{refusal}");
    let narrow = Limits { rows_max: 64, ..limits(64) };
    let refusal = Engine::new(model(Reach::Bidirectional, false), narrow).submit(request(0, 40)).unwrap_err();
    assert!(refusal.to_string().contains("at most 48 fit a step"), "{refusal}");
}
