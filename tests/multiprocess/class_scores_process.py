"""One process of the evaluator on the whole mesh: prints its scores and a digest of its picture.

python class_scores_process.py CACHE
"""

import hashlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "evals"))

import jax
import networks
import numpy as np
import test_evals_class_scores as scores
from absl import flags

from dcae_jax import distributed, sharding
from dcae_jax.evals import generate
from dcae_jax.evals.generate import GenerateConfig
from dcae_jax.step import TrainState


def main(cache: str) -> None:
    flags.FLAGS.mark_as_parsed()  # grain reads them
    distributed.initialize()
    net = networks.in_memory()
    generate.decoder = lambda source, manifest, mesh: net.placed(mesh)
    cfg = scores.make(cache)
    task, mesh = cfg.task.build(cfg), sharding.make_mesh(cfg.mesh)
    whole = sharding.replicated(mesh)
    grid = GenerateConfig(labels=(0, 2), per_label=3, batch=4, sampler=cfg.evals[0].sampler)
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: task.init(jax.random.key(0))[0], out_shardings=whole)()
        number = jax.device_put(np.int32(7), whole)
        state = TrainState(step=number, params=params, stats={}, ema={}, opt={})
        constants = jax.device_put(task.constants(training=False), whole)
        for evaluator in (cfg.evals[0], grid):
            report = evaluator.build(cfg, task, mesh).run(state, constants, lambda: None)
            (picture,) = report.images.values()
            digest = hashlib.sha256(picture.tobytes()).hexdigest()
            print("FOUND", json.dumps([report.scalars, digest], sort_keys=True), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
