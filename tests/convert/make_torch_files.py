"""Writes tests/convert/files: narrow autoencoders as PyTorch and diffusers themselves save them.

    .venv-parity/bin/python tests/convert/make_torch_files.py

Needs torch and diffusers; nothing is read from dcae_jax.
"""

import copy
import pathlib
import shutil
import types

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import nn

FOLDER = pathlib.Path(__file__).parent / "files"
DC = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (4, 4, 8),
    "decoder_block_out_channels": (4, 4, 8),
    "encoder_layers_per_block": (0, 2, 1),
    "decoder_layers_per_block": (0, 1, 2),
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
    "decoder_act_fns": ("relu", "relu", "silu"),
    "scaling_factor": 0.75,
}
KL = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 2,
    "latent_channels": 2,
    "scaling_factor": 0.5,
}


def randomise(model: nn.Module) -> nn.Module:
    """Random statistics of BatchNorms and random norms, so that no tensor is all 0 or 1."""
    for key, tensor in model.state_dict().items():
        if tensor.dtype is torch.int64:
            tensor.fill_(1234)
        elif tensor.ndim == 1:
            tensor.copy_(torch.rand_like(tensor) + 0.5 * (not key.endswith("bias")))
    return model.eval()


def outputs(model: nn.Module) -> dict[str, np.ndarray]:
    """Input, latent and reconstruction of a small image, NCHW."""
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        encoded = model.encode(image)
        latent = encoded.latent if isinstance(model, AutoencoderDC) else encoded.latent_dist.mode()
        decoded = model.decode(latent).sample
    found = {"input": image, "latent": latent, "reconstruction": decoded}
    return {name: tensor.numpy() for name, tensor in found.items()}


def training_checkpoint(state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """An autoencoder and a discriminator in one module list, as trainers hold them."""
    ae = {f"0.{key}": t * scale if t.is_floating_point() else t for key, t in state.items()}
    return {**ae, "1.layers.0.weight": torch.ones(2, 3)}


def main() -> None:
    """Writes all files."""
    torch.manual_seed(0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    dc, kl = randomise(AutoencoderDC(**DC)), randomise(AutoencoderKL(**KL))
    dc.save_pretrained(FOLDER / "dc")
    dc.save_pretrained(FOLDER / "dc_sharded", max_shard_size="20KB")
    copy.deepcopy(dc).to(torch.bfloat16).save_pretrained(FOLDER / "dc_bf16")
    kl.save_pretrained(FOLDER / "kl")
    state = dc.state_dict()
    checkpoint = {
        "model_state_dict": training_checkpoint(state, 1.0),
        "ema": {0.9999: training_checkpoint(state, 0.5)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "step": 12,
    }
    torch.save(checkpoint, FOLDER / "training.pth")
    other = {"state_dict": {"w": torch.ones(2)}, "args": types.SimpleNamespace(lr=1e-4)}
    torch.save(other, FOLDER / "namespace.pth")
    for model, name in ((dc, "dc"), (kl, "kl")):
        np.savez(FOLDER / f"{name}.npz", **outputs(model))


if __name__ == "__main__":
    main()
