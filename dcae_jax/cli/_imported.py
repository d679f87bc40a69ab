"""What imports of all kinds of models write: a workdir that holds a run of their weights."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath

    from dcae_jax.config import RunConfig
    from dcae_jax.tree import Tree


def write(
    run: "RunConfig", part: str, variables: "Tree", said: dict[str, Any], out: "epath.Path"
) -> None:
    """Fills the workdir: a checkpoint of step 0, then config.json; without that it is incomplete.

    `run` is a whole run that would continue the weights; they go below `part` ("ae", "net") of the
    parameters.  `said`: what the meta holds of the source.
    """
    from dcae_jax import checkpoint, config, provenance, tree
    from dcae_jax.convert import folder
    from dcae_jax.step import TrainState

    config.validate(config.resolve(run))
    meta = provenance.meta(run, data="") | said
    stats = {part: variables["batch_stats"]} if "batch_stats" in variables else {}
    state = TrainState(0, {part: variables["params"]}, stats, ema={}, opt={})
    folder.require_room(out, 4 * tree.size(variables))  # all f32
    with folder.writing(out):
        checkpoints = checkpoint.Checkpoints(out, run.checkpoint)
        checkpoints.save(state, meta)
        checkpoints.close()
        record = meta | {"command": provenance.command()}
        (out / folder.CONFIG).write_text(json.dumps(record, indent=2))
