"""The autoencoders that others have released: their networks, scaling factors and hub names.

A scaling factor belongs to weights, not to a network: `in` and `mix` differ in nothing else.
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

from dcae_jax.convert.names import AnyConfig
from dcae_jax.errors import UserError
from dcae_jax.models import dcae, kl_vae


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
