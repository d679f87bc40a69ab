"""Runs main.py many times for the price of one start: imports first, then one fork for each case.

    python tests/forked_main.py '[["--config=a.py", "--workdir=x"], ...]'

prints a JSON list of [exit code, stdout and stderr].  Each case is a process of its own that runs
main.py from its first line; only the modules that it imports are already loaded.
"""

import json
import os
import runpy
import sys
import tempfile

import dcae_jax.train  # noqa: F401  the slow part; it starts no backend and no thread


def case(argv: list[str], out: int) -> None:
    """In the child: main.py with this command line; never returns."""
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["main.py", *argv]
    code = 0
    try:
        runpy.run_path("main.py", run_name="__main__")
    except SystemExit as e:
        code = e.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    found = []
    for argv in json.loads(sys.argv[1]):
        with tempfile.TemporaryFile() as out:
            if not (child := os.fork()):
                case(argv, out.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            found.append([code, out.read().decode(errors="replace")])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
