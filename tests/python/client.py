"""A client made from the .proto files alone: grpcio, grpcio-tools, nothing of this project's code.

usage: client.py PROTO_DIR HOST:PORT PROMPT
Prints one JSON object: the models, the text, tokens by commit, and the finish.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path

import grpc
from grpc_tools import protoc


def compile_protos(proto_dir: str, out: str) -> None:
    files = sorted(str(p) for p in Path(proto_dir, "unmask", "v1").glob("*.proto"))
    code = protoc.main(["protoc", f"-I{proto_dir}", f"--python_out={out}", f"--grpc_python_out={out}", *files])
    if code != 0:
        raise SystemExit(f"protoc failed with {code}")


def main() -> None:
    proto_dir, address, prompt = sys.argv[1:4]
    with tempfile.TemporaryDirectory() as out:
        compile_protos(proto_dir, out)
        sys.path.insert(0, out)
        messages = importlib.import_module("unmask.v1.inference_pb2")
        services = importlib.import_module("unmask.v1.inference_pb2_grpc")
        with grpc.insecure_channel(address) as channel:
            stub = services.InferenceServiceStub(channel)
            models = [m.name for m in stub.ListModels(messages.ListModelsRequest(), timeout=30).models]
            request = messages.GenerateRequest(text=prompt, decoding=messages.Decoding(max_tokens=64, seed=1))
            text, tokens, finish, settings = "", [], None, None
            for event in stub.Generate(request, timeout=60):
                kind = event.WhichOneof("event")
                if kind == "started":
                    settings = event.started.settings
                elif kind == "commit":
                    text += event.commit.text
                    tokens.extend(event.commit.token_ids)
                elif kind == "finish":
                    finish = event.finish
                    text += finish.text
            bad = None
            try:
                list(stub.Generate(messages.GenerateRequest(text="", decoding=messages.Decoding(temperature=-1))))
            except grpc.RpcError as error:
                bad = {"code": error.code().name, "message": error.details()}
    print(json.dumps({
        "models": models,
        "text": text,
        "tokens": tokens,
        "reason": finish.reason,
        "nfe": finish.nfe,
        "origins": dict(settings.origins),
        "bad": bad,
    }))


if __name__ == "__main__":
    main()
