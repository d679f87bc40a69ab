"""Writes an autoencoder as a folder in a PyTorch layout, with what is needed to check it there.

Tensors are streamed leaf by leaf.  config.json is written last: a folder without it is incomplete.
"""

import copy
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from dcae_jax import tree
from dcae_jax.config import JSONValue
from dcae_jax.convert import folder, layouts, names, releases
from dcae_jax.convert.folder import CONFIG
from dcae_jax.convert.names import AnyConfig, Entry, Layout
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.nets.torch_file import SAFE_DTYPES
from dcae_jax.tree import Tree

WEIGHTS = {
    Layout.diffusers: "diffusion_pytorch_model.safetensors",
    Layout.official: "model.safetensors",
}
PARITY, README = "parity.npz", "README.md"
FILES = (*WEIGHTS.values(), PARITY, README)  # beside config.json
# In the order in which the safetensors library puts them, widest first: offsets stay aligned.
ORDER = ("I64", "F32", "BF16", "F16")
DTYPES = {SAFE_DTYPES[name].name: (SAFE_DTYPES[name], name) for name in ORDER}
TOLERANCE = 1e-5  # relative, of latent and reconstruction in float32 on a CPU


@dataclass(frozen=True)
class Export:
    """What is written, and how."""

    cfg: AnyConfig
    variables: Tree  # f32; the leaves may lie on devices
    layout: Layout
    scaling_factor: float
    source: str  # for people: which weights these are
    release: str | None = None  # whose weights they are, unchanged; None: nobody's, or not known
    unchanged: bool = False  # the weights are those of an import
    variant: str | None = None  # a release with this network, which the official code then builds
    dtypes: dict[str, str] | None = None  # of the tensors that are not float32
    counters: dict[str, int] | None = None  # BatchNorm's num_batches_tracked; None: all 0
    dtype: str | None = None  # of every tensor, instead of `dtypes`
    extra: dict[str, JSONValue] = field(default_factory=dict)  # fields of diffusers' config.json

    @property
    def network(self) -> str | None:
        """The release whose name the official config.json gets."""
        return self.variant or self.release

    def dtype_of(self, key: str) -> str:
        """The dtype in which a tensor is written."""
        dtypes = self.dtypes or {}
        return self.dtype or (dtypes[key] if key in dtypes else "float32")


def write(export: Export, out: epath.Path) -> None:
    """Writes a new folder; UserError, before anything is written, if it cannot hold this network.

    A command that has work to do before holds `folder.filling` around it, and calls `fill`.
    """
    with folder.filling(out, FILES):
        fill(export, out)


def fill(export: Export, out: epath.Path) -> None:
    """Writes the files, config.json last."""
    own = export.network != export.release
    fields = layouts.write(
        export.cfg, export.layout, export.scaling_factor, export.network, own, export.extra
    )
    leaves = _rounded(export)
    rows = _rows(export, leaves)
    folder.require_room(out, sum(row.bytes for row in rows))
    parity = run(export.cfg, tree.unflatten(leaves), example(export.cfg))
    with folder.writing(out):
        with (out / WEIGHTS[export.layout]).open("wb") as file:
            write_safetensors(file, rows)
        with (out / PARITY).open("wb") as file:
            np.savez(file, **parity)
        (out / README).write_text(_readme(export, parity))
        (out / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


# ------------------------------------------------------------------------------------ safetensors


class Row(NamedTuple):
    """A tensor to be written; `read` gives its values when their turn comes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return DTYPES[self.dtype][0].itemsize * math.prod(self.shape)


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
        start, end = end, end + row.bytes
        header[row.key] = {
            "dtype": DTYPES[row.dtype][1],
            "shape": row.shape,
            "data_offsets": [start, end],
        }
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
    for part, rounded in zip(parts, kept, strict=True):
        names.check_held(entry, part, rounded)
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
        f"Weights: {_whose(export)}. Written by dcae_jax.",
        f"Scaling factor: {export.scaling_factor} (1 / RMS of the latents; multiply latents by it "
        "before a diffusion model sees them, divide after).",
        f"Images are in [-1, 1]; their sides are multiples of {cfg.factor}.",
        "",
        f"`{PARITY}` holds an input of {side} x {side} pixels, its latent and its reconstruction, "
        "as computed in JAX in float32 (batch, height, width, channels).",
        *_check(export),
    ]
    return "\n".join(lines) + "\n"


def _whose(export: Export) -> str:
    """Whose weights these are, as far as that is known."""
    rounded = f", rounded to {export.dtype}" if export.dtype not in (None, "float32") else ""
    if export.release is not None:
        found = f"those of {export.release}, unchanged"
    elif export.unchanged:
        found = "imported and unchanged; of which release, if of any, is not known"
    else:
        found = "trained with dcae_jax"
    if export.layout is Layout.official and export.network != export.release:
        return f"{found}{rounded}; not those of {export.network}, which has the same network"
    return found + rounded


def unknown_to_official(export: Export) -> str:
    """Why the official code does not load this folder, and what to do; "" if it does."""
    if export.layout is not Layout.official or export.network is not None:
        return ""
    why = "the official code builds networks by the names of releases only, and "
    if same := layouts.same_network(export.cfg):
        return (
            f"{why}this folder names none; export with --variant NAME to have it load this one "
            f"(the network of {', '.join(same)})"
        )
    return f"{why}none has this network"


def _check(export: Export) -> list[str]:
    """How to see in PyTorch that it agrees."""
    if why := unknown_to_official(export):
        return [
            f"{why[0].upper()}{why[1:]}. `{CONFIG}` describes it for dcae_jax. To check it in "
            "PyTorch, export it `--to diffusers`."
        ]
    official = export.layout is Layout.official
    claim = (
        "The official code needs a CUDA device, where rounding differs a little more."
        if official
        else f"The relative errors of PyTorch on a CPU are below {TOLERANCE:g}:"
    )
    kl = isinstance(export.cfg, KLVAEConfig)
    lines = _check_official(export.network) if official else _check_diffusers(kl)
    return [claim, "", "```python", *lines, *_COMPARE, "```"]


def _check_official(release: str) -> list[str]:
    return [
        *(_EFFICIENTVIT if release in releases.EFFICIENTVIT else _dc_gen(release)),
        "encode, decode = lambda x: ae.encode(x.cuda()).cpu(), lambda z: ae.decode(z.cuda()).cpu()",
    ]


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


_EFFICIENTVIT = [
    "# with the official code installed: github.com/mit-han-lab/efficientvit",
    "import numpy as np",
    "import torch",
    "from efficientvit.ae_model_zoo import DCAE_HF",
    "",
    "torch.backends.cudnn.allow_tf32 = False",
    'ae = DCAE_HF.from_pretrained(".").eval().cuda()',
]


def _dc_gen(release: str) -> list[str]:
    return [
        "# with the official code on PYTHONPATH: github.com/dc-ai-projects/DC-Gen (cae2205)",
        "import numpy as np",
        "import torch",
        "from dc_gen.ae_model_zoo import DCAE, create_dc_ae_model_cfg",
        "from safetensors.torch import load_file",
        "",
        "torch.backends.cudnn.allow_tf32 = False",
        f'cfg = create_dc_ae_model_cfg("{releases.RELEASES[release].official}")',
        "cfg.pretrained_path = None  # for some networks a file of its own checkout",
        "ae = DCAE(cfg)",
        f'ae.load_state_dict(load_file("{WEIGHTS[Layout.official]}"))',
        "ae = ae.eval().cuda()",
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
