"""The workdir of a diffusion run as a loop would leave it, with invented numbers."""

import json
from pathlib import Path

import numpy as np

from dcae_jax import config, flags
from dcae_jax.report import images, writers

ROOT = Path(__file__).parents[2]
STEPS = (0, 300, 600, 900, 1200)
ACCURACY, FRECHET = (0.125, 0.5, 0.55, 0.6, 0.625), (21.7, 3.6, 3.2, 3.1, 2.35)
LOSS = (2.15, 0.8, 0.6, 0.5, 0.44)
BASELINES = {
    "chance": {"accuracy": 0.125},
    "mean-of-training": {"accuracy": 0.125, "frechet": 28.95, "nearest": 0.49, "n": 64.0},
    "class-means-of-training": {"accuracy": 0.375, "frechet": 13.75, "nearest": 0.34, "n": 64.0},
    "training-latents": {"accuracy": 0.609, "frechet": 2.72, "nearest": 0.283, "n": 64.0},
    "held-out-latents": {"accuracy": 0.812, "frechet": 0.11, "nearest": 0.635, "n": 64.0},
}


def scores(i: int) -> dict[str, dict[str, float]]:
    """Of the i-th evaluation."""
    bins = {f"loss_t{k / 10:.2f}": LOSS[i] * (1 + abs(k - 5) / 10) for k in range(10)}
    classes = {"accuracy": ACCURACY[i], "frechet": FRECHET[i], "nearest": 1.14 - i / 8, "n": 64.0}
    return {"latents-test": {"loss": LOSS[i], **bins, "n": 256.0}, "class-scores": classes}


def write(workdir: Path, steps: int = 1200, finished: bool = True) -> Path:
    """A run up to `steps`."""
    workdir.mkdir(parents=True)
    cfg = config.resolve(flags.load(str(ROOT / "configs" / "demo_diffusion.py")))
    plan = {"shape": [4, 4, 32], "resolution": 128}
    manifest = {
        "plan": plan, "images": 4096, "dataset": "photos", "num_classes": 8, "rms": 14.67,
        "description": "ema 0.99 of step 200", "autoencoder": "runs/demo/phase3",
    }  # fmt: skip
    cfg.evals[1].guidance.scale = 1.5
    record = {"config": config.to_json(cfg), "commit": "0123abc", "latents": manifest}
    (workdir / "config.json").write_text(json.dumps(record))
    metrics, grids = writers.MetricsWriter(workdir, 0), writers.ImageWriter(workdir)
    for step in range(0, steps + 1, 50):
        if step:
            row = {"loss": 1.2 - step / 2000, "net/lr": 2e-3, "net/grad_norm": 0.7}
            row |= {"images_per_s": 400.0, "data_wait": 0.01, "latent_rms": 1.0}
            metrics.write_scalars(step, {f"train/{k}": v for k, v in row.items()})
        if step in STEPS:
            for name, found in scores(STEPS.index(step)).items():
                metrics.write_scalars(step, {f"{name}/{k}": v for k, v in found.items()})
            cell = np.full((8, 8, 3), step // 5, np.uint8)
            grids.write_images(step, {"class-scores": images.grid([[cell, cell]])})
    metrics.close()
    grids.close()
    if finished:
        summary = {
            "phase": "diffuse", "resolution": 128, "trained": "everything", "n_trained": 1067296,
            "n_frozen": 0, "steps": steps, "seconds": 250.0, "images_per_s": 400.0,
            "data_wait": 0.01, "evals": {"before": scores(0), "after": scores(4)},
            "baselines": {"class-scores": BASELINES, "latents-test": {}},
        }  # fmt: skip
        (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir
