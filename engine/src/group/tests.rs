#![allow(clippy::unwrap_used)]

use super::*;
use crate::model::{DecodeDefaults, Family, LoadOptions, ModelConfig, Reach, Share};
use crate::policy::{Comparison, Policy};
use crate::profile::{Grid, measure};
use crate::{Engine, Event, Limits, Request, RequestId, Sampling, Settings};
use std::net::TcpListener;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;
use unmask_kernels::comm::{TcpRank, threads};
use unmask_kernels::{HeadShape, Isa, WeightType};

const LIMITS: Limits = Limits { rows_max: 512, active_max: 8, queue_max: 8, pages: 64, cached_pages: 64 };
const POLICY: Policy = Policy::Threshold { tau: 0.02, comparison: Comparison::Strict, quota_steps: None };
const STEPS_MAX: usize = 2000;

/// Heads that four ranks share two ways, biases, norms, and more ids than some ranks get.
fn config(tied: bool) -> ModelConfig {
    ModelConfig {
        name: "drawn".into(),
        architecture: "drawn".into(),
        family: Family::own(),
        layers: 2,
        hidden: 48,
        ffn: 72,
        moe: None,
        heads: HeadShape { heads: 8, kv_heads: 2, head_dim: 16 },
        vocab_rows: 1200,
        tokenizer_size: 1190,
        rms_eps: 1e-6,
        rope_theta: 1e4,
        rotary_dim: 16,
        qk_norm: true,
        qkv_bias: true,
        tied,
        context_length: 256,
        block_sizes: vec![4, 8, 16],
        open_reach: Reach::Block,
        kept_reach: Reach::Causal,
        shift: false,
        mask_id: Some(1),
        eos_ids: vec![0],
        infill: None,
        heal: false,
        edit: false,
        decode: DecodeDefaults { block_size: 8, policy: POLICY, max_tokens: 24, temperature: 0.0 },
        entries: Vec::new(),
    }
}

fn model(dtype: WeightType, isa: Isa, tied: bool, share: Share) -> Arc<Model> {
    let options = LoadOptions { dtype, isa: Some(isa), threads: 1, share, ..LoadOptions::default() };
    Arc::new(Model::drawn(config(tied), &options, 5).unwrap())
}

fn pace() -> Pace {
    let long = Duration::from_secs(60);
    Pace { now: Instant::now, step: StepLimit { base: long, per_row: Duration::ZERO }, idle: long }
}

fn request(id: u64) -> Request {
    // One draws from all, one from the best few (its logits are gathered), one takes the best.
    let (temperature, top_k) = [(0.7, 0), (0.9, 5), (0.0, 0)][id as usize % 3];
    Request {
        raw: true,
        ..Request::new(
            RequestId(id),
            (0..11 + 5 * id as u32).map(|i| 2 + i * 13 % 1100).collect(),
            Settings {
                sampling: Sampling { temperature, top_k, top_p: 1.0, seed: id },
                ..Settings::new(24, [8, 16, 4][id as usize % 3], if id == 3 { Policy::Autoregressive } else { POLICY })
            },
        )
    }
}

/// All events of four requests, confidences of every fill among them.
fn run(engine: &mut Engine) -> Vec<Event> {
    (0..4).for_each(|id| engine.submit(request(id)).unwrap());
    let mut events = Vec::new();
    for _ in 0..STEPS_MAX {
        if !engine.has_work() {
            break;
        }
        engine.step(&mut events);
    }
    assert_eq!(engine.failure(), None);
    assert_eq!(events.iter().filter(|event| matches!(event, Event::Finished { .. })).count(), 4);
    events
}

fn tcp(ranks: usize) -> Vec<Comm> {
    let listeners: Vec<TcpListener> = (0..ranks).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let limit = Instant::now() + Duration::from_secs(60);
    thread::scope(|scope| {
        let form = |(rank, listener)| {
            let addresses = &addresses;
            scope.spawn(move || TcpRank::form(rank, 1, listener, addresses, limit, &AtomicBool::new(false)).unwrap())
        };
        let forming: Vec<_> = listeners.iter().enumerate().map(form).collect();
        forming.into_iter().map(|rank| Comm::Tcp(rank.join().unwrap())).collect()
    })
}

fn led(group: Vec<Comm>, dtype: WeightType, isa: Isa, tied: bool) -> Vec<Event> {
    let ranks = group.len();
    thread::scope(|scope| {
        let mut group = group.into_iter();
        let leader = group.next().unwrap();
        let followers: Vec<_> = group
            .map(|comm| {
                let share = Share { rank: comm.rank(), ranks };
                scope.spawn(move || follow(model(dtype, isa, tied, share), comm, pace()))
            })
            .collect();
        let share = Share { rank: 0, ranks };
        let mut engine = Engine::leading(model(dtype, isa, tied, share), LIMITS, leader, pace()).unwrap();
        engine.probe(3);
        // What it leaves in the caches belongs to nobody.
        let grid = Grid { rows: vec![1, 20], contexts: vec![0, 40], repeats: 1, limit: Duration::MAX };
        let start = Instant::now();
        let profile = measure(&mut engine, &grid, &mut || start.elapsed(), &mut |_, _| {}).unwrap();
        assert_eq!((profile.ranks, profile.points().len()), (ranks, 4));
        let events = run(&mut engine);
        drop(engine);
        followers.into_iter().for_each(|follower| follower.join().unwrap().unwrap());
        events
    })
}

/// I11: degrees 1, 2 and 4 give the same tokens and the same confidences, bit for bit, for every type and set.
#[test]
fn i11_every_degree_gives_the_same_bits() {
    for isa in Isa::available() {
        for (dtype, tied) in [(WeightType::F32, true), (WeightType::Bf16, false), (WeightType::Int8, true)] {
            let alone = run(&mut Engine::new(model(dtype, isa, tied, Share::WHOLE), LIMITS));
            for ranks in [2, 4] {
                let group = threads(ranks).into_iter().map(Comm::Threads).collect();
                let same = led(group, dtype, isa, tied) == alone;
                assert!(same, "{} {} {ranks} threads", isa.name(), dtype.name());
            }
        }
    }
    let (isa, dtype) = (Isa::detect().unwrap(), WeightType::Bf16);
    let alone = run(&mut Engine::new(model(dtype, isa, true, Share::WHOLE), LIMITS));
    for ranks in [2, 4] {
        assert!(led(tcp(ranks), dtype, isa, true) == alone, "{ranks} connected ranks");
    }
}

#[test]
fn a_lost_rank_ends_the_group_and_leaves_what_was_committed() {
    let (isa, dtype) = (Isa::detect().unwrap(), WeightType::F32);
    for mut group in [threads(2).into_iter().map(Comm::Threads).collect::<Vec<_>>(), tcp(2)] {
        let (other, leader) = (group.pop().unwrap(), group.pop().unwrap());
        let abort = other.abort_handle();
        let share = |rank| Share { rank, ranks: 2 };
        let follower = thread::spawn(move || follow(model(dtype, isa, true, share(1)), other, pace()));
        let mut engine = Engine::leading(model(dtype, isa, true, share(0)), LIMITS, leader, pace()).unwrap();
        engine.submit(request(0)).unwrap();
        let mut events = Vec::new();
        while !events.iter().any(|event| matches!(event, Event::Commit { .. })) {
            engine.step(&mut events);
        }
        abort.abort();
        events.clear();
        for _ in 0..STEPS_MAX {
            engine.step(&mut events);
        }
        assert!(engine.failure().is_some() && !engine.has_work());
        assert!(!events.iter().any(|event| matches!(event, Event::Finished { .. })));
        assert!(follower.join().unwrap().is_err());
    }
}

#[test]
fn a_rank_of_another_build_is_refused() {
    let isa = Isa::Portable;
    let mut group = threads(2).into_iter().map(Comm::Threads);
    let (leader, other) = (group.next().unwrap(), group.next().unwrap());
    let options =
        |rank| LoadOptions { isa: Some(isa), threads: 1, share: Share { rank, ranks: 2 }, ..LoadOptions::default() };
    let stranger = Arc::new(Model::drawn(config(true), &options(1), 6).unwrap());
    let follower = thread::spawn(move || follow(stranger, other, pace()));
    let model = Arc::new(Model::drawn(config(true), &options(0), 5).unwrap());
    let mut engine = Engine::leading(model, LIMITS, leader, pace()).unwrap();
    assert!(matches!(follower.join().unwrap(), Err(FollowError::Numerics { .. })));
    engine.probe(3);
    assert!(engine.failure().is_some());
}

#[test]
fn what_cannot_be_shared_is_refused_with_every_reason() {
    let mut odd = config(true);
    (odd.ffn, odd.heads) = (36, HeadShape { heads: 6, kv_heads: 3, head_dim: 4 });
    let options = LoadOptions { share: Share { rank: 1, ranks: 4 }, ..LoadOptions::default() };
    let error = Model::drawn(odd, &options, 1).err().unwrap().to_string();
    assert!(error.contains("6 heads over 3") && error.contains("intermediate_size 36"), "{error}");
}
