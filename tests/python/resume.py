"""A stream that goes on through another gateway when its own is lost: no token twice, none missing.

usage: resume.py PROTO_DIR HOST:PORT[,HOST:PORT...] PROMPT [--max-tokens N] [--seed N] [--temperature T]
Prints one JSON object per line: started, each commit as it comes, and at the end the whole text with how often it went on
elsewhere. Made from the .proto files alone, as client.py; unmask generate --endpoint A,B does the same in Rust.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time

import grpc
from client import compile_protos

# Rounds over all gateways without a new token before the last error counts.
ROUNDS_MAX = 3
# Between two rounds (seconds).
ROUND_PAUSE_S = 0.5
# Longest stream (seconds).
STREAM_LIMIT_S = 600
# A machine that falls silent closes nothing: without pings a stream would wait for it for ever.
CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 4000),
    ("grpc.http2.max_pings_without_data", 0),
]


class OtherTokens(Exception):
    """A gateway took the stream to workers that compute other bits."""


def elsewhere(error: Exception) -> bool:
    """Whether another gateway may do better. Errors that name a reason were made by a gateway, those without by a
    connection that broke."""
    if isinstance(error, OtherTokens):
        return True
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    code = error.code()
    if code == grpc.StatusCode.UNAVAILABLE:
        return True
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return b"google.rpc.RetryInfo" in details
    broken = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)
    return code in broken and b"google.rpc.ErrorInfo" not in details


class ResumingStream:
    """A request and the gateways that may serve it; iterating gives its events, up to the finish."""

    def __init__(self, messages, stubs, request):
        self.messages, self.stubs, self.original = messages, stubs, request
        self.started = None
        self.ids, self.passes = [], 0
        # Times it went on through another gateway.
        self.resumed = 0

    def request(self):
        """What goes on from here: the settings of Started, the ids received, the passes spent on them."""
        if self.started is None:
            return self.original
        request = self.messages.GenerateRequest()
        request.CopyFrom(self.original)
        request.ClearField("decoding")
        request.model = self.started.model
        request.resume.CopyFrom(self.messages.Resume(
            request_id=self.started.request_id,
            received_token_ids=self.ids,
            settings=self.started.settings,
            passes_used=self.passes,
            numerics_id=self.started.numerics_id,
        ))
        return request

    def attempt(self, stub):
        """One gateway's events, without the second Started of a stream that was resumed."""
        for event in stub.Generate(self.request(), timeout=STREAM_LIMIT_S):
            kind = event.WhichOneof("event")
            if kind == "started":
                if self.started is not None:
                    if event.started.numerics_id != self.started.numerics_id:
                        raise OtherTokens(event.started.numerics_id)
                    continue
                self.started = event.started
            elif kind == "commit":
                self.ids.extend(event.commit.token_ids)
                self.passes += event.commit.steps
            yield kind, event

    def __iter__(self):
        tried, gateway = 0, 0
        while True:
            have = len(self.ids)
            try:
                for kind, event in self.attempt(self.stubs[gateway]):
                    yield kind, event
                    if kind == "finish":
                        return
                error = None
            except (grpc.RpcError, OtherTokens) as problem:
                if not elsewhere(problem):
                    raise
                error = problem
            # Only what is final is progress: a request that breaks whoever begins it must come to an end.
            tried = 1 if len(self.ids) > have else tried + 1
            if tried >= ROUNDS_MAX * len(self.stubs):
                raise error or RuntimeError("the stream ended without a finish")
            gateway = (gateway + 1) % len(self.stubs)
            self.resumed += self.started is not None
            if tried % len(self.stubs) == 0:
                time.sleep(ROUND_PAUSE_S)


def say(**fields) -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("protos")
    parser.add_argument("gateways", help="HOST:PORT, several with commas between")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        compile_protos(args.protos, out)
        sys.path.insert(0, out)
        messages = importlib.import_module("unmask.v1.inference_pb2")
        services = importlib.import_module("unmask.v1.inference_pb2_grpc")
    channels = [grpc.insecure_channel(address, options=CHANNEL_OPTIONS) for address in args.gateways.split(",")]
    stubs = [services.InferenceServiceStub(channel) for channel in channels]
    decoding = messages.Decoding(max_tokens=args.max_tokens, seed=args.seed, temperature=args.temperature)
    stream = ResumingStream(messages, stubs, messages.GenerateRequest(text=args.prompt, decoding=decoding))
    text = ""
    for kind, event in stream:
        if kind == "started":
            say(started=event.started.request_id, prompt_tokens=event.started.prompt_tokens)
        elif kind == "commit":
            text += event.commit.text
            say(position=event.commit.first_position, tokens=list(event.commit.token_ids))
        elif kind == "finish":
            text += event.finish.text
            say(text=text, reason=event.finish.reason, resumed=stream.resumed)


if __name__ == "__main__":
    main()
