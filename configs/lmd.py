"""LMD: masked autoencoders of latents, masks that grow over the training; and MAE on pixels.

Command:   python main.py --config=configs/lmd.py:b,f8 --workdir=gs://BUCKET/lmd_b \\
               --config.data.path=gs://BUCKET/latents/f8_224
Hardware:  one GPU for b on latents (LMD's script: one, batch 64); published MAE: 64 GPUs
Cost:      not yet run.  Forward pass of an image: LMD-B on f8 6.5 GFLOP as the mean over its masks,
           MAE-B 19.6; with one encoding of the image in each step 208 more, so cache the latents
Expected:  not published.  LMD's repository names no result of its own, and the tables of the paper
           were not available here
Metric:    the error of masked tokens of the validation split at four ratios, in whitened units

The argument is SIZE,LATENT or mae,SIZE: sizes b, l and h; f8 (SD-VAE at 224 px, 28 x 28 x 4, in
patches of 4: LMD's own), f32 and f64 (DC-AE at 512 px, 16 x 16 x 32 and 8 x 8 x 128, in patches of
1).  Latents are made once, of several crops: `python -m dcae_jax cache-latents --from
stabilityai/sd-vae-ft-mse --config=configs/lmd.py:mae,b --crops 4 --flips --out DIR`, for f32 with
--from mit-han-lab/dc-ae-f32c32-in-1.0 --resolution 512; then with --split validation --transform
center_crop.  The eight latents of each image, with their variances, take 130 GB at f8 in bf16.  To
reconstruct, train with --config.task.norm_target=False: whitened tokens cannot be decoded.

Stated by the authors of LMD (their code): networks, cosine schedule of the mask from 0.15 to 0.75
over two thirds of the steps, whitened targets, crops of 0.2 to 1 of the area, Adan with 0.98, 0.92,
0.90, rate 3e-4 x batch / 256 with one epoch of warm-up and a half-cosine to 1e-8, weight decay
0.05 but for biases and norms, clipping at 10, no EMA.  Of MAE (their README): AdamW with 0.9, 0.95,
1.5e-4 x batch / 256, batch 4096, 800 epochs, 40 of warm-up, a mask of 0.75, whitened targets.
Not known: LMD's third schedule (`linear` is a guess), its epochs (blank in the script), and whether
the latents of l and h were in patches of 4; the tables of the paper.
Chosen here: batch 1024 and 400 epochs for LMD (the script: 64; its parser's default: 400), six
numbers of visible tokens, latents times one scalar (LMD's code leaves them at a deviation of 5.5,
and takes means where samples are drawn here), another release of the SD-VAE (v1-4 there), cached
crops in place of new ones in each epoch, bfloat16 activations, everything on f32 and f64, when to
evaluate.
"""

from dcae_jax import diffusion_recipes, lmd_recipes
from dcae_jax.config import RunConfig
from dcae_jax.errors import UserError
from dcae_jax.models import lmd

SIZES = {"b": lmd.lmd_b, "l": lmd.lmd_l, "h": lmd.lmd_h}
PIXEL_SIZES = {"b": lmd.mae_b, "l": lmd.mae_l, "h": lmd.mae_h}
LATENTS = {
    "f8": {"in_channels": 4, "input_size": (28, 28), "patch": 4},
    **{name: diffusion_recipes.LATENTS[name] for name in ("f32", "f64")},
}


def get_config(arg: str = "b,f8") -> RunConfig:
    """The run of SIZE,LATENT or mae,SIZE."""
    size, _, latent = arg.partition(",")
    if size == "mae" and latent in PIXEL_SIZES:
        return lmd_recipes.mae(PIXEL_SIZES[latent](), f"MAE-{latent.upper()}")
    if size not in SIZES or latent not in LATENTS:
        raise UserError(
            f"{arg!r} is neither SIZE,LATENT nor mae,SIZE: sizes are {', '.join(SIZES)}, latents "
            f"{', '.join(LATENTS)}"
        )
    return lmd_recipes.lmd(SIZES[size](**LATENTS[latent]), f"LMD-{size.upper()} {latent}")
