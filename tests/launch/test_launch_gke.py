"""launch/gke.py with a fake kubectl."""

import json
import os
import signal
import threading
import time

import common
import gke
import pytest

TPU = ("--image", "i:tpu", "--tpu", "tpu-v5-lite-podslice", "--topology", "4x4")
GPU = ("--image", "i:cuda", "--gpu", "nvidia-h100-80gb", "--nodes", "2")
FLAGS = ("--", "--config=a", "--workdir=gs://b/My_Runs/w")
NAME = "d-b-my-runs-w"
NONE = ("get jobset", 0, "")


def jobset(**status):
    return ("get jobset", 0, json.dumps({"status": status}))


def pod(uid="1", phase="Running", code=None, waiting=None, message=None):
    state = {"running": {}}
    if code is not None:
        state = {"terminated": {"exitCode": code}}
    if waiting:
        state = {"waiting": {"reason": waiting, "message": "m"}}
    conditions = [{"type": "PodScheduled", "status": "False", "message": message}]
    item = {
        "metadata": {"name": f"p{uid}", "uid": uid, "creationTimestamp": f"2026-01-0{uid}"},
        "status": {"phase": phase, "containerStatuses": [{"state": state}],
                   "conditions": conditions if message else []},
    }  # fmt: skip
    return ("get pods", 0, json.dumps({"items": [item]}))


@pytest.fixture
def launch(fakes, tmp_path, monkeypatch):
    """launch(answers of kubectl, options) -> exit code."""
    fakes.add("kubectl")
    monkeypatch.setattr(gke, "POLL", 0.01)
    monkeypatch.chdir(tmp_path)

    def run(replies, *options, flags=FLAGS):
        fakes.reply(*replies)
        return gke.main([*(options or TPU), *flags])

    run.fakes, run.manifest = fakes, tmp_path / "runs/gke" / f"{NAME}.json"
    return run


def test_a_jobset_is_applied_and_followed_to_its_end(launch, capfd):
    replies = [NONE, jobset(), jobset(), jobset(restarts=1), jobset(restarts=1),
               jobset(restarts=1, terminalState="Completed")]  # fmt: skip
    pods = [("get pods", 0, '{"items": []}'), pod(), pod(code=42), pod("2"), pod("2", code=0)]
    assert launch([*replies, *pods, ("logs --follow p", 0, "step 1")]) == 0
    out = capfd.readouterr().out
    assert out.count("\nstep 1\n") == 2 and "output of p1" in out and "output of p2" in out
    assert "restart 1: process 0 had ended with exit code 42" in out
    assert launch.fakes.calls("kubectl apply") == [
        ["kubectl", "apply", f"--filename=runs/gke/{NAME}.json"]
    ]
    assert json.loads(launch.manifest.read_text())["metadata"]["name"] == NAME
    assert json.dumps(json.loads(launch.manifest.read_text()), indent=2) in out


@pytest.mark.parametrize("code", [1, 2])
def test_a_job_that_fails_gives_its_code(launch, code):
    replies = [NONE, jobset(), jobset(terminalState="Failed")]
    assert launch([*replies, pod(), pod(code=code)]) == code


def test_the_manifest_of_tpus_and_of_gpus(launch):
    spec = gke.manifest(gke.options([*TPU, "--slices", "2", "--max-restarts", "7"]), FLAGS[1:])
    job = spec["spec"]["replicatedJobs"][0]
    assert spec["spec"]["failurePolicy"]["maxRestarts"] == 7 and job["replicas"] == 2
    assert job["template"]["spec"]["completions"] == 4 == job["template"]["spec"]["parallelism"]
    main = job["template"]["spec"]["template"]["spec"]["containers"][0]
    assert main["resources"]["limits"] == {"google.com/tpu": 4}
    assert main["command"][-1] == "--expect_devices=32"
    names = [e["name"] for e in main["env"]]
    assert "LIBTPU_INIT_ARGS" in names and "JAX_COORDINATOR_ADDRESS" not in names
    single = gke.options(["--image", "i", "--tpu", "tpu-v5-lite-device", "--topology", "1x1"])
    assert gke.machines(single) == 1 == gke.devices(single)
    spec = gke.manifest(gke.options(GPU), FLAGS[1:])
    pods = spec["spec"]["replicatedJobs"][0]["template"]["spec"]
    main = pods["template"]["spec"]["containers"][0]
    env = {e["name"]: e.get("value") or e["valueFrom"] for e in main["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{NAME}-job-0-0.{NAME}:8476"
    assert env["JAX_NUM_PROCESSES"] == "2" and main["command"][-1] == "--expect_devices=16"
    assert "job-completion-index" in env["JAX_PROCESS_ID"]["fieldRef"]["fieldPath"]
    # What ends the job is what restarts do not mend: main.py's 1 and 2.
    assert pods["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]


def refused(launch, replies, *options, **kwargs):
    with pytest.raises(common.LaunchError) as e:
        launch(replies, *options, **kwargs)
    return str(e.value)


@pytest.mark.parametrize(
    ("stderr", "hint"),
    [
        ("error: the server doesn't have a resource type \"jobset\"", "the cluster has no JobSet"),
        ('error: resource mapping not found: no matches for kind "JobSet" in version '
         '"jobset.x-k8s.io/v1alpha2"', "kubectl apply --server-side"),
        ("error: current-context is not set", "get-credentials CLUSTER"),
        ("The connection to the server localhost:8080 was refused - did you specify the right "
         "host or port?", "get-credentials CLUSTER"),
        ("Unable to connect to the server: dial tcp: i/o timeout", "may this machine reach it"),
        ("error: You must be logged in to the server (Unauthorized)", "gcloud auth login"),
        ("exec: executable gke-gcloud-auth-plugin not found", "components install"),
        ('Error from server (Forbidden): jobsets is forbidden: User "x"', "--namespace chooses"),
        ("Error from server (Forbidden): exceeded quota: gpus", "kubectl describe quota"),
    ],
)  # fmt: skip
def test_what_kubectl_refuses_says_what_to_do(launch, stderr, hint):
    assert hint in refused(launch, [("get jobset", 1, "", stderr)])


@pytest.mark.parametrize(
    ("state", "hint"),
    [
        ({"waiting": "ImagePullBackOff"}, "the nodes cannot pull --image"),
        ({"message": "0/3 nodes are available: 3 Insufficient google.com/tpu."}, "no free TPU"),
        ({"message": "0/3 nodes are available: 3 node(s) didn't match Pod's node "
          "affinity/selector."}, "no node has this kind and topology"),
        ({"message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}, "no free GPUs"),
    ],
)  # fmt: skip
def test_why_a_pod_does_not_start_is_told(launch, capfd, state, hint):
    replies = [NONE, jobset(), jobset(terminalState="Completed")]
    assert launch([*replies, pod(phase="Pending", **state)]) == 0
    out = capfd.readouterr().out
    assert hint in out and out.count(hint) == 1


def test_a_jobset_of_that_name(launch, capfd):
    assert "runs already; `kubectl delete jobset" in refused(launch, [jobset(restarts=0)])
    assert not launch.fakes.calls("kubectl apply")
    ended = [jobset(terminalState="Failed"), jobset(terminalState="Completed")]
    assert launch([*ended, pod(code=0)]) == 0
    assert launch.fakes.calls("kubectl delete") and launch.fakes.calls("kubectl apply")


def test_the_end_of_the_launcher_deletes_the_jobset_and_the_run_saves(launch):
    def send():
        while len(launch.fakes.calls("kubectl get pods")) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    assert launch([NONE, jobset(), pod()]) == 42
    assert launch.fakes.calls("kubectl delete") == [
        ["kubectl", "delete", "jobset", NAME, "--ignore-not-found"]
    ]


def test_mistakes_on_the_command_line(launch):
    assert "give either --tpu" in refused(launch, [], "--image", "i")
    assert "AxB or AxBxC" in refused(launch, [], *TPU[:4], "--topology", "16")
    said = refused(launch, [], *TPU[:4], "--topology", "2x3")
    assert "has 6 chips, which machines of 4 do not make up" in said
    local = ("--", "--config=a", "--workdir=/runs/x")
    assert "give gs://BUCKET/DIR" in refused(launch, [], *TPU, flags=local)
    assert "below --claim" in refused(launch, [], *TPU, "--claim", "c:/run", flags=local)
    replies = [NONE, jobset(terminalState="Completed"), pod(code=0)]
    assert launch(replies, *TPU, "--claim", "c:/runs", flags=local) == 0
    (launch.fakes.bin / "kubectl").unlink()
    assert "no `kubectl` on PATH" in refused(launch, [])
