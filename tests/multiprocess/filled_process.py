"""One process of the evaluator of filled pixels: prints its scores and a digest of its picture.

python filled_process.py CACHE IMAGES
"""

import hashlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import diffusing
import jax
import masks
import networks
import numpy as np
from absl import flags

from dcae_jax import distributed, sharding
from dcae_jax.evals import generate
from dcae_jax.evals.filled import FilledConfig
from dcae_jax.step import TrainState


def main(cache: str, images: str) -> None:
    flags.FLAGS.mark_as_parsed()  # grain reads them
    distributed.initialize()
    diffusing.cache, diffusing.images = lambda: pathlib.Path(cache), lambda: pathlib.Path(images)
    net = networks.in_memory()
    generate.decoder = lambda source, manifest, mesh: net.placed(mesh)
    for cfg in (masks.make(), masks.pixels()):
        task, mesh = cfg.task.build(cfg), sharding.make_mesh(cfg.mesh)
        whole = sharding.replicated(mesh)
        # Ten images in batches of four: pictures are wanted of the first alone, the last has blanks
        made = FilledConfig(images=masks.images("test"), ratio=0.5, n=10, batch=4, pictures=3)
        made.resolve(cfg)
        with jax.set_mesh(mesh):
            params = jax.jit(lambda task=task: task.init(jax.random.key(0))[0], out_shardings=whole)
            number = jax.device_put(np.int32(7), whole)
            average = {"0.9": {"params": params(), "stats": {}}}
            state = TrainState(step=number, params={}, stats={}, ema=average, opt={})
            constants = jax.device_put(task.constants(training=False), whole)
            evaluator = made.build(cfg, task, mesh)
            report = evaluator.run(state, constants, lambda: None)
            (picture,) = report.images.values()
            digest = hashlib.sha256(picture.tobytes()).hexdigest()
            said = [report.scalars, evaluator.baselines(), digest]
            print("FOUND", json.dumps(said, sort_keys=True), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
