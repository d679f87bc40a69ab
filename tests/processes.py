"""Several real processes of one run of main.py, joined by jax.distributed over localhost."""

import re
import socket
import time

import runs


def address() -> str:
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(count, arg, workdir, *options, own=None, env=None, absent=()):
    """`own`: further options of single processes, `env`: of their environment; by number."""
    meet, own, env = address(), own or {}, env or {}
    return [
        runs.start(
            arg, workdir, *options, *(own[i] if i in own else ()), JAX_COORDINATOR_ADDRESS=meet,
            JAX_NUM_PROCESSES=count, JAX_PROCESS_ID=i, PYTHONUNBUFFERED=1,
            # Small programs too: every process but the first finds all of them there.
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0, **(env[i] if i in env else {}),
        )
        for i in range(count) if i not in absent
    ]  # fmt: skip


def finish(processes):
    """(exit codes, outputs)."""
    found = [runs.finish(p) for p in processes]
    return [code for code, _ in found], [text for _, text in found]


def wait_for(process, pattern, timeout=400):
    """Reads a process's output up to a line that matches."""
    seen, end = [], time.monotonic() + timeout
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return "".join(seen)
        assert time.monotonic() < end, "".join(seen)
    raise AssertionError(f"ended before {pattern!r}:\n{''.join(seen)}")


def who(texts):
    """{(number, count, pid)} that the processes say of themselves."""
    found = [re.findall(r"^process (\d+) of (\d+): pid (\d+) on", text, re.M) for text in texts]
    return {tuple(map(int, one)) for lines in found for one in lines}
