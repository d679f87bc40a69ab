"""Samples of a trained diffusion model: latents of classes, for evaluators and commands alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32

from dcae_jax import rng, sharding
from dcae_jax.diffusion import guidance, samplers
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.samplers import SamplerConfig
from dcae_jax.tasks.base import Variables
from dcae_jax.tasks.diffuse import DiffuseTask


class Drawn(NamedTuple):
    """Latents as the autoencoder decodes them, and what they cost."""

    latents: Float[Array, "b h w c"]
    evaluations: Int[Array, " b"]  # of the network, without the second half that guidance adds


class Generator:
    """Draws samples with a fixed sampler, guidance and seed.

    Sample i is a function of (weights, class, seed, i): it does not depend on the batch, the mesh
    or the other samples.
    """

    def __init__(
        self, task: DiffuseTask, sampler: SamplerConfig, guide: GuidanceConfig, mesh: Mesh,
        *, seed: int, steps: int | None = None,
    ) -> None:  # fmt: skip
        self._task, self._guide = task, guide
        self._sampler = sampler.build(task.process)
        self._key = rng.key(seed, 0, "samples")
        self._steps = steps
        self._draw = jax.jit(self._drawn, out_shardings=sharding.replicated(mesh))
        self._mesh = mesh

    def draw(
        self, variables: Variables, labels: Int32[np.ndarray, " b"],
        indices: Int32[np.ndarray, " b"],
    ) -> Drawn:  # fmt: skip
        """Samples `indices` of classes `labels`; b is a multiple of the mesh's rows."""
        batch = sharding.put_batch({"label": labels, "index": indices}, self._mesh)
        with jax.set_mesh(self._mesh):
            return self._draw(variables, batch["label"], batch["index"])

    def _drawn(
        self, variables: Variables, labels: Int[Array, " b"], indices: Int[Array, " b"]
    ) -> Drawn:
        model = self._task.cfg.model
        cond = {"label": labels}
        null = guidance.null_class(cond, model.num_classes)
        denoise = guidance.guided(self._guide, self._task.denoiser(variables), cond, null)
        shape = (*model.input_size, model.in_channels)
        noise = sharding.constrain(samplers.initial_noise(self._key, indices, shape))
        found = samplers.sample(
            self._sampler, denoise, noise, self._key, indices, steps=self._steps
        )
        latents = variables.constants["norm"].invert(found.x0.astype(jnp.float32))
        return Drawn(latents, found.evaluations)
