#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::membership::Order;
use std::time::Instant;
use tokio::net::TcpListener;
use tonic::Code;
use unmask_engine::group::TcpRank;
use unmask_proto::controllers::Controllers;
use unmask_proto::v1::worker_service_client::WorkerServiceClient;
use unmask_proto::v1::{Policy, ResolvedSettings, RunRequest, Seat, policy};

const LIMIT: Duration = Duration::from_secs(30);

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/sdar")
}

fn config(dir: &Path, controller: SocketAddr) -> Config {
    let mut config = Config::new(dir.to_owned(), Controllers::one(controller));
    config.load.threads = 1;
    config.kv_bytes = 64 << 20;
    config
}

#[tokio::test]
async fn a_worker_whose_engine_hangs_lets_go_of_its_streams_and_ends() {
    let dir = model();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = config(&dir, address);
    let loading = tokio::task::spawn_blocking({
        let config = config.clone();
        move || load(&config, &dir, &Ranks::One)
    });
    let loaded = loading.await.unwrap().unwrap();
    let runner = loaded.serving.runner.clone();
    let served = tokio::spawn(serve_own(config, loaded, listener.into(), std::future::pending()));

    let mut client = WorkerServiceClient::connect(format!("http://{address}")).await.unwrap();
    let policy = Policy { kind: Some(policy::Kind::Threshold(policy::Threshold { tau: 0.6 })) };
    let settings = ResolvedSettings {
        max_tokens: 30_000,
        block_size: 4,
        policy: Some(policy),
        top_p: 1.0,
        ..ResolvedSettings::default()
    };
    let request = RunRequest { prompt_ids: (20..26).collect(), settings: Some(settings), ..RunRequest::default() };
    let mut stream = client.run(request.clone()).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let began = Instant::now();
    let _under_way = runner.hang(Duration::from_millis(1));
    // It comes while nobody takes letters.
    let late = tokio::spawn(async move { client.run(request).await });
    let over = async {
        let held = loop {
            match stream.message().await {
                Ok(message) => assert!(message.is_some(), "it has not ended"),
                Err(status) => break status,
            }
        };
        (held, late.await.unwrap().unwrap_err())
    };
    let (held, late) = tokio::time::timeout(LIMIT, over).await.unwrap();
    for status in [held, late] {
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "the worker's engine hangs"));
    }
    let ended = tokio::time::timeout(LIMIT, served).await.unwrap().unwrap();
    assert!(matches!(ended, Err(WorkerError::Hangs(CommError::TimedOut { rank: 0, .. }))), "{ended:?}");
    assert!(began.elapsed() < CLOSE_LIMIT + Duration::from_secs(5), "nobody waits for the thread");
}

/// Whether the next order comes before the hang is noticed or not: weights that a hung thread computes with are not used again.
#[tokio::test]
async fn a_worker_of_the_pool_whose_engine_hangs_takes_no_other_seat() {
    let dir = model();
    for next in [None, Some(2)] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let host = Host::new(config(&dir, address), Readiness::Spare, None);
        let pooled = tokio::spawn(Pooled::new(&host, listener).run(CancellationToken::new()));
        let seat = Seat {
            model: "m".into(),
            path: dir.to_str().unwrap().into(),
            dtype: "f32".into(),
            rank_addresses: vec![address.to_string()],
            ..Seat::default()
        };
        assert!(host.membership.order(Order { epoch: 1, seat: Some(seat.clone()) }));
        let mut serving = host.serving.subscribe();
        let serving = tokio::time::timeout(LIMIT, serving.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
        let _under_way = serving.unwrap().runner.hang(Duration::from_millis(1));
        if let Some(epoch) = next {
            assert!(host.membership.order(Order { epoch, seat: Some(seat) }));
        }
        let hangs = tokio::time::timeout(LIMIT, pooled).await.unwrap().unwrap();
        assert!(matches!(hangs, Some(CommError::TimedOut { rank: 0, .. })), "{hangs:?}");
        assert!(host.serving.borrow().is_none());
    }
}

/// Ranks wait up to ten minutes for one that takes long to load, but not when something else is wanted by then.
#[tokio::test]
async fn a_group_that_forms_with_a_rank_that_hangs_is_called_off_by_the_next_order() {
    let dir = model();
    let [ours, theirs] = [0, 1].map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let addresses = [&ours, &theirs].map(|listener| listener.local_addr().unwrap());
    let host = Host::new(config(&dir, addresses[0]), Readiness::Spare, None);
    let end = CancellationToken::new();
    let pooled = tokio::spawn(Pooled::new(&host, ours).run(end.clone()));
    let seat = |ranks: usize| Seat {
        model: "m".into(),
        path: dir.to_str().unwrap().into(),
        dtype: "f32".into(),
        rank_addresses: addresses[..ranks].iter().map(ToString::to_string).collect(),
        ..Seat::default()
    };
    assert!(host.membership.order(Order { epoch: 1, seat: Some(seat(2)) }));
    // It meets rank 0, and does nothing more.
    let met = tokio::task::spawn_blocking(move || {
        let never = std::sync::atomic::AtomicBool::new(false);
        TcpRank::form(1, 1, &theirs, &addresses, Instant::now() + LIMIT, &never).unwrap()
    });
    let _hangs = tokio::time::timeout(LIMIT, met).await.unwrap().unwrap();
    assert!(host.membership.order(Order { epoch: 2, seat: Some(seat(1)) }));
    let mut serving = host.serving.subscribe();
    tokio::time::timeout(LIMIT, serving.wait_for(Option::is_some)).await.expect("it goes on").unwrap();
    end.cancel();
    assert_eq!(tokio::time::timeout(LIMIT, pooled).await.unwrap().unwrap(), None);
}
