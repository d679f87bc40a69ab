"""Writes a denoising network as a folder in a PyTorch layout, with what is needed to check it.

Tensors are streamed layer by layer.  config.json comes last: a folder without it is incomplete.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dcae_jax import tree
from dcae_jax.convert import diffusion_layouts, diffusion_names, folder, names, releases
from dcae_jax.convert.diffusion_layouts import Described
from dcae_jax.convert.diffusion_names import OFFICIAL_PREFIX, DiffusionModel
from dcae_jax.convert.folder import CONFIG
from dcae_jax.convert.names import Entry, Layout
from dcae_jax.convert.releases import Family
from dcae_jax.convert.to_torch import (
    DTYPES,
    FILES,
    PARITY,
    README,
    TOLERANCE,
    WEIGHTS,
    Row,
    write_safetensors,
)
from dcae_jax.errors import UserError
from dcae_jax.models.dit import DiTConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.models.transformer import AttentionKernel
from dcae_jax.models.uvit import UViTConfig
from dcae_jax.tree import Tree

PROCESS = {
    Family.uvit: "epsilon of the scaled-linear betas, network time 1..1000",
    Family.usit: "velocity of the linear path (data - noise), network time 0 (noise) .. 1 (data)",
    Family.dit: "epsilon and variance of the linear betas, network time 0..999",
    Family.sit: "velocity of the linear path (data - noise), network time 0 (noise) .. 1 (data)",
}


@dataclass(frozen=True)
class ExportDiffusion:
    """What is written, and how."""

    described: Described
    variables: Tree  # f32; the leaves may lie on devices
    layout: Layout
    source: str  # for people: which weights these are
    dtypes: dict[str, str] = field(default_factory=dict)  # of the tensors that are not float32
    dtype: str | None = None  # of every tensor, instead of `dtypes`
    unchanged: bool = False  # the weights are those of an import
    variant: str | None = None  # a release with this network, whose name the official layout gets
    other_times: bool = False  # diffusers' time frequencies, and not those of the training

    @property
    def network(self) -> str | None:
        """The release whose name the official config.json gets; None: the code has no such name."""
        name = self.variant or self.described.release
        return name if name and releases.DIFFUSION[name].official else None

    @property
    def cfg(self) -> DiffusionModel:
        """The network as the layout's code computes it."""
        return self.described.cfg

    def dtype_of(self, key: str) -> str:
        """The dtype in which a tensor is written."""
        return self.dtype or (self.dtypes[key] if key in self.dtypes else "float32")


def weights_file(layout: Layout) -> str:
    """The name of the file of weights."""
    return WEIGHTS[Layout.diffusers if layout is Layout.diffusers else Layout.official]


def write(export: ExportDiffusion, out: epath.Path) -> None:
    """Writes a new folder; UserError, before anything is written, if it cannot hold this network.

    A command that has work to do before holds `folder.filling` around it, and calls `fill`.
    """
    with folder.filling(out, FILES):
        fill(export, out)


def fill(export: ExportDiffusion, out: epath.Path) -> None:
    """Writes the files, config.json last."""
    check(export)
    fields = diffusion_layouts.write(export.described, export.layout, export.network)
    entries = diffusion_names.table(export.cfg, export.layout)
    leaves = rounded(entries, tree.flatten(export.variables), export.dtype_of)
    fixed = diffusion_names.constants(export.cfg, export.layout)
    prefix = OFFICIAL_PREFIX if export.layout is Layout.official else ""
    tensors = rows(entries, leaves, fixed, export.dtype_of, prefix)
    folder.require_room(out, sum(row.bytes for row in tensors))
    inputs = example(export.cfg, export.described.family)
    parity = inputs | {"output": run(export.cfg, tree.unflatten(leaves), inputs)}
    with folder.writing(out):
        with (out / weights_file(export.layout)).open("wb") as file:
            write_safetensors(file, tensors)
        with (out / PARITY).open("wb") as file:
            np.savez(file, **parity)
        (out / README).write_text(_readme(export, parity))
        (out / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def check(export: ExportDiffusion) -> None:
    """UserError if the layout cannot express the network."""
    layout = export.layout
    if found := diffusion_layouts.problems(export.cfg, layout):
        lines = "\n".join(f"  - {p}" for p in found)
        raise UserError(f"the {layout.value} layout cannot express this network:\n{lines}")
    cfg = export.cfg
    if layout is Layout.diffusers and isinstance(cfg, DiTConfig) and cfg.time_shift != 1:
        raise UserError(
            "diffusers' DiT divides the exponents of its time frequencies by 127 and this network "
            "was trained with 128, which no config there can set: the same weights would compute "
            "something else. Export it --to dit, or give --diffusers-times to write it all the "
            "same: parity.npz then holds what it computes there"
        )


# ---------------------------------------------------------------------------------------- tensors


def rows(
    entries: Sequence[Entry], leaves: Mapping[str, Any], fixed: Mapping[str, np.ndarray],
    dtype_of: Callable[[str], str], prefix: str = "",
) -> list[Row]:  # fmt: skip
    """What is written: the tensors of a table, and those that the network computes (`fixed`)."""
    found = []
    for entry in entries:
        leaf = leaves[entry.path]
        shape = names.stored_shape(entry, leaf.shape)
        for i, part in enumerate(entry.parts()):
            layer = i if entry.layers else None
            found += [
                Row(prefix + key, dtype_of(key), shape, _reader(part, leaf, layer, j))
                for j, key in enumerate(part.keys)
            ]
    for key, value in fixed.items():
        found.append(Row(prefix + key, dtype_of(key), value.shape, lambda v=value: v))
    return found


def _reader(part: Entry, leaf: Any, layer: int | None, index: int) -> Any:
    """Fetches one layer at a time."""
    return lambda: names.to_torch(part, np.asarray(leaf if layer is None else leaf[layer]))[index]


def rounded(
    entries: Sequence[Entry], leaves: Mapping[str, Any], dtype_of: Callable[[str], str]
) -> dict[str, Any]:
    """The values as they are after reading them again: rounded where a tensor is not float32."""
    return {e.path: _kept(e, leaves[e.path], dtype_of) for e in entries}


def _kept(entry: Entry, leaf: Any, dtype_of: Callable[[str], str]) -> Any:
    if all(dtype_of(key) == "float32" for key in entry.keys):
        return leaf
    tensors = dict(zip(entry.keys, names.to_torch(entry, np.asarray(leaf)), strict=True))

    def read(key: str) -> np.ndarray:
        dtype = DTYPES[dtype_of(key)][0]
        with np.errstate(over="ignore"):
            kept = tensors[key].astype(dtype)
        names.check_held(entry, tensors[key], kept)
        return kept

    return jax.device_put(names.assembled(entry, leaf.shape, read))


# ----------------------------------------------------------------------------------------- parity


def example(cfg: DiffusionModel, family: Family) -> dict[str, np.ndarray]:
    """{"x", "t", "label"}: two latents of noise, a class and no class, the network's own times."""
    gen = np.random.default_rng(0)
    x = gen.standard_normal((2, *cfg.input_size, cfg.in_channels), np.float32)
    times = (0.25, 0.875) if family.flow else (31.0, 742.0)
    labels = (cfg.num_classes // 2, cfg.num_classes)
    return {"x": x, "t": np.array(times, np.float32), "label": np.array(labels, np.int32)}


def run(cfg: DiffusionModel, variables: Tree, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The output for `example`'s inputs, all float32 throughout."""
    cfg = copy.deepcopy(cfg)
    cfg.dtype, cfg.attention = Dtype.float32, AttentionKernel.xla
    # It runs once: on a CPU compiling it well would take longer than running it.
    plainly = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    apply = jax.jit(cfg.build().apply, compiler_options=plainly)
    x, t, label = (jnp.asarray(inputs[key]) for key in ("x", "t", "label"))
    with jax.default_matmul_precision("highest"):
        return np.asarray(apply(variables, x, t, {"label": label}))


def cost_of_times(export: ExportDiffusion) -> float:
    """How much diffusers' time frequencies change a DiT's output, of the largest value."""
    cfg = copy.deepcopy(export.cfg)
    assert isinstance(cfg, DiTConfig)
    inputs, found = example(cfg, export.described.family), []
    for cfg.time_shift in (0, 1):
        found.append(run(cfg, export.variables, inputs))
    return float(np.abs(found[1] - found[0]).max() / np.abs(found[0]).max())


# ----------------------------------------------------------------------------------------- readme


def _readme(export: ExportDiffusion, parity: dict[str, np.ndarray]) -> str:
    cfg, said = export.cfg, export.described
    height, width, channels = parity["x"].shape[1:]
    latents = f"{height} x {width} x {channels}"
    scale = "unknown" if said.scaling_factor is None else f"{said.scaling_factor:g}"
    lines = [
        f"# {said.family.value}, {export.layout.value} layout",
        "",
        f"Weights: {_whose(export)}. Written by dcae_jax.",
        f"Process: {PROCESS[said.family]}; class {cfg.num_classes} means no class.",
        f"Latents: {latents}, of {said.autoencoder or 'an autoencoder that is not recorded'}, "
        f"times the scaling factor {scale}.",
        f"Depth {cfg.depth}, width {cfg.width}, {cfg.heads} heads, patches of {cfg.patch}.",
        *_times(export),
        "",
        f"`{PARITY}` holds two latents x (batch, height, width, channels), times t, labels and the "
        "output, as computed in JAX in float32. In PyTorch on a CPU the relative error is below "
        f"{TOLERANCE:g}:",
        "",
        "```python",
        *_LINES[export.layout if isinstance(cfg, DiTConfig) else Layout.u_vit](export),
        *_COMPARE,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _whose(export: ExportDiffusion) -> str:
    """Whose weights these are, as far as that is known."""
    release = export.described.release
    rounded = f", rounded to {export.dtype}" if export.dtype not in (None, "float32") else ""
    if release is not None:
        found = f"those of {release}, unchanged"
    elif export.unchanged:
        found = "imported and unchanged; of which release, if of any, is not known"
    else:
        found = "trained with dcae_jax"
    if export.layout is Layout.official and export.network not in (None, release):
        return f"{found}{rounded}; not those of {export.network}, which has the same network"
    return found + rounded


def _times(export: ExportDiffusion) -> list[str]:
    if not export.other_times:
        return []
    return [
        "The weights were trained with other time frequencies than diffusers gives them: its "
        f"outputs, and those in `{PARITY}`, are not those of the training."
    ]


def _diffusers_lines(export: ExportDiffusion) -> list[str]:
    return [
        "# pip install torch diffusers",
        "import numpy as np",
        "import torch",
        "from diffusers import DiTTransformer2DModel",
        "",
        'net = DiTTransformer2DModel.from_pretrained(".", torch_dtype=torch.float32).eval()',
        "denoise = lambda x, t, y: net(x, t, y).sample",
    ]


def _dit_lines(export: ExportDiffusion) -> list[str]:
    cfg = export.cfg
    sizes = (
        f"input_size={cfg.input_size[0]}, patch_size={cfg.patch}, in_channels={cfg.in_channels}, "
        f"hidden_size={cfg.width}, depth={cfg.depth}, num_heads={cfg.heads}, "
        f"mlp_ratio={cfg.mlp_ratio:g}, num_classes={cfg.num_classes}, "
        f"learn_sigma={cfg.out_factor == 2}"
    )
    name = "DiT" if export.described.family is Family.dit else "SiT"
    code = "github.com/facebookresearch/DiT" if name == "DiT" else "github.com/willisma/SiT"
    return [
        f"# pip install torch timm; models.py of {code}",
        *_HEAD,
        f"from models import {name}",
        "",
        f"net = {name}({sizes}).eval()",
        *_state(export),
        "denoise = net",
    ]


def _uvit_lines(export: ExportDiffusion) -> list[str]:
    cfg = export.cfg
    sizes = (
        f"img_size={cfg.input_size[0]}, patch_size={cfg.patch}, in_chans={cfg.in_channels}, "
        f"embed_dim={cfg.width}, depth={cfg.depth}, num_heads={cfg.heads}, "
        f"mlp_ratio={cfg.mlp_ratio:g}, qkv_bias={cfg.qkv_bias}, "
        f"num_classes={cfg.num_classes + 1}, conv={isinstance(cfg, UViTConfig) and cfg.final_conv}"
    )
    long, short = "label_emb.embedding_table", "label_emb"
    rename = f'state = {{k.replace("{long}", "{short}"): v for k, v in state.items()}}'
    renamed = [rename] if export.layout is Layout.official else []
    load = _state(export)
    return [
        "# pip install torch timm einops; libs/ of github.com/baofff/U-ViT",
        *_HEAD,
        "from libs.uvit import UViT",
        "",
        f"net = UViT({sizes}).eval()",
        *load[:-1],
        *renamed,
        load[-1],
        "denoise = net",
    ]


def _state(export: ExportDiffusion) -> list[str]:
    strip = f".removeprefix({OFFICIAL_PREFIX!r})" if export.layout is Layout.official else ""
    return [
        f'state = {{k{strip}: v.float() for k, v in load_file("{weights_file(export.layout)}")'
        ".items()}",
        "net.load_state_dict(state)",
    ]


_HEAD = ["import numpy as np", "import torch", "from safetensors.torch import load_file"]
_LINES = {
    Layout.diffusers: _diffusers_lines,
    Layout.dit: _dit_lines,
    Layout.official: _dit_lines,
    Layout.u_vit: _uvit_lines,
}
_COMPARE = [
    "",
    f'ours = {{k: torch.tensor(v) for k, v in np.load("{PARITY}").items()}}',
    'x, expected = (ours[k].permute(0, 3, 1, 2) for k in ("x", "output"))',
    "with torch.no_grad():",
    '    output = denoise(x, ours["t"], ours["label"].long())',
    "error = (output - expected).abs().max() / expected.abs().max()",
    'print(f"relative error {error:.2e}")',
]
