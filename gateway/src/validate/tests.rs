#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;
use crate::prompt::Prompt;
use crate::settings;
use proptest::prelude::*;
use unmask_proto::v1::policy::Autoregressive;
use unmask_proto::v1::{ChatMessage, Defaults, InfillTokens, Policy, TokenIds};

/// Without a policy of the controller's.
fn validate(request: GenerateRequest, model: &ModelDescriptor, seed: u64) -> Result<Valid, Vec<Violation>> {
    super::validate(request, model, None, seed)
}

/// With a prompt of so many tokens, and nothing behind the output.
fn fit(valid: &Valid, model: &ModelDescriptor, tokens: usize) -> Result<ResolvedSettings, Violation> {
    settings::fit(valid, model, &Prompt { ids: vec![1; tokens], ..Prompt::default() })
}

#[test]
fn the_controllers_policy_holds_where_the_request_names_neither_of_its_two() {
    let policy = Some(Policy { kind: Some(Kind::Threshold(Threshold { tau: 0.7 })) });
    let chosen = ModelPolicy { model: "m".into(), revision: 5, block_size: 8, policy };
    let resolved = |decoding| super::validate(text(decoding), &diffusion(), Some(&chosen), 0).unwrap().settings;
    // One that the model cannot honour is left out; it is not the client's mistake.
    let beyond = ModelPolicy { block_size: 7, ..chosen.clone() };
    let valid = super::validate(text(Decoding::default()), &diffusion(), Some(&beyond), 0).unwrap();
    assert_eq!((valid.settings.policy_revision, valid.settings.origins["block_size"].as_str()), (0, "model"));
    let settings = resolved(Decoding::default());
    assert_eq!((settings.block_size, settings.policy, settings.policy_revision), (8, policy, 5));
    assert_eq!((settings.origins["block_size"].as_str(), settings.origins["policy"].as_str()), ("policy", "policy"));
    for decoding in [
        Decoding { block_size: Some(4), ..Decoding::default() },
        Decoding { policy: Some(Policy { kind: Some(Kind::Factor(Factor { factor: 2.0 })) }), ..Decoding::default() },
    ] {
        let settings = resolved(decoding);
        assert_eq!(settings.policy_revision, 0);
        assert!(settings.policy != policy && !settings.origins.values().any(|origin| origin == "policy"));
    }
}

const CONTEXT: u32 = 64;

fn policy(kind: Kind) -> Option<Policy> {
    Some(Policy { kind: Some(kind) })
}

fn diffusion() -> ModelDescriptor {
    ModelDescriptor {
        name: "m".into(),
        context_length: CONTEXT,
        block_sizes: vec![4, 8],
        vocab_size: 100,
        capabilities: Some(Capabilities { diffusion: true, ..Default::default() }),
        defaults: Some(Defaults {
            block_size: 8,
            policy: policy(Kind::Threshold(Threshold { tau: 0.8 })),
            max_tokens: 32,
            temperature: 0.5,
        }),
        ..Default::default()
    }
}

fn autoregressive() -> ModelDescriptor {
    ModelDescriptor {
        block_sizes: Vec::new(),
        capabilities: Some(Capabilities { autoregressive: true, ..Default::default() }),
        defaults: None,
        ..diffusion()
    }
}

fn everything() -> ModelDescriptor {
    let infill = Some(InfillTokens { prefix: 1, suffix: 2, middle: 3 });
    let capabilities =
        Capabilities { diffusion: true, autoregressive: true, infill, edit: true, chat: true, ..Default::default() };
    ModelDescriptor { capabilities: Some(capabilities), ..diffusion() }
}

fn text(decoding: Decoding) -> GenerateRequest {
    GenerateRequest { input: Some(RawInput::Text("x".into())), decoding: Some(decoding), ..Default::default() }
}

fn fields(request: GenerateRequest, model: &ModelDescriptor) -> Vec<String> {
    let found = validate(request, model, 0).err().unwrap_or_default();
    found.into_iter().map(|violation| violation.field).collect()
}

#[test]
fn all_violations_come_at_once() {
    let request = GenerateRequest {
        input: Some(RawInput::TokenIds(TokenIds { ids: vec![1, 100] })),
        suffix: Some("s".into()),
        priority: Some(101),
        decoding: Some(Decoding {
            max_tokens: Some(0),
            block_size: Some(5),
            policy: policy(Kind::Threshold(Threshold { tau: 0.0 })),
            temperature: Some(-1.0),
            top_p: Some(0.0),
            stop: vec!["".into()],
            stop_token_ids: vec![7, 100],
            time_limit_ms: Some(0),
            nfe_cap: Some(0),
            ..Default::default()
        }),
        ..Default::default()
    };
    let expected = [
        "token_ids.ids[1]",
        "suffix",
        "priority",
        "decoding.max_tokens",
        "decoding.time_limit_ms",
        "decoding.nfe_cap",
        "decoding.temperature",
        "decoding.top_p",
        "decoding.stop[0]",
        "decoding.stop_token_ids[1]",
        "decoding.block_size",
        "decoding.policy.threshold.tau",
    ];
    assert_eq!(fields(request, &diffusion()), expected);
}

#[test]
fn inputs_are_checked() {
    let with = |input| GenerateRequest { input, ..Default::default() };
    let chat = |messages: Vec<ChatMessage>| Some(RawInput::Chat(ChatMessages { messages }));
    let said = |role: &str| ChatMessage { role: role.into(), content: "x".into() };
    let model = everything();
    assert_eq!(fields(with(None), &model), ["input"]);
    assert_eq!(fields(with(Some(RawInput::Text(String::new()))), &model), ["text"]);
    assert_eq!(fields(with(Some(RawInput::TokenIds(TokenIds::default()))), &model), ["token_ids.ids"]);
    assert_eq!(fields(with(chat(vec![])), &model), ["chat.messages"]);
    assert_eq!(fields(with(chat(vec![said("user"), said("tool")])), &model), ["chat.messages[1].role"]);
    assert_eq!(fields(with(chat(vec![said("user"); MESSAGES_MAX + 1])), &model), ["chat.messages"]);
    assert_eq!(fields(with(chat(vec![said("user")])), &diffusion()), ["chat"]);
    assert!(fields(with(chat(vec![said("user")])), &model).is_empty());
    let infill = |input| GenerateRequest { input, suffix: Some("s".into()), ..Default::default() };
    assert!(fields(infill(Some(RawInput::Text(String::new()))), &model).is_empty());
    assert_eq!(fields(infill(chat(vec![said("user")])), &model), ["suffix"]);
    assert_eq!(fields(infill(Some(RawInput::Text("x".into()))), &diffusion()), ["suffix"]);
    let by_masks = Capabilities { diffusion: true, infill_by_masks: true, ..Default::default() };
    let model = ModelDescriptor { capabilities: Some(by_masks), ..diffusion() };
    assert!(fields(infill(Some(RawInput::Text(String::new()))), &model).is_empty());
    assert_eq!(fields(infill(chat(vec![said("user")])), &model), ["chat", "suffix"]);
}

#[test]
fn policies_are_checked_against_ranges_and_capabilities() {
    let full = everything();
    let check = |kind: Kind, model: &ModelDescriptor| {
        fields(text(Decoding { policy: policy(kind), ..Default::default() }), model)
            .into_iter()
            .map(|field| field.strip_prefix("decoding.policy").unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let bad = [
        (Kind::Fixed(Fixed { steps: 0, order: 0 }), ".fixed.steps"),
        (Kind::Fixed(Fixed { steps: 9, order: 0 }), ".fixed.steps"),
        (Kind::Fixed(Fixed { steps: 1, order: 9 }), ".fixed.order"),
        (Kind::Threshold(Threshold { tau: f32::NAN }), ".threshold.tau"),
        (Kind::Threshold(Threshold { tau: 1.01 }), ".threshold.tau"),
        (Kind::Factor(Factor { factor: 0.0 }), ".factor.factor"),
        (Kind::EntropyBounded(EntropyBounded { gamma: -0.1 }), ".entropy_bounded.gamma"),
        (Kind::Hierarchical(Hierarchical { low: 0.6, high: 0.5 }), ".hierarchical.low"),
        (Kind::Hierarchical(Hierarchical { low: 0.5, high: 1.5 }), ".hierarchical.high"),
        (Kind::JointEdit(JointEdit { tau: 0.5, tau_edit: 1.5, max_post_steps: 1 }), ".joint_edit.tau_edit"),
        (Kind::JointEdit(JointEdit { tau: 0.5, tau_edit: 0.5, max_post_steps: 65 }), ".joint_edit.max_post_steps"),
        (Kind::SelfSpeculative(SelfSpeculative { tau: 0.0 }), ".self_speculative.tau"),
    ];
    for (kind, field) in bad {
        assert_eq!(check(kind, &full), [field], "{kind:?}");
    }
    let edit = Kind::JointEdit(JointEdit { tau: 0.5, tau_edit: 0.5, max_post_steps: 1 });
    assert_eq!(check(edit, &diffusion()), [""]);
    assert!(check(edit, &full).is_empty());
    assert_eq!(check(Kind::Autoregressive(Autoregressive {}), &diffusion()), [""]);
    assert_eq!(check(Kind::Threshold(Threshold { tau: 0.5 }), &autoregressive()), [""]);
    let drafts = Kind::SelfSpeculative(SelfSpeculative { tau: 0.5 });
    assert!(check(drafts, &full).is_empty());
    assert_eq!(
        (check(drafts, &diffusion()), check(drafts, &autoregressive())),
        (vec![String::new()], vec![String::new()])
    );
    let capped = Decoding { policy: policy(drafts), nfe_cap: Some(4), ..Default::default() };
    assert_eq!(fields(text(capped), &full), ["decoding.nfe_cap"]);
    let unnamed = text(Decoding { policy: Some(Policy { kind: None }), ..Default::default() });
    assert_eq!(fields(unnamed, &full), ["decoding.policy"]);
}

#[test]
fn autoregressive_takes_block_one_whatever_is_asked() {
    let request = text(Decoding { block_size: Some(5), ..Default::default() });
    let settings = validate(request, &autoregressive(), 0).unwrap().settings;
    assert_eq!((settings.block_size, &settings.origins["block_size"][..]), (1, "gateway"));
    assert_eq!(settings.policy, policy(Kind::Autoregressive(Autoregressive {})));
}

#[test]
fn every_setting_says_where_it_comes_from() {
    let decoding = Decoding { block_size: Some(4), top_k: Some(3), ..Default::default() };
    let valid = validate(text(decoding), &diffusion(), u64::MAX).unwrap();
    let settings = fit(&valid, &diffusion(), 10).unwrap();
    let origin = |name: &str| settings.origins[name].as_str();
    assert_eq!((settings.max_tokens, origin("max_tokens")), (32, "model"));
    assert_eq!((settings.block_size, origin("block_size")), (4, "request"));
    assert_eq!((settings.temperature, origin("temperature")), (0.5, "model"));
    assert_eq!((settings.top_k, origin("top_k")), (3, "request"));
    assert_eq!((settings.top_p, origin("top_p")), (1.0, "gateway"));
    assert_eq!((settings.seed, origin("seed")), ((1 << 53) - 1, "gateway"));
    assert_eq!(settings.origins.len(), 11);
    // A default number of steps is for the default block.
    let mut model = diffusion();
    model.defaults.as_mut().unwrap().policy = policy(Kind::Fixed(Fixed { steps: 8, order: 1 }));
    let settings = validate(text(decoding_with_block(4)), &model, 0).unwrap().settings;
    assert_eq!(settings.policy, policy(Kind::Fixed(Fixed { steps: 4, order: 1 })));
}

fn decoding_with_block(block_size: u32) -> Decoding {
    Decoding { block_size: Some(block_size), ..Default::default() }
}

#[test]
fn prompts_and_lengths_must_fit_the_context() {
    let model = diffusion();
    let fitted = |max_tokens, prompt: u32| {
        let valid = validate(text(Decoding { max_tokens, ..Default::default() }), &model, 0).unwrap();
        fit(&valid, &model, prompt as usize)
            .map(|settings| (settings.max_tokens, settings.origins["max_tokens"].clone()))
            .map_err(|violation| violation.field)
    };
    assert_eq!(fitted(None, CONTEXT), Err("text".into()));
    assert_eq!(fitted(None, 0), Err("text".into()));
    assert_eq!(fitted(None, CONTEXT - 1), Ok((1, "gateway".into())));
    assert_eq!(fitted(Some(1), CONTEXT - 1), Ok((1, "request".into())));
    assert_eq!(fitted(Some(2), CONTEXT - 1), Err("decoding.max_tokens".into()));
    assert_eq!(fitted(Some(u32::MAX), 1), Err("decoding.max_tokens".into()));
    // A gap is not as long as an answer, and both of its sides take room.
    let mut model = diffusion();
    model.defaults.as_mut().unwrap().max_tokens = 40;
    let gap = |max_tokens, suffix| {
        let valid = validate(text(Decoding { max_tokens, ..Default::default() }), &model, 0).unwrap();
        let prompt = Prompt { ids: vec![1; 10], suffix: vec![1; suffix], tail: None };
        settings::fit(&valid, &model, &prompt).map(|settings| settings.max_tokens).map_err(|violation| violation.field)
    };
    assert_eq!((gap(None, 3), gap(Some(5), 3), gap(None, 50)), (Ok(32), Ok(5), Ok(4)));
    assert_eq!((gap(Some(5), 50), gap(None, 54)), (Err("decoding.max_tokens".into()), Err("suffix".into())));
}

#[test]
fn a_resumed_request_takes_its_settings_as_they_are_and_checks_them() {
    let model = diffusion();
    let valid = validate(text(Decoding::default()), &model, 9).unwrap();
    let settings = fit(&valid, &model, 10).unwrap();
    let resume = |settings: Option<ResolvedSettings>, received: Vec<u32>| GenerateRequest {
        decoding: None,
        resume: Some(Resume {
            request_id: "id".into(),
            received_token_ids: received,
            settings,
            passes_used: 3,
            numerics_id: "n".into(),
        }),
        ..text(Decoding::default())
    };
    let resumed = validate(resume(Some(settings.clone()), vec![5; 32]), &model, 1).unwrap();
    assert_eq!(fit(&resumed, &model, 10).unwrap(), settings);
    assert_eq!(resumed.resume.unwrap().received.len(), 32);
    assert_eq!(fields(resume(Some(settings.clone()), vec![5; 33]), &model), ["resume.received_token_ids"]);
    assert_eq!(fields(resume(Some(settings.clone()), vec![100]), &model), ["resume.received_token_ids[0]"]);
    assert_eq!(fields(resume(None, vec![]), &model), ["resume.settings"]);
    let forged = ResolvedSettings { block_size: 3, top_p: 2.0, ..settings.clone() };
    let expected = ["resume.settings.top_p", "resume.settings.block_size"];
    assert_eq!(fields(resume(Some(forged), vec![]), &model), expected);
    let mut both = resume(Some(settings), vec![]);
    both.decoding = Some(decoding_with_block(4));
    both.resume.as_mut().unwrap().request_id = "a b".into();
    assert_eq!(fields(both, &model), ["decoding", "resume.request_id"]);
}

proptest! {
    /// Whatever comes in, what goes on is within the ranges that workers rely on.
    #[test]
    fn what_is_valid_is_in_range(
        numbers in prop::array::uniform6(prop::num::f32::ANY), small in prop::array::uniform6(-0.5f32..1.5),
        near in any::<bool>(), kind in 0usize..8, steps in 0u32..12, block in prop::option::of(0u32..10),
        max_tokens in prop::option::of(0u32..80), prompt in 0usize..80, ids in prop::collection::vec(0u32..120, 0..3),
    ) {
        let [a, b, c, d, e, f] = if near { small } else { numbers };
        let kind = [
            Kind::Fixed(Fixed { steps, order: steps as i32 }),
            Kind::Threshold(Threshold { tau: c }),
            Kind::Factor(Factor { factor: c }),
            Kind::EntropyBounded(EntropyBounded { gamma: c }),
            Kind::Hierarchical(Hierarchical { low: d, high: e }),
            Kind::JointEdit(JointEdit { tau: e, tau_edit: f, max_post_steps: steps }),
            Kind::Autoregressive(Autoregressive {}),
            Kind::SelfSpeculative(SelfSpeculative { tau: c }),
        ][kind];
        let decoding = Decoding {
            max_tokens, block_size: block, policy: policy(kind), temperature: Some(a), top_p: Some(b),
            stop_token_ids: ids.clone(), ..Default::default()
        };
        let model = everything();
        let Ok(valid) = validate(text(decoding), &model, 0) else { return Ok(()) };
        let settings = &valid.settings;
        prop_assert!((0.0..=10.0).contains(&settings.temperature) && settings.top_p > 0.0 && settings.top_p <= 1.0);
        prop_assert!(ids.iter().all(|id| *id < model.vocab_size));
        let ranged = match kind {
            Kind::Fixed(fixed) => (1..=settings.block_size).contains(&fixed.steps),
            Kind::Threshold(_) | Kind::SelfSpeculative(_) => c > 0.0 && c <= 1.0,
            Kind::Factor(_) => c > 0.0 && c.is_finite(),
            Kind::EntropyBounded(_) => c >= 0.0 && c.is_finite(),
            Kind::Hierarchical(_) => 0.0 <= d && d <= e && e <= 1.0,
            Kind::JointEdit(_) => e > 0.0 && e <= 1.0 && (0.0..=1.0).contains(&f),
            Kind::Autoregressive(_) => settings.block_size == 1,
        };
        prop_assert!(ranged && (settings.block_size == 1 || model.block_sizes.contains(&settings.block_size)));
        if let Ok(fitted) = fit(&valid, &model, prompt) {
            prop_assert!(fitted.max_tokens >= 1 && prompt as u32 + fitted.max_tokens <= CONTEXT);
        }
    }
}
