"""A DiT as one would train it today, on DC-AE latents of ImageNet 512: the one to start from.

Command:   python main.py --config=configs/modern_dit.py:xl,f32 --workdir=gs://BUCKET/modern_xl \\
               --config.data.path=gs://BUCKET/latents/f32c32
Hardware:  8 x H100 or H200 for xl; s trains on one device
Cost:      not yet run.  The FLOPs of an image are printed by --dry_run
Expected:  not yet run.  The published DiT-XL on f32 (configs/paper_dit.py): FID 2.84
Metric:    the validation loss by time and grids of fixed classes; FID if it is asked for

The argument is SIZE,LATENT or SIZE,LATENT,online: s, b, l or xl, and f32, f64, f128 or f8 (latents
of 512-px images).  Latents are made once, with their mirror images: `python -m dcae_jax
cache-latents --from mit-han-lab/dc-ae-f32c32-in-1.0 --flips
--config=configs/modern_dit.py:s,f32,online --out DIR`, then the same with --split validation.  With
`online` nothing is cached: each step encodes its images (ImageNet by TFDS,
--config.data.images.source.data_dir=DIR) with the release of that latent, or with
--config.data.autoencoder=AE.
With `,fid` behind the argument FID and Inception Score of 10,000 samples too, to the decoded
validation latents or to --config.evals[2].reference=NPZ (README, "During training"); needs
`python -m dcae_jax import-net inception`.

A flow with velocity, logit-normal times and a shift; DiT with rotary positions, SwiGLU and
RMS-normalised queries and keys; each channel of the latent normalised by its own mean and deviation
(online: the release's one factor; --config.task.latent_norm=channel takes those that `latent-stats`
left in the workdir of --config.data.autoencoder); guidance in an interval of times.
The shift is sqrt(h w c / 4096) of the latent's h, w and c: 1.41 on f32, f64 and f128, 2 on f8.

Stated by others: logit-normal times (SD3, arXiv 2403.03206), the shift by dimension (RAE, arXiv
2510.11690), rotary positions, SwiGLU, learning rate, beta2 of 0.95 and clipping at 1 (LightningDiT,
arXiv 2501.01423), guidance within an interval (arXiv 2404.07724).
Chosen here: that they are put together, normalisation by channel (DC-AE's channels differ),
guidance of 2 where t is 0.2 to 0.75, 30 steps of DPM-Solver++ 2M, 400k steps of 1024, EMA 0.9999,
warm-up of 5000 steps, bfloat16 activations.  None of it was tuned on DC-AE's latents.
"""

from dcae_jax import diffusion_recipes as recipes
from dcae_jax.config import RunConfig
from dcae_jax.models import dit

SIZES = {"s": dit.sit_s, "b": dit.sit_b, "l": dit.sit_l, "xl": dit.sit_xl}


def get_config(arg: str = "xl,f32") -> RunConfig:
    """The run of SIZE,LATENT or SIZE,LATENT,online."""
    arg, fid = recipes.asked_fid(arg)
    size, latent, online = recipes.choose_modern(arg, SIZES)
    model = SIZES[size](**recipes.modern_fields(latent), position=dit.Position.rope)
    run = recipes.modern(model, f"modern DiT-{size.upper()} {latent}", latent, online)
    return recipes.with_fid(run) if fid else run
