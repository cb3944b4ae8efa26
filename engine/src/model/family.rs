//! The facts that tell one family of checkpoints from another: a table row each.

use super::Reach;
use crate::request::Ends;

/// A family of checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    name: &'static str,
    architecture: &'static str,
    model_type: &'static str,
    pub(super) open_reach: Reach,
    pub(super) kept_reach: Reach,
    pub(super) shift: bool,
    pub(super) qk_norm: bool,
    pub(super) qkv_bias: bool,
    /// Block size where the config has none; 0 for autoregressive families.
    pub(super) block_size: u32,
    pub(super) mask_token: Option<&'static str>,
    ends: Ends,
    excludes_mask: bool,
}

const AUTOREGRESSIVE: Family = Family {
    name: "",
    architecture: "",
    model_type: "",
    open_reach: Reach::Causal,
    kept_reach: Reach::Causal,
    shift: false,
    qk_norm: false,
    qkv_bias: false,
    block_size: 0,
    mask_token: None,
    ends: Ends { whole_last_block: true, at_first_stop: true },
    excludes_mask: false,
};

/// Our own models.
const OWN: Family = Family {
    name: "unmask",
    architecture: "UnmaskForBlockDiffusion",
    model_type: "unmask",
    open_reach: Reach::Block,
    kept_reach: Reach::Causal,
    qk_norm: true,
    block_size: 16,
    mask_token: Some("<|mask|>"),
    excludes_mask: true,
    ..AUTOREGRESSIVE
};

/// Every family this program loads. Sources: the authors' configurations and modelling code.
const FAMILIES: [Family; 6] = [
    Family { name: "llama", architecture: "LlamaForCausalLM", model_type: "llama", ..AUTOREGRESSIVE },
    Family { name: "qwen2", architecture: "Qwen2ForCausalLM", model_type: "qwen2", qkv_bias: true, ..AUTOREGRESSIVE },
    Family { name: "qwen3", architecture: "Qwen3ForCausalLM", model_type: "qwen3", qk_norm: true, ..AUTOREGRESSIVE },
    Family {
        name: "stable_diffcoder",
        architecture: "StableDiffcoderForCausalLM",
        model_type: "stable_diffcoder",
        open_reach: Reach::Block,
        kept_reach: Reach::Block,
        block_size: 4,
        mask_token: Some("<[MASK_TOKEN]>"),
        ends: Ends { whole_last_block: false, at_first_stop: false },
        ..AUTOREGRESSIVE
    },
    Family {
        name: "sdar",
        architecture: "SDARForCausalLM",
        model_type: "sdar",
        open_reach: Reach::Block,
        kept_reach: Reach::Block,
        qk_norm: true,
        block_size: 4,
        mask_token: Some("<|MASK|>"),
        ends: Ends { whole_last_block: true, at_first_stop: false },
        ..AUTOREGRESSIVE
    },
    OWN,
];

impl Family {
    /// The family of our own models.
    pub fn own() -> Family {
        OWN
    }

    /// The family of a config: by architecture, then by model type.
    pub fn find(architecture: Option<&str>, model_type: Option<&str>) -> Option<Family> {
        let by_architecture = FAMILIES.iter().find(|family| Some(family.architecture) == architecture);
        // A named but unknown architecture is not rescued by a familiar model_type: that key is reused.
        let by_type = || FAMILIES.iter().find(|family| architecture.is_none() && Some(family.model_type) == model_type);
        by_architecture.or_else(by_type).copied()
    }

    /// Architectures this program loads.
    pub fn known() -> String {
        FAMILIES.map(|family| family.architecture).join(", ")
    }

    /// Short name, as in reference data.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// How outputs end.
    pub fn ends(&self) -> Ends {
        self.ends
    }

    /// Whether the mask's logit is left out of the softmax, as in training.
    pub fn excludes_mask(&self) -> bool {
        self.excludes_mask
    }

    /// Whether its authors decode many positions at once.
    pub fn diffuses(&self) -> bool {
        self.open_reach != Reach::Causal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_architecture_decides_before_the_model_type() {
        let found = Family::find(Some("StableDiffcoderForCausalLM"), Some("llama"));
        assert_eq!(found.map(|f| f.name()), Some("stable_diffcoder"));
        assert_eq!(Family::find(None, Some("qwen3")).map(|f| f.name()), Some("qwen3"));
        assert_eq!(Family::find(Some("GPT2LMHeadModel"), Some("llama")), None);
    }
}
