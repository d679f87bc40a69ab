"""Trained models on latents, as commands open them: their run, their weights, the autoencoder."""

import argparse
import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from dcae_jax.cli import _diffusion, _options

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.config import RunConfig
    from dcae_jax.data.latents import Manifest
    from dcae_jax.tasks.base import Task, Variables


class Model(NamedTuple):
    """A trained model, its weights not read yet."""

    option: str  # what the user calls it: --from, --weak
    source: str
    ema: bool
    meta: dict[str, Any]  # of its step
    run: "RunConfig"
    manifest: "Manifest | None"  # of its latents; None: it was trained on pixels


def find(
    args: argparse.Namespace, option: str, source: str, kinds: tuple[type, ...], what: str
) -> Model:
    """The model at a workdir or step; UserError if its task is of no such kind."""
    from dcae_jax import checkpoint, config
    from dcae_jax.config import InitWeights
    from dcae_jax.data.latents import Manifest
    from dcae_jax.errors import UserError
    from dcae_jax.models.layers import Dtype
    from dcae_jax.tasks.latents import are_pixels

    meta = checkpoint.source_meta(source, option)
    run = config.from_json(meta["config"])
    if not isinstance(run.task, kinds):
        raise UserError(f"{option} {source} is a run of {type(run.task).__name__}, not of {what}")
    pixels = "latents" not in meta and are_pixels(run.data)
    if "latents" not in meta and not pixels:
        raise UserError(
            f"{option} {source} does not say which latents it was trained on (another version of "
            "dcae_jax?): resume the run for a step, then it does"
        )
    if args.dtype:
        run.task.model.dtype = Dtype(args.dtype)
    ema = _options.weights(args) is InitWeights.ema
    manifest = None if pixels else Manifest.from_json(meta["latents"])
    return Model(option, source, ema, meta, run, manifest)


def weights_record(model: Model) -> dict[str, Any]:
    """Which weights these are, from the step's own record of its leaves: kind, step, a digest."""
    from dcae_jax.step import ema_name

    saved = model.meta["leaves"]
    item, prefix, kind = "params", "", "raw"
    if model.ema and "ema" in saved:
        kind = ema_name(model.meta["config"]["ema"]["decays"][0])
        item, prefix, kind = "ema", f"{kind}/params/", f"ema {kind}"
    rows = {p.removeprefix(prefix): row for p, row in saved[item].items() if p.startswith(prefix)}
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return {"kind": kind, "step": model.meta["step"], "digest": digest}


def release(model: Model) -> str | None:
    """The released weights that these still are: of an import that nobody trained on."""
    origin = model.meta.get(_diffusion.ORIGIN)
    return None if origin is None else origin["release"]


def load(model: Model, mesh: "Mesh") -> "tuple[Task, Variables]":
    """The task with its weights, whole on every device of the mesh."""
    import jax

    from dcae_jax import checkpoint, sharding
    from dcae_jax.errors import UserError
    from dcae_jax.tasks import latents
    from dcae_jax.tasks.base import Variables

    task = model.run.task.build(model.run)
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    targets = sharding.on_one_device(shapes)
    found = checkpoint.load_weights(
        model.source, {"params": targets, "stats": {}}, prefer_ema=model.ema
    )
    if found.step != model.meta["step"]:
        raise UserError(
            f"step {model.meta['step']} of {model.option} {model.source} is damaged (see above); "
            f"for the valid step before it, name that: .../checkpoints/{found.step}"
        )
    if model.manifest is None:
        norm = task.constants(training=False)["norm"]
    else:
        norm = latents.normalisation(model.run.task.latent_norm, model.manifest)
    variables = Variables(found.params, {}, {"norm": norm})
    return task, sharding.put_whole(variables, mesh)


def decoder(args: argparse.Namespace, model: Model, mesh: "Mesh", dtype: str) -> "Autoencoder":
    """The autoencoder of the latents on this process's devices."""
    from dcae_jax.errors import UserError
    from dcae_jax.evals import generate
    from dcae_jax.models.layers import Dtype

    manifest = model.manifest
    named = args.autoencoder or manifest.autoencoder
    try:
        net = generate.decoder(args.autoencoder or "", manifest, mesh)
    except UserError as e:
        if args.autoencoder or str(e).startswith("the latents are of another"):
            raise
        raise UserError(
            f"{e}\nThe latents were made by the autoencoder {named} (encoder "
            f"{manifest.encoder[:16]}); where it has moved, name it: --autoencoder DIR"
        ) from e
    channels = model.run.task.model.in_channels
    if (net.cfg.latent_channels, net.cfg.in_channels) != (channels, 3):
        raise UserError(
            f"{net.source} decodes latents of {net.cfg.latent_channels} channels into "
            f"{net.cfg.in_channels}; these have {channels}, and pictures 3: another --autoencoder"
        )
    say(f"autoencoder  {net.source}: f{net.cfg.factor}c{net.cfg.latent_channels}")
    return net.placed(mesh, Dtype(dtype)) if dtype else net


def say(text: str) -> None:
    """Prints on the first process."""
    from dcae_jax import distributed

    if distributed.is_main():
        print(text, flush=True)
