"""The official diffusion models on a machine without GPU: `dc_gen` (see official.py).

They need timm, einops, torchdiffeq and scipy as well: pip install --no-deps timm einops torchdiffeq
scipy.  What their packages import without using it here (torchvision, onnx, ...) is left out.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import official

PACKAGES = ("timm", "einops", "torchdiffeq", "scipy", "omegaconf")


def is_here() -> bool:
    """Whether the package and all that it needs can be imported."""
    return official.is_here() and all(importlib.util.find_spec(p) for p in PACKAGES)


class _Nothing(type):
    """Stands for whatever is asked of torchvision while timm defines its layers."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for torchvision, which has to fit PyTorch and is not needed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """A package of any name below torchvision."""
        ours = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: Any) -> types.ModuleType:
        """Without content."""
        module = types.ModuleType(spec.name)
        module.__getattr__ = functools.partial(getattr, _Nothing("Nothing", (), {}))
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def _bare(name: str) -> None:
    """A package whose modules can be imported without its __init__.py."""
    package = types.ModuleType(name)
    package.__path__ = list(importlib.util.find_spec(name).submodule_search_locations)
    sys.modules[name] = package


def _timm() -> None:
    """timm's layers, under the name where dc_gen looks for them."""
    finder = _Torchvision()
    sys.meta_path.insert(0, finder)
    _bare("timm")
    layers = importlib.import_module("timm.layers")
    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    models = types.ModuleType("timm.models.vision_transformer")
    models.Mlp, models.Attention = layers.Mlp, layers.Attention
    sys.modules |= {"timm.models": types.ModuleType("timm.models"), models.__name__: models}


@functools.cache
def module(name: str) -> Any:
    """A module of dc_gen.c2icore.diffusioncore.models."""
    official._zoo()
    if "timm" not in sys.modules:
        _timm()
        _bare("dc_gen.apps.utils")
    return importlib.import_module(f"dc_gen.c2icore.diffusioncore.models.{name}")


def build(family: str, **fields: Any) -> Any:
    """UViT or DiT as the official code builds it; its samplers are asked for by `module`."""
    flow = "SiTSampler" if family in ("usit", "sit") else "GaussianDiffusion"
    more = {"train_scheduler": flow, "eval_scheduler": "GaussianDiffusion"}
    if family in ("dit", "sit"):
        found = module("dit")
        return found.DiT(found.DiTConfig(**fields, **more, learn_sigma=family == "dit"))
    found = module("uvit")
    return found.UViT(found.UViTConfig(**fields, **more))
