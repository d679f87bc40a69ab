"""Writes a masked autoencoder as transformers' folder, with what is needed to check it there.

Tensors are streamed layer by layer.  config.json comes last: a folder without it is incomplete.
"""

import copy
import json
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dcae_jax import masking, tree
from dcae_jax.convert import diffusion_to_torch, folder, mae_layouts, mae_names
from dcae_jax.convert.folder import CONFIG
from dcae_jax.convert.mae_layouts import CLASSES, Described
from dcae_jax.convert.names import Layout
from dcae_jax.convert.to_torch import FILES, PARITY, README, TOLERANCE, WEIGHTS, write_safetensors
from dcae_jax.errors import UserError
from dcae_jax.masking import Split
from dcae_jax.models.layers import Dtype
from dcae_jax.models.lmd import LMD, LMDConfig
from dcae_jax.models.transformer import AttentionKernel
from dcae_jax.tree import Tree

LAYOUTS = tuple(CLASSES)
WEIGHTS_FILE = WEIGHTS[Layout.official]


@dataclass(frozen=True)
class ExportMasked:
    """What is written, and how."""

    described: Described  # all of it known
    variables: Tree  # f32; the leaves may lie on devices
    layout: Layout
    source: str  # for people: which weights these are
    pixels: bool  # what the network sees: images, or latents
    dtypes: dict[str, str] = field(default_factory=dict)  # of the tensors that are not float32
    dtype: str | None = None  # of every tensor, instead of `dtypes`

    @property
    def cfg(self) -> LMDConfig:
        """The network."""
        return self.described.cfg

    @property
    def keep(self) -> int:
        """How many tokens transformers leaves visible."""
        return int(self.cfg.tokens * (1 - self.described.mask_ratio))

    def dtype_of(self, key: str) -> str:
        """The dtype in which a tensor is written."""
        return self.dtype or (self.dtypes[key] if key in self.dtypes else "float32")


def write(export: ExportMasked, out: epath.Path) -> None:
    """Writes a new folder; UserError, before anything is written, if it cannot hold this network.

    A command that has work to do before holds `folder.filling` around it, and calls `fill`.
    """
    with folder.filling(out, FILES):
        fill(export, out)


def check(export: ExportMasked) -> None:
    """UserError if the layout cannot express the network."""
    found = mae_layouts.problems(export.cfg)
    if not found and not 1 <= export.keep < export.cfg.tokens:
        found = [
            f"a mask of {export.described.mask_ratio:g} leaves {export.keep} of "
            f"{export.cfg.tokens} tokens visible there"
        ]
    if found:
        lines = "\n".join(f"  - {p}" for p in found)
        raise UserError(f"the {export.layout.value} layout cannot express this network:\n{lines}")


def fill(export: ExportMasked, out: epath.Path) -> None:
    """Writes the files, config.json last."""
    check(export)
    fields = mae_layouts.write(export.described, export.layout)
    entries = mae_names.table(export.cfg, export.layout)
    whole = tree.flatten(export.variables)
    leaves = diffusion_to_torch.rounded(entries, whole, export.dtype_of)
    fixed = mae_names.constants(export.cfg, export.layout)
    tensors = diffusion_to_torch.rows(entries, leaves, fixed, export.dtype_of)
    folder.require_room(out, sum(row.bytes for row in tensors))
    inputs = example(export.cfg)
    parity = inputs | run(export.cfg, tree.unflatten({**whole, **leaves}), inputs, export.keep)
    if "decoder" not in mae_names.sides(export.layout):
        del parity["output"]
    with folder.writing(out):
        with (out / WEIGHTS_FILE).open("wb") as file:
            write_safetensors(file, tensors)
        with (out / PARITY).open("wb") as file:
            np.savez(file, **parity)
        (out / README).write_text(_readme(export))
        (out / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


# ----------------------------------------------------------------------------------------- parity


def example(cfg: LMDConfig) -> dict[str, np.ndarray]:
    """{"x", "noise"}: two images of noise, a number for each token; the smallest are visible."""
    gen = np.random.default_rng(0)
    shapes = {"x": (2, *cfg.input_size, cfg.in_channels), "noise": (2, cfg.tokens)}
    return {key: gen.standard_normal(shape, np.float32) for key, shape in shapes.items()}


def run(
    cfg: LMDConfig, variables: Tree, inputs: dict[str, np.ndarray], keep: int
) -> dict[str, np.ndarray]:
    """{"encoded", "output"} for `example`'s inputs, all float32 throughout."""
    cfg = copy.deepcopy(cfg)
    cfg.dtype, cfg.attention = Dtype.float32, AttentionKernel.xla
    net = cfg.build()

    def both(net: LMD, x: jax.Array, split: Split) -> dict[str, Any]:
        encoded = net.encode(x, split)
        return {"encoded": encoded, "output": net.decode(encoded, split)}

    # It runs once: on a CPU compiling it well would take longer than running it.
    plainly = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    apply = jax.jit(
        lambda variables, x, split: net.apply(variables, x, split, method=both),
        compiler_options=plainly,
    )
    order = jnp.argsort(jnp.asarray(inputs["noise"]), axis=1)
    with jax.default_matmul_precision("highest"):
        found = apply(variables, jnp.asarray(inputs["x"]), masking.split(order, keep))
    return {key: np.asarray(value) for key, value in found.items()}


# ----------------------------------------------------------------------------------------- readme


def _readme(export: ExportMasked) -> str:
    cfg, said = export.cfg, export.described
    height, width = cfg.input_size
    what = "images" if export.pixels else "latents"
    targets = "whitened tokens" if said.norm_target else "tokens"
    name = CLASSES[export.layout]
    key = "last_hidden_state" if export.layout is Layout.vit_mae_encoder else "logits"
    stored = "encoded" if export.layout is Layout.vit_mae_encoder else "output"
    lines = [
        f"# Masked autoencoder, transformers' {name}",
        "",
        f"Weights: {export.source}. Written by dcae_jax.",
        f"Input: {what} of {height} x {width} x {cfg.in_channels}, "
        + (
            "in [0, 1], less ImageNet's mean and divided by its deviation."
            if export.pixels
            else "normalised as in the training; which autoencoder's, this layout cannot say."
        ),
        f"Encoder: {cfg.depth} blocks of width {cfg.width}, {cfg.heads} heads, patches of "
        f"{cfg.patch}. A mask of {said.mask_ratio:g}; targets are {targets}.",
        f"layer_norm_eps is {cfg.norm_eps:g}, with which the network was used here; other values, "
        "transformers' default 1e-12 among them, compute something else.",
        "",
        f"`{PARITY}` holds two inputs x (batch, height, width, channels), noise that says which "
        f"tokens are visible, and the {stored} tokens as computed in JAX in float32. In PyTorch "
        f"on a CPU the relative error is below {TOLERANCE:g}:",
        "",
        "```python",
        "# pip install torch transformers",
        "import numpy as np",
        "import torch",
        f"from transformers import {name}",
        "",
        f'net = {name}.from_pretrained(".", dtype=torch.float32).eval()',
        f'ours = {{k: torch.tensor(v) for k, v in np.load("{PARITY}").items()}}',
        "with torch.no_grad():",
        f'    found = net(ours["x"].permute(0, 3, 1, 2), noise=ours["noise"]).{key}',
        f'error = (found - ours["{stored}"]).abs().max() / ours["{stored}"].abs().max()',
        'print(f"relative error {error:.2e}")',
        "```",
    ]
    return "\n".join(lines) + "\n"
