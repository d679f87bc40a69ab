"""What the launchers share: splitting the command line, shell quoting, starting again, messages.

The launchers run on laptops and login nodes: the standard library only, no dcae_jax and no jax.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXIT_USAGE = 2  # what main.py calls wrong usage, a launcher does too
EXIT_PREEMPTED = 42  # main.py: saved, start me again
EXIT_LOST = 43  # main.py: another process of the run is gone or never came
# Killed from outside, and aborted: jax does that to a process whose heartbeats are missed.
EXIT_GONE = (128 + signal.SIGKILL, 128 + signal.SIGABRT)
BACK_OFF = (10, 300)  # seconds before the first restart after a 43, doubled up to the second
PROGRESS = 600  # seconds; a start that lived longer than this begins the count of 43 in a row anew


class LaunchError(Exception):
    """A mistake, or a fault of the surroundings: one sentence with what to do about it."""


# ------------------------------------------------------------------------------------ command line


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of the launcher, and the flags of main.py behind the first `--`."""
    own = list(argv)
    at = own.index("--") if "--" in own else len(own)
    return own[:at], own[at + 1 :]


class Parser(argparse.ArgumentParser):
    """Says mistakes as the launchers do, in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing all options."""
        raise LaunchError(f"{message}; --help shows the options")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number within bounds."""
    wanted = f"a whole number from {least}" + (f" to {most}" if most else "")

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or not least <= int(text) <= (most or int(text)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return int(text)

    return read


PORT = whole(1, 65535)


def parser(doc: str, *, max_failures: bool = True) -> argparse.ArgumentParser:
    """A parser with a launcher's docstring as help and the options that all have.

    `max_failures`: whether 43 in a row are counted, as all but JobSet can.
    """
    found = Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    found.add_argument("--dry-run", action="store_true", help="print what would run, run nothing")
    found.add_argument(
        "--max-restarts",
        type=whole(0),
        default=100,
        metavar="N",
        help="starts after the first (100)",
    )
    if max_failures:
        found.add_argument(
            "--max-failures", type=whole(0), default=10, metavar="N",
            help="of those, for exit code 43 in a row: a process is gone or never came (10); a "
            f"start that lived {PROGRESS // 60} minutes ends the row",
        )  # fmt: skip
    return found


def flag(flags: Sequence[str], name: str) -> str | None:
    """The value of a flag of main.py: --name=V, -name=V or --name V; the last one counts."""
    found = None
    for word, following in itertools.zip_longest(flags, flags[1:]):
        key, equals, value = word.partition("=")
        if key in (f"--{name}", f"-{name}"):
            found = value if equals else following
    return found


def is_on(flags: Sequence[str], name: str) -> bool:
    """Whether a flag of main.py that is on or off is on: --name, --name=true; the last counts."""
    found = False
    for word in flags:
        key, _, value = word.lstrip("-").partition("=")
        if word.startswith("-") and key in (name, f"no{name}"):
            found = key == name and value.lower() in ("", "true", "t", "1")
    return found


def main_flags(flags: Sequence[str], devices: int) -> list[str]:
    """Flags of main.py with the number of devices of all processes, which it then checks."""
    given = flag(flags, "expect_devices") is not None
    return [*flags, *([] if given else [f"--expect_devices={devices}"])]


def main_command(python: str, flags: Sequence[str], devices: int) -> list[str]:
    """`python main.py FLAGS`, from the folder that we are in."""
    return [python, os.path.relpath(ROOT / "main.py"), *main_flags(flags, devices)]


def require_flags(flags: Sequence[str]) -> None:
    """A run needs a config and, unless it is a dry run of main.py, a workdir."""
    if flag(flags, "config") is None:
        raise LaunchError(
            "no --config behind `--`; the flags of main.py stand there: "
            "python launch/LAUNCHER.py [OPTIONS] -- --config=FILE:ARG --workdir=DIR"
        )
    if flag(flags, "workdir") is None and not is_on(flags, "dry_run"):
        raise LaunchError("no --workdir behind `--`; a restart resumes from it")


def is_local(path: str | None) -> bool:
    """Whether a path is a folder of one machine (or of a mount), not of an object store."""
    return path is not None and "://" not in path


def shell(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """A command line for a POSIX shell, its variables in front."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in (env or {}).items()), *quoted(command)])


def quoted(words: Sequence[str]) -> list[str]:
    """Each word as the shell needs it."""
    return [shlex.quote(w) for w in words]


# ----------------------------------------------------------------------------------------- running


def say(text: str) -> None:
    """One line of the launcher itself."""
    print(f"launch: {text}", flush=True)


def require_program(name: str, mend: str) -> None:
    """The program must be on PATH."""
    if shutil.which(name) is None:
        raise LaunchError(f"there is no `{name}` on PATH; {mend}")


def write(path: pathlib.Path, text: str, option: str) -> None:
    """Writes a file and the folders above it; `option` chooses them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as e:
        raise LaunchError(
            f"{path} cannot be written ({e.strerror}); choose another folder with {option}"
        ) from e


def capture(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; its output as text.  Exit codes are the caller's to judge."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


def explain(what: str, stderr: str, mends: Sequence[tuple[str, str]]) -> str:
    """The message of a command that failed, with what to do where the text is known."""
    lines = stderr.splitlines()
    # kubectl's own log comes before its message.
    message = [ln for ln in lines if not re.match(r"[EWI]\d{4} \d\d:", ln)] or lines
    said = " ".join(" ".join(message).split()) or "without a word"
    known = [mend for text, mend in mends if text in said.lower()]
    return f"{what} failed: {said}" + (f"\n  -> {known[0]}" if known else "")


@contextlib.contextmanager
def on_signals(act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` on SIGTERM, Ctrl-C and a closed terminal while the block runs."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {n: signal.signal(n, lambda *_: act()) for n in numbers}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def back_off(failures: int) -> int:
    """Seconds to wait after so many failures in a row."""
    first, most = BACK_OFF
    return min(first * 2 ** (failures - 1), most)


def until_done(
    start: Callable[[], int],
    args: argparse.Namespace,
    stopped: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], object] = time.sleep,
    lived: Callable[[], float] | None = None,
) -> int:
    """Calls `start` until its exit code is neither 42 nor 43, or no restart is left.

    After 42 at once; after 43, a failure of a machine or a process, with a growing pause, which a
    42 ends, or a start that lived longer than PROGRESS.  `stopped`: whoever launched asked to end,
    so that a 42 is the answer and no reason.  `lived`: seconds that main.py ran in the last start,
    where a start does more than that.
    """
    restarts = failures = 0
    begun = time.monotonic()
    lived = lived or (lambda: time.monotonic() - begun)
    say("start")
    while (code := start()) in (EXIT_PREEMPTED, EXIT_LOST) and not stopped():
        failures = 0 if lived() > PROGRESS else failures
        failures = failures + 1 if code == EXIT_LOST else 0
        why = f"a process is gone, {failures} in a row" if failures else "preempted and saved"
        if restarts == args.max_restarts or failures > args.max_failures:
            limit = f"--max-restarts {args.max_restarts} --max-failures {args.max_failures}"
            say(f"exit code {code} ({why}): no restart left ({limit}); the same command continues")
            break
        restarts += 1
        if failures:
            say(f"exit code {code} ({why}); waiting {back_off(failures)} s")
            sleep(back_off(failures))
            if stopped():
                break
        say(f"restart {restarts} of {args.max_restarts}: exit code {code} ({why})")
        begun = time.monotonic()
    say(f"the job ended with exit code {code}")
    return code


def run(main: Callable[[list[str]], int]) -> None:
    """A launcher's `main(argv)` as a program: its exit code, mistakes as one sentence."""
    try:
        code = main(sys.argv[1:])
    except LaunchError as e:
        print(f"error: {e}", file=sys.stderr)
        code = EXIT_USAGE
    sys.exit(code)
