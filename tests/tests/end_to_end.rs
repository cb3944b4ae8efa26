//! A whole cluster over loopback sockets: what clients of any kind see.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use unmask::args::{Dtype, ModelArgs};
use unmask::local::{Cluster, Gateway as Client, Listeners};
use unmask_proto::v1::generate_request::Input;
use unmask_proto::v1::generate_response::Event;
use unmask_proto::v1::{Decoding, Finish, GenerateRequest, TokenizeRequest};

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

struct Running {
    cluster: Cluster,
    client: Client,
    _data: tempfile::TempDir,
}

async fn start() -> Running {
    start_model(Path::new("golden/sdar")).await
}

/// With another model, by its path (from this package).
async fn start_model(model: &Path) -> Running {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join(model);
    let model = ModelArgs {
        model: Some(model.to_str().unwrap().into()),
        dtype: Dtype::F32,
        threads: 2,
        overrides: Default::default(),
    };
    let data = tempfile::tempdir().unwrap();
    let listeners = Listeners::bind(LOCAL, 0).await.unwrap().with_http(None, LOCAL, 0).await.unwrap();
    let mut cluster = Cluster::start(listeners, &model, data.path().to_owned()).unwrap();
    let client = cluster.ready().await.unwrap();
    Running { cluster, client, _data: data }
}

fn request(text: &str, seed: u64) -> GenerateRequest {
    let decoding = Decoding { max_tokens: Some(40), seed: Some(seed), temperature: Some(0.9), ..Decoding::default() };
    GenerateRequest { input: Some(Input::Text(text.into())), decoding: Some(decoding), ..GenerateRequest::default() }
}

#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    text: String,
    finish: Option<Finish>,
}

async fn generate(mut client: Client, request: GenerateRequest) -> Result<Answer, tonic::Status> {
    let mut events = client.generate(request).await?.into_inner();
    let mut answer = Answer::default();
    let mut next = None;
    while let Some(message) = events.message().await? {
        match message.event.unwrap() {
            Event::Started(started) => next = Some(started.prompt_tokens),
            Event::Draft(_) => {}
            Event::Commit(commit) => {
                // I5: in order, and once.
                assert_eq!(Some(commit.first_position), next);
                next = Some(commit.first_position + commit.token_ids.len() as u32);
                answer.tokens.extend(commit.token_ids);
                answer.text += &commit.text;
            }
            Event::Finish(finish) => {
                answer.text += &finish.text;
                answer.finish = Some(finish);
            }
        }
    }
    assert!(answer.finish.is_some(), "I6: a stream ended without a finish");
    Ok(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_gives_the_same_tokens_alone_and_beside_sixteen_others() {
    let running = start().await;
    let alone = generate(running.client.clone(), request("def f(x):", 7)).await.unwrap();
    let others: Vec<_> =
        (0..16).map(|i| tokio::spawn(generate(running.client.clone(), request("for i in", 100 + i)))).collect();
    let beside = generate(running.client.clone(), request("def f(x):", 7)).await.unwrap();
    for other in others {
        other.await.unwrap().unwrap();
    }
    assert_eq!(alone.tokens, beside.tokens);
    assert_eq!(alone.text, beside.text);
    running.cluster.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_streams_at_once_all_end_with_their_own_tokens() {
    let running = start().await;
    let ask = |i: u64| generate(running.client.clone(), request("def f(x):", i % 10));
    let streams: Vec<_> = (0..200).map(|i| tokio::spawn(ask(i))).collect();
    let mut answers = Vec::new();
    for stream in streams {
        answers.push(stream.await.unwrap().unwrap().tokens);
    }
    for (i, tokens) in answers.iter().enumerate() {
        assert_eq!(*tokens, answers[i % 10], "stream {i}");
    }
    running.cluster.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_vanish_or_stop_reading_leave_the_others_alone() {
    let running = start().await;
    let mut held = Vec::new();
    for i in 0..20 {
        let mut client = running.client.clone();
        let mut events = client.generate(request("def f(x):", i)).await.unwrap().into_inner();
        events.message().await.unwrap();
        // Half are dropped here, half are never read again.
        if i % 2 == 0 {
            held.push(events);
        }
    }
    let ask = generate(running.client.clone(), request("def f(x):", 1));
    tokio::time::timeout(Duration::from_secs(60), ask).await.unwrap().unwrap();
    drop(held);
    running.cluster.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mask_typed_in_a_prompt_is_text() {
    let running = start().await;
    let mut client = running.client.clone();
    let tokenize = TokenizeRequest { text: "<|MASK|>".into(), ..TokenizeRequest::default() };
    let literal = client.tokenize(tokenize.clone()).await.unwrap().into_inner().ids;
    let parsed = client.tokenize(TokenizeRequest { parse_special: true, ..tokenize }).await.unwrap().into_inner().ids;
    assert_eq!(parsed, [299]);
    assert!(literal.len() > 1 && !literal.contains(&299));
    running.cluster.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_bounds_the_whole_stream() {
    let running = start().await;
    let mut long = request("def f(x):", 1);
    long.decoding.as_mut().unwrap().max_tokens = Some(4000);
    let mut timed = tonic::Request::new(long);
    timed.set_timeout(Duration::from_millis(1));
    let mut client = running.client.clone();
    let ended = async {
        let mut events = client.generate(timed).await?.into_inner();
        while events.message().await?.is_some() {}
        Ok::<(), tonic::Status>(())
    };
    let status = ended.await.unwrap_err();
    let codes = [tonic::Code::DeadlineExceeded, tonic::Code::Cancelled];
    assert!(codes.contains(&status.code()), "{status}");
    running.cluster.stop().await.unwrap();
}

/// Runs a script of `python/` with the interpreter that `./test` installs; `None` where there is none.
async fn python(script: &str, arguments: &[&str]) -> Option<serde_json::Value> {
    let Ok(python) = std::env::var("UNMASK_TEST_PYTHON") else {
        assert!(
            std::env::var("CI").is_err(),
            "UNMASK_TEST_PYTHON must name a Python that ./test installed: run ./test"
        );
        return None;
    };
    let mut command = Command::new(python);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("python").join(script)).args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// A client made with grpcio from the .proto files alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_made_from_the_proto_files_alone_is_served() {
    let running = start().await;
    let protos = concat!(env!("CARGO_MANIFEST_DIR"), "/../proto");
    let address = running.cluster.gateway.to_string();
    if let Some(said) = python("client.py", &[protos, &address, "def f(x):"]).await {
        assert_eq!(said["models"], serde_json::json!(["sdar"]));
        assert!(!said["tokens"].as_array().unwrap().is_empty());
        assert_eq!(said["origins"]["seed"], "request");
        assert_eq!(said["bad"]["code"], "INVALID_ARGUMENT");
        let details = said["bad"]["message"].as_str().unwrap();
        assert!(details.contains("text") && details.contains("temperature"), "{details}");
    }
    running.cluster.stop().await.unwrap();
}

/// A copy of the small SDAR that has a chat template.
fn talker(folder: &Path) -> PathBuf {
    let model = folder.join("talker");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/sdar")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ";
    std::fs::write(model.join("chat_template.jinja"), template).unwrap();
    model
}

/// OpenAI's own client, with a model that fills in, and one that chats.
#[tokio::test(flavor = "multi_thread")]
async fn the_python_client_of_openai_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let models = [(Path::new("../models/python-tasks-3m").to_owned(), false), (talker(folder.path()), true)];
    for (model, chats) in models {
        let running = start_model(&model).await;
        let url = format!("http://{}/v1", running.cluster.http.unwrap());
        if let Some(said) = python("openai_client.py", &[&url]).await {
            assert_eq!(said["models"].as_array().unwrap().len(), 1);
            assert!(!said["completion"]["text"].as_str().unwrap().is_empty());
            assert!(said["completion"]["unmask"]["nfe"].as_u64().unwrap() > 0);
            // Text, or how it was refused.
            assert_eq!((said["chat"].is_string(), said["infill"].is_string()), (chats, !chats));
            assert_eq!(said["bad"]["model"]["class"], "NotFoundError");
            assert_eq!(said["bad"]["fields"]["param"], "n");
        }
        running.cluster.stop().await.unwrap();
    }
}
