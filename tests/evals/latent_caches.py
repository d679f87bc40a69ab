"""Caches of given latents, written without images; no autoencoder made them."""

import numpy as np
from etils import epath

from dcae_jax import config
from dcae_jax.data import latents
from dcae_jax.data.latents import Manifest, Plan, Record, ShardWriter, Storage


def write(
    root: epath.PathLike, split: str, values: np.ndarray, labels: np.ndarray, classes: int = 2
) -> Manifest:
    """ROOT/SPLIT with one shard of f32 latents."""
    where = latents.folder(str(root), split)
    where.mkdir(parents=True)
    plan = Plan(
        encoder="e" * 64, resolution=4 * values.shape[1], transform="center_crop", data="d",
        split=split, positions="all", images=len(values), shape=values.shape[1:], moments=False,
        flips=False, dtype=Storage.f32, compute="float32", shard_records=len(values),
    )  # fmt: skip
    writer = ShardWriter(where, plan, 0)
    for i, (latent, label) in enumerate(zip(values, labels, strict=True)):
        writer.add(Record(latent.astype(np.float32), None, int(label), f"{split}/{i}"))
    info = writer.finish()
    moments = latents.merged([info])
    manifest = Manifest(
        plan=plan, autoencoder="nowhere", weights="ema", variant=None, description="made up",
        decoder="d" * 64, model=config.to_json(plan), dataset="made-up", classes=(),
        num_classes=classes, images=len(values), bad=0,
        shards=((info.images, info.bytes, info.sha256),), mean=tuple(moments.mean.tolist()),
        std=tuple(moments.std().tolist()), rms=moments.rms(), scaling_factor=1 / moments.rms(),
        scaling="1 / RMS", psnr=30.0, psnr_stored=30.0, psnr_images=1,
    )  # fmt: skip
    latents.write_json(where / latents.MANIFEST, manifest.to_json())
    return manifest
