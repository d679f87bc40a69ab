"""What a sweep does with its trials: real processes, with a fake main.py."""

import os
import signal
import subprocess

import pytest
from sweeping import FAST, kill, wait_for

pytestmark = pytest.mark.multiprocess


def test_trials_that_are_preempted_start_again_and_one_that_fails_stops_nothing(checkout):
    options = ("--sweep=exits", "--slots=3", "--backoff=0.05", FAST)
    code, text = checkout.run(*options)
    assert code == 1, text
    rows = checkout.rows()
    found = {n: (r["state"], r["exit_code"], int(r["starts"])) for n, r in rows.items()}
    assert found == {
        "exits=": ("done", "0", 1),
        "exits=42_42": ("done", "0", 3),
        "exits=43": ("done", "0", 2),
        "exits=1": ("failed", "1", 1),
        "exits=-9": ("done", "0", 2),
        "exits=-9_-9_-9_-9": ("failed", "-9", 4),
        "exits=-15": ("done", "0", 2),
        "exits=1043_1043_1043_1043_1043": ("done", "0", 6),  # each came one step further
    }
    for trial, row in rows.items():
        starts = checkout.starts(trial)
        assert row["pid"] == starts[-1][0] and len(starts) == int(row["starts"])
    assert len({pid for trial in rows for pid, *_ in checkout.starts(trial)}) == 21
    assert rows["exits=1"]["error"] == "error: the loss is not finite"
    assert "exits=1: FAILED, exit code 1: error: the loss is not finite" in text
    assert "4 times in a row without a step more: killed by signal 9: out of memory" in text

    before = checkout.records()
    code, text = checkout.run(*options)  # again: nothing of it is tried by itself
    assert code == 1 and checkout.records() == before
    code, text = checkout.run(*options, "--retry-failed")
    assert code == 0, text
    assert {row["state"] for row in checkout.rows().values()} == {"done"}
    assert len(checkout.starts("exits=1")) == 2 and len(checkout.starts("exits=")) == 1


def test_a_signal_is_passed_on_and_the_same_command_goes_on(checkout):
    options = ("--slots=2", "--config.task.seconds=12")  # both run, however late one starts

    def started():
        return [len(checkout.starts(trial)) for trial in ("quality=1", "quality=2")]

    for round_, number in enumerate((signal.SIGTERM, signal.SIGINT), 1):
        sweep = checkout.start(*options)
        wait_for(lambda: started() == [round_] * 2, "two trials run")  # noqa: B023
        sweep.send_signal(number)
        assert sweep.wait(60) == 42
        assert "stopping: running trials save first" in checkout.output()
        assert checkout.count("preempted") == 2 and checkout.processes() == ([], [])
        codes = [r["starts"][-1]["exit_code"] for r in checkout.records().values()]
        assert codes == [42, 42], checkout.output()
    # Saved means: what was done is not done again.
    saved = {
        t: int((checkout.out / "runs" / t / "step.txt").read_text()) for t in checkout.trials()
    }
    assert all(step > 0 for step in saved.values())
    code, text = checkout.run(*options)
    assert code == 0, text
    assert [len(checkout.starts(t)) for t in ("quality=1", "quality=2", "quality=3")] == [3, 3, 1]


def test_an_edited_sweep(checkout):
    options = ("--sweep=seed", "--slots=2", FAST)
    assert checkout.run(*options, FAKE_SEEDS=2)[0] == 0
    code, text = checkout.run(*options, FAKE_SEEDS=3)
    assert code == 0 and "added since the last start: seed=2\n" in text
    assert [len(checkout.starts(f"seed={i}")) for i in range(3)] == [1, 1, 1]
    code, text = checkout.run(*options, FAKE_SEEDS=1)
    assert code == 0 and "no longer in the sweep: seed=1, seed=2; what they left stays" in text
    assert checkout.rows().keys() == {"seed=0"} and checkout.trials() == [
        "seed=0", "seed=1", "seed=2",
    ]  # fmt: skip
    code, text = checkout.run(*options, FAKE_SEEDS=2)  # it is back, and done already
    assert code == 0 and "added since the last start: seed=1\n" in text
    assert len(checkout.starts("seed=1")) == 1 and checkout.rows()["seed=1"]["state"] == "done"

    before = checkout.records()
    code, text = checkout.here(*options, "--config.steps=12", "--config.optim.lr=0.5")
    assert code == 2 and "  - optim.lr: 0.0001 -> 0.5\n  - steps: 10 -> 12\n" in text
    code, text = checkout.here(*options, config="tests/sweeps/fake_config.py:other")
    assert code == 2 and "holds a sweep of tests/sweeps/fake_config.py, not of" in text
    code, text = checkout.here("--sweep=lr", FAST)
    assert code == 2 and "holds another sweep (seed): it has none of these 3 trials" in text
    assert checkout.records() == before


def test_a_trial_that_is_removed_while_it_runs_is_stopped(checkout):
    sweep = checkout.start("--sweep=seed", "--slots=2", "--config.task.seconds=20", FAKE_SEEDS=2)
    wait_for(lambda: len(checkout.processes()[1]) == 2, "two trials run")
    refused, text = checkout.here("--sweep=seed", "--config.task.seconds=20", FAKE_SEEDS=2)
    assert refused == 2 and "is in use by another command" in text
    kill(sweep.pid)
    sweep.wait()
    again = checkout.start("--sweep=seed", "--slots=2", "--config.task.seconds=20", FAKE_SEEDS=1)
    wait_for(lambda: checkout.records()["seed=1"]["state"] == "preempted", "seed=1 is stopped")
    assert checkout.records()["seed=0"]["state"] == "running"
    assert checkout.records()["seed=1"]["starts"][-1]["exit_code"] == 42
    again.terminate()
    assert again.wait(60) == 42
    assert len(checkout.starts("seed=0")) == 1  # it was taken over, not started again


def test_each_slot_has_gpus_of_its_own(checkout):
    gpus = {"CUDA_VISIBLE_DEVICES": "4,5,6,7,8", "JAX_PLATFORMS": "cuda"}
    options = ("--sweep=seed", "--config.task.seconds=0.3")
    assert checkout.run(*options, "--slots=2", **gpus)[0] == 0
    given = {}
    for name, record in checkout.records().items():
        given.setdefault(record["starts"][0]["slot"], set()).add(checkout.starts(name)[0][1])
    assert given == {0: {"4,5"}, 1: {"6,7"}}  # the odd one stays idle
    code, text = checkout.here(*options, "--slots=6", **gpus)
    assert code == 2 and "--slots=6 on 5 GPU(s) (4, 5, 6, 7, 8); give at most --slots=5" in text
    code, text = checkout.here(*options, "--slots=2", "--dry-run", **gpus)
    assert text.splitlines()[1].startswith("CUDA_VISIBLE_DEVICES=6,7 ")


def test_what_a_dry_run_prints_runs_as_it_is(checkout):
    options = ("--sweep=lr,seed", FAST)
    code, text = checkout.here(*options, "--dry-run", FAKE_SEEDS=1)
    assert code == 0 and len(text.splitlines()) == 3 and not checkout.out.exists()
    line = text.splitlines()[1]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    assert subprocess.run(line, shell=True, env=env).returncode == 0
    summary = checkout.out / "runs/lr=0.0003,seed=0/summary.json"
    assert summary.exists()


def test_the_status_while_it_runs_and_by_another_metric(checkout):
    code, text = checkout.here("--status")
    assert code == 2 and "holds no sweep" in text
    sweep = checkout.start("--slots=1", "--config.task.seconds=3")
    wait_for(lambda: checkout.count("done") >= 1, "one is done")
    code, text = checkout.here("--status", "--metric=psnr")
    assert code == 0 and " running " in text and "best by held-out/psnr (higher" in text
    code, text = checkout.here("--status")
    assert code == 0 and "no metric to compare trials by; give --metric=NAME, one of: held" in text
    assert "quality=3" in text and f"see {checkout.out}/sweep.html" in text
    assert sweep.wait(60) == 0
    code, text = checkout.here("--status", "--metric=psnr")
    assert "best by held-out/psnr (higher is better): quality=3, 2.99707" in text
    code, text = checkout.here("--status", "--metric=oddness", "--better=lower")
    assert "best by held-out/oddness (lower is better): quality=1, 0.5" in text
    code, text = checkout.here("--status", "--metric=train/loss")
    assert "best by train/loss (lower is better): quality=1, 0.1" in text
