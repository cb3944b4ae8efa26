//! A cluster of real processes: whatever is killed, no stream is lost and no token differs.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "each test prints what it measured")]

#[cfg(feature = "etcd")]
mod chaos;
mod cuts;
mod pool;
mod processes;
mod python;
mod tls;

use processes::{Cluster, LIMIT, Process, folder};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use unmask::resume::Resuming;
use unmask::tls::ClientTlsArgs;
use unmask_proto::v1::generate_request::Input;
use unmask_proto::v1::generate_response::Event;
use unmask_proto::v1::{Decoding, GenerateRequest};

const PROMPTS: [&str; 3] = ["def f(x):", "for i in", "class A:"];
/// Of a stream: the model has drawn weights and ends by itself as good as never.
const TOKENS: u32 = 800;
/// Streams at a time.
const STREAMS: usize = 8;

fn request(index: usize) -> GenerateRequest {
    // Warm, so that the tokens depend on the seed in every step.
    let decoding =
        Decoding { max_tokens: Some(TOKENS), seed: Some(index as u64), temperature: Some(0.9), ..Decoding::default() };
    let input = Some(Input::Text(PROMPTS[index % PROMPTS.len()].into()));
    GenerateRequest { input, decoding: Some(decoding), ..GenerateRequest::default() }
}

/// What a client saw.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    tokens: Vec<u32>,
    text: String,
}

/// One stream, and how it went on.
struct Stream {
    seen: Seen,
    /// The group or the gateway changed on the way.
    continued: bool,
    /// Longest wait for an event.
    gap: Duration,
}

async fn stream(endpoints: &[String], index: usize) -> anyhow::Result<Stream> {
    stream_from(endpoints, index, &AtomicUsize::new(0)).await
}

/// As [`stream`]; `begun` counts the streams that have begun.
async fn stream_from(endpoints: &[String], index: usize, begun: &AtomicUsize) -> anyhow::Result<Stream> {
    let mut events = Resuming::through(endpoints, &ClientTlsArgs::default(), request(index))?;
    let mut stream =
        Stream { seen: Seen { tokens: Vec::new(), text: String::new() }, continued: false, gap: Duration::ZERO };
    let (mut last, mut next) = (Instant::now(), None);
    loop {
        let event = tokio::time::timeout(LIMIT, events.next()).await??;
        stream.gap = stream.gap.max(last.elapsed());
        last = Instant::now();
        match event {
            Event::Started(started) => {
                next = Some(started.prompt_tokens);
                begun.fetch_add(1, Ordering::Relaxed);
            }
            Event::Commit(commit) => {
                // I5: in order, once, without a gap.
                assert_eq!(Some(commit.first_position), next);
                next = Some(commit.first_position + commit.token_ids.len() as u32);
                stream.seen.tokens.extend(commit.token_ids);
                stream.seen.text += &commit.text;
            }
            Event::Finish(finish) => {
                stream.seen.text += &finish.text;
                stream.continued = finish.blocks_recomputed > 0 || events.resumed > 0;
                return Ok(stream);
            }
            Event::Draft(_) => {}
        }
    }
}

/// What nobody disturbed, for the first `count` requests.
async fn undisturbed(endpoints: &[String], count: usize) -> Vec<Seen> {
    let mut all = Vec::new();
    for index in 0..count {
        all.push(stream(endpoints, index).await.unwrap().seen);
    }
    all
}

/// What a load went through.
#[derive(Default)]
struct Outcome {
    streams: usize,
    continued: usize,
    /// Of the streams that went on elsewhere.
    gaps: Vec<Duration>,
}

/// Keeps [`STREAMS`] streams open until `stop` is set, and holds each to what `expected` has for it.
async fn load(endpoints: Vec<String>, expected: Vec<Seen>, stop: Arc<AtomicBool>, ended: Arc<AtomicUsize>) -> Outcome {
    let mut open = JoinSet::new();
    let mut outcome = Outcome::default();
    for next in 0.. {
        while open.len() >= STREAMS || (stop.load(Ordering::Relaxed) && !open.is_empty()) {
            let (index, ended_well): (usize, anyhow::Result<Stream>) = open.join_next().await.unwrap().unwrap();
            let stream = ended_well.unwrap_or_else(|error| panic!("stream {index} is lost: {error:#}"));
            assert!(stream.seen == expected[index], "stream {index} differs: {:?}", stream.seen.text);
            outcome.streams += 1;
            ended.fetch_add(1, Ordering::Relaxed);
            if stream.continued {
                outcome.continued += 1;
                outcome.gaps.push(stream.gap);
            }
        }
        if stop.load(Ordering::Relaxed) {
            return outcome;
        }
        let (index, endpoints) = (next % expected.len(), endpoints.clone());
        open.spawn(async move { (index, stream(&endpoints, index).await) });
    }
    outcome
}

/// A load in the background.
struct Load {
    task: tokio::task::JoinHandle<Outcome>,
    stop: Arc<AtomicBool>,
    ended: Arc<AtomicUsize>,
}

impl Load {
    async fn start(cluster: &Cluster) -> Load {
        let endpoints = cluster.endpoints();
        let expected = undisturbed(&endpoints, 8).await;
        assert!(
            expected.iter().map(|seen| seen.tokens.len()).sum::<usize>() > 300,
            "the streams have several blocks each"
        );
        let (stop, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let task = tokio::spawn(load(endpoints, expected, Arc::clone(&stop), Arc::clone(&ended)));
        Load { task, stop, ended }
    }

    /// Waits until `more` streams have ended from here on: something works.
    async fn progress(&self, more: usize) {
        let goal = self.ended.load(Ordering::Relaxed) + more;
        let going = async {
            while self.ended.load(Ordering::Relaxed) < goal && !self.task.is_finished() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, going).await.expect("streams end");
    }

    async fn end(self, what: &str) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        let mut outcome = tokio::time::timeout(LIMIT, self.task).await.unwrap().unwrap();
        outcome.gaps.sort();
        let at = |share: usize| outcome.gaps.get(outcome.gaps.len() * share / 100).copied().unwrap_or_default();
        let worst = outcome.gaps.last().copied().unwrap_or_default();
        println!(
            "{what}: {} streams, 0 lost, 0 differ; {} went on elsewhere, longest wait p50 {:?}, p99 {:?}, worst {worst:?}",
            outcome.streams,
            outcome.continued,
            at(50),
            at(99)
        );
        outcome
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_workers_lose_no_stream_and_change_no_token() {
    kill_workers(Cluster::start(1, 2).await, 4).await;
}

/// Commits of any length, and drafts that are lost with a worker.
#[tokio::test(flavor = "multi_thread")]
async fn killed_workers_change_no_token_that_was_drafted() {
    let mut cluster = Cluster::start(1, 0).await;
    cluster.model = folder("models/python-tasks-3m");
    cluster.workers = (0..2).map(|_| cluster.worker("127.0.0.1:0")).collect();
    cluster.serving(0, 2).await;
    kill_workers(cluster, 4).await;
}

#[ignore = "takes over a minute: cargo test -- --ignored"]
#[tokio::test(flavor = "multi_thread")]
async fn full_fifty_killed_workers() {
    let outcome = kill_workers(Cluster::start(1, 2).await, 50).await;
    assert!(outcome.streams >= 500);
}

/// A kill every second, until so many streams have ended.
#[ignore = "takes over a minute: cargo test -- --ignored"]
#[tokio::test(flavor = "multi_thread")]
async fn full_a_thousand_streams_with_a_kill_every_second() {
    const STREAMS_MIN: usize = 1000;
    let mut cluster = Cluster::start(2, 3).await;
    let load = Load::start(&cluster).await;
    let (mut every, mut kills) = (tokio::time::interval(Duration::from_secs(1)), 0);
    while load.ended.load(Ordering::Relaxed) < STREAMS_MIN {
        every.tick().await;
        assert!(!load.task.is_finished(), "after kill {kills}");
        kills += 1;
        // Every fifth time a gateway, else a worker; the one that has served longest.
        if kills % 5 == 0 {
            let address = cluster.gateways.remove(0).kill();
            cluster.gateways.push(cluster.gateway(&address));
        } else {
            let address = cluster.workers.remove(0).kill();
            cluster.workers.push(cluster.worker(&address));
        }
    }
    load.end(&format!("{kills} kills, one a second")).await;
}

async fn kill_workers(mut cluster: Cluster, kills: usize) -> Outcome {
    let load = Load::start(&cluster).await;
    for kill in 0..kills {
        load.progress(STREAMS).await;
        let worker = cluster.workers.remove(0);
        let epoch = cluster.epoch(&worker.address).await;
        let address = worker.kill();
        load.progress(STREAMS).await;
        cluster.restart_worker(&address, epoch).await;
        assert!(!load.task.is_finished(), "after kill {kill}");
    }
    let outcome = load.end(&format!("{kills} workers killed")).await;
    assert!(outcome.continued > 0, "somebody was on a worker that was killed");
    outcome
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_worker_holds_its_streams_for_seconds_at_most() {
    let cluster = Cluster::start(1, 2).await;
    let load = Load::start(&cluster).await;
    load.progress(STREAMS).await;
    cluster.workers[0].signal("-STOP");
    // Those on the hung worker are found by a ping that is not answered; new ones go elsewhere meanwhile.
    load.progress(4 * STREAMS).await;
    cluster.workers[0].signal("-CONT");
    cluster.serving(0, 2).await;
    load.progress(STREAMS).await;
    let outcome = load.end("a worker hung").await;
    assert!(outcome.gaps.iter().all(|gap| *gap < Duration::from_secs(8)), "{:?}", outcome.gaps);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_gateway_is_left_for_another() {
    let mut cluster = Cluster::start(2, 1).await;
    let load = Load::start(&cluster).await;
    for _ in 0..2 {
        load.progress(STREAMS).await;
        let address = cluster.gateways.remove(0).kill();
        load.progress(STREAMS).await;
        cluster.gateways.insert(0, cluster.gateway(&address));
        cluster.serving(0, 1).await;
        cluster.gateways.swap(0, 1);
    }
    load.end("2 gateways killed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_hangs_is_left_for_another() {
    let cluster = Cluster::start(2, 1).await;
    let load = Load::start(&cluster).await;
    load.progress(STREAMS).await;
    // Every stream begins at the first one, which neither answers nor closes anything.
    cluster.gateways[0].signal("-STOP");
    load.progress(2 * STREAMS).await;
    cluster.gateways[0].signal("-CONT");
    load.progress(STREAMS).await;
    let outcome = load.end("a gateway hung").await;
    assert!(outcome.gaps.iter().all(|gap| *gap < Duration::from_secs(10)), "{:?}", outcome.gaps);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_controller_the_last_known_routes_serve() {
    let mut cluster = Cluster::start(1, 2).await;
    let load = Load::start(&cluster).await;
    let address = cluster.controllers.remove(0).kill();
    load.progress(2 * STREAMS).await;
    // Nobody tells the gateway that a worker is gone: it finds out by itself.
    let worker = cluster.workers.remove(0).kill();
    load.progress(2 * STREAMS).await;
    cluster.start_controller(&address);
    cluster.workers.push(cluster.worker(&worker));
    cluster.serving(0, 2).await;
    load.progress(STREAMS).await;
    load.end("the controller and a worker killed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_wait_for_a_group_when_all_are_gone() {
    let mut cluster = Cluster::start(1, 2).await;
    let endpoints = cluster.endpoints();
    let expected = undisturbed(&endpoints, 8).await;
    let mut asked = JoinSet::new();
    let begun = Arc::new(AtomicUsize::new(0));
    for number in 0..64 {
        let (endpoints, begun, index) = (endpoints.clone(), Arc::clone(&begun), number % expected.len());
        asked.spawn(async move { (index, stream_from(&endpoints, index, &begun).await) });
    }
    let some_began = async {
        while begun.load(Ordering::Relaxed) < 16 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, some_began).await.unwrap();
    // Stopped first, so that the last to begin cannot end before both are gone.
    cluster.workers.iter().for_each(|worker| worker.signal("-STOP"));
    let addresses: Vec<String> = cluster.workers.drain(..).map(Process::kill).collect();
    cluster.workers.push(cluster.worker(&addresses[0]));
    let (mut ended, mut continued) = (0, 0);
    while let Some(stream) = asked.join_next().await {
        let (index, Ok(stream)) = stream.unwrap() else { continue };
        assert!(stream.seen == expected[index], "stream {index} differs");
        ended += 1;
        continued += usize::from(stream.continued);
    }
    println!("all workers killed: {ended} streams, 0 differ; {continued} waited");
    // What had not begun may be refused; what had is never lost.
    assert_eq!(ended, begun.load(Ordering::Relaxed));
}

/// `unmask` with a cluster's controller; what it printed.
fn unmask(cluster: &Cluster, arguments: &[&str]) -> String {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_unmask"))
        .args(arguments)
        .args(["--controller", &cluster.controllers[0].address])
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_leaves_and_no_stream_notices() {
    let mut cluster = Cluster::start(1, 2).await;
    let load = Load::start(&cluster).await;
    load.progress(STREAMS).await;
    let first = cluster.workers[0].address.clone();
    assert!(unmask(&cluster, &["status"]).contains(&first));
    assert!(unmask(&cluster, &["drain", &first, "--json"]).contains("\"draining\": true"));
    cluster.serving(0, 1).await;
    load.progress(STREAMS).await;
    cluster.workers.remove(0).ended();
    let status: serde_json::Value = serde_json::from_str(&unmask(&cluster, &["status", "--json"])).unwrap();
    let left: Vec<_> = status["members"].as_array().unwrap().iter().map(|member| &member["endpoint"]).collect();
    assert_eq!(left, [&cluster.workers[0].address]);
    let outcome = load.end("a worker drained").await;
    assert_eq!(outcome.continued, 0, "a drained worker finishes what it holds");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_holds_for_requests_that_name_no_settings() {
    let cluster = Cluster::start(1, 1).await;
    let model = "sdar";
    let settings = async |asked: GenerateRequest| {
        let mut events = Resuming::through(&cluster.endpoints(), &ClientTlsArgs::default(), asked).unwrap();
        let Event::Started(started) = events.next().await.unwrap() else { panic!("Started comes first") };
        started.settings.unwrap()
    };
    let bare = || GenerateRequest { input: request(0).input, ..GenerateRequest::default() };
    let before = settings(bare()).await;
    assert_eq!((before.policy_revision, before.origins["block_size"].as_str()), (0, "model"));
    assert!(unmask(&cluster, &["policy", "get"]).contains("every model has its own settings"));
    let fixed = ["policy", "set", "--model", model, "--threshold", "0.5", "--block-size"];
    unmask(&cluster, &[&fixed[..], &["4"]].concat());
    // The table reaches the gateway on its own time.
    let applied = async {
        loop {
            let now = settings(bare()).await;
            if now.policy_revision > 0 {
                return now;
            }
        }
    };
    let now = tokio::time::timeout(LIMIT, applied).await.unwrap();
    assert_eq!((now.block_size, now.origins["policy"].as_str()), (4, "policy"));
    let own = settings(request(0)).await;
    assert_eq!(own.policy_revision, now.policy_revision, "a request that names only a temperature follows it too");
    let automatic = ["policy", "set", "--model", model, "--automatic", "--latency-ms", "20", "--json"];
    assert!(unmask(&cluster, &automatic).contains("\"revision\""));
    let said = unmask(&cluster, &["policy", "get"]);
    assert!(said.contains("automatic, a block within 20 ms"), "{said}");
}

/// Both controllers' turn: whoever leads is killed or paused, and no stream notices.
#[cfg(feature = "etcd")]
#[tokio::test(flavor = "multi_thread")]
async fn another_controller_takes_over_from_one_that_is_killed_or_paused() {
    let (_etcd, mut cluster) = Cluster::replicated(1, 2).await;
    let load = Load::start(&cluster).await;
    // The first to start leads.
    let address = cluster.controllers.remove(0).kill();
    load.progress(2 * STREAMS).await;
    cluster.start_controller(&address);
    // A worker that dies now is taken out of the routes and put back by the second, which must lead for that.
    let worker = cluster.workers.remove(0).kill();
    cluster.serving(0, 1).await;
    cluster.workers.push(cluster.worker(&worker));
    cluster.serving(0, 2).await;
    // Paused past its lease: the first takes over again, and the second must not act when it wakes up.
    cluster.controllers[0].signal("-STOP");
    let worker = cluster.workers.remove(0).kill();
    cluster.serving(0, 1).await;
    cluster.controllers[0].signal("-CONT");
    cluster.workers.push(cluster.worker(&worker));
    cluster.serving(0, 2).await;
    load.progress(STREAMS).await;
    load.end("a leading controller killed, another paused").await;
}

#[cfg(feature = "etcd")]
#[tokio::test(flavor = "multi_thread")]
async fn without_etcd_what_serves_goes_on_serving() {
    // Longer than the leader's lease and the members' time-to-live.
    without_etcd(Duration::from_secs(12)).await;
}

#[cfg(feature = "etcd")]
#[ignore = "takes over a minute: cargo test -- --ignored"]
#[tokio::test(flavor = "multi_thread")]
async fn full_without_etcd_for_a_minute() {
    without_etcd(Duration::from_secs(60)).await;
}

#[cfg(feature = "etcd")]
#[tokio::test(flavor = "multi_thread")]
async fn controllers_that_start_without_etcd_wait_for_it() {
    let (mut etcd, mut cluster) = Cluster::replicated(1, 2).await;
    let load = Load::start(&cluster).await;
    etcd.kill();
    let addresses: Vec<String> = cluster.controllers.drain(..).map(Process::kill).collect();
    addresses.iter().for_each(|address| cluster.start_controller(address));
    // Longer than a try to reach it.
    tokio::time::sleep(Duration::from_secs(5)).await;
    load.progress(STREAMS).await;
    etcd.restart();
    // One leads, or nobody would take these out of the routes and in again.
    let worker = cluster.workers.remove(0).kill();
    cluster.serving(0, 1).await;
    cluster.workers.push(cluster.worker(&worker));
    cluster.serving(0, 2).await;
    load.progress(STREAMS).await;
    load.end("controllers started without etcd").await;
}

#[cfg(feature = "etcd")]
async fn without_etcd(outage: Duration) {
    let (mut etcd, mut cluster) = Cluster::replicated(1, 2).await;
    let load = Load::start(&cluster).await;
    etcd.kill();
    tokio::time::sleep(outage).await;
    load.progress(STREAMS).await;
    let worker = cluster.workers.remove(0).kill();
    load.progress(STREAMS).await;
    etcd.restart();
    cluster.workers.push(cluster.worker(&worker));
    cluster.serving(0, 2).await;
    load.progress(STREAMS).await;
    load.end(&format!("etcd away for {} s, a worker killed meanwhile", outage.as_secs())).await;
}
