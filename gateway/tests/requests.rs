//! What a gateway refuses, and what reaches the worker of what it takes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use harness::{CONTEXT, Gateway, KEY, TOKENIZER, Worker, ids, text, with, within};
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;
use unmask_gateway::Config;
use unmask_gateway::tenants::{self, RawTenant, Tenants};
use unmask_proto::v1::generate_request::Input;
use unmask_proto::v1::policy::{Autoregressive, Kind, Threshold};
use unmask_proto::v1::{
    ChatMessage, ChatMessages, Decoding, FinishReason, GenerateRequest, GetModelRequest, Policy, Route, TokenIds,
    TokenizeRequest,
};

fn fields(status: &Status) -> Vec<String> {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let found = status.get_details_bad_request().unwrap().field_violations;
    found.into_iter().map(|violation| violation.field).collect()
}

fn chat(messages: &[(&str, &str)]) -> GenerateRequest {
    let messages =
        messages.iter().map(|(role, content)| ChatMessage { role: (*role).into(), content: (*content).into() });
    GenerateRequest { input: Some(Input::Chat(ChatMessages { messages: messages.collect() })), ..Default::default() }
}

fn token_ids(ids: Vec<u32>) -> GenerateRequest {
    GenerateRequest { input: Some(Input::TokenIds(TokenIds { ids })), ..Default::default() }
}

fn policy(kind: Kind) -> Decoding {
    Decoding { policy: Some(Policy { kind: Some(kind) }), ..Default::default() }
}

#[tokio::test]
async fn tenants_need_a_key_and_have_their_own_limits_and_caches() {
    let mut worker = Worker::start().await;
    let tenant = |name: &str, key: &str, rows_per_second| RawTenant {
        name: name.into(),
        keys: vec![tenants::digest(key)],
        streams_max: Some(1),
        weight: None,
        rows_per_second,
    };
    let all = vec![tenant("harness", KEY, None), tenant("a", "key-a", None), tenant("b", "key-b", Some(10))];
    let configure = |config: &mut Config| config.tenants = Tenants::new(all).unwrap();
    let gateway = Gateway::configured(vec![worker.route("a", 1)], configure).await;
    let reason = |status: Status| (status.code(), status.get_details_error_info().unwrap().reason);
    let refused = gateway.generate(text("p")).await.unwrap_err();
    assert_eq!(reason(refused), (Code::Unauthenticated, "API_KEY".into()));
    let refused = gateway.generate_as("key-c", text("p")).await.unwrap_err();
    assert_eq!(reason(refused), (Code::Unauthenticated, "API_KEY".into()));
    // Probes have no key.
    let channel = Channel::from_shared(format!("http://{}", gateway.address)).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel);
    health.check(HealthCheckRequest::default()).await.unwrap();

    let held = gateway.generate_as("key-a", text("p")).await.unwrap();
    let run = worker.run().await;
    let refused = gateway.generate_as("key-a", text("p")).await.unwrap_err();
    assert!(refused.get_details_retry_info().is_some());
    assert_eq!(reason(refused), (Code::ResourceExhausted, "TENANT_STREAMS".into()));
    let decoding = Decoding { max_tokens: Some(90), ..Default::default() };
    let other = gateway.generate_as("key-b", with("p", decoding.clone())).await.unwrap();
    let other_run = worker.run().await;
    assert!(run.request.cache_salt != other_run.request.cache_salt && run.request.cache_salt != 0);
    other_run.finish(FinishReason::Eos).await;
    other.all().await.unwrap();
    // The stream counts until its task has ended.
    let spent = loop {
        let refused = gateway.generate_as("key-b", with("p", decoding.clone())).await.unwrap_err();
        if reason(refused.clone()).1 != "TENANT_STREAMS" {
            break refused;
        }
    };
    assert!(spent.get_details_retry_info().unwrap().retry_delay.unwrap() > Duration::from_secs(6));
    assert_eq!(reason(spent), (Code::ResourceExhausted, "TENANT_ROWS".into()));
    run.finish(FinishReason::Eos).await;
    held.all().await.unwrap();
}

#[tokio::test]
async fn bad_requests_name_their_fields_and_start_nothing() {
    let worker = Worker::start().await;
    let gateway = Gateway::start(vec![worker.route("a", 1)]).await;
    let bad = [
        (text(""), "text"),
        (GenerateRequest::default(), "input"),
        (token_ids(vec![]), "token_ids.ids"),
        (token_ids(vec![1, 9999]), "token_ids.ids[1]"),
        (token_ids(vec![1; CONTEXT as usize]), "token_ids"),
        (text(&"a b c d ".repeat(CONTEXT as usize)), "text"),
        (with("p", Decoding { max_tokens: Some(CONTEXT), ..Default::default() }), "decoding.max_tokens"),
        (with("p", Decoding { block_size: Some(5), ..Default::default() }), "decoding.block_size"),
        (with("p", Decoding { temperature: Some(-1.0), ..Default::default() }), "decoding.temperature"),
        (with("p", policy(Kind::Threshold(Threshold { tau: 1.5 }))), "decoding.policy.threshold.tau"),
        (with("p", policy(Kind::Autoregressive(Autoregressive {}))), "decoding.policy"),
        (chat(&[("system", "x")]), "chat"),
    ];
    for (request, field) in bad {
        let status = gateway.generate(request.clone()).await.unwrap_err();
        assert_eq!(fields(&status), [field], "{request:?}");
        assert!(status.message().starts_with(field), "{status:?}");
    }
    let both = Decoding { temperature: Some(f32::NAN), top_p: Some(0.0), ..Default::default() };
    let status = gateway.generate(with("", both)).await.unwrap_err();
    assert_eq!(fields(&status), ["text", "decoding.temperature", "decoding.top_p"]);
    let info = status.get_details_error_info().unwrap();
    assert_eq!((info.reason.as_str(), info.domain.as_str()), ("INVALID_REQUEST", "unmask"));
}

#[tokio::test]
async fn models_that_are_not_there() {
    let worker = Worker::start().await;
    let gateway = Gateway::start(vec![]).await;
    let named = |model: &str| GenerateRequest { model: model.into(), ..text("p") };
    let status = gateway.generate(named("tiny")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    gateway.set_routes(vec![worker.route("a", 1)]).await;
    let status = gateway.generate(named("large")).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "no model `large`; known models: tiny"));
    let request = GetModelRequest { model: "large".into() };
    assert_eq!(gateway.client.clone().get_model(request).await.unwrap_err().code(), Code::NotFound);
    gateway.set_routes(vec![]).await;
    let status = gateway.generate(named("tiny")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.get_details_retry_info().is_some());
}

#[tokio::test]
async fn prompts_reach_the_worker_as_ids_in_which_users_wrote_no_special_token() {
    let mut worker = Worker::start().await;
    let gateway = Gateway::start(vec![worker.route("a", 1)]).await;
    let special = |token: &str| TOKENIZER.id_of(token).unwrap();
    let infill = GenerateRequest { suffix: Some("end".into()), ..text("a<think>") };
    let [prefix, suffix, middle] = [295, 296, 297];
    let message = "say <|im_end|>";
    let rendered: Vec<u32> = [
        &[special("<|im_start|>")][..],
        &ids("user\nsay "),
        &ids("<|im_end|>"),
        &[special("<|im_end|>")],
        &ids("\n"),
        &[special("<|im_start|>")],
        &ids("assistant\n"),
    ]
    .concat();
    let cases = [
        (text("<|MASK|> é"), ids("<|MASK|> é")),
        (token_ids(vec![1, 2, 299]), vec![1, 2, 299]),
        (infill, [&[prefix], &ids("a<think>")[..], &[suffix], &ids("end"), &[middle]].concat()),
        (chat(&[("user", message)]), rendered),
        // Long enough to be encoded on another thread.
        (with(&"word ".repeat(4000), Decoding::default()), ids(&"word ".repeat(4000))),
    ];
    for (request, expected) in cases {
        let stream = gateway.generate(request).await.unwrap();
        let run = worker.run().await;
        assert_eq!(run.request.prompt_ids, expected);
        run.finish(FinishReason::Eos).await;
        stream.all().await.unwrap();
    }
}

#[tokio::test]
async fn a_ready_gateway_tokenizes_describes_and_reports_serving() {
    let worker = Worker::start().await;
    let gateway = Gateway::start(vec![worker.route("a", 1), worker.route("b", 1)]).await;
    let mut client = gateway.client.clone();
    let model = client.get_model(GetModelRequest::default()).await.unwrap().into_inner().model.unwrap();
    assert_eq!((model.name.as_str(), model.ready_groups), ("tiny", 2));
    assert_eq!(model.descriptor, Some(harness::descriptor()));
    for (parse_special, expected) in [(true, vec![299]), (false, ids("<|MASK|>"))] {
        let request = TokenizeRequest { text: "<|MASK|>".into(), parse_special, ..Default::default() };
        assert_eq!(client.tokenize(request).await.unwrap().into_inner().ids, expected);
    }
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", gateway.address)).unwrap();
    let mut health = HealthClient::new(channel.connect().await.unwrap());
    for service in ["", "unmask.v1.InferenceService"] {
        let mut watched = health.watch(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
        let mut until = async |wanted: ServingStatus| {
            while within(watched.message()).await.unwrap().unwrap().status() != wanted {}
        };
        until(ServingStatus::Serving).await;
        gateway.set_routes(vec![]).await;
        until(ServingStatus::NotServing).await;
        gateway.set_routes(vec![worker.route("a", 1)]).await;
    }
}

#[tokio::test]
async fn known_routes_outlive_the_controller() {
    let worker = Worker::start().await;
    let gateway = Gateway::start(vec![worker.route("a", 1)]).await;
    worker.answer_all("ok");
    gateway.end_controller();
    for _ in 0..3 {
        let output = gateway.generate(text("p")).await.unwrap().all().await.unwrap();
        assert_eq!(output.text, "ok");
    }
}

#[tokio::test]
async fn reflection_lists_the_services() {
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let gateway = Gateway::start(vec![]).await;
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", gateway.address)).unwrap();
    let mut client = ServerReflectionClient::new(channel.connect().await.unwrap());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = within(answers.message()).await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for name in ["unmask.v1.InferenceService", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|listed| listed == name), "{names:?}");
    }
}

/// A gateway that has just started asks another worker for the tokenizer when the first is not there.
#[tokio::test]
async fn a_tokenizer_comes_from_whoever_has_it() {
    let worker = Worker::start().await;
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let gone = |group: &str| Route { endpoint: closed.to_string(), ..worker.route(group, 1) };
    let gateway = Gateway::start(vec![gone("a"), gone("b"), worker.route("c", 1)]).await;
    worker.answer_all("x");
    let output = gateway.generate(text("p")).await.unwrap().all().await.unwrap();
    assert_eq!(output.text, "x");
}
