"""Runs main.py on a GKE cluster as a JobSet: writes the manifest, applies it, follows process 0.

  python launch/gke.py --image IMAGE --tpu KIND --topology T [OPTIONS] -- --config=FILE:ARG --workdir=gs://B/D
  python launch/gke.py --image us-docker.pkg.dev/p/r/dcae_jax:tpu --tpu tpu-v5-lite-podslice \\
      --topology 4x4 --slices 2 -- --config=configs/dcae_f32c32.py:phase1 --workdir=gs://b/f32c32
  python launch/gke.py --image us-docker.pkg.dev/p/r/dcae_jax:cuda --gpu nvidia-h100-80gb \\
      --nodes 2 -- --config=configs/dcae_f32c32.py:phase1 --workdir=gs://b/f32c32

The image is that of launch/Dockerfile.  The cluster needs JobSet (0.6 or newer).  JobSet starts all
pods again when one is gone or ends with 42 or 43; 1 and 2 end it.  SIGTERM and Ctrl-C delete the
JobSet: the run saves.  Not yet run on a real cluster.
"""

import argparse
import json
import math
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import common
import xla_flags
from common import LaunchError, say

POLL = 5  # seconds between looks
PORT = 8476  # of process 0; every pod has an address of its own
SAVE_SECONDS = 120  # from SIGTERM to the end; spot machines give less

CREDENTIALS = "`gcloud container clusters get-credentials CLUSTER --location=L`"
NO_IMAGE = "the nodes cannot pull --image: is its name right, may the nodes read it?"
INDEX = "batch.kubernetes.io/job-completion-index"
MENDS = (
    ("no matches for kind \"jobset\"", "the cluster has no JobSet: `kubectl apply --server-side -f "
     "https://github.com/kubernetes-sigs/jobset/releases/latest/download/manifests.yaml`"),
    ("the server doesn't have a resource type \"jobset", "the cluster has no JobSet: see "
     "jobset.sigs.k8s.io/docs/installation"),
    ("current-context is not set", f"{CREDENTIALS} tells kubectl of your cluster"),
    ("was refused", f"{CREDENTIALS} tells kubectl of your cluster; is it running?"),
    ("unable to connect to the server", "is the cluster there, and may this machine reach it?"),
    ("gke-gcloud-auth-plugin", "`gcloud components install gke-gcloud-auth-plugin`"),
    ("must be logged in", f"`gcloud auth login`, then {CREDENTIALS}"),
    ("exceeded quota", "the namespace's quota is used up: `kubectl describe quota` shows it"),
    ("forbidden", "your account lacks rights in this namespace; --namespace chooses another"),
    ("namespaces \"", "`kubectl get namespaces` lists them; --namespace"),
)  # fmt: skip
# Why a pod does not start, in Kubernetes' words.
WAITING = (
    ("errimagepull", NO_IMAGE),
    ("imagepullbackoff", NO_IMAGE),
    ("insufficient google.com/tpu", "no free TPU of this kind and topology: wait, or make a node "
     "pool; `kubectl get nodes -L cloud.google.com/gke-tpu-topology` shows what there is"),
    ("insufficient nvidia.com/gpu", "no free GPUs: wait, or enlarge the node pool"),
    ("affinity/selector", "no node has this kind and topology (yet): `kubectl get nodes "
     "-L cloud.google.com/gke-tpu-accelerator,cloud.google.com/gke-tpu-topology,"
     "cloud.google.com/gke-accelerator` shows what there is"),
    ("out of quota", "quota of the project: console.cloud.google.com/iam-admin/quotas"),
)  # fmt: skip


def options(argv: Sequence[str]) -> argparse.Namespace:
    """The options in front of `--`."""
    p = common.parser(__doc__ or "", max_failures=False)  # JobSet counts restarts alone
    p.add_argument("--image", required=True, help="image of launch/Dockerfile in a registry")
    p.add_argument("--tpu", metavar="KIND", help="label gke-tpu-accelerator, tpu-v6e-slice, ...")
    p.add_argument("--topology", metavar="AxB", help="label gke-tpu-topology of a slice, e.g. 4x4")
    p.add_argument("--slices", type=common.whole(1), default=1, help="TPU slices (1)")
    p.add_argument(
        "--chips-per-node", type=common.whole(1), default=4, help="TPU chips of a machine (4)"
    )
    p.add_argument("--gpu", metavar="KIND", help="label gke-accelerator, e.g. nvidia-h100-80gb")
    p.add_argument("--nodes", type=common.whole(1), default=1, help="machines with GPUs (1)")
    p.add_argument("--gpus-per-node", type=common.whole(1), default=8, help="GPUs of a machine (8)")
    p.add_argument("--spot", action="store_true", help="spot machines")
    p.add_argument("--name", help="name of the JobSet (from the workdir)")
    p.add_argument("--namespace", help="namespace (kubectl's default)")
    p.add_argument("--service-account", help="Kubernetes account that may use the bucket")
    p.add_argument("--claim", metavar="NAME:/PATH", help="mounts a PersistentVolumeClaim at a path")
    p.add_argument("--manifest", default="runs/gke", help="folder of the manifest (runs/gke)")
    return p.parse_args(argv)


def check(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """What can be seen to be wrong without a cluster."""
    common.require_flags(flags)
    if bool(args.tpu) == bool(args.gpu):
        raise LaunchError("give either --tpu KIND --topology AxB or --gpu KIND --gpus-per-node G")
    if args.tpu and not re.fullmatch(r"\d+(x\d+)+", args.topology or ""):
        raise LaunchError(f"--topology {args.topology} of a slice is AxB or AxBxC, e.g. 4x4")
    if args.tpu and chips(args) > args.chips_per_node and chips(args) % args.chips_per_node:
        raise LaunchError(
            f"a slice of {args.topology} has {chips(args)} chips, which machines of "
            f"{args.chips_per_node} do not make up; mend --topology or --chips-per-node"
        )
    if args.tpu and not chips(args):
        raise LaunchError(f"--topology {args.topology} has no chips")
    if args.name is not None and not re.fullmatch(r"[a-z]([-a-z0-9]{,38}[a-z0-9])?", args.name):
        raise LaunchError(
            f"--name {args.name!r} is no name of Kubernetes: at most 40 of a-z, 0-9 and -, a "
            "letter first and no - last"
        )
    if args.claim and not re.fullmatch(r"[^:/]+:/[^:]+", args.claim):
        raise LaunchError(f"--claim {args.claim} is not NAME:/PATH, e.g. runs:/runs")
    workdir = common.flag(flags, "workdir")
    folder = args.claim.partition(":")[2].rstrip("/") if args.claim else None
    mounted = folder and str(workdir).startswith(folder + "/")
    if common.is_local(workdir) and not mounted:
        raise LaunchError(
            f"--workdir={workdir} is a folder of the pod: it goes with it, and every pod has its "
            "own; give gs://BUCKET/DIR, or a folder below --claim NAME:/PATH"
        )


def chips(args: argparse.Namespace) -> int:
    """TPU chips of one slice."""
    return math.prod(int(n) for n in args.topology.split("x"))


def machines(args: argparse.Namespace) -> int:
    """Pods of each slice, or of the whole GPU job."""
    return args.nodes if args.gpu else max(chips(args) // args.chips_per_node, 1)


def devices(args: argparse.Namespace) -> int:
    """jax devices of all pods: a chip is one."""
    return args.nodes * args.gpus_per_node if args.gpu else args.slices * chips(args)


def name_of(args: argparse.Namespace, flags: Sequence[str]) -> str:
    """The given name, or one of the workdir; Kubernetes allows a-z, 0-9 and -, 40 leave room."""
    workdir = common.flag(flags, "workdir") or "run"
    made = re.sub(r"[^a-z0-9]+", "-", workdir.split("://")[-1].lower())[-40:].strip("-")
    return args.name or f"d-{made}"[:40].strip("-")


def manifest(args: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """The JobSet: one Job for each slice (one in all for GPUs), one pod for each machine."""
    name, count = name_of(args, flags), machines(args)
    job = {
        "parallelism": count, "completions": count, "backoffLimit": 0,
        # Failures and wrong usage end the JobSet; all else (42, 43, a lost machine) restarts it.
        "podFailurePolicy": {"rules": [{
            "action": "FailJob",
            "onExitCodes": {"containerName": "main", "operator": "In", "values": [1, 2]},
        }]},
        "template": {"spec": pod(args, flags, name)},
    }  # fmt: skip
    metadata: dict[str, Any] = {"name": name}
    if args.namespace:
        metadata["namespace"] = args.namespace
    if args.tpu:
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": args.max_restarts,
                "restartStrategy": "BlockingRecreate",
                "rules": [{"name": "failed", "action": "FailJobSet",
                           "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {"name": "job", "replicas": args.slices if args.tpu else 1,
                 "template": {"spec": job}}
            ],
        },
    }  # fmt: skip


def pod(args: argparse.Namespace, flags: Sequence[str], name: str) -> dict[str, Any]:
    """What each machine runs."""
    accelerator = "google.com/tpu" if args.tpu else "nvidia.com/gpu"
    amount = min(args.chips_per_node, chips(args)) if args.tpu else args.gpus_per_node
    container: dict[str, Any] = {
        "name": "main",
        "image": args.image,
        "command": ["python", "main.py", *common.main_flags(flags, devices(args))],
        "env": environment(args, name),
        "resources": {"limits": {accelerator: amount}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SAVE_SECONDS,
        "nodeSelector": selector(args),
        "containers": [container],
        # NCCL and the workers that load data share memory there; a pod's default is 64 MiB.
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if args.service_account:
        spec["serviceAccountName"] = args.service_account
    if args.claim:
        claim, _, path = args.claim.partition(":")
        container["volumeMounts"].append({"name": "runs", "mountPath": path})
        spec["volumes"].append({"name": "runs", "persistentVolumeClaim": {"claimName": claim}})
    return spec


def selector(args: argparse.Namespace) -> dict[str, str]:
    """Labels of the machines."""
    if args.tpu:
        found = {"gke-tpu-accelerator": args.tpu, "gke-tpu-topology": args.topology}
    else:
        found = {"gke-accelerator": args.gpu}
    found |= {"gke-spot": "true"} if args.spot else {}
    return {f"cloud.google.com/{k}": v for k, v in found.items()}


def environment(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Variables of a pod.  TPU pods get their neighbours' names from GKE, GPU pods from here."""
    platform = "tpu" if args.tpu else "gpu"
    env = xla_flags.passed_on(platform, nodes=machines(args), slices=args.slices)
    env["PYTHONUNBUFFERED"] = "1"
    if args.gpu and args.nodes > 1:
        env |= {
            "JAX_COORDINATOR_ADDRESS": f"{name}-job-0-0.{name}:{PORT}",
            "JAX_NUM_PROCESSES": str(args.nodes),
        }
    found: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in env.items()]
    if args.gpu and args.nodes > 1:
        path = f"metadata.annotations['{INDEX}']"
        index = {"fieldRef": {"fieldPath": path}}
        found.append({"name": "JAX_PROCESS_ID", "valueFrom": index})
    return found


# ----------------------------------------------------------------------------------------- running


class Cluster:
    """kubectl for one JobSet."""

    def __init__(self, name: str, namespace: str | None) -> None:
        self.name = name
        self._where = [f"--namespace={namespace}"] if namespace else []

    def kubectl(self, *words: str) -> list[str]:
        """The command."""
        return ["kubectl", *words, *self._where]

    def ask(self, *words: str) -> str:
        """Its output, or the message of its failure."""
        done = common.capture(self.kubectl(*words))
        if done.returncode:
            raise LaunchError(common.explain(f"kubectl {words[0]}", done.stderr, MENDS))
        return done.stdout

    def status(self) -> dict[str, Any] | None:
        """Status of the JobSet; None if there is none of that name."""
        text = self.ask("get", "jobset", self.name, "--ignore-not-found", "--output=json")
        return (json.loads(text).get("status") or {}) if text.strip() else None

    def first_pod(self) -> dict[str, Any] | None:
        """The pod of process 0, the newest if there are two; None before it is there."""
        labels = ("jobset.sigs.k8s.io/jobset-name=" + self.name,
                  "jobset.sigs.k8s.io/job-index=0", INDEX + "=0")  # fmt: skip
        found = json.loads(
            self.ask("get", "pods", "--selector=" + ",".join(labels), "--output=json")
        )
        pods = sorted(found["items"], key=lambda p: p["metadata"]["creationTimestamp"])
        return pods[-1] if pods else None

    def delete(self) -> None:
        """Ends the JobSet: SIGTERM to all pods."""
        self.ask("delete", "jobset", self.name, "--ignore-not-found")


def why_waiting(pod: dict[str, Any]) -> str:
    """What keeps a pod from starting, in Kubernetes' words; "" if nothing is told."""
    containers = pod["status"].get("containerStatuses", [])
    waiting = [c["state"]["waiting"] for c in containers if "waiting" in c["state"]]
    told = [f"{w.get('reason')}: {w.get('message', '')}" for w in waiting]
    conditions = pod["status"].get("conditions", [])
    told += [c["message"] for c in conditions if c["status"] == "False" and c.get("message")]
    return told[0] if told else ""


def ended_with(pod: dict[str, Any] | None, before: int) -> int:
    """Exit code of a pod that has ended; `before` where it has not."""
    for c in pod["status"].get("containerStatuses", []) if pod else []:
        if "terminated" in c["state"]:
            return c["state"]["terminated"]["exitCode"]
    return before


def follow(cluster: Cluster, stopping: threading.Event) -> int:
    """Shows the output of process 0 through all restarts; the exit code of the job."""
    shown, told, restarts, code = "", "", 0, 1
    while not stopping.is_set():
        pod, status = cluster.first_pod(), cluster.status()
        if status is None:
            raise LaunchError(f"the JobSet {cluster.name} was deleted by somebody else")
        code = ended_with(pod, code)
        if status.get("restarts", 0) > restarts:
            restarts = status["restarts"]
            say(f"restart {restarts}: process 0 had ended with exit code {code}")
        if pod and is_pending(pod):
            told = tell_waiting(pod, told)
        elif pod and pod["metadata"]["uid"] != shown:
            shown = pod["metadata"]["uid"]
            say(f"output of {pod['metadata']['name']}")
            logs = cluster.kubectl("logs", "--follow", pod["metadata"]["name"])
            subprocess.run(logs, check=False, start_new_session=True)
            code = ended_with(cluster.first_pod(), code)
        if state := status.get("terminalState"):
            say(f"JobSet {cluster.name}: {state}")
            return 0 if state == "Completed" else code or 1
        stopping.wait(POLL)
    return common.EXIT_PREEMPTED


def is_pending(pod: dict[str, Any]) -> bool:
    """Whether a pod has not started yet."""
    return pod["status"].get("phase") == "Pending"


def tell_waiting(pod: dict[str, Any], told: str) -> str:
    """Says once why a pod does not start, with what to do; what was told last."""
    why = why_waiting(pod)
    if why and why != told:
        mends = [mend for text, mend in WAITING if text in why.lower()]
        say(f"waiting: {why}" + (f"\n  -> {mends[0]}" if mends else ""))
    return why or told


def main(argv: list[str]) -> int:
    """Writes, applies, follows."""
    own, flags = common.split(argv)
    args = options(own)
    check(args, flags)
    name = name_of(args, flags)
    path = pathlib.Path(args.manifest, f"{name}.json")
    text = json.dumps(manifest(args, flags), indent=2)
    cluster = Cluster(name, args.namespace)
    apply = cluster.kubectl("apply", f"--filename={path}")
    print(f"# {path}\n{text}\n\n{common.shell(apply)}", flush=True)
    if args.dry_run:
        return 0
    common.require_program(
        "kubectl", f"install it (kubernetes.io/docs/tasks/tools), then {CREDENTIALS}"
    )
    before = cluster.status()
    if before is not None and not before.get("terminalState"):
        raise LaunchError(
            f"a JobSet {name} runs already; `kubectl delete jobset {name}` ends it, saved, or give "
            "another --name"
        )
    if before is not None:
        say(f"the JobSet {name} has ended ({before['terminalState']}): deleted, then made anew")
        cluster.delete()
    common.write(path, text, "--manifest")
    sys.stdout.write(cluster.ask("apply", f"--filename={path}"))
    stopping = threading.Event()

    def stop() -> None:
        stopping.set()
        say(f"deleting the JobSet {name}: the run saves")
        cluster.delete()

    with common.on_signals(stop):
        code = follow(cluster, stopping)
    say(f"the job ended with exit code {code}")
    return code


if __name__ == "__main__":
    common.run(main)
