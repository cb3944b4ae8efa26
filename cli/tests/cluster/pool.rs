//! Workers of the pool: groups of several ranks are placed, lose ranks, and form anew with a spare.

use super::{Load, STREAMS, stream, stream_from, unmask};
use crate::processes::{Cluster, LIMIT, Process};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use unmask_controller::config::MEMBER_TTL;
use unmask_proto::v1::{GroupState, GroupStatus};

/// Workers of the pool, and one group on some of them.
struct Pooled {
    cluster: Cluster,
    workers: BTreeMap<String, Process>,
}

impl Pooled {
    async fn start(workers: &[&str], group: &str) -> Pooled {
        let cluster = Cluster::start(1, 0).await;
        let workers = workers.iter().map(|name| ((*name).to_owned(), cluster.pooled(name))).collect();
        cluster.apply(group);
        cluster.serving(0, 1).await;
        Pooled { cluster, workers }
    }

    /// A group of two ranks, and a spare.
    async fn pair() -> Pooled {
        Pooled::start(&["a", "b", "c"], "tensor_parallel: 2\nspares: 1\n").await
    }

    async fn group(&self) -> GroupStatus {
        self.cluster.placed().await.groups.remove(0)
    }

    /// The worker of a rank.
    async fn rank(&self, rank: usize) -> String {
        self.group().await.ranks[rank].clone()
    }

    /// Waits until the group serves in an epoch after `epoch`, without `lost`; how long that took.
    async fn serves_without(&self, lost: &str, epoch: u64) -> Duration {
        let begun = Instant::now();
        let again = async {
            loop {
                let group = self.group().await;
                if group.state() == GroupState::Serving && group.epoch > epoch && !group.ranks.iter().any(|w| w == lost)
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, again).await.expect("the group serves again");
        begun.elapsed()
    }

    /// Waits until a worker is the spare.
    async fn spare(&self, worker: &str) {
        let spare = async {
            while self.cluster.placed().await.spares != [worker] {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, spare).await.expect("it is the spare");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_rank_is_replaced_by_the_spare_and_no_stream_is_lost() {
    let mut pair = Pooled::pair().await;
    let load = Load::start(&pair.cluster).await;
    for rank in [1, 0] {
        load.progress(STREAMS).await;
        let (lost, epoch) = (pair.rank(rank).await, pair.group().await.epoch);
        pair.workers.remove(&lost).unwrap().kill();
        let took = pair.serves_without(&lost, epoch).await;
        println!("rank {rank} killed: the group serves again after {took:?}");
        load.progress(STREAMS).await;
        // Back as the spare, in another process.
        pair.workers.insert(lost.clone(), pair.cluster.pooled(&lost));
        pair.spare(&lost).await;
    }
    load.end("a rank killed, twice").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_group_of_one_rank_is_placed_on_the_spare_at_once() {
    let begun = Instant::now();
    let mut one = Pooled::start(&["a", "b"], "spares: 1\n").await;
    let load = Load::start(&one.cluster).await;
    // Until then a controller declares nobody dead.
    tokio::time::sleep(MEMBER_TTL.saturating_sub(begun.elapsed())).await;
    for _ in 0..3 {
        load.progress(STREAMS).await;
        let (lost, epoch) = (one.rank(0).await, one.group().await.epoch);
        one.workers.remove(&lost).unwrap().kill();
        let took = one.serves_without(&lost, epoch).await;
        println!("a group of one rank killed: it serves again after {took:?}");
        assert!(took < MEMBER_TTL, "nobody waits for the time-to-live");
        load.progress(STREAMS).await;
        one.workers.insert(lost.clone(), one.cluster.pooled(&lost));
        one.spare(&lost).await;
    }
    load.end("a group of one rank killed, three times").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_rank_is_replaced_by_the_spare_and_comes_back_as_one() {
    let pair = Pooled::pair().await;
    let load = Load::start(&pair.cluster).await;
    load.progress(STREAMS).await;
    let (hung, epoch) = (pair.rank(1).await, pair.group().await.epoch);
    pair.workers[&hung].signal("-STOP");
    let took = pair.serves_without(&hung, epoch).await;
    println!("rank 1 hung: the group serves again after {took:?}");
    load.progress(STREAMS).await;
    pair.workers[&hung].signal("-CONT");
    pair.spare(&hung).await;
    load.progress(STREAMS).await;
    load.end("a rank hung").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_follow_what_is_wanted_through_a_restart_of_the_controller_and_a_drain() {
    let mut cluster = Cluster::start(1, 0).await;
    let mut workers: BTreeMap<String, Process> =
        ["a", "b", "c"].map(|name| (name.to_owned(), cluster.pooled(name))).into();
    cluster.apply("replicas: 2\n");
    cluster.serving(0, 2).await;
    let load = Load::start(&cluster).await;
    let before = cluster.placed().await.groups;
    let address = cluster.controllers.remove(0).kill();
    load.progress(STREAMS).await;
    cluster.start_controller(&address);
    // The gateway serves by the routes it knows meanwhile.
    let back = async {
        while cluster.placed().await.groups.iter().any(|group| group.state() != GroupState::Serving) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, back).await.expect("the workers are back");
    load.progress(STREAMS).await;
    let after = cluster.placed().await.groups;
    assert_eq!(after, before, "groups keep their places and epochs");
    let drained = after[0].ranks[0].clone();
    unmask(&cluster, &["drain", &drained]);
    workers.remove(&drained).unwrap().ended();
    cluster.serving(0, 2).await;
    load.progress(STREAMS).await;
    assert!(cluster.placed().await.groups.iter().all(|group| !group.ranks.contains(&drained)));
    load.end("a controller restarted, a worker drained").await;
    cluster.apply("replicas: 1\n");
    cluster.serving(0, 1).await;
}

/// Other weights give other tokens: no other group could go on with what is under way.
async fn other_weights_let_streams_end(workers: &[&str], group: &str) {
    let one = Pooled::start(workers, group).await;
    let (begun, mut streams) = (Arc::new(AtomicUsize::new(0)), JoinSet::new());
    for index in 0..8 * STREAMS {
        let (endpoints, begun) = (one.cluster.endpoints(), Arc::clone(&begun));
        streams.spawn(async move { stream_from(&endpoints, index, &begun).await });
    }
    let all_begun = async {
        while begun.load(Ordering::Relaxed) < 8 * STREAMS {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LIMIT, all_begun).await.expect("all streams begin");
    tokio::task::block_in_place(|| one.cluster.apply_as("bf16", group));
    while let Some(ended) = streams.join_next().await {
        let ended = ended.unwrap().expect("a stream ends where it began");
        assert!(!ended.continued);
    }
    stream(&one.cluster.endpoints(), 0).await.expect("the new weights serve");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_before_the_only_group_takes_other_weights() {
    other_weights_let_streams_end(&["a"], "replicas: 1\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_before_the_only_group_of_two_ranks_takes_other_weights() {
    other_weights_let_streams_end(&["a", "b"], "tensor_parallel: 2\n").await;
}
