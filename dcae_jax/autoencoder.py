"""A trained autoencoder ready for use, wherever its weights are: `load(source)`, encode, decode.

A source is the workdir of a run (or of an import), one step directory of it, a folder or file in a
PyTorch layout, or a name on the Hugging Face hub.
"""

import copy
import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dcae_jax import checkpoint
from dcae_jax import config as config_lib
from dcae_jax.config import InitWeights, JSONValue
from dcae_jax.convert import from_torch
from dcae_jax.errors import UserError
from dcae_jax.models.dcae import DCAEConfig
from dcae_jax.models.kl_vae import KLVAEConfig
from dcae_jax.models.layers import Dtype
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

    @functools.cached_property
    def decoder(self) -> str:
        """Digest of the decoder's weights, which latents do not depend on."""
        return decoder_digest(self.variables)

    def placed(self, mesh: Mesh, dtype: Dtype | None = None) -> "Autoencoder":
        """The same, its weights whole on every device of the mesh, computing in `dtype`."""
        model = copy.deepcopy(self.cfg)
        if dtype is not None:
            model.dtype, model.conv_dtype = dtype, None
        variables = jax.device_put(self.variables, NamedSharding(mesh, PartitionSpec()))
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
    source: str, weights: InitWeights = InitWeights.ema, variant: str | None = None
) -> Autoencoder:
    """The autoencoder at `source`; UserError says what was looked for.

    `weights`: which of a run's weights (imports have one kind).  `variant`: the release, where a
    bare file leaves it open.
    """
    path = checkpoint.absolute(source)
    if path.is_dir() and checkpoint.has_steps(path):
        return _from_run(source, weights)
    return imported(from_torch.load(source, variant))


def imported(found: from_torch.Imported) -> Autoencoder:
    """The autoencoder of converted weights."""
    digest = encoder_digest(found.variables)
    origin = Origin(
        found.release, found.scaling_factor, found.source, found.dtypes, found.counters, digest
    )
    return Autoencoder(
        found.cfg, found.variables, found.scaling_factor, found.source, origin, digest
    )


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
    return Autoencoder(task.model, variables, factor, found.source, origin, digest)


def abstract(cfg: DCAEConfig | KLVAEConfig) -> dict[str, Tree]:
    """Shapes of the items `params` and `stats` of an autoencoder's checkpoint, on one device.

    It is one of this process: each process has the weights for itself.
    """
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(
        lambda: cfg.build().init(
            jax.random.key(0), jnp.zeros((1, cfg.factor, cfg.factor, cfg.in_channels))
        )
    )
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
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


# ------------------------------------------------------------------------------- the scaling factor


def scaling_factor(workdir: epath.Path, encoder: str) -> float | None:
    """1 / RMS of this encoder's latents, from the workdir or one that it was initialised from.

    Measured statistics come first, then what an import knew; those of other encoders do not count.
    """
    seen = set()
    while workdir is not None and workdir not in seen and workdir.exists():
        seen.add(workdir)
        for record in (read_stats(workdir), _record(workdir)):
            if record is not None and record["encoder"] == encoder:
                return record["scaling_factor"]
        before = (checkpoint.newest_meta(workdir) or {"config": {"init_from": None}})["config"]
        workdir = checkpoint.workdir_of(before["init_from"]) if before["init_from"] else None
    return None


def read_stats(workdir: epath.Path) -> dict[str, JSONValue] | None:
    """What `latent-stats` wrote into a workdir; None if it did not run."""
    path = workdir / STATS_FILE
    return json.loads(path.read_text()) if path.exists() else None


def _record(workdir: epath.Path) -> dict[str, JSONValue] | None:
    origin = _origin(checkpoint.newest_meta(workdir) or {})
    return origin.to_json() if origin else None


def _origin(meta: checkpoint.Meta) -> Origin | None:
    return Origin(**meta["autoencoder"]) if "autoencoder" in meta else None
