"""Writes tests/convert/diffusion_files: narrow denoisers as PyTorch saves them, and their outputs.

    .venv-parity/bin/python tests/convert/make_diffusion_torch_files.py

Needs torch, diffusers and safetensors; nothing is read from dcae_jax.  DiT in diffusers' layout is
diffusers' own module.  The other networks are written out below from the papers, as functions of a
dict of tensors under the names of their authors' code.
"""

import argparse
import math
import pathlib
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent / "diffusion_files"
WIDTH, HEADS, DEPTH, CLASSES = 12, 3, 2, 5
SIZE, PATCH = 4, 2
DIT_CHANNELS, UVIT_CHANNELS, USIT_CHANNELS = 3, 2, 4
State = dict[str, torch.Tensor]


def filled(shapes: dict[str, tuple[int, ...]]) -> State:
    """Random tensors of a size that keeps activations near 1."""
    return {
        key: torch.rand(shape) + 0.5 if "norm" in key and key.endswith("weight") and len(shape) == 1
        else torch.randn(shape) / math.sqrt(max(math.prod(shape[1:]), 4))
        for key, shape in shapes.items()
    }  # fmt: skip


def linear(key: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """The tensors of a Linear."""
    found = {f"{key}.weight": (outputs, inputs)}
    return found | ({f"{key}.bias": (outputs,)} if bias else {})


def apply(s: State, key: str, x: torch.Tensor) -> torch.Tensor:
    """Linear."""
    return F.linear(x, s[f"{key}.weight"], s.get(f"{key}.bias"))


def attention(s: State, key: str, x: torch.Tensor) -> torch.Tensor:
    """Three roles outermost, then heads."""
    b, n, _ = x.shape
    q, k, v = apply(s, f"{key}.qkv", x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    share = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return apply(s, f"{key}.proj", (share @ v).transpose(1, 2).reshape(b, n, -1))


def sinusoid(t: torch.Tensor, size: int) -> torch.Tensor:
    """[cos | sin]."""
    half = size // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half).float() / half)
    return torch.cat([angles.cos(), angles.sin()], 1)


def unpatch(x: torch.Tensor, patch: int) -> torch.Tensor:
    """[b, n, p1 p2 c] -> NCHW of a square."""
    side = math.isqrt(x.shape[1])
    x = x.reshape(len(x), side, side, patch, patch, -1)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(len(x), -1, side * patch, side * patch)


# ------------------------------------------------------------------------------------------- DiT


def dit_state() -> State:
    """DiT with a learned variance, as its authors name it."""
    shapes = {
        "x_embedder.proj.weight": (WIDTH, DIT_CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (WIDTH,),
        **linear("t_embedder.mlp.0", 256, WIDTH),
        **linear("t_embedder.mlp.2", WIDTH, WIDTH),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        **linear("final_layer.linear", WIDTH, PATCH**2 * 2 * DIT_CHANNELS),
        **linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH),
    }
    for i in range(DEPTH):
        shapes |= linear(f"blocks.{i}.attn.qkv", WIDTH, 3 * WIDTH)
        shapes |= linear(f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"blocks.{i}.mlp.fc1", WIDTH, 4 * WIDTH)
        shapes |= linear(f"blocks.{i}.mlp.fc2", 4 * WIDTH, WIDTH)
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", WIDTH, 6 * WIDTH)
    return filled(shapes) | {"pos_embed": positions(SIZE // PATCH)[None]}


def positions(side: int) -> torch.Tensor:
    """Fixed sines and cosines, the column's half first."""
    speed = 10000.0 ** (-np.arange(WIDTH // 4, dtype=np.float64) / (WIDTH / 4))
    rows = [
        np.concatenate([f(p * speed) for p in (column, row) for f in (np.sin, np.cos)])
        for row in range(side) for column in range(side)
    ]  # fmt: skip
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def dit(s: State, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """adaLN-Zero."""

    def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift

    x = F.conv2d(x, s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2) + s["pos_embed"]
    c = apply(s, "t_embedder.mlp.2", F.silu(apply(s, "t_embedder.mlp.0", sinusoid(t, 256))))
    c = F.silu(c + s["y_embedder.embedding_table.weight"][label])
    for i in range(DEPTH):
        chunks = apply(s, f"blocks.{i}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        x = x + chunks[2] * attention(s, f"blocks.{i}.attn", modulated(x, *chunks[:2]))
        y = apply(s, f"blocks.{i}.mlp.fc1", modulated(x, *chunks[3:5]))
        x = x + chunks[5] * apply(s, f"blocks.{i}.mlp.fc2", F.gelu(y, approximate="tanh"))
    chunks = apply(s, "final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    return unpatch(apply(s, "final_layer.linear", modulated(x, *chunks)), PATCH)


# ------------------------------------------------------------------------------------------ UViT


def uvit_state(channels: int, patch: int, label: str, conv: bool) -> State:
    """A U-ViT with label tokens, without a time MLP; `label`: the name of the label's table."""
    tokens = (SIZE // patch) ** 2 + 2
    shapes = {
        "patch_embed.proj.weight": (WIDTH, channels, patch, patch),
        "patch_embed.proj.bias": (WIDTH,),
        label: (CLASSES + 1, WIDTH),
        "pos_embed": (1, tokens, WIDTH),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        **linear("decoder_pred", WIDTH, patch**2 * channels),
    }
    stacks = [f"{way}_blocks.{i}" for way in ("in", "out") for i in range(DEPTH // 2)]
    for key in [*stacks, "mid_block"]:
        for norm in ("norm1", "norm2"):
            shapes |= {f"{key}.{norm}.weight": (WIDTH,), f"{key}.{norm}.bias": (WIDTH,)}
        shapes |= linear(f"{key}.attn.qkv", WIDTH, 3 * WIDTH, bias=False)
        shapes |= linear(f"{key}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{key}.mlp.fc1", WIDTH, 4 * WIDTH)
        shapes |= linear(f"{key}.mlp.fc2", 4 * WIDTH, WIDTH)
        shapes |= linear(f"{key}.skip_linear", 2 * WIDTH, WIDTH) if key.startswith("out") else {}
    if conv:
        shapes |= {
            "final_layer.weight": (channels, channels, 3, 3),
            "final_layer.bias": (channels,),
        }
    return filled(shapes)


def uvit(s: State, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Tokens are [label, time, patches]."""
    table = next(v for k, v in s.items() if k.startswith("label_emb"))
    patch = s["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
    tokens = [table[label][:, None], sinusoid(t, WIDTH)[:, None], x.flatten(2).transpose(1, 2)]
    x = torch.cat(tokens, 1) + s["pos_embed"]

    def norm(key: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), s[f"{key}.weight"], s[f"{key}.bias"], 1e-5)

    def block(key: str, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if skip is not None:
            x = apply(s, f"{key}.skip_linear", torch.cat([x, skip], -1))
        x = x + attention(s, f"{key}.attn", norm(f"{key}.norm1", x))
        y = F.gelu(apply(s, f"{key}.mlp.fc1", norm(f"{key}.norm2", x)))
        return x + apply(s, f"{key}.mlp.fc2", y)

    skips = []
    for i in range(DEPTH // 2):
        skips.append(x := block(f"in_blocks.{i}", x))
    x = block("mid_block", x)
    for i in range(DEPTH // 2):
        x = block(f"out_blocks.{i}", x, skips.pop())
    x = unpatch(apply(s, "decoder_pred", norm("norm", x))[:, 2:], patch)
    if "final_layer.weight" in s:
        x = F.conv2d(x, s["final_layer.weight"], s["final_layer.bias"], padding=1)
    return x


# -------------------------------------------------------------------------------------- the files


def outputs(name: str, channels: int, times: tuple[float, float], network: object) -> None:
    """NAME.npz: x and output NCHW, t, label."""
    x = torch.randn(2, channels, SIZE, SIZE)
    t, label = torch.tensor(times), torch.tensor([3, CLASSES])
    with torch.no_grad():
        found = {"x": x, "t": t, "label": label, "output": network(x, t, label)}
    np.savez(FOLDER / f"{name}.npz", **{k: v.numpy() for k, v in found.items()})


def list_dit_xl() -> None:
    """dit_xl.diffusers.txt: `key shape` of every tensor of DiT-XL/2 as diffusers builds it."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(out_channels=8)  # the other defaults are DiT-XL/2's
    lines = [f"{k} {','.join(map(str, v.shape))}" for k, v in model.state_dict().items()]
    (FOLDER / "dit_xl.diffusers.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Writes all files."""
    torch.manual_seed(0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    list_dit_xl()

    theirs = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=DIT_CHANNELS,
        out_channels=2 * DIT_CHANNELS, num_layers=DEPTH, sample_size=SIZE, patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
    ).eval()  # fmt: skip
    state = filled({k: tuple(v.shape) for k, v in theirs.state_dict().items()})
    for key in list(state):  # the embedders of all blocks are one
        if ".norm1.emb." in key:
            state[key] = state[key.replace(f"blocks.{key.split('.')[1]}", "blocks.0")]
    theirs.load_state_dict(state)
    theirs.save_pretrained(FOLDER / "dit_diffusers")
    outputs("dit_diffusers", DIT_CHANNELS, (0.0, 742.0), lambda x, t, y: theirs(x, t, y).sample)

    ema = dit_state()
    training = {
        "model": {k: v if k == "pos_embed" else 0.5 * v for k, v in ema.items()}, "ema": ema,
        "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-XL/2", image_size=256),
    }  # fmt: skip
    torch.save(training, FOLDER / "dit.pt")
    outputs("dit", DIT_CHANNELS, (0.0, 742.0), lambda x, t, y: dit(ema, x, t, y))

    state = uvit_state(UVIT_CHANNELS, PATCH, "label_emb.weight", conv=True)
    torch.save(state, FOLDER / "uvit_ema.pth")
    outputs("uvit_ema", UVIT_CHANNELS, (1.0, 1000.0), lambda x, t, y: uvit(state, x, t, y))

    usit = uvit_state(USIT_CHANNELS, 1, "label_emb.embedding_table.weight", conv=False)
    usit = {k: v.to(torch.bfloat16) for k, v in usit.items()}
    whole = {f"diffusion_model.{k}": v for k, v in usit.items()}
    whole |= {"autoencoder.encoder.project_in.conv.weight": torch.ones(2, 3)}
    save_file(whole, FOLDER / "usit_official.safetensors")
    exact = {k: v.float() for k, v in usit.items()}
    outputs("usit_official", USIT_CHANNELS, (0.25, 0.875), lambda x, t, y: uvit(exact, x, t, y))
    print(f"{sum(p.stat().st_size for p in FOLDER.rglob('*.*')) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
