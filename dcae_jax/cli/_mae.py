"""Imports of masked autoencoders as workdirs, and workdirs as exports."""

import argparse
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath

    from dcae_jax.config import RunConfig
    from dcae_jax.convert.mae_from_torch import ImportedMasked
    from dcae_jax.convert.mae_layouts import Described
    from dcae_jax.convert.mae_to_torch import ExportMasked

ORIGIN = "masked_autoencoder"  # key of the meta of an import: what the files said beside weights


# ----------------------------------------------------------------------------------------- import


def import_model(args: argparse.Namespace, out: "epath.Path") -> None:
    """The weights of `import`'s arguments as a workdir; says what they are."""
    from dcae_jax.convert import mae_from_torch
    from dcae_jax.errors import UserError

    given = {"--variant": args.variant, "--autoencoder": args.autoencoder,
             "--scaling-factor": args.scaling_factor}  # fmt: skip
    if wrong := [name for name, value in given.items() if value is not None]:
        raise UserError(
            f"{args.source} is a masked autoencoder, for which {', '.join(wrong)} says nothing; "
            "leave it out"
        )
    found = mae_from_torch.load(args.source, args.part, args.heads, args.decoder_heads)
    for line in _summary(found):
        print(line, flush=True)
    write(found, out)


def _summary(found: "ImportedMasked") -> list[str]:
    from dcae_jax import tree

    cfg = found.cfg
    height, width = cfg.input_size
    what = "images" if is_of_pixels(cfg) else "latents"
    size = tree.size(found.variables["params"])
    lines = [
        f"{found.source}: masked autoencoder ({found.layout.value}), {size:,} parameters",
        f"  encoder of depth {cfg.depth}, width {cfg.width}, {cfg.heads} heads; decoder of depth "
        f"{cfg.decoder_depth}, width {cfg.decoder_width}, {cfg.decoder_heads} heads",
        f"  {what} {height} x {width} x {cfg.in_channels} in patches of {cfg.patch}",
    ]
    if not is_of_pixels(cfg):
        lines.append(
            "  of which autoencoder they are, and how normalised, nothing there says: set "
            "data.path to a cache of the latents it was trained on"
        )
    return [*lines, *(f"  {note}" for note in found.notes)]


def is_of_pixels(cfg: Any) -> bool:
    """Three channels are taken for those of an image; no published latent has three."""
    return cfg.in_channels == 3


def run_of(said: "Described", name: str) -> "RunConfig":
    """The run that would continue the weights: the published recipe, with the mask they say."""
    from dcae_jax import lmd_recipes
    from dcae_jax.masking import MaskKind

    make = lmd_recipes.mae if is_of_pixels(said.cfg) else lmd_recipes.lmd
    run = make(copy.deepcopy(said.cfg), name)
    if said.norm_target is not None:
        run.task.norm_target = said.norm_target
    if said.mask_ratio is not None:
        run.task.mask.kind, run.task.mask.end = MaskKind.constant, said.mask_ratio
    return run


def write(found: "ImportedMasked", out: "epath.Path") -> None:
    """Fills the workdir: see `_imported.write`."""
    from dcae_jax.cli import _imported

    run = run_of(found.described, found.source)
    origin = {
        "source": found.source, "layout": found.layout.value, "dtypes": found.dtypes,
        "notes": found.notes,
    }  # fmt: skip
    _imported.write(run, "net", found.variables, {ORIGIN: origin}, out)


# ----------------------------------------------------------------------------------------- export


def is_run(workdir: str, part: str | None) -> bool:
    """Whether this is the workdir of a masked autoencoder; UserError for PyTorch weights of one."""
    from dcae_jax import checkpoint, config
    from dcae_jax.convert import mae_from_torch
    from dcae_jax.errors import UserError
    from dcae_jax.tasks.mask_latents import MaskLatentsConfig

    path = checkpoint.absolute(workdir)
    if path.is_dir() and checkpoint.has_steps(path):
        task = config.from_json(checkpoint.source_meta(workdir, "--workdir")["config"]).task
        return isinstance(task, MaskLatentsConfig)
    if mae_from_torch.recognises(workdir, part, also="a workdir, "):
        raise UserError(
            f"{workdir} holds a masked autoencoder in a PyTorch layout; import it first "
            f"(python -m dcae_jax import --from {workdir} --out DIR) and export that workdir"
        )
    return False


def export_model(args: argparse.Namespace, out: "epath.Path") -> Callable[[], None]:
    """Writes the folder of `export`'s arguments; returns what to do with the whole folder."""
    from dcae_jax.convert import mae_to_torch, verify
    from dcae_jax.errors import UserError

    _check_options(args)
    export = plan(args)
    mae_to_torch.check(export)
    if args.verify and (why := verify.masked_problem(out)):
        raise UserError(f"--verify: {why}")
    mae_to_torch.fill(export, out)
    return lambda: _finish(export, out)


def _check_options(args: argparse.Namespace) -> None:
    from dcae_jax.convert.mae_to_torch import LAYOUTS
    from dcae_jax.errors import UserError

    known = [layout.value for layout in LAYOUTS]
    if args.to not in known:
        raise UserError(
            f"--to {args.to}: {args.workdir} is a masked autoencoder, which goes --to "
            f"{' or '.join(known)}"
        )
    given = {"--variant": args.variant, "--scaling-factor": args.scaling_factor,
             "--part": args.part, "--diffusers-times": args.diffusers_times or None}  # fmt: skip
    if wrong := [name for name, value in given.items() if value is not None]:
        raise UserError(f"{', '.join(wrong)} says nothing of a masked autoencoder; leave it out")


def plan(args: argparse.Namespace) -> "ExportMasked":
    """What will be written."""
    import jax

    from dcae_jax import checkpoint, config, sharding
    from dcae_jax.cli import _options
    from dcae_jax.config import InitWeights
    from dcae_jax.convert import mae_names
    from dcae_jax.convert.mae_layouts import Described
    from dcae_jax.convert.mae_to_torch import ExportMasked
    from dcae_jax.convert.names import Layout
    from dcae_jax.tasks.latents import are_pixels

    run = config.from_json(checkpoint.source_meta(args.workdir, "--workdir")["config"])
    shapes, _ = jax.eval_shape(run.task.build(run).init, jax.random.key(0))
    targets = sharding.on_one_device(shapes)
    prefer_ema = _options.weights(args) is InitWeights.ema
    found = checkpoint.load_weights(args.workdir, {"params": targets, "stats": {}}, prefer_ema)
    layout, cfg, dtypes = Layout(args.to), copy.deepcopy(run.task.model), {}
    if ORIGIN in found.meta:
        source = Layout(found.meta[ORIGIN]["layout"])
        dtypes = mae_names.translated(cfg, found.meta[ORIGIN]["dtypes"], source, layout)
    said = Described(cfg, run.task.mask.end, run.task.norm_target)
    return ExportMasked(
        said, {"params": found.params["net"]}, layout, found.source, are_pixels(run.data), dtypes,
        args.dtype,
    )  # fmt: skip


def _finish(export: "ExportMasked", out: "epath.Path") -> None:
    """Says what was written, and checks it."""
    from dcae_jax import tree
    from dcae_jax.convert import mae_layouts, mae_names, names, verify
    from dcae_jax.convert.to_torch import TOLERANCE
    from dcae_jax.errors import UserError

    print(f"wrote {out}: {export.source}, {mae_layouts.CLASSES[export.layout]}", flush=True)
    entries = mae_names.table(export.cfg, export.layout)
    if bad := names.not_finite(entries, tree.flatten(export.variables)):
        print(f"  {bad}", flush=True)
    if why := verify.masked_problem(out):
        print(f"not verified: {why}; README.md there has the lines that check it")
        return
    error = verify.verify_masked(out, export.layout)
    if not error <= TOLERANCE:  # NaN is not
        raise UserError(
            f"{out} was written, but PyTorch's results differ from JAX's by {error:.2e}, more "
            f"than {TOLERANCE:g}; do not use it"
        )
    print(f"verified in PyTorch: largest relative error {error:.1e} of the output")
