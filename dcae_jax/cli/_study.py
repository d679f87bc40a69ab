"""What the commands that run a study share."""

import argparse
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcae_jax.distributed import Preemption


def main(
    argv: list[str], name: str, doc: str, work: "Callable[[str, bool, Preemption], None]"
) -> int:
    """Parses --out and --quick, starts jax, works; the exit code."""
    early: list[int] = []  # SIGTERM while the imports, which take seconds, are still going on
    signal.signal(signal.SIGTERM, lambda number, frame: early.append(number))
    parser = argparse.ArgumentParser(
        prog=f"python -m dcae_jax {name}", description=doc.splitlines()[0]
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny study to try the command; its numbers mean "
        "nothing",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    from absl import flags, logging

    from dcae_jax import backend, distributed
    from dcae_jax.config import RunConfig

    flags.FLAGS.mark_as_parsed()  # read by the data loader
    logging.set_verbosity(logging.WARNING)
    preemption = distributed.Preemption()
    preemption.install(early)
    backend.join(argv)
    backend.compile_cache(RunConfig().compile_cache)
    preemption.hand_over()
    try:
        work(arguments.out, arguments.quick, preemption)
    except distributed.Preempted:
        print("preempted: all is saved; the same command goes on from here", flush=True)
        return distributed.EXIT_PREEMPTED
    return 0
