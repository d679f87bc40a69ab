"""Measures what masking brings: LMD's schedules, a pixel MAE, masked diffusion; writes the tables.

Running the same command again continues; finished arms are not trained again.  Exit codes: 0 done,
2 wrong usage, 42 preempted and saved.
"""

from typing import TYPE_CHECKING

from dcae_jax.cli import _study

if TYPE_CHECKING:
    from dcae_jax.distributed import Preemption


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax masking-study`."""
    return _study.main(argv, "masking-study", __doc__, _work)


def _work(out: str, quick: bool, preemption: "Preemption") -> None:
    from dcae_jax.studies import masking, masking_report

    settings = masking.quick() if quick else masking.Settings()
    masking_report.write(masking.run(settings, out, preemption), out)
