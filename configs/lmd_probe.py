"""Labels on LMD and MAE: a linear probe of the frozen encoder, or fine-tuning of all of it.

Command:   python main.py --config=configs/lmd_probe.py:linear --config.init_from=runs/lmd \\
               --config.data.path=gs://BUCKET/latents/f8_224 --workdir=runs/probe
Hardware:  one GPU for b on latents (LMD's script: one, batch 64)
Cost:      not yet run.  An example of LMD-B on f8: 9 GFLOP for the probe, 26 to fine-tune
Expected:  not known for LMD: its linear probe could not run, and the tables of its paper were not
           available here.  MAE-B on pixels, published: 83.6 % (fine-tuned)
Metric:    top-1 and top-5 accuracy and cross-entropy on the 50,000 images of the validation split

The argument is MODE, MODE,SIZE,LATENT or MODE,mae,SIZE: linear or finetune; sizes and latents as in
configs/lmd.py, b,f8 unless they are named; mae on pixels.  The latents are those of the run that
--config.init_from names (train and validation), and so is task.latent_norm.  A UViT or MD-UViT is
probed with task.model and task.process of its run in a copy of this file.

Stated by the authors of LMD (their code), for fine-tuning: Adan with 0.98, 0.92, 0.99, rate 1e-3 x
batch / 256 with one epoch of warm-up and a half-cosine to 1e-6, weight decay 0.05 but for biases
and norms, rates that fall by 0.65 from layer to layer, mixup 0.8, CutMix 1.0, label smoothing 0.1,
no clipping, the mean of the patch tokens, a head that starts from 2e-5.  Of MAE, for linear probing
(their README; LMD's copy of it takes pixels without an autoencoder, which its networks cannot): 90
epochs, 10 of warm-up, no weight decay, a batch norm without scale and bias before the head, LARS
with 0.1 x batch / 256 and a batch of 16,384.
Not here: drop path (LMD and MAE: 0.1).  LMD mixes images before its autoencoder; on a cache the
latents are mixed.  RandAugment and random erasing are on LMD's command line and without effect
there.
Not known: LMD's epochs of fine-tuning (blank in the script; its parser's default: 50).
Chosen here: batch 1024 (LMD's script: 64) and 50 epochs for fine-tuning; for the probe AdamW with
1e-3 and batch 4096 in place of LARS, and the mean of the patch tokens; cached crops in place of new
ones in each epoch, bfloat16 activations, everything on f32 and f64, when to evaluate.
"""

from configs import lmd as pretraining
from dcae_jax import diffusion_recipes, lmd_recipes, optim
from dcae_jax.config import (
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    Optimizer,
    ReportConfig,
    RunConfig,
    Schedule,
)
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.data.pipeline import DataConfig, Transform
from dcae_jax.data.sources import TfdsConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.accuracy import AccuracyConfig
from dcae_jax.models.lmd import LMDConfig
from dcae_jax.tasks.probe import Mode, ProbeConfig

IMAGES, HELD_OUT = lmd_recipes.IMAGES, 50_000  # of ImageNet, training and validation


def get_config(arg: str = "linear") -> RunConfig:
    """The run of MODE, MODE,SIZE,LATENT or MODE,mae,SIZE."""
    mode, _, rest = arg.partition(",")
    if mode not in ("linear", "finetune"):
        raise UserError(
            f"{arg!r} is neither linear nor finetune; behind it may stand SIZE,LATENT or mae,SIZE, "
            "e.g. linear,b,f8"
        )
    name, model = _model(rest or "b,f8")
    run = _linear(model) if mode == "linear" else _finetuned(model)
    run.name = f"{name} {mode}"
    train, held_out = LatentDataConfig(path="latents"), LatentDataConfig(split="validation")
    if rest.startswith("mae,"):
        train, held_out = _images("train"), _images("validation")
    run.data = train
    run.evals = [
        AccuracyConfig(data=held_out, n=HELD_OUT, batch=256, every=5 * (IMAGES // run.batch))
    ]
    return run


def _model(arg: str) -> tuple[str, LMDConfig]:
    """(name, network) of SIZE,LATENT or mae,SIZE."""
    if arg.startswith("mae,"):
        sizes = pretraining.PIXEL_SIZES
        size, _ = diffusion_recipes.choose(f"{arg.removeprefix('mae,')},mae", sizes, ["mae"])
        return f"MAE-{size.upper()}", sizes[size]()
    sizes, latents = pretraining.SIZES, pretraining.LATENTS
    size, latent = diffusion_recipes.choose(arg, sizes, latents)
    return f"LMD-{size.upper()} {latent}", sizes[size](**latents[latent])


def _linear(model: LMDConfig) -> RunConfig:
    """The head alone."""
    run = _run(batch=4096, epochs=90)
    run.task = ProbeConfig(model=model)
    run.optim = OptimConfig(
        lr=1e-3, schedule=Schedule.cosine, warmup_steps=10 * (IMAGES // run.batch)
    )
    return run


def _finetuned(model: LMDConfig) -> RunConfig:
    """Everything, the first layers least."""
    run = _run(batch=1024, epochs=50)
    run.task = ProbeConfig(
        model=model, mode=Mode.finetune, label_smoothing=0.1, mixup=0.8, cutmix=1.0
    )
    lr = 1e-3 * run.batch / 256
    run.optim = OptimConfig(
        optimizer=Optimizer.adan, lr=lr, beta1=0.98, beta2=0.92, beta3=0.99, weight_decay=0.05,
        schedule=Schedule.cosine, warmup_steps=IMAGES // run.batch, end_lr=1e-6 / lr,
        groups=optim.layer_decay_groups(model.depth, 0.65),
    )  # fmt: skip
    return run


def _run(*, batch: int, epochs: int) -> RunConfig:
    """What both have in common."""
    return RunConfig(
        steps=epochs * (IMAGES // batch), batch=batch, ema=EmaConfig(decays=()),
        checkpoint=CheckpointConfig(every=2000, keep=2), report=ReportConfig(every=100),
    )  # fmt: skip


def _images(split: str) -> DataConfig:
    train = split == "train"
    return DataConfig(
        source=TfdsConfig(name="imagenet2012"), split=split, resolution=224, flip=train,
        transform=Transform.random_resized_crop if train else Transform.center_crop,
        area=(0.08, 1.0), threads=16, workers=8 if train else 0, cache_mb=0,
    )  # fmt: skip
