//! The OpenAI-compatible interface over real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use harness::http::{Answer, ask, get, post, send};
use harness::{CONTEXT, Gateway, KEY, Worker, ids, within};
use serde_json::{Value, json};
use tonic::{Code, Status};
use unmask_gateway::Config;
use unmask_gateway::tenants::{self, RawTenant, Tenants};
use unmask_proto::rich;
use unmask_proto::v1::policy::{Kind, Threshold};
use unmask_proto::v1::{Capabilities, Draft, FinishReason, ListModelsRequest, Policy, RunRequest};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const ANSWER: &str = "def f(x):\n    return x + 1\n";
const JSON: (&str, &str) = ("content-type", "application/json");

async fn one() -> (Gateway, Worker) {
    let worker = Worker::start().await;
    (Gateway::start(vec![worker.route("a", 1)]).await, worker)
}

fn say(content: &str) -> Value {
    json!([{ "role": "user", "content": content }])
}

/// The chunks of a stream that ends well.
async fn chunks(answer: Answer) -> Vec<Value> {
    assert_eq!((answer.status, answer.header("content-type")), (200, "text/event-stream"));
    let mut events = answer.events().await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

#[tokio::test]
async fn a_completion_is_one_object_with_its_account() {
    let (gateway, mut worker) = one().await;
    let body = json!({
        "model": "tiny", "prompt": "# sum\n", "max_tokens": 50, "temperature": 0.5, "seed": 7,
        "unmask": { "policy": { "threshold": { "tau": 0.5 } }, "priority": 3, "nfe_cap": 40, "time_limit_ms": 90000 },
    });
    let asked = tokio::spawn(async move { post(gateway.http, COMPLETIONS, body).await });
    let mut run = worker.run().await;
    let settings = run.request.settings.clone().unwrap();
    assert_eq!((run.request.prompt_ids.clone(), run.request.priority), (ids("# sum\n"), 3));
    assert_eq!((settings.max_tokens, settings.temperature, settings.seed, settings.nfe_cap), (50, 0.5, 7, 40));
    assert_eq!(settings.policy, Some(Policy { kind: Some(Kind::Threshold(Threshold { tau: 0.5 })) }));
    let id = run.request.request_id.clone();
    let answer = ids(ANSWER);
    run.commit(&answer).await;
    run.finish(FinishReason::Eos).await;
    let got = asked.await.unwrap();
    assert_eq!(got.status, 200);
    let got = got.json().await;
    assert_eq!((&got["object"], &got["model"]), (&json!("text_completion"), &json!("tiny")));
    assert_eq!((&got["id"], &got["system_fingerprint"]), (&json!(format!("cmpl-{id}")), &json!("n")));
    assert!(got["created"].as_u64().unwrap() > 1_700_000_000);
    let choice = json!({ "index": 0, "text": ANSWER, "logprobs": null, "finish_reason": "stop" });
    assert_eq!(got["choices"], json!([choice]));
    let (prompt, completion) = (ids("# sum\n").len(), answer.len());
    let usage = json!({
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
    });
    assert_eq!(got["usage"], usage);
    let own = &got["unmask"];
    assert_eq!((&own["block_size"], &own["nfe"], &own["reason"]), (&json!(4), &json!(9), &json!("eos")));
    assert_eq!((&own["policy"], &own["seed"]), (&json!({ "threshold": { "tau": 0.5 } }), &json!(7)));
    let tpf = own["tokens_per_forward"].as_f64().unwrap();
    assert!((tpf - completion as f64 / 9.0).abs() < 1e-6, "{tpf}");
}

#[tokio::test]
async fn a_chat_streams_chunks_as_they_are_committed() {
    let (gateway, mut worker) = one().await;
    let body = json!({ "messages": say("hi"), "stream": true, "stream_options": { "include_usage": true } });
    let mut got = post(gateway.http, CHAT, body).await;
    assert_eq!((got.status, got.header("content-type")), (200, "text/event-stream"));
    let mut run = worker.run().await;
    let mut next = async || serde_json::from_str::<Value>(&got.event().await.unwrap()).unwrap();
    let first = next().await;
    assert_eq!(first["object"], "chat.completion.chunk");
    assert!(first["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let choice = |delta: Value, reason: Value| json!([{ "index": 0, "delta": delta, "logprobs": null, "finish_reason": reason }]);
    assert_eq!(first["choices"], choice(json!({ "role": "assistant", "content": "" }), Value::Null));
    assert_eq!((&first["unmask"]["block_size"], &first["usage"]), (&json!(4), &Value::Null));
    // Every commit is there before the stream goes on.
    for id in ids("abc") {
        run.commit(&[id]).await;
        let chunk = next().await;
        let text = harness::TOKENIZER.decode(&[id], true);
        assert_eq!(chunk["choices"], choice(json!({ "content": text }), Value::Null));
    }
    run.finish(FinishReason::Length).await;
    let last = next().await;
    assert_eq!(last["choices"], choice(json!({}), json!("length")));
    assert_eq!((&last["unmask"]["nfe"], &last["unmask"]["reason"]), (&json!(9), &json!("length")));
    let usage = next().await;
    assert_eq!((&usage["choices"], &usage["id"]), (&json!([]), &first["id"]));
    assert_eq!(usage["usage"]["completion_tokens"], ids("abc").len());
    assert_eq!((got.event().await.as_deref(), got.event().await), (Some("[DONE]"), None));
}

#[tokio::test]
async fn a_chat_is_one_message_and_a_usage_chunk_comes_only_when_asked_for() {
    let (gateway, worker) = one().await;
    worker.answer_all("ok");
    let got = post(gateway.http, CHAT, json!({ "messages": say("hi") })).await.json().await;
    assert_eq!(got["object"], "chat.completion");
    let message = json!({ "role": "assistant", "content": "ok", "refusal": null });
    assert_eq!(got["choices"][0]["message"], message);
    assert_eq!(got["choices"][0]["finish_reason"], "stop");
    let all = chunks(post(gateway.http, COMPLETIONS, json!({ "prompt": "p", "stream": true })).await).await;
    let text: String = all.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, "ok");
    assert!(all.iter().all(|chunk| chunk.get("usage").is_none() && chunk["object"] == "text_completion"));
}

#[tokio::test]
async fn drafts_come_beside_an_empty_delta() {
    let (gateway, mut worker) = one().await;
    let body = json!({ "messages": say("hi"), "stream": true, "unmask": { "drafts": true, "block_size": 4 } });
    let mut got = post(gateway.http, CHAT, body).await;
    let run = worker.run().await;
    assert!(run.request.stream_drafts);
    got.event().await.unwrap();
    let first_position = run.request.prompt_ids.len() as u32;
    let token_ids = vec![ids("a")[0], 299];
    run.draft(Draft { first_position, token_ids, masked: vec![false, true], step: 2, ..Default::default() }).await;
    let chunk: Value = serde_json::from_str(&got.event().await.unwrap()).unwrap();
    assert_eq!(chunk["choices"][0]["delta"], json!({}));
    let draft = &chunk["unmask"]["draft"];
    assert_eq!((&draft["text"], &draft["step"]), (&json!("a\u{2591}"), &json!(2)));
    assert_eq!((&draft["masked"], &draft["first_position"]), (&json!([false, true]), &json!(first_position)));
    run.finish(FinishReason::Eos).await;
    chunks(got).await;
}

#[tokio::test]
async fn stop_strings_end_text_and_stream() {
    let (gateway, mut worker) = one().await;
    for stop in [json!("return x"), json!(["never", "return x"])] {
        let body = json!({ "prompt": "p", "stop": stop, "stream": true });
        let got = post(gateway.http, COMPLETIONS, body).await;
        let mut run = worker.run().await;
        for id in ids(ANSWER) {
            if !run.commit(&[id]).await {
                break;
            }
        }
        let all = chunks(got).await;
        let text: String = all.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(text, "def f(x):\n    ");
        assert_eq!(all.last().unwrap()["choices"][0]["finish_reason"], "stop");
        run.cancelled().await;
    }
}

#[tokio::test]
async fn prompts_and_suffixes_reach_the_worker_as_ids() {
    let (gateway, mut worker) = one().await;
    let cases = [
        (json!({ "prompt": ["ab"] }), ids("ab")),
        (json!({ "prompt": [1, 2, 3] }), vec![1, 2, 3]),
        (json!({ "prompt": "a", "suffix": "end" }), [&[295], &ids("a")[..], &[296], &ids("end"), &[297]].concat()),
    ];
    for (body, expected) in cases {
        let address = gateway.http;
        let asked = tokio::spawn(async move { post(address, COMPLETIONS, body).await });
        let run = worker.run().await;
        assert_eq!(run.request.prompt_ids, expected);
        run.finish(FinishReason::Eos).await;
        assert_eq!(asked.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn what_is_wrong_is_named_all_at_once() {
    let (gateway, _worker) = one().await;
    let cases = [
        (COMPLETIONS, json!({ "prompt": "" }), "prompt", vec!["prompt: is empty"]),
        (COMPLETIONS, json!({ "prompt": "p", "n": 2, "colour": 1 }), "n", vec!["n: ", "colour: is not supported"]),
        (COMPLETIONS, json!({ "prompt": "p", "temperature": -1, "top_p": 0 }), "temperature", vec!["top_p: "]),
        (COMPLETIONS, json!({ "prompt": "p", "max_tokens": CONTEXT }), "max_tokens", vec!["room"]),
        (
            CHAT,
            json!({ "messages": say("x"), "max_completion_tokens": CONTEXT }),
            "max_completion_tokens",
            vec!["room"],
        ),
        (COMPLETIONS, json!({ "prompt": [1, 9999] }), "prompt[1]", vec!["vocabulary"]),
        (COMPLETIONS, json!({ "prompt": "p", "unmask": { "block_size": 5 } }), "unmask.block_size", vec!["[4]"]),
        (COMPLETIONS, json!({ "prompt": "p", "unmask": { "priority": 500 } }), "unmask.priority", vec!["100"]),
        (CHAT, json!({ "messages": say("x"), "tools": [{ "type": "function" }] }), "tools", vec!["not supported"]),
        (CHAT, json!({ "messages": [] }), "messages", vec!["at least one"]),
        // The template of the test's model refuses system messages.
        (CHAT, json!({ "messages": [{ "role": "developer", "content": "x" }] }), "messages", vec!["no system"]),
    ];
    for (path, body, param, parts) in cases {
        let (status, error) = post(gateway.http, path, body.clone()).await.error().await;
        assert_eq!((status, &error["type"]), (400, &json!("invalid_request_error")), "{body} {error}");
        assert_eq!(error["param"], param, "{body} {error}");
        let message = error["message"].as_str().unwrap();
        assert!(parts.iter().all(|part| message.contains(part)), "{body} {message}");
    }
    let failed = async |method: &str, path: &str, headers: &[(&str, &str)], body: &str| {
        let (status, error) = ask(gateway.http, method, path, headers, body).await.error().await;
        (status, error["code"].as_str().unwrap().to_owned())
    };
    assert_eq!(failed("POST", CHAT, &[JSON], "{").await, (400, "bad_json".into()));
    assert_eq!(failed("POST", CHAT, &[], "{}").await, (415, "content_type".into()));
    assert_eq!(failed("POST", CHAT, &[JSON], &" ".repeat((8 << 20) + 1)).await, (413, "body".into()));
    assert_eq!(failed("GET", CHAT, &[], "").await, (405, "method".into()));
    assert_eq!(failed("POST", "/v1/embeddings", &[JSON], "{}").await, (404, "unknown_url".into()));
}

/// Where a model reads both sides of a gap, its worker gets both, and all of it is the prompt that is counted.
/// Every message of a body is wrong in many ways; what is told of them has a limit.
#[tokio::test]
async fn a_body_full_of_mistakes_is_refused_in_few_words() {
    let (gateway, _worker) = one().await;
    let part = json!({"type": "image_url"});
    for messages in
        [vec![json!({}); 300_000], vec![json!({"a": 1, "b": 2}); 1000], vec![json!({"content": vec![part; 5000]})]]
    {
        let body = json!({"messages": messages, "stream": 3});
        let (status, error) = post(gateway.http, CHAT, body).await.error().await;
        assert_eq!(status, 400);
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("messages") && message.len() < 10_000, "{}", message.len());
    }
}

#[tokio::test]
async fn a_gap_for_masks_is_asked_with_both_sides() {
    let mut worker = Worker::start().await;
    let mut route = worker.route("a", 1);
    let descriptor = route.descriptor.as_mut().unwrap();
    descriptor.capabilities = Some(Capabilities { diffusion: true, infill_by_masks: true, ..Default::default() });
    let gateway = Gateway::start(vec![route]).await;
    for (mut body, gap) in [(json!({ "max_tokens": 5 }), 5), (json!({}), 32)] {
        (body["prompt"], body["suffix"]) = ("a".into(), "end".into());
        let address = gateway.http;
        let asked = tokio::spawn(async move { post(address, COMPLETIONS, body).await });
        let run = worker.run().await;
        let RunRequest { prompt_ids, suffix_ids, settings, .. } = &run.request;
        assert_eq!((prompt_ids, suffix_ids), (&ids("a"), &ids("end")));
        assert_eq!(settings.as_ref().unwrap().max_tokens, gap);
        let filled = ids("bc");
        run.commit_at(ids("a").len() as u32, &filled).await;
        run.finish(FinishReason::Eos).await;
        let answer = asked.await.unwrap().json().await;
        assert_eq!(answer["choices"][0]["text"], "bc");
        let read = ids("a").len() + ids("end").len();
        assert_eq!(answer["usage"]["prompt_tokens"], read);
        assert_eq!(answer["usage"]["completion_tokens"], filled.len());
    }
}

#[tokio::test]
async fn what_a_model_cannot_do_is_a_bad_request() {
    let worker = Worker::start().await;
    let mut route = worker.route("a", 1);
    let descriptor = route.descriptor.as_mut().unwrap();
    descriptor.capabilities = Some(Capabilities { diffusion: true, ..Default::default() });
    let gateway = Gateway::start(vec![route]).await;
    let (status, error) = post(gateway.http, COMPLETIONS, json!({ "prompt": "p", "suffix": "s" })).await.error().await;
    assert_eq!((status, &error["param"]), (400, &json!("suffix")));
    let (status, error) = post(gateway.http, CHAT, json!({ "messages": say("x") })).await.error().await;
    assert_eq!((status, &error["param"]), (400, &json!("messages")));
    assert!(error["message"].as_str().unwrap().contains("chat"), "{error}");
}

#[tokio::test]
async fn models_are_listed_described_and_missed() {
    let (gateway, worker) = one().await;
    let list = get(gateway.http, "/v1/models").await.json().await;
    assert_eq!((&list["object"], list["data"].as_array().unwrap().len()), (&json!("list"), 1));
    let model = get(gateway.http, "/v1/models/tiny").await.json().await;
    assert_eq!(list["data"][0], model);
    assert_eq!((&model["id"], &model["object"]), (&json!("tiny"), &json!("model")));
    assert_eq!((&model["unmask"]["block_sizes"], &model["unmask"]["infill"]), (&json!([4]), &json!(true)));
    let (status, error) = get(gateway.http, "/v1/models/large").await.error().await;
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
    let unknown = json!({ "model": "large", "prompt": "p" });
    let (status, error) = post(gateway.http, COMPLETIONS, unknown).await.error().await;
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
    assert!(error["message"].as_str().unwrap().contains("known models: tiny"), "{error}");

    assert_eq!(get(gateway.http, "/health").await.status, 200);
    gateway.set_routes(vec![]).await;
    assert_eq!(get(gateway.http, "/health").await.status, 503);
    let refused = post(gateway.http, COMPLETIONS, json!({ "model": "tiny", "prompt": "p" })).await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, "1"));
    assert_eq!(refused.json().await["error"]["code"], "no_group");
    gateway.set_routes(vec![worker.route("a", 1)]).await;
    assert_eq!(get(gateway.http, "/health").await.status, 200);
}

#[tokio::test]
async fn keys_and_quotas_are_those_of_grpc() {
    let mut worker = Worker::start().await;
    let tenant = |name: &str, key: &str| RawTenant {
        name: name.into(),
        keys: vec![tenants::digest(key)],
        streams_max: Some(1),
        weight: None,
        rows_per_second: None,
    };
    let all = vec![tenant("harness", KEY), tenant("a", "key-a")];
    let configure = |config: &mut Config| config.tenants = Tenants::new(all).unwrap();
    let gateway = Gateway::configured(vec![worker.route("a", 1)], configure).await;
    let body = json!({ "prompt": "p", "stream": true }).to_string();
    let as_key = async |key: &str| {
        let key = format!("Bearer {key}");
        ask(gateway.http, "POST", COMPLETIONS, &[JSON, ("authorization", &key)], &body).await
    };
    for refused in [post(gateway.http, COMPLETIONS, json!({ "prompt": "p" })).await, as_key("key-b").await] {
        let (status, error) = refused.error().await;
        assert_eq!((status, &error["code"]), (401, &json!("invalid_api_key")));
        assert_eq!(error["type"], "authentication_error");
    }
    assert_eq!(get(gateway.http, "/v1/models").await.status, 401);
    // Probes have no key.
    assert_eq!(get(gateway.http, "/health").await.status, 200);

    let held = as_key("key-a").await;
    let run = worker.run().await;
    let refused = as_key("key-a").await;
    assert_eq!((refused.status, refused.header("retry-after")), (429, "1"));
    let error = refused.json().await["error"].clone();
    assert_eq!((&error["code"], &error["type"]), (&json!("tenant_streams"), &json!("rate_limit_error")));
    run.finish(FinishReason::Eos).await;
    chunks(held).await;
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_its_request() {
    let (gateway, mut worker) = one().await;
    for stream in [true, false] {
        let body = json!({ "prompt": "p", "stream": stream }).to_string();
        let connection = send(gateway.http, "POST", COMPLETIONS, &[JSON], &body).await;
        let mut run = worker.run().await;
        run.commit(&ids("ab")).await;
        drop(connection);
        run.cancelled().await;
    }
}

#[tokio::test]
async fn errors_after_the_beginning_end_a_stream_and_fail_a_whole_answer() {
    let (gateway, mut worker) = one().await;
    let broken = || rich::status(Code::Internal, "STEP_PANICKED", "the step failed");
    let got = post(gateway.http, COMPLETIONS, json!({ "prompt": "p", "stream": true })).await;
    let mut run = worker.run().await;
    run.commit(&ids("ab")).await;
    run.fail(broken()).await;
    let events = got.events().await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    let error = json!({
        "message": "the step failed", "type": "server_error", "param": null, "code": "step_panicked",
    });
    assert_eq!(last, json!({ "error": error }));

    let address = gateway.http;
    let asked = tokio::spawn(async move { post(address, COMPLETIONS, json!({ "prompt": "p" })).await });
    let mut run = worker.run().await;
    run.commit(&ids("ab")).await;
    run.fail(broken()).await;
    assert_eq!(asked.await.unwrap().error().await, (500, error));

    // What is refused before the beginning is no stream.
    *worker.refusal.lock().unwrap() = Some(Status::invalid_argument("no"));
    let got = post(gateway.http, COMPLETIONS, json!({ "prompt": "p", "stream": true })).await;
    assert_eq!(got.error().await.0, 400);
}

#[tokio::test]
async fn a_deadline_of_the_call_is_kept() {
    let (gateway, _worker) = one().await;
    let headers = [JSON, ("grpc-timeout", "200m")];
    let got = ask(gateway.http, "POST", COMPLETIONS, &headers, &json!({ "prompt": "p" }).to_string()).await;
    let (status, error) = got.error().await;
    assert_eq!((status, &error["code"]), (504, &json!("deadline_exceeded")));
}

/// A call that ends by its own deadline says nothing about the group that was being asked.
#[tokio::test]
async fn a_deadline_while_a_group_is_asked_is_not_its_fault() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let worker = Worker::start().await;
    let route = unmask_proto::v1::Route { endpoint: silent.local_addr().unwrap().to_string(), ..worker.route("b", 1) };
    let gateway = Gateway::start(vec![worker.route("a", 1)]).await;
    // The tokenizer comes from the worker, then the only group is one that takes connections and says nothing.
    worker.answer_all("x");
    assert_eq!(post(gateway.http, COMPLETIONS, json!({ "prompt": "p" })).await.status, 200);
    gateway.set_routes(Vec::new()).await;
    gateway.set_routes(vec![route]).await;
    let body = json!({ "prompt": "p" }).to_string();
    let (status, _) =
        ask(gateway.http, "POST", COMPLETIONS, &[JSON, ("grpc-timeout", "300m")], &body).await.error().await;
    assert_eq!(status, 504);
    let models = gateway.client.clone().list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    assert_eq!(models[0].ready_groups, 1);
}

#[tokio::test]
async fn a_gateway_that_drains_lets_streams_end_and_takes_no_more() {
    let (gateway, mut worker) = one().await;
    let address = gateway.http;
    let held = post(address, COMPLETIONS, json!({ "prompt": "p", "stream": true })).await;
    let mut run = worker.run().await;
    let ended = gateway.stop();
    within(async { while get(address, "/health").await.status != 503 {} }).await;
    let (status, error) = post(address, COMPLETIONS, json!({ "prompt": "p" })).await.error().await;
    assert_eq!((status, &error["code"]), (503, &json!("gateway_stopping")));
    run.commit(&ids("ab")).await;
    run.finish(FinishReason::Eos).await;
    assert_eq!(chunks(held).await.last().unwrap()["choices"][0]["finish_reason"], "stop");
    within(ended).await.unwrap().unwrap();
}
