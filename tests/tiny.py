"""Tiny runs for tests: an autoencoder of some thousand parameters in each phase, and diffusion
models, without data.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dcae_jax import config, rng, sharding, step, tree
from dcae_jax.config import EmaConfig, GroupConfig, MeshConfig, OptimConfig, RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space
from dcae_jax.models.dcae import BlockKind, DCAEConfig, StagesConfig
from dcae_jax.models.discriminator import PatchGANConfig
from dcae_jax.models.dit import DiTConfig
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.models.layers import Act, Dtype, Norm
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.tasks.autoencode import AdversarialConfig, AutoencodeConfig, LossConfig, Phase
from dcae_jax.tasks.diffuse import DiffuseConfig
from dcae_jax.tasks.latents import Normalisation
from dcae_jax.tasks.mask_latents import MaskLatentsConfig
from dcae_jax.tasks.probe import ProbeConfig

TRAINABLE = {
    Phase.low_res_full: "ae/.*",
    Phase.high_res_latent: r"ae/(encoder/(stage_2|conv_out)|decoder/(conv_in|stage_2))/.*",
    Phase.low_res_local: r"ae/decoder/(stage_1|norm_out|conv_out)/.*",
}


def model(norm: Norm = Norm.rms) -> DCAEConfig:
    """f4c4 with a ResBlock stage and an EfficientViT stage."""
    side = StagesConfig(
        widths=(8, 8, 16), depths=(0, 1, 1), blocks=(BlockKind.res, BlockKind.res, BlockKind.evit),
        norms=(Norm.rms,) * 3, acts=(Act.silu,) * 3,
    )  # fmt: skip
    decoder = StagesConfig(
        widths=side.widths, depths=side.depths, blocks=side.blocks,
        norms=(norm, norm, Norm.rms), acts=side.acts,
    )  # fmt: skip
    return DCAEConfig(
        latent_channels=4, encoder=side, decoder=decoder, head_dim=8, dtype=Dtype.float32,
        last_norm_scale_init=0.1,
    )  # fmt: skip


def kl_model() -> KLVAEConfig:
    """f4c4, an AutoencoderKL; `recipes.use_model` puts it into a run."""
    return KLVAEConfig(widths=(8, 8, 16), layers_per_block=1, norm_groups=4, dtype=Dtype.float32)


def run(
    phase: Phase = Phase.low_res_full, *, batch: int = 16, resolution: int = 32,
    norm: Norm = Norm.rms, steps: int = 10,
) -> RunConfig:  # fmt: skip
    """A resolved config of one phase."""
    cfg = RunConfig(
        name="tiny", steps=steps, batch=batch,
        task=AutoencodeConfig(phase=phase, model=model(norm), trainable=TRAINABLE[phase]),
        data=DataConfig(resolution=resolution),
        optim=OptimConfig(lr=1e-3, weight_decay=0.01, groups=[GroupConfig("bias$", 2.0, 0.0)]),
        ema=EmaConfig(decays=(0.9,), warmup_steps=0),
    )  # fmt: skip
    if phase is not Phase.low_res_full:
        cfg.init_from = "somewhere"  # only validate() looks at it
    if phase is Phase.low_res_local:
        cfg.task.adversarial = AdversarialConfig(
            weight=0.5, warmup_steps=2, r1=0.1, lecam=0.1, lecam_decay=0.9,
            discriminator=PatchGANConfig(width=8, layers=1, dtype=Dtype.float32),
            optim=OptimConfig(lr=1e-3),
        )  # fmt: skip
    cfg.task.losses = LossConfig(l1=1.0, l2=0.5)
    config.validate(config.resolve(cfg))
    return cfg


def diffusion(network: str = "uvit", *, batch: int = 16, steps: int = 10) -> RunConfig:
    """A resolved config of a UViT flow ("uvit") or of a DiT with learned variance ("dit")."""
    size = dict(
        in_channels=4, input_size=(4, 4), num_classes=3, width=16, heads=2, dtype=Dtype.float32
    )
    model, process = UViTConfig(depth=4, **size), ProcessConfig(Kind.flow, Space.v, Space.v)
    if network == "dit":
        model = DiTConfig(depth=2, **size)
        process = ProcessConfig(Kind.ddpm, learn_variance=True)
    cfg = RunConfig(
        name="tiny", steps=steps, batch=batch, task=DiffuseConfig(model=model, process=process),
        data=LatentDataConfig(path="not read"),
        optim=OptimConfig(lr=1e-3, weight_decay=0.01), ema=EmaConfig((0.9,), warmup_steps=0),
    )  # fmt: skip
    config.validate(config.resolve(cfg))
    return cfg


def constants(cfg: RunConfig) -> dict:
    """Those of the task, without files."""
    if not isinstance(cfg.task, DiffuseConfig | MaskLatentsConfig | ProbeConfig):
        return {}
    channels = cfg.task.model.in_channels
    return {"norm": Normalisation(jnp.full(channels, 0.5), jnp.full(channels, 0.8))}


def batch(cfg: RunConfig, k: int = 0) -> dict[str, np.ndarray]:
    """The k-th batch: smooth random images, uint8, or latents."""
    gen = np.random.default_rng(k)
    if isinstance(cfg.data, LatentDataConfig):
        latent = gen.normal(size=(cfg.batch, *cfg.data.shape)).astype(np.float32)
        return {"latent": latent, "label": np.arange(cfg.batch, dtype=np.int32) % 3}
    side = cfg.data.resolution
    coarse = gen.uniform(0, 255, (cfg.batch, side // 8, side // 8, 3))
    image = np.kron(coarse, np.ones((1, 8, 8, 1))) + gen.normal(0, 8, (cfg.batch, side, side, 3))
    label = np.zeros(cfg.batch, np.int32)
    return {"image": np.clip(image, 0, 255).astype(np.uint8), "label": label}


# Where two programs, or two places of one, must give the same bits: not as conftest.py compiles.
AS_IN_TRAINING = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


class Trainer:
    """A compiled step on some of the fake devices; `compiled`: options for its gradients."""

    def __init__(self, cfg: RunConfig, devices: int = 1, compiled: dict | None = None):
        self.cfg = cfg
        self.task = cfg.task.build(cfg)
        self.mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:devices])
        with jax.set_mesh(self.mesh):
            key = rng.key(cfg.seed, 0, "init")
            abstract = jax.eval_shape(lambda: step.init_state(self.task, cfg, key))
            self.shardings = sharding.state_shardings(abstract, self.mesh, cfg.mesh)
            self.state = jax.jit(
                lambda: step.init_state(self.task, cfg, key),
                out_shardings=self.shardings,
            )()
        self._step = step.make_train_step(self.task, cfg, self.task.static(0), self.shardings)
        self.constants = constants(cfg)
        self._grads = jax.jit(
            lambda s, b: step.loss_and_grads(self.task, cfg, s, self.constants, b),
            compiler_options=compiled,
        )

    def grads(self, k: int = 0):
        """(metrics, gradients per objective and term) of batch k, on the host."""
        with jax.set_mesh(self.mesh):
            placed = sharding.put_batch(batch(self.cfg, k), self.mesh)
            return jax.device_get(self._grads(self.state, placed))

    def replace_params(self, flat):
        """Other parameters, path -> array, in the place of those that are there."""
        old = tree.flatten(self.state.params)
        placed = {k: jax.device_put(np.asarray(v), old[k].sharding) for k, v in flat.items()}
        self.state = self.state.replace(params=tree.unflatten(placed))

    def sgd(self, steps: int = 2):
        """Metrics and gradients of the first batch, and the parameters after plain SGD."""
        first = None
        for k in range(steps):
            metrics, grads = self.grads(k)
            first = first or (metrics, grads)
            flat = jax.device_get(tree.flatten(self.state.params))
            for objective in self.task.objectives:
                total, _ = objective.combine(grads[objective.name], jnp.int32(k))
                for path, g in tree.flatten(total).items():
                    flat[path] = flat[path] - np.float32(0.1) * np.asarray(g)
            self.replace_params(flat)
        return *first, jax.device_get(self.state.params)

    def train(self, steps: int, first: int = 0):
        """Runs steps on batches first, first + 1, ...; returns the metrics of the last."""
        metrics = {}
        with jax.set_mesh(self.mesh):
            for k in range(first, first + steps):
                placed = sharding.put_batch(batch(self.cfg, k), self.mesh)
                self.state, metrics = self._step(self.state, self.constants, placed)
        return jax.device_get(metrics)


def error(a, b):
    """|a - b| / |b| over all leaves."""

    def norm(leaves):
        return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in leaves))

    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return norm([x - y for x, y in zip(a, b, strict=True)]) / norm(b)


def with_mesh(cfg: RunConfig, data: int, fsdp: int, spatial: int, zero1: bool = False) -> RunConfig:
    """The config on another mesh."""
    cfg.mesh = MeshConfig(data=data, fsdp=fsdp, spatial=spatial, zero1=zero1)
    return cfg
