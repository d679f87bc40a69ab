"""Writes an autoencoder as a folder in a PyTorch layout, with what is needed to check it there.

Tensors are streamed leaf by leaf.  config.json is written last: a folder without it is incomplete.
"""

import copy
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Float

from dcae_jax import tree
from dcae_jax.convert import layouts, names
from dcae_jax.convert.names import AnyConfig, Entry, Layout
from dcae_jax.errors import UserError
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.tree import Tree

WEIGHTS = {
    Layout.diffusers: "diffusion_pytorch_model.safetensors",
    Layout.official: "model.safetensors",
}
PARITY, README, CONFIG = "parity.npz", "README.md", "config.json"
# In the order in which the safetensors library puts them, widest first: offsets stay aligned.
DTYPES = {
    "int64": (np.dtype(np.int64), "I64"),
    "float32": (np.dtype(np.float32), "F32"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "float16": (np.dtype(np.float16), "F16"),
}
TOLERANCE = 1e-5  # relative, of latent and reconstruction in float32 on a CPU


@dataclass(frozen=True)
class Export:
    """What is written, and how."""

    cfg: AnyConfig
    variables: Tree  # f32; the leaves may lie on devices
    layout: Layout
    scaling_factor: float
    source: str  # for people: which weights these are
    release: str | None = None  # whose weights they are, unchanged; None: nobody's
    dtypes: dict[str, str] | None = None  # of the tensors that are not float32
    counters: dict[str, int] | None = None  # BatchNorm's num_batches_tracked; None: all 0
    dtype: str | None = None  # of every tensor, instead of `dtypes`

    def dtype_of(self, key: str) -> str:
        """The dtype in which a tensor is written."""
        dtypes = self.dtypes or {}
        return self.dtype or (dtypes[key] if key in dtypes else "float32")


def write(export: Export, out: epath.Path) -> None:
    """Writes the folder; UserError, before anything is written, if it cannot hold this network."""
    fields = layouts.write(export.cfg, export.layout, export.scaling_factor, export.release)
    refuse_existing(out)
    leaves = _rounded(export)
    parity = run(export.cfg, tree.unflatten(leaves), example(export.cfg))
    out.mkdir(parents=True, exist_ok=True)
    with (out / WEIGHTS[export.layout]).open("wb") as file:
        write_safetensors(file, _rows(export, leaves))
    with (out / PARITY).open("wb") as file:
        np.savez(file, **parity)
    (out / README).write_text(_readme(export, parity))
    (out / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def refuse_existing(out: epath.Path) -> None:
    """UserError if something is there already: nothing is overwritten."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        incomplete = out.is_dir() and not (out / CONFIG).exists()
        why = "has no config.json: its writer did not finish" if incomplete else "is not empty"
        raise UserError(f"--out {out} exists and {why}; give a new folder, or remove it first")


# ------------------------------------------------------------------------------------ safetensors


class Row(NamedTuple):
    """A tensor to be written; `read` gives its values when their turn comes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write_safetensors(file: io.IOBase, rows: list[Row]) -> None:
    """Streams a safetensors file, one tensor in memory at a time."""
    rows = _ordered(rows)
    write_header(file, rows)
    for row in rows:
        values = np.ascontiguousarray(row.read(), DTYPES[row.dtype][0])
        file.write(values.tobytes() if values.ndim == 0 else values.reshape(-1).view(np.uint8).data)


def _ordered(rows: list[Row]) -> list[Row]:
    """As the safetensors library orders them, so that equal tensors make an equal file."""
    order = list(DTYPES)
    return sorted(rows, key=lambda row: (order.index(row.dtype), row.key))


def write_header(file: io.IOBase, rows: list[Row]) -> int:
    """Writes what stands before the tensors' bytes; returns how many bytes those are."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for row in _ordered(rows):
        dtype, name = DTYPES[row.dtype]
        start, end = end, end + dtype.itemsize * math.prod(row.shape)
        header[row.key] = {"dtype": name, "shape": row.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return end


def _rows(export: Export, leaves: dict[str, Any]) -> list[Row]:
    found = []
    for entry in names.table(export.cfg, export.layout):
        shape = names.stored_shape(entry, leaves[entry.path].shape)
        found += [
            Row(key, export.dtype_of(key), shape, _reader(entry, leaves[entry.path], i))
            for i, key in enumerate(entry.keys)
        ]
    counts = export.counters or {}
    for key in names.counters(export.cfg, export.layout):
        count = np.int64(counts[key] if key in counts else 0)
        found.append(Row(key, "int64", (), lambda count=count: count))
    return found


def _reader(entry: Entry, leaf: Any, index: int) -> Callable[[], np.ndarray]:
    return lambda: names.to_torch(entry, np.asarray(leaf))[index]


def _rounded(export: Export) -> dict[str, Any]:
    """The values as they are after reading them again: rounded where a tensor is not float32."""
    flat = tree.flatten(export.variables)
    return {e.path: _kept(export, e, flat[e.path]) for e in names.table(export.cfg, export.layout)}


def _kept(export: Export, entry: Entry, leaf: Any) -> Any:
    dtypes = [DTYPES[export.dtype_of(key)][0] for key in entry.keys]
    if all(dtype == np.float32 for dtype in dtypes):
        return leaf
    parts = names.to_torch(entry, np.asarray(leaf))
    with np.errstate(over="ignore"):
        kept = [part.astype(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
    if not all(np.isfinite(part.astype(np.float32)).all() for part in kept):
        raise UserError(
            f"{entry.path} has values up to {float(abs(leaf).max()):.3g}, which {dtypes[0]} cannot "
            "hold; use --dtype bfloat16 or float32"
        )
    return jax.device_put(names.from_torch(entry, kept))


# ----------------------------------------------------------------------------------------- parity


def example(cfg: AnyConfig) -> Float[np.ndarray, "1 h w c"]:
    """A picture of waves and some noise in [-1, 1], large enough for both kinds of attention."""
    side = max(min(4 * cfg.factor, 256), 2 * cfg.factor)
    gen = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    rate, phase = gen.uniform(1, 9, (2, cfg.in_channels)), gen.uniform(0, 6, cfg.in_channels)
    waves = np.sin(2 * np.pi * (x[..., None] * rate[0] + y[..., None] * rate[1]) + phase)
    image = 0.8 * waves + 0.2 * gen.uniform(-1, 1, waves.shape)
    return image[None].astype(np.float32)


def run(
    cfg: AnyConfig, variables: Tree, image: Float[np.ndarray, "1 h w c"]
) -> dict[str, Float[np.ndarray, "1 _ _ _"]]:
    """{"input", "latent", "reconstruction"} of an image in [-1, 1], all float32 throughout."""
    cfg = copy.deepcopy(cfg)
    cfg.dtype, cfg.conv_dtype = Dtype.float32, None
    network, backend = cfg.build(), jax.default_backend()
    # It runs once: on a CPU compiling it well would take longer than running it.
    plainly = {"xla_backend_optimization_level": 0} if backend == "cpu" else {}
    encode, decode = (
        jax.jit(partial(network.apply, method=name), compiler_options=plainly)
        for name in ("encode", "decode")
    )
    with jax.default_matmul_precision("highest"):
        latent = encode(variables, jnp.asarray(image))
        output = decode(variables, latent)
    return {"input": image, "latent": np.asarray(latent), "reconstruction": np.asarray(output)}


# ----------------------------------------------------------------------------------------- readme


def _readme(export: Export, parity: dict[str, np.ndarray]) -> str:
    cfg, side = export.cfg, parity["input"].shape[1]
    lines = [
        f"# Autoencoder f{cfg.factor}c{cfg.latent_channels}, {export.layout.value} layout",
        "",
        f"Weights: {f'those of {export.release}' if export.release else 'trained'}, written by "
        "dcae_jax.",
        f"Scaling factor: {export.scaling_factor} (1 / RMS of the latents; multiply latents by it "
        "before a diffusion model sees them, divide after).",
        f"Images are in [-1, 1]; their sides are multiples of {cfg.factor}.",
        "",
        f"`{PARITY}` holds an input of {side} x {side} pixels, its latent and its reconstruction, "
        "as computed in JAX in float32 (batch, height, width, channels).",
        *_check(export),
    ]
    return "\n".join(lines) + "\n"


def _check(export: Export) -> list[str]:
    """How to see in PyTorch that it agrees."""
    if export.layout is Layout.official and export.release is None:
        return [
            "The official code builds its released networks only, and this is another one: "
            f"`{CONFIG}` describes it for dcae_jax. To check it in PyTorch, export it "
            "`--to diffusers`."
        ]
    official = export.layout is Layout.official
    claim = (
        "The official code needs a CUDA device, where rounding differs a little more."
        if official
        else f"The relative errors of PyTorch on a CPU are below {TOLERANCE:g}:"
    )
    kl = isinstance(export.cfg, KLVAEConfig)
    lines = _CHECK_OFFICIAL if official else _check_diffusers(kl)
    return [claim, "", "```python", *lines, *_COMPARE, "```"]


def _check_diffusers(kl: bool) -> list[str]:
    name = "AutoencoderKL" if kl else "AutoencoderDC"
    latent = "latent_dist.mode()" if kl else "latent"
    return [
        "# pip install torch diffusers",
        "import numpy as np",
        "import torch",
        f"from diffusers import {name}",
        "",
        f'ae = {name}.from_pretrained(".", torch_dtype=torch.float32).eval()',
        f"encode, decode = lambda x: ae.encode(x).{latent}, lambda z: ae.decode(z).sample",
    ]


_CHECK_OFFICIAL = [
    "# with the official code installed: github.com/mit-han-lab/efficientvit",
    "import numpy as np",
    "import torch",
    "from efficientvit.ae_model_zoo import DCAE_HF",
    "",
    "torch.backends.cudnn.allow_tf32 = False",
    'ae = DCAE_HF.from_pretrained(".").eval().cuda()',
    "encode, decode = lambda x: ae.encode(x.cuda()).cpu(), lambda z: ae.decode(z.cuda()).cpu()",
]
_COMPARE = [
    "",
    f'ours = {{k: torch.tensor(v).permute(0, 3, 1, 2) for k, v in np.load("{PARITY}").items()}}',
    "with torch.no_grad():",
    '    theirs = {"latent": encode(ours["input"]), "reconstruction": decode(ours["latent"])}',
    "for name, value in theirs.items():",
    "    error = (value - ours[name]).abs().max() / ours[name].abs().max()",
    '    print(f"{name}: relative error {error:.2e}")',
]
