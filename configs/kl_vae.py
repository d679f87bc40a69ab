"""AutoencoderKL, the paper's SD-VAE baseline, under the task that trains DC-AE; f8, f32, f64, f128.

Command:   python main.py --config=configs/kl_vae.py:f32,phase1 --workdir=gs://BUCKET/kl_f32
           launch/three_phases.sh configs/kl_vae.py:demo runs/kl_demo
Hardware:  as configs/dcae_f32c32.py: 8 x H100 or H200; the demo: 2 CPU cores
Cost:      not yet run; --dry_run tells the FLOPs.  A step of the demo costs twice that of configs/
           demo.py (64 against 35 GFLOP; the blocks at full resolution)
Expected:  full size: not yet run.  The paper's PSNR at 256 px: 22.13 f32c32, 18.07 f64c128
Metric:    PSNR and SSIM, as the DC-AE config of the same size

The argument is MODEL,PHASE (or MODEL:PHASE, as launch/three_phases.sh writes it); MODEL is f8 by
default, PHASE is phase1.  `demo` has the compression, widths, data and steps of configs/demo.py, so
that a KL autoencoder and a DC-AE can be compared at f32 in minutes.

Stated by the paper: f and c of each baseline, equal to DC-AE's; SD-VAE's architecture is public.
Chosen here: the widths beyond f8 (512 for each stage that is added; `task.model.widths`), and that
data, losses, optimizer and phases are DC-AE's (dcae_jax/recipes.py), so that only the autoencoder
differs.  The KL weight is LDM's 1e-6, which is 2.1e-8 at f8 and 1.0e-8 at f32 as a weight on means
(`recipes.ldm_kl`).  Full sizes need LPIPS and ImageNet: see configs/dcae_f32c32.py.
"""

import re

from configs import demo
from dcae_jax import recipes
from dcae_jax.config import RunConfig
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, kl_vae
from dcae_jax.models.layers import Dtype

MODELS = {
    "f8": kl_vae.sd_vae_f8,
    "f32": kl_vae.kl_f32c32,
    "f64": kl_vae.kl_f64c128,
    "f128": kl_vae.kl_f128c512,
}


def get_config(arg: str = "f8,phase1") -> RunConfig:
    """The run of MODEL,PHASE: f8, f32, f64, f128 or demo; phase1, phase2 or phase3."""
    name, phase = _parse(arg)
    if name == "demo":
        cfg = recipes.use_model(demo.get_config(phase), demo_model())
    else:
        start = recipes.dcae_phase(phase, dcae.dc_ae_f32c32_in(), name)
        cfg = recipes.use_model(start, MODELS[name]())
    cfg.name = f"KL {name} {phase}"
    return cfg


def _parse(arg: str) -> tuple[str, str]:
    """(model, phase) of the argument, either of which may be left out."""
    words = [word for word in re.split("[,:]", arg) if word]
    models = [*MODELS, "demo"]
    name = words.pop(0) if words and words[0] in models else "f8"
    if len(words) > 1 or (words and words[0] not in ("phase1", "phase2", "phase3")):
        raise UserError(
            f"unknown argument {arg!r}; give MODEL,PHASE with a model of {', '.join(models)} and "
            "a phase of phase1, phase2, phase3"
        )
    return name, words[0] if words else "phase1"


def demo_model() -> kl_vae.KLVAEConfig:
    """f32c32 with the widths of the demo's DC-AE and one block a stage (the decoder's have two)."""
    like = demo.model()
    return kl_vae.KLVAEConfig(
        latent_channels=like.latent_channels, widths=like.encoder.widths, layers_per_block=1,
        norm_groups=8, dtype=Dtype.float32,
    )  # fmt: skip
