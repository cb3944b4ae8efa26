//! Against a real etcd, one member or three, that is really killed.

use super::suite;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use unmask_controller::store::{Etcd, Expected, Put, Revision, Store, StoreError};

/// One member's process, its data, and its two ports.
struct Member {
    process: Child,
    data: TempDir,
    client: u16,
    peer: u16,
}

struct Cluster(Vec<Member>);

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Cluster {
    async fn start(members: usize) -> (Cluster, Etcd) {
        let ports: Vec<(u16, u16)> = (0..members).map(|_| (free_port(), free_port())).collect();
        let peers: Vec<(usize, u16)> = ports.iter().map(|(_, peer)| *peer).enumerate().collect();
        let start = |(number, &(client, peer)): (usize, &(u16, u16))| {
            let data = tempfile::tempdir().unwrap();
            let process = spawn(number, client, peer, &peers, &data);
            Member { process, data, client, peer }
        };
        let cluster = Cluster(ports.iter().enumerate().map(start).collect());
        let store = cluster.open().await;
        (cluster, store)
    }

    fn url(&self) -> String {
        let members: Vec<String> = self.0.iter().map(|member| format!("127.0.0.1:{}", member.client)).collect();
        format!("etcd://{}", members.join(","))
    }

    async fn open(&self) -> Etcd {
        let opened = async {
            loop {
                if let Ok(store) = Etcd::open(&self.url(), None).await {
                    return store;
                }
            }
        };
        tokio::time::timeout(suite::LIMIT, opened).await.expect("etcd starts")
    }

    fn kill(&mut self, number: usize) {
        self.0[number].process.kill().unwrap();
        self.0[number].process.wait().unwrap();
    }

    fn restart(&mut self, number: usize) {
        let peers: Vec<(usize, u16)> = self.0.iter().map(|member| member.peer).enumerate().collect();
        let member = &mut self.0[number];
        member.process = spawn(number, member.client, member.peer, &peers, &member.data);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.0 {
            let _ = member.process.kill();
            let _ = member.process.wait();
        }
    }
}

fn spawn(number: usize, client: u16, peer: u16, peers: &[(usize, u16)], data: &TempDir) -> Child {
    let url = |port: u16| format!("http://127.0.0.1:{port}");
    let all: Vec<String> = peers.iter().map(|(number, port)| format!("m{number}={}", url(*port))).collect();
    Command::new("etcd")
        .args(["--name", &format!("m{number}"), "--data-dir"])
        .arg(data.path())
        .args(["--listen-client-urls", &url(client), "--advertise-client-urls", &url(client)])
        .args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)])
        .args(["--initial-cluster", &all.join(","), "--log-level", "error"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("etcd is installed (Debian: apt-get install etcd-server)")
}

/// Writes until it is done, as a caller does whose store is away for a while.
async fn put_in_the_end(store: &Etcd, key: &str) -> Revision {
    let putting = async {
        loop {
            match store.put(Put::new(key, Expected::Absent, Some(b"1".to_vec()))).await {
                Ok(revision) => return revision,
                // It was done, and the answer was lost.
                Err(StoreError::Conflict { found: Some(found), .. }) => return found,
                Err(StoreError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout(suite::LIMIT, putting).await.expect("the store is back")
}

/// Reads until the store answers.
async fn in_the_end<T, F: Future<Output = Result<T, StoreError>>>(read: impl Fn() -> F) -> T {
    let reading = async {
        loop {
            match read().await {
                Ok(value) => return value,
                Err(StoreError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout(suite::LIMIT, reading).await.expect("the store is back")
}

#[tokio::test]
async fn the_suite() {
    let (_cluster, store) = Cluster::start(1).await;
    suite::all(&store).await;
}

#[tokio::test]
async fn a_compacted_watch_says_so_and_one_from_the_listing_goes_on() {
    let (cluster, store) = Cluster::start(1).await;
    for value in ["1", "2", "3"] {
        suite::put(&store, "a", value).await;
    }
    let listing = store.range("").await.unwrap();
    let mut client = etcd_client::Client::connect([cluster.url().replace("etcd://", "")], None).await.unwrap();
    client.compact(listing.revision.0 as i64, None).await.unwrap();
    suite::compacted(&store, Revision(1)).await;
    let mut changes = store.watch("", Revision(listing.revision.0 + 1));
    suite::put(&store, "b", "1").await;
    assert_eq!(suite::read(&mut changes, 1).await[0].key, "b");
}

#[tokio::test]
async fn a_killed_server_ends_watches_and_all_that_was_acknowledged_is_there_after_it() {
    let (mut cluster, store) = Cluster::start(1).await;
    let before = suite::put(&store, "before", "1").await;
    let mut changes = store.watch("", Revision(before.0 + 1));
    cluster.kill(0);
    let ended = tokio::time::timeout(suite::LIMIT, futures::StreamExt::next(&mut changes)).await.unwrap();
    assert!(matches!(ended, Some(Err(StoreError::Unavailable(_))) | None), "{ended:?}");
    assert!(matches!(store.get("before").await, Err(StoreError::Unavailable(_))));
    cluster.restart(0);
    let after = put_in_the_end(&store, "after").await;
    assert!(after > before);
    assert_eq!(store.get("before").await.unwrap().unwrap().revision, before);
    // The watch is taken up where it ended.
    let mut changes = store.watch("", Revision(before.0 + 1));
    assert_eq!(suite::read(&mut changes, 1).await[0].key, "after");
}

#[tokio::test]
async fn one_killed_member_of_three_is_not_noticed_for_long() {
    let (mut cluster, store) = Cluster::start(3).await;
    put_in_the_end(&store, "a").await;
    for number in 0..3 {
        cluster.kill(number);
        put_in_the_end(&store, &format!("without-{number}")).await;
        // One answer may be late while the others elect.
        assert!(in_the_end(|| store.get("a")).await.is_some());
        cluster.restart(number);
        put_in_the_end(&store, &format!("with-{number}")).await;
    }
    assert_eq!(in_the_end(|| store.range("with")).await.entries.len(), 6);
}
