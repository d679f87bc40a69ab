"""The launchers as modules, and fakes of the commands that they call."""

import json
import os
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "launch"))  # as `python launch/NAME.py` does


class Fakes:
    """A folder at the front of PATH with fakes (fake_command.py), their answers and their log."""

    def __init__(self, folder, monkeypatch):
        self.bin, self._replies = folder / "bin", folder / "replies.json"
        self.log = folder / "calls.jsonl"
        self.bin.mkdir()
        monkeypatch.setenv("FAKE_REPLIES", str(self._replies))
        monkeypatch.setenv("FAKE_LOG", str(self.log))
        # Nothing but what every machine has, so that a real gcloud or sbatch is never met.
        tools = folder / "tools"
        tools.mkdir()
        needed = ("bash sh env sed head tail grep wc cat rm mkdir sleep tar cut tr setsid nohup "
                  "sha256sum find dirname date printf").split()  # fmt: skip
        for name in needed:
            for place in ("/usr/bin", "/bin"):
                if os.path.exists(f"{place}/{name}"):
                    (tools / name).symlink_to(f"{place}/{name}")
                    break
        monkeypatch.setenv("PATH", f"{self.bin}:{tools}")
        self.reply()

    def add(self, *names):
        """Puts fakes of these commands there."""
        for name in names:
            path = self.bin / name
            path.write_text(
                f'#!/bin/sh\nexec {sys.executable} -I {HERE / "fake_command.py"} {name} "$@"\n'
            )
            path.chmod(0o755)

    def script(self, name, text):
        """A command with an own text."""
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def reply(self, *replies):
        """Answers: (part of the command line, exit code, stdout, stderr).

        The first that fits and is not used up answers; the last of those with the same part stays.
        """
        self._replies.write_text(json.dumps([list(r) for r in replies]))

    def calls(self, start=""):
        """Command lines that came, as lists of words."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines]
        return [c for c in found if " ".join(c).startswith(start)]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    (tmp_path / "fakes").mkdir()
    return Fakes(tmp_path / "fakes", monkeypatch)
