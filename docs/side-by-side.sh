#!/usr/bin/env bash
# One step of Qwen3-0.6B's shape on this machine: ours beside candle's, in one run, drawn weights.
#
#   docs/side-by-side.sh [ROWS] [CONTEXT]          (default 16 rows, context 128)
#
# Others on the same machine, where they are installed (a model file is needed; the figure to compare is the time of a
# batch of ROWS tokens):
#   llama.cpp: llama-bench -m qwen3-0.6b-bf16.gguf -p 16 -n 0 -t $(nproc)
#              (prints tokens/s of a batch of 16; it computes the logits of one row, ours those of all)
#   PyTorch:   python3 -c 'import torch, time, transformers as t
#              m = t.AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", dtype=torch.bfloat16).eval()
#              x = torch.arange(16)[None]
#              with torch.inference_mode():
#                  for _ in range(9): s = time.time(); m(x); print((time.time() - s) * 1e3, "ms")'
set -euo pipefail
cd "$(dirname "$0")/.."
rows=${1:-16} context=${2:-128}

cargo build --release --quiet --locked
cargo build --release --quiet --locked -p unmask-trainer --example candle_step
target/release/unmask bench step --shape qwen3-0.6b --dtype f32,bf16,int8 --rows "$rows" --context "$context" |
  grep -E '^(qwen3|f32|bf16|int8)'
echo "candle, f32 (it has no bf16 or int8 products on CPUs): $(target/release/examples/candle_step "$rows" "$context") ms"
