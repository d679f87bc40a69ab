"""Measures what residual autoencoding and phase 2 bring: trains small arms, writes the tables.

Running the same command again continues; finished arms are not trained again.  Exit codes: 0 done,
2 wrong usage, 42 preempted and saved.
"""

from typing import TYPE_CHECKING

from dcae_jax.cli import _study

if TYPE_CHECKING:
    from dcae_jax.distributed import Preemption


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax ablation`."""
    return _study.main(argv, "ablation", __doc__, _work)


def _work(out: str, quick: bool, preemption: "Preemption") -> None:
    from dcae_jax.studies import ablation, ablation_report

    settings = ablation.quick() if quick else ablation.Settings()
    ablation_report.write(ablation.run(settings, out, preemption), out)
