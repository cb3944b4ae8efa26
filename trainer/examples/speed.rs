//! Throughput of training steps on random documents.
use rand::{Rng, SeedableRng};
use unmask_trainer::{data::Documents, *};
struct Noise;
impl Documents for Noise {
    fn len(&self) -> usize { 1000 }
    fn encode(&self, _: usize, rng: &mut rand_chacha::ChaCha8Rng) -> Vec<u32> {
        let n = rng.random_range(60..256);
        let mut v: Vec<u32> = (0..n).map(|_| rng.random_range(5..1024)).collect();
        v.push(0); v
    }
}
fn main() -> anyhow::Result<()> {
    let _ = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    tracing_subscriber::fmt().init();
    let a: Vec<String> = std::env::args().collect();
    let (h, f, l, heads, kv, tokens, micro, threads, rule, steps) = (&a[1], &a[2], &a[3], &a[4], &a[5], &a[6], &a[7], &a[8], &a[9], &a[10]);
    let dir = tempfile::tempdir()?;
    let text = format!(r#"
out = "{}"
steps = {steps}
threads = {threads}
model = {{ hidden_size = {h}, intermediate_size = {f}, num_hidden_layers = {l}, num_attention_heads = {heads}, num_key_value_heads = {kv}, head_dim = 32 }}
batch = {{ tokens = {tokens}, length = 256, micro_rows = {micro}, block_sizes = [4,8,16,32] }}
optimizer = {{ rule = "{rule}", rate = 1e-3, warm_up = 1, decay = "cosine" }}
eval = {{ every = 1000, documents = 1 }}
"#, dir.path().display());
    let raw: RawMaskStage = toml::from_str(&text)?;
    let v = checkpoint::Vocabulary::standard(1024);
    train_mask(&raw.validate()?, Sources { train: &Noise, held_out: &Noise, vocabulary: &v, tokenizer: dir.path() })?;
    for line in std::fs::read_to_string(dir.path().join("log.jsonl"))?.lines() { println!("{line}"); }
    Ok(())
}
