#![allow(clippy::unwrap_used)]

use super::*;
use std::time::Instant;
use tokio::net::TcpListener;
use tonic::Code;
use unmask_proto::controllers::Controllers;
use unmask_proto::v1::worker_service_client::WorkerServiceClient;
use unmask_proto::v1::{Policy, ResolvedSettings, RunRequest, policy};

const LIMIT: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_worker_whose_engine_hangs_lets_go_of_its_streams_and_ends() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/sdar");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut config = Config::new(dir.clone(), Controllers::one(address));
    config.load.threads = 1;
    config.kv_bytes = 64 << 20;
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
    let request = RunRequest { prompt_ids: vec![20, 21], settings: Some(settings), ..RunRequest::default() };
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
    assert!(began.elapsed() < CLOSE_LIMIT + STEP_LIMIT, "nobody waits for the thread");
}
