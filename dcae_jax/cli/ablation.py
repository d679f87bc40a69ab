"""Measures what residual autoencoding and phase 2 bring: trains small arms, writes the tables.

Running the same command again continues; finished arms are not trained again.  Exit codes: 0 done,
2 wrong usage, 42 preempted and saved.
"""

import argparse
import signal


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax ablation`."""
    early: list[int] = []  # SIGTERM while the imports, which take seconds, are still going on
    signal.signal(signal.SIGTERM, lambda number, frame: early.append(number))
    parser = argparse.ArgumentParser(
        prog="python -m dcae_jax ablation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny study to try the command; its numbers mean "
        "nothing",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    return _run(arguments.out, arguments.quick, early)


def _run(out: str, quick: bool, early: list[int]) -> int:
    """Starts jax, trains, writes; the exit code."""
    from absl import flags, logging

    from dcae_jax import backend, distributed
    from dcae_jax.config import RunConfig
    from dcae_jax.studies import ablation, ablation_report

    flags.FLAGS.mark_as_parsed()  # read by the data loader
    logging.set_verbosity(logging.WARNING)
    preemption = distributed.Preemption()
    preemption.install(early)
    distributed.initialize()
    backend.compile_cache(RunConfig().compile_cache)
    preemption.hand_over()
    settings = ablation.quick() if quick else ablation.Settings()
    try:
        study = ablation.run(settings, out, preemption)
    except distributed.Preempted:
        print("preempted: all is saved; the same command goes on from here", flush=True)
        return distributed.EXIT_PREEMPTED
    ablation_report.write(study, out)
    return 0
