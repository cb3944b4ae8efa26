"""Greedy tokens of a model folder by Hugging Face transformers, in f32.

usage: transformers_greedy.py FOLDER IDS MAX_TOKENS
Prints a JSON list: the ids after the prompt's.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, ids, most = sys.argv[1], [int(i) for i in sys.argv[2].split(",")], int(sys.argv[3])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, do_sample=False)
    print(json.dumps(out[0].tolist()[len(ids):]))


main()
