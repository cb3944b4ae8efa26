//! Workers of the pool: groups of several ranks are placed, lose ranks, and form anew with a spare.

use super::{Load, STREAMS, unmask};
use crate::processes::{Cluster, LIMIT, Process};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use unmask_proto::v1::{GroupState, GroupStatus};

/// Three workers, and one group of two ranks on two of them.
struct Pair {
    cluster: Cluster,
    workers: BTreeMap<String, Process>,
}

impl Pair {
    async fn start() -> Pair {
        let cluster = Cluster::start(1, 0).await;
        let workers = ["a", "b", "c"].map(|name| (name.to_owned(), cluster.pooled(name)));
        cluster.apply("tensor_parallel: 2\nspares: 1\n");
        cluster.serving(0, 1).await;
        Pair { cluster, workers: workers.into() }
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
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_rank_is_replaced_by_the_spare_and_no_stream_is_lost() {
    let mut pair = Pair::start().await;
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
        let spare = async {
            while pair.cluster.placed().await.spares != [lost.clone()] {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, spare).await.expect("it is the spare");
    }
    load.end("a rank killed, twice").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_rank_is_replaced_by_the_spare_and_comes_back_as_one() {
    let pair = Pair::start().await;
    let load = Load::start(&pair.cluster).await;
    load.progress(STREAMS).await;
    let (hung, epoch) = (pair.rank(1).await, pair.group().await.epoch);
    pair.workers[&hung].signal("-STOP");
    let took = pair.serves_without(&hung, epoch).await;
    println!("rank 1 hung: the group serves again after {took:?}");
    load.progress(STREAMS).await;
    pair.workers[&hung].signal("-CONT");
    let spare = async {
        while pair.cluster.placed().await.spares != [hung.clone()] {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, spare).await.expect("it is the spare");
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
