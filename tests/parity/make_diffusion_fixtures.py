"""Writes tests/parity/uvit.npz and dit.npz: outputs of PyTorch denoisers for narrow networks.

    python -m venv /tmp/torch && /tmp/torch/bin/pip install torch==2.13.0 diffusers==0.42.1
    /tmp/torch/bin/python tests/parity/make_diffusion_fixtures.py

CPU, float32, no JAX.  DiT is diffusers' DiTTransformer2DModel where that can do it: as it is, and
with the two numbers in which it leaves the original set back (time frequencies divided by half,
both norms of a block with eps 1e-6).  UViT and what diffusers' DiT lacks are written out below from
the papers.  Weights are those of weights.py under our paths, layer i of a stack as "blocks/i".
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import weights  # noqa: E402

WIDTH, HEADS, CLASSES, BATCH = 32, 4, 10, 3
LABELS = (0, 10, 3)  # 10: no class
DISCRETE, FLOW = (1.0, 517.25, 1000.0), (0.0, 0.3, 1.0)

# channels given / of the network, latent's size, patch, depth
UVIT: dict[str, dict[str, Any]] = {
    "published": dict(channels=4, size=(4, 6), patch=1, depth=4, times=DISCRETE),
    "patches": dict(channels=3, size=(4, 8), patch=2, depth=2, times=DISCRETE, final_conv=True),
    "adaptive": dict(channels=6, given=2, size=(4, 4), patch=2, depth=2, times=FLOW),
}  # fmt: skip
DIT: dict[str, dict[str, Any]] = {
    "original": dict(channels=4, size=(8, 8), patch=2, depth=3, times=(0.0, 517.0, 999.0)),
    "diffusers": dict(
        channels=5, size=(4, 4), patch=1, depth=2, times=(0.0, 517.0, 999.0), port=True
    ),
    "flow": dict(channels=3, given=2, size=(4, 6), patch=2, depth=2, times=FLOW, variance=False),
    "modern": dict(
        channels=4, size=(6, 4), patch=1, depth=3, times=FLOW, variance=False, modern=True
    ),
}  # fmt: skip


def tensor(path: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A leaf of ours: kernels [in, out], patch kernels [p, p, in, out]."""
    return torch.from_numpy(weights.weight(f"params/{path}", shape))


def dense(x: torch.Tensor, path: str, features: int, bias: bool = True) -> torch.Tensor:
    """x @ kernel + bias."""
    y = x @ tensor(f"{path}/kernel", (x.shape[-1], features))
    return y + tensor(f"{path}/bias", (features,)) if bias else y


def patches(x: torch.Tensor, inputs: int, patch: int) -> torch.Tensor:
    """The patch convolution on NCHW, with the first channels of its kernel -> [b, n, width]."""
    kernel = tensor("patch_embed/kernel", (patch, patch, inputs, WIDTH)).permute(3, 2, 0, 1)
    bias = tensor("patch_embed/bias", (WIDTH,))
    return F.conv2d(x, kernel[:, : x.shape[1]], bias, stride=patch).flatten(2).transpose(1, 2)


def unpatch(x: torch.Tensor, size: tuple[int, int], patch: int) -> torch.Tensor:
    """[b, n, p1 p2 c] -> NCHW."""
    rows, columns = size[0] // patch, size[1] // patch
    x = x.reshape(len(x), rows, columns, patch, patch, -1)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(len(x), -1, *size)


def sinusoid(t: torch.Tensor, size: int) -> torch.Tensor:
    """[cos | sin], frequencies exp(-ln(10000) k / half)."""
    half = size // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half).float() / half)
    return torch.cat([angles.cos(), angles.sin()], 1)


def rms(x: torch.Tensor, path: str) -> torch.Tensor:
    """RMS norm of the last axis with a scale."""
    scale = tensor(f"{path}/scale", (x.shape[-1],))
    return F.rms_norm(x, (x.shape[-1],), scale, 1e-6)


def turn(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Rotary positions of [b, heads, n, d], as complex numbers: the row, then the column."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half // 2, dtype=torch.float64) / (half // 2))
    row, column = torch.meshgrid(*(torch.arange(s) for s in size), indexing="ij")
    angles = torch.cat([p.reshape(-1, 1) * speed for p in (row, column)], 1)
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([numbers.real, numbers.imag], -1).float()


def attention(
    x: torch.Tensor, path: str, bias: bool, rope: tuple[int, int] | None = None
) -> torch.Tensor:
    """Softmax attention; the three roles are thirds of the projection, heads inside."""
    b, n, _ = x.shape
    qkv = dense(x, f"{path}/qkv", 3 * WIDTH, bias).reshape(b, n, 3, HEADS, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if rope is not None:  # the modern form: RMS norms and rotary positions
        q, k = (turn(rms(a, f"{path}/{m}"), rope) for a, m in ((q, "q_norm"), (k, "k_norm")))
    share = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return dense((share @ v).transpose(1, 2).reshape(b, n, WIDTH), f"{path}/proj", WIDTH)


# ------------------------------------------------------------------------------------------ UViT


def affine_norm(x: torch.Tensor, path: str) -> torch.Tensor:
    """LayerNorm with eps 1e-5."""
    parts = (tensor(f"{path}/{name}", (WIDTH,)) for name in ("scale", "bias"))
    return F.layer_norm(x, (WIDTH,), *parts, eps=1e-5)


def uvit_block(x: torch.Tensor, path: str, skip: torch.Tensor | None = None) -> torch.Tensor:
    """(mix in the skip,) attention, MLP with the exact GELU."""
    if skip is not None:
        x = dense(torch.cat([x, skip], -1), f"{path}/skip", WIDTH)
    x = x + attention(affine_norm(x, f"{path}/norm1"), f"{path}/attn", bias=False)
    y = dense(affine_norm(x, f"{path}/norm2"), f"{path}/mlp/fc1", 4 * WIDTH)
    return x + dense(F.gelu(y), f"{path}/mlp/fc2", WIDTH)


def uvit(x: torch.Tensor, case: dict[str, Any]) -> torch.Tensor:
    """NCHW -> NCHW."""
    patch, half, given = case["patch"], case["depth"] // 2, x.shape[1]
    label = tensor("label_embed/embedding", (CLASSES + 1, WIDTH))[list(LABELS)]
    time = sinusoid(torch.tensor(case["times"]), WIDTH)
    tokens = patches(x, case["channels"], patch)
    tokens = torch.cat([label[:, None], time[:, None], tokens], 1)
    tokens = tokens + tensor("pos_embed", tuple(tokens.shape[1:]))
    skips = []
    for i in range(half):
        tokens = uvit_block(tokens, f"in_blocks/{i}")
        skips.append(tokens)
    tokens = uvit_block(tokens, "mid_block")
    for i in range(half):
        tokens = uvit_block(tokens, f"out_blocks/{i}", skips.pop())
    tokens = dense(affine_norm(tokens, "norm"), "head", patch**2 * case["channels"])[:, 2:]
    y = unpatch(tokens[..., : patch**2 * given], case["size"], patch)
    if case.get("final_conv"):
        kernel = tensor("final_conv/kernel", (3, 3, given, given)).permute(3, 2, 0, 1)
        y = F.conv2d(y, kernel, tensor("final_conv/bias", (given,)), padding=1)
    return y


# ------------------------------------------------------------------------------------------- DiT


def bare_norm(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm without parameters, eps 1e-6."""
    return F.layer_norm(x, (WIDTH,), eps=1e-6)


def positions(size: tuple[int, int]) -> torch.Tensor:
    """Fixed sines and cosines, the column's half first."""
    speed = 10000.0 ** (-torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    table = torch.zeros(*size, WIDTH, dtype=torch.float64)
    for row in range(size[0]):
        for column in range(size[1]):
            each = [a for p in (column, row) for a in ((p * speed).sin(), (p * speed).cos())]
            table[row, column] = torch.cat(each)
    return table.flatten(0, 1).float()


def dit_block(
    x: torch.Tensor, c: torch.Tensor, path: str, rope: tuple[int, int] | None
) -> torch.Tensor:
    """adaLN-Zero; with `rope` the modern form."""
    chunks = dense(F.silu(c), f"{path}/adaln", 6 * WIDTH)[:, None].chunk(6, -1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks
    y = bare_norm(x) * (1 + scale_a) + shift_a
    x = x + gate_a * attention(y, f"{path}/attn", True, rope)
    y = bare_norm(x) * (1 + scale_m) + shift_m
    if rope is not None:
        hidden = math.ceil(WIDTH * 8 / 3 / 64) * 64
        gate, value = dense(y, f"{path}/mlp/fc1", 2 * hidden).chunk(2, -1)
        y = F.silu(gate) * value
    else:
        y = F.gelu(dense(y, f"{path}/mlp/fc1", 4 * WIDTH), approximate="tanh")
    return x + gate_m * dense(y, f"{path}/mlp/fc2", WIDTH)


def dit(x: torch.Tensor, case: dict[str, Any]) -> torch.Tensor:
    """NCHW -> NCHW, without learned variance."""
    patch, given = case["patch"], x.shape[1]
    grid = (case["size"][0] // patch, case["size"][1] // patch)
    rope = grid if case.get("modern") else None
    tokens = patches(x, case["channels"], patch)
    if rope is None:
        tokens = tokens + positions(grid)
    t = dense(sinusoid(torch.tensor(case["times"]), 256), "time_embed/fc1", WIDTH)
    c = dense(F.silu(t), "time_embed/fc2", WIDTH)
    c = c + tensor("label_embed/embedding", (CLASSES + 1, WIDTH))[list(LABELS)]
    for i in range(case["depth"]):
        tokens = dit_block(tokens, c, f"blocks/{i}", rope)
    shift, scale = dense(F.silu(c), "norm_adaln", 2 * WIDTH)[:, None].chunk(2, -1)
    tokens = bare_norm(tokens) * (1 + scale) + shift
    tokens = dense(tokens, "head", patch**2 * case["channels"])
    return unpatch(tokens[..., : patch**2 * given], case["size"], patch)


INNER = {
    "norm1.linear": "adaln", "attn1.to_out.0": "attn/proj", "ff.net.0.proj": "mlp/fc1",
    "ff.net.2": "mlp/fc2",
}  # fmt: skip
OUTER = {"proj_out_1": "norm_adaln", "proj_out_2": "head", "pos_embed.proj": "patch_embed"}
EMBED = {
    "timestep_embedder.linear_1": "time_embed/fc1",
    "timestep_embedder.linear_2": "time_embed/fc2",
    "class_embedder.embedding_table": "label_embed",
}


def _diffusers_value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of one of diffusers' tensors; q, k, v are thirds of one projection."""
    name, leaf = key.rsplit(".", 1)
    if name in OUTER:
        path = OUTER[name]
    else:
        _, i, inner = name.split(".", 2)
        if inner.startswith("norm1.emb."):  # every block has a copy of the embedders
            path = EMBED[inner.removeprefix("norm1.emb.")]
        elif inner.startswith("attn1.to_") and not inner.startswith("attn1.to_out"):
            role = "qkv".index(inner[-1])
            if leaf == "bias":
                return tensor(f"blocks/{i}/attn/qkv/bias", (3 * WIDTH,)).chunk(3)[role]
            kernel = tensor(f"blocks/{i}/attn/qkv/kernel", (WIDTH, 3 * WIDTH))
            return kernel.chunk(3, dim=1)[role].T
        else:
            path = f"blocks/{i}/{INNER[inner]}"
    if leaf == "bias":
        return tensor(f"{path}/bias", shape)
    if path == "label_embed":
        return tensor(f"{path}/embedding", shape)
    if len(shape) == 4:
        return tensor(f"{path}/kernel", (*shape[2:], shape[1], shape[0])).permute(3, 2, 0, 1)
    return tensor(f"{path}/kernel", shape[::-1]).T


def diffusers_dit(x: torch.Tensor, case: dict[str, Any]) -> torch.Tensor:
    """NCHW -> NCHW with twice the channels, by diffusers' module."""
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=case["channels"],
        out_channels=2 * case["channels"], num_layers=case["depth"], sample_size=case["size"][0],
        patch_size=case["patch"], num_embeds_ada_norm=CLASSES,
        norm_eps=1e-5 if case.get("port") else 1e-6,
    ).eval()  # fmt: skip
    if not case.get("port"):
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    state = {k: _diffusers_value(k, tuple(v.shape)) for k, v in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    times, labels = torch.tensor(case["times"]), torch.tensor(LABELS)
    return model(x, times, labels).sample


# -------------------------------------------------------------------------------------- the files


def outputs(tag: str, network: Any, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """The output and the gradient by the input, channels last."""
    shape = (BATCH, *case["size"], case.get("given", case["channels"]))
    x = torch.from_numpy(weights.normal(f"{tag}/x", shape)).permute(0, 3, 1, 2).requires_grad_()
    y = network(x, case)
    shape = (*shape[:3], y.shape[1])
    dy = torch.from_numpy(weights.normal(f"{tag}/dy", shape)).permute(0, 3, 1, 2)
    (dx,) = torch.autograd.grad((y * dy).sum(), x)
    return {f"{tag}/{k}": v.detach().permute(0, 2, 3, 1).numpy() for k, v in (("y", y), ("dx", dx))}


def main() -> None:
    """Writes the files and prints the scale of each value."""
    files: dict[str, dict[str, np.ndarray]] = {"uvit": {}, "dit": {}}
    for name, case in UVIT.items():
        files["uvit"] |= outputs(f"uvit/{name}", uvit, case)
    for name, case in DIT.items():
        network = dit if "variance" in case else diffusers_dit
        files["dit"] |= outputs(f"dit/{name}", network, case)
    for name, found in files.items():
        np.savez_compressed(HERE / f"{name}.npz", **found)
        for key, value in found.items():
            print(f"{key:24} {value.shape!s:20} rms {np.sqrt(np.mean(value**2)):.3g}")
        print(f"{(HERE / f'{name}.npz').stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
