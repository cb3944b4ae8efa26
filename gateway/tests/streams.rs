//! Streams through a gateway: text, stops, continuation, cancellation, deadlines, many at once.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use harness::{Gateway, LIMIT, Run, TOKENIZER, Worker, ids, text, with, within};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use unmask_gateway::Config;
use unmask_proto::v1::{Capabilities, Decoding, Draft, FinishReason, GenerateRequest, Resume};

const ANSWER: &str = "def f(x):\n    return x + 1\n";

async fn one() -> (Gateway, Worker) {
    let worker = Worker::start().await;
    (Gateway::start(vec![worker.route("a", 1)]).await, worker)
}

async fn two() -> (Gateway, Worker, Worker) {
    let (first, second) = (Worker::start().await, Worker::start().await);
    (Gateway::start(vec![first.route("a", 1), second.route("b", 1)]).await, first, second)
}

/// The run, wherever it went, and the other worker.
async fn whichever(a: &mut Worker, b: &mut Worker) -> (Run, bool) {
    tokio::select! {
        run = a.run() => (run, true),
        run = b.run() => (run, false),
    }
}

#[tokio::test]
async fn a_stream_begins_with_its_settings_and_ends_with_its_account() {
    let (gateway, mut worker) = one().await;
    let mut stream = gateway.generate(text("# sum\n")).await.unwrap();
    let started = stream.started().await;
    let prompt = ids("# sum\n");
    assert_eq!((started.model.as_str(), started.prompt_tokens), ("tiny", prompt.len() as u32));
    let settings = started.settings.unwrap();
    assert_eq!((settings.max_tokens, settings.origins["max_tokens"].as_str()), (256, "model"));
    let mut run = worker.run().await;
    assert_eq!((&run.request.prompt_ids, run.request.epoch, run.timeout.as_ref()), (&prompt, 1, None));
    assert_eq!((run.request.settings.as_ref(), &run.request.request_id), (Some(&settings), &started.request_id));
    let answer = ids(ANSWER);
    run.commit(&answer[..4]).await;
    // Committed text is there before the stream goes on.
    let commit = stream.commit().await;
    assert_eq!((commit.first_position, commit.text), (prompt.len() as u32, TOKENIZER.decode(&answer[..4], true)));
    run.commit(&answer[4..]).await;
    run.finish(FinishReason::Eos).await;
    let output = stream.all().await.unwrap();
    assert_eq!(output.text, TOKENIZER.decode(&answer[4..], true));
    let finish = output.finish.unwrap();
    assert_eq!((finish.reason(), finish.nfe), (FinishReason::Eos, 9));
    assert_eq!(finish.usage.unwrap().completion_tokens, answer.len() as u32);
    assert!(finish.time_to_first_block_us > 0 && finish.total_time_us >= finish.time_to_first_block_us);
}

#[tokio::test]
async fn a_stop_string_over_commits_cuts_the_text_and_cancels_the_worker() {
    let (gateway, mut worker) = one().await;
    let decoding = Decoding { stop: vec!["return x".into()], ..Default::default() };
    let stream = gateway.generate(with("p", decoding)).await.unwrap();
    let mut run = worker.run().await;
    for id in ids(ANSWER) {
        if !run.commit(&[id]).await {
            break;
        }
    }
    let output = stream.all().await.unwrap();
    assert_eq!(output.text, "def f(x):\n    ");
    let finish = output.finish.unwrap();
    assert_eq!(finish.reason(), FinishReason::Stop);
    assert_eq!(finish.usage.unwrap().completion_tokens as usize, output.ids.len());
    assert!(TOKENIZER.decode(&output.ids, true).contains("return x"));
    run.cancelled().await;
}

#[tokio::test]
async fn no_commit_ends_in_half_a_character() {
    let (gateway, mut worker) = one().await;
    let answer = ids("aé漢😀b");
    assert!(answer.len() > 5, "the tokenizer splits characters");
    let stream = gateway.generate(text("p")).await.unwrap();
    let mut run = worker.run().await;
    for &id in &answer {
        run.commit(&[id]).await;
    }
    // Ends in the middle of a character.
    run.commit(&ids("漢")[..1]).await;
    run.finish(FinishReason::Length).await;
    let output = stream.all().await.unwrap();
    assert_eq!(output.text, "aé漢😀b\u{FFFD}");
    assert!(output.commits.iter().all(|commit| !commit.text.contains('\u{FFFD}')));
}

#[tokio::test]
async fn a_broken_stream_goes_on_with_another_group_and_the_client_sees_nothing() {
    let (gateway, mut a, mut b) = two().await;
    let answer = ids(ANSWER);
    for status in [None, Some(Status::unavailable("going down")), Some(Status::internal("h2 protocol error"))] {
        let mut stream = gateway.generate(text("p")).await.unwrap();
        let (mut run, at_a) = whichever(&mut a, &mut b).await;
        let request = run.request.clone();
        run.commit(&answer[..3]).await;
        run.commit(&answer[3..7]).await;
        stream.started().await;
        stream.commit().await;
        let before = stream.commit().await;
        assert_eq!(before.epoch, request.epoch);
        match status {
            Some(status) => run.fail(status).await,
            None => drop(run),
        }
        let run = if at_a { b.run().await } else { a.run().await };
        assert_eq!((&run.request.prompt_ids, &run.request.settings), (&request.prompt_ids, &request.settings));
        assert_eq!((&run.request.committed_ids[..], run.request.passes_used), (&answer[..7], 4));
        // The second group begins at its last block boundary: one position twice.
        let begin = request.prompt_ids.len() as u32 + 6;
        run.commit_at(begin, &answer[6..]).await;
        run.finish(FinishReason::Eos).await;
        let output = stream.all().await.unwrap();
        assert_eq!(output.ids, answer[7..]);
        assert!(output.commits.iter().all(|commit| !commit.group_id.is_empty() && commit.group_id != before.group_id));
        assert_eq!(output.finish.unwrap().blocks_recomputed, 1);
    }
}

/// What stands behind a gap goes along, and never to a group that would not read it.
#[tokio::test]
async fn a_gap_goes_on_only_with_groups_that_read_both_sides() {
    let (mut a, mut b, old) = (Worker::start().await, Worker::start().await, Worker::start().await);
    let mut routes = vec![a.route("a", 1), b.route("b", 2), old.route("old", 3)];
    for (route, infill_by_masks) in routes.iter_mut().zip([true, true, false]) {
        let capabilities = Capabilities { diffusion: true, infill_by_masks, ..Default::default() };
        route.descriptor.as_mut().unwrap().capabilities = Some(capabilities);
    }
    let gateway = Gateway::start(routes).await;
    let gap = GenerateRequest {
        suffix: Some("end".into()),
        ..with("p", Decoding { max_tokens: Some(8), ..Default::default() })
    };
    let answer = ids(ANSWER);
    for _ in 0..4 {
        let mut stream = gateway.generate(gap.clone()).await.unwrap();
        let (mut run, at_a) = whichever(&mut a, &mut b).await;
        let (prompt, suffix) = (run.request.prompt_ids.clone(), run.request.suffix_ids.clone());
        assert_eq!((&prompt, &suffix), (&ids("p"), &ids("end")));
        run.commit(&answer[..4]).await;
        let started = stream.started().await;
        let read = (prompt.len() + suffix.len()) as u32;
        assert_eq!((started.first_position, started.prompt_tokens), (prompt.len() as u32, read));
        stream.commit().await;
        run.fail(Status::unavailable("going down")).await;
        let run = if at_a { b.run().await } else { a.run().await };
        assert_eq!((&run.request.prompt_ids, &run.request.suffix_ids), (&prompt, &suffix));
        assert_eq!(run.request.committed_ids, answer[..4]);
        run.finish(FinishReason::Eos).await;
        stream.all().await.unwrap();
    }
}

#[tokio::test]
async fn prompts_that_begin_alike_go_to_one_group_and_to_the_other_when_that_breaks() {
    let (gateway, mut a, mut b) = two().await;
    let preamble = "def is_prime(n):\n    return all(n % i for i in range(2, n))\n".repeat(8);
    assert!(ids(&preamble).len() > 64);
    let mut taken = Vec::new();
    for turn in 0..10 {
        let stream = gateway.generate(text(&format!("{preamble}# {turn}\n"))).await.unwrap();
        let (run, at_a) = whichever(&mut a, &mut b).await;
        taken.push(at_a);
        run.finish(FinishReason::Eos).await;
        stream.all().await.unwrap();
    }
    assert!(taken.iter().all(|at_a| *at_a == taken[0]), "{taken:?}");
    let (preferred, mut other) = if taken[0] { (a, b) } else { (b, a) };
    *preferred.refusal.lock().unwrap() = Some(Status::unavailable("gone"));
    let stream = gateway.generate(text(&preamble)).await.unwrap();
    other.run().await.finish(FinishReason::Eos).await;
    stream.all().await.unwrap();
}

#[tokio::test]
async fn a_group_that_comes_back_with_a_higher_epoch_takes_the_request_again() {
    let (gateway, mut worker) = one().await;
    *worker.refusal.lock().unwrap() =
        Some(unmask_proto::rich::status(Code::FailedPrecondition, "STALE_EPOCH", "epoch 1 is not 2"));
    let (stream, ()) = tokio::join!(gateway.generate(text("p")), async {
        // The first attempt has been refused once its refusal is gone.
        *worker.refusal.lock().unwrap() = None;
        gateway.announce(vec![worker.route("a", 2)]);
    });
    let run = worker.run().await;
    run.finish(FinishReason::Eos).await;
    assert_eq!(stream.unwrap().all().await.unwrap().finish.unwrap().reason(), FinishReason::Eos);
}

#[tokio::test]
async fn without_another_group_in_time_the_client_is_told_to_try_again() {
    let mut worker = Worker::start().await;
    let patience = |config: &mut Config| config.group_wait = Duration::from_millis(700);
    let gateway = Gateway::configured(vec![worker.route("a", 1)], patience).await;
    let mut stream = gateway.generate(text("p")).await.unwrap();
    stream.started().await;
    let run = worker.run().await;
    *worker.refusal.lock().unwrap() = Some(Status::unavailable("gone"));
    drop(run);
    let status = stream.next().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.get_details_retry_info().is_some(), "{status:?}");
}

#[tokio::test]
async fn a_stream_waits_for_its_group_to_come_back_and_goes_on() {
    let (gateway, mut worker) = one().await;
    let mut stream = gateway.generate(text("p")).await.unwrap();
    stream.started().await;
    let run = worker.run().await;
    *worker.refusal.lock().unwrap() = Some(Status::unavailable("gone"));
    drop(run);
    // Longer than a stream that has not begun would wait.
    let back = Arc::clone(&worker.refusal);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(2)).await;
        *back.lock().unwrap() = None;
    });
    worker.run().await.finish(FinishReason::Eos).await;
    stream.all().await.unwrap();
}

#[tokio::test]
async fn a_busy_group_is_passed_over_and_when_all_are_busy_the_client_hears_it() {
    let (gateway, a, mut b) = two().await;
    let full = unmask_proto::rich::retryable(Code::ResourceExhausted, "QUEUE_FULL", "full", Duration::from_secs(1));
    *a.refusal.lock().unwrap() = Some(full.clone());
    for _ in 0..8 {
        let stream = gateway.generate(text("p")).await.unwrap();
        b.run().await.finish(FinishReason::Eos).await;
        stream.all().await.unwrap();
    }
    *b.refusal.lock().unwrap() = Some(full);
    let status = gateway.generate(text("p")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(status.get_details_error_info().unwrap().reason, "QUEUE_FULL");
    assert!(status.get_details_retry_info().is_some());
}

#[tokio::test]
async fn requests_that_have_not_begun_go_elsewhere_only_so_often_and_begun_streams_always() {
    let (gateway, mut worker) = one().await;
    let mut stream = gateway.generate(text("p")).await.unwrap();
    stream.started().await;
    let mut run = worker.run().await;
    run.commit(&ids("ab")).await;
    stream.commit().await;
    // Refusals do not open circuits, so every request asks three groups.
    let full = unmask_proto::rich::retryable(Code::ResourceExhausted, "QUEUE_FULL", "full", Duration::from_secs(1));
    let busy = [Worker::start().await, Worker::start().await, Worker::start().await];
    busy.iter().for_each(|worker| *worker.refusal.lock().unwrap() = Some(full.clone()));
    gateway.set_routes(["c", "d", "e"].iter().zip(&busy).map(|(group, worker)| worker.route(group, 1)).collect()).await;
    let mut asked = 0;
    let refused = loop {
        let status = gateway.generate(text("p")).await.unwrap_err();
        if status.get_details_error_info().unwrap().reason != "QUEUE_FULL" {
            break status;
        }
        asked += 1;
    };
    let reason = refused.get_details_error_info().unwrap().reason;
    assert_eq!((refused.code(), reason.as_str()), (Code::Unavailable, "RETRY_BUDGET"));
    assert!(refused.get_details_retry_info().is_some());
    assert!(asked >= 50, "{asked} requests spent what was saved up");
    // The stream that has begun goes on.
    gateway.set_routes(vec![worker.route("a", 2)]).await;
    run.fail(Status::unavailable("going down")).await;
    let mut run = worker.run().await;
    assert_eq!(run.request.committed_ids, ids("ab"));
    run.commit(&ids("cd")).await;
    run.finish(FinishReason::Eos).await;
    assert_eq!(stream.all().await.unwrap().ids, ids("cd"));
}

#[tokio::test]
async fn a_client_that_goes_frees_its_work_at_once() {
    let (gateway, mut worker) = one().await;
    let mut stream = gateway.generate(text("p")).await.unwrap();
    stream.started().await;
    let run = worker.run().await;
    drop(stream);
    run.cancelled().await;
}

#[tokio::test]
async fn a_deadline_bounds_the_whole_stream_and_travels_to_the_worker() {
    let (gateway, mut worker) = one().await;
    let mut request = Request::new(text("p"));
    request.set_timeout(Duration::from_millis(700));
    let began = Instant::now();
    let mut events = gateway.client.clone().generate(request).await.unwrap().into_inner();
    let mut run = worker.run().await;
    assert!(run.timeout.is_some());
    run.commit(&ids("abc")).await;
    let status = loop {
        match within(events.message()).await {
            Ok(event) => assert!(event.is_some(), "the stream ended without a status"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(began.elapsed() >= Duration::from_millis(650) && began.elapsed() < LIMIT / 2);
    run.cancelled().await;
}

#[tokio::test]
async fn two_hundred_streams_at_once_each_get_their_own() {
    let worker = Worker::start().await;
    let gateway = Gateway::start(vec![worker.route("a", 1)]).await;
    worker.answer_all(ANSWER);
    let mut streams = Vec::new();
    for i in 0..200 {
        streams.push(gateway.generate(text(&format!("prompt {i}"))).await.unwrap());
    }
    for stream in streams {
        let output = stream.all().await.unwrap();
        assert_eq!(output.text, ANSWER);
    }
}

#[tokio::test]
async fn a_slow_reader_pauses_itself_only() {
    let (gateway, mut worker) = one().await;
    // Not read at all for now, over a connection that holds little.
    let slow = gateway.generate_narrow(text("slow")).await;
    let mut run = worker.run().await;
    let commits = tokio::spawn(async move {
        let sent = run.commits_until_full(&ids("x")[..1]).await;
        (run, sent)
    });
    let quick = gateway.generate(text("quick")).await.unwrap();
    worker.run().await.finish(FinishReason::Eos).await;
    quick.all().await.unwrap();
    let (run, sent) = within(commits).await.unwrap();
    assert!(sent > 0 && sent < 40_000, "{sent} commits are under way");
    let (output, ()) = tokio::join!(slow.all(), run.finish(FinishReason::Length));
    assert_eq!(output.unwrap().ids.len(), sent);
}

#[tokio::test]
async fn drafts_come_when_asked_for() {
    let (gateway, mut worker) = one().await;
    let draft = |first_position: u32| Draft {
        first_position,
        token_ids: [ids("ab").as_slice(), &[7]].concat(),
        masked: [vec![false; ids("ab").len()], vec![true]].concat(),
        step: 1,
        text: String::new(),
    };
    for asked in [true, false] {
        let request = GenerateRequest { stream_drafts: asked, ..text("p") };
        let stream = gateway.generate(request).await.unwrap();
        let run = worker.run().await;
        assert_eq!(run.request.stream_drafts, asked);
        run.draft(draft(run.request.prompt_ids.len() as u32)).await;
        run.finish(FinishReason::Eos).await;
        let drafts = stream.all().await.unwrap().drafts;
        assert_eq!(drafts.into_iter().map(|draft| draft.text).collect::<Vec<_>>(), vec!["ab\u{2591}"; asked.into()]);
    }
}

/// The limit holds where no worker minds it: a hung one, or none at all.
#[tokio::test]
async fn a_time_limit_ends_a_stream_that_nobody_ends() {
    let (gateway, mut worker) = one().await;
    let decoding = Decoding { time_limit_ms: Some(100), ..Default::default() };
    let mut stream = gateway.generate(with("p", decoding.clone())).await.unwrap();
    stream.started().await;
    let mut run = worker.run().await;
    run.commit(&ids("ab")).await;
    let output = stream.all().await.unwrap();
    let finish = output.finish.unwrap();
    assert_eq!((output.text.as_str(), finish.reason()), ("ab", FinishReason::TimeLimit));
    run.cancelled().await;

    let stream = gateway.generate(with("p", decoding)).await.unwrap();
    let run = worker.run().await;
    gateway.set_routes(Vec::new()).await;
    run.fail(Status::unavailable("gone")).await;
    assert_eq!(stream.all().await.unwrap().finish.unwrap().reason(), FinishReason::TimeLimit);
}

#[tokio::test]
async fn a_resumed_stream_gives_only_what_is_new() {
    let (gateway, mut worker) = one().await;
    let answer = ids("aé漢END");
    let decoding = Decoding { stop: vec!["END".into()], seed: Some(5), ..Default::default() };
    let mut stream = gateway.generate(with("p", decoding)).await.unwrap();
    let started = stream.started().await;
    let mut run = worker.run().await;
    run.commit(&answer[..3]).await;
    let first = stream.commit().await;
    drop(stream);
    run.cancelled().await;
    let resume = |received: &[u32]| GenerateRequest {
        resume: Some(Resume {
            request_id: started.request_id.clone(),
            received_token_ids: received.to_vec(),
            settings: started.settings.clone(),
            passes_used: 2,
            numerics_id: started.numerics_id.clone(),
        }),
        ..text("p")
    };
    let stream = gateway.generate(resume(&first.token_ids)).await.unwrap();
    let mut run = worker.run().await;
    assert_eq!((&run.request.committed_ids[..], run.request.passes_used), (&answer[..3], 2));
    assert_eq!(run.request.settings, started.settings);
    run.commit(&answer[3..]).await;
    let output = stream.all().await.unwrap();
    assert_eq!(first.text + &output.text, "aé漢");
    assert_eq!(output.started.unwrap().request_id, started.request_id);
    // A stream that was over ends at once, without a worker.
    let output = gateway.generate(resume(&answer)).await.unwrap().all().await.unwrap();
    assert_eq!((output.ids.len(), output.finish.unwrap().reason()), (0, FinishReason::Stop));
}

#[tokio::test]
async fn a_gateway_that_stops_lets_streams_finish_up_to_a_limit() {
    for in_time in [true, false] {
        let mut worker = Worker::start().await;
        let gateway = Gateway::configured(vec![worker.route("a", 1)], |config| {
            config.drain_limit = if in_time { LIMIT } else { Duration::from_millis(50) };
        })
        .await;
        let mut stream = gateway.generate(text("p")).await.unwrap();
        stream.started().await;
        let mut run = worker.run().await;
        let mut client = gateway.client.clone();
        let ended = gateway.stop();
        let refused = async {
            while let Ok(stream) = client.generate(text("q")).await {
                drop(stream);
            }
        };
        within(refused).await;
        if in_time {
            run.commit(&ids("ab")).await;
            run.finish(FinishReason::Eos).await;
            assert_eq!(stream.all().await.unwrap().text, "ab");
        } else {
            let status = stream.next().await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
            assert!(status.get_details_retry_info().is_some());
            run.cancelled().await;
        }
        within(ended).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_given_up() {
    let mut worker = Worker::start().await;
    let gateway = Gateway::configured(vec![worker.route("a", 1)], |config| {
        config.stall_limit = Duration::from_millis(200);
        config.admission.streams_max = 1;
        config.admission.queue_max = 0;
    })
    .await;
    let decoding = Decoding { max_tokens: Some(4000), ..Default::default() };
    let stream = gateway.generate(with("p", decoding)).await.unwrap();
    let mut run = worker.run().await;
    let status = gateway.generate(text("q")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.get_details_retry_info().is_some());
    // Until the client's buffers are full and the gateway has lost patience.
    let flood = async {
        while run.commit(&[ids("x")[0]; 1]).await {}
        run.cancelled().await;
    };
    within(flood).await;
    drop(stream);
    // Its place is free again.
    let free = async {
        loop {
            match gateway.generate(text("q")).await {
                Ok(stream) => return stream,
                Err(status) => assert_eq!(status.code(), Code::ResourceExhausted),
            }
            tokio::task::yield_now().await;
        }
    };
    within(free).await;
}
