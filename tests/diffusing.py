"""Tiny diffusion runs for tests: an autoencoder, its cached latents, UViTs on them.

Made when they are first asked for, once in a test process, and deleted with it.
"""

import atexit
import contextlib
import functools
import pathlib
import shutil
import tempfile

import jax
import networks
import runs
from jax._src.dispatch import JAXPR_TRACE_EVENT
from PIL import Image

from dcae_jax import config, train
from dcae_jax.cli import cache_latents, latent_stats
from dcae_jax.config import CheckpointConfig, EmaConfig, OptimConfig, ReportConfig, RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import FolderConfig
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space
from dcae_jax.diffusion.samplers import DPM2MConfig
from dcae_jax.evals.generate import GenerateConfig
from dcae_jax.evals.val_loss import ValLossConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.online import OnlineDataConfig
from dcae_jax.tasks.diffuse import DiffuseConfig
from dcae_jax.tasks.latents import LatentNorm

SIDE = 16  # pixels


@functools.cache
def root() -> pathlib.Path:
    """Where all of it lies."""
    folder = tempfile.mkdtemp(prefix="dcae_jax_diffusing_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pathlib.Path(folder)


@functools.cache
def autoencoder() -> pathlib.Path:
    """A workdir with f4c4; nobody measured its latents."""
    return networks.save(root() / "ae")


@functools.cache
def measured() -> pathlib.Path:
    """The same, after `latent-stats` on the training images."""
    workdir = shutil.copytree(autoencoder(), root() / "measured")
    options = ("--images", str(images()), "--split", "train", "--resolution", str(SIDE))
    assert latent_stats.main(["--from", str(workdir), *options]) == 0
    return workdir


@functools.cache
def images() -> pathlib.Path:
    """Eight cats and eight dogs, train and test."""
    for split in ("train", "test"):
        for k, label in enumerate(("cat", "dog")):
            folder = root() / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(8):
                picture = networks.picture(SIDE, SIDE, i + 10 * k + 100 * (split == "test"))
                Image.fromarray(picture).save(folder / f"{i}.png")
    return root() / "photos"


@functools.cache
def cache() -> pathlib.Path:
    """Their latents, 4 x 4 x 4 f32, by the command."""
    out = root() / "cache"
    for split in ("train", "test"):
        options = ("--split", split, "--resolution", str(SIDE), "--batch", "8", "--out", str(out))
        source = ("--from", str(autoencoder()), "--images", str(images()), "--dtype", "f32")
        assert cache_latents.main([*source, *options]) == 0
    return out


def online(split: str = "train", workdir: pathlib.Path | None = None) -> OnlineDataConfig:
    """The images themselves, as the cache has them: centre crops, not mirrored."""
    pictures = DataConfig(
        source=FolderConfig(path=str(images())), split=split, resolution=SIDE,
        transform=Transform.center_crop, flip=False, threads=1, cache_mb=8,
    )  # fmt: skip
    return OnlineDataConfig(images=pictures, autoencoder=str(workdir or measured()))


def make(**changes) -> RunConfig:
    """A tiny flow UViT on the cache; changes like steps=5 or **{"optim.lr": 1e-3}."""
    model = UViTConfig(
        in_channels=4, input_size=(4, 4), num_classes=2, width=16, depth=2, heads=2,
        dtype=Dtype.float32,
    )  # fmt: skip
    process = ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v)
    cfg = RunConfig(
        name="tiny diffusion", steps=8, batch=8,
        task=DiffuseConfig(model=model, process=process, latent_norm=LatentNorm.channel),
        data=LatentDataConfig(path=str(cache()), threads=1),
        optim=OptimConfig(lr=1e-2), ema=EmaConfig(decays=(0.9,), warmup_steps=0),
        checkpoint=CheckpointConfig(every=4, keep=3),
        report=ReportConfig(every=1, tensorboard=False),
        evals=[
            ValLossConfig(data=LatentDataConfig(split="test", threads=1), n=10, batch=4, every=4),
            GenerateConfig(
                sampler=DPM2MConfig(steps=3), guidance=GuidanceConfig(scale=2.0), per_label=2,
                batch=4,
            ),
        ],
    )  # fmt: skip
    runs.change(cfg, changes)
    config.validate(config.resolve(cfg), 1)
    return cfg


def run(cfg: RunConfig, workdir: pathlib.Path, poll: int | None = None, count: int = 1) -> int:
    """Trains on so many devices, preempted at a poll; the exit code."""
    with runs.devices(count):
        return train.train(cfg, str(workdir), runs.StopAt(poll))


@functools.cache
def whole() -> tuple[pathlib.Path, list[str]]:
    """An uninterrupted run, and the functions that were traced for it, as often as they were."""
    make()
    with traced() as names:
        assert run(make(), root() / "whole") == train.DONE
    return root() / "whole", names


@contextlib.contextmanager
def traced():
    """Names of the functions that jit traces inside."""
    names: list[str] = []

    def listen(event: str, seconds: float, **about) -> None:
        if event == JAXPR_TRACE_EVENT:
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
