//! Chaos: faults drawn from a seed, several at a time, on a cluster whose services each have a host of their own, under
//! load. What clients and `status` see goes into a history, which is held to what must be true of it.
//!
//! `CHAOS_SEED=7` repeats the faults of seed 7, `CHAOS_SECONDS=60` makes the stretch longer or shorter.

mod faults;
mod history;
mod hosts;
mod network;

use crate::{STREAMS, Seen, request, undisturbed};
use faults::{Fault, Round, draw};
use history::{History, Standing, What, check};
use hosts::{Hosts, status};
use network::isolated;
use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use unmask::resume::Resuming;
use unmask::tls::ClientTlsArgs;
use unmask_proto::v1::generate_response::Event;

/// Different requests; streams take them in turn.
const REQUESTS: usize = 8;
/// A stream that has not ended by then hangs.
const STREAM_LIMIT: Duration = Duration::from_secs(60);
/// Longest that a stream may see nothing: a gateway and two groups that are silent, one after the other, and being late.
const WAIT_LIMIT: Duration = Duration::from_secs(20);
/// After the last fault all must be as before within this time.
const WELL_LIMIT: Duration = Duration::from_secs(45);
/// Between looks at what `status` says, and at what has ended by itself.
const LOOK: Duration = Duration::from_millis(100);

#[test]
fn no_stream_is_lost_and_no_token_differs_under_chaos() {
    isolated("chaos::no_stream_is_lost_and_no_token_differs_under_chaos", || chaos(Duration::from_secs(20)));
}

#[ignore = "takes minutes: cargo test -- --ignored"]
#[test]
fn full_three_minutes_of_chaos() {
    isolated("chaos::full_three_minutes_of_chaos", || chaos(Duration::from_secs(180)));
}

fn chaos(stretch: Duration) {
    let from_environment = |name| std::env::var(name).ok().map(|value: String| value.parse::<u64>().expect(name));
    let seed = from_environment("CHAOS_SEED").unwrap_or_else(|| u64::from(rand::random::<u16>()));
    let stretch = from_environment("CHAOS_SECONDS").map_or(stretch, Duration::from_secs);
    println!("chaos: CHAOS_SEED={seed}");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(run(seed, stretch));
}

/// The history as it grows.
#[derive(Clone)]
struct Recorder {
    begun: Instant,
    history: Arc<Mutex<History>>,
}

impl Recorder {
    fn with(&self, add: impl FnOnce(&mut History, Duration)) {
        add(&mut self.history.lock().unwrap_or_else(PoisonError::into_inner), self.begun.elapsed());
    }

    fn stream(&self, stream: usize, what: What) {
        self.with(|history, at| history.streams.push((at, stream, what)));
    }

    /// Takes one stream to its end; whether it went on elsewhere, and its longest wait.
    async fn client(&self, stream: usize) -> (bool, Duration) {
        let number = stream % REQUESTS;
        self.stream(stream, What::Asked { request: number });
        let mut endpoints = Hosts::endpoints();
        // Through either gateway at first.
        endpoints.rotate_left(stream % 2);
        let events = Resuming::through(&endpoints, &ClientTlsArgs::default(), request(number)).unwrap();
        let mut waits = (false, Duration::ZERO);
        // What is cut off here shows in the history as a stream without an end.
        let _ = tokio::time::timeout(STREAM_LIMIT, self.events(stream, events, &mut waits)).await;
        waits
    }

    async fn events(&self, stream: usize, mut events: Resuming, (continued, longest): &mut (bool, Duration)) {
        loop {
            let asked = Instant::now();
            let event = events.next().await;
            *longest = asked.elapsed().max(*longest);
            let (what, over) = match event {
                Ok(Event::Started(started)) => {
                    let block_size = started.settings.map_or(0, |settings| settings.block_size);
                    (What::Begun { prompt_tokens: started.prompt_tokens, block_size }, false)
                }
                Ok(Event::Commit(commit)) => {
                    let (first_position, origin) = (commit.first_position, (commit.group_id, commit.epoch));
                    (What::Committed { first_position, tokens: commit.token_ids, text: commit.text, origin }, false)
                }
                Ok(Event::Finish(finish)) => {
                    *continued = finish.blocks_recomputed > 0 || events.resumed > 0;
                    (What::Finished { text: finish.text }, true)
                }
                Ok(Event::Draft(_)) => continue,
                Err(error) => (What::Failed { status: format!("{error:#}") }, true),
            };
            self.stream(stream, what);
            if over {
                return;
            }
        }
    }

    /// Writes down what `status` says, until `stop`.
    async fn standings(self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            if let Some(status) = status().await {
                let mut epochs: BTreeMap<String, u64> = BTreeMap::new();
                let members = status.members.iter().filter(|member| member.capacity.is_none());
                epochs.extend(members.map(|member| (member.group_id.clone(), member.epoch)));
                let groups = status.models.iter().flat_map(|model| &model.groups).filter(|group| group.epoch > 0);
                epochs.extend(groups.map(|group| (group.group_id.clone(), group.epoch)));
                self.with(|history, _| history.standings.push(Standing { term: status.term, epochs }));
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// What the load came to.
#[derive(Default)]
struct Load {
    streams: usize,
    continued: usize,
    waits: Vec<Duration>,
}

/// Keeps [`STREAMS`] streams open until `stop`, and takes those to their end.
async fn load(recorder: Recorder, stop: CancellationToken) -> Load {
    let (mut open, mut load, next) = (JoinSet::new(), Load::default(), AtomicUsize::new(0));
    loop {
        while open.len() < STREAMS && !stop.is_cancelled() {
            let (recorder, stream) = (recorder.clone(), next.fetch_add(1, Ordering::Relaxed));
            open.spawn(async move { recorder.client(stream).await });
        }
        let Some(ended) = open.join_next().await else { return load };
        let (continued, longest) = ended.unwrap();
        load.streams += 1;
        load.continued += usize::from(continued);
        load.waits.push(longest);
    }
}

async fn run(seed: u64, stretch: Duration) {
    let mut hosts = Hosts::start().await;
    let slow = hosts.network.slowness();
    println!("chaos: slow links are {}", if slow.is_empty() { "left out" } else { slow });
    let expected: Vec<Seen> = undisturbed(&Hosts::endpoints(), REQUESTS).await;
    let recorder = Recorder { begun: Instant::now(), history: Arc::default() };
    let stop = CancellationToken::new();
    let loaded = tokio::spawn(load(recorder.clone(), stop.clone()));
    let looked = tokio::spawn(recorder.clone().standings(stop.clone()));
    let (mut rng, mut broken, mut faults, mut recoveries) =
        (ChaCha8Rng::seed_from_u64(seed), Duration::ZERO, 0, Vec::new());
    while broken < stretch {
        let round = draw(&mut rng, !slow.is_empty());
        faults += round.faults.len();
        broken += carry_out(&mut hosts, &round, recorder.begun).await;
        recoveries.push(hosts.well(WELL_LIMIT).await);
        println!("  well again after {:?}", recoveries[recoveries.len() - 1]);
    }
    stop.cancel();
    let mut load = loaded.await.unwrap();
    looked.await.unwrap();
    report(&recorder, &expected, &mut load, &hosts.ended, seed);
    recoveries.sort();
    println!(
        "chaos: {faults} faults in {:.0} s of {} rounds; well again after {:.1?} at the median, {:.1?} at worst",
        broken.as_secs_f64(),
        recoveries.len(),
        recoveries[recoveries.len() / 2],
        recoveries[recoveries.len() - 1]
    );
}

/// Lets everything happen at its time; how long it took.
async fn carry_out(hosts: &mut Hosts, round: &Round, begun: Instant) -> Duration {
    let start = Instant::now();
    println!(
        "chaos: at {:.1} s, all but gateway {} and worker {} may break",
        begun.elapsed().as_secs_f64(),
        round.kept[0],
        round.kept[1]
    );
    let begins = round.faults.iter().map(|timed| (timed.begins, true, timed));
    let ends = round.faults.iter().map(|timed| (timed.ends, false, timed));
    let mut turns: Vec<_> = begins.chain(ends).collect();
    turns.sort_by_key(|(at, ..)| *at);
    for (at, begins, timed) in turns {
        while start.elapsed() < at {
            tokio::time::sleep(LOOK.min(at.saturating_sub(start.elapsed()))).await;
            hosts.tend();
        }
        if begins {
            let lasts = (timed.ends - timed.begins).as_secs_f64();
            println!("  {:.1} s: {} for {lasts:.1} s", at.as_secs_f64(), timed.fault);
        }
        turn(hosts, timed.fault, begins);
    }
    start.elapsed()
}

/// A fault begins, or is undone.
fn turn(hosts: &mut Hosts, fault: Fault, begins: bool) {
    match fault {
        Fault::Kill(host) if begins => hosts.kill(host),
        Fault::Kill(host) => hosts.restart(host),
        Fault::Pause(host) => hosts.signal(host, if begins { "-STOP" } else { "-CONT" }),
        Fault::Down(host) => hosts.network.link(host, !begins),
        Fault::Slow(host) => hosts.network.slow(host, begins),
        Fault::Deaf { from, to } => hosts.network.cut(from, to, begins),
        Fault::Cut(one, other) => {
            hosts.network.cut(one, other, begins);
            hosts.network.cut(other, one, begins);
        }
    }
}

/// Holds the history to what must be true, and says what was measured.
fn report(recorder: &Recorder, expected: &[Seen], load: &mut Load, ended: &[String], seed: u64) {
    let history = recorder.history.lock().unwrap_or_else(PoisonError::into_inner);
    let found = check(&history, expected, STREAM_LIMIT);
    let failed: Vec<String> = (history.streams.iter())
        .filter_map(|(at, stream, what)| match what {
            What::Failed { status } => Some(format!("stream {stream} at {:.1} s: {status}", at.as_secs_f64())),
            _ => None,
        })
        .collect();
    load.waits.sort();
    let at = |share: usize| load.waits[(load.waits.len() * share / 100).min(load.waits.len() - 1)];
    println!(
        "chaos: {} streams, {} lost, {} violations; {} went on elsewhere; longest wait of a stream p50 {:.2?}, p99 {:.2?}, worst {:.2?}; \
         {} looks at status",
        load.streams,
        failed.len(),
        found.len(),
        load.continued,
        at(50),
        at(99),
        at(100),
        history.standings.len()
    );
    let waited = at(100);
    let all: Vec<String> = found.iter().map(ToString::to_string).chain(failed).chain(ended.to_vec()).collect();
    assert!(all.is_empty(), "CHAOS_SEED={seed}:\n{}", all.join("\n"));
    assert!(waited < WAIT_LIMIT, "CHAOS_SEED={seed}: a stream saw nothing for {waited:?}");
    assert!(load.streams >= REQUESTS && !history.standings.is_empty(), "the run has something to show");
}
