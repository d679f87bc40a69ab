"""A small UViT on f32 latents of the built-in photographs: eight classes, one for each photograph.

Command:   python main.py --config=configs/demo_diffusion.py --workdir=runs/demo_diffusion
Hardware:  2 CPU cores
Cost:      not yet run to its end
Expected:  samples that look like crops of the photograph whose class was asked for
Metric:    the validation loss by time on held-out regions, and a grid of two samples a class

Needs the latents of `make train`'s autoencoder:
`python -m dcae_jax cache-latents --from runs/demo/phase3 --n 4096 --out runs/demo_latents`,
and the same with --n 256 --split test.

Chosen here, all of it: the photographs are few and their latents small (4 x 4 x 32 at 128 px), so
latents are normalised by channel (their deviations differ sevenfold), the flow with logit-normal
times learns fastest, and float32 is faster than bfloat16 on a CPU.
"""

from dcae_jax.config import CheckpointConfig, EmaConfig, OptimConfig, ReportConfig, RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.diffusion.guidance import GuidanceConfig
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space, TimeDraw
from dcae_jax.diffusion.samplers import DPM2MConfig
from dcae_jax.evals.generate import GenerateConfig
from dcae_jax.evals.val_loss import ValLossConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.tasks.diffuse import DiffuseConfig, LatentNorm


def get_config() -> RunConfig:
    """The run."""
    process = ProcessConfig(
        kind=Kind.flow, predict=Space.v, loss_space=Space.v, times=TimeDraw.logit_normal
    )
    model = UViTConfig(
        in_channels=32, input_size=(4, 4), num_classes=8, width=192, depth=6, heads=6,
        dtype=Dtype.float32,
    )  # fmt: skip
    return RunConfig(
        name="demo diffusion", steps=1500, batch=64,
        task=DiffuseConfig(model=model, process=process, latent_norm=LatentNorm.channel),
        data=LatentDataConfig(path="runs/demo_latents"),
        optim=OptimConfig(lr=1e-3, beta2=0.99, weight_decay=0.01, warmup_steps=100, clip_norm=1.0),
        ema=EmaConfig(decays=(0.995,), warmup_steps=100),
        checkpoint=CheckpointConfig(every=500, keep=2),
        report=ReportConfig(every=100),
        evals=[
            ValLossConfig(data=LatentDataConfig(split="test", flip=False), n=256, every=500),
            GenerateConfig(
                sampler=DPM2MConfig(steps=20), guidance=GuidanceConfig(scale=1.5),
                labels=tuple(range(8)), per_label=4, batch=32, every=500,
            ),
        ],
    )  # fmt: skip
