"""Gather metrics.json files of evaluations into one page and a Markdown table, or compare two.

Looks in the folders and all below them, and writes results.html and results.md: a table for each
protocol, with notes, pictures, and published scores where the weights are a release.  Examples:

  python -m dcae_jax results runs
  python -m dcae_jax results runs/a/eval runs/b/eval --out compared.html
  python -m dcae_jax results --compare runs/a/eval runs/b/eval

--compare prints a difference for each score whose protocol is the same in both, and otherwise the
fields in which the protocols differ.  Exit code: 0; with --compare 1 if a score could not be
compared; 2 for a mistake in what was given.
"""

from typing import TYPE_CHECKING, Any

from dcae_jax.cli import _options

if TYPE_CHECKING:
    from etils import epath

NOT_COMPARED = 1


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax results`."""
    args = _parser().parse_args(argv)
    _check(args)
    return _compare(*args.compare) if args.compare else _gather(args)


def _parser() -> Any:
    parser = _options.parser("results", __doc__)
    add = parser.add_argument
    add("paths", nargs="*", metavar="DIR", help="folders, or metrics.json files; may be gs://")
    add(
        "--out", metavar="FILE",
        help="the page, .html; its .md is written beside it; default: results.html in the folder "
        "given, or here if there are several",
    )  # fmt: skip
    add("--compare", nargs=2, metavar=("A", "B"), help="two folders or files: B against A")
    add(
        "--published", metavar="RELEASE",
        help="set all results beside the scores published for this release, whatever they are of",
    )  # fmt: skip
    return parser


def _check(args: Any) -> None:
    from dcae_jax.convert import published, releases
    from dcae_jax.errors import UserError

    if bool(args.paths) == bool(args.compare):
        raise UserError("give folders to gather, or --compare A B")
    if args.out and not args.out.endswith(".html"):
        raise UserError(f"--out {args.out} must end with .html")
    if args.published:
        name = args.published
        args.published = releases.named(name) or releases.diffusion_named(name) or name
        known = sorted({there.weights for there in published.PUBLISHED})
        if args.published not in known:
            raise UserError(
                f"--published {name}: no scores of it are known here, only of {', '.join(known)}"
            )


def _gather(args: Any) -> int:
    from dcae_jax.report import results, results_page

    out = _out(args)
    made = results_page.write(results.find(args.paths), out, args.published)
    print(results_page.console(made))
    print(f"\nresults: {out}, {out.with_suffix('.md').name}")
    return 0


def _out(args: Any) -> "epath.Path":
    from etils import epath

    if args.out:
        return epath.Path(args.out).expanduser()
    only = epath.Path(args.paths[0]).expanduser()
    folder = only if len(args.paths) == 1 and only.is_dir() else epath.Path()
    return folder / "results.html"


# ------------------------------------------------------------------------------------- comparing


def _compare(a: str, b: str) -> int:
    from dcae_jax.report import comparison, results

    pairs, alone = comparison.pairs(results.find([a]), results.find([b]))
    found = [comparison.compared(*pair) for pair in pairs]
    print("\n\n".join(each.text for each in found))
    for result in alone:
        print(f"\nonly in one of them: {result.name} ({result.file})")
    return 0 if all(each.same for each in found) else NOT_COMPARED
