"""launch/local.py: processes of this machine, real ones.

Most cases have a stand-in for main.py that does what its environment says; the last runs main.py.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import common
import local
import pytest
import runs

ROOT = pathlib.Path(__file__).parents[2]

# Prints what it was given; then does what the file DO says: a line for each start, in it a word for
# each process: an exit code, `wait` (for SIGTERM, then 42), `die` (as if killed from outside),
# `abort` (as jax does).
STAND_IN = """\
import json, os, pathlib, signal, sys, time
here, index = pathlib.Path(os.environ["HERE"]), os.environ.get("JAX_PROCESS_ID", "0")
names = ("JAX_", "CUDA_", "XLA_", "SLURM_")
env = {k: v for k, v in os.environ.items() if k.startswith(names)}
starts = here / f"starts{index}"
n = len(starts.read_text().split()) if starts.exists() else 0
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(42)))
with open(starts, "a") as file:
    print(os.getpid(), file=file)
print("argv", json.dumps(sys.argv[1:]))
print("env", json.dumps(env), flush=True)
what = (here / "do").read_text().splitlines()[n].split()[int(index)]
if what in ("die", "abort"):
    os.kill(os.getpid(), signal.SIGKILL if what == "die" else signal.SIGABRT)
if what == "wait":
    time.sleep(60)
sys.exit(int(what))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """launch(what each process does, options) -> exit code, in this process."""
    (tmp_path / "main.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift; exec {sys.executable} -I {tmp_path}/main.py "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(local, "GRACE", 1)
    monkeypatch.setattr(common, "BACK_OFF", (0.1, 0.1))

    def launch(do, *options):
        (tmp_path / "do").write_text("\n".join(do))
        return local.main(["--python", str(python), *options, "--", "--config=a", "--workdir=w x"])

    return launch


def pids(folder, index):
    return [int(p) for p in (folder / f"starts{index}").read_text().split()]


def test_each_process_gets_its_number_and_output_is_told_apart(stand_in, capfd):
    assert stand_in(["0 0 0"], "--processes", "3", "--devices-per-process", "2") == 0
    out = capfd.readouterr().out
    argv = 'argv ["--config=a", "--workdir=w x", "--expect_devices=6"]'
    assert all(f"\n{prefix}{argv}" in out for prefix in ("", "[1] ", "[2] "))
    envs = [(p, json.loads(e)) for p, e in re.findall(r"^(\[\d\] )?env (.*)", out, re.M)]
    assert {(p, e["JAX_PROCESS_ID"], e["JAX_NUM_PROCESSES"]) for p, e in envs} == {
        ("", "0", "3"), ("[1] ", "1", "3"), ("[2] ", "2", "3")
    }  # fmt: skip
    (address,) = {e["JAX_COORDINATOR_ADDRESS"] for _, e in envs}
    assert re.fullmatch(r"127.0.0.1:\d+", address)
    assert out.count("--xla_force_host_platform_device_count=2") == 6  # printed, and really set


def test_one_process_is_started_without_a_coordinator(stand_in, capfd):
    assert stand_in(["0"]) == 0
    assert "JAX_NUM_PROCESSES" not in capfd.readouterr().out


def test_one_process_in_a_slurm_step_of_several_is_a_run_of_its_own(
    stand_in, capfd, monkeypatch, tmp_path
):
    others = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "JAX_NUM_PROCESSES": "4"}
    for name, value in (others | {"SLURM_JOB_ID": "7"}).items():
        monkeypatch.setenv(name, value)
    assert stand_in(["0", "0"]) == 0
    out = capfd.readouterr().out
    env = json.loads(re.search(r"^env (.*)", out, re.M)[1])
    assert env["SLURM_JOB_ID"] == "7" and not others.keys() & env.keys()
    line = re.search(r"^\[0\] (.*)", out, re.M)[1]  # as printed it is the same
    typed = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert json.loads(re.search(r"^env (.*)", typed, re.M)[1]) == env


def test_42_starts_all_again_and_43_and_kill_9_too(stand_in, tmp_path, capfd):
    do = ["42 42", "43 43", "die 43", "abort 43", "0 0"]
    assert stand_in(do, "--processes", "2") == 0
    out = capfd.readouterr().out
    assert len(pids(tmp_path, 0)) == len(pids(tmp_path, 1)) == 5
    assert "restart 1 of 100: exit code 42 (preempted and saved)" in out
    assert "restart 2 of 100: exit code 43 (a process is gone, 1 in a row)" in out
    assert "restart 3 of 100: exit code 43 (a process is gone, 2 in a row)" in out
    assert "restart 4 of 100: exit code 43 (a process is gone, 3 in a row)" in out


def test_no_more_restarts_than_allowed(stand_in, tmp_path, capfd):
    assert stand_in(["42"] * 5, "--max-restarts", "2") == 42
    assert len(pids(tmp_path, 0)) == 3 and "no restart left" in capfd.readouterr().out


@pytest.mark.parametrize(("do", "code"), [("1 wait", 1), ("wait 2", 2), ("0 1", 1)])
def test_a_process_that_fails_ends_the_others(stand_in, tmp_path, do, code):
    begin = time.monotonic()
    assert stand_in([do], "--processes", "2") == code
    assert time.monotonic() - begin < 20
    for pid in pids(tmp_path, 0) + pids(tmp_path, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_and_their_42_is_no_reason_to_start_again(
    stand_in, tmp_path, capfd, number
):
    def send():
        while not all((tmp_path / f"starts{i}").exists() for i in (0, 1)):
            time.sleep(0.05)
        time.sleep(0.2)
        if number == signal.SIGINT:  # a terminal sends it to the whole process group
            for pid in pids(tmp_path, 0) + pids(tmp_path, 1):
                os.kill(pid, number)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert stand_in(["wait wait"] * 2, "--processes", "2") == 42
    sender.join()
    out = capfd.readouterr().out
    assert "\nsaved" in out and "\n[1] saved" in out and "restart" not in out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of the end")
def test_a_launcher_that_is_killed_leaves_nothing_and_the_run_saves(stand_in, tmp_path):
    (tmp_path / "do").write_text("wait wait")
    launcher = subprocess.Popen(
        [sys.executable, "launch/local.py", "--python", str(tmp_path / "python"),
         "--processes", "2", "--", "--config=a", "--workdir=w"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    waiting = {"env", "[1] env"}  # what each prints before it waits
    while waiting:
        waiting.discard(launcher.stdout.readline().partition(" {")[0])
    launcher.kill()
    out = launcher.communicate(timeout=20)[0]  # until the last that could print is gone
    assert sorted(out.split("\n")) == ["", "[1] saved", "saved"]
    end = time.monotonic() + 20
    while any(map(alive, pids(tmp_path, 0) + pids(tmp_path, 1))):
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    """Whether a process runs; one that waits to be collected does not."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def refused(*argv):
    with pytest.raises(common.LaunchError) as e:
        local.main([*argv, "--", "--config=a", "--workdir=w"])
    return str(e.value)


def test_mistakes_say_what_to_do(fakes, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu = ("--platform", "gpu", "--processes", "2")
    assert "no NVIDIA driver" in (said := refused(*gpu)) or "--platform cpu" in said
    fakes.script("nvidia-smi", "#!/bin/sh\necho 'GPU 0: H100'; echo 'GPU 1: H100'\n")
    said = refused(*gpu, "--devices-per-process", "2")
    assert "need 4, and 2 are visible" in said and "lower --processes" in said
    said = refused("--platform", "gpu", "--processes", "3")
    assert "3 processes with 1 GPUs each need 3, and 2 are visible" in said
    fakes.script("nvidia-smi", "#!/bin/sh\necho 'no devices were found' >&2; exit 9\n")
    assert "no devices were found" in refused(*gpu)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        said = refused("--processes", "2", "--port", str(port))
    assert f"port {port}" in said and "leave --port out" in said
    assert "--python /nope is no program" in refused("--platform", "cpu", "--python", "/nope")
    for flags, hint in (([], "no --config behind `--`"), (["--config=a"], "no --workdir")):
        with pytest.raises(common.LaunchError, match=hint):
            local.main(["--", *flags])


def test_the_platform_is_what_is_there_unless_told(fakes, monkeypatch, capsys):
    def printed(*options):
        local.main(["--dry-run", *options, "--", "--config=a", "--workdir=w"])
        return capsys.readouterr().out

    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert "platform cpu: there is no nvidia-smi" in printed()
    fakes.script("nvidia-smi", "#!/bin/sh\necho 'GPU 0: H100'; echo 'GPU 1: H100'\n")
    out = printed()
    assert "platform gpu: 2 GPU(s) visible (nvidia-smi -L)" in out
    assert "JAX_PLATFORMS=cuda" in out and "CUDA_VISIBLE_DEVICES=0,1" in out
    assert "platform cpu: --platform\n" in printed("--platform", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "platform cpu: 0 GPU(s) visible (CUDA_VISIBLE_DEVICES=)" in printed()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,-1,6")
    assert "platform gpu: 1 GPU(s)" in printed()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    out = printed()
    assert "platform cpu: JAX_PLATFORMS=cpu" in out and "[0] XLA_FLAGS=" in out
    assert "JAX_PLATFORMS=cuda" in printed("--platform", "gpu")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert "neither CPU nor GPUs" in refused()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    fakes.script("nvidia-smi", "#!/bin/sh\necho 'driver mismatch' >&2; exit 9\n")
    assert "(driver mismatch); mend the driver" in refused()


# ----------------------------------------------------------------------------------- main.py itself

OPTIONS = ("--config.report.every=1", "--config.checkpoint.every=4")


LAUNCH = (sys.executable, "launch/local.py", "--processes", "2")


@pytest.mark.multiprocess
def test_the_printed_commands_are_the_run(tmp_path):
    """What --dry-run prints, each line in a shell of its own."""
    flags = runs.command("phase1", tmp_path / "run", *OPTIONS, "--config.steps=2")[2:]
    env = runs.environment(PYTHONUNBUFFERED=1)
    printed = subprocess.run([*LAUNCH, "--dry-run", "--", *flags], cwd=ROOT, env=env,
                             capture_output=True, text=True, check=True)  # fmt: skip
    lines = [ln.partition("] ")[2] for ln in printed.stdout.splitlines() if ln.startswith("[")]
    assert len(lines) == 2 and not (tmp_path / "run").exists()
    both = [
        subprocess.Popen(["bash", "-c", line], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for line in lines
    ]  # fmt: skip
    texts = [p.communicate(timeout=400)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], texts
    _, meta = runs.state("phase1", tmp_path / "run")
    assert meta["processes"] == 2 and meta["step"] == 2


@pytest.mark.slow  # four starts of main.py, 45 CPU-seconds; stand-ins do the same above
@pytest.mark.multiprocess
def test_a_run_of_two_processes_goes_on_after_a_preemption(tmp_path):
    flags = runs.command("phase1", tmp_path / "run", *OPTIONS, "--config.steps=8")[2:]
    job = subprocess.Popen(
        [*LAUNCH, "--", *flags], cwd=ROOT, env=runs.environment(PYTHONUNBUFFERED=1), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    text = ""
    for line in job.stdout:
        text += line
        if line.startswith("step 1/"):
            children = pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGTERM)  # of process 1
    assert job.wait() == 0, text
    (saved,) = map(int, re.findall(r"preempted: saved step (\d+)", text))
    assert "restart 1 of 100: exit code 42 (preempted and saved)" in text
    assert f"own workdir, step {saved} " in text and 1 <= saved < 8 and "restart 2" not in text
    _, meta = runs.state("phase1", tmp_path / "run")
    assert meta["processes"] == 2 and meta["step"] == 8
