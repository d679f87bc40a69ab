"""Makes the workdirs of a three-phase run as a loop would leave them, with invented numbers.

`write_run(root, phases=3)` returns root; real photographs are blurred to look like reconstructions.
"""

import json
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageFilter

from dcae_jax.report import images, writers

LOW, HIGH = "photos-128-test", "photos-256-test"
TRAINING = "photos-128-train"
BASELINES = {
    LOW: {
        "bicubic-32": {"psnr_pooled": 20.91, "psnr": 21.74, "ssim": 0.452},
        "pca-3": {"psnr_pooled": 21.62, "psnr": 22.38, "ssim": 0.481},
        "pca-32": {"psnr_pooled": 25.87, "psnr": 26.71, "ssim": 0.688},
    },
    HIGH: {
        "bicubic-32": {"psnr_pooled": 22.40, "psnr": 23.11, "ssim": 0.521},
        "pca-3": {"psnr_pooled": 22.97, "psnr": 23.60, "ssim": 0.543},
        "pca-32": {"psnr_pooled": 27.02, "psnr": 27.75, "ssim": 0.742},
    },
}
# Per phase: pooled PSNR at the low and the high resolution before and after, and its description.
_PSNR = [
    ((6.1, 24.03), (6.4, 22.71)),
    ((24.03, 23.71), (22.71, 25.64)),
    ((23.71, 23.5), (25.64, 25.4)),
]
_NAMES = ("phase1", "phase2", "phase3")
_TRAINED = (
    "everything",
    "encoder head, decoder input: encoder/conv_out, decoder/conv_in, decoder/stage_5",
    "decoder head: decoder/stage_0, decoder/norm_out, decoder/conv_out; discriminator",
)


def write_run(root: Path, phases: int = 3, steps: int = 1200, pictures: bool = True) -> Path:
    """Writes `phases` of the three phases below root."""
    for index in range(phases):
        _write_phase(Path(root) / _NAMES[index], index, steps // (1 if index == 0 else 2), pictures)
    return Path(root)


def _write_phase(workdir: Path, index: int, steps: int, pictures: bool) -> None:
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(_config(index, steps)))
    metrics, grids = writers.MetricsWriter(workdir, 0), writers.ImageWriter(workdir)
    rng = np.random.default_rng(index)
    for step in range(0, steps + 1, 10):
        if step:
            metrics.write_scalars(step, _train_row(index, step, steps, rng))
        if step % (steps // 6) == 0:
            metrics.write_scalars(step, _eval_row(index, step / steps))
        if pictures and step in (0, steps):
            grids.write_images(step, _grids(index, step / steps))
    metrics.close()
    (workdir / "summary.json").write_text(json.dumps(_summary(index, steps)))


def _config(index: int, steps: int) -> dict:
    tree = {
        "name": "f32c32 on the built-in photographs",
        "seed": 0,
        "steps": steps,
        "batch": 8,
        "data": {"resolution": (128, 256, 128)[index], "source": {"min_size": 0}},
        "task": {"phase": ("low_res_full", "high_res_latent", "low_res_local")[index]},
        "optim": {"lr": (1e-3, 3e-4, 2e-4)[index], "groups": [{"pattern": "/(bias|scale)$"}]},
        "init_from": None if index == 0 else f"<script>alert({index})</script>",
    }
    versions = {"jax": "0.10.2", "flax": "0.12.8", "numpy": "2.4.6"}
    return {"config": tree, "commit": "0123abc", "versions": versions, "device": "2 CPU cores"}


def _progress(before: float, after: float, fraction: float) -> float:
    return before + (after - before) * (1 - np.exp(-6 * fraction)) / (1 - np.exp(-6))


def _train_row(index: int, step: int, steps: int, rng: np.random.Generator) -> dict:
    l1 = 0.05 + 0.25 * np.exp(-5 * step / steps) * (index == 0) + 0.006 * rng.standard_normal()
    row = {
        "train/loss": l1 * 1.2,
        "train/l1": l1,
        "train/lpips": 0.2 * l1,
        "train/ae/lr": 1e-3 * min(step / 100, 1) * (0.5 + 0.5 * np.cos(np.pi * step / steps)),
        "train/ae/grad_norm": 0.4 + 0.1 * rng.random(),
        "train/images_per_s": 33 + rng.standard_normal(),
        "train/data_wait": 0.004 + 0.002 * rng.random(),
    }
    if index == 2:
        row["train/adaptive_weight"] = min(max(step - 90, 0) / 100, 1) * (0.8 + 0.2 * rng.random())
        row["train/disc/update_norm"] = 0.02 + 0.004 * rng.random()
        row["train/disc/logits_real"] = rng.standard_normal()
    return row


def _scores(pooled: float) -> dict:
    return {"psnr_pooled": pooled, "psnr": pooled + 0.8, "ssim": (pooled - 4) / 30}


def _evals(index: int, fraction: float) -> dict:
    low, high = (_progress(*ends, fraction) for ends in _PSNR[index])
    return {LOW: _scores(low), HIGH: _scores(high), TRAINING: _scores(low + 0.9)}


def _eval_row(index: int, fraction: float) -> dict:
    found = _evals(index, fraction)
    return {f"{e}/{metric}": v for e, scores in found.items() for metric, v in scores.items()}


def _summary(index: int, steps: int) -> dict:
    return {
        "phase": _NAMES[index],
        "resolution": (128, 256, 128)[index],
        "trained": _TRAINED[index],
        "n_trained": (2_700_000, 412_000, 38_000)[index],
        "n_frozen": (0, 2_288_000, 2_662_000)[index],
        "steps": steps,
        "seconds": 300.0,
        "train_seconds": 250.0,
        "images_per_s": 33.2,
        "data_wait": 0.0046,
        "evals": {"before": _evals(index, 0.0), "after": _evals(index, 1.0)},
        "baselines": BASELINES,
    }


def _grids(index: int, fraction: float) -> dict[str, np.ndarray]:
    radius = 12.0 if index == 0 and fraction == 0 else 3.0 - 0.6 * index
    labels = ["held-out\nastronaut 1", "held-out\nastronaut 2", "training\ncoffee"]
    found = {}
    for name, size in ((LOW, 128), (HIGH, 256)):
        originals = crops(size)
        blurred = np.stack([blur(x, radius * size / 128) for x in originals])
        caption = f"{name}, phase {index + 1}"
        found[name] = images.reconstruction_grid(originals, blurred, labels, caption=caption)
    return found


def crops(size: int) -> np.ndarray:
    """Three crops of two photographs, uint8 [3, size, size, 3]."""
    astronaut, coffee = skimage.data.astronaut(), skimage.data.coffee()
    return np.stack(
        [
            astronaut[20 : 20 + size, 150 : 150 + size],
            astronaut[250 : 250 + size, 200 : 200 + size],
            coffee[60 : 60 + size, 180 : 180 + size],
        ]
    )


def blur(x: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(radius)))
