"""Scores of samples during training: against plain numpy, on devices, in a run, bad requests.

A made-up decoder stands for the autoencoder, whose programs take most of the time; one slow test
has a real one.
"""

import dataclasses
import functools
import itertools
import json
import types

import diffusing
import frozen_nets
import jax
import jax.numpy as jnp
import latent_caches
import numpy as np
import pytest
import runs
import scipy.spatial.distance

from dcae_jax import config, sharding, train
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.diffusion.samplers import EulerConfig
from dcae_jax.errors import UserError
from dcae_jax.evals import frechet, generate, kid, npz, protocol, reference
from dcae_jax.evals.extract import Extractor
from dcae_jax.evals.feature_scores import FeatureScores
from dcae_jax.evals.sample_scores import Held, SampleScoresConfig, Score
from dcae_jax.report import images as pictures
from dcae_jax.step import TrainState

N, HELD_OUT = 21, 16  # in batches of four: the last ones are filled up
# Without sFID: the roots of its covariances, 2023 x 2023, take seconds.
ALL = (Score.fid, Score.inception, Score.precision, Score.recall)


@dataclasses.dataclass
class Enlarged:
    """As an autoencoder f4: the first three channels of latents, each number as 4 x 4 pixels."""

    cfg = types.SimpleNamespace(factor=4)

    def decode(self, latents):
        return jnp.repeat(jnp.repeat(latents[..., :3], 4, axis=1), 4, axis=2)


@functools.cache
def made_up():
    """Sixteen latents of cats and dogs in either split, of nobody's encoder."""
    gen, root = np.random.default_rng(0), diffusing.root() / "made-up"
    for split in ("train", "test"):
        values = gen.normal(size=(16, 4, 4, 4)).astype(np.float32)
        latent_caches.write(root, split, values, np.repeat([0, 1], 8))
    return root


@pytest.fixture(autouse=True, scope="module")
def without_an_autoencoder():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusing, "cache", made_up)
        patch.setattr(generate, "decoder", lambda *args: Enlarged())
        yield patch


def make(**changes):
    """A tiny diffusion run with this evaluator alone."""
    values = {"scores": ALL, "n": N, "held_out": HELD_OUT, "batch": 4, "pictures": 2} | changes
    scores = SampleScoresConfig(
        data=LatentDataConfig(split="test", threads=1), sampler=EulerConfig(steps=2),
        nets=str(frozen_nets.folder()), **values,
    )  # fmt: skip
    return diffusing.make(evals=[scores])


def build(cfg, devices=1):
    """(the evaluator, a state of random weights, constants)."""
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:devices])
    task = cfg.task.build(cfg)
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    gen = np.random.default_rng(3)
    params = jax.tree.map(lambda x: 0.2 * gen.normal(size=x.shape).astype(x.dtype), shapes)
    ema = {"0.9": {"params": params, "stats": {}}}
    state = TrainState(step=jnp.int32(7), params={}, stats={}, ema=ema, opt={})
    placed = jax.device_put((state, task.constants(training=False)), sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        return cfg.evals[0].build(cfg, task, mesh), *placed


def run(made, state, constants, polls=None):
    with jax.set_mesh(made._mesh):
        return made.run(state, constants, lambda: polls.append(1) if polls is not None else None)


@pytest.fixture(scope="module")
def scored():
    """(report, features of each batch, rows of the grid, polls) on one device."""
    seen, rows, polls, features, grid = [], [], [], Extractor.features, pictures.grid

    def watched(self, images, wanted=None):
        found = features(self, images, wanted)
        seen.append({name: np.asarray(x) for name, x in found.items()})
        return found

    def shown(cells, **texts):
        rows.append((cells, texts))
        return grid(cells, **texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "features", watched)
        patch.setattr(pictures, "grid", shown)
        report = run(*build(make()), polls)
    return report, seen, rows, polls


def fid(a, b):
    """The Fréchet distance by the centred rows themselves: no covariance, no root of a matrix."""
    x, y = ((v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (a, b))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.sum(x**2) + np.sum(y**2) - 2 * root


def inception_scores(logits):
    """Of each split."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True))[np.random.RandomState(2020).permutation(len(p))]
    edges = [i * len(p) // 10 for i in range(11)]
    parts = [p[a:b] for a, b in itertools.pairwise(edges)]
    return [np.exp(np.mean(np.sum(q * np.log(q / q.mean(0)), 1))) for q in parts]


def share_inside(points, centres):
    """Of points within the distance of a centre to its third neighbour."""
    own = np.sort(scipy.spatial.distance.cdist(centres, centres), axis=1)[:, 3]
    return (scipy.spatial.distance.cdist(points, centres) <= own).any(axis=1).mean()


def test_scores_against_plain_numpy(scored):
    report, seen, _, polls = scored
    assert len(polls) == 4 + 6, "one poll for each batch"
    parts, theirs = seen[4:], seen[:4]
    assert not any("logits" in part for part in theirs), "what nobody asks for is not computed"
    mine, theirs = (
        {k: np.concatenate([p[k] for p in some])[:n].astype(np.float64) for k in some[0]}
        for some, n in ((parts, N), (theirs, HELD_OUT))
    )
    assert mine["pool"].shape == (N, 128) and "spatial" not in mine
    expected = {
        "fid21": fid(mine["pool"], theirs["pool"]),
        "is21": np.mean(inception_scores(mine["logits"])),
        "is21_error": np.std(inception_scores(mine["logits"])),
        "precision21": share_inside(mine["pool"], theirs["pool"]),
        "recall21": share_inside(theirs["pool"], mine["pool"]), "n": N,
    }  # fmt: skip
    assert (*report.scalars,) == (*make().evals[0].metrics()[:-1], "is21_error", "n")
    # Sums of squares of covariances: 1e-16 of traces of a few hundred features.
    assert report.scalars == pytest.approx(expected, rel=1e-6)
    assert expected["fid21"] > 0 and expected["is21"] > 1


def test_the_grid_is_of_the_same_samples(scored):
    report, _, rows, _ = scored
    ((cells, texts),) = rows
    assert [len(row) for row in cells] == [2, 2] and texts["labels"] == ["class 0", "class 1"]
    assert "samples-decoded-test, step 7: FID of 21" in texts["caption"]
    assert report.images.keys() == {"samples-decoded-test"}
    assert len({image.tobytes() for row in cells for image in row}) == 4


def test_eight_devices_score_what_one_does(scored):
    found = run(*build(make(pictures=0, scores=(Score.fid, Score.inception)), devices=8))
    assert found.images == {}
    expected = {k: v for k, v in scored[0].scalars.items() if k in found.scalars}
    assert expected.keys() == {"fid21", "is21", "is21_error", "n"} == found.scalars.keys()
    # Another program decodes: of few levels some fall to the other side of a half.
    assert found.scalars == pytest.approx(expected, rel=2e-3)


def test_samples_that_are_not_finite_are_not_scored():
    made, state, constants = build(make(scores=(Score.fid,)))
    broken = jax.tree.map(lambda x: x * jnp.nan, state)
    found = run(made, broken, constants)
    assert np.isnan(found.scalars["fid21"]) and found.scalars["n"] == N and not found.images


def test_sfid_of_known_features():
    x, y = np.random.default_rng(0).normal(size=(2, 9, 5))
    made = FeatureScores(
        Held({"spatial": x}, {}), Held({"spatial": y}, {}), protocol.PRESETS["dcae"]
    )
    assert made.score("sfid").value == pytest.approx(fid(x, y), rel=1e-9)


def test_kid_of_known_features(monkeypatch):
    """A thousand of each are drawn whole, in another order each time: two times will do."""
    monkeypatch.setattr(kid, "kid", functools.partial(kid.kid, subsets=2))
    gen = np.random.default_rng(0)
    x, y = gen.normal(size=(2, 1000, 8)).astype(np.float32)
    y += np.float32(0.5)
    (xx, xy), (_, yy) = ([(a @ b.T / 8.0 + 1) ** 3 for b in (x, y)] for a in (x, y))
    within = sum((m.sum() - np.trace(m)) / (1000 * 999) for m in (xx, yy))
    made = FeatureScores(Held({"pool": x}, {}), Held({"pool": y}, {}), protocol.PRESETS["dcae"])
    expected = within - 2 * xy.mean()
    assert made.score("kid").value == pytest.approx(expected, rel=1e-3)  # f32 above


# -------------------------------------------------------------------------------------- references


def with_the_same_samples(made, scored):
    """Takes the features of `scored` in place of drawing them once more."""
    mine = {k: np.concatenate([p[k] for p in scored[1][4:]])[:N] for k in ("pool", "logits")}
    made._drawn = lambda *args: (mine, {})
    return mine["pool"].astype(np.float64)


@pytest.fixture
def file(tmp_path):
    """Writes references of these samples' size: `file(name, images=3, spatial=False)`."""

    def write(name, images=0, spatial=False, resolution=diffusing.SIDE):
        gen = np.random.default_rng(len(name))
        pool, positions = (frechet.gaussian(gen.normal(size=(9, c))) for c in (128, 2023))
        rows = gen.integers(0, 256, (images, resolution, resolution, 3), np.uint8)
        shown = npz.Pictures(images, resolution, resolution, iter(rows), None) if images else None
        path = tmp_path / f"{name}.npz"
        reference.write(
            str(path), name=name, n=9, resolution=resolution, protocol={}, pool=pool,
            spatial=positions if spatial else None, pictures=shown,
        )  # fmt: skip
        return str(path), pool, rows

    return write


def test_statistics_of_a_file(scored, file):
    """The name says which; the samples are those of before."""
    path, pool, _ = file("train-16")
    cfg = make(reference=path, scores=(Score.fid, Score.inception), pictures=0)
    assert cfg.evals[0].name == "samples-train-16"
    made, *given = build(cfg)
    mine = with_the_same_samples(made, scored)
    report = run(made, *given)
    expected = frechet.distance(frechet.gaussian(mine), pool)
    assert report.scalars["fid21"] == pytest.approx(expected, rel=1e-9)
    assert report.scalars["is21"] == scored[0].scalars["is21"]
    record = made.record()["reference"]
    assert record["name"] == "train-16" and record["n"] == 9 and len(record["digest"]) == 64


def test_images_of_a_file_are_compared_one_by_one(scored, file):
    """FID to its statistics, precision to its images, of which the last batch is not full."""
    path, pool, rows = file("batch", images=5)
    made, *given = build(make(reference=path, scores=(Score.fid, Score.precision), pictures=0))
    mine = with_the_same_samples(made, scored)
    report = run(made, *given)
    batches = np.pad(rows, ((0, 3), (0, 0), (0, 0), (0, 0))).reshape(2, 4, *rows.shape[1:])
    with jax.set_mesh(made._mesh):
        found = [made._features(jnp.asarray(some), {"pool"})["pool"] for some in batches]
    theirs = np.concatenate(found)[:5].astype(np.float64)
    assert report.scalars["precision21"] == pytest.approx(share_inside(mine, theirs))
    expected = frechet.distance(frechet.gaussian(mine), pool)
    assert report.scalars["fid21"] == pytest.approx(expected, rel=1e-6)


def test_mistakes(file, monkeypatch, tmp_path):
    plain, small = file("plain")[0], file("small", images=3)[0]
    other = file("other", resolution=32)[0]
    for changes, said in (
        ({"reference": plain, "scores": (Score.kid,), "n": 1000}, "has statistics only: kid needs"),
        ({"reference": plain, "scores": (Score.sfid,)}, "has no statistics for sfid"),
        ({"reference": small, "scores": (Score.recall,)}, "has 3 images, but recall needs 4"),
        (
            {"reference": other, "scores": (Score.fid,)},
            "is of images of 32 px, but samples have 16",
        ),
        ({"reference": str(tmp_path / "no.npz")}, "no.npz cannot be read"),
        ({"held_out": 17}, "there are 16; set held_out=16"),
    ):
        with pytest.raises(UserError, match=said):
            build(make(**changes))
    cfg = make()
    cfg.evals[0].nets = str(tmp_path)
    with pytest.raises(UserError, match=r"no weights of inception at .*import-net inception"):
        build(cfg)
    found = SampleScoresConfig(scores=ALL, n=1, held_out=3, batch=0, name="x").problems()
    assert len(found) == 1 + 4 + 2, found
    assert "is of x needs 10 images and more, but n = 1" in "".join(found)
    given = SampleScoresConfig(reference="a/b.npz")
    given.scores = ("fid", "fidd")  # as a flag gives them
    given.resolve(config.RunConfig())
    assert given.scores[0] is Score.fid and given.name == "samples-b"
    assert "scores of samples-b knows no 'fidd'; there are fid, sfid" in given.problems()[0]
    assert "is empty" in SampleScoresConfig(scores=()).problems()[0]


# ------------------------------------------------------------------------------------- a whole run


def scored_run():
    """The config of a run with a best step."""
    cfg = make(n=6, held_out=5, scores=(Score.fid,), every=3, pictures=1)
    cfg.evals[0].scores = ("fid",)  # as a flag gives them
    cfg.checkpoint.every, cfg.checkpoint.keep = 100, 1
    cfg.checkpoint.best, cfg.checkpoint.best_is_highest = "samples-decoded-test/fid6", False
    config.validate(config.resolve(cfg), 1)
    return cfg


def test_a_config_of_flags_is_kept_and_its_best_score_must_exist():
    cfg = scored_run()
    assert config.from_json(json.loads(config.dumps(cfg))) == cfg
    cfg.checkpoint.best = "samples-decoded-test/fid7"
    with pytest.raises(UserError, match="samples-decoded-test/fid6"):
        config.validate(cfg, 1)


@pytest.mark.slow
def test_a_run_is_scored_and_keeps_its_best_step(without_an_autoencoder, tmp_path):
    """With a real autoencoder, its cache and its decoder."""
    without_an_autoencoder.undo()
    cfg = scored_run()
    assert diffusing.run(cfg, tmp_path) == train.DONE
    rows = runs.rows(tmp_path)
    found = {k: rows[k]["samples-decoded-test/fid6"] for k in (3, 6, 8)}
    best = runs.summary(tmp_path)["best"]
    assert best["step"] == min(found, key=found.get)
    assert runs.steps(tmp_path) == sorted({best["step"], 8})
    page = (tmp_path / "report.html").read_text()
    assert "FID of 6 ↓" in page and "best checkpoint" in page
    assert "FID of 6: of fewer than 2048 images; compares with scores of as many alone" in page
    shown = sorted(p.name for p in (tmp_path / "images" / "samples-decoded-test").iterdir())
    assert len(shown) == 3
