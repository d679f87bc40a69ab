"""Every mistake at the command line: one sentence with the mend, exit code 2, nothing lost."""

import json
import shutil
import subprocess
import sys

import pytest
import runs
from PIL import Image

from dcae_jax import train


def many(*cases):
    """[(exit code, output)] of main.py with each command line."""
    done = subprocess.run(
        [sys.executable, "tests/forked_main.py", json.dumps(cases)],
        cwd=runs.ROOT,
        text=True,
        capture_output=True,
        env=runs.environment(PYTHONPATH="tests:."),
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(cases):
    """`cases`: name -> (arguments, exit code, texts that must be in the output)."""
    results = many(*[list(map(str, args)) for args, _, _ in cases.values()])
    wrong = []
    for (name, (_, code, texts)), (found, output) in zip(cases.items(), results, strict=True):
        absent = [t for t in texts if t not in output]
        if found != code or absent or "Traceback" in output:
            wrong.append(f"{name}: exit code {found}, lacks {absent}:\n{output[-1500:]}")
    assert not wrong, "\n\n".join(wrong)


DEMO = "--config=configs/demo.py:phase1"
TINY = f"--config={runs.CONFIG}:phase1"


def test_flags(tmp_path):
    work = f"--workdir={tmp_path / 'w'}"
    check(
        {
            "no config": ([work], 2, ["no --config", "configs/demo.py"]),
            "missing file": (
                ["--config=configs/none.py", work],
                2,
                ["configs/none.py", "does not exist"],
            ),
            "unknown phase": (
                ["--config=configs/demo.py:phase9", work],
                2,
                ["phase9", "phase1, phase2, phase3"],
            ),
            "unknown field": (
                [DEMO, work, "--config.stepz=3"],
                2,
                ["stepz", "did you mean --config.steps?"],
            ),
            "unknown nested field": (
                [DEMO, work, "--config.task.losses.l1_wieght=3"],
                2,
                ["l1_wieght", "config.task.losses"],
            ),
            "field of another place": ([DEMO, work, "--config.lr=3"], 2, ["--config.optim.lr"]),
            "wrong type": ([DEMO, work, "--config.steps=many"], 2, ["many", "steps"]),
            "wrong enum": ([DEMO, work, "--config.optim.schedule=cosin"], 2, ["cosin"]),
            "unknown flag": ([DEMO, "--wrkdir=x"], 2, ["wrkdir"]),
            "stray argument": ([DEMO, work, "train"], 2, ["train", "--help"]),
            "no workdir": ([DEMO], 2, ["no --workdir", "--workdir=runs/demo"]),
            "bad mode": ([DEMO, work, "--mode=tran"], 2, ["mode"]),
        }
    )
    assert not (tmp_path / "w").exists(), "a wrong command line left a workdir behind"


def test_configs(tmp_path):
    work = f"--workdir={tmp_path / 'w'}"
    check(
        {
            "all at once": (
                [TINY, work, "--config.steps=0", "--config.optim.lr=-1", "--config.batch=0"],
                2,
                ["3 problem(s)", "steps = 0", "optim.lr = -1", "batch = 0"],
            ),
            "batch": (
                [TINY, work, "--config.microbatches=3"],
                2,
                ["batch 8 is not divisible", "nearest: 6 or 9"],
            ),
            "mesh": ([TINY, work, "--config.mesh.fsdp=3"], 2, ["does not fit 1 device(s)"]),
            "not in their range": (
                [
                    TINY,
                    work,
                    *("--config.optim.lr=nan", "--config.optim.clip_norm=nan"),
                    *("--config.task.losses.l1=nan", "--config.ema.warmup_steps=-1"),
                    *("--config.seed=-1", "--config.evals[0].every=-1"),
                ],
                2,
                [
                    *("6 problem(s)", "optim.lr = nan", "optim.clip_norm = nan"),
                    *("task.losses.l1 = nan", "ema.warmup_steps = -1", "seed = -1", "every = -1"),
                ],
            ),
            "best": (
                [TINY, work, "--config.checkpoint.best=folder-32-test/psrn"],
                2,
                ["no metric of an evaluator", "folder-32-test/psnr"],
            ),
            "regex": (
                [TINY, work, "--config.task.trainable=ae/("],
                2,
                ["task.trainable = 'ae/(' is not a regular expression"],
            ),
            "spec": (
                [TINY, work, "--config.mesh.specs=('kernel -> foo,None',)"],
                2,
                ["mesh.specs", "data, fsdp, spatial or None"],
            ),
            "index": ([TINY, work, "--config.evals[3].n=4"], 2, ["beyond the end of its list"]),
            "resolution": (
                [TINY, work, "--config.data.resolution=30"],
                2,
                ["not a multiple of the compression", "28 or 32"],
            ),
            "no init_from": (
                [f"--config={runs.CONFIG}:phase2", work],
                2,
                ["high_res_latent", "--config.init_from"],
            ),
            "weight 0": (
                [
                    f"--config={runs.CONFIG}:gan",
                    work,
                    "--config.init_from=x",
                    "--config.task.adversarial.weight=0",
                ],
                2,
                ["task.adversarial.weight = 0", "positive weight"],
            ),
        }
    )
    assert not (tmp_path / "w").exists()


def test_files(tmp_path):
    small = tmp_path / "small" / "train"
    small.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (20, 20)).save(small / f"{i}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")

    def work(name):
        return f"--workdir={tmp_path / 'w' / name}"

    quick = [TINY, "--config.steps=2"]
    check(
        {
            "data path": (
                [*quick, work("a"), f"--config.data.source.path={tmp_path / 'gone'}"],
                2,
                ["gone"],
            ),
            "no images": (
                [*quick, work("b"), f"--config.data.source.path={tmp_path / 'empty'}"],
                2,
                ["empty"],
            ),
            "small images": (
                [*quick, work("c"), f"--config.data.source.path={tmp_path / 'small'}"],
                2,
                ["20", "32", "min_size"],
            ),
            "workdir is a file": (
                [*quick, f"--workdir={tmp_path / 'file' / 'w'}"],
                2,
                ["--workdir", "cannot be made"],
            ),
            "init_from gone": (
                [
                    f"--config={runs.CONFIG}:phase2",
                    work("d"),
                    f"--config.init_from={tmp_path / 'no'}",
                ],
                2,
                ["init_from", "does not exist"],
            ),
            "init_from without checkpoints": (
                [
                    f"--config={runs.CONFIG}:phase2",
                    work("e"),
                    f"--config.init_from={tmp_path / 'empty'}",
                ],
                2,
                ["init_from", "has no checkpoints"],
            ),
            "eval of nothing": ([*quick, work("f"), "--mode=eval"], 2, ["does not exist"]),
            "eval of a later phase": (  # its weights are in the workdir: no init_from is needed
                [
                    f"--config={runs.CONFIG}:phase2",
                    f"--workdir={tmp_path / 'empty'}",
                    "--mode=eval",
                ],
                2,
                ["--workdir", "has no checkpoints"],
            ),
            "no pictures": (
                [
                    *(*quick, work("g")),
                    *("--config.evals[0].pictures=0", "--config.evals[0].training_pictures=0"),
                ],
                0,
                ["eval after step 2"],
            ),
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("usage") / "w"
    assert runs.run("phase1", workdir, steps=2, evals=[]) == train.DONE
    return workdir


def test_config_changes_on_resume(trained, tmp_path):
    """Cadence may change and is printed; model, data and phase are refused unless forced."""
    work = tmp_path / "w"
    shutil.copytree(trained, work)
    other = tmp_path / "images"
    shutil.copytree(runs.make_images(), other)
    (other / "train" / "00.png").unlink()
    base = [TINY, f"--workdir={work}", "--config.steps=2"]
    before = runs.digest(work)
    check(
        {
            "model": (
                [*base, "--config.task.model.latent_channels=8"],
                2,
                ["another run", "task.model.latent_channels: 4 -> 8", "--force"],
            ),
            "seed and batch": (
                [*base, "--config.seed=1", "--config.batch=4"],
                2,
                ["seed: 0 -> 1", "batch: 8 -> 4"],
            ),
            "data": ([*base, "--config.data.flip=false"], 2, ["data.flip: True -> False"]),
            "phase": (
                [f"--config={runs.CONFIG}:phase2", f"--workdir={work}", "--config.init_from=x"],
                2,
                ["task.phase: low_res_full -> high_res_latent"],
            ),
            "model, longer": (
                [*base, "--config.steps=3", "--config.task.model.latent_channels=8"],
                2,
                ["another run"],
            ),
            "the other records": (
                [*base, "--config.steps=3", f"--config.data.source.path={other}", "--force"],
                0,
                ["data.(records)", "data.source.path"],
            ),
        }
    )
    after = runs.digest(work)
    for name in before:  # what was there is still there, but for what the forced run rewrote
        if name not in ("config.json", "summary.json", "report.html", "run.lock"):
            assert after[name] == before[name], name
    shutil.rmtree(work)
    shutil.copytree(trained, work)
    shutil.rmtree(other)
    code, output = many(
        [*base, "--config.steps=4", "--config.checkpoint.every=1", "--config.optim.lr=0.002"]
    )[0]
    assert code == 0, output
    assert "config changed since the last start: checkpoint.every: 4 -> 1\n" in output
    assert "optim.lr: 0.001 -> 0.002  (changes the numbers from here on)" in output
    assert runs.steps(work) == [2, 3, 4]


def test_a_forced_model_that_does_not_fit_is_refused_by_its_paths(trained, tmp_path):
    work = tmp_path / "w"
    shutil.copytree(trained, work)
    before = runs.digest(work)
    check(
        {
            "force": (
                [
                    TINY,
                    f"--workdir={work}",
                    "--config.steps=4",
                    "--force",
                    "--config.task.model.latent_channels=8",
                ],
                2,
                ["checkpoint 2", "params/ae/encoder/conv_out/kernel: shape", "expected"],
            ),
        }
    )
    after = runs.digest(work)
    assert {k for k in after if after[k] != before.get(k)} <= {"run.lock"}
