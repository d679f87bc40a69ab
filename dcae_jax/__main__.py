"""python -m dcae_jax COMMAND [...]: the commands beside training."""

import ast
import importlib
import os
import pathlib
import sys

from dcae_jax import store
from dcae_jax.errors import UserError
from dcae_jax.rendezvous import EXIT_GONE, Gone


def commands() -> dict[str, str]:
    """name -> one line of help, read from the modules in cli/ without importing them."""
    found = {}
    for path in sorted((pathlib.Path(__file__).parent / "cli").glob("[a-z]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem.replace("_", "-")] = doc.split("\n")[0]
    return found


BROKEN_PIPE = 141  # as shells report a process that SIGPIPE ended


def main(argv: list[str]) -> int:
    """Runs the command; quiet where the reader of its output has gone (`| head`)."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered is written at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(argv: list[str]) -> int:
    """Dispatches to dcae_jax/cli/COMMAND.py; exit code 2 for a mistake of the user."""
    known = commands()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("python -m dcae_jax COMMAND [...]   (COMMAND --help tells more)\n")
        print("\n".join(f"  {name:14s} {text}" for name, text in known.items()))
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in known:
        print(f"error: no command {name!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    try:
        with store.told():
            return importlib.import_module(f"dcae_jax.cli.{name.replace('-', '_')}").main(rest)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except Gone as e:  # before the processes have joined: nobody waits for this one
        print(f"error: {e}", file=sys.stderr)
        return EXIT_GONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
