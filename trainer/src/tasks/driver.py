"""Runs programs that nobody trusts, one after the other, each in a child of its own.

Reads JSON lines {"source": ..} from standard input; answers each with a line {"outcome": "passed" | "failed" |
"timeout", "detail": ..}. Limits come as arguments: seconds, bytes of memory. What a program can ask of the kernel is
limited by `confine`. A program cannot be kept from changing its own interpreter: one that is written to answer for
itself can claim to have passed.
"""

import json
import os
import resource
import secrets
import select
import signal
import socket
import sys
import time

SECONDS, MEMORY = float(sys.argv[1]), int(sys.argv[2])
DETAIL_BYTES_MAX = 4000
ANSWER_BYTES_MAX = 1 << 20


# An interrupt from the terminal is for those who started this; it ends when they are gone.
signal.signal(signal.SIGINT, signal.SIG_IGN)


def child(source, writer, secret):
    os.setsid()
    die_with_parent()
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
        confine()
        scope = {"__name__": "task", "RESULTS": []}
        exec(compile(source, "task", "exec"), scope)
        answer = [secret, "passed", json.dumps(scope["RESULTS"])]
    except BaseException as error:  # whatever a program raises is its failure
        answer = [secret, "failed", f"{type(error).__name__}: {error}"[:DETAIL_BYTES_MAX]]
    with os.fdopen(writer.detach(), "w") as out:
        json.dump(answer, out)
        out.flush()
        os._exit(0)


def read_all(reader):
    """What comes until the other side is closed; None when that takes too long."""
    data, end = b"", time.monotonic() + SECONDS
    while len(data) <= ANSWER_BYTES_MAX:
        ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        part = reader.recv(65536)
        if not part:
            break
        data += part
    return data


def run(source):
    # Sockets: unlike pipes, nobody can open them once more by way of /proc.
    reader, writer = socket.socketpair()
    secret = secrets.token_hex(16)
    pid = os.fork()
    if pid == 0:
        reader.close()
        child(source, writer, secret)
    writer.close()
    data = read_all(reader)
    reader.close()
    for kill in (lambda: os.killpg(pid, signal.SIGKILL), lambda: os.kill(pid, signal.SIGKILL)):
        try:
            kill()
        except ProcessLookupError:
            pass
    os.waitpid(pid, 0)
    if data is None:
        return {"outcome": "timeout", "detail": f"no end within {SECONDS} s"}
    try:
        said, outcome, detail = json.loads(data)
        if said != secret or not isinstance(outcome, str) or not isinstance(detail, str):
            raise ValueError
        # Half a character would not be valid in the answer.
        return {"outcome": outcome, "detail": detail.encode("utf-8", "replace").decode()}
    except Exception:  # whatever a program wrote there
        return {"outcome": "failed", "detail": "ended without an answer"}


for line in sys.stdin:
    print(json.dumps(run(json.loads(line)["source"])), flush=True)
