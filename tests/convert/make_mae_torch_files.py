"""Writes tests/convert/mae_files: narrow masked autoencoders as PyTorch saves them, and outputs.

    .venv-parity/bin/python tests/convert/make_mae_torch_files.py

Needs torch, transformers and safetensors; nothing is read from dcae_jax.  The networks are
transformers' ViTMAEForPreTraining, saved by itself; the files under the names of MAE's own code
(facebookresearch/mae) hold the same values, paired by hand below.
"""

import pathlib
import shutil

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

FOLDER = pathlib.Path(__file__).parent / "mae_files"
WIDTH, DECODER_WIDTH, PATCH, SIDE = 12, 8, 2, 8
SIZES = {
    "image_size": SIDE, "patch_size": PATCH, "num_channels": 3, "hidden_size": WIDTH,
    "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 2 * WIDTH,
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": DECODER_WIDTH, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 2 * DECODER_WIDTH,
}  # fmt: skip


def sines(width: int) -> torch.Tensor:
    """The fixed positions of the paper's code, zeros for the class token first; column first."""
    speed = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    rows = [np.zeros(width)]
    for row in range(SIDE // PATCH):
        for column in range(SIDE // PATCH):
            rows += [
                np.concatenate([f(p * speed) for p in (column, row) for f in (np.sin, np.cos)])
            ]
    return torch.tensor(np.stack(rows), dtype=torch.float32)[None]


def fill(net: torch.nn.Module) -> None:
    """Random values of a size at which every part of the network matters, positions aside."""
    with torch.no_grad():
        for key, value in net.named_parameters():
            if key.endswith("position_embeddings"):
                value.copy_(sines(WIDTH))
            elif key.endswith("decoder_pos_embed"):
                value.copy_(sines(DECODER_WIDTH))
            elif "norm" in key and key.endswith("weight"):
                value.copy_(torch.rand(value.shape) + 0.5)
            else:
                value.copy_(torch.randn(value.shape) / max(value[0].numel(), 4) ** 0.5)


def original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of ViTMAEForPreTraining under the names of MAE's own code."""
    outer = {
        "vit.embeddings.cls_token": "cls_token", "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.layernorm": "norm",
        "decoder.decoder_embed": "decoder_embed", "decoder.mask_token": "mask_token",
        "decoder.decoder_pos_embed": "decoder_pos_embed", "decoder.decoder_norm": "decoder_norm",
        "decoder.decoder_pred": "decoder_pred",
    }  # fmt: skip
    inner = {
        "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2", "layernorm_before": "norm1", "layernorm_after": "norm2",
    }  # fmt: skip
    found = {}
    for theirs, ours in outer.items():
        for end in ("", ".weight", ".bias"):
            if theirs + end in state:
                found[ours + end] = state[theirs + end]
    blocks = [
        *((f"vit.encoder.layer.{i}.", f"blocks.{i}.") for i in range(2)),
        ("decoder.decoder_layers.0.", "decoder_blocks.0."),
    ]
    for theirs, ours in blocks:
        for end in ("weight", "bias"):
            roles = [f"attention.attention.{role}.{end}" for role in ("query", "key", "value")]
            found[f"{ours}attn.qkv.{end}"] = torch.cat([state[theirs + role] for role in roles])
            found |= {f"{ours}{b}.{end}": state[f"{theirs}{a}.{end}"] for a, b in inner.items()}
    assert sum(v.numel() for v in found.values()) == sum(v.numel() for v in state.values())
    return {key: value.clone() for key, value in found.items()}


def outputs(name: str, net: ViTMAEForPreTraining) -> None:
    """NAME.npz: x NCHW and noise, the same for all; what encoder and whole make of them; loss."""
    torch.manual_seed(1)
    x, noise = torch.randn(2, 3, SIDE, SIDE), torch.rand(2, (SIDE // PATCH) ** 2)
    with torch.no_grad():
        found = net(x, noise=noise)
        encoded = net.vit(x, noise=noise).last_hidden_state
    values = {"x": x, "noise": noise, "encoded": encoded, "output": found.logits}
    values["loss"] = found.loss
    np.savez(FOLDER / f"{name}.npz", **{k: v.numpy() for k, v in values.items()})


def main() -> None:
    """Writes all files."""
    torch.manual_seed(0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    config = ViTMAEConfig(**SIZES, **DECODER, norm_pix_loss=True, mask_ratio=0.6)
    net = ViTMAEForPreTraining(config).eval()
    fill(net)
    # The eps of transformers would drown in the variances of usual activations: one norm's input
    # is made so small that 1e-12 and 1e-6 differ.
    with torch.no_grad():
        net.decoder.decoder_embed.weight.mul_(1e-3)
        net.decoder.decoder_embed.bias.mul_(1e-3)
    net.save_pretrained(FOLDER / "pretraining")  # as this version writes it
    net.vit.save_pretrained(FOLDER / "encoder")
    outputs("pretraining", net)

    state = load_file(FOLDER / "pretraining" / "model.safetensors")
    state = {k.replace("decoder_encoder.layer.", "decoder_layers."): v for k, v in state.items()}
    torch.save({"model": original(state)}, FOLDER / "original.pth")
    for module in net.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6  # of the original
    outputs("original", net)

    sizes = {**SIZES, "num_hidden_layers": 0}
    classifier = ViTForImageClassification(ViTConfig(**sizes, num_labels=2))
    classifier.save_pretrained(FOLDER / "classifier")
    for path in FOLDER.rglob("*.*"):
        path.chmod(0o644)
    print(f"{sum(p.stat().st_size for p in FOLDER.rglob('*.*')) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
