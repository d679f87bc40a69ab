"""UViT on DC-AE latents of ImageNet 512 as published: S, H and 2B on f32c32 and f64c128, and on f8.

Command:   python main.py --config=configs/paper_uvit.py:h,f64 --workdir=gs://BUCKET/uvit_h_f64 \\
               --config.data.path=gs://BUCKET/latents/f64c128
Hardware:  8 x H100 (published batch: 8 x 128); one H200 holds the batch of UViT-H on f64
Cost:      not yet run.  Published: 984 images/s for UViT-H on f64, 55 on f8, on one H100 (fp16)
Expected:  not yet run.  The paper's FID without / with guidance (1.5): S f8 51.96 / 24.57, f32
           46.12 / 18.08, f64 67.30 / 35.96; H f8 11.04 / 3.55, f32 9.83 / 2.53, f64 13.96 / 3.01;
           2B f8 9.73 / not stated, f32 8.13 / 2.30, f64 7.78 / 2.47.  With 2000k steps: H f64
           12.26 / 2.66, 2B f64 6.50 / 2.25
Metric:    the validation loss by time and grids of fixed classes; FID if it is asked for

The argument is SIZE,LATENT: s, h or 2b, and f32, f64 or f8.  Latents are made once: `python -m
dcae_jax cache-latents --from mit-han-lab/dc-ae-f64c128-in-1.0
--config=configs/modern_dit.py:s,f64,online --out DIR`, then the same with --split validation; f8
are SD-VAE's (stabilityai/sd-vae-ft-mse), in patches of 2.  The longer runs: --config.steps=2000000.
With `,fid` behind the argument FID and Inception Score of 10,000 samples too, to the decoded
validation latents or to --config.evals[2].reference=NPZ (README, "During training"); needs
`python -m dcae_jax import-net inception`.

Stated by the authors (their recipe files): AdamW 2e-4, weight decay 0.03 on all parameters, betas
0.99 and 0.99, warm-up of 5000 steps, then constant, batch 1024, 500k steps, EMA 0.9999 with
warm-up, no clipping, label dropout 0.1, VP process with 1000 steps, epsilon, one scaling factor, 30
evaluations of DPM-Solver++, guidance 1.5 on all channels.  The recipe file of 2B is not published:
it is H's here.
Chosen here: gradients and moments in float32 with bfloat16 activations, when to evaluate.
"""

from dcae_jax import diffusion_recipes as recipes
from dcae_jax.config import RunConfig
from dcae_jax.models import uvit

SIZES = {"s": uvit.uvit_s, "h": uvit.uvit_h, "2b": uvit.uvit_2b}


def get_config(arg: str = "h,f64") -> RunConfig:
    """The run of SIZE,LATENT."""
    arg, fid = recipes.asked_fid(arg)
    size, latent = recipes.choose(arg, SIZES, recipes.LATENTS)
    run = recipes.uvit(SIZES[size](**recipes.LATENTS[latent]), f"UViT-{size.upper()} {latent}")
    return recipes.with_fid(run) if fid else run
