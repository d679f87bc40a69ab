"""Runs an exported folder in PyTorch and compares it with what JAX computed."""

import importlib.util
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dcae_jax import store
from dcae_jax.convert import (
    diffusion_layouts,
    diffusion_names,
    layouts,
    mae_layouts,
    names,
    to_torch,
)
from dcae_jax.convert.diffusion_names import OFFICIAL_PREFIX, DiffusionModel
from dcae_jax.convert.diffusion_to_torch import ExportDiffusion, weights_file
from dcae_jax.convert.names import AnyConfig, Layout
from dcae_jax.convert.to_torch import TOLERANCE
from dcae_jax.errors import UserError
from dcae_jax.models.dit import EPS, DiTConfig
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.nets.torch_file import open_tensors

INSTALL = "pip install torch diffusers (CPU builds do)"


class Errors(NamedTuple):
    """Largest differences, relative to the largest value."""

    latent: float
    reconstruction: float


def missing(packages: tuple[str, ...] = ("torch", "diffusers")) -> str:
    """What is not installed; "" if all is there."""
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    return " and ".join(absent) + (" is" if len(absent) == 1 else " are" if absent else "")


def problem(cfg: AnyConfig, out: epath.Path) -> str:
    """Why an export of this network to `out` cannot be verified here; "" if it can."""
    if absent := missing():
        return f"{absent} not installed: {INSTALL}"
    if store.is_store(out):
        return f"{out} is not a local folder, which PyTorch reads alone"
    found = layouts.problems(cfg, Layout.diffusers)
    return f"diffusers has no such network ({found[0]})" if found else ""


def verify(folder: epath.Path, cfg: AnyConfig, layout: Layout) -> Errors:
    """Loads the folder with diffusers and runs it on a CPU in float32."""
    import diffusers
    import torch

    name = "AutoencoderKL" if isinstance(cfg, KLVAEConfig) else "AutoencoderDC"
    cls = getattr(diffusers, name)
    if layout is Layout.diffusers:
        ae = cls.from_pretrained(str(folder), torch_dtype=torch.float32, low_cpu_mem_usage=False)
    else:
        ae = cls.from_config(layouts.write(cfg, Layout.diffusers, 1.0, None))
        ae.load_state_dict(_translated(folder, cfg, torch))
    ae.eval()
    with np.load(str(folder / to_torch.PARITY)) as stored:
        ours = {k: torch.tensor(v).permute(0, 3, 1, 2) for k, v in stored.items()}
    with torch.no_grad():
        encoded = ae.encode(ours["input"])
        latent = encoded.latent_dist.mode() if name == "AutoencoderKL" else encoded.latent
        output = ae.decode(ours["latent"]).sample
    return Errors(_relative(latent, ours["latent"]), _relative(output, ours["reconstruction"]))


def check(folder: epath.Path, errors: Errors) -> None:
    """UserError if PyTorch and JAX disagree."""
    if not all(error <= TOLERANCE for error in errors):  # NaN is none
        raise UserError(
            f"{folder} was written, but PyTorch's results differ from JAX's by more than "
            f"{TOLERANCE:g}: latent {errors.latent:.2e}, reconstruction "
            f"{errors.reconstruction:.2e}; do not use it"
        )


def _relative(a: Any, b: Any) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _translated(folder: epath.Path, cfg: AnyConfig, torch: Any) -> dict[str, Any]:
    """The state dict of an official-layout folder under diffusers' names."""
    found = {}
    pairs = zip(names.table(cfg, Layout.official), names.table(cfg, Layout.diffusers), strict=True)
    with open_tensors(folder / to_torch.WEIGHTS[Layout.official]) as file:
        for theirs, ours in pairs:
            leaf = names.from_torch(theirs, [file.read(key) for key in theirs.keys])
            tensors = names.to_torch(ours, leaf)
            found |= {
                key: torch.tensor(np.ascontiguousarray(t))
                for key, t in zip(ours.keys, tensors, strict=True)
            }
    counts = {key: torch.tensor(0) for key in names.counters(cfg, Layout.diffusers)}
    return found | counts


# -------------------------------------------------------------------------------- diffusion models


def diffusion_problem(cfg: DiffusionModel, out: epath.Path) -> str:
    """Why an export of a denoising network cannot be verified here; "" if it can."""
    if not isinstance(cfg, DiTConfig):
        return "no PyTorch package has U-ViT's network"
    if absent := missing():
        return f"{absent} not installed: {INSTALL}"
    if store.is_store(out):
        return f"{out} is not a local folder, which PyTorch reads alone"
    found = diffusion_layouts.problems(cfg, Layout.diffusers)
    return f"diffusers has no such network ({found[0]})" if found else ""


def verify_diffusion(folder: epath.Path, export: ExportDiffusion) -> float:
    """The relative error of diffusers' DiT with the folder's weights on a CPU in float32."""
    import torch
    from diffusers import DiTTransformer2DModel

    cfg, layout = export.cfg, export.layout
    if layout is Layout.diffusers:
        net = DiTTransformer2DModel.from_pretrained(
            str(folder), torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    else:
        fields = diffusion_layouts.write(export.described, Layout.diffusers) | {"norm_eps": EPS}
        net = DiTTransformer2DModel.from_config(fields)
        net.load_state_dict(_diffusion_state(folder, cfg, layout, torch))
        for block in net.transformer_blocks:  # no config there can set the original's frequencies
            block.norm1.emb.time_proj.downscale_freq_shift = cfg.time_shift
    net.eval()
    with np.load(str(folder / to_torch.PARITY)) as stored:
        ours = {k: torch.tensor(v) for k, v in stored.items()}
    with torch.no_grad():
        output = net(ours["x"].permute(0, 3, 1, 2), ours["t"], ours["label"].long()).sample
    return _relative(output, ours["output"].permute(0, 3, 1, 2))


def check_diffusion(folder: epath.Path, error: float) -> None:
    """UserError if PyTorch and JAX disagree."""
    if not error <= TOLERANCE:  # NaN is not
        raise UserError(
            f"{folder} was written, but PyTorch's results differ from JAX's by {error:.2e}, more "
            f"than {TOLERANCE:g}; do not use it"
        )


def _diffusion_state(
    folder: epath.Path, cfg: DiffusionModel, layout: Layout, torch: Any
) -> dict[str, Any]:
    """The state dict of a folder under diffusers' names."""
    prefix, found = OFFICIAL_PREFIX if layout is Layout.official else "", {}
    shapes, tables = diffusion_names.shapes(cfg), (layout, Layout.diffusers)
    pairs = zip(*(diffusion_names.table(cfg, each) for each in tables), strict=True)
    with open_tensors(folder / weights_file(layout)) as file:
        for theirs, ours in pairs:
            leaf = names.assembled(theirs, shapes[ours.path], lambda k: file.read(prefix + k))
            found |= {
                key: torch.tensor(np.ascontiguousarray(t))
                for key, t in zip(ours.keys, names.to_torch(ours, leaf), strict=True)
            }
    return found


# ---------------------------------------------------------------------------- masked autoencoders


def masked_problem(out: epath.Path) -> str:
    """Why an export of a masked autoencoder cannot be verified here; "" if it can."""
    if absent := missing(("torch", "transformers")):
        return f"{absent} not installed: pip install torch transformers (CPU builds do)"
    return f"{out} is not a local folder, which PyTorch reads alone" if store.is_store(out) else ""


def verify_masked(folder: epath.Path, layout: Layout) -> float:
    """The relative error of transformers' network with the folder's weights on a CPU in float32."""
    import torch
    import transformers

    cls = getattr(transformers, mae_layouts.CLASSES[layout])
    net, loading = cls.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    # Tensors that it does not find it draws at random, with a warning at most.
    if lost := [key for kind in ("missing_keys", "unexpected_keys") for key in loading[kind]]:
        raise UserError(f"{folder}: transformers does not pair {', '.join(sorted(lost)[:5])}")
    with np.load(str(folder / to_torch.PARITY)) as stored:
        ours = {k: torch.tensor(v) for k, v in stored.items()}
    with torch.no_grad():
        found = net.eval()(ours["x"].permute(0, 3, 1, 2), noise=ours["noise"])
    if layout is Layout.vit_mae_encoder:
        return _relative(found.last_hidden_state, ours["encoded"])
    return _relative(found.logits, ours["output"])
