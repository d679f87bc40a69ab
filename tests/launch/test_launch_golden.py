"""What the launchers print with --dry-run, line by line: tests/golden/launch/NAME.txt.

It is what they run: golden texts are changed on purpose only.  All flags of other programs in them
are known to the real ones (`known_flags.json`).
"""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]

GOLDEN = ROOT / "tests" / "golden" / "launch"
CONFIG = "--config=configs/dcae_f32c32.py:phase1"
BUCKET = ["--", CONFIG, "--workdir=gs://my-bucket/f32c32"]
SHARED = ["--", CONFIG, "--workdir=/shared/runs/f32c32", "--config.optim.lr=2e-4"]
CASES = {
    "local_cpu": ["local", "--processes", "2", "--platform", "cpu", "--devices-per-process",
                  "4", "--port", "29501", "--", "--config=configs/demo.py:phase1",
                  "--workdir=runs/two words"],
    "local_gpu": ["local", "--processes", "2", "--platform", "gpu", "--port", "29501", *SHARED],
    "local_one": ["local", "--", "--config=configs/demo.py:phase1", "--workdir=runs/one"],
    "slurm_process_per_gpu": ["slurm", "--nodes", "2", "--gpus-per-node", "8", "--time", "24:00:00",
                              "--partition", "gpu", "--account", "me", "--cpus-per-process", "12",
                              "--setup", "module load cuda", "--sbatch=--constraint=h100", *SHARED],
    "slurm_process_per_node": ["slurm", "--nodes", "4", "--gpus-per-node", "4", "--process-per",
                               "node", "--port", "29501", "--name", "f32", *BUCKET],
    "slurm_one_gpu": ["slurm", "--gpus-per-node", "1", "--no-wait", *SHARED],
    "slurm_cpu": ["slurm", "--platform", "cpu", "--processes-per-node", "2", *SHARED],
    "tpu_vm": ["tpu_vm", "--name", "sana", "--zone", "us-west4-a", "--type", "v5litepod-16",
               "--spot", "--project", "mine", *BUCKET],
    "tpu_vm_queued": ["tpu_vm", "--name", "sana", "--zone", "us-central2-b", "--type", "v4-32",
                      "--queue", "--delete", "--create=--network=mine", *BUCKET],
    "gke_tpu": ["gke", "--image", "us-docker.pkg.dev/p/r/dcae_jax:tpu", "--tpu",
                "tpu-v5-lite-podslice", "--topology", "4x4", "--slices", "2", "--spot", *BUCKET],
    "gke_gpu": ["gke", "--image", "us-docker.pkg.dev/p/r/dcae_jax:cuda", "--gpu",
                "nvidia-h100-80gb", "--nodes", "2", "--namespace", "training", "--claim",
                "runs:/runs", "--", CONFIG, "--workdir=/runs/f32c32"],
}  # fmt: skip


def dry_run(name, *, python="python"):
    """Output of the launcher, made the same on every machine."""
    launcher, *words = CASES[name]
    given = ["--python", python] if launcher in ("local", "slurm") else []
    env = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    done = subprocess.run(
        [sys.executable, f"launch/{launcher}.py", "--dry-run", *given, *words],
        cwd=ROOT, capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(ROOT), "REPOSITORY")


@pytest.mark.parametrize("name", CASES)
def test_what_a_launcher_would_run_is_what_it_was(name):
    text = dry_run(name)
    file = GOLDEN / f"{name}.txt"
    if not file.exists() or file.read_text() != text:
        new = file.with_suffix(".new")
        new.write_text(text)
        pytest.fail(f"compare {new} with {file}. If it is meant: mv {new} {file}")


def test_every_golden_text_has_a_case():
    assert {p.stem for p in GOLDEN.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("slurm", "tpu"))])
def test_scripts_are_right_for_the_shell(name):
    """`bash -n` reads the whole text, and again the parts that another shell gets."""
    text = (GOLDEN / f"{name}.txt").read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    inner = re.findall(r"^process=\$\(.*cat <<'END'\n(.*?)^END", text, re.S | re.M)
    inner += [w.partition("=")[2] for w in shlex.split(text, comments=True) if "--command=" in w]
    assert inner
    for part in inner:
        subprocess.run(["bash", "-n"], input=part, text=True, check=True)


def test_known_flags_are_those_of_the_real_commands():
    """Where a real command is installed; the file says of which version it was made."""
    import shutil

    import make_known_flags as maker

    known = json.loads((HERE / "known_flags.json").read_text())["flags"]
    assert {k.split()[0] for k in known} >= {"gcloud", "kubectl", *maker.SLURM}
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here")
    assert set(maker.flags(maker.output("kubectl", "logs", "--help"))) <= set(known["kubectl logs"])


def test_every_launcher_has_help():
    for path in sorted(pathlib.Path(ROOT / "launch").glob("*.py")):
        if path.stem not in ("common", "xla_flags", "sweep"):
            done = subprocess.run(
                [sys.executable, str(path), "--help"], capture_output=True, text=True, check=True
            )
            assert "--dry-run" in done.stdout and "--max-restarts" in done.stdout
            assert f"  python launch/{path.name} " in done.stdout  # as it can be typed
            # JobSet counts restarts alone; what does nothing is not offered.
            assert ("--max-failures" in done.stdout) == (path.stem != "gke")
