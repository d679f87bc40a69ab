"""What the launchers share: splitting at `--`, flags of main.py, when a job is started again."""

import argparse
import importlib
import os
import pathlib
import subprocess
import sys

import common
import gke
import pytest
import tpu_vm
import xla_flags

ROOT = pathlib.Path(__file__).parents[2]


def test_the_first_double_dash_splits():
    assert common.split(["--a", "--", "--b", "--", "c"]) == (["--a"], ["--b", "--", "c"])
    assert common.split(["--a"]) == (["--a"], [])


def test_flags_of_main_are_found_in_each_of_their_forms():
    flags = ["--config=a.py:x", "-workdir", "gs://b/c", "--workdirs=no"]
    assert common.flag(flags, "config") == "a.py:x" and common.flag(flags, "workdir") == "gs://b/c"
    assert common.flag([*flags, "--workdir=last"], "workdir") == "last"
    assert common.flag(flags, "mode") is None
    assert common.main_flags(flags, 8)[-1] == "--expect_devices=8"
    assert common.main_flags(["--expect_devices=4"], 8) == ["--expect_devices=4"]


@pytest.mark.parametrize(
    ("flags", "on"),
    [(["--dry_run"], True), (["--dry_run=true"], True), (["-dry_run=1"], True),
     (["--dry_run=false"], False), (["--nodry_run"], False), (["--dry_run", "--nodry_run"], False),
     (["--dry_runs"], False), ([], False)],
)  # fmt: skip
def test_a_dry_run_of_main_needs_no_workdir(flags, on):
    assert common.is_on(flags, "dry_run") == on
    if on:
        common.require_flags(["--config=a", *flags])
    else:
        with pytest.raises(common.LaunchError, match="no --workdir"):
            common.require_flags(["--config=a", *flags])


def test_a_printed_command_is_read_back_by_the_shell():
    words = ["python", "main.py", "--workdir=two words", "--config.x=it's $HOME"]
    code = "import sys, os; print(sys.argv[1:], os.environ['A'])"
    line = common.shell([sys.executable, "-c", code, *words], {"A": "x 'y'"})
    out = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"{words} x 'y'"


@pytest.mark.parametrize(
    ("codes", "restarts", "waits"),
    [
        ([0], 0, []),
        ([1], 0, []),
        ([2], 0, []),
        ([42, 42, 0], 2, []),
        ([43, 43, 43, 43, 43, 43, 43, 0], 7, [10, 20, 40, 80, 160, 300, 300]),
        ([43, 43, 42, 43, 1], 4, [10, 20, 10]),  # what was saved ends the row
        ([42] * 9, 5, []),
        ([43] * 9, 4, [10, 20, 40, 80]),
    ],
)
def test_a_job_is_started_again_on_42_and_43_only(codes, restarts, waits, capsys):
    left, slept = list(codes), []
    limits = argparse.Namespace(
        max_restarts=5 if codes == [42] * 9 else 100, max_failures=4 if codes == [43] * 9 else 10
    )
    code = common.until_done(lambda: left.pop(0), limits, sleep=slept.append)
    assert code == codes[restarts] and len(codes) - len(left) == restarts + 1 and slept == waits
    out = capsys.readouterr().out
    assert out.count("launch: restart") == restarts and out.startswith("launch: start\n")
    assert ("no restart left (--max-restarts" in out) == (len(codes) == 9)


def test_a_start_that_lived_long_begins_a_new_row(monkeypatch):
    clock, slept = [0.0], []
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    left = [(1, 43), (599, 43), (601, 43), (5, 43), (1, 0)]
    limits = argparse.Namespace(max_restarts=100, max_failures=2)

    def start():
        seconds, code = left.pop(0)
        clock[0] += seconds
        return code

    def sleep(seconds):  # which is no progress
        slept.append(seconds)
        clock[0] += 1000

    assert common.until_done(start, limits, sleep=sleep) == 0 and slept == [10, 20, 10, 20]


def test_who_asked_for_the_end_gets_it(capsys):
    limits, asked = argparse.Namespace(max_restarts=100, max_failures=10), iter([False, True])
    assert common.until_done(lambda: 42, limits, lambda: True) == 42
    assert common.until_done(lambda: 43, limits, lambda: next(asked), sleep=lambda s: None) == 43
    assert "restart" not in capsys.readouterr().out


def test_flags_of_xla_exist_in_the_installed_jaxlib():
    """An unknown flag ends the process: the real one says so here (it knows GPU flags too)."""
    for platform in ("cpu", "gpu"):
        env = xla_flags.environment(platform, devices_per_process=3, nodes=2, given={})
        for extra, code in (("", 0), (" --xla_gpu_no_such_flag=1", 1)):
            done = subprocess.run(
                [sys.executable, "-c", "import jaxlib.xla_client as x; x.make_cpu_client()"],
                capture_output=True, text=True,
                env=os.environ | {"XLA_FLAGS": env["XLA_FLAGS"] + extra},
            )  # fmt: skip
            assert bool(done.returncode) == bool(code), done.stderr[-2000:]
            assert ("Unknown flag" in done.stderr) == bool(code)


def test_what_the_user_has_set_wins():
    given = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false", "NCCL_DEBUG": "INFO"}
    env = xla_flags.environment("gpu", nodes=2, given=given)
    assert env["XLA_FLAGS"].endswith("scheduler=false") and "NCCL_DEBUG" not in env
    assert "NCCL_DEBUG" not in xla_flags.environment("gpu", given={})
    assert "parallel_all_reduce" not in str(xla_flags.environment("tpu", given={}))
    assert "parallel_all_reduce" in str(xla_flags.environment("tpu", slices=2, given={}))


def test_what_the_user_has_set_goes_along_to_other_machines(monkeypatch):
    for name in xla_flags.OF_THE_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_a='x y'")
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    args = tpu_vm.options(["--name=n", "--zone=z", "--type=v4-8"])
    line = tpu_vm.run_command(args, ["--config=a"]).partition(" bash ")[0] + " env"
    out = subprocess.run(["bash", "-c", line], env={}, capture_output=True, text=True).stdout
    assert "--xla_tpu_overlap_compute_collective_tc=true --xla_a='x y'\n" in out
    assert "\nXLA_FLAGS=--xla_b=1\n" in out
    args = gke.options(["--image=i", "--gpu=g", "--nodes=2"])
    env = {e["name"]: e.get("value") for e in gke.environment(args, "n")}
    assert env["XLA_FLAGS"].endswith(" --xla_b=1") and env["NCCL_DEBUG"] == "INFO"
    assert env["JAX_PLATFORMS"] == "cuda"


def test_the_table_of_flags_is_printed():
    done = subprocess.run([sys.executable, "launch/xla_flags.py", "tpu"], cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.startswith("tpu: JAX_PLATFORMS=tpu,cpu\ntpu: LIBTPU_INIT_ARGS=--xla_")
    wrong = subprocess.run([sys.executable, "launch/xla_flags.py", "npu"], cwd=ROOT,
                           capture_output=True, text=True)  # fmt: skip
    assert wrong.returncode == 1 and "there are cpu, gpu, tpu" in wrong.stderr


MAIN = ["--", "--config=a", "--workdir=gs://b/w"]
SLURM_CPU = ["slurm", "--platform", "cpu"]
GKE = ["gke", "--image=i", "--tpu=t", "--topology=4x4"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["local", "--processes", "0"], "'0' is not a whole number from 1"),
        (["local", "--devices-per-process", "-2"], "'-2' is not"),
        (["local", "--port", "99999"], "'99999' is not a whole number from 1 to 65535"),
        (["local", "--max-restarts", "-1"], "a whole number from 0"),
        (["local", "--unknown"], "unrecognized arguments: --unknown; --help"),
        ([*SLURM_CPU, "--nodes", "0"], "--nodes: '0' is not"),
        (["slurm", "--gpus-per-node", "-1"], "--gpus-per-node: '-1' is not"),
        ([*SLURM_CPU, "--nodes", "2", "--gpus-per-node", "8"], "--gpus-per-node is for GPUs"),
        ([*SLURM_CPU, "--process-per", "node", "--processes-per-node", "4"], "--process-per is"),
        ([*SLURM_CPU, "--name", "a/b"], "no / and no %"),
        ([*GKE, "--slices", "0"], "--slices: '0' is not"),
        ([*GKE, "--topology", "0x4"], "has no chips"),
        ([*GKE, "--name", "Bad Name"], "is no name of Kubernetes"),
        ([*GKE, "--name", "a" * 41], "at most 40"),
        ([*GKE, "--claim", "foo"], "is not NAME:/PATH"),
        (["tpu_vm", "--name=n", "--zone=z", "--type", "v5litepod-0"], "not KIND-NUMBER"),
    ],
)
def test_numbers_and_names_are_checked(words, said, monkeypatch, capsys):
    """One sentence, and main.py's exit code of wrong usage."""
    main = importlib.import_module(words[0]).main
    monkeypatch.setattr(sys, "argv", ["x", *words[1:], "--dry-run", *MAIN])
    with pytest.raises(SystemExit) as end:
        common.run(main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1


def test_a_failed_command_is_told_with_what_to_do():
    mends = (("quota", "ask for more"), ("zone", "another zone"))
    assert common.explain("x", "ERROR: Quota\n exceeded", mends) == (
        "x failed: ERROR: Quota exceeded\n  -> ask for more"
    )
    assert common.explain("x", "", mends) == "x failed: without a word"
    log = 'E1129 18:43:10.2 1 memcache.go:265] "quota"\nrefused\n'  # as kubectl 1.32 prints
    assert common.explain("x", log, mends) == "x failed: refused"
