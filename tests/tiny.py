"""Tiny runs for tests: an autoencoder of some thousand parameters, in each phase, without data."""

import jax
import numpy as np

from dcae_jax import config, rng, sharding, step
from dcae_jax.config import EmaConfig, GroupConfig, MeshConfig, OptimConfig, RunConfig
from dcae_jax.data.pipeline import DataConfig
from dcae_jax.models.dcae import BlockKind, DCAEConfig, StagesConfig
from dcae_jax.models.discriminator import PatchGANConfig
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.models.layers import Act, Dtype, Norm
from dcae_jax.tasks.autoencode import AdversarialConfig, AutoencodeConfig, LossConfig, Phase

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


def batch(cfg: RunConfig, k: int = 0) -> dict[str, np.ndarray]:
    """The k-th batch: smooth random images, uint8."""
    gen = np.random.default_rng(k)
    side = cfg.data.resolution
    coarse = gen.uniform(0, 255, (cfg.batch, side // 8, side // 8, 3))
    image = np.kron(coarse, np.ones((1, 8, 8, 1))) + gen.normal(0, 8, (cfg.batch, side, side, 3))
    label = np.zeros(cfg.batch, np.int32)
    return {"image": np.clip(image, 0, 255).astype(np.uint8), "label": label}


class Trainer:
    """A compiled step on some of the fake devices."""

    def __init__(self, cfg: RunConfig, devices: int = 1):
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
                compiler_options={"xla_backend_optimization_level": 0},  # it runs once
            )()
        self._step = step.make_train_step(self.task, cfg, (), self.shardings)

    def grads(self, k: int = 0):
        """(metrics, gradients per objective and term) of batch k, on the host."""
        with jax.set_mesh(self.mesh):
            fn = jax.jit(lambda s, b: step.loss_and_grads(self.task, self.cfg, s, {}, b))
            return jax.device_get(fn(self.state, sharding.put_batch(batch(self.cfg, k), self.mesh)))

    def train(self, steps: int, first: int = 0):
        """Runs steps on batches first, first + 1, ...; returns the metrics of the last."""
        metrics = {}
        with jax.set_mesh(self.mesh):
            for k in range(first, first + steps):
                placed = sharding.put_batch(batch(self.cfg, k), self.mesh)
                self.state, metrics = self._step(self.state, {}, placed)
        return jax.device_get(metrics)


def with_mesh(cfg: RunConfig, data: int, fsdp: int, spatial: int, zero1: bool = False) -> RunConfig:
    """The config on another mesh."""
    cfg.mesh = MeshConfig(data=data, fsdp=fsdp, spatial=spatial, zero1=zero1)
    return cfg
