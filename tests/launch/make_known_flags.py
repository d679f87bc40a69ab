"""Writes known_flags.json, the flags that the fakes accept, from the help of the real commands.

python tests/launch/make_known_flags.py    # needs gcloud, kubectl and Slurm's commands
"""

import json
import os
import pathlib
import re
import subprocess

FILE = pathlib.Path(__file__).with_name("known_flags.json")
GCLOUD = (
    "auth list", "config get", "compute tpus tpu-vm describe", "compute tpus tpu-vm create",
    "compute tpus tpu-vm delete", "compute tpus tpu-vm ssh", "compute tpus tpu-vm scp",
    "compute tpus queued-resources describe", "compute tpus queued-resources create",
    "compute tpus queued-resources delete",
)  # fmt: skip
KUBECTL = ("apply", "get", "logs", "delete")
SLURM = ("sbatch", "srun", "scontrol", "scancel")


def output(*command: str, **env: str) -> str:
    """What a command prints, without the escapes of bold text."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


def flags(text: str) -> list[str]:
    """All --flags that a text names."""
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)))


def main() -> None:
    found = {f"gcloud {c}": flags(output("gcloud", *c.split(), "--help")) for c in GCLOUD}
    everywhere = flags(output("kubectl", "options"))
    for c in KUBECTL:
        found[f"kubectl {c}"] = sorted({*flags(output("kubectl", c, "--help")), *everywhere})
    for c in SLURM:  # their --help leaves some out
        found[c] = flags(output("man", c, PAGER="cat", MANPAGER="cat", MAN_KEEP_FORMATTING=""))
    versions = {
        "gcloud": output("gcloud", "--version").splitlines()[0],
        "kubectl": output("kubectl", "version", "--client").splitlines()[0],
        "slurm": output("dpkg-query", "--show", "slurm-client").strip(),
    }
    assert all(found.values()), [k for k, v in found.items() if not v]
    FILE.write_text(json.dumps({"versions": versions, "flags": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
