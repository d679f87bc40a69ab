"""Do the two ideas of DC-AE work at the size of two CPU cores?  Trains the arms that can tell.

(a) Residual autoencoding (arXiv 2410.10733, section 3.1): the same f64 autoencoder with and without
    the shortcuts, each with its best learning rate of a grid, two seeds.
(b) Decoupled high-resolution adaptation (section 3.2): phase 2 on the trained arms of (a), beside a
    control that trains the same layers on as many pixels of the same photographs, but at low
    resolution: what more training alone brings.

Every arm is a run of its own (`train.train`) with a workdir below the output folder, so whatever
stops the study, the same command goes on from there.  ablation_report.py makes the tables.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import UInt8

from dcae_jax import config as config_lib
from dcae_jax import distributed, recipes, train
from dcae_jax.config import (
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    ReportConfig,
    RunConfig,
    Schedule,
)
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import PhotosConfig
from dcae_jax.errors import UserError
from dcae_jax.evals import metrics
from dcae_jax.evals.reconstruct import ReconstructConfig, summarise
from dcae_jax.models import dcae
from dcae_jax.models.layers import Dtype
from dcae_jax.report import progress, writers
from dcae_jax.studies import base
from dcae_jax.tasks.autoencode import AutoencodeConfig, LossConfig, Phase

RESIDUAL, PLAIN = "residual", "plain"  # part (a)
HIGH, LOW = "phase2", "control"  # part (b): the same layers at high and at low resolution
Scores = dict[str, dict[str, float]]  # {evaluator or baseline: {metric: value}}


@dataclass(slots=True)
class Settings:
    """The size of the study; the default takes about a quarter of an hour on two free cores."""

    widths: tuple[int, ...] = (16, 32, 32, 64, 64, 128, 128)  # f64
    depths: tuple[int, ...] = (0, 1, 1, 1, 1, 1, 1)  # of the encoder and of the decoder
    latent_channels: int = 64
    low: int = 128  # pixels
    high: int = 256
    steps: int = 250  # of (a)
    batch: int = 8
    warmup_steps: int = 30
    rates: tuple[float, ...] = (2.4e-4, 7e-4, 2e-3)  # rising, by equal factors
    seeds: tuple[int, ...] = (0, 1)  # the rate is chosen on the first one
    adapt_steps: int = 80  # of (b)
    adapt_batch: int = 4  # at high resolution
    adapt_rate: float = 3e-4
    eval_low: int = 64  # held-out images
    eval_high: int = 32
    points: int = 5  # of a curve, after step 0
    pca_images: int = 1024
    quick: bool = False


def quick() -> Settings:
    """A study of the same shape whose numbers mean nothing: it shows that the command works."""
    return Settings(
        widths=(8, 16, 16, 32, 32), depths=(0, 1, 1, 1, 1), latent_channels=32, low=64, high=128,
        steps=24, batch=4, warmup_steps=4, adapt_steps=8, adapt_batch=2, eval_low=8, eval_high=8,
        points=3, pca_images=128, quick=True,
    )  # fmt: skip


class Arm(NamedTuple):
    """One run of the study."""

    kind: str  # RESIDUAL, PLAIN, HIGH or LOW
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.kind}-lr{self.rate:.1e}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.kind}, lr {self.rate:.1e}, seed {self.seed}"


@dataclass(slots=True)
class Result:
    """What an arm left in its workdir."""

    arm: Arm
    finished: bool = False  # False: it stopped at a loss that was not finite
    parameters: int = 0  # trained and frozen
    seconds: float = 0.0
    before: Scores = dataclasses.field(default_factory=dict)
    after: Scores = dataclasses.field(default_factory=dict)
    baselines: Scores = dataclasses.field(default_factory=dict)  # of the first arm only
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # (step, pooled PSNR)


@dataclass(slots=True)
class Study:
    """All results; what ablation_report.py reads."""

    settings: Settings
    results: list[Result]
    best: dict[str, float]  # kind of (a) -> learning rate
    baselines: dict[str, dict[str, float]]  # on the held-out images of (a)

    def of(self, kind: str, rate: float | None = None) -> list[Result]:
        """The results of a kind, at one learning rate or at all."""
        return [r for r in self.results if r.arm.kind == kind and rate in (None, r.arm.rate)]

    def chosen(self, kind: str) -> list[Result]:
        """The results of a kind of (a) at its best learning rate, one a seed."""
        return self.of(kind, self.best[kind])


# --------------------------------------------------------------------------------------- configs


def model(settings: Settings, residual: bool) -> dcae.DCAEConfig:
    """dc-ae-f64c128 made small, RMS norms, f32; both arms have the same parameters and init."""
    cfg = dcae.narrow(
        dcae.from_scratch(dcae.dc_ae_f64c128_in()), widths=settings.widths,
        encoder_depths=settings.depths, decoder_depths=settings.depths,
        latent_channels=settings.latent_channels,
    )  # fmt: skip
    cfg.residual, cfg.dtype = residual, Dtype.float32
    return cfg


def photos(settings: Settings, resolution: int, split: str, large_only: bool) -> DataConfig:
    """Crops of the built-in photographs, or of those that are large enough for (b)."""
    return DataConfig(
        source=PhotosConfig(min_photo_side=2 * settings.high if large_only else 0), split=split,
        resolution=resolution, transform=Transform.random_crop, flip=True, threads=2,
    )  # fmt: skip


def low_evaluator(settings: Settings) -> ReconstructConfig:
    """The held-out images on which (a) is judged."""
    return ReconstructConfig(
        data=photos(settings, settings.low, "test", False), n=settings.eval_low,
        batch=settings.batch, every=math.ceil(settings.steps / settings.points), pictures=4,
        training_pictures=0, pca_images=settings.pca_images,
    )  # fmt: skip


def arm_config(settings: Settings, arm: Arm, init_from: str | None = None) -> RunConfig:
    """The resolved config of an arm; those of (b) start from the workdir `init_from`."""
    make = _adapt_config if arm.kind in (HIGH, LOW) else _train_config
    cfg = make(settings, arm)
    cfg.name, cfg.seed, cfg.init_from = f"ablation: {arm}", arm.seed, init_from
    cfg.ema = EmaConfig(decays=(0.99,), warmup_steps=50)
    # One arm is small beside the study: its newest checkpoint is all that is kept.
    cfg.checkpoint = CheckpointConfig(every=max(cfg.steps // 3, 1), keep=1)
    cfg.report = ReportConfig(every=max(cfg.steps // 9, 1), tensorboard=False)
    config_lib.validate(config_lib.resolve(cfg), jax.device_count())
    return cfg


def _train_config(settings: Settings, arm: Arm) -> RunConfig:
    """Part (a): phase 1."""
    first = arm == Arm(RESIDUAL, settings.rates[0], settings.seeds[0])
    evaluator = low_evaluator(settings)
    evaluator.baselines = first  # once: they do not depend on the arm
    return RunConfig(
        steps=settings.steps, batch=settings.batch, evals=[evaluator],
        task=AutoencodeConfig(
            model=model(settings, arm.kind == RESIDUAL), losses=LossConfig(l1=1.0)
        ),
        data=photos(settings, settings.low, "train", False),
        optim=OptimConfig(
            lr=arm.rate, weight_decay=0.01, warmup_steps=settings.warmup_steps,
            schedule=Schedule.cosine, end_lr=0.05, clip_norm=1.0,
        ),
    )  # fmt: skip


def _adapt_config(settings: Settings, arm: Arm) -> RunConfig:
    """Part (b): phase 2, or its control with as many pixels a step at low resolution."""
    resolution = settings.high if arm.kind == HIGH else settings.low
    low = low_evaluator(settings)
    low.every = 0
    high = dataclasses.replace(
        low, data=photos(settings, settings.high, "test", True), n=settings.eval_high
    )
    net = model(settings, residual=True)
    return RunConfig(
        steps=settings.adapt_steps, evals=[high, low],
        batch=settings.adapt_batch * (settings.high // resolution) ** 2,
        task=AutoencodeConfig(
            phase=Phase.high_res_latent, model=net, trainable=recipes.middle(net),
            losses=LossConfig(l1=1.0),
        ),
        data=photos(settings, resolution, "train", True),
        optim=OptimConfig(
            lr=arm.rate, weight_decay=0.001, warmup_steps=max(settings.adapt_steps // 12, 1),
            schedule=Schedule.cosine, end_lr=0.1, clip_norm=1.0,
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- runs


class Runner:
    """Trains arms one after the other and reads what they leave; knows how far the study is."""

    def __init__(self, settings: Settings, out: str, preemption: distributed.Preemption):
        self.settings, self.out, self.preemption = settings, epath.Path(out), preemption
        self.results: list[Result] = []
        rates, seeds = len(settings.rates), len(settings.seeds)
        self.count = 2 * (rates + seeds - 1) + 2 * seeds  # arms; grows when a grid is extended
        self._work: list[float] = []  # pixels of the arms in `results`

    def workdir(self, arm: Arm) -> epath.Path:
        """Where an arm lives."""
        return self.out / arm.name

    def train(self, arm: Arm, start: Arm | None = None) -> Result:
        """The result of an arm, which is trained, resumed, or was finished before.

        Raises Preempted when asked to stop; everything is saved by then.
        """
        init_from = str(self.workdir(start)) if start else None
        cfg = arm_config(self.settings, arm, init_from)
        train.say(f"== arm {len(self.results) + 1} of {self.count}: {arm} | {self._eta()}")
        base.train_arm(cfg, self.workdir(arm), self.preemption)
        result = read(self.workdir(arm), arm, cfg.evals[-1].name)
        self.results.append(result)
        self._work.append(_pixels(cfg))
        return result

    def _eta(self) -> str:
        """The remaining time, as if each arm left cost the mean of (a), (b) by its pixels."""
        seconds, work = sum(r.seconds for r in self.results), sum(self._work)
        if not seconds:
            return "time left: known after the first arm"
        s = self.settings
        adapt = 2 * len(s.seeds) * s.adapt_steps * s.adapt_batch * s.high**2
        done = sum(r.arm.kind in (HIGH, LOW) for r in self.results)
        left = self.count - len(self.results) - (2 * len(s.seeds) - done)
        rest = left * s.steps * s.batch * s.low**2 + adapt * (1 - done / (2 * len(s.seeds)))
        return f"about {progress.duration(rest * seconds / work)} left"


def _pixels(cfg: RunConfig) -> float:
    return cfg.steps * cfg.batch * cfg.data.resolution**2


def read(workdir: epath.Path, arm: Arm, evaluator: str) -> Result:
    """The result in a workdir; unfinished if there is no summary."""
    rows = writers.read_metrics(workdir)
    key = f"{evaluator}/psnr_pooled"
    curve = [(int(row["step"]), float(row[key])) for row in rows if key in row]
    path = workdir / "summary.json"
    if not path.exists():
        return Result(arm, curve=curve)
    summary = json.loads(path.read_text())
    return Result(
        arm, True, summary["n_trained"] + summary["n_frozen"], summary["seconds"],
        summary["evals"]["before"], summary["evals"]["after"],
        summary["baselines"].get(evaluator, {}), curve,
    )  # fmt: skip


def pooled(result: Result) -> float:
    """Pooled PSNR of an arm of (a) on held-out images; -inf if it stopped early."""
    (score,) = result.after.values() if result.finished else ({"psnr_pooled": -math.inf},)
    return score["psnr_pooled"]


def run(settings: Settings, out: str, preemption: distributed.Preemption) -> Study:
    """Trains what is missing in `out`; raises Preempted when asked to stop."""
    _check_devices(settings)
    base.claim(epath.Path(out), settings)
    runner = Runner(settings, out, preemption)
    seed, *other_seeds = settings.seeds
    found = {kind: [] for kind in (RESIDUAL, PLAIN)}
    for rate in settings.rates:
        for kind, results in found.items():
            results.append(runner.train(Arm(kind, rate, seed)))
    best = {kind: _best(runner, results) for kind, results in found.items()}
    for again in other_seeds:
        for kind, arm in best.items():
            runner.train(Arm(kind, arm.rate, again))
    for again in settings.seeds:
        start = Arm(RESIDUAL, best[RESIDUAL].rate, again)
        for kind in (HIGH, LOW):
            runner.train(Arm(kind, settings.adapt_rate, again), start)
    closed_forms = {"constant": constant_baseline(settings), **runner.results[0].baselines}
    return Study(settings, runner.results, {k: a.rate for k, a in best.items()}, closed_forms)


def _check_devices(settings: Settings) -> None:
    count = jax.device_count()
    if settings.batch % count or settings.adapt_batch % count:
        raise UserError(
            f"the ablation's batches of {settings.batch} and {settings.adapt_batch} do not divide "
            f"among {count} devices; show it fewer, e.g. JAX_PLATFORMS=cpu"
        )


def _best(runner: Runner, results: list[Result]) -> Arm:
    """The best arm of a grid; a best rate at the edge extends the grid by one in that direction."""
    best = max(results, key=pooled)
    if best.finished and (rate := beyond(results, best)):
        runner.count += 1
        results.append(runner.train(best.arm._replace(rate=rate)))
        best = max(results, key=pooled)
    if not best.finished:
        raise UserError(
            f"no {best.arm.kind} arm got to its end: every loss became infinite or NaN; lower "
            "Settings.rates"
        )
    return best.arm


def beyond(results: list[Result], best: Result) -> float | None:
    """The rate one factor beyond the grid if its best one is at the edge, else None."""
    rates = sorted(r.arm.rate for r in results)
    if len(rates) < 2 or best.arm.rate not in (rates[0], rates[-1]):
        return None
    rate = rates[0] ** 2 / rates[1] if best.arm.rate == rates[0] else rates[-1] ** 2 / rates[-2]
    return float(f"{rate:.1e}")  # the folder's name is the rate


# -------------------------------------------------------------------------------------- baselines


def constant_baseline(settings: Settings) -> dict[str, float]:
    """Scores of the best constant image: the mean colour of the training pixels."""
    train_images = _images(photos(settings, settings.low, "train", False), settings.pca_images)
    test = _images(photos(settings, settings.low, "test", False), settings.eval_low)
    colour = np.floor(train_images.mean(axis=(0, 1, 2), dtype=np.float64) + 0.5)
    return _scores(test, np.broadcast_to(colour.astype(np.uint8), test.shape))


def _images(data: DataConfig, n: int) -> UInt8[np.ndarray, "n h w 3"]:
    with data.eval_batches(batch=8, n=n) as batches:
        return np.concatenate([b["image"][b["mask"] > 0] for b in batches])


def _scores(
    original: UInt8[np.ndarray, "n h w 3"], output: UInt8[np.ndarray, "n h w 3"]
) -> dict[str, float]:
    x, y = jnp.asarray(original), jnp.asarray(output)
    found = {"mse": metrics.mse(x, y), "psnr": metrics.psnr(x, y), "ssim": metrics.ssim(x, y)}
    return summarise({"count": len(x), **{k: v.sum() for k, v in found.items()}})
