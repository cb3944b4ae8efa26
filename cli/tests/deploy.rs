//! What `deploy/` says is what the binary takes, and its YAML is YAML. Nothing is deployed.
#![allow(clippy::unwrap_used)]

use clap::Parser;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use unmask::args::Cli;

/// How long closing takes after the drain limit, at most (seconds): connections, and threads that end.
const CLOSING_S: u64 = 10;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn text(file: &str) -> String {
    std::fs::read_to_string(folder().join(file)).unwrap()
}

fn accepted(words: &[String]) {
    let words = std::iter::once("unmask").chain(words.iter().map(String::as_str));
    let words: Vec<&str> = words.collect();
    if let Err(error) = Cli::try_parse_from(&words) {
        panic!("{words:?}: {error}");
    }
}

/// Arguments of the image in a YAML file. They are written as JSON, which is YAML too, one list a line.
fn lists(file: &str, key: &str) -> Vec<Vec<String>> {
    let text = text(file);
    let lists = text.lines().filter_map(|line| line.trim().strip_prefix(key));
    lists.map(|list| serde_json::from_str(list).unwrap()).collect()
}

/// The documents of a YAML file by way of Python's yaml; `None` where there is none.
fn yaml(file: &str) -> Option<Vec<Value>> {
    let script = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))";
    let tested = std::env::var("UNMASK_TEST_PYTHON").ok();
    for python in tested.iter().map(String::as_str).chain(["python3"]) {
        let found = Command::new(python).args(["-c", "import yaml"]).output();
        if !found.is_ok_and(|found| found.status.success()) {
            continue;
        }
        let output = Command::new(python).args(["-c", script]).arg(folder().join(file)).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return Some(serde_json::from_slice(&output.stdout).unwrap());
    }
    None
}

#[test]
fn every_command_line_is_one_that_the_binary_takes() {
    let (compose, kubernetes) = (lists("compose.yaml", "command: "), lists("kubernetes.yaml", "args: "));
    let roles = |all: &[Vec<String>]| all.iter().map(|words| words[0].clone()).collect::<Vec<_>>();
    assert_eq!(roles(&compose), ["controller", "gateway", "worker", "worker"]);
    assert_eq!(roles(&kubernetes), ["controller", "gateway", "worker"]);
    compose.iter().chain(&kubernetes).for_each(|words| accepted(words));
    assert!(text("Dockerfile").contains("ENTRYPOINT [\"unmask\"]"));
    let readme = text("README.md");
    let typed = readme.lines().filter_map(|line| {
        line.split_once("unmask ").filter(|(before, _)| {
            // Typed here or in a container, and no image's or file's name.
            before.is_empty() || before.ends_with("exec controller ")
        })
    });
    let typed: Vec<&str> = typed.map(|(_, words)| words).collect();
    assert_eq!(typed.len(), 3, "{typed:?}");
    for words in typed {
        // One quoted word at the end is all the quoting there is.
        let (plain, quoted) = words.split_once('"').unwrap_or((words, ""));
        let quoted = quoted.strip_suffix('"').map(str::to_owned);
        accepted(&plain.split_whitespace().map(str::to_owned).chain(quoted).collect::<Vec<_>>());
    }
}

#[test]
fn compose_has_every_service_and_lets_it_drain() {
    let Some(documents) = yaml("compose.yaml") else { return };
    let services = documents[0]["services"].as_object().unwrap();
    let names: Vec<&str> = services.keys().map(String::as_str).collect();
    assert_eq!(names, ["controller", "gateway", "worker-1", "worker-2"]);
    for (name, service) in services {
        assert_eq!((&service["image"], &service["stop_grace_period"]), (&"unmask".into(), &"40s".into()), "{name}");
        let address = service["command"][2].as_str().unwrap();
        // It tells the others the address that it listens on.
        assert!(name == "gateway" || address.split(':').next() == service["hostname"].as_str(), "{name}: {address}");
    }
}

#[test]
fn manifests_probe_the_ports_that_are_listened_on_and_outlast_the_drain_limit() {
    let Some(documents) = yaml("kubernetes.yaml") else { return };
    let named = |kind: &str| {
        let of_kind = documents.iter().filter(|document| document["kind"] == kind);
        of_kind.map(|document| document["metadata"]["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(named("Deployment"), ["controller", "gateway"]);
    assert_eq!(named("StatefulSet"), ["worker"]);
    let drain = unmask_gateway::config::DRAIN_LIMIT.max(unmask_worker::config::DRAIN_LIMIT).as_secs();
    for document in documents.iter().filter(|document| document["spec"]["template"].is_object()) {
        let name = document["metadata"]["name"].as_str().unwrap();
        assert!(named("Service").contains(&name.to_owned()), "{name} has a service");
        let template = &document["spec"]["template"];
        assert_eq!(document["spec"]["selector"]["matchLabels"], template["metadata"]["labels"], "{name}");
        let grace = template["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
        assert_eq!(grace, drain + CLOSING_S, "{name}");
        let container = &template["spec"]["containers"][0];
        let listen = container["args"][2].as_str().unwrap();
        let port = container["readinessProbe"]["grpc"]["port"].as_u64().unwrap();
        assert!(listen.ends_with(&format!(":{port}")), "{name} listens on {listen} and is probed at {port}");
        assert_eq!(container["ports"][0]["containerPort"], port, "{name}");
    }
}
