"""Recipes of masking diffusion: published methods as values of one loss, and a curriculum.

Each gives the stages of a MaskDiffuseConfig and the fields of the network that go with them.  Of a
published method they take what is masked, when, and the weights of the losses; the network, the
process and the optimizer are those of UViT on DC-AE latents, so they are "like" it and not it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dcae_jax import diffusion_recipes
from dcae_jax.config import RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.errors import UserError
from dcae_jax.evals.masked import MaskedConfig
from dcae_jax.masking import MaskConfig, MaskKind, Rounding
from dcae_jax.models.md_uvit import Fill, MDUViTConfig
from dcae_jax.tasks.mask_diffuse import (
    MaskDiffuseConfig,
    RecTarget,
    RecWeight,
    StageConfig,
)

PLAIN = {"k_out": 0, "recon_head": False}  # no parameter that a UViT does not have


class Recipe(NamedTuple):
    """What a method sets."""

    stages: list[StageConfig]
    model: dict[str, Any]  # fields of MDUViTConfig
    task: dict[str, Any]  # fields of MaskDiffuseConfig
    milestones: tuple[tuple[float, float], ...] = ()  # of the learning rate


# Of DC-AE 1.5's augmented diffusion, as those of the structured latents of configs/dcae_f64c128.py.
CHANNELS = (16, 32, 64)


def constant(ratio: float) -> MaskConfig:
    """The same share throughout."""
    return MaskConfig(kind=MaskKind.constant, end=ratio, rounding=Rounding.exact)


def channels() -> Recipe:
    """The augmented diffusion of DC-AE 1.5 (arXiv 2508.00413): nothing masked, channels are.

    Each step also predicts the noise of the first c channels alone, with one c of 16, 32 and 64,
    as many as there are below all; it is for structured latents, whose first channels say most.
    Stated there: the objective.  Chosen here: the counts, that one is drawn for a batch, weight 1.
    """
    return Recipe(
        [StageConfig()], {**PLAIN, "adaptive_channels": True}, {"channel_counts": CHANNELS}
    )


def curriculum() -> Recipe:
    """Reconstruct, then both, then unmask (proposed here; to be tried at equal FLOPs).

    The mask grows where the network reconstructs, as LMD's does, and is gone at the end, as in all
    masked diffusion; every tenth step of the last stage keeps the reconstruction alive.
    """
    stages = [
        StageConfig(until=0.15, clean=1.0, diffusion=0.0, reconstruction=1.0, mask=MaskConfig()),
        StageConfig(until=0.85, clean=0.1, reconstruction=0.1, mask=constant(0.5)),
        StageConfig(rehearse_every=10, rehearse_ratio=0.5),
    ]
    return Recipe(stages, {}, {}, milestones=((0.85, 0.5),))


def diffusion() -> Recipe:
    """Nothing masked: the UViT of configs/paper_uvit.py, bit for bit."""
    return Recipe([StageConfig()], PLAIN, {})


def lmd() -> Recipe:
    """LMD (arXiv 2312.07971) with this network: nothing noisy, a mask that grows from .15 to .75.

    Targets are latents, which can be decoded; LMD's code whitens each token
    (rec_target=whitened).
    """
    return Recipe(
        [StageConfig(clean=1.0, diffusion=0.0, reconstruction=1.0, mask=MaskConfig())], {}, {}
    )


def mae() -> Recipe:
    """MAE (arXiv 2111.06377) on latents: three quarters masked, whitened targets."""
    stage = StageConfig(clean=1.0, diffusion=0.0, reconstruction=1.0, mask=constant(0.75))
    return Recipe([stage], {}, {"rec_target": RecTarget.whitened})


def maskdit() -> Recipe:
    """MaskDiT (arXiv 2306.09305): half masked; the last twentieth unmasked at half the rate.

    Its targets are whitened noisy latents; here they are latents, which can be decoded
    (rec_target=noised_whitened is faithful).
    """
    stages = [StageConfig(until=0.95, reconstruction=0.1, mask=constant(0.5)), StageConfig()]
    return Recipe(stages, {}, {"rec_weight": RecWeight.one}, milestones=((0.95, 0.5),))


def maskdm() -> Recipe:
    """MaskDM (arXiv 2306.11363): 90 % masked in squares of 4 x 4, then unmasked.

    Visible tokens are whole squares: of 16 x 16 tokens two, 87.5 % masked; of 8 x 8 one, 75 %.
    Chosen here: that the last fifth of the steps is unmasked.
    """
    return Recipe([StageConfig(until=0.8, mask=constant(0.9), block=4), StageConfig()], PLAIN, {})


def microdit() -> Recipe:
    """MicroDiT (arXiv 2407.15811): full blocks first, then 75 % masked; 1/10 of it unmasked.

    Its mixer before the mask is a small network of its own; here it is the first blocks, 4 of them
    (UViT-H has 29).
    """
    stages = [StageConfig(until=0.9, mask=constant(0.75)), StageConfig()]
    return Recipe(stages, {**PLAIN, "k_in": 4}, {})


def tread() -> Recipe:
    """TREAD (arXiv 2501.04765): half of the tokens skip the blocks in between; loss on all."""
    model = {"k_in": 2, "k_out": 2, "fill": Fill.carry, "recon_head": False}
    return Recipe([StageConfig(mask=constant(0.5))], model, {})


RECIPES: dict[str, Callable[[], Recipe]] = {
    "channels": channels, "curriculum": curriculum, "diffusion": diffusion, "lmd": lmd, "mae": mae,
    "maskdit": maskdit, "maskdm": maskdm, "microdit": microdit, "tread": tread,
}  # fmt: skip


def choose(arg: str, sizes: dict[str, Any]) -> tuple[str, str, str]:
    """(size, latent, recipe) of "h,f32,maskdit"; UserError names those there are."""
    *base, name = arg.split(",")
    if len(base) != 2 or name not in RECIPES:
        raise UserError(
            f"{arg!r} is not SIZE,LATENT,RECIPE: sizes are {', '.join(sizes)}, latents "
            f"{', '.join(diffusion_recipes.LATENTS)}, recipes {', '.join(RECIPES)}"
        )
    return *diffusion_recipes.choose(",".join(base), sizes, diffusion_recipes.LATENTS), name


def run(model: MDUViTConfig, name: str, recipe: Recipe) -> RunConfig:
    """UViT's run with the stages of a recipe; `model` has its fields already.

    Evaluators are those that the recipe trains something for.
    """
    made = diffusion_recipes.uvit(model, name)
    made.task = MaskDiffuseConfig(model=model, stages=recipe.stages, **recipe.task)
    if counts := made.task.channel_counts:
        made.task.channel_counts = tuple(c for c in counts if c < model.in_channels)
        if not made.task.channel_counts:
            raise UserError(
                f"the recipe is for latents of more than {min(counts)} channels, and these have "
                f"{model.in_channels}; use f32 or f64"
            )
    made.optim.milestones = recipe.milestones
    made.evals = made.evals if any(s.diffusion for s in recipe.stages) else []
    if model.recon_head and made.task.rec_target is RecTarget.latent:
        held_out = LatentDataConfig(split="validation", flip=False)
        made.evals.append(MaskedConfig(data=held_out, n=10_000, batch=256, every=20_000))
    return made
