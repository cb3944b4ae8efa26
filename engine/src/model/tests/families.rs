//! Families by name, and what their layers need.

use super::*;

/// Open-dCoder's folder says Qwen2: what it is has to be said.
#[test]
fn a_family_can_be_named_where_the_config_names_another() {
    let named = |name: &str| Overrides { family: Some(name.into()), mask_id: Some(9), ..Overrides::default() };
    let config = ModelConfig::load(&golden("qwen2"), &named("open_dcoder")).unwrap();
    assert_eq!((config.open_reach, config.shift, config.mask_id), (Reach::Bidirectional, true, Some(9)));
    assert_eq!(origin(&config, "family"), ("open_dcoder".into(), "override"));
    assert!(Model::load(&golden("qwen2"), &LoadOptions { overrides: named("open_dcoder"), ..options() }).is_ok());
    let error = ModelConfig::load(&golden("qwen2"), &named("gpt2")).unwrap_err().to_string();
    assert!(error.contains("gpt2 is unknown; known: llama"), "{error}");
}

/// Families without reference data: the layers of others under names of their own.
#[test]
fn families_without_references_load_what_their_authors_would_publish() {
    let named = |architecture: &str| json!({ "architectures": [architecture], "mask_token_id": 9 });
    let llada_moe = json!({
        "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "mask_token_id": 9, "intermediate_size": null,
        "moe_intermediate_size": null, "expert_intermediate_size": 32, "dense_intermediate_size": 160,
        "shared_expert_intermediate_size": null, "moe_layer_freq": [1, 1, 1], "qk_layernorm": true, "clip_qkv": null,
        "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": false, "norm_topk_prob": false,
    });
    for (layers_of, change, family, shift) in [
        ("qwen3_moe", named("RND1LM"), "rnd1", true),
        ("qwen3_moe", llada_moe, "llada_moe", false),
        ("qwen3", named("CoDALanguageModel"), "coda", true),
        ("qwen3", named("A2DQwen3LMHeadModel"), "a2d_qwen3", false),
        ("qwen2", named("A2DQwen2LMHeadModel"), "a2d_qwen2", false),
    ] {
        let dir = with_config(layers_of, |config| set(config, change));
        let model = Model::load(dir.path(), &options()).unwrap_or_else(|error| panic!("{family}: {error}"));
        let config = model.config();
        assert_eq!((config.family.name(), config.shift, config.open_reach), (family, shift, Reach::Bidirectional));
        // The mathematics is that of the family whose layers it has, but for what a row sees.
        let causal = rows_of(&model, &IDS, Reach::Causal, 4, &[10]);
        let other = Model::load(&golden(layers_of), &options()).unwrap();
        let same = causal == rows_of(&other, &IDS, Reach::Causal, 4, &[10]);
        assert_eq!(same, family != "llada_moe", "{family}: its weights are not divided by their sum");
    }
}

#[test]
fn experts_that_are_not_there_are_missed_by_name() {
    for (change, part) in [
        (json!({ "mlp_only_layers": [0] }), "model.layers.0.mlp.gate_proj.weight is missing"),
        (json!({ "num_experts": 9 }), "model.layers.0.mlp.experts.8.down_proj.weight is missing"),
    ] {
        let error = refusal(&with_config("qwen3_moe", |config| set(config, change)));
        assert!(error.contains(part), "{error}");
    }
}
