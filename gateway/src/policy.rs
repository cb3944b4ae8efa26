//! Policies as JSON, spelled as in a model's `config.json`: `{"threshold": {"tau": 0.9}}`, `"autoregressive"`. Pure.

use serde::Deserialize;
use serde_json::{Value, json};
use unmask_proto::v1::policy::{self, Kind};
use unmask_proto::v1::{self, Policy};

#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Written {
    Fixed {
        steps: u32,
        #[serde(default)]
        order: Order,
    },
    Threshold {
        tau: f32,
    },
    Factor {
        factor: f32,
    },
    EntropyBounded {
        gamma: f32,
    },
    Hierarchical {
        low: f32,
        high: f32,
    },
    JointEdit {
        tau: f32,
        tau_edit: f32,
        max_post_steps: u32,
    },
    Autoregressive,
    SelfSpeculative {
        tau: f32,
    },
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    #[default]
    Confidence,
    Margin,
    Entropy,
    Sequential,
    Random,
}

/// Reads a policy. Its numbers are checked with the rest of a request.
///
/// # Errors
/// What is wrong with it, and which names are known.
pub fn from_json(value: Value) -> Result<Policy, String> {
    let kind = match serde_json::from_value(value).map_err(|error| error.to_string())? {
        Written::Fixed { steps, order } => {
            let order = match order {
                Order::Confidence => v1::Order::Confidence,
                Order::Margin => v1::Order::Margin,
                Order::Entropy => v1::Order::Entropy,
                Order::Sequential => v1::Order::Sequential,
                Order::Random => v1::Order::Random,
            };
            Kind::Fixed(policy::Fixed { steps, order: order.into() })
        }
        Written::Threshold { tau } => Kind::Threshold(policy::Threshold { tau }),
        Written::Factor { factor } => Kind::Factor(policy::Factor { factor }),
        Written::EntropyBounded { gamma } => Kind::EntropyBounded(policy::EntropyBounded { gamma }),
        Written::Hierarchical { low, high } => Kind::Hierarchical(policy::Hierarchical { low, high }),
        Written::JointEdit { tau, tau_edit, max_post_steps } => {
            Kind::JointEdit(policy::JointEdit { tau, tau_edit, max_post_steps })
        }
        Written::Autoregressive => Kind::Autoregressive(policy::Autoregressive {}),
        Written::SelfSpeculative { tau } => Kind::SelfSpeculative(policy::SelfSpeculative { tau }),
    };
    Ok(Policy { kind: Some(kind) })
}

/// Writes a policy; null where it names none.
pub fn to_json(policy: Policy) -> Value {
    match policy.kind {
        Some(Kind::Fixed(p)) => {
            let order = match p.order() {
                v1::Order::Unspecified | v1::Order::Confidence => "confidence",
                v1::Order::Margin => "margin",
                v1::Order::Entropy => "entropy",
                v1::Order::Sequential => "sequential",
                v1::Order::Random => "random",
            };
            json!({ "fixed": { "steps": p.steps, "order": order } })
        }
        Some(Kind::Threshold(p)) => json!({ "threshold": { "tau": number(p.tau) } }),
        Some(Kind::Factor(p)) => json!({ "factor": { "factor": number(p.factor) } }),
        Some(Kind::EntropyBounded(p)) => json!({ "entropy_bounded": { "gamma": number(p.gamma) } }),
        Some(Kind::Hierarchical(p)) => json!({ "hierarchical": { "low": number(p.low), "high": number(p.high) } }),
        Some(Kind::JointEdit(p)) => {
            json!({ "joint_edit": { "tau": number(p.tau), "tau_edit": number(p.tau_edit), "max_post_steps": p.max_post_steps } })
        }
        Some(Kind::Autoregressive(_)) => json!("autoregressive"),
        Some(Kind::SelfSpeculative(p)) => json!({ "self_speculative": { "tau": number(p.tau) } }),
        None => Value::Null,
    }
}

/// The shortest decimal that is this f32: 0.9, not 0.8999999761581421.
pub fn number(x: f32) -> Value {
    x.to_string().parse::<f64>().ok().into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let all = [
            json!({ "fixed": { "steps": 4, "order": "margin" } }),
            json!({ "threshold": { "tau": 0.9 } }),
            json!({ "factor": { "factor": 1.5 } }),
            json!({ "entropy_bounded": { "gamma": 0.1 } }),
            json!({ "hierarchical": { "low": 0.4, "high": 0.9 } }),
            json!({ "joint_edit": { "tau": 0.7, "tau_edit": 0.9, "max_post_steps": 16 } }),
            json!("autoregressive"),
            json!({ "self_speculative": { "tau": 0.4 } }),
        ];
        for policy in all {
            assert_eq!(to_json(from_json(policy.clone()).unwrap()), policy);
        }
        let fixed = from_json(json!({ "fixed": { "steps": 4 } })).unwrap();
        assert_eq!(to_json(fixed), json!({ "fixed": { "steps": 4, "order": "confidence" } }));
    }

    #[test]
    fn what_is_not_known_is_named() {
        let cases = [
            (json!({ "greedy": {} }), "greedy"),
            (json!({ "threshold": { "tau": 0.9, "taw": 1 } }), "taw"),
            (json!({ "threshold": {} }), "tau"),
            (json!({ "fixed": { "steps": 4, "order": "up" } }), "up"),
            (json!("threshold=0.9"), "threshold=0.9"),
        ];
        for (policy, name) in cases {
            let error = from_json(policy).unwrap_err();
            assert!(error.contains(name), "{error}");
        }
    }
}
