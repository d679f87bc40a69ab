"""Samples of a trained diffusion model: latents of classes, for evaluators and commands alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Int32

from dcae_jax import rng, sharding
from dcae_jax.diffusion import guidance, samplers
from dcae_jax.diffusion.guidance import Denoise, GuidanceConfig
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
    or the other samples.  `weak` is the model of autoguidance, with guide.reference = weak_model.
    """

    def __init__(
        self, task: DiffuseTask, sampler: SamplerConfig, guide: GuidanceConfig, mesh: Mesh,
        *, seed: int, steps: int | None = None, weak: DiffuseTask | None = None,
        whole: bool = True,
    ) -> None:  # fmt: skip
        """`whole`: every device gets all samples; else each keeps its rows of the batch."""
        self._task, self._guide, self._weak = task, guide, weak
        self._sampler = sampler.build(task.process)
        self._key = rng.key(seed, 0, "samples")
        self._steps = steps
        rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
        self._draw = jax.jit(
            self._drawn, out_shardings=sharding.replicated(mesh) if whole else rows
        )
        self._mesh = mesh

    def draw(
        self, variables: Variables, labels: Int32[np.ndarray, " b"],
        indices: Int32[np.ndarray, " b"], weak: Variables | None = None,
    ) -> Drawn:  # fmt: skip
        """Samples `indices` of classes `labels`; b is a multiple of the mesh's rows."""
        batch = sharding.put_batch({"label": labels, "index": indices}, self._mesh)
        with jax.set_mesh(self._mesh):
            return self._draw(variables, weak, batch["label"], batch["index"])

    def _drawn(
        self, variables: Variables, weak: Variables | None, labels: Int[Array, " b"],
        indices: Int[Array, " b"],
    ) -> Drawn:  # fmt: skip
        model = self._task.cfg.model
        shape = (*model.input_size, model.in_channels)
        noise = sharding.constrain(samplers.initial_noise(self._key, indices, shape))
        found = samplers.sample(
            self._sampler, self._denoise(variables, weak, labels), noise, self._key, indices,
            steps=self._steps,
        )  # fmt: skip
        latents = variables.constants["norm"].invert(found.x0.astype(jnp.float32))
        return Drawn(latents, found.evaluations)

    def _denoise(
        self, variables: Variables, weak: Variables | None, labels: Int[Array, " b"]
    ) -> Denoise:
        """The guided denoiser of these classes."""
        cond = {"label": labels}
        null = guidance.null_class(cond, self._task.cfg.model.num_classes)
        second = None if self._weak is None else self._weak.denoiser(weak)
        return guidance.guided(self._guide, self._task.denoiser(variables), cond, null, second)
