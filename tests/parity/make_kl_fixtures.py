"""Writes tests/parity/kl_vae.npz: outputs of the PyTorch original for narrow AutoencoderKLs.

    python -m venv /tmp/torch && /tmp/torch/bin/pip install torch==2.13.0 diffusers==0.42.1
    /tmp/torch/bin/python tests/parity/make_kl_fixtures.py

The original is diffusers' AutoencoderKL on CPU in float32.  Needs no JAX.  Weights are those of
weights.py, given to PyTorch through the names below; only outputs are stored.  Beside them are the
names and shapes of the full-size SD-VAE f8, built without memory on torch's meta device.
"""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import weights  # noqa: E402

MODELS: dict[str, dict[str, Any]] = {
    "f4": dict(
        block_out_channels=(16, 16, 32), layers_per_block=2, latent_channels=4, norm_num_groups=8,
    ),
    "f16": dict(
        block_out_channels=(16, 32, 32, 32, 64), layers_per_block=1, latent_channels=8,
        norm_num_groups=4, use_quant_conv=False,
    ),
    "f4-plain": dict(
        block_out_channels=(16, 16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    ),
}  # fmt: skip
SIZES = {"f4": ((32, 32), (24, 40)), "f16": ((64, 96),), "f4-plain": ((16, 24),)}
SD_VAE = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    norm_num_groups=32,
)  # fmt: skip

INNER = (
    (r"mid_block\.resnets\.(\d)", r"mid/block_\1"),
    (r"mid_block\.attentions\.0", "mid/attn"),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down_\1/block_\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.conv", r"down_\1/down"),
    (r"group_norm", "norm"), (r"to_out\.0", "proj"), (r"to_([qkv])", r"\1"),
    (r"conv_shortcut", "shortcut"), (r"conv_norm_out", "norm_out"),
)  # fmt: skip


def module_path(name: str, stages: int) -> str:
    """decoder.up_blocks.0.resnets.1.conv1 -> decoder/up_3/block_1/conv1 (of four stages)."""
    if name in ("quant_conv", "post_quant_conv"):
        return {"q": "encoder/quant", "p": "decoder/post_quant"}[name[0]]
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets\.(\d+)\.|upsamplers)", name):
        stage = f"decoder/up_{stages - 1 - int(match[1])}"
        if match[2] == "upsamplers":
            return f"{stage}/up"
        name = f"{stage}.block_{match[3]}.{name[match.end() :]}"
    for pattern, ours in INNER:
        name = re.sub(pattern, ours, name)
    return name.replace(".", "/")


def leaf(path: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor in torch's layout."""
    if key == "bias":
        return weights.weight(f"params/{path}/bias", shape)
    if len(shape) == 1:
        return weights.weight(f"params/{path}/scale", shape)
    if len(shape) == 2 or shape[2:] == (1, 1):
        return weights.weight(f"params/{path}/kernel", shape[1::-1]).T.reshape(shape)
    out, inputs, height, width = shape
    kernel = weights.weight(f"params/{path}/kernel", (height, width, inputs, out))
    return kernel.transpose(3, 2, 0, 1)


def state_dict(model: AutoencoderKL) -> dict[str, Any]:
    """Every tensor of the original filled from weights.py."""
    stages = len(model.config.block_out_channels)
    filled = {}
    for key, old in model.state_dict().items():
        name, kind = key.rsplit(".", 1)
        value = leaf(module_path(name, stages), kind, tuple(old.shape))
        filled[key] = torch.from_numpy(np.ascontiguousarray(value))
    return filled


def nchw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A named input or cotangent, made channels last."""
    return torch.from_numpy(weights.normal(name, shape)).permute(0, 3, 1, 2)


def outputs(model: AutoencoderKL, name: str, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Moments of the latent, reconstruction of a sample, and the gradient by the image."""
    tag = f"{name}/{size[0]}x{size[1]}"
    x = nchw(f"{tag}/x", (2, *size, 3)).requires_grad_()
    posterior = model.encode(x).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    b, c, h, w = mean.shape
    y = model.decode(mean + posterior.std * nchw(f"{tag}/noise", (b, h, w, c))).sample
    (dx,) = torch.autograd.grad((y * nchw(f"{tag}/dy", (2, *size, 3))).sum(), x)
    found = {
        f"{tag}/mean": nhwc(mean), f"{tag}/logvar": nhwc(logvar),
        f"{tag}/kl": posterior.kl().detach().numpy(),
    }  # fmt: skip
    for key, value in {"y": y, "dx": dx}.items():
        flat = nhwc(value).reshape(-1)
        found[f"{tag}/{key}"] = flat[weights.sample(f"{tag}/{key}", flat.size)]
    return found


def nhwc(x: torch.Tensor) -> np.ndarray:
    """As a channels-last array."""
    return x.detach().permute(0, 2, 3, 1).numpy()


def build(arguments: dict[str, Any]) -> AutoencoderKL:
    """The original with as many down and up blocks as widths."""
    stages = len(arguments["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages, **arguments,
    ).eval()  # fmt: skip


def sd_vae_shapes() -> list[str]:
    """ "path shape" of every tensor of SD-VAE f8, in our names and torch's shapes."""
    with torch.device("meta"):
        model = build(SD_VAE)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    found = []
    for key, tensor in model.state_dict().items():
        name, kind = key.rsplit(".", 1)
        found.append(f"{module_path(name, 4)}/{kind} {tuple(tensor.shape)}")
    return sorted(found)


def main() -> None:
    """Writes the file and prints its size and the scale of each value."""
    found: dict[str, np.ndarray] = {"sd-vae": np.array(sd_vae_shapes())}
    for name, arguments in MODELS.items():
        model = build(arguments)
        model.load_state_dict(state_dict(model), strict=True)
        for size in SIZES[name]:
            found |= outputs(model, name, size)
    np.savez_compressed(HERE / "kl_vae.npz", **found)
    for key, value in found.items():
        if value.dtype == np.float32:
            rms = np.sqrt(np.mean(value**2))
            print(f"{key:24} {value.shape!s:20} rms {rms:.3g}, largest {np.abs(value).max():.3g}")
    print(f"{(HERE / 'kl_vae.npz').stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
