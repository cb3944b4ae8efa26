//! Names of tensors in GGUF files and in safetensors, and the order of rows in which the two differ.

/// Outside the layers.
const OUTER: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// In a layer, without `.weight` or `.bias`.
const LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The name in safetensors; `None` for a tensor that no forward pass here reads.
pub fn to_safetensors(name: &str) -> Option<String> {
    if let Some((_, theirs)) = OUTER.iter().find(|(gguf, _)| *gguf == name) {
        return Some((*theirs).to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, suffix) = rest.split_once('.')?;
    let (_, theirs) = LAYER.iter().find(|(gguf, _)| *gguf == part)?;
    Some(format!("model.layers.{}.{theirs}.{suffix}", number(layer)?)).filter(|_| is_suffix(suffix))
}

/// The name in GGUF files.
pub fn to_gguf(name: &str) -> Option<String> {
    if let Some((gguf, _)) = OUTER.iter().find(|(_, theirs)| *theirs == name) {
        return Some((*gguf).to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, suffix) = rest.rsplit_once('.')?;
    let (gguf, _) = LAYER.iter().find(|(_, theirs)| *theirs == part)?;
    Some(format!("blk.{}.{gguf}.{suffix}", number(layer)?)).filter(|_| is_suffix(suffix))
}

fn is_suffix(suffix: &str) -> bool {
    matches!(suffix, "weight" | "bias")
}

/// A layer's number, spelled in the one way: two names must not become one.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number: &u32| number.to_string() == text)
}

/// Which row of the source is a row of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The same.
    Same,
    /// llama.cpp's Llama files rotate neighbouring rows of a head (0 with 1, 2 with 3); ours and Hugging Face's rotate
    /// row i with row i + head_dim / 2. This takes the first order to the second.
    ToHalves {
        /// Rows of a head.
        head_dim: usize,
    },
    /// The other way.
    ToPairs {
        /// Rows of a head.
        head_dim: usize,
    },
}

impl Order {
    /// The source's row.
    pub fn source(self, row: usize) -> usize {
        match self {
            Order::Same => row,
            Order::ToHalves { head_dim } => {
                let (head, i, half) = (row / head_dim, row % head_dim, head_dim / 2);
                head * head_dim + 2 * (i % half) + i / half
            }
            Order::ToPairs { head_dim } => {
                let (head, i, half) = (row / head_dim, row % head_dim, head_dim / 2);
                head * head_dim + i % 2 * half + i / 2
            }
        }
    }
}

/// Whether a Llama file of llama.cpp has other rows than ours in this tensor (named as in GGUF files).
pub fn is_rotated(name: &str) -> bool {
    name.rsplit('.').nth(1).is_some_and(|part| part == "attn_q" || part == "attn_k")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn names_go_there_and_back() {
        let outer = OUTER.iter().map(|(gguf, _)| (*gguf).to_owned());
        let inner = LAYER.iter().flat_map(|(gguf, _)| [format!("blk.7.{gguf}.weight"), format!("blk.12.{gguf}.bias")]);
        for name in outer.chain(inner) {
            assert_eq!(to_gguf(&to_safetensors(&name).unwrap()).unwrap(), name);
        }
        for name in ["rope_freqs.weight", "blk.07.attn_q.weight", "blk.-1.attn_q.weight", "blk.1.attn_q.scale", "blk.1"]
        {
            assert_eq!(to_safetensors(name), None, "{name}");
        }
    }

    #[test]
    fn llama_files_hold_the_pairs_of_a_rotation_side_by_side() {
        // Two heads of six rows: as `LlamaModel.permute` of llama.cpp's converter writes rows 0, 1, ..
        let pairs = Order::ToPairs { head_dim: 6 };
        let written: Vec<usize> = (0..12).map(|row| pairs.source(row)).collect();
        assert_eq!(written, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        let halves = Order::ToHalves { head_dim: 6 };
        assert!((0..12).all(|row| written[halves.source(row)] == row));
        assert!(is_rotated("blk.3.attn_k.weight") && !is_rotated("blk.3.attn_k_norm.weight"));
    }
}
