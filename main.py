"""Trains or evaluates what a config describes:  python main.py --config=FILE:ARG --workdir=DIR

Running the same command again resumes.  Every field of the config can be overridden, e.g.
--config.optim.lr=2e-4.  Exit codes: 0 done, 1 failed, 2 wrong usage, 42 preempted and saved.
"""

import sys

from absl import app, flags, logging

from dcae_jax import config as config_lib
from dcae_jax import flags as config_flag
from dcae_jax.errors import UserError

_CONFIG = config_flag.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; may be gs://")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train, or evaluate what is there")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print config, shapes, parameters and cost; exit")
_FORCE = flags.DEFINE_bool("force", False, "resume although the config is that of another run")


def main(_: list[str]) -> int:
    """Resolves and validates the config, joins the processes, runs."""
    from dcae_jax import backend, distributed

    preemption = distributed.Preemption()
    preemption.install()
    logging.set_verbosity(logging.WARNING)
    try:
        cfg = config_lib.resolve(_CONFIG.value)
        config_lib.validate(cfg)
        backend.start(cfg)
        if _DRY_RUN.value:
            from dcae_jax import inspect

            return inspect.dry_run(cfg)
        if not _WORKDIR.value:
            raise UserError("no --workdir; give the folder of the run, e.g. --workdir=runs/demo")
        from dcae_jax import train

        run = train.train if _MODE.value == "train" else train.evaluate
        return run(cfg, _WORKDIR.value, preemption, force=_FORCE.value)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    app.run(main, flags_parser=config_flag.parse)
