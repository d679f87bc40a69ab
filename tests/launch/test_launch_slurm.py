"""launch/slurm.py with fakes of Slurm's commands, and its script under bash.

A real Slurm runs the same script in `make test-slurm`.
"""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

import common
import pytest
import slurm

ROOT = pathlib.Path(__file__).parents[2]

# Stands for `python main.py`: ends with the code that CODES has for its process.
STAND_IN = """\
#!/bin/bash
i=${JAX_PROCESS_ID:-0}
at=${JAX_COORDINATOR_ADDRESS:-nowhere}
echo "process $i of ${JAX_NUM_PROCESSES:-1} at $at, $JAX_LOCAL_DEVICE_IDS: $*"
codes=($CODES)
[[ "${codes[$i]}" == die ]] && kill -9 $$
exit "${codes[$i]}"
"""
JOB = ("JobId=7 JobName=x\n JobState={}\n Reboot=0 ExitCode={}:0\n",)


@pytest.fixture
def cluster(fakes, tmp_path, monkeypatch):
    """Fakes of all commands; launch(options) -> exit code."""
    fakes.add("sbatch", "scontrol", "scancel", "srun")
    python = fakes.script("python", STAND_IN)
    monkeypatch.setattr(slurm, "POLL", 0)
    monkeypatch.chdir(tmp_path)

    def launch(*options, flags=()):
        return slurm.main(
            ["--python", str(python), "--logs", "logs", *options, "--", "--config=a",
             "--workdir=/shared/runs/w", *flags]
        )  # fmt: skip

    launch.fakes = fakes
    return launch


def state(name, code=0):
    return ("scontrol show job", 0, JOB[0].format(name, code))


CPU = ("--platform", "cpu", "--processes-per-node", "2")


def test_a_job_is_submitted_followed_and_its_code_given(cluster, capsys, tmp_path):
    cluster.fakes.reply(("sbatch", 0, "7;cluster"), state("PENDING"), state("RUNNING"),
                        state("COMPLETED"))  # fmt: skip
    log = tmp_path / "logs" / "x-7.out"
    log.parent.mkdir()
    log.write_text("step 1\n")
    assert cluster(*CPU, "--name", "x") == 0
    out = capsys.readouterr().out
    assert "submitted as job 7" in out and "\nstep 1\n" in out
    assert out.index("7: PENDING") < out.index("7: RUNNING") < out.index("7: COMPLETED")
    (submitted,) = cluster.fakes.calls("sbatch")
    assert submitted == ["sbatch", "--parsable", "logs/x.sbatch"]
    assert (tmp_path / "logs/x.sbatch").read_text() in out  # printed as submitted


def test_blanks_in_names_and_folders(cluster, capsys, tmp_path):
    cluster.fakes.reply(("sbatch", 0, "7"), state("COMPLETED"))
    log = tmp_path / "lo gs" / "my job-7.out"
    log.parent.mkdir()
    log.write_text("step 1\n")
    assert cluster(*CPU, "--name", "my job", "--logs", "lo gs") == 0
    assert "\nstep 1\n" in capsys.readouterr().out
    lines = (tmp_path / "lo gs/my job.sbatch").read_text().splitlines()
    words = [w for ln in lines if ln.startswith("#SBATCH ") for w in shlex.split(ln[8:])]
    assert {"--job-name=my job", "--output=lo gs/my job-%j.out"} <= set(words)


@pytest.mark.parametrize(
    ("end", "code"),
    [("FAILED", 1), ("FAILED", 2), ("FAILED", 42), ("TIMEOUT", 43), ("NODE_FAIL", 43),
     ("CANCELLED", 1), ("OUT_OF_MEMORY", 1), ("PREEMPTED", 42)],
)  # fmt: skip
def test_how_a_job_ended(cluster, capsys, end, code):
    cluster.fakes.reply(("sbatch", 0, "7"), state(end, code if end == "FAILED" else 0))
    assert cluster(*CPU) == code
    assert f"exit code {code}" in capsys.readouterr().out


def test_no_wait_only_submits(cluster):
    cluster.fakes.reply(("sbatch", 0, "7"))
    assert cluster(*CPU, "--no-wait") == 0
    assert len(cluster.fakes.calls()) == 1


def test_the_same_command_joins_the_job_that_is_there(cluster, capsys, tmp_path):
    submitted = lambda: len(cluster.fakes.calls("sbatch"))  # noqa: E731
    cluster.fakes.reply(("sbatch", 0, "7;cluster"))
    again = (*CPU, "--name", "x")
    assert cluster(*again, "--no-wait") == 0
    (file,) = (tmp_path / "logs").glob("x-*.job")
    assert file.read_text().split()[1] == "7;cluster"

    cluster.fakes.reply(state("PENDING"), state("RUNNING"), state("FAILED", 42))
    assert cluster(*again) == 42 and submitted() == 1
    assert "job 7 of an earlier start is PENDING: joined" in capsys.readouterr().out
    cluster.fakes.reply(state("RUNNING"))
    assert cluster(*again, "--no-wait") == 0 and submitted() == 1
    said = refused(cluster, *again, "--time", "1:00")
    assert "with other options or flags; `scancel 7`" in said
    # Another workdir has a file of its own; who asks nobody must not submit a second.
    down = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    cluster.fakes.reply(("scontrol show job", 1, "", down))
    assert "does not answer" in refused(cluster, *again)
    cluster.fakes.reply(("sbatch", 0, "8"))
    assert cluster(*again, "--no-wait", flags=["--workdir=gs://b/other"]) == 0 and submitted() == 2
    # Ended, forgotten by Slurm, or a number that is another's by now.
    gone = ("scontrol show job", 1, "", "slurm_load_jobs error: Invalid job id specified")
    other = ("scontrol show job", 0, state("RUNNING")[2].replace("JobName=x", "JobName=y"))
    for count, reply in enumerate((state("COMPLETED"), state("TIMEOUT"), gone, other), 3):
        cluster.fakes.reply(reply, ("sbatch", 0, "7"))
        assert cluster(*again, "--no-wait") == 0 and submitted() == count


def test_a_launcher_that_is_killed_while_sbatch_runs_finds_its_job(cluster, capsys, tmp_path):
    cluster.fakes.script("sbatch", "#!/bin/sh\n: > called; sleep 0.5; echo 9\n")
    words = [*CPU, "--name", "x", "--python", "p", "--logs", "logs", "--", "--config=a",
             "--workdir=gs://b/w"]  # fmt: skip
    first = subprocess.Popen([sys.executable, str(ROOT / "launch/slurm.py"), *words],
                             stdout=subprocess.DEVNULL)  # fmt: skip
    while not (tmp_path / "called").exists():
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    cluster.fakes.add("sbatch")
    cluster.fakes.reply(state("RUNNING"), state("COMPLETED"))
    assert slurm.main(words) == 0 and not cluster.fakes.calls("sbatch")
    assert "job 9 of an earlier start is RUNNING: joined" in capsys.readouterr().out


def test_the_end_of_the_launcher_cancels_the_job_which_saves(cluster):
    cluster.fakes.reply(("sbatch", 0, "7"), ("scancel", 0), state("RUNNING"), state("RUNNING"),
                        state("CANCELLED"))  # fmt: skip

    def send():
        while not cluster.fakes.calls("scontrol"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    assert cluster(*CPU) == 42
    assert cluster.fakes.calls("scancel") == [["scancel", "7"]]


def refused(cluster, *options, **kwargs):
    with pytest.raises(common.LaunchError) as e:
        cluster(*options, **kwargs)
    return str(e.value)


@pytest.mark.parametrize(
    ("stderr", "hint"),
    [
        ("sbatch: error: invalid partition specified: gpus", "choose one with --partition"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition "
         "combination specified", "give --account"),
        ("error: Job violates accounting/QOS policy (job submit limit, user's size)", "your quota"),
        ("error: Invalid generic resource (gres) specification", "mend --gpus-per-node"),
        ("error: Requested node configuration is not available", "no node has that many GPUs"),
        ("fatal: Could not establish a configuration source", "run this on a login node"),
        ("error: Unable to contact slurm controller (connect failure)", "does not answer"),
    ],
)  # fmt: skip
def test_what_sbatch_refuses_says_what_to_do(cluster, stderr, hint):
    cluster.fakes.reply(("sbatch", 1, "", stderr))
    said = refused(cluster, "--gpus-per-node", "4")
    assert hint in said and stderr.split(": ")[-1][:30] in said


def test_mistakes_say_what_to_do(cluster, fakes, tmp_path):
    (tmp_path / "file").touch()
    said = refused(cluster, *CPU, "--logs", "file/logs")
    assert "cannot be written (Not a directory); choose another folder with --logs" in said
    assert "--gpus-per-node says" in refused(cluster)
    assert "GPUs have --process-per" in refused(
        cluster, "--gpus-per-node", "2", "--processes-per-node", "2"
    )
    said = refused(cluster, *CPU, "--nodes", "2", flags=["--workdir=/tmp/run"])
    assert "own disk of each of the 2 nodes" in said and "gs://" in said
    # A word that sbatch does not know, among the words that are handed to it as they are.
    assert "unrecognized arguments: --gpuz=2" in refused(cluster, *CPU, "--sbatch=--gpuz=2")
    (fakes.bin / "sbatch").unlink()
    assert "no `sbatch` on PATH; run this on a login node" in refused(cluster, *CPU)


# -------------------------------------------------------------------------- the script, under bash


@pytest.fixture
def script(cluster, tmp_path, monkeypatch):
    """run(codes of the processes, options) -> (exit code, output) of the script itself."""
    sleeps = cluster.fakes.script("sleep", f'#!/bin/sh\necho "$@" >> {tmp_path}/sleeps\n')
    sleeps.chmod(0o755)

    def run(codes, *options, job_state="RUNNING", **env):
        cluster.fakes.reply(("sbatch", 0, "7"))
        cluster("--no-wait", "--name", "x", *options)
        for file in (tmp_path / "logs").glob("*.job"):
            file.unlink()
        cluster.fakes.reply(
            ("show hostnames", 0, "n0\nn1"), state(job_state),
            ("show node n0", 0, "NodeName=n0\n   NodeAddr=10.0.0.1 NodeHostName=n0\n"),
        )  # fmt: skip
        args = slurm.options(options)
        done = subprocess.run(
            ["bash", "logs/x.sbatch"], capture_output=True, text=True, timeout=60,
            env=os.environ | {
                "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]", "CODES": codes,
                "SLURM_NTASKS": str(args.nodes * slurm.processes_per_node(args)),
            } | env,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    run.fakes, run.sleeps = cluster.fakes, tmp_path / "sleeps"
    return run


@pytest.mark.parametrize(
    ("codes", "code", "again"),
    [
        ("0 0", 0, False),
        ("42 42", 42, True),
        ("0 42", 42, True),
        ("42 43", 43, True),
        ("die 43", 43, True),  # killed from outside
        ("1 43", 1, False),  # it failed by itself; the other was left behind
        ("43 2", 2, False),
        ("42 1", 1, False),
        ("134 43", 43, True),  # aborted by jax
        ("139 43", 1, False),  # a crash
    ],
)
def test_codes_of_processes_and_what_is_requeued(script, codes, code, again):
    found, out = script(codes, *CPU)
    assert found == code, out
    requeued = ["scontrol", "requeue", "7"] in script.fakes.calls()
    assert requeued == again and (": requeued" in out) == again, out
    argv = "main.py --config=a --workdir=/shared/runs/w --expect_devices=2"
    assert "\nprocess 0 of 2 at 10.0.0.1:20007, : " in out and "[1] process 1 of 2 at" in out
    assert out.count(f": {os.path.relpath(ROOT / 'main.py')}{argv[7:]}\n") == 2, out


def test_failures_in_a_row_wait_longer_and_longer(script):
    for row in (1, 2, 3):
        code, out = script("43 43", *CPU)
        assert code == 43 and f"a process is gone, {row} in a row" in out
    assert script.sleeps.read_text().split() == ["10", "60", "20", "60", "40", "60"]
    assert script("42 42", *CPU)[0] == 42  # which ends the row
    assert "gone, 1 in a row; waiting 10 s" in script("43 43", *CPU)[1]
    assert "gone, 2 in a row" in script("43 43", *CPU, SECONDS="500")[1]
    assert "gone, 1 in a row" in script("43 43", *CPU, SECONDS="601")[1]  # it had lived long


def test_restarts_end(script):
    for _ in range(2):
        assert ": requeued" in script("43 43", *CPU, "--max-failures", "2")[1]
    _, out = script("43 43", *CPU, "--max-failures", "2")
    assert "a process is gone, 3 in a row: no restart left" in out and "requeued" not in out
    _, out = script("42 42", *CPU, "--max-restarts", "3", SLURM_RESTART_COUNT="2")
    assert "restart 2 of 3" in out and "requeued" in out
    _, out = script("42 42", *CPU, "--max-restarts", "3", SLURM_RESTART_COUNT="3")
    assert "no restart left (--max-restarts 3)" in out and "requeued" not in out


def test_a_job_that_slurm_itself_ends_is_not_requeued(script):
    code, out = script("42 42", *CPU, job_state="CANCELLED")
    assert code == 42 and "Slurm itself has requeued or cancelled" in out
    assert ["scontrol", "requeue", "7"] not in script.fakes.calls()


def test_devices_of_a_process_per_gpu_and_of_a_process_per_node(script):
    gpus = ("--gpus-per-node", "2", "--nodes", "2", "--port", "29501")
    out = script("0 0 0 0", *gpus)[1]
    # (the fake srun has one node only: SLURM_LOCALID is the number of the task)
    assert all(f"process {i} of 4 at 10.0.0.1:29501, {i}: " in out for i in range(4)), out
    out = script("0 0", *gpus, "--process-per", "node")[1]
    assert all(f"process {i} of 2 at 10.0.0.1:29501, 0,1: " in out for i in range(2)), out
