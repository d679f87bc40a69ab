"""The evaluator of labels: its scores against numpy, exact counts, mistakes."""

import jax
import jax.numpy as jnp
import latent_caches
import masks
import numpy as np
import pytest

from dcae_jax import sharding, step
from dcae_jax.config import MeshConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.accuracy import AccuracyConfig
from dcae_jax.tasks.base import Variables

CLASSES, N = 7, 23
VALUES = np.random.default_rng(0).normal(size=(N, 4, 4, 4)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, CLASSES, N)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    where = tmp_path_factory.mktemp("accuracy")
    for split in ("train", "test"):
        latent_caches.write(where, split, VALUES, LABELS, classes=CLASSES)
    return str(where)


def evaluator(root, devices=1, classes=CLASSES, **fields):
    cfg = masks.probe(cached=False, evals=[], **{"data.path": root, "task.classes": classes})
    task = cfg.task.build(cfg)
    task.predict = lambda variables, batch: logits(batch["latent"])
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    made = AccuracyConfig(**{"data": LatentDataConfig(split="test"), "n": N, "batch": 4, **fields})
    made.resolve(cfg)
    assert made.problems() == []
    return made.build(cfg, task, mesh), mesh


def logits(latent):
    """What a network could say: its classes are pixels of the first rows."""
    return latent.reshape(latent.shape[0], -1)[:, :CLASSES] * 2


def scores(*args, **fields):
    found, mesh = evaluator(*args, **fields)
    state = step.TrainState(jnp.int32(0), {}, {}, {"0.9": {"params": {}, "stats": {}}}, {})
    with jax.set_mesh(mesh):
        return found.run(state, {}, lambda: None).scalars


def expected(n):
    """By sorting, in float64; the evaluation spreads n of N evenly."""
    rows = np.arange(n) * N // n
    said, label = logits(VALUES[rows].astype(np.float64)), LABELS[rows]
    ranked = np.argsort(-said, axis=1)
    surprise = np.log(np.exp(said).sum(1)) - said[np.arange(n), label]
    return {
        "top1": np.mean(ranked[:, 0] == label), "cross_entropy": surprise.mean(), "n": n,
        "top5": np.mean([y in row[:5] for y, row in zip(label, ranked, strict=True)]),
    }  # fmt: skip


@pytest.mark.parametrize(("n", "batch", "devices"), [(N, 4, 1), (N, 4, 8), (10, 64, 2)])
def test_scores_are_those_of_numpy_on_exactly_n(root, n, batch, devices):
    found = scores(root, n=n, batch=batch, devices=devices)
    want = expected(n)
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name  # sums of float32


def test_neither_ties_nor_nan_are_right(root):
    found, _ = evaluator(root)
    batch = {"label": jnp.array([0, 1, 2, 2]), "mask": jnp.array([1.0, 1.0, 1.0, 0.0])}
    said = np.zeros((4, CLASSES), np.float32)
    said[1], said[2, 2], said[3] = np.nan, 1.0, np.nan
    found._task.predict = lambda variables, batch: jnp.asarray(said)
    top1, top5, surprise, n = found._sums(Variables({}, {}, {}), batch)
    # One is right, one ties with six, one is no number; what pads the batch does not count.
    assert (top1, top5, n) == (1, 1, 3) and np.isnan(surprise)


def test_the_names_follow_the_number_of_classes(root):
    assert evaluator(root)[0].cfg.metrics() == ("top1", "top5", "cross_entropy", "n")
    assert masks.probe(cached=False).evals[0].metrics() == ("top1", "cross_entropy", "n")
    assert masks.probe(cached=False).evals[0].name == "accuracy-test"


def test_mistakes_are_named(root):
    with pytest.raises(UserError, match=r"of accuracy-test of this run are of 7 classes, but task"):
        evaluator(root, classes=5)
    cfg = masks.make(cached=False, evals=[])
    made = AccuracyConfig(name="a")
    with pytest.raises(UserError, match="asks for labels, and the task of this run knows none"):
        made.build(cfg, cfg.task.build(cfg), sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    assert len(AccuracyConfig(name="a", top=(0,), n=0).problems()) == 2
