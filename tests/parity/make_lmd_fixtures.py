"""Writes tests/parity/lmd.npz: outputs, losses and gradients of PyTorch's masked autoencoder.

    python -m venv /tmp/torch && /tmp/torch/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/torch/bin/python tests/parity/make_lmd_fixtures.py

CPU, float32, no JAX.  The network and its loss are transformers' ViTMAEForPreTraining, with the
norms' eps of the original (1e-6) and, in one case, the decoder's positions negated, as LMD's code
has them.  Weights are those of weights.py under our paths, layer i of a stack as "blocks/i".
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae import modeling_vit_mae

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import mae_cases  # noqa: E402
import weights  # noqa: E402

STORED = 48  # values of each gradient that the file keeps
INNER = {
    "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn/proj",
    "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2",
}  # fmt: skip
OUTER = {
    "vit.embeddings.patch_embeddings.projection": "encoder/patch_embed",
    "vit.layernorm": "encoder/norm", "decoder.decoder_embed": "decoder/embed",
    "decoder.decoder_norm": "decoder/norm", "decoder.decoder_pred": "decoder/head",
}  # fmt: skip
TOKENS = {"vit.embeddings.cls_token": "encoder/cls", "decoder.mask_token": "decoder/mask_token"}


def place(key: str) -> tuple[str, int | None]:
    """(our path, third of it or None for the whole) of one of their parameters."""
    if key in TOKENS:
        return TOKENS[key], None
    module, leaf = key.rsplit(".", 1)
    if module in OUTER:
        path, third = OUTER[module], None
    else:
        side, _, i, inner = module.split(".", 3)
        third = "qkv".index(inner[-6]) if inner[-6:] in ("q_proj", "k_proj", "v_proj") else None
        name = "attn/qkv" if third is not None else INNER[inner]
        path = f"{'encoder' if side == 'vit' else 'decoder'}/blocks/{i}/{name}"
    kernel = "scale" if "norm" in path.rsplit("/", 1)[-1] else "kernel"
    return f"{path}/{kernel if leaf == 'weight' else leaf}", third


def to_ours(value: np.ndarray) -> np.ndarray:
    """Their tensor in our layout: kernels [in, out], patch kernels [p, p, in, out]."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if value.ndim == 2:
        return value.T
    return value.reshape(-1)


def to_theirs(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse."""
    if len(shape) == 4:
        return value.transpose(3, 2, 0, 1)
    return value.T if len(shape) == 2 else value.reshape(shape)


def build(name: str) -> ViTMAEForPreTraining:
    """Their network of a case, with the weights of weights.py."""
    case, net = mae_cases.CASES[name], mae_cases.CASES[name]["net"]
    config = ViTMAEConfig(
        image_size=net["input_size"][0], patch_size=net["patch"], num_channels=net["in_channels"],
        hidden_size=net["width"], num_hidden_layers=net["depth"],
        num_attention_heads=net["heads"], intermediate_size=4 * net["width"],
        decoder_hidden_size=net["decoder_width"], decoder_num_hidden_layers=net["decoder_depth"],
        decoder_num_attention_heads=net["decoder_heads"],
        decoder_intermediate_size=4 * net["decoder_width"], layer_norm_eps=1e-6,
        # They keep int(tokens * (1 - ratio)).
        mask_ratio=1 - (case["keep"] + 0.5) / mae_cases.tokens(case),
        norm_pix_loss=case["whiten"],
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(_weight(key, tuple(parameter.shape))))
        model.vit.embeddings.position_embeddings.copy_(_positions(config, config.hidden_size))
        positions = _positions(config, config.decoder_hidden_size)
        model.decoder.decoder_pos_embed.copy_(net["decoder_pos_sign"] * positions)
    return model.eval()


def _positions(config: ViTMAEConfig, width: int) -> torch.Tensor:
    """Their table; this version leaves zeros in a network that is not read from a file."""
    side = config.image_size // config.patch_size
    table = modeling_vit_mae.build_2d_sinusoidal_position_embedding(
        height=side, width=side, embed_dim=width, cls_token=True
    )
    # As their initialize_weights does: the width's half first, as in the original.
    return torch.cat([table[:, width // 2 :], table[:, : width // 2]], dim=1)[None]


def _weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    path, third = place(key)
    ours = to_ours(np.empty(shape)).shape
    if third is None:
        return to_theirs(weights.weight(f"params/{path}", ours), shape).copy()
    whole = weights.weight(f"params/{path}", (*ours[:-1], 3 * ours[-1]))
    return to_theirs(np.split(whole, 3, axis=-1)[third], shape).copy()


def theirs(name: str) -> dict[str, np.ndarray]:
    """{"y": tokens, "loss", "dx", "grad/PATH" of each of our leaves, layer by layer}."""
    model, (x, noise) = build(name), mae_cases.inputs(name)
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    out = model(pixels, noise=torch.from_numpy(noise))
    out.loss.backward()
    found: dict[str, Any] = {
        "y": out.logits.detach().numpy(), "loss": out.loss.detach().numpy(),
        "dx": pixels.grad.permute(0, 2, 3, 1).numpy(),
    }  # fmt: skip
    thirds: dict[str, dict[int, np.ndarray]] = {}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path, third = place(key)
        grad = to_ours(parameter.grad.numpy())
        if third is None:
            found[f"grad/{path}"] = grad
        else:
            thirds.setdefault(path, {})[third] = grad
    for path, parts in thirds.items():
        found[f"grad/{path}"] = np.concatenate([parts[i] for i in range(3)], axis=-1)
    return found


def main() -> None:
    """Writes the file."""
    torch.manual_seed(0)
    stored = {}
    for name in mae_cases.CASES:
        for key, value in theirs(name).items():
            path = f"{name}/{key}"
            if key.startswith("grad/"):
                value = value.reshape(-1)[weights.sample(path, value.size, STORED)]
            stored[path] = value.astype(np.float32)
    np.savez_compressed(HERE / "lmd.npz", **stored)


if __name__ == "__main__":
    main()
