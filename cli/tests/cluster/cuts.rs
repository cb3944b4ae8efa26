//! Links between services that fall silent, as a network does: nothing is closed, nothing arrives. Or that break off.

use super::{Load, STREAMS};
use crate::processes::{Cluster, LIMIT};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use unmask_controller::config::MEMBER_TTL;
use unmask_proto::v1::GroupState;

/// A link through this process.
pub struct Link {
    /// host:port of its near end.
    pub address: String,
    target: watch::Sender<String>,
    whole: watch::Sender<bool>,
    broken: watch::Sender<()>,
}

impl Link {
    /// One whose far end is said later.
    pub async fn new() -> Link {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (target, far) = watch::channel(String::new());
        let (whole, state) = watch::channel(true);
        let (broken, breaks) = watch::channel(());
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (far, state, mut breaks) = (far.clone(), state.clone(), breaks.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        () = carry(near, far, state) => {}
                        _ = breaks.changed() => {}
                    }
                });
            }
        });
        Link { address, target, whole, broken }
    }

    pub fn to(&self, address: &str) {
        self.target.send_replace(address.to_owned());
    }

    pub fn cut(&self) {
        self.whole.send_replace(false);
    }

    /// Closes what is open.
    pub fn break_off(&self) {
        self.broken.send_replace(());
    }

    pub fn mend(&self) {
        self.whole.send_replace(true);
    }
}

async fn carry(near: TcpStream, mut target: watch::Receiver<String>, mut whole: watch::Receiver<bool>) {
    let there = target.wait_for(|target| !target.is_empty()).await.map(|target| target.clone());
    if whole.wait_for(|whole| *whole).await.is_err() {
        return;
    }
    let (Ok(there), Ok(())) = (there, near.set_nodelay(true)) else { return };
    let Ok(far) = TcpStream::connect(there).await else { return };
    let _ = far.set_nodelay(true);
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    tokio::select! {
        () = copy(near_in, far_out, whole.clone()) => {}
        () = copy(far_in, near_out, whole) => {}
    }
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut whole: watch::Receiver<bool>) {
    let mut bytes = vec![0; 64 << 10];
    loop {
        if whole.wait_for(|whole| *whole).await.is_err() {
            return;
        }
        let read = tokio::select! {
            read = from.read(&mut bytes) => read,
            _ = whole.wait_for(|whole| !*whole) => continue,
        };
        match read {
            Ok(count) if count > 0 && to.write_all(&bytes[..count]).await.is_ok() => {}
            _ => return,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_between_gateway_and_worker_holds_streams_for_seconds_at_most() {
    let mut cluster = Cluster::start(1, 1).await;
    let link = Link::new().await;
    let worker = cluster.worker_with(&["--advertise", &link.address]);
    link.to(&worker.address);
    cluster.workers.push(worker);
    cluster.serving(0, 2).await;
    let load = Load::start(&cluster).await;
    load.progress(STREAMS).await;
    link.cut();
    load.progress(4 * STREAMS).await;
    link.mend();
    load.progress(STREAMS).await;
    let outcome = load.end("gateway and worker cut off from each other").await;
    assert!(outcome.gaps.iter().all(|gap| *gap < Duration::from_secs(8)), "{:?}", outcome.gaps);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_cut_off_from_the_controller_takes_nothing_new_and_comes_back() {
    let mut cluster = Cluster::start(1, 1).await;
    let link = Link::new().await;
    link.to(&cluster.controllers[0].address);
    let worker = cluster.worker_with(&["--controller", &link.address]);
    let address = worker.address.clone();
    cluster.workers.push(worker);
    cluster.serving(0, 2).await;
    let load = Load::start(&cluster).await;
    load.progress(STREAMS).await;
    let epoch = cluster.epoch(&address).await;
    link.cut();
    // It leaves the routes; streams that it holds go on to their end.
    cluster.serving(0, 1).await;
    load.progress(STREAMS).await;
    link.mend();
    cluster.serving(0, 2).await;
    assert!(cluster.epoch(&address).await > epoch, "what it did in between belongs to an epoch of its own");
    load.progress(STREAMS).await;
    let outcome = load.end("worker and controller cut off from each other").await;
    assert_eq!(outcome.continued, 0, "nothing that it held was lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_only_loses_its_connection_to_the_controller_keeps_its_seat() {
    let begun = Instant::now();
    let cluster = Cluster::start(1, 0).await;
    let link = Link::new().await;
    link.to(&cluster.controllers[0].address);
    let _workers = [cluster.pooled_with("a", &["--controller", &link.address]), cluster.pooled("b")];
    cluster.apply("spares: 1\n");
    cluster.serving(0, 1).await;
    let before = cluster.placed().await.groups;
    let load = Load::start(&cluster).await;
    // From then on a controller may declare it dead.
    tokio::time::sleep(MEMBER_TTL.saturating_sub(begun.elapsed())).await;
    for _ in 0..5 {
        link.break_off();
        load.progress(STREAMS).await;
    }
    assert_eq!(cluster.placed().await.groups, before, "its seat and its epoch");
    let outcome = load.end("the connection of a worker to the controller broken off, five times").await;
    assert_eq!(outcome.continued, 0, "nothing that it held was lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_between_ranks_ends_the_group_in_time_and_it_forms_anew() {
    let cluster = Cluster::start(1, 0).await;
    // Rank 1 connects to rank 0: the link is in front of every worker, and only one of them is rank 0.
    let links = [Link::new().await, Link::new().await];
    let mut workers = Vec::new();
    for (name, link) in ["a", "b"].into_iter().zip(&links) {
        let listen = free_address();
        link.to(&listen);
        workers.push(cluster.pooled_with(name, &["--rank-listen", &listen, "--rank-advertise", &link.address]));
    }
    cluster.apply("tensor_parallel: 2\n");
    cluster.serving(0, 1).await;
    let load = Load::start(&cluster).await;
    load.progress(STREAMS).await;
    let epoch = cluster.placed().await.groups[0].epoch;
    let cut = Instant::now();
    links.iter().for_each(Link::cut);
    let ended = async {
        while cluster.placed().await.groups[0].state() == GroupState::Serving {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, ended).await.expect("both ranks notice");
    println!("ranks cut off from each other: noticed after {:?}", cut.elapsed());
    links.iter().for_each(Link::mend);
    let again = async {
        loop {
            let group = cluster.placed().await.groups.remove(0);
            if group.state() == GroupState::Serving && group.epoch > epoch {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, again).await.expect("the group forms anew");
    println!("ranks cut off from each other: served again after {:?}", cut.elapsed());
    load.progress(STREAMS).await;
    load.end("ranks cut off from each other").await;
}

fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}
