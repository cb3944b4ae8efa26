//! `unmask bench`: what is counted adds up. Speeds are not looked at.
#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Output};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use unmask::args::{Dtype, ModelArgs};
use unmask::bench::serve::load;
use unmask::bench::serve::observe::Outcome;
use unmask::bench::serve::progress::Progress;
use unmask::bench::serve::prompts::Prompts;
use unmask::bench::serve::schedule::Schedule;
use unmask::bench::serve::summary::{Ended, Load};
use unmask::bench::serve::target::{Questions, Target};
use unmask::local::{Cluster, Listeners};
use unmask::tls::ClientTlsArgs;
use unmask_proto::v1::Decoding;

/// Runs a small load on the bundled model in this process.
fn serve(flags: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_unmask"))
        .args("bench serve --dtype f32 --threads 2 --warmup 1".split(' ').chain(flags.split(' ')))
        .env("RUST_LOG", "error")
        .output()
        .unwrap()
}

fn report(flags: &str) -> Value {
    let output = serve(&format!("{flags} --json"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Checks the sums of a load point and gives its counts.
fn counts(run: &Value) -> [u64; 4] {
    let requests = &run["requests"];
    let count = |key: &str| requests[key].as_u64().unwrap();
    let failed: u64 = requests["failed"].as_object().unwrap().values().map(|f| f["count"].as_u64().unwrap()).sum();
    assert_eq!(count("due"), count("sent") + count("shed"), "{run:#}");
    assert_eq!(count("sent"), count("ok") + failed + count("cut_off"), "{run:#}");
    assert_eq!(run["end_to_end_ms"]["samples"], count("ok"));
    assert_eq!(run["send_lag_ms"]["samples"], count("sent"));
    [count("due"), count("ok"), failed, count("shed")]
}

fn json(command: &str) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_unmask")).args(command.split(' ')).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
#[cfg(feature = "train")]
fn a_comparison_with_autoregressive_decoding_adds_up() {
    let all = json("bench twin --model python-tasks-3m --tasks 20 --streams 1,2 --json");
    let all = all.as_array().unwrap();
    assert_eq!(all.iter().map(|c| c["streams"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    for compared in all {
        let number = |path: &str| compared.pointer(path).and_then(Value::as_f64).unwrap();
        let quotient = |key: &str, of: &str, over: &str| {
            let expected = number(of) / number(over);
            assert!((number(key) / expected - 1.0).abs() < 1e-9, "{key}: {compared:#}");
        };
        quotient("/pass_ratio", "/twin/passes", "/diffusion/passes");
        quotient("/ratio", "/diffusion/tokens_per_s", "/twin/tokens_per_s");
        quotient("/diffusion/tpf", "/diffusion/tokens", "/diffusion/passes");
        let ceiling = number("/diffusion/tpf") * number("/twin_step/ms") / number("/diffusion_step/ms");
        assert!((number("/ceiling") - ceiling).abs() < 1e-9);
        // Causal rows decide, so the same weights give the same answers in far fewer passes.
        assert_eq!(number("/diffusion/tokens"), number("/twin/tokens"));
        assert_eq!(compared["pass_difference"], serde_json::json!([0.0, 0.0]));
        assert!(number("/pass_ratio") > 4.0 && number("/diffusion/pass_rate") > 0.9, "{compared:#}");
    }
    assert_eq!(all[0].pointer("/twin_step/rows").unwrap(), 1);
}

#[test]
fn a_step_is_the_sum_of_its_operations() {
    let all = json("bench step --shape python-tasks-3m --dtype bf16,int8 --rows 1,16 --context 16 --threads 2 --json");
    let all = all.as_array().unwrap();
    let kinds: Vec<_> = all.iter().map(|m| (m["dtype"].as_str().unwrap(), m["rows"].as_u64().unwrap())).collect();
    assert_eq!(kinds, [("bf16", 1), ("bf16", 16), ("int8", 1), ("int8", 16)]);
    for measured in all {
        let number = |value: &Value, key: &str| value[key].as_f64().unwrap();
        let operations = measured["operations"].as_array().unwrap();
        let floor: f64 = operations.iter().map(|part| number(part, "floor_ms")).sum();
        assert!((floor / number(measured, "floor_ms") - 1.0).abs() < 1e-9 && floor > 0.0);
        let spent: f64 = operations.iter().map(|part| number(part, "ms")).sum();
        // Medians of parts and of the whole are of different steps.
        assert!(spent > 0.5 * number(measured, "ms") && spent < 2.0 * number(measured, "ms"), "{measured:#}");
        assert!(number(&measured["memory"], "packed_weights_bytes") > 2e6);
        assert_eq!(measured["roof"]["threads"], 2);
    }
}

#[test]
fn streams_are_measured_beside_the_bare_step() {
    let all = json("bench streams --shape python-tasks-3m --streams 2,3 --context 16 --threads 2 --json");
    let rows: Vec<_> = all.as_array().unwrap().iter().map(|m| m["rows"].as_u64().unwrap()).collect();
    assert_eq!(rows, [32, 48]);
    // Nine blocks of four passes, of which all but the last block's first store the block before.
    assert!(all.as_array().unwrap().iter().all(|m| m["steps"].as_u64().unwrap() >= 24), "{all:#}");
}

#[test]
fn a_gateway_is_measured_beside_the_direct_way() {
    let all = json("bench gateway --streams 1,8 --requests 8 --saturation-s 1 --idle 40 --repeats 2 --json");
    assert_eq!(all["format"], "unmask.bench-gateway/1");
    let latency = all["latency"].as_array().unwrap();
    let counts: Vec<_> = latency.iter().map(|m| (m["streams"].as_u64(), m["requests"].as_u64())).collect();
    assert_eq!(counts, [(Some(1), Some(8)), (Some(8), Some(16))]);
    for measured in latency {
        for what in ["first_event", "block"] {
            assert!(measured[what]["gateway_p99_ms"]["max"].as_f64().unwrap() > 0.0, "{measured:#}");
        }
    }
    for what in ["direct_per_s", "gateway_per_s", "gateway_cpu_us"] {
        assert!(all["saturated"][what]["min"].as_f64().unwrap() > 0.0, "{all:#}");
    }
    assert_eq!(all["idle"]["streams"], 40);
}

#[test]
fn the_automatic_policy_is_measured_beside_every_setting_that_is_good_enough() {
    let all = json("bench policy --closed 1,3 --repeats 2 --duration 300ms --settle 2s --max-tokens 24 --json");
    assert_eq!(all["format"], "unmask.bench-policy/1");
    let loads = all["loads"].as_array().unwrap();
    assert_eq!(loads.len(), 2);
    for load in loads {
        let sides = load["sides"].as_array().unwrap();
        assert!(sides[0]["setting"].is_null() && sides[1..].iter().all(|side| side["setting"].is_object()));
        assert!(sides.iter().any(|side| side["setting"]["block_size"] == 1), "autoregressive is among them: {load:#}");
        assert!(sides.iter().all(|side| side["tokens_per_s"].as_array().unwrap().len() == 2));
        assert!(load["before"]["setting"].is_object(), "a setting is in force: {load:#}");
    }
}

#[test]
fn an_open_loop_sends_every_request_of_its_schedule() {
    let all = report("--rate 20,40 --requests 6 --max-tokens 24 --block-size 8 --policy threshold=0.9 --seed 3");
    assert_eq!(all["format"], "unmask.bench-serve/1");
    assert_eq!(all["cluster"], "in process");
    assert_eq!(all["settings"]["block_size"], 8);
    assert_eq!(all["settings"]["max_tokens"], 24);
    let runs = all["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    for run in runs {
        assert_eq!(counts(run), [6, 6, 0, 0]);
        assert_eq!((&run["load"]["loop"], &run["ended"]), (&"open".into(), &"complete".into()));
        let tokens = &run["tokens"];
        assert!(tokens["committed"].as_u64().unwrap() <= 6 * 24);
        assert!(tokens["passes"].as_u64().unwrap() > 0 && tokens["per_pass"].as_f64().unwrap() > 0.0);
        assert_eq!(run["first_block_ms"]["samples"], 6);
        assert_eq!(run["goodput"]["requests"], 6);
    }
    // The same questions at either rate.
    assert_eq!(runs[0]["tokens"]["committed"], runs[1]["tokens"]["committed"]);
}

#[test]
fn a_closed_loop_keeps_its_streams_busy() {
    let all = report("--closed 1,3 --requests 5 --max-tokens 16");
    for (run, streams) in all["runs"].as_array().unwrap().iter().zip([1, 3]) {
        assert_eq!(counts(run), [5, 5, 0, 0]);
        assert_eq!(run["load"], serde_json::json!({ "loop": "closed", "streams": streams }));
    }
    let all = report("--closed 2 --duration 300ms --max-tokens 64");
    let [due, ok, failed, shed] = counts(&all["runs"][0]);
    assert!(due >= 2 && ok <= due && (failed, shed) == (0, 0));
}

#[test]
fn what_comes_over_the_cap_is_shed_and_failures_end_nothing() {
    let flags = "--arrivals burst --burst-size 8 --rate 100 --requests 16 --concurrency-max 1 --max-tokens 64";
    let all = report(flags);
    let [due, ok, failed, shed] = counts(&all["runs"][0]);
    assert_eq!((due, failed), (16, 0));
    assert_eq!(ok + shed, 16);

    let output = serve("--rate 50 --requests 4 --block-size 5 --json");
    assert_eq!(output.status.code(), Some(1));
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(counts(&all["runs"][0]), [4, 0, 4, 0]);
    assert_eq!(all["runs"][0]["requests"]["failed"]["INVALID_ARGUMENT"]["count"], 4);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("block_size") && error.lines().count() == 1, "{error}");
}

#[test]
fn people_get_a_table_and_one_line_when_nothing_can_be_measured() {
    let output = serve("--rate 50 --requests 2 --max-tokens 8 --slo-first-block-ms 60000");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    for part in ["open 50/s", "requests due", "tokens per pass", "first block came within 60000 ms"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    for (flags, part) in [
        ("--endpoint http://127.0.0.1:1", "127.0.0.1:1"),
        ("--prompts no-such-file", "no-such-file"),
        ("--rate 0.0001 --duration 1s --arrivals poisson", "no request"),
        ("--rate 100000 --duration 1h", "200000"),
    ] {
        let output = serve(flags);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{flags}: {error}");
        assert!(error.contains(part) && error.lines().count() == 1, "{flags}: {error}");
    }
    assert_eq!(serve("--closed 8 --rate 4").status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_keeps_what_it_saw() {
    let model = ModelArgs { model: None, dtype: Dtype::F32, threads: 2, overrides: Default::default() };
    let data = tempfile::tempdir().unwrap();
    let listeners = Listeners::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), 0).await.unwrap();
    let mut cluster = Cluster::start(listeners, &model, data.path().to_owned()).unwrap();
    cluster.ready().await.unwrap();
    let questions = Questions {
        seed: 1,
        prompts: Prompts::built_in(),
        decoding: Decoding { max_tokens: Some(64), ..Decoding::default() },
        timeout: Duration::from_secs(60),
    };
    let target =
        Target::connect(&cluster.gateway.to_string(), &ClientTlsArgs::default(), None, 200, questions).await.unwrap();

    // One request now, and one that nobody will wait for.
    let hour = Duration::from_secs(3600);
    let schedule = Schedule { starts: vec![Duration::ZERO, hour], span: 2 * hour };
    let load = Load::Open { rate: 1.0, arrivals: "uniform" };
    let stop = CancellationToken::new();
    let progress = Progress::new("open".into(), Some(2));
    let interrupt = async {
        while target.resolved().is_none() {
            tokio::task::yield_now().await;
        }
        stop.cancel();
    };
    let (recording, ()) = tokio::join!(load::open(&target, load, &schedule, 8, &stop, progress), interrupt);
    assert_eq!((recording.ended, recording.observations.len(), recording.shed), (Ended::Interrupted, 1, 0));
    assert!(recording.span < hour);
    assert!(!matches!(recording.observations[0].outcome, Outcome::Failed { .. }));
    cluster.stop().await.unwrap();
}
