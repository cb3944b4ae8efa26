//! A Python client, made from the .proto files, whose gateway is killed under it.

use super::processes::{Cluster, LIMIT};
use super::{TOKENS, request, stream};
use serde_json::Value;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// Commits before the gateway is killed: the stream is well under way and far from its end.
const COMMITS_BEFORE: usize = 5;

/// A running `resume.py`.
struct Client {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Client {
    /// `None` where `./test` has installed no Python.
    fn start(gateways: &[String], prompt: &str, seed: u64) -> Option<Client> {
        let Ok(python) = std::env::var("UNMASK_TEST_PYTHON") else {
            assert!(
                std::env::var("CI").is_err(),
                "UNMASK_TEST_PYTHON must name a Python that ./test installed: run ./test"
            );
            return None;
        };
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
        let (seed, tokens) = (seed.to_string(), TOKENS.to_string());
        let mut child = Command::new(python)
            .args([&format!("{root}/tests/python/resume.py"), &format!("{root}/proto"), &gateways.join(","), prompt])
            .args(["--max-tokens", &tokens, "--seed", &seed, "--temperature", "0.9"])
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Some(Client { child, lines })
    }

    async fn line(&mut self) -> Value {
        let line = tokio::time::timeout(LIMIT, self.lines.next_line()).await.expect("the client goes on");
        serde_json::from_str(&line.unwrap().expect("the client says how it ended")).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_goes_on_through_the_next_gateway() {
    let mut cluster = Cluster::start(2, 1).await;
    let endpoints = cluster.endpoints();
    let expected = stream(&endpoints[1..], 0).await.unwrap().seen;
    let request = request(0);
    let Some(unmask_proto::v1::generate_request::Input::Text(prompt)) = request.input else { panic!("no text") };
    let Some(mut client) = Client::start(&endpoints, &prompt, request.decoding.unwrap().seed.unwrap()) else { return };
    let mut next = client.line().await["prompt_tokens"].as_u64().unwrap();
    let (mut tokens, mut commits) = (Vec::new(), 0);
    let end = loop {
        let line = client.line().await;
        let Some(position) = line["position"].as_u64() else { break line };
        // In order, once, without a gap, also where the gateway changed.
        assert_eq!(position, next);
        let ids: Vec<u32> = serde_json::from_value(line["tokens"].clone()).unwrap();
        next += ids.len() as u64;
        tokens.extend(ids);
        commits += 1;
        if commits == COMMITS_BEFORE {
            cluster.gateways.remove(0).kill();
        }
    };
    assert!(client.child.wait().await.unwrap().success());
    assert_eq!(end["resumed"], 1, "the gateway was killed in the middle of the stream");
    assert_eq!((tokens, end["text"].as_str().unwrap()), (expected.tokens, expected.text.as_str()));
}
