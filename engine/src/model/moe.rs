//! Layers with experts, as a config has them.

use super::Family;
use super::json::Reader;
use serde_json::Value;
use unmask_kernels::experts::{CHOSEN_MAX, EXPERTS_MAX};
use unmask_kernels::{Router, Score};

/// Widest expert.
const WIDTH_MAX: u64 = 1 << 20;
/// Most experts that every row goes to.
const SHARED_MAX: u64 = 64;

/// The experts of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    /// How rows are routed.
    pub router: Router,
    /// Whether a bias is added to the scores for the choice.
    pub bias: bool,
    /// Width of an expert.
    pub ffn: u32,
    /// Width of the experts that every row goes to, together; 0 for none.
    pub shared_ffn: u32,
    /// Layers without experts.
    pub dense_layers: Vec<u32>,
}

impl Moe {
    /// What the config of a family with experts says.
    pub(super) fn read(r: &mut Reader<'_>, family: Family, layers: u32) -> Option<Moe> {
        let score = family.router?;
        let experts = r.count("num_experts", 1, EXPERTS_MAX as u64, None) as usize;
        let chosen = r.count("num_experts_per_tok", 1, CHOSEN_MAX as u64, None) as usize;
        let ffn = r.count("moe_intermediate_size", 1, WIDTH_MAX, None) as u32;
        let shared = r.count("num_shared_experts", 0, SHARED_MAX, Some((0, "family default"))) as u32;
        let groups = r.count("n_group", 1, EXPERTS_MAX as u64, Some((1, "family default"))) as usize;
        let all_groups = Some((groups as u64, "family default"));
        let groups_chosen = r.count("topk_group", 1, EXPERTS_MAX as u64, all_groups) as usize;
        let renormalise = r.flag("norm_topk_prob", false);
        let bias = r.flag("moe_router_enable_expert_bias", false);
        let scale = r.value("routed_scaling_factor");
        let scale = scale.map_or(1.0, |scale| r.number("routed_scaling_factor", Some(scale)) as f32);
        if !experts.is_multiple_of(groups) || groups_chosen > groups {
            r.problem(format!("n_group {groups} must divide num_experts {experts}, and topk_group be at most n_group"));
        } else if chosen > experts / groups * groups_chosen {
            r.problem(format!("num_experts_per_tok {chosen} is more than the experts to choose from"));
        }
        let named = match score {
            Score::Softmax => "softmax",
            Score::Sigmoid => "sigmoid",
        };
        if r.value("score_function").is_some_and(|function| function != named) {
            r.problem(format!("score_function must be {named}: others are not implemented"));
        }
        if r.value("_moe_implementation").is_some_and(|kind| kind == "fused") {
            r.problem("_moe_implementation: fused experts are not implemented, convert them to one tensor each");
        }
        let router = Router { experts, chosen, score, renormalise, scale, groups, groups_chosen };
        Some(Moe { router, bias, ffn, shared_ffn: shared * ffn, dense_layers: dense_layers(r, layers) })
    }

    /// Whether a layer has experts.
    pub fn covers(&self, layer: u32) -> bool {
        !self.dense_layers.contains(&layer)
    }
}

/// The layers that four spellings leave dense: some of the first, every so many, or a list either way.
fn dense_layers(r: &mut Reader<'_>, layers: u32) -> Vec<u32> {
    let most = u64::from(layers);
    let first = r.count("first_k_dense_replace", 0, most, Some((0, "family default"))) as u32;
    let every = r.count("decoder_sparse_step", 1, most.max(1), Some((1, "family default"))) as u32;
    let listed = |r: &mut Reader<'_>, key: &str| match r.value(key) {
        None => Vec::new(),
        Some(Value::Array(list)) => list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>().unwrap_or_else(|| {
            r.problem(format!("{key} must be a list of whole numbers"));
            Vec::new()
        }),
        Some(Value::Number(one)) if one.as_u64() == Some(1) => Vec::new(),
        Some(value) => {
            r.problem(format!("{key} must be a list, is {value}"));
            Vec::new()
        }
    };
    let (dense, frequencies) = (listed(r, "mlp_only_layers"), listed(r, "moe_layer_freq"));
    let is_dense = |layer: u32| {
        layer < first
            || !(layer + 1).is_multiple_of(every)
            || dense.contains(&u64::from(layer))
            || frequencies.get(layer as usize) == Some(&0)
    };
    let found: Vec<u32> = (0..layers).filter(|&layer| is_dense(layer)).collect();
    r.note("dense_layers", format!("{found:?}"), "config.json");
    found
}
