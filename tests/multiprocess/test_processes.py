"""Promise 5 with two processes: one run, whichever process the signal goes to."""

import os
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
import runs

pytestmark = pytest.mark.multiprocess

FAST = ("--config.checkpoint.every=3", "--config.report.every=1")


def pair(arg, workdir, *options):
    """Two processes of one run; gloo over localhost."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        runs.start(
            arg,
            workdir,
            *options,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=2,
            JAX_PROCESS_ID=i,
            PYTHONUNBUFFERED=1,
            DCAE_JAX_TEST_PROCESS=i,
        )
        for i in range(2)
    ]


def finish(processes):
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


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run in one process."""
    workdir = tmp_path_factory.mktemp("processes") / "one"
    code, text = runs.main("phase1", workdir, *FAST)
    assert code == 0, text
    return workdir


def assert_equal_runs(one, two):
    """Same losses (f32 sums in another order), same scores, same parameters."""
    rows_one, rows_two = runs.rows(one), runs.rows(two)
    assert rows_one.keys() == rows_two.keys()
    for k, row in rows_one.items():
        for name in row:
            if name.startswith(("train/loss", "folder")):
                # 1e-6 at equal weights; 12 Adam steps let the last digits grow.
                rtol = 1e-6 if k <= 1 else 1e-4
                np.testing.assert_allclose(rows_two[k][name], row[name], rtol=rtol, err_msg=name)
    a, meta_a = runs.state("phase1", one)
    b, meta_b = runs.state("phase1", two)
    assert (meta_a["processes"], a.keys()) == (1, b.keys())
    for path in a:
        if "qkv/bias" not in path and path.startswith(("params", "ema")):  # true gradient zero
            np.testing.assert_allclose(b[path], a[path], atol=1e-4, err_msg=path)
    return meta_b


@pytest.fixture(scope="module")
def interrupted(one, tmp_path_factory):
    """Two processes; SIGTERM to the second one only; both outputs and codes."""
    workdir = tmp_path_factory.mktemp("processes") / "two"
    processes = pair("phase1", workdir, *FAST, "--config.steps=2000")
    seen = wait_for(processes[0], r"^step 2/")
    os.kill(processes[1].pid, signal.SIGTERM)
    codes, texts = finish(processes)
    return workdir, codes, [seen + texts[0], texts[1]]


def test_promise_5_sigterm_to_one_process_saves_on_both(interrupted):
    workdir, codes, texts = interrupted
    assert codes == [42, 42], texts
    (said,) = re.findall(r"preempted: saved step (\d+)", texts[0])
    assert "preempted" not in texts[1]  # only process 0 prints
    assert runs.steps(workdir)[-1] == int(said)
    _, meta = runs.state("phase1", workdir)
    assert meta["processes"] == 2 and meta["device"].startswith("2 x") and meta["step"] == int(said)


def test_promise_5_two_processes_are_one_run(one, tmp_path):
    """From scratch to the end by two; SIGTERM to the first one in between; then resumed by two."""
    processes = pair("phase1", tmp_path, *FAST)
    seen = wait_for(processes[0], r"eval after step 0|^step 1/")
    os.kill(processes[0].pid, signal.SIGTERM)
    codes, texts = finish(processes)
    assert codes == [42, 42], (seen, texts)
    stopped = runs.steps(tmp_path)[-1]
    assert 0 <= stopped < 12
    shutil.copytree(tmp_path, tmp_path.parent / "copy")
    codes, texts = finish(pair("phase1", tmp_path, *FAST))
    assert codes == [0, 0], texts
    assert f"own workdir, step {stopped}" in texts[0]
    meta = assert_equal_runs(one, tmp_path)
    assert meta["processes"] == 2
    # What two saved, one resumes: on one device of this process.
    code, text = runs.main("phase1", tmp_path.parent / "copy", *FAST)
    assert code == 0 and f"own workdir, step {stopped}" in text, text
    assert assert_equal_runs(one, tmp_path.parent / "copy")["processes"] == 1


def test_sigterm_before_the_processes_have_joined_is_not_lost(tmp_path):
    """jax replaces our handler when it joins; what came before is handed over."""
    processes = pair("phase1", tmp_path, *FAST, "--config.steps=2000")
    time.sleep(1.5)  # the imports, or waiting for each other
    os.kill(processes[1].pid, signal.SIGTERM)
    codes, texts = finish(processes)
    assert codes == [42, 42], texts
    assert runs.steps(tmp_path)


def test_a_process_that_fails_or_dies_takes_the_other_with_it(tmp_path):
    """Nobody hangs: a refusal on process 0 alone (the lock), and a killed process."""
    holder = runs.start("phase1", tmp_path, *FAST, "--config.steps=100000")
    wait_for(holder, r"^step 1/")
    begin = time.monotonic()
    codes, texts = finish(pair("phase1", tmp_path, *FAST))
    assert codes[0] == 2 and codes[1] != 0 and "is in use by" in texts[0], texts
    assert time.monotonic() - begin < 90
    holder.kill()
    holder.communicate()
    processes = pair("phase1", tmp_path, *FAST, "--config.steps=100000")
    wait_for(processes[0], r"^step ")
    processes[1].kill()
    begin = time.monotonic()
    codes, texts = finish(processes)
    assert codes[0] not in (0, 42) and time.monotonic() - begin < 90, texts
    assert runs.state("phase1", tmp_path)[1]["step"] >= 0  # a valid checkpoint is there
