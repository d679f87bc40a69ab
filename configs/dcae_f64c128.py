"""DC-AE f64c128 from scratch in three phases, 677 M parameters; ImageNet.

Command:   launch/three_phases.sh configs/dcae_f64c128.py gs://BUCKET/f64c128
           launch/three_phases.sh configs/dcae_f64c128.py:structured gs://BUCKET/f64c128_structured
           python main.py --config=configs/dcae_f64c128.py:phase1 --workdir=gs://BUCKET/f64c128/phase1
Hardware:  8 x H100 or H200, or a TPU v5p-16 and larger; --dry_run tells the memory of each device
Cost:      not yet run.  The FLOPs of a step are printed by --dry_run
Expected:  not yet run.  The paper's autoencoder is at its results table (README)
Metric:    PSNR and SSIM on ImageNet validation at 256 and 1024 px (no rFID yet)

The argument is PHASE or structured:PHASE.  With `structured` the latent is that of DC-AE 1.5 (arXiv
2508.00413): while training, each example keeps a random number of its first channels, so that the
first ones hold the objects and the last ones the details; the PSNR with each number is reported.
The numbers 16, 32, 64 and 128 are chosen here (task.channel_counts), and one is drawn for each
example where the paper says each training iteration.

What the paper states and what is chosen here: see dcae_jax/recipes.py.  Needs LPIPS
(`python -m dcae_jax import-net lpips-vgg`) and imagenet2012 prepared as ArrayRecord: by TFDS
(--config.data.source.data_dir=DIR) or by `pack` (--config.data.source.name=
--config.data.source.directory=OUT); other data: README, "Your own data".  From scratch the decoder
is normalised by RMS throughout; released weights have BatchNorm in its first two stages.
"""

from dcae_jax import recipes
from dcae_jax.config import RunConfig
from dcae_jax.models import dcae

CHANNELS = (16, 32, 64, 128)


def get_config(arg: str = "phase1") -> RunConfig:
    """The run of one phase: phase1, phase2 or phase3, or structured:phase1 .. 3."""
    phase = arg.removeprefix("structured:")
    cfg = recipes.dcae_phase(phase, dcae.dc_ae_f64c128_in(), "DC-AE f64c128")
    return cfg if phase == arg else recipes.structured(cfg, CHANNELS)
