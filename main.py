"""Trains or evaluates what a config describes:  python main.py --config=FILE:ARG --workdir=DIR

Running the same command again resumes.  Every field of the config can be overridden, e.g.
--config.optim.lr=2e-4.  Exit codes: 0 done, 1 failed, 2 wrong usage, 42 preempted and saved, 43 a
process of the run never came or is gone.
"""

import signal
import sys
import traceback

_EARLY: list[int] = []  # SIGTERM while the imports, which take seconds, are still going on
signal.signal(signal.SIGTERM, lambda number, frame: _EARLY.append(number))

from absl import app, flags, logging  # noqa: E402

from dcae_jax import config as config_lib  # noqa: E402
from dcae_jax import flags as config_flag  # noqa: E402
from dcae_jax.errors import UserError  # noqa: E402
from dcae_jax.rendezvous import EXIT_GONE, Gone  # noqa: E402

_CONFIG = config_flag.define_config()
flags.declare_key_flag("config")  # it stands in --help
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; may be gs://")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train, or evaluate what is there")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print config, shapes, parameters and cost; exit")
_EXPECT_DEVICES = flags.DEFINE_integer(
    "expect_devices", None, "stop unless the run has so many devices in all", lower_bound=1
)
_FORCE = flags.DEFINE_bool("force", False, "resume although the config is that of another run")


def main(_: list[str]) -> int:
    """Runs; the exit code of the process."""
    from dcae_jax import distributed

    preemption = distributed.Preemption()
    preemption.install(_EARLY)
    logging.set_verbosity(logging.WARNING)
    try:
        return _run(preemption)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return distributed.leave(2, str(e))
    except Gone as e:
        print(f"error: {e}", file=sys.stderr)
        return distributed.leave(EXIT_GONE, str(e))
    except Exception as e:
        distributed.settle()
        traceback.print_exc()
        return distributed.leave(1, f"{type(e).__name__}: {e}")


def _run(preemption: "distributed.Preemption") -> int:
    """Resolves and validates the config, joins the processes, trains or evaluates."""
    from dcae_jax import backend

    cfg = config_lib.resolve(_CONFIG.value)
    if _MODE.value == "eval":
        cfg.init_from = _WORKDIR.value  # that is where the weights come from
    config_lib.validate(cfg)
    if not (_DRY_RUN.value or _WORKDIR.value):
        raise UserError("no --workdir; give the folder of the run, e.g. --workdir=runs/demo")
    backend.start(cfg, _WORKDIR.value, _MODE.value, _EXPECT_DEVICES.value)
    preemption.hand_over()
    if _DRY_RUN.value:
        from dcae_jax import inspect

        return inspect.dry_run(cfg)
    from dcae_jax import train

    if _MODE.value == "eval":
        return train.evaluate(cfg, _WORKDIR.value, preemption)
    return train.train(cfg, _WORKDIR.value, preemption, force=_FORCE.value)


if __name__ == "__main__":
    app.run(main, flags_parser=config_flag.parse)
