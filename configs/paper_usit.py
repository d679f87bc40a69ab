"""USiT on DC-AE latents of ImageNet 512 as published: UViT's network trained as a flow.

Command:   python main.py --config=configs/paper_usit.py:h,f32 --workdir=gs://BUCKET/usit_h_f32 \\
               --config.data.path=gs://BUCKET/latents/f32c32
Hardware:  8 x H100 (published batch: 8 x 128)
Cost:      not yet run
Expected:  not yet run.  The paper's FID without / with guidance: H f32 3.80 / 1.89 (scale 1.2),
           2B f32 2.90 / 1.72 (scale 1.15)
Metric:    the validation loss by time and grids of fixed classes (no FID yet)

The argument is SIZE,LATENT: h or 2b, and f32 or f64 (f64 with these sizes is not published).

Stated by the authors (their recipe files): AdamW 1e-4, no weight decay, betas 0.99 and 0.99,
warm-up of 5000 steps, then constant, batch 1024, 500k steps, EMA 0.9999 with warm-up, label dropout
0.1, linear path, velocity, uniform times, dopri5 with rtol 1e-3 and atol 1e-6.
Chosen here: bfloat16 activations, when to evaluate.
"""

from dcae_jax import diffusion_recipes as recipes
from dcae_jax.config import RunConfig
from dcae_jax.models import uvit

SIZES = {"h": uvit.uvit_h, "2b": uvit.uvit_2b}


def get_config(arg: str = "h,f32") -> RunConfig:
    """The run of SIZE,LATENT."""
    size, latent = recipes.choose(arg, SIZES, recipes.LATENTS)
    return recipes.usit(SIZES[size](**recipes.LATENTS[latent]), f"USiT-{size.upper()} {latent}")
