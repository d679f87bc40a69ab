"""Writes tests/parity/dcae.npz: outputs of the PyTorch original for narrow DC-AEs of each family.

    python -m venv /tmp/torch && /tmp/torch/bin/pip install torch==2.13.0 diffusers==0.42.1
    /tmp/torch/bin/python tests/parity/make_dcae_fixtures.py

The original is diffusers' AutoencoderDC on CPU in float32.  Needs no JAX.  Weights are those of
weights.py, given to PyTorch through the names below; only outputs are stored.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE / "live"))
import original  # noqa: E402
import weights  # noqa: E402

WIDTHS = (32, 32, 64, 64, 128)
SIZES = ((32, 32), (64, 96))  # at the first the attention is quadratic, at the second also linear
R, E = "ResBlock", "EfficientViTBlock"
NONE5 = ((),) * 5
FIVES = ((), (), (), (5,), (5,))
COMMON = dict(
    in_channels=3, encoder_block_out_channels=WIDTHS, decoder_block_out_channels=WIDTHS,
    attention_head_dim=32,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "in": dict(
        latent_channels=32,
        encoder_block_types=(R, R, R, E, E), decoder_block_types=(R, R, R, E, E),
        encoder_layers_per_block=(0, 1, 2, 1, 1), decoder_layers_per_block=(0, 1, 2, 1, 1),
        encoder_qkv_multiscales=NONE5, decoder_qkv_multiscales=NONE5,
        decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * 2,
        decoder_act_fns=("relu",) * 3 + ("silu",) * 2,
    ),
    "sana": dict(
        latent_channels=32,
        encoder_block_types=(R, R, R, E, E), decoder_block_types=(R, R, R, E, E),
        encoder_layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        encoder_qkv_multiscales=FIVES, decoder_qkv_multiscales=FIVES,
        downsample_block_type="conv", upsample_block_type="interpolate",
    ),
    "lite": dict(
        latent_channels=32,
        encoder_block_types=(R, R, R, E, E), decoder_block_types=R,
        encoder_layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(0, 1, 1, 1, 1),
        encoder_qkv_multiscales=FIVES, decoder_qkv_multiscales=NONE5,
        downsample_block_type="conv", decoder_conv_act_fn="silu",
    ),
    "1.5": dict(
        latent_channels=48,
        encoder_block_types=R, decoder_block_types=R,
        encoder_layers_per_block=(0, 1, 1, 1, 1), decoder_layers_per_block=(0, 1, 1, 1, 1),
        encoder_qkv_multiscales=NONE5, decoder_qkv_multiscales=NONE5,
        encoder_out_shortcut=False, decoder_in_shortcut=False, decoder_conv_act_fn="silu",
    ),
}  # fmt: skip

INNER = {
    "conv1": "conv1", "conv2": "conv2", "norm": "norm", "conv": "",
    "attn.to_out": "attn/proj", "attn.norm_out": "attn/norm",
    "attn.to_qkv_multiscale.0.proj_in": "attn/multiscale_5/depthwise",
    "attn.to_qkv_multiscale.0.proj_out": "attn/multiscale_5/pointwise",
    "conv_out.conv_inverted": "glumb/inverted", "conv_out.conv_depth": "glumb/depth",
    "conv_out.conv_point": "glumb/point", "conv_out.norm": "glumb/norm",
}  # fmt: skip


def module_path(name: str, depths: dict[str, tuple[int, ...]]) -> str:
    """encoder.down_blocks.1.0.conv1 -> encoder/stage_1/block_0/conv1."""
    side, rest = name.split(".", 1)
    if not rest.startswith(("down_blocks", "up_blocks")):
        return f"{side}/{rest.split('.')[0]}"
    _, stage, position, inner = rest.split(".", 3)
    s, k = int(stage), int(position)
    has_up = side == "decoder" and s < len(WIDTHS) - 1
    if has_up and k == 0:
        return f"decoder/stage_{s}/up"
    if side == "encoder" and k == depths[side][s]:
        return f"encoder/stage_{s}/down"
    return f"{side}/stage_{s}/block_{k - has_up}/{INNER[inner]}"


def kernel(path: str, torch_shape: tuple[int, ...]) -> np.ndarray:
    """The weight of a convolution or Linear in torch's layout."""
    if path.endswith("pointwise/kernel"):  # [in a group, out] here, [out, in a group, 1, 1] there
        return weights.weight(path, torch_shape[1::-1]).T.reshape(torch_shape)
    if len(torch_shape) == 2 or torch_shape[2:] == (1, 1):
        return weights.weight(path, torch_shape[1::-1]).T.reshape(torch_shape)
    out, inputs, height, width = torch_shape
    return weights.weight(path, (height, width, inputs, out)).transpose(3, 2, 0, 1)


def state_dict(model: AutoencoderDC, depths: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Every tensor of the original filled from weights.py; q, k, v are thirds of one projection."""
    filled, state = {}, model.state_dict()
    batch_norms = {
        module_path(k.removesuffix(".running_var"), depths) for k in state if "running_var" in k
    }
    for key, old in state.items():
        name, leaf = key.rsplit(".", 1)
        if leaf == "num_batches_tracked":
            filled[key] = old
            continue
        role = name.rsplit(".", 1)[-1]
        if role in ("to_q", "to_k", "to_v"):
            block = name.removesuffix(f"attn.{role}") + "conv1"
            path = "params/" + module_path(block, depths).replace("conv1", "attn/qkv") + "/kernel"
            c = old.shape[0]
            rows = weights.weight(path, (c, 3 * c)).T
            third = ("to_q", "to_k", "to_v").index(role)
            value = rows[third * c : (third + 1) * c]
        else:
            path = module_path(name, depths)
            if leaf.startswith("running_"):
                value = weights.weight(f"batch_stats/{path}/{leaf[8:]}", tuple(old.shape))
            elif leaf == "weight" and old.ndim > 1:
                value = kernel(f"params/{path}/kernel", tuple(old.shape))
                if weights.before_rms(path, batch_norms):
                    value = value * np.float32(weights.SMALL)
            else:
                leaf = {"weight": "scale", "bias": "bias"}[leaf]
                value = weights.weight(f"params/{path}/{leaf}", tuple(old.shape))
        assert value.shape == tuple(old.shape), (key, value.shape, tuple(old.shape))
        filled[key] = torch.from_numpy(np.ascontiguousarray(value))
    return filled


def outputs(model: AutoencoderDC, name: str, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Latent, reconstruction, and the gradient of the whole by an image that meets no kink."""
    tag = f"{name}/{size[0]}x{size[1]}"
    images = {i: weights.normal(f"{tag}/x{i}", (2, *size, 3)) for i in range(100)}
    chosen, gap = original.off_kinks(original.both(model), images.values())
    index = next(i for i, image in images.items() if image is chosen)
    print(f"{tag}: image {index}, ReLU inputs at least {gap:.2g} of the largest")
    x = original.nchw(chosen).requires_grad_()
    z = model.encode(x).latent
    y = model.decode(z).sample
    cotangent = torch.from_numpy(weights.normal(f"{tag}/dy", (2, *size, 3))).permute(0, 3, 1, 2)
    (dx,) = torch.autograd.grad((y * cotangent).sum(), x)
    large = {"y": y, "dx": dx}
    found = {f"{tag}/image": np.array(index), f"{tag}/z": nhwc(z)}
    for key, value in large.items():
        flat = nhwc(value).reshape(-1)
        found[f"{tag}/{key}"] = flat[weights.sample(f"{tag}/{key}", flat.size)]
    return found


def nhwc(x: torch.Tensor) -> np.ndarray:
    """As a channels-last array."""
    return x.detach().permute(0, 2, 3, 1).numpy()


def main() -> None:
    """Writes the file and prints its size and the scale of each value."""
    found: dict[str, np.ndarray] = {}
    for name, arguments in MODELS.items():
        model = AutoencoderDC(**COMMON, **arguments).eval()
        depths = {
            "encoder": arguments["encoder_layers_per_block"],
            "decoder": arguments["decoder_layers_per_block"],
        }
        model.load_state_dict(state_dict(model, depths), strict=True)
        for size in SIZES:
            found |= outputs(model, name, size)
    np.savez_compressed(HERE / "dcae.npz", **found)
    for key, value in found.items():
        print(f"{key:24} {value.shape!s:20} rms {np.sqrt(np.mean(value**2)):.3g}")
    print(f"{(HERE / 'dcae.npz').stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
