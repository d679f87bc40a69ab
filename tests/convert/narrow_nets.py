"""Narrow networks of every released kind, random weights for them, and the commands in-process."""

import importlib
import pathlib

import numpy as np
from etils import epath

from dcae_jax import tree
from dcae_jax.convert import names, to_torch
from dcae_jax.convert.names import AnyConfig, Layout
from dcae_jax.models import dcae, kl_vae

FILES = pathlib.Path(__file__).parent / "files"


def every() -> dict[str, AnyConfig]:
    """Every released kind with few narrow stages, and what a table may meet besides."""
    found: dict[str, AnyConfig] = {}
    for name, make in dcae.VARIANTS.items():
        cfg = make()
        cfg.head_dim = 4
        first = 0 if cfg.encoder.depths[0] == 0 else 1
        found[name] = dcae.narrow(
            cfg, widths=(4, 4, 8, 8), encoder_depths=(first, 1, 2, 1),
            decoder_depths=(min(cfg.decoder.depths[0], 1), 2, 1, 1), latent_channels=4,
        )  # fmt: skip
        # The attention of the released ones begins at stage 3, which is the last one here.
    plain = dcae.narrow(dcae.dc_ae_f32c32_in(), widths=(4, 4, 8), latent_channels=4)
    plain.residual, plain.latent_shortcuts = False, False
    found["no residual"] = plain
    strided = dcae.narrow(dcae.dc_ae_f32c32_in(), widths=(4, 4, 8), latent_channels=4)
    strided.downsample = dcae.Downsample.conv
    found["strided stem"] = strided
    found["kl"] = kl_vae.KLVAEConfig(widths=(4, 8, 8), norm_groups=2, layers_per_block=1)
    found["kl, bare"] = kl_vae.KLVAEConfig(
        widths=(4, 4), norm_groups=2, mid_attention=False, quant_conv=False, post_quant_conv=False
    )
    return found


def layouts_of(cfg: AnyConfig) -> list[Layout]:
    """The layouts that have names for a network."""
    both = isinstance(cfg, dcae.DCAEConfig)
    return list(names.AUTOENCODER_LAYOUTS) if both else [Layout.diffusers]


def weights(cfg: AnyConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """path -> random values; no two leaves are alike."""
    gen = np.random.default_rng(seed)
    return {
        path: gen.uniform(0.2, 1, shape).astype(np.float32)
        if path.endswith(("scale", "var"))
        else (gen.standard_normal(shape) / np.sqrt(max(np.prod(shape[:-1]), 4))).astype(np.float32)
        for path, shape in names.shapes(cfg).items()
    }


def export(cfg: AnyConfig, layout: Layout, out: pathlib.Path, **more: object) -> pathlib.Path:
    """A folder in a PyTorch layout with random weights."""
    values = {"scaling_factor": 0.5, "source": "a test"} | more
    to_torch.write(
        to_torch.Export(cfg, tree.unflatten(weights(cfg)), layout, **values), epath.Path(out)
    )
    return out


def command(name: str, *args: object) -> int:
    """Runs `python -m dcae_jax NAME` in this process."""
    return importlib.import_module(f"dcae_jax.cli.{name}").main([str(a) for a in args])


def bare(path: pathlib.Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> pathlib.Path:
    """A .safetensors file of zeros, key -> (dtype, shape), whose bytes are holes."""
    rows = [
        to_torch.Row(key, dtype, shape, lambda: np.zeros(()))
        for key, (dtype, shape) in tensors.items()
    ]
    with path.open("wb") as file:
        end = to_torch.write_header(file, rows)
        file.truncate(file.tell() + end)
    return path


def tensors_of(cfg: AnyConfig, layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    """key -> (dtype, shape) of every tensor of a network."""
    shapes = names.shapes(cfg)
    found = {
        key: ("float32", names.stored_shape(e, shapes[e.path]))
        for e in names.table(cfg, layout) for key in e.keys
    }  # fmt: skip
    return found | {key: ("int64", ()) for key in names.counters(cfg, layout)}


def safetensors_file(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Writes tensors as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {kind: name for name, (kind, _) in to_torch.DTYPES.items()}
    rows = [to_torch.Row(k, kinds[v.dtype], v.shape, lambda v=v: v) for k, v in tensors.items()]
    with path.open("wb") as file:
        to_torch.write_safetensors(file, rows)
