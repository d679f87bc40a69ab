"""Autoencoders for tests of what uses them: in memory, and as workdirs without any training."""

import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import runs
import tiny
from etils import epath
from PIL import Image

from dcae_jax import autoencoder, checkpoint, config, provenance, recipes, rng, step
from dcae_jax.models.base import AutoencoderConfig

AVERAGE = 1.1  # the EMA of a saved workdir is its parameters times this


def variables(model: AutoencoderConfig, seed: int = 0) -> dict:
    """Random weights of the scale of initialisation."""
    image = jnp.zeros((1, model.factor, model.factor, 3))
    return _quickly(model.build().init)(jax.random.key(seed), image)


def _quickly(fn: Callable) -> Callable:
    """Compiled without optimisation: it runs once."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def in_memory(model: AutoencoderConfig | None = None, seed: int = 0) -> autoencoder.Autoencoder:
    """An f4c4 autoencoder with attention, or that of another config."""
    model = model or tiny.model()
    found = variables(model, seed)
    digest = autoencoder.encoder_digest(found)
    return autoencoder.Autoencoder(model, found, None, f"random {seed}", None, digest)


def blocks(images: np.ndarray, factor: int) -> np.ndarray:
    """An encoder that loses nothing: each latent pixel holds its block of pixels."""
    b, h, w, c = images.shape
    parts = images.reshape(b, h // factor, factor, w // factor, factor, c)
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, -1)


def unblocks(latents: np.ndarray, factor: int) -> np.ndarray:
    """The decoder of `blocks`."""
    b, h, w, _ = latents.shape
    parts = latents.reshape(b, h, w, factor, factor, 3).transpose(0, 1, 3, 2, 4, 5)
    return parts.reshape(b, h * factor, w * factor, 3)


def save(
    workdir: pathlib.Path, *, arg: str = "phase1", seed: int = 0, number: int = 5,
    model: AutoencoderConfig | None = None, init_from: str | None = None,
    frozen: dict | None = None,
) -> pathlib.Path:  # fmt: skip
    """A workdir of the tiny run with one checkpoint; `frozen`: parts of params/ae to put in."""
    cfg = runs.make_config(arg, seed=seed)
    cfg.init_from = init_from
    if model is not None:
        recipes.use_model(cfg, model)
        config.resolve(cfg)
    task = cfg.task.build(cfg)
    key = rng.key(seed, 0, "init")  # an argument: one program for all seeds
    state = _quickly(lambda key: step.init_state(task, cfg, key))(key)
    ae = {**state.params["ae"], **(frozen or {})}
    params = {**state.params, "ae": ae}
    average = jax.tree.map(lambda x: x * np.float32(AVERAGE), {"params": params})
    (decay,) = state.ema
    ema = {decay: {**average, "stats": state.stats}}
    manager = checkpoint.Checkpoints(epath.Path(workdir), cfg.checkpoint)
    count = jnp.asarray(number, jnp.int32)
    manager.save(state.replace(step=count, params=params, ema=ema), provenance.meta(cfg, "tiny"))
    manager.close()
    (workdir / "config.json").write_text(json.dumps(provenance.meta(cfg, "tiny")))
    return workdir


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, uint8."""
    gen = np.random.default_rng([height, width, seed])
    coarse = gen.uniform(0, 255, (5, 6, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), np.float32)
    return np.clip(smooth + gen.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
