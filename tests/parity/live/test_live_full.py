"""Autoencoders of full width against diffusers: f32c32 (323 M parameters) and SD-VAE f8."""

from pathlib import Path
from typing import Any

import diffusers
import diffusers_configs
import original
import ours

# Relative to the largest value, as in test_live_models.py; measured: at most 3e-6.
VALUES = 5e-6
SIZES = (128, 256)


def check(compare: Any, name: str, model: Any, folder: Path) -> None:
    """Saved by PyTorch, imported, and run on both sides."""
    model.save_pretrained(folder)
    found = ours.imported(folder)
    for size in SIZES:
        x = original.normal(f"{name} {size}", 1, size, size, 3)
        z = original.run(original.encode(model), x)
        y = original.run(original.decode(model), z)
        compare(
            name, f"{size} px", VALUES,
            latent=(ours.encode(found.cfg, found.variables, x), z),
            reconstruction=(ours.decode(found.cfg, found.variables, z), y),
        )  # fmt: skip


def test_f32c32(compare: Any, tmp_path: Path) -> None:
    """With weights of the scale of trained ones, where the norms' eps hardly counts."""
    model = original.fill(diffusers.AutoencoderDC(**diffusers_configs.DC_AE["f32c32-in"]), 1.0)
    check(compare, "f32c32-in", model, tmp_path / "model")


def test_sd_vae_f8(compare: Any, tmp_path: Path) -> None:
    model = original.fill(diffusers.AutoencoderKL(**diffusers_configs.SD_VAE_F8))
    check(compare, "sd-vae-f8", model, tmp_path / "model")
