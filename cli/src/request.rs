//! A generation request from flags.

use crate::args::GenerateArgs;
use std::str::FromStr;
use unmask_proto::v1::generate_request::Input;
use unmask_proto::v1::policy::{
    Autoregressive, EntropyBounded, Factor, Fixed, Hierarchical, JointEdit, Kind, SelfSpeculative, Threshold,
};
use unmask_proto::v1::{ChatMessage, ChatMessages, Decoding, GenerateRequest, Order, Policy};

/// A policy as typed: `NAME=VALUE,..`. Its numbers are checked by the gateway, which knows the model.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyArg(pub Policy);

const FORMS: &str = "threshold=TAU, fixed=STEPS, factor=F, entropy=NATS, hierarchical=LOW,HIGH, \
                     joint-edit=TAU,TAU_EDIT,POST_STEPS, self-speculative=TAU, autoregressive";

impl FromStr for PolicyArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, values) = text.split_once('=').unwrap_or((text, ""));
        let values: Result<Vec<f32>, _> =
            values.split(',').filter(|value| !value.is_empty()).map(str::parse::<f32>).collect();
        let values = values.map_err(|_| format!("{text:?} has a value that is no number; known are {FORMS}"))?;
        let whole = |value: f32| {
            let fits = value >= 0.0 && value.fract() == 0.0 && value <= u32::MAX as f32;
            if fits { Ok(value as u32) } else { Err(format!("{value} must be a whole number")) }
        };
        let kind = match (name, values.as_slice()) {
            ("threshold", &[tau]) => Kind::Threshold(Threshold { tau }),
            ("fixed", &[steps]) => Kind::Fixed(Fixed { steps: whole(steps)?, order: Order::Confidence.into() }),
            ("factor", &[factor]) => Kind::Factor(Factor { factor }),
            ("entropy", &[gamma]) => Kind::EntropyBounded(EntropyBounded { gamma }),
            ("hierarchical", &[low, high]) => Kind::Hierarchical(Hierarchical { low, high }),
            ("joint-edit", &[tau, tau_edit, post]) => {
                Kind::JointEdit(JointEdit { tau, tau_edit, max_post_steps: whole(post)? })
            }
            ("self-speculative", &[tau]) => Kind::SelfSpeculative(SelfSpeculative { tau }),
            ("autoregressive", []) => Kind::Autoregressive(Autoregressive {}),
            _ => return Err(format!("{text:?} is not a policy; known are {FORMS}")),
        };
        Ok(Self(Policy { kind: Some(kind) }))
    }
}

/// The request of `args` for `prompt`. `model` is empty for the only model of a cluster.
pub fn build(args: &GenerateArgs, prompt: &str, model: &str, drafts: bool) -> GenerateRequest {
    let input = if args.chat {
        let message = ChatMessage { role: "user".into(), content: prompt.into() };
        Input::Chat(ChatMessages { messages: vec![message] })
    } else {
        Input::Text(prompt.into())
    };
    GenerateRequest {
        model: model.into(),
        input: Some(input),
        suffix: args.suffix.clone(),
        decoding: Some(Decoding {
            max_tokens: args.max_tokens,
            block_size: args.block_size,
            policy: args.policy.as_ref().map(|policy| policy.0),
            temperature: args.temperature,
            top_p: args.top_p,
            top_k: args.top_k,
            seed: args.seed,
            stop: args.stop.clone(),
            stop_token_ids: Vec::new(),
            time_limit_ms: args.time_limit_ms,
            nfe_cap: args.nfe_cap,
        }),
        stream_drafts: drafts,
        priority: None,
        resume: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read_by_name() {
        let kind = |text: &str| text.parse::<PolicyArg>().ok().and_then(|p| p.0.kind);
        assert_eq!(kind("threshold=0.9"), Some(Kind::Threshold(Threshold { tau: 0.9 })));
        assert_eq!(kind("hierarchical=0.4,0.9"), Some(Kind::Hierarchical(Hierarchical { low: 0.4, high: 0.9 })));
        assert_eq!(kind("self-speculative=0.5"), Some(Kind::SelfSpeculative(SelfSpeculative { tau: 0.5 })));
        assert_eq!(kind("autoregressive"), Some(Kind::Autoregressive(Autoregressive {})));
        for bad in ["threshold", "threshold=x", "fixed=1.5", "greedy", "autoregressive=1", "hierarchical=0.4"] {
            assert_eq!(kind(bad), None, "{bad}");
        }
    }
}
