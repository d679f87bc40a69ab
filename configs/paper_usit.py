"""USiT on DC-AE latents of ImageNet 512 as published: UViT's network trained as a flow.

Command:   python main.py --config=configs/paper_usit.py:h,f32 --workdir=gs://BUCKET/usit_h_f32 \\
               --config.data.path=gs://BUCKET/latents/f32c32
Hardware:  8 x H100 (published batch: 8 x 128)
Cost:      not yet run
Expected:  not yet run.  The paper's FID without / with guidance: H f32 3.80 / 1.89 (scale 1.2),
           2B f32 2.90 / 1.72 (scale 1.15)
Metric:    the validation loss by time and grids of fixed classes; FID if it is asked for

The argument is SIZE,LATENT: h or 2b, and f32, f64 or f8 (published: f32).  Latents are made once:
`python -m dcae_jax cache-latents --from mit-han-lab/dc-ae-f32c32-in-1.0
--config=configs/modern_dit.py:s,f32,online --out DIR`, then the same with --split validation.
With `,fid` behind the argument FID and Inception Score of 10,000 samples too, to the decoded
validation latents or to --config.evals[2].reference=NPZ (README, "During training"); needs
`python -m dcae_jax import-net inception`.

Stated by the authors (their recipe files): AdamW 1e-4, no weight decay, betas 0.99 and 0.99,
warm-up of 5000 steps, then constant, batch 1024, 500k steps, EMA 0.9999 with warm-up, no clipping,
label dropout 0.1, linear path, velocity, uniform times, dopri5 with rtol 1e-3 and atol 1e-6,
guidance 1.2 (H) and 1.15 (2B) on all channels.  The recipe file of 2B is not published: H's.
Chosen here: bfloat16 activations, when to evaluate.
"""

from dcae_jax import diffusion_recipes as recipes
from dcae_jax.config import RunConfig
from dcae_jax.models import uvit

SIZES = {"h": uvit.uvit_h, "2b": uvit.uvit_2b}
GUIDANCE = {"h": 1.2, "2b": 1.15}


def get_config(arg: str = "h,f32") -> RunConfig:
    """The run of SIZE,LATENT."""
    arg, fid = recipes.asked_fid(arg)
    size, latent = recipes.choose(arg, SIZES, recipes.LATENTS)
    model = SIZES[size](**recipes.LATENTS[latent])
    run = recipes.usit(model, f"USiT-{size.upper()} {latent}", GUIDANCE[size])
    return recipes.with_fid(run) if fid else run
