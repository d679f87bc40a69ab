"""Promise 5 in one process: real signals from outside, a second run, a full disk."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import runs

pytestmark = pytest.mark.multiprocess

# Evaluation and saving take a large part of the time: signals hit them too.
OPTIONS = ("--config.checkpoint.every=2", "--config.steps=40")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, and its duration (compiled programs are cached from here on)."""
    folder = tmp_path_factory.mktemp("signals")
    assert runs.main("phase1", folder / "first", *OPTIONS, "--config.steps=1")[0] == 0
    begin = time.monotonic()
    code, text = runs.main("phase1", folder / "whole", *OPTIONS)
    assert code == 0, text
    return folder / "whole", time.monotonic() - begin


def signalled(workdir, seconds, after_step=0):
    """Starts the run, waits for a step's line, then so long, then sends SIGTERM.

    (exit code, output, whether it still ran).
    """
    process = runs.start("phase1", workdir, *OPTIONS, PYTHONUNBUFFERED=1)
    begin = ""
    if after_step:
        for line in process.stdout:
            begin += line
            match = re.match(r"step (\d+)/", line)
            if match and int(match[1]) >= after_step:
                break
    try:
        out, _ = process.communicate(timeout=seconds)
        return process.returncode, begin + out, False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code, out = runs.finish(process)
        return code, begin + out, True


def final(workdir):
    return runs.state("phase1", workdir, steps=40)


def assert_ends_alike(whole, workdir):
    code, text = runs.main("phase1", workdir, *OPTIONS)
    assert code == 0, text
    a, b = final(whole), final(workdir)
    assert a[0].keys() == b[0].keys()
    assert all(a[0][k].tobytes() == b[0][k].tobytes() for k in a[0])
    assert runs.rows(whole).keys() == runs.rows(workdir).keys()


def times(count, longest):
    """So many times, one in each equal part of the run, drawn anew with each change of the seed."""
    gen = random.Random(1)
    first = 0.6  # Python itself is up; before that nothing has begun
    width = (longest - first) / count
    return [first + width * (i + gen.random()) for i in range(count)]


def test_promise_5_sigterm_at_random_times(whole, tmp_path):
    """One start after the other in one workdir, each interrupted; then the run must be whole.

    The first in its start-up, the others a random moment after a random step: in a step, an
    evaluation or a save.  (Moments of the clock alone would be the start-up on a busy machine.)
    """
    gen = random.Random(1)
    moments = [(0, gen.uniform(0.6, 3))]
    moments += [(first + gen.randrange(5), gen.uniform(0, 0.1)) for first in (3, 9, 15)]
    for after_step, seconds in moments:
        before = runs.steps(tmp_path)
        code, text, sent = signalled(tmp_path, seconds, after_step)
        assert sent and code == 42, (after_step, seconds, code, text)
        (said,) = re.findall(r"preempted: saved step (\d+)", text)
        _, meta = final(tmp_path)  # valid, by its digests
        assert meta["step"] == int(said) >= max([after_step, *before])
    assert_ends_alike(whole[0], tmp_path)


def _done(workdir):
    return (workdir / "summary.json").exists()


@pytest.mark.slow
def test_promise_5_sigterm_at_ten_random_times(whole, tmp_path):
    for i, seconds in enumerate(times(10, whole[1])):
        workdir = tmp_path / f"{i}"
        code, text, sent = signalled(workdir, seconds)
        assert code == (0 if not sent or _done(workdir) else 42), (seconds, text)
        assert_ends_alike(whole[0], workdir)


def test_promise_5_sigterm_with_data_workers(whole, tmp_path):
    """The signal reaches the whole process group, as from a batch system; no worker is left."""
    process = subprocess.Popen(
        runs.command(
            "phase1", tmp_path, *OPTIONS, "--config.data.workers=1", "--config.steps=4000"
        ),
        cwd=runs.ROOT,
        env=runs.environment(PYTHONUNBUFFERED=1),
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith("step 3/"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    code, text = runs.finish(process)
    assert code == 42 and "preempted: saved step" in text, seen + text
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # the resource tracker ends a moment after its parent
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    assert_ends_alike(whole[0], tmp_path)


def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(whole, tmp_path):
    reference, _ = whole
    gen = random.Random(2)
    for i in range(2):
        process = runs.start("phase1", tmp_path, *OPTIONS, PYTHONUNBUFFERED=1)
        reached = 0
        for line in process.stdout:
            match = re.match(r"step (\d+)/", line)
            reached = int(match[1]) if match else reached
            if reached >= (6, 21)[i]:
                break
        time.sleep(gen.random() * 0.2)  # in a step, an evaluation or a save
        process.kill()
        rest = process.communicate()[0]
        reached = max([reached, *map(int, re.findall(r"^step (\d+)/", rest, re.M))])
        _, meta = final(tmp_path)
        # A checkpoint every 2 steps; one may have been under way, and the log runs one step late.
        assert meta["step"] >= reached - 4, (meta["step"], reached)
    assert_ends_alike(reference, tmp_path)
    left = [p.name for p in (tmp_path / "checkpoints").iterdir() if not p.name.isdigit()]
    assert not left, "half-written checkpoints were not removed"


def test_two_runs_in_one_workdir(tmp_path):
    (tmp_path / "run.lock").write_text("process 1 on elsewhere since 1970")  # of a dead run
    first = runs.start("phase1", tmp_path, "--config.steps=100000", PYTHONUNBUFFERED=1)
    for line in first.stdout:
        if line.startswith("step 3/"):
            break
    before = (tmp_path / "config.json").read_bytes()
    for mode in ("train", "eval"):
        code, text = runs.main("phase1", tmp_path, f"--mode={mode}", "--config.steps=50")
        assert code == 2 and f"is in use by process {first.pid}" in text, text
    assert (tmp_path / "config.json").read_bytes() == before
    first.send_signal(signal.SIGTERM)
    assert runs.finish(first)[0] == 42
    # Its lock is gone with it.
    code, text = runs.main("phase1", tmp_path, "--mode=eval", "--config.steps=100000")
    assert code == 0 and "psnr" in text, text


# ---------------------------------------------------------------------------------- the full disk


@contextlib.contextmanager
def disk(folder, megabytes):
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave):
    """Writes until only so many bytes are left."""
    free = shutil.disk_usage(folder).free
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        for _ in range(max(free - leave, 0) // 4096 + (4 if leave == 0 else 0)):
            file.write(b"\0" * 4096)


def test_full_disk(whole, tmp_path):
    with disk(tmp_path / "disk", 64) as root:
        workdir = root / "run"
        fill(root, 400_000)
        code, text = runs.main("phase1", workdir, *OPTIONS)
        assert code == 2 and "MiB free; two checkpoints of this run need" in text, text
        assert "Traceback" not in text
        (root / "filler").unlink()
        # It fills up while the run goes on.
        process = runs.start(
            "phase1", workdir, *OPTIONS, "--config.steps=100000", PYTHONUNBUFFERED=1
        )
        for line in process.stdout:
            if line.startswith("step 6/"):
                break
        fill(root, 0)
        code, text = runs.finish(process)
        assert code == 2 and "run the same command again" in text, text
        valid = runs.state("phase1", workdir)[1]["step"]
        code, text = runs.main("phase1", workdir, *OPTIONS)
        assert code == 2 and "Traceback" not in text, text
        (root / "filler").unlink()
        code, text = runs.main("phase1", workdir, *OPTIONS, "--config.steps=40")
        assert code == 0, text
        # The end was at 100000 steps before, but the rate is constant: the numbers are the same.
        assert runs.state("phase1", workdir)[1]["step"] >= max(valid, 40)
