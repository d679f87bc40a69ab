"""A config without jax for tests of sweeps: `fake_main.py` is its program."""

import dataclasses
import os

from dcae_jax.config import RunConfig


@dataclasses.dataclass(slots=True)
class FakeTask:
    """What the fake program is to do."""

    seconds: float = 0.0  # of a run
    exits: tuple[int, ...] = ()  # exit codes of the first starts; the later ones train
    quality: float = 1.0

    def resolve(self, cfg):
        pass

    def run_problems(self, cfg):
        return [f"task.quality = {self.quality} is above 100"] if self.quality > 100 else []


@dataclasses.dataclass(slots=True)
class FakeScores:
    """An evaluator's config, as far as a sweep looks."""

    name: str = "held-out"

    def resolve(self, cfg):
        pass

    def metrics(self):
        return ["psnr", "oddness"]


def get_config(arg: str = "") -> RunConfig:
    return RunConfig(
        name=f"fake {arg}".strip(), steps=10, batch=8, task=FakeTask(), evals=[FakeScores()]
    )


def sweep():
    yield from ({"task.quality": q} for q in (1.0, 2.0, 3.0))


def sweep_lr():
    yield from ({"optim.lr": lr} for lr in (1e-4, 3e-4, 1e-3))


def sweep_seed():
    for seed in range(int(os.environ.get("FAKE_SEEDS", "4"))):
        yield {"seed": seed}


def sweep_exits():
    """Good, preempted, without a process, failed, killed, killed for ever, or after a step each."""
    for exits in ((), (42, 42), (43,), (1,), (-9,), (-9, -9, -9, -9), (-15,), (1043,) * 5):
        yield {"task.exits": exits}


def sweep_rate():
    yield {"optim.lr": 0.1}


def sweep_nothing():
    yield from ()


def search(trial):
    """Its later trials are bad and slow, where the environment says so."""
    bad = trial.number >= int(os.environ.get("FAKE_BAD_FROM", "1000"))
    quality = trial.suggest_float("quality", 0.0, 4.0)
    return {"task.quality": -quality if bad else quality, "task.seconds": 60.0 if bad else 0.0}
