"""DC-AE f128c512 from scratch in three phases, 1121 M parameters; ImageNet.

Command:   launch/three_phases.sh configs/dcae_f128c512.py gs://BUCKET/f128c512
           python main.py --config=configs/dcae_f128c512.py:phase1 --workdir=gs://BUCKET/f128c512/phase1
Hardware:  8 x H100 or H200, or a TPU v5p-16 and larger; --dry_run tells the memory of each device
Cost:      not yet run.  The FLOPs of a step are printed by --dry_run
Expected:  not yet run.  The paper's autoencoder is at its results table (README)
Metric:    PSNR and SSIM on ImageNet validation at 256 and 1024 px (no rFID yet)

What the paper states and what is chosen here: see dcae_jax/recipes.py.  Needs LPIPS
(`python -m dcae_jax import-net lpips-vgg`) and imagenet2012 prepared as ArrayRecord: by TFDS
(--config.data.source.data_dir=DIR) or by `pack` (--config.data.source.name=
--config.data.source.directory=OUT); other data: README, "Your own data".  From scratch the decoder
is normalised by RMS throughout; released weights have BatchNorm in its first two stages.
"""

from dcae_jax import recipes
from dcae_jax.config import RunConfig
from dcae_jax.models import dcae


def get_config(arg: str = "phase1") -> RunConfig:
    """The run of one phase: phase1, phase2 or phase3."""
    return recipes.dcae_phase(arg, dcae.dc_ae_f128c512_in(), "DC-AE f128c512")
