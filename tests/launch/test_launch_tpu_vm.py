"""launch/tpu_vm.py with a fake gcloud; launch/tpu_worker.sh for real, on a worker made up here."""

import os
import pathlib
import signal
import subprocess
import threading
import time

import common
import pytest
import tpu_vm

ROOT = pathlib.Path(__file__).parents[2]

NAMED = ("--name", "t", "--zone", "z", "--type", "v5litepod-16")
FLAGS = ("--", "--config=a", "--workdir=gs://b/w")
LOGGED_IN = (("auth list", 0, "me@example.org"), ("config get project", 0, "mine"))
MISSING = "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 't' was not found"
NO_TPU = ("tpu-vm describe", 1, "", MISSING)
READY = ("tpu-vm describe", 0, "READY")


def failed(*workers):
    """What gcloud says of workers that ended with an exit code."""
    return "\n".join(
        f"##### Command execution on worker {i} failed with exit status {c}. Continuing."
        for i, c in workers
    )


@pytest.fixture
def launch(fakes, monkeypatch):
    """launch(answers of gcloud, options) -> exit code."""
    fakes.add("gcloud")
    monkeypatch.setattr(tpu_vm, "POLL", 0.01)
    monkeypatch.setattr(common, "BACK_OFF", (0.01, 0.01))
    fakes.script("tar", "#!/bin/sh\n")

    def run(replies, *options, flags=FLAGS):
        fakes.reply(*replies, *LOGGED_IN)
        return tpu_vm.main([*NAMED, *options, *flags])

    run.fakes = fakes
    return run


def steps(fakes):
    """The calls that change something, by their last words of the subcommand."""
    found = []
    for call in fakes.calls("gcloud compute"):
        what = call[3:5]
        if what[1] == "ssh":
            command = call[-1].partition("=")[2]
            what = ["install" if command.endswith("install") else command.split(" run ")[0][-13:]]
        if what[-1] != "describe":
            found.append(what[-1] if what[0] != "queued-resources" else f"queue {what[1]}")
    return found


def test_a_new_tpu_is_made_filled_run_and_deleted(launch, capfd):
    states = [NO_TPU, ("tpu-vm describe", 0, "CREATING"), READY]
    assert launch([*states, ("tpu-vm ssh", 0, "step 1")], "--spot", "--delete") == 0
    assert steps(launch.fakes) == ["create", "scp", "install", "tpu_worker.sh", "delete"]
    (create,) = launch.fakes.calls("gcloud compute tpus tpu-vm create")
    assert {"--version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-16", "--spot",
            "--zone=z"} <= set(create)  # fmt: skip
    out = capfd.readouterr().out
    assert "t: CREATING" in out and "\nstep 1\n" in out and "ended with exit code 0" in out
    run = launch.fakes.calls("gcloud compute tpus tpu-vm ssh")[-1]
    assert (
        "--worker=all" in run
        and "--expect_devices=16" in run[-1]
        and "LIBTPU_INIT_ARGS=" in run[-1]
    )
    # What was printed is what was run.
    assert all(
        common.shell(c) in out for c in launch.fakes.calls("gcloud compute") if c[4] != "describe"
    )


def test_a_tpu_with_another_run_is_not_deleted(launch, capfd):
    assert launch([READY, ("_worker.sh run", 3, "", "a run with other flags")], "--delete") == 2
    assert "delete" not in steps(launch.fakes)
    assert "t is left to the run that is going on there" in capfd.readouterr().out


def test_a_tpu_that_was_there_is_not_deleted_before_our_run_has_started(launch, capfd):
    """It may hold a run that could not be joined this time."""
    lost = ("tpu-vm scp", 1, "", "Connection timed out")
    assert "timed out" in refused(launch, [READY, lost], "--delete")
    assert "delete" not in steps(launch.fakes)
    assert "t stays, and is billed" in capfd.readouterr().out


def test_a_tpu_that_is_ready_is_used_as_it_is(launch):
    assert launch([READY]) == 0
    assert steps(launch.fakes) == ["scp", "install", "tpu_worker.sh"]


def test_a_queued_tpu_is_waited_for(launch, capfd):
    queue = [("queued-resources describe", 1, "", MISSING)]
    queue += [("queued-resources describe", 0, s)
              for s in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")]  # fmt: skip
    nodes = [NO_TPU, NO_TPU, ("tpu-vm describe", 0, "CREATING"), READY]
    assert launch([*queue, *nodes], "--queue", "--delete") == 0
    assert steps(launch.fakes) == [
        "queue create",
        "scp",
        "install",
        "tpu_worker.sh",
        "queue delete",
    ]
    out = capfd.readouterr().out
    assert "t: WAITING_FOR_RESOURCES\n" in out and "t: PROVISIONING / CREATING\n" in out


@pytest.mark.parametrize(
    ("code", "stderr", "why"),
    [
        (42, failed((0, 42), (1, 42)), "exit code 42 (preempted and saved)"),
        (43, failed((0, 43), (1, 137)), "exit code 43 (a process is gone, 1 in a row)"),
        (134, failed((0, 134), (1, 0)), "exit code 43 (a process is gone, 1 in a row)"),
        (255, "Connection closed by remote host", "exit code 43 (a process is gone, 1 in a row)"),
        (43, failed((0, 43), (3, 255)), "exit code 43 (a process is gone, 1 in a row)"),
    ],
)
def test_a_run_is_started_again(launch, capfd, code, stderr, why):
    ssh = [("run train", code, "", stderr), ("run train", 0)]
    assert launch([READY, *ssh]) == 0
    assert steps(launch.fakes) == ["scp", "install", "tpu_worker.sh", "tpu_worker.sh"]
    assert f"restart 1 of 100: {why}" in capfd.readouterr().out


@pytest.mark.parametrize(("workers", "code"), [([(0, 43), (2, 1)], 1), ([(0, 2), (1, 43)], 2)])
def test_a_run_that_fails_by_itself_is_not(launch, workers, code):
    assert launch([READY, ("run train", workers[0][1], "", failed(*workers))]) == code
    assert steps(launch.fakes).count("tpu_worker.sh") == 1


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_a_tpu_that_was_taken_away_is_made_anew(launch, capfd, state):
    states = [READY, ("tpu-vm describe", 0, state), READY]
    assert launch([*states, ("run train", 255, "", "lost"), ("run train", 0)], "--spot") == 0
    assert steps(launch.fakes) == ["scp", "install", "tpu_worker.sh", "delete", "create", "scp",
                                   "install", "tpu_worker.sh"]  # fmt: skip
    assert f"t is {state}: deleted, then made anew" in capfd.readouterr().out


def test_no_free_tpu_after_a_preemption_is_waited_for_and_told(launch, capfd):
    full = 'There is no more capacity in the zone "z"'
    states = [READY, ("tpu-vm describe", 0, "PREEMPTED"), NO_TPU, READY]
    create = [("tpu-vm create", 1, "", full), ("tpu-vm create", 0)]
    assert launch([*states, *create, ("run train", 255), ("run train", 0)]) == 0
    said = capfd.readouterr()
    assert "--queue waits for it" in said.err and "restart 2 of 100: exit code 43" in said.out


def test_a_tpu_whose_first_start_fails_is_deleted_or_told(launch, capfd):
    """It is billed until then."""
    broken = ("_worker.sh install", 1, "", "installing failed")
    states = [NO_TPU, READY]
    assert "installing failed" in refused(launch, [*states, broken], "--delete")
    assert steps(launch.fakes) == ["create", "scp", "install", "delete"]
    refused(launch, [*states, broken])
    assert steps(launch.fakes)[4:] == ["create", "scp", "install"]
    delete = "gcloud compute tpus tpu-vm delete t --zone=z --quiet"
    assert f"t stays, and is billed; this deletes it: {delete}\n" in capfd.readouterr().out
    refused(launch, [*states, broken, ("tpu-vm delete", 1, "", "quota of deletions")], "--delete")
    assert f"may still be there, and be billed; this deletes it: {delete}" in capfd.readouterr().err
    # What could not be made needs no deletion.
    refused(launch, [NO_TPU, ("tpu-vm create", 1, "", "Quota")], "--delete")
    assert steps(launch.fakes)[-2:] == ["delete", "create"]


def test_the_end_of_the_launcher_stops_the_run_which_saves(launch):
    """SIGTERM while ssh is on its way: the workers are told, their 42 is the answer."""
    slow = (
        f'#!/bin/sh\n{launch.fakes.bin}/known "$@"; code=$?\n'
        'case "$*" in *"run train"*) sleep 1;; esac\nexit $code\n'
    )
    (launch.fakes.bin / "gcloud").rename(launch.fakes.bin / "known")
    launch.fakes.script("gcloud", slow)

    def send():
        while "tpu_worker.sh" not in steps(launch.fakes):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    assert launch([READY, ("run train", 42, "", failed((0, 42)))]) == 42
    assert launch.fakes.calls("gcloud compute tpus tpu-vm ssh")[-1][-1].endswith(" stop train")


def test_stop_needs_no_type_and_says_what_came_of_it(launch, capfd):
    def stop(*replies):
        launch.fakes.reply(*replies, *LOGGED_IN)
        return tpu_vm.main([*NAMED[:4], "--stop"])

    said = "launch: worker 0: there is no run to stop"
    assert stop(("stop train", 0, said)) == 0 and said in capfd.readouterr().out
    with pytest.raises(common.LaunchError, match="is --name right"):
        stop(("stop train", 1, "", MISSING))
    with pytest.raises(common.LaunchError, match="not logged in"):
        stop(("auth list", 0, ""))
    (launch.fakes.bin / "gcloud").unlink()
    with pytest.raises(common.LaunchError, match="no `gcloud` on PATH"):
        stop()
    with pytest.raises(common.LaunchError, match="give the accelerator type"):
        tpu_vm.main([*NAMED[:4], *FLAGS])


# ----------------------------------------------------------------------------------------- mistakes


def refused(launch, replies, *options, **kwargs):
    with pytest.raises(common.LaunchError) as e:
        launch(replies, *options, **kwargs)
    return str(e.value)


CREATE = "ERROR: (gcloud.compute.tpus.tpu-vm.create) "


@pytest.mark.parametrize(
    ("stderr", "hint"),
    [
        (CREATE + "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 0",
         "iam-admin/quotas"),
        (CREATE + '{"code": 8, "message": "There is no more capacity in the zone \\"z\\"; you can '
         'try in another zone"}', "--queue waits for it"),
        (CREATE + "Insufficient capacity.", "--queue waits for it"),
        (CREATE + "ALREADY_EXISTS: Resource 't' already exists", "choose another --name"),
        (CREATE + "PERMISSION_DENIED: Permission denied on 'locations/z' (or it may not exist).",
         "is --zone right?"),
        (CREATE + "Accelerator type \"v5litepod-16\" is not available", "accelerator-types list"),
        (CREATE + "Cloud TPU API has not been used in project 1 before", "services enable tpu"),
        (CREATE + "PERMISSION_DENIED: The caller does not have permission", "TPU Admin"),
        (CREATE + "Reauthentication failed. cannot prompt during non-interactive execution.",
         "gcloud auth login"),
    ],
)  # fmt: skip
def test_what_gcloud_refuses_says_what_to_do(launch, stderr, hint):
    assert hint in refused(launch, [NO_TPU, ("tpu-vm create", 1, "", stderr)])
    assert steps(launch.fakes) == ["create"]


def test_a_wrong_zone_is_named_already_by_the_first_question(launch):
    denied = "PERMISSION_DENIED: Permission denied on 'locations/zz' (or it may not exist)."
    said = refused(launch, [("tpu-vm describe", 1, "", denied)])
    assert "is --zone right? `gcloud compute tpus locations list`" in said


def test_who_is_not_logged_in_or_has_no_project_or_no_gcloud(launch):
    assert "not logged in; run `gcloud auth login`" in refused(launch, [("auth list", 0, "")])
    assert "give --project" in refused(launch, [("config get project", 0, "(unset)")])
    (launch.fakes.bin / "gcloud").unlink()
    assert "no `gcloud` on PATH; install the Google Cloud CLI" in refused(launch, [])


def test_a_queued_request_that_fails_is_deleted_and_told(launch):
    queue = [("queued-resources describe", 1, "", MISSING),
             ("queued-resources describe", 0, "FAILED")]  # fmt: skip
    said = refused(launch, [NO_TPU, *queue], "--queue")
    assert "became FAILED before it was ready" in said and "another --zone" in said
    assert steps(launch.fakes) == ["queue create", "queue delete"]


def test_mistakes_on_the_command_line(launch):
    local = ("--", "--config=a", "--workdir=runs/x")
    said = refused(launch, [], flags=local)
    assert "4 workers" in said and "gs://BUCKET/DIR" in said
    assert launch([READY], "--shared-workdir", flags=local) == 0
    said = refused(launch, [], "--type", "v4-8", "--spot", flags=local)
    assert "a spot TPU's disk goes" in said
    for wrong in ("v5e-16", "v4", "h100-8"):
        assert "KIND-NUMBER with a KIND of v6e" in refused(launch, [], "--type", wrong)


@pytest.mark.parametrize(
    ("accelerator", "devices", "workers"),
    [("v2-8", 8, 1), ("v3-32", 32, 4), ("v4-8", 4, 1), ("v4-32", 16, 4), ("v5p-16", 8, 2),
     ("v5litepod-1", 1, 1), ("v5litepod-8", 8, 1), ("v5litepod-16", 16, 4), ("v6e-64", 64, 16)],
)  # fmt: skip
def test_devices_and_machines_of_a_type(accelerator, devices, workers):
    assert tpu_vm.device_count(accelerator) == devices
    assert tpu_vm.worker_count(accelerator) == workers


def test_the_code_that_is_copied_is_whole(tmp_path):
    """The real tar: what a worker needs is in it, and neither environments nor runs."""
    archive = str(tmp_path / "x.tgz")
    subprocess.run(tpu_vm.pack(archive), check=True)
    listed = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True, check=True)
    names = set(listed.stdout.splitlines())
    assert {"./main.py", "./launch/tpu_worker.sh", "./requirements.txt", "./dcae_jax/train.py",
            "./configs/demo.py", "./constraints-3.11.txt"} <= names  # fmt: skip
    assert not [n for n in names if n.startswith(("./.venv", "./runs/")) or "__pycache__" in n]


# ------------------------------------------------------------------------------------ tpu_worker.sh

# Stands for the Python of the environment on the worker.
MAIN = """\
#!/bin/bash
trap 'echo saved; exit 42' TERM
at=${JAX_COORDINATOR_ADDRESS:-nowhere}
echo "main $* process ${JAX_PROCESS_ID:-0} of ${JAX_NUM_PROCESSES:-1} at $at"
while [ -e "$HOME/go_on" ]; do sleep 0.1; done
exit "$(cat "$HOME/code")"
"""


class Worker:
    """A home, a metadata server and a TPU of its own."""

    def __init__(self, fakes, folder, index=0, endpoints="a:8470:10.0.0.5,b:8470:10.0.0.6"):
        self.home = folder / f"home{index}"
        python = self.home / "dcae_jax_venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(MAIN)
        python.chmod(0o755)
        (self.home / "code").write_text("0")
        self._env = os.environ | {"HOME": str(self.home), "N": str(index), "ENDPOINTS": endpoints}
        fakes.script("curl", '#!/bin/sh\ncase "$*" in *agent-worker-number) echo "$N";; *) '
                     'echo "$ENDPOINTS";; esac\n')  # fmt: skip
        fakes.script("sudo", '#!/bin/sh\ncat "$HOME/holder" 2> /dev/null\n')

    def start(self, *words):
        return subprocess.Popen(
            ["bash", str(ROOT / "launch/tpu_worker.sh"), *words], env=self._env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.home,
        )  # fmt: skip

    def run(self, *words):
        process = self.start(*words)
        out = process.communicate(timeout=30)[0]
        return process.returncode, out


RUN = ("run", "train", "--config=a", "--workdir=two words")


def test_a_worker_runs_its_process_and_gives_its_code(fakes, tmp_path):
    worker = Worker(fakes, tmp_path)
    says = "main main.py --config=a --workdir=two words process 0 of 2 at 10.0.0.5:8482\n"
    assert worker.run(*RUN) == (0, says)
    for code in (1, 42, 43):
        (worker.home / "code").write_text(str(code))
        assert worker.run(*RUN) == (code, says)
    other = Worker(fakes, tmp_path, 1, "t1v-n-1-w-0,t1v-n-1-w-1")
    assert other.run(*RUN)[1] == "[1] " + says.replace("process 0", "process 1").replace(
        "10.0.0.5", "t1v-n-1-w-0"
    )
    alone = Worker(fakes, tmp_path, 2, "a:8470:10.0.0.5")
    assert "process 0 of 1 at nowhere" in alone.run(*RUN)[1]


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_lost_connection_leaves_the_run_alone_and_the_next_start_joins_it(fakes, tmp_path):
    worker = Worker(fakes, tmp_path)
    (worker.home / "go_on").touch()
    pid_file = worker.home / "dcae_jax_jobs" / "train.pid"
    first = worker.start(*RUN)
    assert first.stdout.readline().startswith("main main.py")
    first.kill()  # the connection
    pid = pid_file.read_text()
    second = worker.start(*RUN)
    assert "the process still runs" in second.stdout.readline()
    assert pid_file.read_text() == pid
    code, out = worker.run(*RUN, "--config.x=other")
    assert code == 3 and "a run with other flags is going on here" in out and "--stop" in out
    (worker.home / "code").write_text("7")
    (worker.home / "go_on").unlink()
    second.communicate(timeout=30)
    assert second.returncode == 7
    first.communicate(timeout=30)


def test_stop_saves(fakes, tmp_path):
    worker = Worker(fakes, tmp_path)
    assert worker.run("stop", "train") == (0, "launch: worker 0: there is no run to stop\n")
    (worker.home / "go_on").touch()
    run = worker.start(*RUN)
    assert run.stdout.readline().startswith("main")
    assert worker.run("stop", "train")[0] == 0
    assert run.communicate(timeout=30)[0] == "saved\n" and run.returncode == 42


def test_a_tpu_that_another_process_holds_is_named(fakes, tmp_path):
    worker = Worker(fakes, tmp_path)
    (worker.home / "holder").write_text(f"/proc/{os.getpid()}/fd/7\n")
    code, out = worker.run(*RUN)
    assert code == 3 and f"the TPU is in use by process {os.getpid()} (" in out, out
    assert "end it there, or take another TPU" in out


def test_a_machine_that_is_no_tpu_says_so(fakes, tmp_path):
    worker = Worker(fakes, tmp_path)
    fakes.script("curl", "#!/bin/sh\necho 'curl: (6) Could not resolve host' >&2; exit 6\n")
    code, out = worker.run(*RUN)
    assert code == 2 and "this is no TPU VM" in out


def test_install_makes_the_environment_once(fakes, tmp_path):
    worker = Worker(fakes, tmp_path)
    fakes.script("python3", f'#!/bin/sh\necho "$*" >> {tmp_path}/made\n')
    assert worker.run("install") == (0, "") == worker.run("install")
    made = (tmp_path / "made").read_text().splitlines()
    assert [line.split()[1] for line in made] == ["pip", "uv", "uv"]
    assert made[2].endswith("jax[tpu]") and "constraints-3.11.txt" in made[2]
    fakes.script("python3", "#!/bin/sh\nexit 1\n")
    (worker.home / "dcae_jax_venv" / ".ready").unlink()
    code, out = worker.run("install")
    assert code == 2 and "installing failed" in out
