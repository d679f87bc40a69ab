"""A sweep survives kill -9 of whatever: real processes, with a fake main.py."""

import json
import time

import pytest
from sweeping import kill, wait_for

from dcae_jax.sweeps import processes

pytestmark = pytest.mark.multiprocess

TWELVE = ("--sweep=lr,seed", "--slots=2", "--metric=psnr", "--backoff=0.1")


def assert_twelve_results(checkout, killed_with_keeper):
    """`killed_with_keeper`: these may have ended in that moment, so that nobody saw how."""
    rows = checkout.rows()
    assert len(rows) == 12 and {row["state"] for row in rows.values()} == {"done"}
    for trial, row in rows.items():
        starts = checkout.starts(trial)
        assert not any(finished == "True" for _, _, finished in starts), f"{trial} ran twice"
        assert row["pid"] == starts[-1][0], (row, starts)
        unseen = trial in killed_with_keeper and "keeper was killed" in row["error"]
        assert row["exit_code"] == "0" or (unseen and row["exit_code"] == ""), row
        assert float(row["held-out/psnr"]) == pytest.approx(1 - 0.5**10)


def test_twelve_trials_on_two_slots_killed_twice_end_with_twelve_results(checkout):
    options = (*TWELVE, "--config.task.seconds=0.6")
    sweep = checkout.start(*options)
    wait_for(lambda: checkout.count("done") >= 3 and checkout.processes()[1], "three are done")
    kill(sweep.pid)  # the scheduler alone: what runs goes on, and its exit code is kept
    sweep.wait()
    orphans = [name for name, r in checkout.records().items() if r["state"] == "running"]
    assert orphans, "nothing ran when the scheduler was killed"

    sweep = checkout.start(*options)
    wait_for(lambda: checkout.count("done") >= 7 and checkout.processes()[1], "seven are done")
    kill(sweep.pid)
    sweep.wait()
    running = [name for name, r in checkout.records().items() if r["state"] == "running"]
    keepers, trials = checkout.processes()
    kill(*keepers, *trials)  # everything, as when a machine goes down

    code, text = checkout.run(*options)
    assert code == 0, text
    assert_twelve_results(checkout, running)
    for name in orphans:  # waited for, not started again
        assert len(checkout.starts(name)) == 1
    assert len({row["pid"] for row in checkout.rows().values()}) == 12
    before = checkout.records()
    code, text = checkout.run(*options)  # once more: there is nothing to do
    assert code == 0 and "12 done" in text and checkout.records() == before


def test_a_trial_whose_keeper_is_killed_is_waited_for(checkout):
    options = ("--sweep=seed", "--slots=2", "--config.task.seconds=4")
    sweep = checkout.start(*options, FAKE_SEEDS=2)
    wait_for(lambda: len(checkout.processes()[1]) == 2, "two trials run")
    keepers, trials = checkout.processes()
    kill(keepers[0])  # under a scheduler that lives
    time.sleep(0.5)
    assert checkout.count("running") == 2 and sweep.poll() is None
    kill(sweep.pid, keepers[1])  # and together with it
    sweep.wait()
    code, text = checkout.run(*options, FAKE_SEEDS=2)
    assert code == 0, text
    for name, row in checkout.rows().items():
        assert [pid for pid, *_ in checkout.starts(name)] == [row["pid"]]
        assert (row["state"], row["exit_code"], row["starts"]) == ("done", "", "1")
        assert "exit code not known: its keeper was killed; the run is finished" in row["error"]
        assert row["seconds"] == "" and f"{name}: done in an unknown time, since its keeper" in text
    assert {int(row["pid"]) for row in checkout.rows().values()} == set(trials)
    assert "0.0s, and 2 unknown" in (checkout.out / "sweep.html").read_text()


# Stands for launch/local.py as a kill -9 leaves it: its child lives on.
LAUNCHER = """
import pathlib, subprocess, sys
main = pathlib.Path(__file__).parents[1] / "main.py"
sys.exit(subprocess.call([sys.executable, str(main), *sys.argv[sys.argv.index("--") + 1 :]]))
"""


def test_what_a_killed_launcher_leaves_is_ended_or_waited_for(checkout):
    (checkout.path / "launch/local.py").write_text(LAUNCHER)
    options = ("--sweep=seed", "--slots=2", "--processes=2", "--backoff=1")
    sweep = checkout.start(*options, "--config.task.seconds=4", FAKE_SEEDS=2)
    wait_for(lambda: checkout.starts("seed=0") and checkout.starts("seed=1"), "both train")
    kept = json.loads((checkout.out / "starts/seed=0.1.json").read_text())
    kill(kept["process"]["pid"])  # its keeper lives: it lets the run save, then tells
    keeper = checkout.records()["seed=1"]["starts"][0]["keeper"]["pid"]
    kept = json.loads((checkout.out / "starts/seed=1.1.json").read_text())
    kill(keeper, kept["process"]["pid"])  # nobody is left to tell: the workdir is in use
    assert sweep.wait(60) == 0, checkout.output()
    codes = {n: [s["exit_code"] for s in r["starts"]] for n, r in checkout.records().items()}
    assert codes["seed=0"] == [-9, 0]
    assert codes["seed=1"][0] is None and 2 in codes["seed=1"] and codes["seed=1"][-1] == 0
    assert "seed=1 is in use by another process; stop it; starts again in" in checkout.output()
    for name in ("seed=0", "seed=1"):
        assert checkout.starts(name)[0][2] == "False" and len(checkout.starts(name)) == 2


def test_the_status_after_everything_was_killed(checkout):
    sweep = checkout.start("--sweep=seed", "--slots=2", "--config.task.seconds=20", FAKE_SEEDS=2)
    wait_for(lambda: len(checkout.processes()[1]) == 2, "two trials run")
    keepers, trials = checkout.processes()
    kill(sweep.pid, *keepers)
    sweep.wait()
    # Keepers are collected by whoever adopts them, if anyone: a zombie is no process that lives.
    assert {row["state"] for row in status(checkout).values()} == {"running"}
    kill(trials[0])
    wait_for(lambda: not processes.of(trials[0]).started, "it is gone")
    states = {int(row["pid"]): row["state"] for row in status(checkout).values()}
    assert states == {trials[0]: "interrupted", trials[1]: "running"}
    kill(trials[1])
    assert checkout.count("running") == 2  # the scheduler's own files are left alone


def status(checkout):
    """Rows of results.csv after --status."""
    code, text = checkout.here("--status")
    assert code == 0, text
    return checkout.rows()
