"""The weights that others have released: autoencoders, and diffusion models on their latents.

A scaling factor belongs to weights, not to a network: `in` and `mix` differ in nothing else.  For
the same reason a diffusion model's head count and process are told by its name alone.
"""

import difflib
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

from dcae_jax.convert.diffusion_names import DiffusionModel
from dcae_jax.convert.names import AnyConfig
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, dit, kl_vae, uvit


class Release(NamedTuple):
    """Published weights."""

    config: Callable[[], AnyConfig]
    scaling_factor: float | None  # 1 / RMS of its latents; None: not published
    hub: tuple[str, ...]  # names on the Hugging Face hub
    former: tuple[str, ...] = ()  # other names of the same weights
    official: str | None = None  # name in the official code; None: it has no such model
    alike: str = ""  # other published weights of this very network, for people


# All others are in DC-Gen (github.com/dc-ai-projects/DC-Gen, state cae2205) only.
EFFICIENTVIT = (
    "dc-ae-f32c32-in-1.0", "dc-ae-f32c32-mix-1.0", "dc-ae-f64c128-in-1.0", "dc-ae-f64c128-mix-1.0",
    "dc-ae-f128c512-in-1.0", "dc-ae-f128c512-mix-1.0", "dc-ae-f32c32-sana-1.0",
)  # fmt: skip


def _dc_ae(
    name: str, scaling_factor: float | None, owner: str = "mit-han-lab",
    on_hub: str | None = None, former: tuple[str, ...] = (), official: str | None = None,
) -> tuple[str, Release]:  # fmt: skip
    repository = f"{owner}/{on_hub or name}"
    hub = (repository, f"{repository}-diffusers")
    former = (*former, *([official] if official else []))
    return name, Release(dcae.VARIANTS[name], scaling_factor, hub, former, official or name)


RELEASES: dict[str, Release] = dict(
    (
        _dc_ae("dc-ae-f32c32-in-1.0", 0.3189),
        _dc_ae("dc-ae-f32c32-in-1.0-256px", None),
        _dc_ae("dc-ae-f32c32-mix-1.0", 0.4552),
        _dc_ae("dc-ae-f64c128-in-1.0", 0.2889),
        _dc_ae("dc-ae-f64c128-mix-1.0", 0.4538),
        _dc_ae("dc-ae-f128c512-in-1.0", 0.4883),
        _dc_ae("dc-ae-f128c512-mix-1.0", 0.3620),
        _dc_ae("dc-ae-f32c32-sana-1.0", 0.41407),
        _dc_ae("dc-ae-f32c32-sana-1.1", 0.41407),
        _dc_ae(
            "dc-ae-lite-f32c32-sana-1.1", 0.41407, "dc-ai", "dc-ae-lite-f32c32",
            former=("dc-ae-lite-f32c32", "dc-ae-turbo"),
        ),
        _dc_ae("dc-ae-f32c128-1.1", None, "dc-ai"),
        _dc_ae("dc-ae-1.5-f32c128", None, "dc-ai", official="dc-ae-f32c128-1.5"),
        _dc_ae("dc-ae-1.5-f64c128", 0.5935, "dc-ai", official="dc-ae-f64c128-1.5"),
        (
            "sd-vae-f8",
            Release(
                kl_vae.VARIANTS["sd-vae-f8"], 0.18215,
                ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"),
                alike="SDXL's VAE, scaling factor 0.13025",
            ),
        ),
    )
)  # fmt: skip


def named(name: str) -> str | None:
    """The release that has this name, now or formerly, here or on the hub; None if none has."""
    for release, what in RELEASES.items():
        if name in (release, *what.former, *what.hub):
            return release
    return None


def require(name: str) -> str:
    """The release of this name; UserError that lists all if there is none."""
    found = named(name)
    if found is None:
        close = difflib.get_close_matches(name, RELEASES, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"no release is called {name!r}; {hint}There are {', '.join(RELEASES)}")
    return found


# -------------------------------------------------------------------------------- diffusion models


class Family(enum.Enum):
    """A network with the process that its weights were trained on."""

    uvit = "uvit"  # epsilon of the scaled-linear betas
    usit = "usit"  # UViT's network, velocity of the linear path
    dit = "dit"  # epsilon and variance of the linear betas
    sit = "sit"  # DiT's network, velocity of the linear path

    @property
    def flow(self) -> bool:
        """Whether it is trained as a flow."""
        return self in (Family.usit, Family.sit)

    @property
    def twin(self) -> "Family":
        """The family whose files may look the same."""
        pairs = {Family.uvit: Family.usit, Family.dit: Family.sit}
        return (pairs | {b: a for a, b in pairs.items()})[self]


_UVITS = {
    "s": uvit.uvit_s, "m": uvit.uvit_m, "l": uvit.uvit_l, "h": uvit.uvit_h, "2b": uvit.uvit_2b,
    "3b": uvit.uvit_3b,
}  # fmt: skip
SIZES: dict[Family, dict[str, Callable[..., DiffusionModel]]] = {
    Family.uvit: _UVITS,
    Family.usit: _UVITS,
    Family.dit: {"s": dit.dit_s, "b": dit.dit_b, "l": dit.dit_l, "xl": dit.dit_xl},
    Family.sit: {"s": dit.sit_s, "b": dit.sit_b, "l": dit.sit_l, "xl": dit.sit_xl},
}


class DiffusionRelease(NamedTuple):
    """Published weights of a diffusion model, and the latents they were trained on."""

    family: Family
    size: str
    fields: dict[str, Any]  # of the network
    autoencoder: str  # a release of RELEASES
    hub: tuple[str, ...] = ()
    official: bool = False  # known to the official code by this name

    @property
    def scaling_factor(self) -> float:
        """That of the autoencoder."""
        factor = RELEASES[self.autoencoder].scaling_factor
        assert factor is not None, self.autoencoder
        return factor

    def config(self) -> DiffusionModel:
        """The network."""
        return SIZES[self.family][self.size](**self.fields)


_F32 = {"in_channels": 32, "input_size": (16, 16), "patch": 1}
_F64 = {"in_channels": 128, "input_size": (8, 8), "patch": 1}


def _on_dc_ae(
    autoencoder: str, model: str, suffix: str = "", owner: str = "mit-han-lab", prefix: str = "",
    **fields: Any,
) -> tuple[str, DiffusionRelease]:  # fmt: skip
    """One of the official ones, at 512 px."""
    family, size = model.split("-")
    name = f"{prefix or autoencoder}-{model}-in-512px{suffix}"
    latent = _F32 if "f32" in autoencoder else _F64
    return name, DiffusionRelease(
        Family(family), size, latent | fields, autoencoder, (f"{owner}/{name}",), official=True
    )


def _on_sd_vae(model: str, pixels: int, patch: int, *hub: str, **fields: Any) -> DiffusionRelease:
    family, size = model.split("-")
    latent = {"in_channels": 4, "input_size": (pixels // 8, pixels // 8), "patch": patch}
    return DiffusionRelease(Family(family), size, latent | fields, "sd-vae-f8", hub)


_IN32, _IN64, _15 = "dc-ae-f32c32-in-1.0", "dc-ae-f64c128-in-1.0", "dc-ae-1.5-f64c128"
DIFFUSION: dict[str, DiffusionRelease] = dict(
    (
        _on_dc_ae(_IN32, "dit-xl"),
        _on_dc_ae(_IN32, "dit-xl", "-trainbs1024"),
        _on_dc_ae(_IN32, "uvit-s"),
        _on_dc_ae(_IN32, "uvit-h"),
        _on_dc_ae(_IN32, "uvit-2b"),
        _on_dc_ae(_IN32, "usit-h"),
        _on_dc_ae(_IN32, "usit-2b"),
        _on_dc_ae(_IN32, "sit-xl"),
        _on_dc_ae(_IN64, "uvit-h"),
        _on_dc_ae(_IN64, "uvit-h", "-train2000k"),
        _on_dc_ae(_IN64, "uvit-2b"),
        _on_dc_ae(_IN64, "uvit-2b", "-train2000k"),
        _on_dc_ae(_15, "usit-2b", "", "dc-ai", "dc-ae-f64c128-1.5", adaptive_channels=True),
        _on_dc_ae(_15, "usit-3b", "", "dc-ai", "dc-ae-f64c128-1.5", adaptive_channels=True),
        ("DiT-XL-2-256x256", _on_sd_vae("dit-xl", 256, 2, "facebook/DiT-XL-2-256")),
        ("DiT-XL-2-512x512", _on_sd_vae("dit-xl", 512, 2, "facebook/DiT-XL-2-512")),
        ("SiT-XL-2-256x256", _on_sd_vae("sit-xl", 256, 2)),
        ("imagenet256_uvit_large", _on_sd_vae("uvit-l", 256, 2, final_conv=True)),
        ("imagenet256_uvit_huge", _on_sd_vae("uvit-h", 256, 2)),
        ("imagenet512_uvit_large", _on_sd_vae("uvit-l", 512, 4, final_conv=True)),
        ("imagenet512_uvit_huge", _on_sd_vae("uvit-h", 512, 4)),
    )
)


class Choice(NamedTuple):
    """What --variant says of a diffusion model."""

    family: Family
    size: str | None = None
    release: str | None = None


def diffusion_named(name: str) -> str | None:
    """The diffusion model released under this name; None if there is none."""
    every = DIFFUSION.items()
    return next((r for r, what in every if name == r or name in what.hub), None)


def chosen(name: str) -> Choice:
    """A release, a family ("usit") or one of its sizes ("usit-h"); UserError lists them."""
    release = diffusion_named(name)
    if release is not None:
        return Choice(DIFFUSION[release].family, DIFFUSION[release].size, release)
    family, _, size = name.partition("-")
    if family in [f.value for f in Family]:
        sizes = SIZES[Family(family)]
        if not size or size in sizes:
            return Choice(Family(family), size or None)
    sizes = {f: ", ".join(f"{f.value}-{s}" for s in every) for f, every in SIZES.items()}
    lines = "\n".join(f"  - {f.value}, {text}" for f, text in sizes.items())
    raise UserError(
        f"no diffusion model is called {name!r}; there are {', '.join(DIFFUSION)}; and of your "
        f"own:\n{lines}"
    )


def require_diffusion(name: str) -> str:
    """The diffusion model of this name; UserError that lists all if there is none."""
    found = diffusion_named(name)
    if found is None:
        raise UserError(
            f"no released diffusion model is called {name!r}; there are {', '.join(DIFFUSION)}"
        )
    return found
