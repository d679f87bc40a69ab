"""Class scores: the measures against plain loops, the evaluator with a network that is known."""

import functools

import jax
import jax.numpy as jnp
import latent_caches
import networks
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance

from dcae_jax import config, sharding
from dcae_jax.config import EmaConfig, RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.diffusion.process import Kind, Prediction, ProcessConfig, Space
from dcae_jax.diffusion.samplers import AncestralConfig, EulerConfig
from dcae_jax.errors import UserError
from dcae_jax.evals import class_scores, generate
from dcae_jax.evals.class_scores import ClassScoresConfig, Labelled, Reference
from dcae_jax.models.layers import Dtype
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.report import images as pictures
from dcae_jax.step import TrainState
from dcae_jax.tasks.diffuse import DiffuseConfig

SHAPE = (2, 2, 4)
SPREAD = np.array([1.0, 2.0, 0.5, 3.0])  # of channels
CLASSES = 3


def made_up(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian latents; classes differ in their means."""
    gen = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    centres = 4 * np.random.default_rng(99).normal(size=(CLASSES, 4)) * SPREAD
    values = centres[labels][:, None, None] + gen.normal(size=(n, *SHAPE)) * SPREAD + 5
    return values.astype(np.float32), labels


TRAINING, HELD_OUT = made_up(60, 0), made_up(30, 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    latent_caches.write(root, "train", *TRAINING, classes=CLASSES)
    latent_caches.write(root, "test", *HELD_OUT, classes=CLASSES)
    return root


@pytest.fixture(scope="module")
def net():
    """Decodes; the evaluator would load the one that the cache names."""
    return networks.in_memory()


@pytest.fixture
def build(cache, net, monkeypatch):
    """Makes evaluators: `build(...)`."""
    monkeypatch.setattr(generate, "decoder", lambda source, manifest, mesh: net.placed(mesh))
    return functools.partial(evaluator, cache)


def make(cache, **changes) -> RunConfig:
    model = UViTConfig(
        in_channels=4, input_size=(2, 2), num_classes=CLASSES, width=8, depth=2, heads=1,
        dtype=Dtype.float32,
    )  # fmt: skip
    process = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v)
    values = {"n": 10, "batch": 4, "pictures": 2} | changes
    scores = ClassScoresConfig(sampler=EulerConfig(steps=2), **values)
    cfg = RunConfig(
        name="scores", steps=1, batch=8, task=DiffuseConfig(model=model, process=process),
        data=LatentDataConfig(path=str(cache), threads=1), ema=EmaConfig(decays=()), evals=[scores],
    )  # fmt: skip
    config.validate(config.resolve(cfg), 1)
    return cfg


MEANS = np.stack([TRAINING[0][TRAINING[1] == k].mean(0) for k in range(CLASSES)])


def known(task, means=MEANS, shift=0):
    """Makes the samples of the task the mean of their class, `shift` classes on."""

    def denoiser(variables):
        normal = variables.constants["norm"].apply(jnp.asarray(means))

        def denoise(x, t, cond):
            x0, t = normal[(cond["label"] + shift) % CLASSES], t[:, None, None, None]
            return Prediction(x0, (x - (1 - t) * x0) / t, None)

        return denoise

    task.denoiser = denoiser
    return task


def evaluator(cache, devices=1, means=MEANS, shift=0, **changes):
    cfg = make(cache, **changes)
    task = known(cfg.task.build(cfg), means, shift)
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:devices])
    state = TrainState(step=jnp.int32(7), params={}, stats={}, ema={}, opt={})
    return cfg.evals[0].build(cfg, task, mesh), state, task


def run(found, state, task, polls=None):
    constants = task.constants(training=False)
    return found.run(state, constants, lambda: polls.append(1) if polls is not None else None)


def plain_scores(values, labels):
    """The three measures by loops and scipy, of latents as the decoder takes them."""
    mean, std = TRAINING[0].mean((0, 1, 2), np.float64), TRAINING[0].std((0, 1, 2), np.float64)
    x, tr, te = ((v.astype(np.float64) - mean) / std for v in (values, TRAINING[0], HELD_OUT[0]))
    pooled, classes = te.mean((1, 2)), HELD_OUT[1]
    centres = [pooled[classes == k].mean(0) for k in range(CLASSES)]
    within = np.std(np.concatenate([pooled[classes == k] - centres[k] for k in range(CLASSES)]), 0)
    hits = 0
    for latent, label in zip(x, labels, strict=True):
        gaps = [np.linalg.norm((latent.mean((0, 1)) - c) / within) for c in centres]
        hits += int(np.argmin(gaps) == label)
    a, b = (v.reshape(-1, 4) for v in (x, te))
    ca, cb = np.cov(a.T, bias=True), np.cov(b.T, bias=True)
    root = scipy.linalg.sqrtm(ca @ cb).real
    distance = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca + cb - 2 * root)
    gaps = scipy.spatial.distance.cdist(x.reshape(len(x), -1), tr.reshape(len(tr), -1))
    nearest = gaps.min(1).mean() / np.sqrt(x[0].size)
    return {"accuracy": hits / len(x), "frechet": distance, "nearest": nearest, "n": len(x)}


def test_scores_of_known_samples(build):
    """A network that gives the mean of the class: all scores are known, on 1 and 8 devices."""
    labels = np.arange(10) % CLASSES
    expected = plain_scores(MEANS[labels], labels)
    assert expected["accuracy"] == 1
    for devices in (1, 8):
        polls = []
        found, state, task = build(devices, pictures=2 if devices == 1 else 0)
        report = run(found, state, task, polls)
        assert polls
        # Samples went through the sampler in f32: 1e-6 of their size.
        assert report.scalars == pytest.approx(expected, rel=1e-4)


def test_the_wrong_class_is_seen(build):
    found, state, task = build(shift=1, pictures=0)
    report = run(found, state, task)
    assert report.scalars["accuracy"] == 0 and report.images == {}


def test_the_picture_shows_each_sample_and_its_nearest_training_latent(build, monkeypatch):
    found, state, task = build()
    shown, grid = [], pictures.grid

    def watched(rows, **texts):
        shown.append((rows, texts))
        return grid(rows, **texts)

    monkeypatch.setattr(pictures, "grid", watched)
    report = run(found, state, task)
    ((rows, texts),) = shown
    assert "step 7: accuracy 1.000" in texts["caption"] and report.images.keys() == {"class-scores"}
    assert [len(row) for row in rows] == [4] * CLASSES  # two pairs of each class
    assert texts["labels"] == ["class 0", "class 1", "class 2"]
    assert texts["columns"] == ["sample", "nearest training crop"] * 2
    std = TRAINING[0].std((0, 1, 2), np.float64)
    gaps = scipy.spatial.distance.cdist(
        (MEANS / std).reshape(CLASSES, -1), (TRAINING[0] / std).reshape(60, -1)
    )
    for k, row in enumerate(rows):
        both = np.stack([MEANS[k], TRAINING[0][gaps[k].argmin()]]).astype(np.float32)
        expected = generate.decode(found._net, jnp.asarray(both))
        for i, picture in enumerate(row):
            # A rounding of the decoded value may fall to the other side.
            assert np.abs(picture.astype(int) - expected[i % 2]).max() <= 1


def test_baselines_are_what_they_say(build):
    found, _, _ = build()
    base, labels = found.baselines(), np.arange(10) % CLASSES
    assert base["chance"] == {"accuracy": 1 / 3}
    everything = np.repeat(TRAINING[0].mean(0, keepdims=True), 10, 0)
    cases = {
        "mean-of-training": everything,
        "class-means-of-training": MEANS[labels],
        "held-out-latents": HELD_OUT[0][:10],  # classes come in turn there
    }
    for name, values in cases.items():
        # Means are taken in another order; f32 inputs.
        assert base[name] == pytest.approx(plain_scores(values, labels), rel=1e-5), name
    training = plain_scores(TRAINING[0][:10], labels)
    assert training["nearest"] == 0  # each is itself among the training latents
    flat = ((TRAINING[0] - found._units.mean) / found._units.std).reshape(60, -1)
    gaps = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(flat))
    np.fill_diagonal(gaps, np.inf)
    training["nearest"] = gaps.min(1)[:10].mean() / 4
    assert base["training-latents"] == pytest.approx(training, rel=1e-5)


def test_nearest_in_chunks_and_without_itself(monkeypatch):
    monkeypatch.setattr(class_scores, "_CHUNK", 3)
    gen = np.random.default_rng(0)
    known = gen.normal(size=(20, *SHAPE))
    distances, index = class_scores.nearest_of(known[5:15], known)
    assert index.tolist() == list(range(5, 15)) and not distances.any()
    _, other = class_scores.nearest_of(known[5:15], known, exclude=np.arange(5, 15))
    gaps = scipy.spatial.distance.cdist(*[known.reshape(20, -1)] * 2)
    np.fill_diagonal(gaps, np.inf)
    assert other.tolist() == gaps.argmin(1)[5:15].tolist()


def test_nearest_means_by_scipy_where_classes_overlap():
    """Deviations within classes decide: neither those of all latents nor none give the same."""
    gen = np.random.default_rng(3)
    labels = gen.permutation(np.arange(90) % CLASSES)
    centres = np.array([[0, 0, 0, 3], [1, 0, 0, 0], [-1, 0, 1, 0]])
    values = centres[labels][:, None, None] + gen.normal(size=(90, *SHAPE)) * [2, 20, 0.5, 2]
    found = Reference.of(Labelled(values, labels), CLASSES)
    pooled = values.mean((1, 2))
    means = np.stack([pooled[labels == k].mean(0) for k in range(CLASSES)])

    def classes(deviation):
        return scipy.spatial.distance.cdist(pooled / deviation, means / deviation).argmin(1)

    within = np.sqrt(np.mean((pooled - means[labels]) ** 2, axis=0))
    assert found.classify(values).tolist() == classes(within).tolist()
    assert (classes(within) != classes(np.ones(4))).any()
    assert (classes(within) != classes(pooled.std(0))).any()


def test_a_reference_takes_the_first_of_equal_means():
    values = np.zeros((4, *SHAPE))
    values[:, 0, 0, 0] = [1, -1, 1, -1]
    found = Reference.of(Labelled(values, np.array([0, 0, 1, 1])), 2)
    assert found.classify(values).tolist() == [0] * 4


def test_samples_that_are_not_finite_are_not_scored(build):
    found, state, task = build(means=MEANS * np.nan)
    report = run(found, state, task)
    assert np.isnan(report.scalars["accuracy"]) and np.isnan(report.scalars["frechet"])
    assert report.scalars["n"] == 10 and report.images == {}


def test_mistakes(cache, build, tmp_path):
    with pytest.raises(UserError, match="class 2 has 0 among the 4 of `held_out`; cache more"):
        build(held_out=4)
    with pytest.raises(UserError, match=r"2 latents of every class.* of `training`"):
        build(training=4)
    with pytest.raises(UserError, match="no latents of split 'test'"):
        latent_caches.write(tmp_path, "train", *TRAINING, classes=CLASSES)
        evaluator(tmp_path)
    cfg = make(cache)
    task, mesh = cfg.task.build(cfg), sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    cfg.evals[0].sampler = AncestralConfig()
    with pytest.raises(UserError, match="evals: class-scores:"):
        cfg.evals[0].build(cfg, task, mesh)
    cfg.data = DataConfig()
    with pytest.raises(UserError, match="compares samples with cached latents"):
        cfg.evals[0].build(cfg, task, mesh)
    problems = ClassScoresConfig(n=0, held_out=1, training=0, batch=0, pictures=-1).problems()
    assert len(problems) == 5
