"""Runs programs that nobody trusts, one after the other, each in a child of its own.

Reads JSON lines {"source": .., "results": bool} from standard input; answers each with a line {"outcome": "passed" |
"failed" | "timeout", "detail": ..}. Limits come as arguments: seconds, bytes of memory.
"""

import json
import os
import resource
import select
import signal
import sys

SECONDS, MEMORY = float(sys.argv[1]), int(sys.argv[2])
DETAIL_BYTES_MAX = 4000


def child(source, writer):
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS) + 1, int(SECONDS) + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Only unprivileged users are bound by it; the process group is killed in any case.
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    try:
        scope = {"__name__": "task", "RESULTS": []}
        exec(compile(source, "task", "exec"), scope)
        answer = ["passed", json.dumps(scope["RESULTS"])]
    except BaseException as error:  # whatever a program raises is its failure
        answer = ["failed", f"{type(error).__name__}: {error}"[:DETAIL_BYTES_MAX]]
    with os.fdopen(writer, "w") as out:
        json.dump(answer, out)
        out.flush()
        os._exit(0)


def run(source):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        child(source, writer)
    os.close(writer)
    data, timed_out = b"", False
    while True:
        ready, _, _ = select.select([reader], [], [], SECONDS)
        if not ready:
            timed_out = True
            break
        part = os.read(reader, 65536)
        if not part:
            break
        data += part
    os.close(reader)
    for kill in (lambda: os.killpg(pid, signal.SIGKILL), lambda: os.kill(pid, signal.SIGKILL)):
        try:
            kill()
        except ProcessLookupError:
            pass
    os.waitpid(pid, 0)
    if timed_out:
        return {"outcome": "timeout", "detail": f"no end within {SECONDS} s"}
    try:
        outcome, detail = json.loads(data)
        return {"outcome": outcome, "detail": detail}
    except ValueError:
        return {"outcome": "failed", "detail": "ended without an answer"}


for line in sys.stdin:
    print(json.dumps(run(json.loads(line)["source"])), flush=True)
