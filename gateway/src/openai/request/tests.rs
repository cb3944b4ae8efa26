#![allow(clippy::unwrap_used)]

use super::*;
use unmask_proto::v1::Policy;
use unmask_proto::v1::policy::{Kind, Threshold};

fn problems(body: Value, api: Api) -> Vec<String> {
    read(body, api).unwrap_err().into_iter().map(|found| format!("{}: {}", found.field, found.description)).collect()
}

fn fields(body: Value, api: Api) -> Vec<String> {
    read(body, api).unwrap_err().into_iter().map(|found| found.field).collect()
}

fn text(prompt: &str) -> Option<Input> {
    Some(Input::Text(prompt.into()))
}

#[test]
fn a_completion_maps_to_the_request_of_grpc() {
    let body = json!({
        "model": "m", "prompt": "def f(", "suffix": "return", "max_tokens": 7, "temperature": 0.5, "top_p": 0.25,
        "top_k": 3, "seed": 9, "stop": ["a", "b"], "stream": true, "stream_options": { "include_usage": true },
        "unmask": {
            "block_size": 8, "policy": { "threshold": { "tau": 0.75 } }, "nfe_cap": 4, "drafts": true,
            "time_limit_ms": 100, "priority": -3, "stop_token_ids": [5],
        },
    });
    let wanted = read(body, Api::Completion).unwrap();
    let decoding = Decoding {
        max_tokens: Some(7),
        block_size: Some(8),
        policy: Some(Policy { kind: Some(Kind::Threshold(Threshold { tau: 0.75 })) }),
        temperature: Some(0.5),
        top_p: Some(0.25),
        top_k: Some(3),
        seed: Some(9),
        stop: vec!["a".into(), "b".into()],
        stop_token_ids: vec![5],
        time_limit_ms: Some(100),
        nfe_cap: Some(4),
    };
    let request = GenerateRequest {
        model: "m".into(),
        input: text("def f("),
        suffix: Some("return".into()),
        decoding: Some(decoding),
        stream_drafts: true,
        priority: Some(-3),
        resume: None,
    };
    assert_eq!(wanted.request, request);
    assert_eq!(wanted.shape, Shape { api: Api::Completion, stream: true, usage: true });
}

#[test]
fn prompts_are_a_text_one_text_or_ids() {
    let input = |prompt: Value| read(json!({ "prompt": prompt }), Api::Completion).unwrap().request.input;
    let ids = |ids: &[u32]| Some(Input::TokenIds(TokenIds { ids: ids.to_vec() }));
    assert_eq!(input(json!("a")), text("a"));
    assert_eq!(input(json!(["a"])), text("a"));
    assert_eq!(input(json!([1, 2])), ids(&[1, 2]));
    assert_eq!(input(json!([1])), ids(&[1]));
    assert_eq!(input(json!([[1, 2]])), ids(&[1, 2]));
    // The rest of validation refuses no ids.
    assert_eq!(input(json!([])), ids(&[]));
    for bad in [json!(["a", "b"]), json!([[1], [2]]), json!([-1]), json!([1.5]), json!(7), json!([["a"]]), json!(null)]
    {
        assert_eq!(fields(json!({ "prompt": bad }), Api::Completion), ["prompt"], "{bad}");
    }
    assert!(problems(json!({ "prompt": ["a", "b"] }), Api::Completion)[0].contains("2 prompts"));
}

#[test]
fn messages_are_texts_or_parts_that_are() {
    let body = json!({ "max_completion_tokens": 5, "messages": [
        { "role": "developer", "content": "s" },
        { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
        { "role": "assistant", "content": "c", "refusal": null, "tool_calls": null, "annotations": [] },
    ]});
    let wanted = read(body, Api::Chat).unwrap();
    let message = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
    let messages = vec![message("system", "s"), message("user", "ab"), message("assistant", "c")];
    assert_eq!(wanted.request.input, Some(Input::Chat(ChatMessages { messages })));
    assert_eq!(wanted.request.decoding.unwrap().max_tokens, Some(5));
    assert_eq!(wanted.max_tokens_key, "max_completion_tokens");

    let body = json!({ "messages": [
        { "role": "tool", "content": "x", "tool_call_id": "1" },
        { "role": "user", "content": [{ "type": "image_url", "image_url": {} }, { "type": "text" }], "name": "n" },
        { "content": null },
        "hello",
    ]});
    let expected = [
        "messages[0].role",
        "messages[0].tool_call_id",
        "messages[1].content[0]",
        "messages[1].content[1].text",
        "messages[1].name",
        "messages[2].role",
        "messages[2].content",
        "messages[3]",
        "messages[3].role",
        "messages[3].content",
    ];
    assert_eq!(fields(body.clone(), Api::Chat), expected);
    assert!(problems(body, Api::Chat).iter().any(|problem| problem.contains("image_url")));
}

#[test]
fn values_that_change_nothing_are_taken() {
    let chat = json!({
        "messages": [{ "role": "user", "content": "x" }], "n": 1, "logprobs": false, "top_logprobs": null,
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none",
        "parallel_tool_calls": true, "response_format": { "type": "text" }, "user": "u", "metadata": { "a": "b" },
        "stream": false, "stop": null, "seed": null, "store": false, "service_tier": "auto", "unmask": null,
    });
    assert_eq!(read(chat, Api::Chat).unwrap().request.decoding, Some(Decoding::default()));
    let completion = json!({
        "prompt": "x", "n": 1, "logprobs": null, "best_of": 1, "echo": false, "presence_penalty": 0.0, "user": "u",
        "stop": "end",
    });
    let stop = Decoding { stop: vec!["end".into()], ..Decoding::default() };
    assert_eq!(read(completion, Api::Completion).unwrap().request.decoding, Some(stop));
}

#[test]
fn everything_else_is_refused_by_name_and_at_once() {
    let body = json!({
        "prompt": "x", "temperature": "hot", "n": 2, "logprobs": 0, "echo": true, "best_of": 3, "presence_penalty": 0.5,
        "stop": 7, "seed": -1, "messages": [], "stream_options": { "include_usage": true, "more": 1 }, "colour": "red",
        "max_completion_tokens": 4,
        "unmask": { "policy": { "greedy": {} }, "block_sice": 4, "drafts": true },
    });
    let mut found = fields(body.clone(), Api::Completion);
    found.sort();
    let expected = [
        "best_of",
        "colour",
        "echo",
        "logprobs",
        "max_completion_tokens",
        "messages",
        "n",
        "presence_penalty",
        "seed",
        "stop",
        "stream_options",
        "stream_options.more",
        "temperature",
        "unmask.block_sice",
        "unmask.drafts",
        "unmask.policy",
    ];
    assert_eq!(found, expected);
    let all = problems(body, Api::Completion).join("\n");
    assert!(all.contains("n: is not supported: leave it out, or give 1"), "{all}");
    assert!(all.contains("colour: is not supported: leave it out"), "{all}");

    let messages = json!([{ "role": "user", "content": "x" }]);
    let body = json!({
        "messages": messages, "tools": [{}], "response_format": { "type": "json_object" }, "logprobs": true,
        "max_tokens": 3, "max_completion_tokens": 4, "echo": false, "prompt": "x", "suffix": "y",
    });
    let mut found = fields(body, Api::Chat);
    found.sort();
    let expected = ["echo", "logprobs", "max_completion_tokens", "prompt", "response_format", "suffix", "tools"];
    assert_eq!(found, expected);
    assert_eq!(fields(json!([]), Api::Chat), ["body", "messages"]);
    assert_eq!(fields(json!({}), Api::Completion), ["prompt"]);
}
