"""Several processes are one run: the numbers, SIGTERM, a death, and what differs at the start.

Few real runs serve many tests: they are the slowest of all.
"""

import os
import pathlib
import re
import shutil
import signal
import socket
import time
import types

import diffusing
import masking_runs
import masks
import numpy as np
import processes
import pytest
import runs

from dcae_jax import train

pytestmark = pytest.mark.multiprocess

# A small rate: Adam makes steps of that size of the rounding error of a gradient that vanishes.
RATE = 1e-5
FAST = ("--config.report.every=1", "--config.checkpoint.every=3", f"--config.optim.lr={RATE}")
PLAYER = "task.adversarial.optim.lr"  # the discriminator has a rate of its own
ENDLESS = "--config.steps=1000000"
GONE = 43
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a phase 1, for the GAN phase."""
    workdir = tmp_path_factory.mktemp("weights") / "phase1"
    assert runs.run("phase1", workdir, steps=1) == train.DONE
    return workdir


def changes(steps, **more):
    """What FAST says, for a run in this process."""
    every = {"report.every": 1, "checkpoint.every": 3, "optim.lr": RATE}
    return {"steps": steps, **every, **more}


def killed(started, victim, pattern):
    """Kills one with -9 at a line of the first; (exit codes, outputs, seconds till all ended)."""
    seen = processes.wait_for(started[0], pattern)
    started[victim].kill()
    begin = time.monotonic()
    codes, texts = processes.finish(started)
    return codes, [seen + texts[0], *texts[1:]], time.monotonic() - begin


@pytest.fixture(scope="module")
def story(weights, tmp_path_factory):
    """A GAN phase of two processes is preempted, goes on with four until one dies, then with two.

    And the same run in one process, whole, and what the first two left, taken up by one.
    """
    root = tmp_path_factory.mktemp("story")
    more = {"init_from": str(weights), PLAYER: RATE}
    workdir = root / "several"
    options = (*FAST, ENDLESS, *[f"--config.{k}={v}" for k, v in more.items()])
    found = types.SimpleNamespace(root=root, workdir=workdir)
    two = processes.start(2, "gan", workdir, *options)
    found.pids = [{p.pid for p in two}]
    seen = processes.wait_for(two[0], r"^step 2/")
    os.kill(two[1].pid, signal.SIGTERM)
    codes, texts = processes.finish(two)
    found.preempted = codes, [seen + texts[0], texts[1]]
    found.saved = runs.steps(workdir)[-1]
    shutil.copytree(workdir, root / "resumed")
    four = processes.start(4, "gan", workdir, *options)
    found.pids.append({p.pid for p in four})
    found.death = killed(four, 2, rf"^step {found.saved + 4}/")
    found.left = runs.steps(workdir)[-1]
    found.valid = runs.state("gan", workdir, init_from=str(weights))[1]
    again = processes.start(2, "gan", workdir, *options)
    found.end = killed(again, 0, rf"^step {found.left + 1}/")
    made = changes(found.saved + 3, **more)
    assert runs.run("gan", root / "one", **made) == train.DONE
    assert runs.run("gan", root / "resumed", **made) == train.DONE
    return found


def test_each_process_says_who_it_is(story):
    for pids, (_, texts, *_) in zip(story.pids, (story.preempted, story.death), strict=True):
        said, count = processes.who(texts), len(pids)
        assert {(index, of) for index, of, _ in said} == {(i, count) for i in range(count)}
        assert {pid for _, _, pid in said} == pids
        configs = [re.search(rf"1 of {count} devices .*, config (\w+)$", t, re.M)[1] for t in texts]
        assert len(set(configs)) == 1


def test_promise_5_sigterm_to_one_process_saves_on_all(story):
    codes, texts = story.preempted
    assert codes == [42, 42], texts
    (said,) = re.findall(r"preempted: saved step (\d+)", texts[0])
    assert "preempted" not in texts[1]  # only process 0 prints
    assert int(said) == story.saved >= 2


def same_losses(one, several, first, last):
    """Sums in another order: 1e-6 of each loss.

    Or of the whole, of which each is a part; or of the logits, of order one, whose mean is 1e-4.
    """
    for k in range(first, last + 1):
        losses = {n: v for n, v in one[k].items() if n.startswith("train/") and "loss" in n}
        for name, value in losses.items():
            scale = 1.0 if name.endswith("_adv") else losses["train/loss"]
            np.testing.assert_allclose(
                several[k][name], value, rtol=1e-6, atol=1e-6 * scale, err_msg=f"{k} {name}"
            )


def test_two_processes_then_four_have_the_losses_of_one(story):
    one, several = runs.rows(story.root / "one"), runs.rows(story.workdir)
    assert several[0].keys() == one[0].keys()  # the evaluation before the first step
    for name, value in one[0].items():
        np.testing.assert_allclose(several[0][name], value, rtol=1e-5, err_msg=name)
    same_losses(one, several, 1, story.saved + 3)


def test_what_two_saved_one_resumes(story):
    one, resumed = story.root / "one", story.root / "resumed"
    same_losses(runs.rows(one), runs.rows(resumed), 1, story.saved + 3)
    steps = story.saved + 3
    (a, meta_a), (b, meta_b) = (runs.state("gan", w, steps=steps) for w in (one, resumed))
    assert meta_a["processes"] == meta_b["processes"] == 1 and a.keys() == b.keys()
    for path in a:
        if path.startswith(("params", "ema")):  # Adam's steps, where the gradient is rounding
            np.testing.assert_allclose(b[path], a[path], atol=2 * RATE * steps, err_msg=path)


def test_kill_9_of_one_process_ends_the_others_with_a_message(story):
    codes, texts, seconds = story.death
    assert codes == [GONE, GONE, -signal.SIGKILL, GONE], texts
    assert seconds < 60
    for i in (0, 1, 3):
        assert re.search(rf"^error: process 2 \(pid \d+ on {HOST}\) of 4 is gone", texts[i], re.M)
    assert story.left >= story.saved and story.valid["processes"] in (2, 4)


def test_kill_9_of_process_0_ends_the_others_with_a_message(story):
    codes, texts, seconds = story.end
    assert f"own workdir, step {story.left}" in texts[0]  # what four saved, two resume
    assert codes == [-signal.SIGKILL, GONE], texts
    assert seconds < 60
    assert re.search(rf"^error: process 0 \(pid \d+ on {HOST}\) of 2 is gone", texts[1], re.M)


def older(folder, package):
    """A folder for PYTHONPATH in which a package says that it is version 0.0.1."""
    info = folder / f"{package}-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(runs.ROOT / "tests")])}


def test_what_differs_at_the_start_is_named_on_all_with_its_host(story, tmp_path):
    """Another seed, another version, a workdir of its own: before anything is computed."""
    begin = time.monotonic()
    started = processes.start(
        3, "gan", story.workdir, "--config.init_from=not looked at", "--config.batch=9",
        own={1: ["--config.seed=3"], 2: [f"--workdir={tmp_path}"]},
        env={1: older(tmp_path / "older", "optax")},
    )  # fmt: skip
    codes, texts = processes.finish(started)
    assert codes == [2, 2, 2] and time.monotonic() - begin < 60, texts
    for text in texts:
        assert f"config.seed: 3 on process 1 ({HOST}); 0 on process 0 ({HOST}), 2 ({HOST})" in text
        assert f'version of optax: "0.0.1" on process 1 ({HOST})' in text
        assert f"start step: null on process 2 ({HOST})" in text
        assert "must be one folder that all hosts see" in text and "Traceback" not in text


# ------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_named_before_there_is_a_checkpoint(tmp_path):
    own = {i: [f"--workdir={tmp_path / str(i)}"] for i in range(2)}
    codes, texts = processes.finish(processes.start(2, "phase1", None, own=own))
    assert codes == [2, 2], texts
    assert all("sees the workdir of process 0: " in text for text in texts)
    assert list((tmp_path / "0").iterdir()) == []  # the mark is gone


@pytest.mark.slow
def test_devices_that_are_missing_are_named(tmp_path):
    one_more = {1: {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}}
    codes, texts = processes.finish(processes.start(2, "phase1", tmp_path, env=one_more))
    assert codes == [2, 2], texts
    told = f'devices: "1 x cpu" on process 0 ({HOST}); "2 x cpu" on process 1 ({HOST})'
    assert all(told in text for text in texts), texts
    more = "--expect_devices=4"
    codes, texts = processes.finish(processes.start(2, "phase1", tmp_path, more, env=one_more))
    assert codes == [2, 2], texts
    told = f"3 device(s), but --expect_devices=4: 1 on process 0 ({HOST}), 2 on process 1 ({HOST})"
    assert all(told in text for text in texts), texts


@pytest.mark.slow
@pytest.mark.parametrize("absent", [0, 2])
def test_a_process_that_never_comes_is_named(absent, tmp_path):
    limit = {i: {"JAX_RENDEZVOUS_SECONDS": 10} for i in range(3)}
    codes, texts = processes.finish(
        processes.start(3, "phase1", tmp_path, "--config.batch=9", env=limit, absent=[absent])
    )
    assert codes == [GONE, GONE], texts
    said = "processes did not come within 10 s: 2." if absent else "did not reach process 0"
    assert all(said in text and "Traceback" not in text for text in texts), texts


@pytest.mark.slow
def test_sigterm_before_the_processes_have_joined_is_not_lost(tmp_path):
    """jax replaces our handler when it joins; what came before is handed over."""
    started = processes.start(2, "phase1", tmp_path, *FAST, ENDLESS)
    time.sleep(1.5)  # the imports, or waiting for each other
    os.kill(started[1].pid, signal.SIGTERM)
    codes, texts = processes.finish(started)
    assert codes == [42, 42], texts
    assert runs.steps(tmp_path)


@pytest.mark.slow
def test_a_process_that_fails_takes_the_other_with_it(tmp_path):
    """A refusal on process 0 alone: the lock of another run."""
    holder = runs.start("phase1", tmp_path, *FAST, ENDLESS, PYTHONUNBUFFERED=1)
    processes.wait_for(holder, r"^step 1/")
    begin = time.monotonic()
    codes, texts = processes.finish(processes.start(2, "phase1", tmp_path, *FAST, ENDLESS))
    assert codes == [2, 2] and time.monotonic() - begin < 90, texts
    assert all("is in use by" in text for text in texts), texts
    holder.kill()
    holder.communicate()


KINDS = {"diffusion": diffusing.make, "lmd": masks.make, "masking": masking_runs.make}
LONG = 60  # steps: all is saved after each, so that the signal comes in time


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_processes_on_latents_have_the_losses_of_one(kind, count, tmp_path):
    """Preempted by SIGTERM to the last process, saved by all; taken up by one, two and four."""
    cache = {i: {"TINY_CACHE": diffusing.cache()} for i in range(4)}
    made = KINDS[kind](**changes(LONG, **{"checkpoint.every": LONG}))
    assert diffusing.run(made, tmp_path / "one") == train.DONE
    name, options = f"tests/configs/tiny_latents.py:{kind}", (*FAST, f"--config.steps={LONG}")
    started = processes.start(
        count, name, tmp_path / "cut", *options, "--config.checkpoint.every=1", env=cache
    )
    seen = processes.wait_for(started[0], r"^step 1/")
    os.kill(started[-1].pid, signal.SIGTERM)
    codes, texts = processes.finish(started)
    assert codes == [42] * count, (seen, texts)
    stopped = runs.steps(tmp_path / "cut")[-1]
    for others in {1, 2, 4} - {count} | {count}:
        workdir = shutil.copytree(tmp_path / "cut", tmp_path / f"by{others}")
        if others == 1:
            assert diffusing.run(made, workdir) == train.DONE
        else:
            codes, texts = processes.finish(
                processes.start(others, name, workdir, *options, env=cache)
            )
            assert codes == [0] * others, texts
            assert f"own workdir, step {stopped}" in texts[0]
            assert len(processes.who(texts)) == others
        same_losses(runs.rows(tmp_path / "one"), runs.rows(workdir), 1, LONG)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["phase1", "gan"])
@pytest.mark.parametrize("count", [2, 4])
def test_whole_runs_of_processes_end_as_one(phase, count, weights, tmp_path):
    """From scratch to the end, evaluations and the summary too."""
    more = {} if phase == "phase1" else {"init_from": str(weights), PLAYER: RATE}
    options = [*FAST, "--config.steps=12", *[f"--config.{k}={v}" for k, v in more.items()]]
    assert runs.run(phase, tmp_path / "one", **changes(12, **more)) == train.DONE
    codes, texts = processes.finish(processes.start(count, phase, tmp_path / "all", *options))
    assert codes == [0] * count, texts
    same_losses(runs.rows(tmp_path / "one"), runs.rows(tmp_path / "all"), 1, 12)
    scores = [runs.summary(tmp_path / w)["evals"]["after"] for w in ("one", "all")]
    for name, values in scores[0].items():
        for metric, value in values.items():
            np.testing.assert_allclose(scores[1][name][metric], value, rtol=1e-4, err_msg=metric)
    names = [sorted(p.name for p in pathlib.Path(tmp_path / w).iterdir()) for w in ("one", "all")]
    assert names[0] == names[1]
