"""One process of the evaluators with Inception's features: prints scores and digests of pictures.

python inception_process.py CACHE IMAGES
"""

import hashlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import diffusing
import frozen_nets
import jax
import networks
import numpy as np
import runs
from absl import flags

from dcae_jax import distributed, sharding
from dcae_jax.config import EmaConfig, RunConfig
from dcae_jax.data.latents import LatentDataConfig
from dcae_jax.diffusion.samplers import DPM2MConfig
from dcae_jax.evals import generate
from dcae_jax.evals.perceptual import LpipsNet
from dcae_jax.evals.sample_scores import SampleScoresConfig, Score
from dcae_jax.step import TrainState


def diffusion() -> RunConfig:
    """Ten samples and five held-out latents in batches of four."""
    scores = (Score.fid, Score.inception, Score.precision)
    scored = SampleScoresConfig(
        scores=scores, n=10, held_out=5, batch=4, data=LatentDataConfig(split="test", threads=1),
        sampler=DPM2MConfig(steps=2), pictures=2,
    )  # fmt: skip
    return diffusing.make(evals=[scored])


def autoencoder() -> RunConfig:
    """Five images in batches of four, with the closed-form baselines."""
    cfg = runs.make_config("phase1")
    (evaluator,) = cfg.evals
    evaluator.n, evaluator.batch, evaluator.training_pictures = 5, 4, 0
    evaluator.rfid, evaluator.lpips, evaluator.baselines = True, LpipsNet.alex, True
    evaluator.pca_images = 8
    return cfg


def main(cache: str, images: str) -> None:
    flags.FLAGS.mark_as_parsed()  # grain reads them
    distributed.initialize()
    diffusing.cache, diffusing.images = lambda: pathlib.Path(cache), lambda: pathlib.Path(images)
    net = networks.in_memory()
    generate.decoder = lambda source, manifest, mesh: net.placed(mesh)
    for cfg in (diffusion(), autoencoder()):
        cfg.ema, cfg.evals[0].nets = EmaConfig(decays=()), str(frozen_nets.folder())
        task, mesh = cfg.task.build(cfg), sharding.make_mesh(cfg.mesh)
        whole = sharding.replicated(mesh)
        with jax.set_mesh(mesh):
            params = jax.jit(lambda task=task: task.init(jax.random.key(0))[0], out_shardings=whole)
            number = jax.device_put(np.int32(7), whole)
            state = TrainState(step=number, params=params(), stats={}, ema={}, opt={})
            constants = jax.device_put(task.constants(training=False), whole)
            evaluator = cfg.evals[0].build(cfg, task, mesh)
            report = evaluator.run(state, constants, lambda: None)
            (picture,) = report.images.values()
            digest = hashlib.sha256(picture.tobytes()).hexdigest()
            said = [report.scalars, evaluator.baselines(), digest]
            print("FOUND", json.dumps(said, sort_keys=True), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
