"""MD-UViT: masking and diffusion in one UViT on DC-AE latents of ImageNet 512, in nine recipes.

Command:   python main.py --config=configs/md_uvit.py:h,f32,curriculum \\
               --workdir=gs://BUCKET/md_uvit_h --config.data.path=gs://BUCKET/latents/f32c32
Hardware:  8 x H100 or H200 for h and 2b; s trains on one device
Cost:      not yet run.  Forward FLOPs of `curriculum` on h,f32: 0.59 of UViT-H's
Expected:  not yet run, and nothing is published on it.  UViT-H on f32 with the same optimizer
           (configs/paper_uvit.py): FID 9.83 without, 2.53 with guidance
Metric:    the validation loss by time and grids of fixed classes; the error of masked tokens;
           FID if it is asked for

The argument is SIZE,LATENT,RECIPE: s, h or 2b; f32, f64 or f8; and a recipe of
dcae_jax/mask_recipes.py: channels (not of f8), curriculum, diffusion, lmd, mae, maskdit, maskdm,
microdit, tread.  `channels` is for latents of configs/dcae_f64c128.py:structured.
Latents are made once, as for configs/paper_uvit.py.  Weights of a UViT start a run:
--config.init_from=DIR.
With `,fid` behind the argument FID and Inception Score of 10,000 samples too, to the decoded
validation latents or to --config.evals[2].reference=NPZ (README, "During training"); needs
`python -m dcae_jax import-net inception`.

Stated by others: UViT's optimizer, process and EMA (configs/paper_uvit.py); the mask ratios, their
schedules and the weights of the losses of LMD (arXiv 2312.07971), MAE (2111.06377), MaskDiT
(2306.09305), MaskDM (2306.11363), MicroDiT (2407.15811) and TREAD (2501.04765); the objective of
`channels` of DC-AE 1.5 (2508.00413).
Chosen here: the network, that one loss holds all of them, `curriculum` and its numbers (15 % of the
steps reconstruct, 70 % do both with half of the tokens masked, 15 % are unmasked at half the rate,
every tenth of those a rehearsal), the weight alpha^2 of reconstruction from noisy tokens, two full
blocks at the end, decodable targets, all methods on UViT with VP noise.  To be compared at equal
FLOPs: others found masking to gain nothing at equal compute.
"""

from dcae_jax import diffusion_recipes, mask_recipes
from dcae_jax.config import RunConfig
from dcae_jax.models import md_uvit

SIZES = {"s": md_uvit.md_uvit_s, "h": md_uvit.md_uvit_h, "2b": md_uvit.md_uvit_2b}


def get_config(arg: str = "h,f32,curriculum") -> RunConfig:
    """The run of SIZE,LATENT,RECIPE."""
    arg, fid = diffusion_recipes.asked_fid(arg)
    size, latent, name = mask_recipes.choose(arg, SIZES)
    recipe = mask_recipes.RECIPES[name]()
    model = SIZES[size](**diffusion_recipes.LATENTS[latent], **recipe.model)
    run = mask_recipes.run(model, f"MD-UViT-{size.upper()} {latent} {name}", recipe)
    return diffusion_recipes.with_fid(run) if fid else run
