//! The facts that tell one family of checkpoints from another: a table row each.

use super::Reach;
use super::names::{LING, LLAMA, Names, OLMO};
use crate::request::Ends;
use unmask_kernels::Score;

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
    /// Positions of a block that its authors fill together, left to right; 0 for all.
    sub_block: u32,
    pub(super) names: &'static Names,
    /// Keys of its configs that have another name elsewhere: theirs, then the usual one.
    pub(super) keys: &'static [(&'static str, &'static str)],
    /// Keys whose values this program cannot differ in: key, then the value as JSON.
    pub(super) fixed: &'static [(&'static str, &'static str)],
    /// How routers of its layers score, of families with experts.
    pub(super) router: Option<Score>,
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
    sub_block: 0,
    names: &LLAMA,
    keys: &[],
    fixed: &[],
    router: None,
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

/// What reads everything at once: each row attends to all others.
const BIDIRECTIONAL: Family = Family {
    open_reach: Reach::Bidirectional,
    kept_reach: Reach::Bidirectional,
    block_size: 32,
    mask_token: Some("<|mask|>"),
    ..AUTOREGRESSIVE
};

/// What reads block by block.
const BLOCK_CAUSAL: Family =
    Family { open_reach: Reach::Block, kept_reach: Reach::Block, ends: AT_BLOCK_END, ..AUTOREGRESSIVE };

/// The last block is decoded whole, and a stop token counts when its block is full.
const AT_BLOCK_END: Ends = Ends { whole_last_block: true, at_first_stop: false };

const SDAR: Family = Family {
    name: "sdar",
    architecture: "SDARForCausalLM",
    model_type: "sdar",
    qk_norm: true,
    block_size: 4,
    mask_token: Some("<|MASK|>"),
    ..BLOCK_CAUSAL
};

const LLADA: Family = Family {
    name: "llada",
    architecture: "LLaDAModelLM",
    model_type: "llada",
    mask_token: Some("<|mdm_mask|>"),
    names: &OLMO,
    keys: &[
        ("d_model", "hidden_size"),
        ("n_layers", "num_hidden_layers"),
        ("n_heads", "num_attention_heads"),
        ("n_kv_heads", "num_key_value_heads"),
        ("mlp_hidden_size", "intermediate_size"),
        ("embedding_size", "vocab_size"),
        ("max_sequence_length", "max_position_embeddings"),
        ("weight_tying", "tie_word_embeddings"),
        ("activation_type", "hidden_act"),
    ],
    fixed: &[
        ("block_type", "\"llama\""),
        ("layer_norm_type", "\"rms\""),
        ("rope", "true"),
        ("alibi", "false"),
        ("attention_layer_norm", "false"),
        ("include_bias", "false"),
        ("include_qkv_bias", "false"),
        ("input_emb_norm", "false"),
        ("scale_logits", "false"),
    ],
    ..BIDIRECTIONAL
};

const LLADA_MOE: Family = Family {
    name: "llada_moe",
    architecture: "LLaDAMoEModelLM",
    // Theirs is "llada" too.
    model_type: "llada_moe",
    qk_norm: true,
    router: Some(Score::Softmax),
    keys: &[
        ("expert_intermediate_size", "moe_intermediate_size"),
        ("dense_intermediate_size", "intermediate_size"),
        ("moe_router_score_function", "score_function"),
        ("router_num_group", "n_group"),
    ],
    fixed: &[("qk_layernorm", "true"), ("shared_expert_intermediate_size", "null"), ("clip_qkv", "null")],
    ..BIDIRECTIONAL
};

const LLADA2_MOE: Family = Family {
    name: "llada2_moe",
    architecture: "LLaDA2MoeModelLM",
    model_type: "llada2_moe",
    qk_norm: true,
    block_size: 32,
    mask_token: Some("<|mask|>"),
    names: &LING,
    router: Some(Score::Sigmoid),
    fixed: &[
        ("use_bias", "false"),
        ("use_qkv_bias", "false"),
        ("use_qk_norm", "true"),
        ("use_rmsnorm", "true"),
        ("norm_head", "false"),
        ("norm_softmax", "false"),
        ("using_split_qkv_in_self_attention", "false"),
    ],
    ..BLOCK_CAUSAL
};

/// Every family this program loads. Sources: the authors' configurations and modelling code.
const FAMILIES: [Family; 20] = [
    Family { name: "llama", architecture: "LlamaForCausalLM", model_type: "llama", ..AUTOREGRESSIVE },
    Family { name: "qwen2", architecture: "Qwen2ForCausalLM", model_type: "qwen2", qkv_bias: true, ..AUTOREGRESSIVE },
    Family { name: "qwen3", architecture: "Qwen3ForCausalLM", model_type: "qwen3", qk_norm: true, ..AUTOREGRESSIVE },
    Family {
        name: "qwen3_moe",
        architecture: "Qwen3MoeForCausalLM",
        model_type: "qwen3_moe",
        qk_norm: true,
        router: Some(Score::Softmax),
        ..AUTOREGRESSIVE
    },
    Family {
        name: "stable_diffcoder",
        architecture: "StableDiffcoderForCausalLM",
        model_type: "stable_diffcoder",
        block_size: 4,
        mask_token: Some("<[MASK_TOKEN]>"),
        ends: Ends { whole_last_block: false, at_first_stop: false },
        ..BLOCK_CAUSAL
    },
    SDAR,
    Family {
        name: "sdar_moe",
        architecture: "SDARMoeForCausalLM",
        model_type: "sdar_moe",
        router: Some(Score::Softmax),
        ..SDAR
    },
    Family {
        name: "fast_dllm_v2",
        architecture: "Fast_dLLM_QwenForCausalLM",
        model_type: "Fast_dLLM_Qwen",
        shift: true,
        qkv_bias: true,
        block_size: 32,
        mask_token: Some("|<MASK>|"),
        sub_block: 8,
        keys: &[("bd_size", "block_size")],
        ends: Ends { whole_last_block: true, at_first_stop: true },
        ..BLOCK_CAUSAL
    },
    LLADA2_MOE,
    LLADA,
    LLADA_MOE,
    // Dream, Dream-Coder, DiffuCoder.
    Family {
        name: "dream",
        architecture: "DreamModel",
        model_type: "Dream",
        shift: true,
        qkv_bias: true,
        ..BIDIRECTIONAL
    },
    Family {
        name: "coda",
        architecture: "CoDALanguageModel",
        model_type: "CoDA",
        shift: true,
        qk_norm: true,
        ..BIDIRECTIONAL
    },
    Family {
        name: "rnd1",
        architecture: "RND1LM",
        model_type: "rnd1",
        shift: true,
        qk_norm: true,
        router: Some(Score::Softmax),
        ..BIDIRECTIONAL
    },
    Family {
        name: "a2d_qwen2",
        architecture: "A2DQwen2LMHeadModel",
        model_type: "a2d-qwen2",
        qkv_bias: true,
        ..BIDIRECTIONAL
    },
    Family {
        name: "a2d_qwen3",
        architecture: "A2DQwen3LMHeadModel",
        model_type: "a2d-qwen3",
        qk_norm: true,
        ..BIDIRECTIONAL
    },
    // Configs of these name another family: they are found by an override only.
    Family { name: "open_dcoder", shift: true, qkv_bias: true, mask_token: Some("<M>"), ..BIDIRECTIONAL },
    Family { name: "a2d_qwen2_block", qkv_bias: true, block_size: 32, mask_token: Some("<|mask|>"), ..BLOCK_CAUSAL },
    Family { name: "a2d_qwen3_block", qk_norm: true, block_size: 32, mask_token: Some("<|mask|>"), ..BLOCK_CAUSAL },
    OWN,
];

impl Family {
    /// The family of our own models.
    pub fn own() -> Family {
        OWN
    }

    /// The family of a config: by architecture, then by model type.
    pub fn find(architecture: Option<&str>, model_type: Option<&str>) -> Option<Family> {
        let named = architecture.filter(|name| !name.is_empty());
        let by_architecture = FAMILIES.iter().find(|family| Some(family.architecture) == named);
        // A named but unknown architecture is not rescued by a familiar model_type: that key is reused.
        let by_type = || {
            FAMILIES.iter().find(|family| {
                architecture.is_none() && Some(family.model_type) == model_type && model_type != Some("")
            })
        };
        by_architecture.or_else(by_type).copied()
    }

    /// The family of that name.
    pub fn named(name: &str) -> Option<Family> {
        FAMILIES.iter().find(|family| family.name == name).copied()
    }

    /// Names of all families.
    pub fn names() -> String {
        FAMILIES.map(|family| family.name).join(", ")
    }

    /// Architectures this program loads.
    pub fn known() -> String {
        let named = FAMILIES.iter().map(|family| family.architecture).filter(|name| !name.is_empty());
        named.collect::<Vec<_>>().join(", ")
    }

    /// Short name, as in reference data.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// How outputs end.
    pub fn ends(&self) -> Ends {
        self.ends
    }

    /// Positions of a block that its authors fill together, left to right; 0 for all of them.
    pub fn sub_block(&self) -> u32 {
        self.sub_block
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
        assert_eq!((Family::find(Some(""), None), Family::find(None, Some(""))), (None, None));
        assert_eq!(Family::named("open_dcoder").map(|f| (f.diffuses(), f.shift)), Some((true, true)));
    }
}
