"""DiT-XL on DC-AE latents of ImageNet 512 as published: epsilon and a learned variance.

Command:   python main.py --config=configs/paper_dit.py:xl,f32 --workdir=gs://BUCKET/dit_xl_f32 \\
               --config.data.path=gs://BUCKET/latents/f32c32
Hardware:  8 x H100 (published batch: 8 x 32)
Cost:      not yet run.  Published: 241 images/s on one H100 (fp16), 54 on f8
Expected:  not yet run.  The paper's FID without / with guidance: f8 12.03 / 3.04, f32 9.56 / 2.84
           (scale 1.3); f32 with a batch of 1024 and lr 2e-4 6.88 / 2.41 (scale 1.5)
Metric:    the validation loss by time and grids of fixed classes; FID if it is asked for

The argument is SIZE,LATENT: s, b, l or xl (the paper has XL only), and f32, f64 or f8 (f64 is not
published).  The larger batch: --config.batch=1024 --config.optim.lr=2e-4
--config.evals[1].guidance.scale=1.5.  Latents are made once: `python -m dcae_jax cache-latents
--from mit-han-lab/dc-ae-f32c32-in-1.0 --config=configs/modern_dit.py:s,f32,online --out DIR`, then
the same with --split validation.
With `,fid` behind the argument FID and Inception Score of 10,000 samples too, to the decoded
validation latents or to --config.evals[2].reference=NPZ (README, "During training"); needs
`python -m dcae_jax import-net inception`.

Stated by the authors (their recipe files): AdamW 1e-4 without weight decay, constant, batch 256,
3000k steps, EMA 0.9999 with warm-up, no clipping, label dropout 0.1, linear betas 1e-4 to 0.02,
learned range variance, 250 ancestral steps, guidance 1.3 on f32 and 1.5 else, on all channels.
Chosen here: bfloat16 in place of fp16, when to evaluate.
"""

from dcae_jax import diffusion_recipes as recipes
from dcae_jax.config import RunConfig
from dcae_jax.models import dit

SIZES = {"s": dit.dit_s, "b": dit.dit_b, "l": dit.dit_l, "xl": dit.dit_xl}


def get_config(arg: str = "xl,f32") -> RunConfig:
    """The run of SIZE,LATENT."""
    arg, fid = recipes.asked_fid(arg)
    size, latent = recipes.choose(arg, SIZES, recipes.LATENTS)
    model, guidance = SIZES[size](**recipes.LATENTS[latent]), 1.3 if latent == "f32" else 1.5
    run = recipes.dit(model, f"DiT-{size.upper()} {latent}", guidance)
    return recipes.with_fid(run) if fid else run
