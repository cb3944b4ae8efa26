"""Greedy tokens of a GGUF file by llama.cpp (package xllamacpp).

usage: llama_cpp_greedy.py FILE IDS MAX_TOKENS
Prints a JSON list: the ids after the prompt's.
"""

import json
import sys

import xllamacpp


def main() -> None:
    file, ids, most = sys.argv[1], [int(i) for i in sys.argv[2].split(",")], int(sys.argv[3])
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = 1024
    params.warmup = False
    server = xllamacpp.Server(params)
    request = {"prompt": ids, "n_predict": most, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
    answer = server.handle_completions({**request, "logprobs": 1, "repeat_penalty": 1.0})
    print(json.dumps([token["id"] for token in answer["choices"][0]["logprobs"]["content"]]))


main()
