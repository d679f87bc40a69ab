"""Promise 2: an interrupted run ends in the very bits of the uninterrupted one."""

import json
import shutil
import time

import frozen_nets
import numpy as np
import pytest
import runs

from dcae_jax import config, sharding, train
from dcae_jax.distributed import EXIT_PREEMPTED


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted phase 1."""
    workdir = tmp_path_factory.mktemp("resume") / "whole"
    assert runs.run("phase1", workdir) == train.DONE
    return workdir


def test_promise_2_phase_1_with_three_interruptions(whole, tmp_path):
    # Polls: 1 at the start, 3 in an evaluation, 1 after compiling, 1 after each step.
    inside_eval = 1 + 3 + 1 + 4 + 2  # the second batch of the evaluation after step 5
    assert runs.run("phase1", tmp_path, poll=inside_eval) == EXIT_PREEMPTED
    assert runs.steps(tmp_path) == [0, 4, 5]
    assert 5 not in runs.rows(tmp_path), "half an evaluation was written"
    at_a_checkpoint = 1 + 3 + 1 + 3  # evaluates step 5 again, then steps 6, 7, 8
    assert runs.run("phase1", tmp_path, poll=at_a_checkpoint) == EXIT_PREEMPTED
    assert runs.steps(tmp_path) == [4, 5, 8]
    assert "folder-32-test/psnr" in runs.rows(tmp_path)[5], "the evaluation was not redone"
    between_log_lines = 1 + 1 + 1 + 3 + 1  # steps 9 and 10 with its evaluation
    assert runs.run("phase1", tmp_path, poll=between_log_lines) == EXIT_PREEMPTED
    assert runs.run("phase1", tmp_path) == train.DONE
    runs.assert_same_run("phase1", whole, tmp_path)


def test_promise_2_gan_phase(whole, tmp_path):
    other = {"init_from": str(whole)}
    assert runs.run("gan", tmp_path / "whole", **other) == train.DONE
    poll = 1 + 3 + 1 + 7 + 3  # after step 7; an evaluation lies before it
    assert runs.run("gan", tmp_path / "cut", poll=poll, **other) == EXIT_PREEMPTED
    assert runs.steps(tmp_path / "cut")[-1] == 7
    assert runs.run("gan", tmp_path / "cut", **other) == train.DONE
    runs.assert_same_run("gan", tmp_path / "whole", tmp_path / "cut", **other)
    state, _ = runs.state("gan", tmp_path / "cut", **other)
    for part in ("params/disc", "opt/disc", "stats/lecam", "ema/0.9/params/disc"):
        assert any(path.startswith(part) for path in state), part


@pytest.mark.parametrize(("before", "after"), [(0.1, 0.0), (0.0, 0.1)])
def test_a_metric_may_vanish_or_appear_in_the_middle_of_an_interval(whole, tmp_path, before, after):
    name, other = "task.adversarial.r1", {"init_from": str(whole)}
    poll = 1 + 3 + 1 + 7 + 3  # after step 7, between the log lines of steps 6 and 9
    assert runs.run("gan", tmp_path, poll=poll, **other, **{name: before}) == EXIT_PREEMPTED
    assert runs.run("gan", tmp_path, **other, **{name: after}) == train.DONE
    rows = runs.rows(tmp_path)
    assert "train/disc/r1" in rows[9] and np.isfinite(rows[9]["train/disc/r1"])
    assert ("train/disc/r1" in rows[12]) == (after > 0)


def test_a_finished_run_does_nothing(whole, capsys):
    before = runs.digest(whole)
    begin = time.monotonic()
    assert runs.run("phase1", whole) == train.DONE
    assert time.monotonic() - begin < 2  # no data, no model: reading two small files
    assert "already finished" in capsys.readouterr().out
    after = runs.digest(whole)
    assert {k for k in after if after[k] != before[k]} <= {"run.lock"}
    assert after.keys() == before.keys()


def test_a_finished_run_whose_report_is_missing_writes_it(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    assert runs.run("phase1", tmp_path / "run") == train.DONE
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_more_steps_continue_a_finished_run(whole, tmp_path):
    """`steps` may grow: with a constant rate the longer run is the same run."""
    assert runs.run("phase1", tmp_path / "a", steps=4) == train.DONE
    assert runs.run("phase1", tmp_path / "a") == train.DONE
    a, _ = runs.state("phase1", tmp_path / "a")
    b, _ = runs.state("phase1", whole)
    assert all(a[k].tobytes() == b[k].tobytes() for k in b)
    assert runs.summary(tmp_path / "a")["steps"] == 12


@pytest.mark.parametrize(
    "there, back",
    [((1, 8), (1, 1)), pytest.param((1, 1), (2, 4), marks=pytest.mark.slow)],  # compiles for long
)
def test_promise_2_restore_onto_another_mesh(whole, tmp_path, monkeypatch, there, back):
    """Saved on one mesh (data x fsdp), restored on another: same bits, then equal to rounding."""
    monkeypatch.setattr(sharding, "SMALL", 64)  # or the tiny leaves would be replicated
    options = {"evals": [], "steps": 6}

    def go(mesh, **more):
        data, fsdp = mesh
        more |= {"mesh.data": data, "mesh.fsdp": fsdp}
        return runs.run("phase1", tmp_path, count=data * fsdp, **options, **more)

    assert go(there, poll=2 + 4) == EXIT_PREEMPTED
    _, meta = runs.state("phase1", tmp_path, **options)
    assert runs.steps(tmp_path)[-1] == 4 and meta["device"].startswith("8 x")
    # Restoring alone changes nothing: preempted at its first poll, the digests are still those.
    assert go(back, poll=1) == EXIT_PREEMPTED
    assert runs.state("phase1", tmp_path, **options)[1]["leaves"] == meta["leaves"]
    assert go(back) == train.DONE
    found, _ = runs.state("phase1", tmp_path, **options)
    expected = np.load(_reference(whole, 6))
    for path in expected.files:
        # f32 sums in another order; Adam turns a rounding error of a vanishing gradient (qkv/bias
        # has none in truth) into steps of lr.
        if "qkv/bias" not in path and path.startswith(("params", "ema")):
            np.testing.assert_allclose(found[path], expected[path], atol=1e-5, err_msg=path)


def _reference(whole, steps):
    """State of the run on one device after so many steps, kept beside the whole run."""
    path = whole.parent / f"{steps}.npz"
    if not path.exists():
        workdir = whole.parent / f"steps-{steps}"
        assert runs.run("phase1", workdir, evals=[], steps=steps) == train.DONE
        np.savez(path, **runs.state("phase1", workdir, evals=[], steps=steps)[0])
    return path


def test_torn_files_of_a_killed_writer_do_not_matter(whole, tmp_path):
    """config.json and summary.json are rewritten whole: kill -9 may leave a half or nothing."""
    assert runs.run("phase1", tmp_path, steps=4, evals=[]) == train.DONE
    for name in ("config.json", "summary.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text[: len(text) // 2])
    assert runs.run("phase1", tmp_path, steps=4, evals=[]) == train.DONE
    for name in ("config.json", "summary.json"):
        assert json.loads((tmp_path / name).read_text())


def test_the_best_by_rfid_is_saved_and_kept_also_if_its_evaluation_is_interrupted(tmp_path, capsys):
    """Evaluations after 5, 10, 12, checkpoints after 4, 8, 12, of which only the last one stays.

    A preemption interrupts the evaluation after 5: that step is saved before it is scored.
    """
    best = {"checkpoint.best": "folder-32-test/rfid6", "checkpoint.best_is_highest": False}

    def go(poll=None):
        cfg = runs.make_config("phase1", **{"checkpoint.keep": 1} | best)
        (evaluator,) = cfg.evals
        evaluator.rfid, evaluator.nets = True, str(frozen_nets.folder())
        evaluator.at_start, evaluator.pictures, evaluator.training_pictures = False, 0, 0
        config.validate(cfg, 1)
        with runs.devices(1):
            return train.train(cfg, str(tmp_path), runs.StopAt(poll))

    assert go(3 + 4 + 2) == EXIT_PREEMPTED  # before the first step, after four, while evaluating
    assert runs.steps(tmp_path) == [5] and 5 not in runs.rows(tmp_path)
    assert go() == train.DONE
    scores = [runs.rows(tmp_path)[k]["folder-32-test/rfid6"] for k in (5, 10, 12)]
    assert min(scores) == scores[0], "the test needs that the first one is the lowest"
    assert runs.steps(tmp_path) == [5, 12]
    found = runs.summary(tmp_path)["best"]
    assert (found["metric"], found["step"]) == (best["checkpoint.best"], 5)
    # Rows of metrics keep nine digits.
    assert found["value"] == pytest.approx(scores[0], rel=1e-8)
    said = capsys.readouterr().out
    assert f"best folder-32-test/rfid6: {scores[0]:.4g} at step 5" in said
    assert "rFID of 6 ↓" in said and "inception is not the published one (random weights" in said
    record = json.loads((tmp_path / "config.json").read_text())["scored_with"]
    net = record["folder-32-test"]["nets"]["inception"]
    assert net["published"] == "no" and len(net["params_sha256"]) == 64


def test_pauses_to_come_are_counted():
    cfg = runs.make_config("phase1", steps=12)  # evaluations each 5 steps, checkpoints each 4
    for done in range(13):
        ahead = range(done + 1, 13)
        found = train._pauses_to_come(cfg, done)
        assert found["checkpoint"] == sum(k % 4 == 0 for k in ahead)
        assert found["eval"] == sum(k % 5 == 0 for k in ahead)


def test_a_profile_ends_with_its_window_the_run_or_a_preemption(tmp_path, capsys):
    """Resuming inside the window starts none: there is nothing that could be ended."""
    options = {"report.profile_at": 2, "report.profile_steps": 4, "steps": 8}
    inside = 1 + 3 + 1 + 3  # after step 3
    assert runs.run("phase1", tmp_path / "a", poll=inside, **options) == EXIT_PREEMPTED
    assert runs.run("phase1", tmp_path / "a", **options) == train.DONE
    assert capsys.readouterr().out.count("profile: ") == 1
    assert list((tmp_path / "a" / "profile").rglob("*.xplane.pb"))
    last = {"report.profile_at": 1, "steps": 2}
    assert runs.run("phase1", tmp_path / "b", **last) == train.DONE
    assert capsys.readouterr().out.count("profile: ") == 1


def test_evaluation_writes_what_it_ran_and_nothing_else(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = runs.digest(tmp_path / "run")
    cfg = runs.make_config("phase1")
    cfg.evals[0].name = "other"
    with runs.devices(1):
        assert train.evaluate(cfg, str(tmp_path / "run"), runs.StopAt()) == train.DONE
    (path,) = (tmp_path / "run" / "eval").glob("000000012-*.json")
    record = json.loads(path.read_text())
    scores = record["scores"]
    assert sorted(scores) == ["other/n", "other/psnr", "other/psnr_pooled", "other/ssim"]
    assert record["weights"].startswith("ema 0.9 of step 12") and record["config"]["evals"]
    trained = runs.rows(whole)[12]
    # Rows of metrics keep nine digits.
    assert scores["other/psnr"] == pytest.approx(trained["folder-32-test/psnr"], rel=1e-8)
    after = runs.digest(tmp_path / "run")
    assert {k for k in before if after[k] != before[k]} <= {"run.lock"}
    assert all(k.startswith("eval/") for k in after.keys() - before.keys())


def test_any_step_is_evaluated_by_any_config_whose_weights_fit(whole, tmp_path, capsys):
    """One step directory; a phase with a discriminator that the run does not have; no average."""
    shutil.copytree(whole, tmp_path / "7")  # a workdir may be called like a step
    gan = runs.make_config("gan", init_from="not looked at", **{"ema.decays": ()})
    gan.task.losses.lpips = 0.25  # its network is for training; there is no file of it here
    with runs.devices(1):
        step = tmp_path / "7" / "checkpoints" / "8"
        assert train.evaluate(gan, str(step), runs.StopAt()) == train.DONE
        assert "weights: ema 0.9 of step 8" in capsys.readouterr().out
        assert train.evaluate(gan, str(tmp_path / "7"), runs.StopAt()) == train.DONE
        gan.evals[0].n = 4
        assert train.evaluate(gan, str(tmp_path / "7"), runs.StopAt()) == train.DONE
    found = sorted(path.name[:10] for path in (tmp_path / "7" / "eval").glob("*.json"))
    assert found == ["000000008-", "000000012-", "000000012-"], "another protocol, another file"
    assert not (step / "run.lock").exists()


def test_an_interrupted_evaluation_writes_nothing(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    cfg = runs.make_config("phase1")
    with runs.devices(1):
        code = train.evaluate(cfg, str(tmp_path / "run"), runs.StopAt(2))
    assert code == EXIT_PREEMPTED and "evaluation stopped" in capsys.readouterr().out
    assert not (tmp_path / "run" / "eval").exists()
