//! How the tensors of a checkpoint are called: a table row per scheme.

/// Names of a scheme. Those of a layer follow its prefix and number; all but `expert_bias` end in `.weight` or `.bias`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) embedding: &'static str,
    pub(super) norm: &'static str,
    pub(super) head: &'static str,
    /// Before a layer's number.
    pub(super) layers: &'static str,
    pub(super) attention_norm: &'static str,
    pub(super) projections: Projections,
    pub(super) q_norm: &'static str,
    pub(super) k_norm: &'static str,
    pub(super) out: &'static str,
    pub(super) ffn_norm: &'static str,
    /// Before the names of the feed-forward part.
    mlp: &'static str,
    pub(super) gate: &'static str,
    pub(super) up: &'static str,
    pub(super) down: &'static str,
}

/// Queries, keys and values.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Projections {
    /// A tensor each.
    Split([&'static str; 3]),
    /// Rows of all three in one tensor, in this order.
    Fused(&'static str),
}

/// Llama, Qwen2, Qwen3 and what descends from them.
pub(super) const LLAMA: Names = Names {
    embedding: "model.embed_tokens",
    norm: "model.norm",
    head: "lm_head",
    layers: "model.layers",
    attention_norm: "input_layernorm",
    projections: Projections::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    out: "self_attn.o_proj",
    ffn_norm: "post_attention_layernorm",
    mlp: "mlp.",
    gate: "gate_proj",
    up: "up_proj",
    down: "down_proj",
};

/// LLaDA, which descends from OLMo.
pub(super) const OLMO: Names = Names {
    embedding: "model.transformer.wte",
    norm: "model.transformer.ln_f",
    head: "model.transformer.ff_out",
    layers: "model.transformer.blocks",
    attention_norm: "attn_norm",
    projections: Projections::Split(["q_proj", "k_proj", "v_proj"]),
    out: "attn_out",
    ffn_norm: "ff_norm",
    mlp: "",
    gate: "ff_proj",
    up: "up_proj",
    down: "ff_out",
    ..LLAMA
};

/// LLaDA2, which descends from Ling.
pub(super) const LING: Names = Names {
    embedding: "model.word_embeddings",
    projections: Projections::Fused("attention.query_key_value"),
    q_norm: "attention.query_layernorm",
    k_norm: "attention.key_layernorm",
    out: "attention.dense",
    ..LLAMA
};

impl Names {
    /// `gate`, `up` or `down` of a layer's dense part.
    pub(super) fn dense(&self, name: &str) -> String {
        format!("{}{name}", self.mlp)
    }

    /// The same of the experts that every row goes to.
    pub(super) fn shared(&self, name: &str) -> String {
        format!("{}shared_experts.{name}", self.mlp)
    }

    /// The same of one expert.
    pub(super) fn expert(&self, expert: u32, name: &str) -> String {
        format!("{}experts.{expert}.{name}", self.mlp)
    }

    /// The router.
    pub(super) fn router(&self) -> String {
        format!("{}gate", self.mlp)
    }

    /// What is added to a router's scores for the choice; a whole name.
    pub(super) fn expert_bias(&self) -> String {
        format!("{}gate.expert_bias", self.mlp)
    }
}
