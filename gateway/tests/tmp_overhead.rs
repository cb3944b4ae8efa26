#![allow(clippy::unwrap_used)]
mod harness;
use harness::*;
use std::time::Instant;
use unmask_proto::v1::*;
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overhead() {
    let worker = Worker::start().await;
    let gateway = Gateway::start(vec![worker.route("a", 1)]).await;
    let mut direct = unmask_proto::v1::worker_service_client::WorkerServiceClient::connect(format!("http://{}", worker.address)).await.unwrap();
    worker.answer_all("ok");
    let mut a = Vec::new(); let mut b = Vec::new();
    for _ in 0..500 {
        let t = Instant::now();
        gateway.generate(text("def f(x):")).await.unwrap().all().await.unwrap();
        a.push(t.elapsed());
        let t = Instant::now();
        let mut s = direct.run(RunRequest { prompt_ids: ids("def f(x):"), ..Default::default() }).await.unwrap().into_inner();
        while s.message().await.unwrap().is_some() {}
        b.push(t.elapsed());
    }
    a.sort(); b.sort();
    println!("through {:?} direct {:?}", a[250], b[250]);
}
