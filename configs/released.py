"""Evaluate or fine-tune released autoencoders, DC-AE of all variants and SD-VAE; ImageNet.

Command:   python -m dcae_jax import --from mit-han-lab/dc-ae-f32c32-in-1.0 \\
               --out runs/dc-ae-f32c32-in-1.0
           python main.py --config=configs/released.py:dc-ae-f32c32-in-1.0,phase3 \\
               --workdir=runs/finetuned
Hardware:  f32: 8 x H100 or H200 at these batch sizes, 1 with --config.batch=16; evaluation: 1 GPU
Cost:      not yet run.  The FLOPs of a step are printed by --dry_run
Expected:  not yet run.  Evaluation of f64c128-in at 512 px: PSNR 26.15, SSIM 0.7105 (official code)
Metric:    PSNR and SSIM on ImageNet validation at 256 and 512 px

The argument is NAME,PHASE (or NAME:PHASE, as launch/three_phases.sh writes it): NAME a release
(dc-ae-f32c32-in-1.0 by default; a wrong one lists all), PHASE phase1 by default.  Weights are taken
from runs/NAME, where the first command puts them, or from --config.init_from=DIR.  To evaluate them
unchanged: --mode=eval --workdir=runs/NAME.

Stated by the paper and chosen here: see dcae_jax/recipes.py; the phases are those of training from
scratch, with the released network as it is: BatchNorms keep their statistics.  Phase 3 leaves the
encoder and so the scaling factor alone; after phases 1 and 2 measure it again (latent-stats).
Other data: README, "Your own data".
"""

import re

from dcae_jax import recipes
from dcae_jax.config import RunConfig
from dcae_jax.convert import releases
from dcae_jax.errors import UserError

PHASES = ("phase1", "phase2", "phase3")


def get_config(arg: str = "dc-ae-f32c32-in-1.0,phase1") -> RunConfig:
    """The run of NAME,PHASE or NAME:PHASE; either may be left out."""
    parts = [part for part in re.split("[,:]", arg) if part]
    found = [p for p in parts if p in PHASES]
    named = [p for p in parts if p not in PHASES]
    if len(found) > 1 or len(named) > 1:
        raise UserError(f"{arg!r} is not NAME,PHASE with one of {', '.join(PHASES)}")
    if named and releases.named(named[0]) is None:
        raise UserError(
            f"{named[0]!r} is neither one of {', '.join(PHASES)} nor a release; there are "
            f"{', '.join(releases.RELEASES)}"
        )
    name = releases.require(named[0] if named else "dc-ae-f32c32-in-1.0")
    cfg = recipes.released(releases.RELEASES[name].config(), found[0] if found else "phase1", name)
    cfg.init_from = f"runs/{name}"  # what `python -m dcae_jax import` wrote
    return cfg
