"""A trained autoencoder ready for use, wherever its weights are: `load(source)`, encode, decode.

A source is the workdir of a run (or of an import), one step directory of it, a folder or file in a
PyTorch layout, or a name on the Hugging Face hub.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dcae_jax import checkpoint, sharding
from dcae_jax import config as config_lib
from dcae_jax.config import InitWeights, JSONValue
from dcae_jax.convert import from_torch
from dcae_jax.data.latents import Manifest
from dcae_jax.errors import UserError
from dcae_jax.models.dcae import DCAEConfig, abstract_variables
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.models.layers import Dtype
from dcae_jax.step import ema_name
from dcae_jax.tasks.autoencode import AutoencodeConfig
from dcae_jax.tree import Tree

STATS_FILE = "latent_stats.json"  # in a workdir: what `python -m dcae_jax latent-stats` measured


@dataclass(frozen=True)
class Origin:
    """What an imported file says beside its weights; kept in the workdir for the way back."""

    release: str | None = None  # name of the released weights; None: nobody's
    scaling_factor: float | None = None  # None: unknown, and never guessed
    source: str = ""
    dtypes: dict[str, str] = field(default_factory=dict)  # of tensors that are not float32
    counters: dict[str, int] = field(default_factory=dict)  # BatchNorm's num_batches_tracked
    encoder: str = ""  # digest: the factor holds for this encoder only
    extra: dict[str, JSONValue] = field(default_factory=dict)  # of diffusers' config.json

    def to_json(self) -> dict[str, JSONValue]:
        """For config.json and the checkpoint's meta, under the key "autoencoder"."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Autoencoder:
    """Weights with their network.  Latents are unscaled; multiply by `scaling_factor` yourself."""

    cfg: DCAEConfig | KLVAEConfig
    variables: Tree  # {"params": ..., "batch_stats": ... if any}, f32
    scaling_factor: float | None  # 1 / RMS of the latents; None: not measured
    source: str  # for people: which weights these are
    origin: Origin | None  # of weights that are still those of an import
    encoder: str  # digest of the encoder's weights: latents of equal encoders are equal
    factor_origin: str = ""  # for people: where the scaling factor comes from, or why there is none

    @functools.cached_property
    def decoder(self) -> str:
        """Digest of the decoder's weights, which latents do not depend on."""
        return decoder_digest(self.variables)

    def placed(self, mesh: Mesh, dtype: Dtype | None = None) -> "Autoencoder":
        """The same, its weights whole on every device of the mesh, computing in `dtype`."""
        model = copy.deepcopy(self.cfg)
        if dtype is not None:
            model.dtype, model.conv_dtype = dtype, None
        variables = sharding.put_whole(self.variables, mesh)
        return dataclasses.replace(self, cfg=model, variables=variables)

    def encode(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w f"]:
        """The f32 latents of images in [-1, 1]; sides must be multiples of the factor."""
        return _compiled(self.cfg, "encode")(self.variables, images)

    def moments(
        self, images: Float[Array, "b H W c"]
    ) -> tuple[Float[Array, "b h w f"], Float[Array, "b h w f"] | None]:
        """The f32 mean and log variance of the latents; None where there is no variance."""
        return _compiled(self.cfg, "moments")(self.variables, images)

    def decode(self, latents: Float[Array, "b h w f"]) -> Float[Array, "b H W c"]:
        """The f32 reconstructions, near [-1, 1] but not clamped."""
        return _compiled(self.cfg, "decode")(self.variables, latents)


@functools.cache
def _compiled(cfg: DCAEConfig | KLVAEConfig, method: str) -> jax.stages.Wrapped:
    model = cfg.build()
    return jax.jit(lambda variables, x: model.apply(variables, x, method=method))


def load(
    source: str, weights: InitWeights = InitWeights.ema, variant: str | None = None,
    part: str | None = None,
) -> Autoencoder:  # fmt: skip
    """The autoencoder at `source`; UserError says what was looked for.

    `weights`: which of a run's weights (imports have one kind).  `variant`: the release, where a
    bare file leaves it open.  `part`: which weights of a training checkpoint that holds several.
    """
    path = checkpoint.absolute(source)
    if path.is_dir() and checkpoint.has_steps(path):
        if part is not None:
            raise UserError(f"--part {part}: {path} is a workdir; --params chooses its weights")
        return _from_run(source, weights)
    return imported(from_torch.load(source, variant, part, also="a workdir, "))


def imported(found: from_torch.Imported) -> Autoencoder:
    """The autoencoder of converted weights."""
    digest = encoder_digest(found.variables)
    origin = Origin(
        found.release, found.scaling_factor, found.source, found.dtypes, found.counters, digest,
        found.extra,
    )  # fmt: skip
    return Autoencoder(
        found.cfg, found.variables, found.scaling_factor, found.source, origin, digest,
        f"of {found.source}" if found.scaling_factor else f"{found.source} does not say it",
    )  # fmt: skip


def _from_run(source: str, weights: InitWeights) -> Autoencoder:
    meta = checkpoint.source_meta(source)
    task = config_lib.from_json(meta["config"]).task
    if not isinstance(task, AutoencodeConfig):
        raise UserError(f"{source} is a run of {type(task).__name__}, not of an autoencoder")
    found = checkpoint.load_weights(
        source, abstract(task.model), prefer_ema=weights is InitWeights.ema
    )
    variables = {"params": found.params["ae"]}
    if "ae" in found.stats:
        variables["batch_stats"] = found.stats["ae"]
    digest = encoder_digest(variables)
    factor = scaling_factor(checkpoint.workdir_of(source), digest)
    origin = _origin(found.meta)
    return Autoencoder(
        task.model, variables, factor.value, found.source, origin, digest, factor.origin
    )


def abstract(cfg: DCAEConfig | KLVAEConfig) -> dict[str, Tree]:
    """Shapes of the items `params` and `stats` of an autoencoder's checkpoint, on one device.

    It is one of this process: each process has the weights for itself.
    """
    placed = sharding.on_one_device(abstract_variables(cfg))
    stats = {"ae": placed["batch_stats"]} if "batch_stats" in placed else {}
    return {"params": {"ae": placed["params"]}, "stats": stats}


def encoder_digest(variables: Tree) -> str:
    """A digest of the encoder's weights and statistics, the same on every mesh."""
    return _digest(variables, "encoder")


def decoder_digest(variables: Tree) -> str:
    """The same of the decoder."""
    return _digest(variables, "decoder")


def _digest(variables: Tree, half: str) -> str:
    part = {name: tree[half] for name, tree in variables.items() if half in tree}
    rows = checkpoint.leaf_table(part)
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def require_current(manifest: Manifest) -> None:
    """UserError if the run that made a cache is here and has another encoder by now.

    It reads the digests that the checkpoint records, no weights; weights in a PyTorch layout, and
    those on the hub, do not change under their name.
    """
    path = checkpoint.absolute(manifest.autoencoder)
    if not (manifest.encoder and path.is_dir() and checkpoint.has_steps(path)):
        return
    try:
        meta = checkpoint.source_meta(manifest.autoencoder)
    except UserError as e:  # the cache itself is whole
        logging.warning("whether the cached latents are stale is not known: %s", e)
        return
    found = _recorded_digest(meta, InitWeights(manifest.weights))
    if found != manifest.encoder:
        raise UserError(
            f"the cached latents are stale: their encoder is {manifest.encoder[:16]} "
            f"({manifest.description}), and {manifest.autoencoder} has {found[:16]} now (step "
            f"{meta['step']}). Cache the latents of this one (python -m dcae_jax cache-latents, "
            "another --out), or put back the autoencoder that they were made with"
        )


def _recorded_digest(meta: checkpoint.Meta, weights: InitWeights) -> str:
    """`encoder_digest` of a checkpoint's weights, from its table of leaves."""
    saved, rows = meta["leaves"], {}
    ema = weights is InitWeights.ema and "ema" in saved
    name = ema_name(meta["config"]["ema"]["decays"][0]) if ema else ""
    for kind, ours in (("params", "params"), ("stats", "batch_stats")):
        item, prefix = ("ema", f"{name}/{kind}/") if ema else (kind, "")
        prefix += "ae/encoder/"
        for key, row in saved[item].items() if item in saved else ():
            if key.startswith(prefix):
                rows[f"{ours}/{key.removeprefix(prefix)}"] = row
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------- the scaling factor


class Factor(NamedTuple):
    """A scaling factor; for people, where it comes from or why there is none."""

    value: float | None
    origin: str


def scaling_factor(workdir: epath.Path, encoder: str) -> Factor:
    """1 / RMS of this encoder's latents, from the workdir or one that it was initialised from.

    What an import recorded comes first, because the models made for a release were trained with its
    factor; then measured statistics.  Those of other encoders do not count.
    """
    chain, notes = _chain(workdir)
    known = [_recorded(folder, encoder) for folder in chain]
    known += [_measured(folder, encoder, notes) for folder in chain]
    found = [factor for factor in known if factor is not None]
    if not found:
        return Factor(None, "; ".join(notes) or f"no {STATS_FILE} in {workdir}")
    first = found[0]
    others = [f"; not {f.value:.5g}, {f.origin}" for f in found[1:] if f.value != first.value]
    return Factor(first.value, first.origin + "".join(others))


def _recorded(workdir: epath.Path, encoder: str) -> Factor | None:
    """What an import knew."""
    origin = _origin(checkpoint.newest_meta(workdir) or {})
    if origin is None or origin.encoder != encoder or origin.scaling_factor is None:
        return None
    return Factor(origin.scaling_factor, f"recorded by the import in {workdir}")


def measured(source: str, encoder: str) -> dict[str, JSONValue] | None:
    """What `latent-stats` found of this encoder, in a workdir or one that it was initialised from.

    None if `source` is no workdir, or nothing was measured.
    """
    path = checkpoint.absolute(source)
    if not (path.is_dir() and checkpoint.has_steps(path)):
        return None
    chain, _ = _chain(checkpoint.workdir_of(source))
    found = [stats for folder in chain if (stats := read_stats(folder)) is not None]
    return next((stats for stats in found if stats["encoder"] == encoder), None)


def _measured(workdir: epath.Path, encoder: str, notes: list[str]) -> Factor | None:
    """What `latent-stats` found; why that does not count goes to `notes`."""
    try:
        found = read_stats(workdir)
    except UserError as e:
        notes.append(str(e))
        return None
    if found is None:
        return None
    if found["encoder"] != encoder:
        notes.append(f"{workdir / STATS_FILE} is of another encoder")
        return None
    return Factor(found["scaling_factor"], f"measured, {workdir / STATS_FILE}")


def _chain(workdir: epath.Path) -> tuple[list[epath.Path], list[str]]:
    """(the workdir and those that it was initialised from, sentences on those that are gone)."""
    chain: list[epath.Path] = []
    notes, ahead = [], [workdir]
    while ahead:
        here = ahead.pop(0)
        if here in chain:
            continue
        chain.append(here)
        meta = checkpoint.newest_meta(here)
        if meta is None or not meta["config"]["init_from"]:
            continue
        places = _places(meta["config"]["init_from"], here)
        present = [p for p in places if checkpoint.has_steps(p) or (p / STATS_FILE).exists()]
        ahead += present
        if not present:
            notes.append(
                f"{here} was initialised from {meta['config']['init_from']}, which is neither "
                f"{places[0]} nor {places[-1]}, nor relative to a folder above"
            )
    return chain, notes


def _places(init_from: str, workdir: epath.Path) -> list[epath.Path]:
    """Where a workdir's source may be: as recorded from here, from a folder above, or beside it.

    The record is what the user typed in the folder where that run was started.  A wrong hit does no
    harm: its encoder is another one.
    """
    given = checkpoint.workdir_of(init_from)
    relative = "://" not in init_from and not epath.Path(init_from).expanduser().is_absolute()
    above = [checkpoint.workdir_of(str(p / init_from)) for p in workdir.parents if relative]
    return [given, *above, workdir.parent / given.name]


def read_stats(workdir: epath.Path) -> dict[str, JSONValue] | None:
    """What `latent-stats` wrote into a workdir; None if it did not run, UserError if damaged."""
    path = workdir / STATS_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        if not isinstance(found["encoder"], str) or not 0 < found["scaling_factor"] < math.inf:
            raise ValueError("its encoder or its scaling_factor cannot be")
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} is damaged ({type(e).__name__}: {e}); remove it, or measure again with "
            "latent-stats --force"
        ) from e
    return found


def _origin(meta: checkpoint.Meta) -> Origin | None:
    return Origin(**meta["autoencoder"]) if "autoencoder" in meta else None
