"""The official DC-AE classes on a machine without GPU: the package `dc_gen` of DC-Gen.

Its folder (repository dc-ai-projects/DC-Gen, state cae2205 of July 2026) must be on PYTHONPATH; it
is no requirement of this repository.
"""

import functools
import importlib.util
import sys
import types
from typing import Any

# Our name of a network -> releases of it; the first is the one that is built.
RELEASES = {
    "f32c32-in": ("dc-ae-f32c32-in-1.0", "dc-ae-f32c32-mix-1.0", "dc-ae-f32c32-in-1.0-256px"),
    "f64c128-in": ("dc-ae-f64c128-in-1.0", "dc-ae-f64c128-mix-1.0"),
    "f128c512-in": ("dc-ae-f128c512-in-1.0", "dc-ae-f128c512-mix-1.0"),
    "f32c32-sana": ("dc-ae-f32c32-sana-1.0", "dc-ae-f32c32-sana-1.1"),
    "f32c32-lite": ("dc-ae-lite-f32c32-sana-1.1",),
    "f32c128-1.5": ("dc-ae-f32c128-1.5", "dc-ae-f32c128-1.1"),
    "f64c128-1.5": ("dc-ae-f64c128-1.5",),
}


def is_here() -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec("dc_gen") is not None


@functools.cache
def _zoo() -> Any:
    """The package's table of models, its norm in plain PyTorch.

    The released norm, trms2d, is a Triton kernel for CUDA; rms2d is its twin in the same package.
    An empty stand-in for Triton is enough to define the kernels, which are never called here;
    PyTorch would take it for the real one, so it comes after torch and diffusers and leaves again.
    """
    import diffusers  # noqa: F401

    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.jit, triton.language = (lambda function: function), language
    language.constexpr = int
    stand_in = {"triton": triton, "triton.language": language}
    sys.modules |= stand_in
    from dc_gen import ae_model_zoo
    from dc_gen.models.nn import norm

    for name in stand_in:
        del sys.modules[name]
    norm.REGISTERED_NORM_DICT["trms2d"] = norm.RMSNorm2d
    return ae_model_zoo


def build(release: str, divisor: int = 1, latent_divisor: int = 1) -> Any:
    """A release's network, all widths divided by `divisor`."""
    zoo = _zoo()
    cfg = zoo.REGISTERED_DCAE_MODEL[release][0](release, None)
    for side in (cfg.encoder, cfg.decoder):
        side.width_list = tuple(w // divisor for w in side.width_list)
        side.latent_channels //= latent_divisor
    cfg.latent_channels //= latent_divisor
    return zoo.DCAE(cfg)
