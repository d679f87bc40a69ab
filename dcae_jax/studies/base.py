"""What studies share: one folder for one study, arms that go on after a preemption, provenance."""

import functools
import json
from typing import Any

import jax
from etils import epath

from dcae_jax import config as config_lib
from dcae_jax import distributed, provenance, train
from dcae_jax.config import RunConfig
from dcae_jax.errors import UserError

QUICK = "A trial of the command (--quick): these numbers mean nothing."


def claim(out: epath.Path, settings: Any) -> None:
    """Writes the settings into a new folder; UserError if it holds a study of other settings."""
    path, wanted = out / "settings.json", config_lib.to_json(settings)
    if path.exists():
        if json.loads(path.read_text()) != wanted:
            raise UserError(f"{out} holds a study with other settings; give another --out")
    elif distributed.is_main():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=2))


def train_arm(cfg: RunConfig, workdir: epath.Path, preemption: distributed.Preemption) -> None:
    """Trains, resumes, or finds finished; raises Preempted when asked to stop, with all saved."""
    preemption.check()
    if train.train(cfg, str(workdir), preemption) == distributed.EXIT_PREEMPTED:
        raise distributed.Preempted


@functools.cache
def provenance_record() -> dict[str, Any]:
    """What the numbers were made with."""
    device = jax.devices()[0].device_kind
    return {"commit": provenance.commit(), "versions": provenance.versions(), "device": device}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
