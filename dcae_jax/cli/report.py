"""Makes report.html of a run, or of all phases of a run, and prints its end table."""

import argparse

from dcae_jax.report import html, phases


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax report`."""
    parser = argparse.ArgumentParser(prog="python -m dcae_jax report", description=__doc__)
    parser.add_argument(
        "--workdir",
        required=True,
        nargs="+",
        metavar="DIR",
        help="a run's workdir, the folder that holds phase1..phase3, or several workdirs; "
        "each may be gs://",
    )
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the workdir")
    arguments = parser.parse_args(argv)
    several = arguments.workdir if len(arguments.workdir) > 1 else arguments.workdir[0]
    print(phases.end_table(several))
    print(f"\nreport: {html.build_report(several, arguments.out)}")
    return 0
