"""Imports of diffusion models as workdirs, and workdirs as exports."""

import argparse
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath

    from dcae_jax.autoencoder import Autoencoder
    from dcae_jax.config import RunConfig
    from dcae_jax.convert.diffusion_from_torch import ImportedDiffusion
    from dcae_jax.convert.diffusion_layouts import Described
    from dcae_jax.convert.diffusion_to_torch import ExportDiffusion
    from dcae_jax.convert.names import Layout
    from dcae_jax.data.latents import Manifest
    from dcae_jax.tasks.diffuse import DiffuseConfig

ORIGIN = "diffusion"  # key of the meta of an import: what the files said beside the weights


# ----------------------------------------------------------------------------------------- import


def import_model(args: argparse.Namespace, out: "epath.Path") -> None:
    """The weights of `import`'s arguments as a workdir; says what they are."""
    from dcae_jax.convert import diffusion_from_torch

    found = diffusion_from_torch.load(args.source, args.variant, args.part, args.heads)
    manifest, lines = latents_of(found.described, args.autoencoder, args.scaling_factor)
    for line in [*_summary(found), *lines]:
        print(line, flush=True)
    write(found, manifest, out)


def _summary(found: "ImportedDiffusion") -> list[str]:
    from dcae_jax import tree
    from dcae_jax.convert.diffusion_to_torch import PROCESS

    cfg, said = found.cfg, found.described
    height, width = cfg.input_size
    size = tree.size(found.variables["params"])
    return [
        f"{found.source}: {said.release or said.family.value}, {size:,} parameters",
        f"  depth {cfg.depth}, width {cfg.width}, {cfg.heads} heads, patches of {cfg.patch}, "
        f"latents {height} x {width} x {cfg.in_channels}, {cfg.num_classes} classes",
        f"  {PROCESS[said.family]}",
        *(f"  {note}" for note in found.notes),
    ]


def latents_of(
    said: "Described", source: str | None, factor: float | None
) -> tuple["Manifest", list[str]]:
    """(what stands for the manifest of a cache, lines for people).

    UserError if it is open which autoencoder's latents the weights are for, or their scale.
    """
    from dcae_jax import autoencoder
    from dcae_jax.convert import releases
    from dcae_jax.errors import UserError

    if source is not None:
        net = autoencoder.load(source)
        known = net.scaling_factor if said.scaling_factor is None else said.scaling_factor
        return _manifest_of(said, net, source, _factor(said, known if factor is None else factor))
    if said.autoencoder is None:
        raise UserError(
            "nothing says which autoencoder's latents these weights are for: give --autoencoder "
            "AE (a workdir, folder, file or hub name), and --scaling-factor if it has another one "
            "than they were trained with; or the release with --variant, there are "
            f"{', '.join(releases.DIFFUSION)}"
        )
    scale = _factor(said, said.scaling_factor if factor is None else factor)
    if said.autoencoder not in releases.RELEASES:
        return manifest(said, said.autoencoder, None, None, scale), [
            f"  latents of {said.autoencoder}, scaling factor {scale:g}"
        ]
    what = releases.RELEASES[said.autoencoder]
    name = what.hub[-1] if said.autoencoder.startswith("dc-ae") else what.hub[0]
    return manifest(said, name, said.autoencoder, None, scale), [
        f"  latents of {said.autoencoder}, scaling factor {scale:g}; samples are decoded by {name}"
    ]


def _factor(said: "Described", known: float | None) -> float:
    from dcae_jax.errors import UserError

    if known is None:
        raise UserError(
            "the scaling factor of the latents these weights were trained on is unknown: give "
            "--scaling-factor X (1 / RMS of the latents; SD-VAE's is 0.18215)"
        )
    if not 0 < known < float("inf"):
        raise UserError(f"--scaling-factor {known} is not positive; it is 1 / RMS of the latents")
    return known


def _manifest_of(
    said: "Described", net: "Autoencoder", source: str, factor: float
) -> tuple["Manifest", list[str]]:
    from dcae_jax import checkpoint
    from dcae_jax.errors import UserError

    if net.cfg.latent_channels != said.cfg.in_channels:
        raise UserError(
            f"--autoencoder {source} has latents of {net.cfg.latent_channels} channels, and these "
            f"weights take {said.cfg.in_channels}: give the autoencoder they were trained with"
        )
    path = checkpoint.absolute(source)
    where = str(path) if path.exists() else source
    lines = [f"  latents of {net.source}, scaling factor {factor:g}"]
    if net.scaling_factor not in (None, factor):
        lines.append(f"  its own scaling factor is {net.scaling_factor:g}")
    return manifest(said, where, None, net, factor), lines


def manifest(
    said: "Described", source: str, variant: str | None, net: "Autoencoder | None", factor: float
) -> "Manifest":
    """As of a cache without images; without `net` its encoder is unknown ("")."""
    from dcae_jax.convert import releases
    from dcae_jax.data import latents

    cfg = said.cfg
    model = net.cfg if net else releases.RELEASES[variant].config() if variant else None
    shape = (*cfg.input_size, cfg.in_channels)
    plan = latents.Plan(
        encoder=net.encoder if net else "", resolution=shape[0] * (model.factor if model else 1),
        transform="", data="", split="", positions="", images=0, shape=shape, moments=False,
        flips=False, dtype=latents.Storage.f32, compute="float32", shard_records=1,
    )  # fmt: skip
    channels, rms = cfg.in_channels, 1 / factor
    return latents.Manifest(
        plan=plan, autoencoder=source, weights="ema", variant=variant,
        description=net.source if net else source, decoder=net.decoder if net else "",
        model=model, dataset="", classes=(), num_classes=cfg.num_classes, images=0, bad=0,
        shards=(), mean=(0.0,) * channels, std=(rms,) * channels, rms=rms, scaling_factor=factor,
        scaling="of imported weights", psnr=0.0, psnr_stored=0.0, psnr_images=0,
    )  # fmt: skip


def run_of(said: "Described", name: str) -> "RunConfig":
    """The run that would continue the weights: its family's published recipe."""
    from dcae_jax import diffusion_recipes as recipes
    from dcae_jax.convert.releases import Family
    from dcae_jax.evals.generate import GenerateConfig

    make: dict[Family, Any] = {
        Family.uvit: recipes.uvit, Family.usit: recipes.usit, Family.dit: recipes.dit,
        Family.sit: recipes.sit,
    }  # fmt: skip
    run = make[said.family](copy.deepcopy(said.cfg), name)
    if said.family is Family.dit:
        run.task.process.learn_variance = said.cfg.learn_variance
    for evaluator in run.evals:
        if isinstance(evaluator, GenerateConfig):
            if any(label >= said.cfg.num_classes for label in evaluator.labels):
                evaluator.labels = ()
    return run


def write(found: "ImportedDiffusion", manifest: "Manifest", out: "epath.Path") -> None:
    """Fills the workdir: see `_imported.write`."""
    from dcae_jax.cli import _imported

    said = found.described
    run = run_of(said, said.release or found.source)
    origin = {
        "release": said.release, "family": said.family.value, "source": found.source,
        "layout": found.layout.value, "dtypes": found.dtypes, "autoencoder": manifest.autoencoder,
        "scaling_factor": manifest.scaling_factor,
    }  # fmt: skip
    _imported.write(
        run, "net", found.variables, {"latents": manifest.to_json(), ORIGIN: origin}, out
    )


# ----------------------------------------------------------------------------------------- export


def is_run(workdir: str, part: str | None) -> bool:
    """Whether this is the workdir of a diffusion model; UserError for PyTorch weights of one."""
    from dcae_jax import checkpoint, config
    from dcae_jax.convert import diffusion_from_torch
    from dcae_jax.errors import UserError
    from dcae_jax.tasks.diffuse import DiffuseConfig

    path = checkpoint.absolute(workdir)
    if path.is_dir() and checkpoint.has_steps(path):
        if part is not None:
            raise UserError(f"--part {part}: {path} is a workdir; --params chooses its weights")
        task = config.from_json(checkpoint.source_meta(workdir, "--workdir")["config"]).task
        return isinstance(task, DiffuseConfig)
    if diffusion_from_torch.recognises(workdir, part, also="a workdir, "):
        raise UserError(
            f"{workdir} holds a diffusion model in a PyTorch layout; import it first "
            f"(python -m dcae_jax import --from {workdir} --out DIR) and export that workdir"
        )
    return False


def export_model(args: argparse.Namespace, out: "epath.Path") -> Callable[[], None]:
    """Writes the folder of `export`'s arguments; returns what to do with the whole folder."""
    from dcae_jax.convert import diffusion_to_torch, verify
    from dcae_jax.errors import UserError

    export = plan(args)
    diffusion_to_torch.check(export)
    if args.verify and (why := verify.diffusion_problem(export.cfg, out)):
        raise UserError(f"--verify: {why}")
    diffusion_to_torch.fill(export, out)
    return lambda: _finish(export, out)


def _finish(export: "ExportDiffusion", out: "epath.Path") -> None:
    """Says what was written, and checks it."""
    from dcae_jax import tree
    from dcae_jax.convert import diffusion_names, diffusion_to_torch, names, verify

    family, layout = export.described.family.value, export.layout
    print(f"wrote {out}: {export.source}, {family}, {layout.value} layout", flush=True)
    entries = diffusion_names.table(export.cfg, layout)
    if bad := names.not_finite(entries, tree.flatten(export.variables)):
        print(f"  {bad}", flush=True)
    if export.other_times:
        cost = diffusion_to_torch.cost_of_times(export)
        print(f"  with diffusers' time frequencies its output changes by {cost:.1%} of the largest")
    if why := verify.diffusion_problem(export.cfg, out):
        print(f"not verified: {why}; README.md there has the lines that check it")
        return
    error = verify.verify_diffusion(out, export)
    verify.check_diffusion(out, error)
    print(f"verified in PyTorch: largest relative error {error:.1e} of the output")


def plan(args: argparse.Namespace) -> "ExportDiffusion":
    """What will be written; UserError if the run cannot be exported."""
    import jax

    from dcae_jax import checkpoint, config, sharding
    from dcae_jax.cli import _options
    from dcae_jax.config import InitWeights
    from dcae_jax.convert import diffusion_names
    from dcae_jax.convert.diffusion_to_torch import ExportDiffusion
    from dcae_jax.convert.names import Layout

    run = config.from_json(checkpoint.source_meta(args.workdir, "--workdir")["config"])
    shapes, _ = jax.eval_shape(run.task.build(run).init, jax.random.key(0))
    targets = sharding.on_one_device(shapes)
    prefer_ema = _options.weights(args) is InitWeights.ema
    found = checkpoint.load_weights(args.workdir, {"params": targets, "stats": {}}, prefer_ema)
    origin = found.meta[ORIGIN] if ORIGIN in found.meta else None
    layout, cfg = Layout(args.to), run.task.model
    said, dtypes = _described(args, run.task, found.meta, origin), {}
    if origin is not None and layout in diffusion_names.layouts_of(cfg):
        source = Layout(origin["layout"])
        dtypes = diffusion_names.translated(cfg, origin["dtypes"], source, layout)
    return ExportDiffusion(
        said, {"params": found.params["net"]}, layout, found.source, dtypes, args.dtype,
        unchanged=origin is not None,
        variant=None if args.variant is None else _release(args.variant, cfg, layout),
        other_times=args.diffusers_times and said.cfg.time_shift != cfg.time_shift,
    )  # fmt: skip


def _described(
    args: argparse.Namespace, task: "DiffuseConfig", meta: dict[str, Any],
    origin: dict[str, Any] | None,
) -> "Described":  # fmt: skip
    from dcae_jax.convert import releases
    from dcae_jax.convert.diffusion_layouts import Described
    from dcae_jax.convert.names import Layout
    from dcae_jax.errors import UserError
    from dcae_jax.models.dit import DiTConfig

    cfg, release = copy.deepcopy(task.model), origin["release"] if origin else None
    if args.diffusers_times:
        if args.to != Layout.diffusers.value or not isinstance(cfg, DiTConfig):
            raise UserError("--diffusers-times is for a DiT exported --to diffusers")
        cfg.time_shift = 1
    known = meta["latents"] if "latents" in meta else None
    name = releases.DIFFUSION[release].autoencoder if release else None
    autoencoder = name or (known["autoencoder"] if known else None)
    return Described(cfg, family(task), release, autoencoder, _given_factor(args, known))


def _given_factor(args: argparse.Namespace, known: dict[str, Any] | None) -> float | None:
    from dcae_jax.errors import UserError

    given = args.scaling_factor
    if given is None:
        return known["scaling_factor"] if known else None
    if not 0 < given < float("inf"):
        raise UserError(f"--scaling-factor {given} is not positive; it is 1 / RMS of the latents")
    return given


def _release(variant: str, cfg: Any, layout: "Layout") -> str:
    from dcae_jax.convert import diffusion_from_torch, releases
    from dcae_jax.convert.names import Layout
    from dcae_jax.errors import UserError

    release = releases.require_diffusion(variant)
    if layout is Layout.official and not releases.DIFFUSION[release].official:
        raise UserError(f"--variant {variant}: the official code knows no network by this name")
    what = releases.DIFFUSION[release].config()
    if found := diffusion_from_torch.core_differences(cfg, what):
        lines = "\n".join(f"  - {line}" for line in found)
        raise UserError(f"this is not the network of {release} (here, there):\n{lines}")
    return release


def family(task: "DiffuseConfig") -> Any:
    """The family of a run; UserError if no other code samples such a process."""
    from dcae_jax.convert.releases import Family
    from dcae_jax.diffusion.process import Kind, Space
    from dcae_jax.errors import UserError
    from dcae_jax.models.uvit import UViTConfig

    process, uvit = task.process, isinstance(task.model, UViTConfig)
    kind, predict = Kind(process.kind), Space(process.predict)
    known = {
        (True, Kind.scaled_linear, Space.eps): Family.uvit,
        (True, Kind.flow, Space.v): Family.usit,
        (False, Kind.ddpm, Space.eps): Family.dit,
        (False, Kind.flow, Space.v): Family.sit,
    }
    if (uvit, kind, predict) not in known:
        raise UserError(
            f"a {'UViT' if uvit else 'DiT'} that predicts {predict.value} of the {kind.value} "
            "process is known to no PyTorch code; exported are UViT (eps, scaled_linear), DiT "
            "(eps, ddpm), USiT and SiT (v, flow)"
        )
    return known[uvit, kind, predict]
