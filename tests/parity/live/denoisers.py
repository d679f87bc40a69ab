"""Denoising networks on both sides: PyTorch's, and ours with the weights that our import reads.

DiT is diffusers' own class.  U-ViT and the original DiT and SiT are in no package; they are the
functions of tests/convert/make_diffusion_torch_files.py, written out from the papers in PyTorch on
tensors under the names of their authors' code.  `make parity OFFICIAL=FOLDER` compares with the
official classes, too, where official_diffusion.py finds what they need.
"""

import functools
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import official_diffusion
import original
import safetensors.torch
import torch
from torch.func import functional_call

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "convert"))
import make_diffusion_torch_files as written_out

from dcae_jax import tree
from dcae_jax.convert import diffusion_from_torch, diffusion_names, names
from dcae_jax.convert.diffusion_from_torch import ImportedDiffusion
from dcae_jax.models.layers import Dtype

WIDTH, HEADS, DEPTH, CLASSES, SIZE, PATCH = 96, 4, 6, 10, 8, 2
for _name in ("WIDTH", "HEADS", "DEPTH", "CLASSES", "SIZE", "PATCH"):
    setattr(written_out, _name, globals()[_name])
CHANNELS, BATCH = 4, 3
HEAD = 0.25  # of DiT's last weights: what is learned of the variance stays between -1 and 1
LABELS = np.array([3, CLASSES, 7], np.int32)  # 10: no class
State = dict[str, torch.Tensor]
Network = Callable[[State, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
OFFICIAL = {"official UViT": "uvit", "official USiT": "usit", "official DiT": "dit"}
NAMES = (
    "DiT, diffusers", "DiT", "SiT", "U-ViT", "USiT",
    *(OFFICIAL if official_diffusion.is_here() else ()),
)  # fmt: skip


class Case(NamedTuple):
    """One network on both sides."""

    name: str
    state: State  # PyTorch's tensors
    network: Network  # NCHW, times, labels -> NCHW
    found: ImportedDiffusion  # what our import gave

    @property
    def cfg(self) -> Any:
        """The config that the import made."""
        return self.found.cfg

    @property
    def variables(self) -> Any:
        """Our leaves."""
        return self.found.variables

    def theirs(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """The output of PyTorch."""
        with torch.no_grad():
            return original.nhwc(self.torch(original.nchw(x), torch.from_numpy(t)))

    def torch(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The same on PyTorch's tensors."""
        return self.network(self.state, x, t, torch.from_numpy(LABELS).long())

    def ours(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Our output."""
        return np.asarray(applied(self.cfg, self.variables, x, t))


def cond() -> dict[str, jax.Array]:
    """The labels, for our networks."""
    return {"label": jnp.asarray(LABELS)}


@functools.partial(jax.jit, static_argnums=0)
def applied(cfg: Any, variables: Any, x: np.ndarray, t: np.ndarray) -> jax.Array:
    """The output with other leaves."""
    return cfg.build().apply(variables, x, t, cond())


# ---------------------------------------------------------------------------------------- building


def build(name: str, folder: pathlib.Path) -> Case:
    """The network with random weights, saved by PyTorch into `folder`, read by our import."""
    if name == "DiT, diffusers":
        return _diffusers_dit(name, folder)
    torch.manual_seed(len(name))
    make = _official if name in OFFICIAL else _written_out
    state, network, options, prefix = make(name)
    folder.mkdir()
    file = folder / "model.safetensors"
    safetensors.torch.save_file({prefix + key: v for key, v in state.items()}, file)
    found = diffusion_from_torch.load(str(file), heads=HEADS, **options)
    return Case(name, state, network, _exact(found))


def _exact(found: ImportedDiffusion) -> ImportedDiffusion:
    found.cfg.dtype = Dtype.float32
    return found


def _diffusers_dit(name: str, folder: pathlib.Path) -> Case:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=CHANNELS,
        out_channels=2 * CHANNELS, num_layers=DEPTH, sample_size=SIZE, patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    original.fill(model)
    state = model.state_dict()
    for key in state:  # trained ones have the same embedders in every block
        if ".norm1.emb." in key:
            state[key].copy_(state[key.replace(f"blocks.{key.split('.')[1]}", "blocks.0")])
    model.requires_grad_(False)
    for key in ("proj_out_2.weight", "proj_out_2.bias"):
        state[key] *= HEAD
    model.save_pretrained(folder)

    def network(
        state: State, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        return functional_call(model, state, (x, t, label)).sample

    return Case(name, dict(state), network, _exact(diffusion_from_torch.load(str(folder))))


def _written_out(name: str) -> tuple[State, Network, dict[str, Any], str]:
    """(tensors, network, what the import must be told, prefix of the names in the file)."""
    if name in ("U-ViT", "USiT"):
        official = name == "USiT"
        label = "label_emb.embedding_table.weight" if official else "label_emb.weight"
        state = written_out.uvit_state(CHANNELS, PATCH, label, conv=not official)
        options = {"variant": "usit"} if official else {}
        return state, written_out.uvit, options, "diffusion_model." if official else ""
    written_out.DIT_CHANNELS = CHANNELS
    state = written_out.dit_state()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key] *= HEAD
    if name == "DiT":
        return state, written_out.dit, {"variant": "dit"}, ""
    rows = PATCH**2 * CHANNELS
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key] = state[key][:rows].clone()
    return state, written_out.dit, {"variant": "sit"}, ""


def _official(name: str) -> tuple[State, Network, dict[str, Any], str]:
    """The same of an official class, which takes the tensors under its own names."""
    family = OFFICIAL[name]
    model = official_diffusion.build(
        family, in_channels=CHANNELS, input_size=SIZE, patch_size=PATCH, hidden_size=WIDTH,
        depth=DEPTH, num_heads=HEADS, num_classes=CLASSES,
    )  # fmt: skip
    fixed = {"pos_embed": model.pos_embed.clone()} if family == "dit" else {}
    state = original.fill(model).state_dict()
    for key, value in fixed.items():
        state[key].copy_(value)
    for key in (k for k in state if k.startswith("final_layer.linear.")):
        state[key] *= HEAD

    def network(
        state: State, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        model.forward = model.forward_without_cfg
        found = functional_call(model, state, (x, t, label))
        return found[0] if isinstance(found, tuple) else found

    return dict(state), network, {"variant": family}, "diffusion_model."


# --------------------------------------------------------------------------------------- gradients


def their_gradients(
    case: Case, x: np.ndarray, t: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Of sum(output * dy): by x, and by every tensor; those of equal copies are added up."""
    fixed = diffusion_names.constants(case.cfg, case.found.layout)
    free = {k: v.clone().requires_grad_() for k, v in case.state.items() if k not in fixed}
    image = original.nchw(x).requires_grad_()
    labels = torch.from_numpy(LABELS).long()
    output = case.network(case.state | free, image, torch.from_numpy(t), labels)
    loss = (output * original.nchw(dy)).sum()
    dx, *grads = torch.autograd.grad(loss, [image, *free.values()])
    found = {key: grad.numpy() for key, grad in zip(free, grads, strict=True)}
    for entry in _copies(case):
        found[entry.keys[0]] = sum(found.pop(key) for key in entry.keys)
    return original.nhwc(dx), found


def _copies(case: Case) -> list[names.Entry]:
    table = diffusion_names.table(case.cfg, case.found.layout)
    return [entry for entry in table if entry.copies]


@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    cfg: Any, variables: Any, x: np.ndarray, t: np.ndarray, dy: np.ndarray
) -> tuple[jax.Array, Any]:
    def loss(x: Any, variables: Any) -> jax.Array:
        return (cfg.build().apply(variables, x, t, cond()) * dy).sum()

    return jax.grad(loss, argnums=(0, 1))(x, variables)


def our_gradients(
    case: Case, x: np.ndarray, t: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same on our side, under PyTorch's keys."""
    dx, grads = _gradients(case.cfg, case.variables, x, t, dy)
    return np.asarray(dx), as_torch(case, tree.flatten(grads))


def as_torch(case: Case, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Leaves by path as PyTorch's tensors by key; of equal copies the first."""
    found = {}
    for entry in diffusion_names.table(case.cfg, case.found.layout):
        parts = names.to_torch(entry, np.asarray(leaves[entry.path]))
        pairs = list(zip(entry.keys, parts, strict=True))
        found |= dict(pairs[:1] if entry.copies else pairs)
    return found
