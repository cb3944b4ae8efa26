//! Who waits, who goes first and who is refused when a gateway is full.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use harness::http::post;
use harness::{Gateway, KEY, Run, Stream, Worker, ids, text, with, within};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use unmask_gateway::Config;
use unmask_gateway::tenants::{self, RawTenant, Tenants};
use unmask_proto::v1::{Decoding, FinishReason, GenerateRequest};

/// One request at a time, whatever its size, and so many that wait.
fn one_at_a_time(queue_max: usize) -> impl FnOnce(&mut Config) {
    move |config| (config.admission.rows_max, config.admission.queue_max) = (1, queue_max)
}

async fn gateway(queue_max: usize) -> (Arc<Gateway>, Worker) {
    let worker = Worker::start().await;
    let gateway = Gateway::configured(vec![worker.route("a", 1)], one_at_a_time(queue_max)).await;
    (Arc::new(gateway), worker)
}

fn sized(prompt: &str, max_tokens: u32, priority: i32) -> GenerateRequest {
    let decoding = Decoding { max_tokens: Some(max_tokens), ..Default::default() };
    GenerateRequest { priority: Some(priority), ..with(prompt, decoding) }
}

/// The only request that is under way.
async fn held(gateway: &Gateway, worker: &mut Worker) -> (Stream, Run) {
    let stream = gateway.generate(sized("held", 1, 0)).await.unwrap();
    (stream, worker.run().await)
}

fn reason(status: &Status) -> String {
    assert!(status.get_details_retry_info().is_some_and(|info| info.retry_delay.is_some()), "{status:?}");
    status.get_details_error_info().unwrap().reason
}

/// Whether a run is that of a prompt.
fn is_of(run: &Run, prompt: &str) -> bool {
    run.request.prompt_ids == ids(prompt)
}

/// Waits until the queue is full: whoever asks with the least priority is refused then.
async fn until_full(gateway: &Gateway) {
    let status = gateway.generate(sized("probe", 1, -100)).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "QUEUE_FULL"));
}

fn spawn(all: &mut JoinSet<Result<Stream, Status>>, gateway: &Arc<Gateway>, request: GenerateRequest) {
    let gateway = Arc::clone(gateway);
    all.spawn(async move { gateway.generate(request).await });
}

#[tokio::test]
async fn a_heavy_tenant_does_not_starve_a_light_one() {
    let mut worker = Worker::start().await;
    let tenant = |name: &str| RawTenant {
        name: name.into(),
        keys: vec![tenants::digest(if name == "harness" { KEY } else { name })],
        streams_max: None,
        weight: None,
        rows_per_second: None,
    };
    let all = vec![tenant("harness"), tenant("heavy"), tenant("light")];
    let configure = |config: &mut Config| {
        one_at_a_time(8)(config);
        config.tenants = Tenants::new(all).unwrap();
    };
    let gateway = Arc::new(Gateway::configured(vec![worker.route("a", 1)], configure).await);
    let mut asked = JoinSet::new();
    let ask = |asked: &mut JoinSet<_>, name: &'static str| {
        let gateway = Arc::clone(&gateway);
        asked.spawn(async move { gateway.generate_as(name, sized(name, 2000, 0)).await });
    };
    (0..10).for_each(|_| ask(&mut asked, "heavy"));
    let mut run = worker.run().await;
    // Eight wait when one has been refused; then one of them makes room for the light one.
    let refused = |status: Status| {
        assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "QUEUE_FULL"));
    };
    let mut streams = Vec::new();
    for _ in 0..2 {
        match within(asked.join_next()).await.unwrap().unwrap() {
            Ok(stream) => streams.push(stream),
            Err(status) => refused(status),
        }
    }
    assert_eq!(streams.len(), 1, "the other one was refused");
    ask(&mut asked, "light");
    refused(within(asked.join_next()).await.unwrap().unwrap().unwrap_err());
    let mut before = 0;
    while !is_of(&run, "light") {
        before += 1;
        run.finish(FinishReason::Eos).await;
        run = worker.run().await;
        streams.push(within(asked.join_next()).await.unwrap().unwrap().unwrap());
    }
    assert!(before <= 3, "{before} heavy ones went before the light one");
}

#[tokio::test]
async fn priority_decides_who_is_next() {
    let (gateway, mut worker) = gateway(3).await;
    let (_stream, mut run) = held(&gateway, &mut worker).await;
    let mut asked = JoinSet::new();
    spawn(&mut asked, &gateway, sized("low", 1, -5));
    spawn(&mut asked, &gateway, sized("middle", 1, 0));
    spawn(&mut asked, &gateway, sized("high", 1, 5));
    until_full(&gateway).await;
    let mut streams = Vec::new();
    for next in ["high", "middle", "low"] {
        run.finish(FinishReason::Eos).await;
        run = worker.run().await;
        assert!(is_of(&run, next), "{next} is next");
        streams.push(within(asked.join_next()).await.unwrap().unwrap().unwrap());
    }
}

#[tokio::test]
async fn what_cannot_begin_before_its_deadline_is_refused_at_once() {
    let (gateway, mut worker) = gateway(1).await;
    // Two rows, which take at least as long as a round trip.
    let (stream, run) = held(&gateway, &mut worker).await;
    run.finish(FinishReason::Eos).await;
    stream.all().await.unwrap();
    let (_stream, _run) = held(&gateway, &mut worker).await;
    let mut asked = JoinSet::new();
    spawn(&mut asked, &gateway, sized("long", 30_000, 100));
    until_full(&gateway).await;
    let mut request = Request::new(text("p"));
    request.set_timeout(Duration::from_secs(1));
    let status = within(gateway.client.clone().generate(request)).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "DEADLINE_UNREACHABLE"));
}

#[tokio::test]
async fn who_has_waited_for_long_is_told_when_to_try_again_over_http_too() {
    let mut worker = Worker::start().await;
    let configure = |config: &mut Config| {
        one_at_a_time(4)(config);
        config.admission.queue_wait = Duration::from_millis(50);
    };
    let gateway = Gateway::configured(vec![worker.route("a", 1)], configure).await;
    let (_stream, _run) = held(&gateway, &mut worker).await;
    let status = gateway.generate(text("p")).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "QUEUE_TIMEOUT"));
    let answer = post(gateway.http, "/v1/completions", json!({ "prompt": "p" })).await;
    assert_eq!((answer.status, answer.header("retry-after")), (429, "1"));
    assert_eq!(answer.json().await["error"]["code"], json!("queue_timeout"));
}

#[tokio::test]
async fn a_waiting_client_that_goes_away_leaves_the_queue() {
    let (gateway, mut worker) = gateway(1).await;
    let (_stream, _run) = held(&gateway, &mut worker).await;
    let mut asked = JoinSet::new();
    spawn(&mut asked, &gateway, text("p"));
    until_full(&gateway).await;
    asked.abort_all();
    // Until another one may wait in its place, to its deadline.
    let in_its_place = async {
        loop {
            let mut request = Request::new(sized("p", 1, -1));
            request.set_timeout(Duration::from_millis(500));
            let status = gateway.client.clone().generate(request).await.unwrap_err();
            if status.code() != Code::ResourceExhausted {
                return status.code();
            }
        }
    };
    // Told by the gateway or, a little earlier, by the client itself.
    assert!(matches!(within(in_its_place).await, Code::DeadlineExceeded | Code::Cancelled));
}

#[tokio::test]
async fn a_stream_that_goes_on_elsewhere_does_not_wait() {
    let (gateway, mut worker) = gateway(1).await;
    let mut stream = gateway.generate(sized("held", 8, 0)).await.unwrap();
    let mut run = worker.run().await;
    run.commit(&ids("ab")).await;
    stream.started().await;
    stream.commit().await;
    let mut asked = JoinSet::new();
    spawn(&mut asked, &gateway, sized("waits", 1, 100));
    until_full(&gateway).await;
    run.fail(Status::unavailable("going down")).await;
    let run = worker.run().await;
    assert_eq!((is_of(&run, "held"), &run.request.committed_ids), (true, &ids("ab")));
    run.finish(FinishReason::Eos).await;
    stream.all().await.unwrap();
    assert!(is_of(&worker.run().await, "waits"));
}
