"""launch/reproduce_dcae.sh: which commands it runs, what it skips, where it stops.

The commands are recorded in place of being run; `make reproduce-dcae-demo` runs them.
"""

import os
import pathlib
import subprocess

import pytest

from dcae_jax.nets import inception, lpips, weights

SCRIPT = pathlib.Path(__file__).parents[1] / "launch" / "reproduce_dcae.sh"
# Stands for the interpreter: writes its arguments down, leaves what the command would leave, and
# fails where it is told to.
RECORDER = """#!/usr/bin/env bash
shift 2  # -m dcae_jax
printf '%s\\n' "$*" >> "$LOG"
[[ "$1" == "${FAIL:-}" ]] && exit "$CODE"
out= previous=
for word in "$@"; do [[ "$previous" == --out ]] && out=$word; previous=$word; done
[[ "$1" == import ]] && { mkdir -p "$out"; touch "$out/config.json"; }
[[ "$1" == import-net ]] && mkdir -p nets && touch "nets/${2//-/_}.safetensors"
exit 0
"""
AE = "dc-ae-f64c128-in-1.0"


@pytest.fixture
def launch(tmp_path):
    """Runs the script: (exit code, commands, stdout, stderr)."""
    fake = tmp_path / "python"
    fake.write_text(RECORDER)
    fake.chmod(0o755)
    (tmp_path / "imagenet" / "val").mkdir(parents=True)
    log = tmp_path / "log"

    def run(*argv, **env):
        log.write_text("")
        done = subprocess.run(
            [str(SCRIPT), *map(str, argv)], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHON": str(fake), "LOG": str(log), "HOME": str(tmp_path),
                              "DCAE_JAX_NETS": str(tmp_path / "nets")} | env,
        )  # fmt: skip
        return done.returncode, log.read_text().splitlines(), done.stdout, done.stderr

    return run


def test_the_whole_chain_and_what_a_second_run_skips(launch):
    code, done, _, _ = launch("imagenet", AE, "out", "--resolution", 512)
    assert code == 0
    evaluate = (
        f"evaluate --from out/{AE} --images imagenet --split validation --data-name imagenet-val "
        "--protocol dcae --metrics psnr,ssim,ssim-border,lpips,rfid,latent-rms --out out/eval "
        "--resolution 512"
    )
    results = "results out/eval --out out/results.html"
    assert done == [
        "import-net inception", "import-net lpips-alex", f"import --from {AE} --out out/{AE}",
        evaluate, results,
    ]  # fmt: skip
    assert launch("imagenet", AE, "out", "--resolution", 512)[1] == [evaluate, results]


def test_names_of_files_are_those_of_the_program(monkeypatch):
    names = {weights.default_path(n).name for n in (inception.NAME, lpips.ALEXNET.name)}
    assert names == {"inception.safetensors", "lpips_alex.safetensors"}
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("DCAE_JAX_NETS", raising=False)
    assert str(weights.default_path("inception").parent) == "/home/someone/.cache/dcae_jax/nets"


def test_a_workdir_is_not_imported_and_a_hub_name_is_a_folder_of_its_own(launch, tmp_path):
    (tmp_path / "own" / "checkpoints").mkdir(parents=True)
    _, done, _, _ = launch("imagenet", "own/", "out", RELEASE="NAME")
    assert done[2].startswith("evaluate --from own --images") and len(done) == 4
    assert done[3].endswith("--published NAME")
    _, done, _, _ = launch("imagenet", f"owner/{AE}", "out2")
    assert done[0] == f"import --from owner/{AE} --out out2/{AE}"


@pytest.mark.parametrize(
    ("fail", "code", "hint"), [("import", 2, "mend what"), ("evaluate", 42, "")]
)
def test_a_part_that_fails_stops_the_chain_with_its_code(launch, fail, code, hint):
    got, done, _, said = launch("imagenet", AE, "out", FAIL=fail, CODE=str(code))
    assert got == code and done[-1].startswith(fail + " ")
    assert f"ended with exit code {code}; {hint}" in said and "continues from here" in said


def test_without_images_it_is_one_sentence(launch):
    for argv in ((), ("", AE, "out"), ("imagenet", AE)):
        code, done, _, said = launch(*argv)
        assert code == 2 and not done and "IMAGENET=FOLDER" in said and len(said.splitlines()) == 1
    code, done, _, said = launch("imagenet/val", AE, "out")
    assert code == 2 and not done and "there is no folder imagenet/val/val" in said
    code, _, said, _ = launch("--help")
    assert code == 0 and "AUTOENCODER is a release" in said and "PYTHON chooses" in said
