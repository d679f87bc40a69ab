"""Stands for gcloud, kubectl, sbatch, srun, scontrol or scancel: records, refuses, answers.

    python fake_command.py NAME ARGUMENTS...

Every command line goes to $FAKE_LOG.  A flag that is not in known_flags.json (made of the real
commands' help) is refused with the real command's words.  Answers stand in $FAKE_REPLIES.
`srun` runs the command that it is given, as many times as tasks are asked for.
"""

import fcntl
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

KNOWN = json.loads(pathlib.Path(__file__).with_name("known_flags.json").read_text())["flags"]


def record(words: list[str]) -> None:
    with open(os.environ["FAKE_LOG"], "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        log.write(json.dumps(words) + "\n")


def own_words(words: list[str]) -> list[str]:
    """Without the program that srun starts."""
    if words[0] != "srun":
        return words
    last = next((i for i, w in enumerate(words[1:], 1) if not w.startswith("-")), len(words))
    return words[:last]


def refuse_unknown(words: list[str]) -> None:
    """Ends with 2 where the real command would not know a flag or a subcommand."""
    plain = [w for w in words if not w.startswith("-")]
    names = [n for n in KNOWN if plain[: len(n.split())] == n.split()]
    if not names:
        sys.exit(f"{words[0]}: Invalid choice: {' '.join(plain[1:3])!r}.")
    known = KNOWN[max(names, key=len)]
    if words[0] == "sbatch":
        script = pathlib.Path(plain[-1]).read_text()
        lines = re.findall(r"^#SBATCH (.*)", script, re.M)
        words = [*words, *(w for line in lines for w in shlex.split(line))]
        if not_options := [w for line in lines for w in shlex.split(line) if w[:1] != "-"]:
            sys.exit(f"sbatch: error: {not_options} are no options")
    for word in words:
        if word.startswith("-") and word.partition("=")[0] not in known:
            print(f"ERROR: ({words[0]}) unrecognized arguments: {word}", file=sys.stderr)
            sys.exit(2)


def reply(line: str) -> int:
    """Prints the answer for a command line; its exit code."""
    path = os.environ["FAKE_REPLIES"]
    with open(path, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        replies = json.load(file)
        fits = [r for r in replies if r[0] in line]
        if not fits:
            return 0
        found = fits[0]
        if sum(r[0] == found[0] for r in replies) > 1:
            replies.remove(found)
            file.seek(0)
            file.truncate()
            json.dump(replies, file)
    _, code, out, err = [*found, "", ""][:4]
    print(out, end="" if out.endswith("\n") or not out else "\n")
    print(err, file=sys.stderr, end="" if err.endswith("\n") or not err else "\n")
    return code


def srun(words: list[str]) -> int:
    """Runs the tasks on this machine; the highest exit code, as srun does."""
    own = own_words(words)
    asked = [w.partition("=")[2] for w in own if w.startswith("--ntasks=")]
    count = int(asked[0] if asked else os.environ["SLURM_NTASKS"])
    tasks = [
        subprocess.Popen(
            words[len(own) :],
            env=os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i),
                              "SLURM_NTASKS": str(count)},
        )
        for i in range(count)
    ]  # fmt: skip
    codes = [task.wait() for task in tasks]
    return max(c if c >= 0 else 128 - c for c in codes)


def main() -> int:
    words = sys.argv[1:]
    record(words)
    refuse_unknown(own_words(words))
    return srun(words) if words[0] == "srun" else reply(" ".join(words))


if __name__ == "__main__":
    sys.exit(main())
