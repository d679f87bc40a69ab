"""Draws the samples that a folder of `sample` lacks: for `sample` itself and for `evaluate`."""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import TYPE_CHECKING, Any

from dcae_jax.cli import _sample_folder
from dcae_jax.cli._sample_job import Job, sampler_name
from dcae_jax.cli._trained import decoder, load, say, weights_record

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.generator import Drawn, Generator
    from dcae_jax.tasks.base import Variables

A_DEVICE = 16  # samples at once on each device, unless --batch says otherwise
_THREADS = 8  # that compress and write PNGs


def fill(args: argparse.Namespace, job: Job, npz: bool) -> None:
    """All samples of the job in its folder, on one of the processes that share them."""
    from dcae_jax import distributed

    with _sample_folder.claimed(job.out):
        there = _sample_folder.there(job)
        _announce(job, there)
        if not there.all():
            _draw(args, job, there, npz)
        distributed.barrier("samples drawn")
        if distributed.is_main():
            _sample_folder.finish(job, npz)
        distributed.barrier("finished")


def _announce(job: Job, there: "np.ndarray") -> None:
    for model in filter(None, (job.model, job.weak)):
        weights = weights_record(model)
        kind = "the raw weights" if weights["kind"] == "raw" else f"the average ({weights['kind']})"
        say(f"{model.option:12} {model.source}, {kind} of step {weights['step']}")
    say(f"samples      {job.n} of {len(set(job.classes))} class(es) {job.order}, seed {job.seed}")
    if there.any():
        say(f"             {int(there.sum())} of {job.n} there already")


class _Artist:
    """Draws and decodes batches; what it returns may still be computed when it returns."""

    def __init__(
        self, generator: "Generator", variables: "Variables", weak: "Variables | None",
        net: "Autoencoder", dtype: str,
    ) -> None:  # fmt: skip
        self._generator, self._net, self._dtype = generator, net, dtype
        self._variables, self._weak = variables, weak

    def __call__(self, labels: "np.ndarray", index: "np.ndarray") -> "tuple[Drawn, jax.Array, Any]":
        """(latents, uint8 images, whether each image was finite)."""
        import jax.numpy as jnp

        from dcae_jax import codec
        from dcae_jax.evals import metrics
        from dcae_jax.models.layers import Dtype

        exact = codec.precision(Dtype(self._dtype)) if self._dtype else contextlib.nullcontext()
        with exact:
            drawn = self._generator.draw(self._variables, labels, index, self._weak)
            images = self._net.decode(drawn.latents)
        return drawn, metrics.to_uint8(images), jnp.isfinite(images).all(axis=(1, 2, 3))


def _draw(args: argparse.Namespace, job: Job, there: "np.ndarray", npz: bool) -> None:
    """This process's batches of the samples that are not there yet.

    Batches are whole and aligned whatever is missing: a picture's bits depend on the program that
    made it, which is then the same after a kill.
    """
    import jax
    import numpy as np

    from dcae_jax import distributed

    mesh = _mesh()
    net = decoder(args, job.model, mesh, job.dtype)
    _sample_folder.check_decoder(job, net)
    _sample_folder.check_space(job, net, there, npz)
    if distributed.is_main():
        _sample_folder.write_record(job, _sample_folder.decoder_of(net))
    artist = _artist(job, net, mesh)
    size = -(-(args.batch or min(A_DEVICE * mesh.size, job.n)) // mesh.size) * mesh.size
    starts = [s for s in range(0, job.n, size) if not there[s : s + size].all()]
    starts = starts[jax.process_index() :: jax.process_count()]
    wanted = [[i for i in range(s, min(s + size, job.n)) if not there[i]] for s in starts]
    batches = (np.arange(s, s + size, dtype=np.int32) for s in starts)
    drawn = ((index, artist(job.labels[index % job.n], index)) for index in batches)
    evaluations = []
    with futures.ThreadPoolExecutor(_THREADS) as pool, _bar(sum(map(len, wanted))) as bar:
        for (index, found), missing in zip(_one_ahead(drawn), wanted, strict=True):
            evaluations.append(_store(job, pool, index, found, missing))
            bar.update(len(missing))
    if evaluations:
        say(f"{np.mean(evaluations):.4g} evaluations of the network for each sample")


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The items, each after the next was begun: devices draw while pictures are written."""
    return (a for a, b in itertools.pairwise(itertools.chain(items, [None])))


def _mesh() -> "Mesh":
    """The devices of this process: processes draw for themselves."""
    import jax

    from dcae_jax import sharding
    from dcae_jax.config import MeshConfig

    return sharding.make_mesh(MeshConfig(), jax.local_devices())


def _bar(total: int) -> Any:
    """Progress of this process's own part, on the first one; rare lines where nobody watches."""
    import jax
    from tqdm import tqdm

    from dcae_jax import distributed

    part = "" if jax.process_count() == 1 else f" (process 1 of {jax.process_count()})"
    every = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, unit="img", desc=f"drawing{part}", mininterval=every,
        disable=not distributed.is_main(),
    )  # fmt: skip


def _artist(job: Job, net: "Autoencoder", mesh: "Mesh") -> _Artist:
    """The models with their weights on the devices."""
    from dcae_jax.generator import Generator

    task, variables = load(job.model, mesh)
    weak_task, weak = (None, None) if job.weak is None else load(job.weak, mesh)
    generator = Generator(
        task, job.sampler, job.guide, mesh, seed=job.seed, weak=weak_task, whole=False
    )
    return _Artist(generator, variables, weak, net, job.dtype)


def _store(
    job: Job, pool: futures.Executor, index: "np.ndarray",
    found: "tuple[Drawn, jax.Array, Any]", missing: list[int],
) -> float:  # fmt: skip
    """Writes the missing samples of a batch, all of it finite; its mean evaluations."""
    import numpy as np

    from dcae_jax import outputs
    from dcae_jax.report import images as pictures

    drawn, images, finite = found
    real = index < job.n
    _check_finite(job, index, np.isfinite(np.asarray(drawn.latents)).all((1, 2, 3)) | ~real)
    _check_decoded(index, np.asarray(finite) | ~real)
    images, first = np.asarray(images), int(index[0])

    def write(i: int) -> None:
        outputs.write(_sample_folder.picture_path(job.out, i), pictures.to_png(images[i - first]))

    list(pool.map(write, missing))
    return float(np.asarray(drawn.evaluations)[real].mean())


def _check_finite(job: Job, index: "np.ndarray", finite: "np.ndarray") -> None:
    from dcae_jax.errors import UserError

    if finite.all():
        return
    reasons = [
        "the weights or the normalisation are damaged",
        "bfloat16 overflows: --dtype float32",
    ]
    if job.guide.scale != 1.0:
        reasons.insert(0, f"guidance {job.guide.scale:g} is too strong: a smaller --cfg")
    if sampler_name(job.sampler) == "dopri5":
        given = job.sampler.max_steps
        reasons.insert(
            0, f"dopri5 gave up after {given} steps: --sampler-option max_steps={10 * given}, a "
            "larger rtol, or --sampler heun",
        )  # fmt: skip
    lines = "\n".join(f"  - {r}" for r in reasons)
    raise UserError(
        f"{int((~finite).sum())} sample(s) of this batch are not finite, the first is number "
        f"{index[~finite][0]}; none of the batch was saved. It may be that\n{lines}"
    )


def _check_decoded(index: "np.ndarray", finite: "np.ndarray") -> None:
    from dcae_jax.errors import UserError

    if not finite.all():
        raise UserError(
            f"the latent of sample {index[~finite][0]} is finite, but not what the autoencoder "
            "makes of it; none of the batch was saved. Try --dtype float32; else its weights are "
            "damaged"
        )
