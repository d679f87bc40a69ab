"""Trials from a config's functions: products, names, and every mistake in one sentence."""

import re
import subprocess
import sys

import pytest
from sweeping import ROOT

from dcae_jax import config
from dcae_jax.errors import IN_USE, UserError
from dcae_jax.sweeps import backends, definition, keeper, results
from dcae_jax.sweeps.backends import Backend, Kind
from dcae_jax.sweeps.definition import Base, Trial

FAKE = "tests/sweeps/fake_config.py"


def test_sweeps_import_no_jax():
    code = (
        "import sys, pathlib, importlib\n"
        "for path in pathlib.Path('dcae_jax/sweeps').glob('*.py'):\n"
        "    importlib.import_module(f'dcae_jax.sweeps.{path.stem}')\n"
        "assert not {'jax', 'optuna', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture
def made(tmp_path):
    """A config file with these functions."""

    def write(text):
        path = tmp_path / "config.py"
        path.write_text(f"from configs.demo import get_config\n{text}\n")
        return Base(str(path))

    return write


def test_sweeps_combine_by_product_in_the_order_of_their_names():
    both = definition.combined(Base(FAKE), ["seed", "lr"])
    assert len(both) == 12 and both[:2] == [
        {"seed": 0, "optim.lr": 1e-4}, {"seed": 0, "optim.lr": 3e-4},
    ]  # fmt: skip
    assert definition.combined(Base(FAKE), []) == definition.combined(Base(FAKE), ["sweep"])
    names = [t.name for t in definition.named(definition.combined(Base(FAKE), ["lr", "seed"]), {})]
    assert names[0] == "lr=0.0001,seed=0" and len(set(names)) == 12


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"optim.lr": 3e-4}, "lr=0.0003"),
        ({"optim.lr": 1e-5, "task.adversarial.optim.lr": 2e-5},
         "optim.lr=1e-05,adversarial.optim.lr=2e-05"),
        ({"ema.decays": [0.9, 0.99]}, "decays=0.9_0.99"),
        ({"data.source.path": "gs://b/ü x/.."}, "path=gs-b-x-.."),
        ({"deterministic": True, "init_from": None}, "deterministic=True,init_from=None"),
        ({"evals[0].n": 5}, "n=5"),
        ({}, "base"),
    ],
)  # fmt: skip
def test_names_are_short_and_safe(overrides, name):
    assert definition.named([overrides], {})[0].name == name
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_=,-]*", name)


def test_names_differ_where_overrides_do_and_stay_as_they_were():
    every = [
        {"name": "a b"}, {"name": "a-b"}, {"name": "A-b"},  # equal when made safe, or to some disks
        {"optim.lr": 0.123456}, {"optim.lr": 0.123457},  # equal to four digits
        {"seed": 1}, {"seed": 1.0}, {"seed": True}, {"name": "x" * 300}, {"name": "x" * 301},
    ]  # fmt: skip
    trials = definition.named(every, {})
    assert len({t.name.casefold() for t in trials}) == len(every)
    assert max(len(t.name) for t in trials) <= 80
    known = {t.name: t.overrides for t in trials}
    assert definition.named(every[::-1], known) == trials[::-1]
    new = definition.named([{"name": "a+b"}, {"name": "a_b"}, {"name": "a  b"}], known)
    assert not {t.name.casefold() for t in new} & {t.name.casefold() for t in trials}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nope"], r"has no sweep 'nope'; there are: sweep, lr, seed, exits, rate, nothing\."),
        (["lr", "rate"], "sweeps 'lr' and 'rate' both set optim.lr"),
        (["nothing"], r"sweep_nothing\(\) yields no trial"),
    ],
)
def test_sweeps_that_cannot_be(names, message):
    with pytest.raises(UserError, match=message):
        definition.combined(Base(FAKE), names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no sweep 'sweep'; there are: none. Write `def sweep"),
        ("def sweep(): return {'seed': 0}", r"sweep\(\) must yield dicts, not return"),
        ("def sweep(): return None", r"sweep\(\) must yield dicts, not return None"),
        ("def sweep(): yield 3", "gives 3; expected a dict"),
        ("def sweep(): yield {'optim': {'lr': 1}}", "sets optim to .*; a sweep sets single fields"),
        ("def sweep(): yield {'seed': 1}; yield {'seed': 1}", "yields seed=1 twice"),
        ("def sweep(): yield {'optim.lrr': 1}", "did you mean --config.optim.lr"),
        ("def sweep(): yield {'optim': 1}", "config.optim=1"),
        ("def sweep(): yield {'seed': 'x'}", "invalid literal for int"),
        ("def sweep(): yield {'steps': 2.5}", "invalid literal for int"),
        ("def sweep(): yield {'name': None}", "name = None cannot be set by a flag"),
        ("def sweep(): yield {'name': 5}", "name = 5 would be read as '5'; give a value of that"),
        ("def sweep(): yield {'optim.lr': '1e-3'}", "optim.lr = '1e-3' would be read as 0.001"),
        ("def sweep(): yield {'ema.decays': 0.9}", "ema.decays = 0.9 would be read as "),
        ("def sweep(): yield {'nonfinite': 'jump'}", "value should be one of <stop|skip>"),
    ],
)
def test_a_config_whose_sweep_is_wrong(made, text, message):
    base = made(text)
    with pytest.raises(UserError, match=message):
        definition.check(base, definition.named(definition.combined(base, []), {}))


def test_all_problems_of_all_trials_are_listed_by_trial(made):
    base = made(
        "def sweep():\n"
        "  yield {'optim.lr': 1e-3}\n"
        "  yield {'optim.lr': -1.0, 'batch': 0}\n"
        "  yield {'optim.lr': -1.0, 'batch': 8}\n"
        "  yield {'ema.decays': (0.5, 1.5)}\n"
    )
    with pytest.raises(UserError) as e:
        definition.check(base, definition.named(definition.combined(base, []), {}))
    text = str(e.value)
    assert text.startswith("3 of 4 trials are not valid; none was started:\n  lr=-1,batch=0:\n")
    assert "batch = 0; set --config.batch" in text and text.count("optim.lr = -1.0") == 2
    assert "  decays=0.5_1.5:\n" in text and "ema.decays has 1.5" in text
    assert "lr=0.001" not in text


def test_a_trial_gets_the_config_that_its_flags_say(made):
    given = {
        "optim.lr": 3e-5, "seed": 7, "deterministic": True, "ema.decays": [0.5, 0.75],
        "nonfinite": "skip", "name": "two words, and 'quotes'", "mesh.specs": ["a -> fsdp,None"],
        "evals[1].n": 5, "data.transform": "center_crop", "init_from": None,
    }  # fmt: skip
    base = made(
        "from dcae_jax.config import NonFinite\nimport numpy as np\n"
        "def sweep():\n"
        "  yield {'optim.lr': np.float64(3e-5), 'seed': np.int64(7), 'deterministic': True,\n"
        "    'ema.decays': (0.5, 0.75), 'nonfinite': NonFinite.skip, 'evals[1].n': 5,\n"
        "    'name': \"two words, and 'quotes'\", 'mesh.specs': ('a -> fsdp,None',),\n"
        "    'data.transform': 'center_crop', 'init_from': None}\n"
    )
    (overrides,) = definition.combined(base, [])
    assert overrides == given
    cfg = definition.check(base, [Trial("t", overrides)])["t"]
    read = config.flatten(cfg)
    assert {path: read[path] for path in given} == given
    with pytest.raises(
        UserError, match=r"--config.seed=3 is set for all trials, and sweep 'sweep'"
    ):
        definition.combined(Base(base.config, ("--config.seed=3",)), [])


# ------------------------------------------------------------------------------- metrics, backends


KNOWN = ["photos-128-test/psnr", "photos-256-test/psnr", "photos-128-test/rfid64", "x/odd"]


@pytest.mark.parametrize(
    ("wanted", "better", "found"),
    [
        ("rfid64", "", "photos-128-test/rfid64 lower"),
        ("photos-256-test/psnr", "", "photos-256-test/psnr higher"),
        ("train/loss/rec", "", "train/loss/rec lower"),
        ("train/images_per_s", "", "train/images_per_s higher"),
        ("odd", "lower", "x/odd lower"),
        ("psnr", "", "--metric=psnr could be any of photos-128-test/psnr, photos-256"),
        ("rfd64", "", "did you mean photos-128-test/rfid64?"),
        ("odd", "", "does not tell which way is better; add --better=higher or --better=lower"),
        ("train/grad_norm", "", "does not tell which way is better"),
    ],
)
def test_metrics_by_name(wanted, better, found):
    if re.search(r" (lower|higher)$", found) and "add" not in found:
        by = results.metric(KNOWN, wanted, better)
        assert f"{by.name} {by.better.value}" == found
        return
    with pytest.raises(UserError) as e:
        results.metric(KNOWN, wanted, better)
    assert found in str(e.value)


def test_commands_of_other_backends():
    flags = ["--config=a.py", "--workdir=w"]
    slurm = Backend(Kind.slurm, "/r", "--partition=gpu --name='my {trial}'")
    assert slurm.command(flags, 1, "lr=1", "/s/job.txt")[1:] == [
        "/r/launch/slurm.py", "--wait", "--job-file=/s/job.txt", "--partition=gpu",
        "--name=my lr=1", "--", *flags,
    ]  # fmt: skip
    tpu = Backend(Kind.tpu_vm, "/r", "--name=sweep-{slot} --zone=z")
    assert tpu.command(flags, 2, "x", "/s/job.txt")[1:] == [
        "/r/launch/tpu_vm.py", "--name=sweep-2", "--zone=z", "--", *flags,
    ]  # fmt: skip
    many = Backend(Kind.local, "/r", processes=4)
    assert many.command(flags, 0, "x", "/s/job.txt")[1:] == [
        "/r/launch/local.py", "--processes", "4", "--", *flags,
    ]  # fmt: skip
    plain = Backend(Kind.local, "/r").command(flags, 0, "x", "/s/job.txt")
    assert plain[1:] == ["/r/main.py", *flags]
    assert "is not there" in slurm.problem(1)
    with pytest.raises(UserError, match=r"--launcher=.* cannot be read: No closing quotation"):
        Backend(Kind.slurm, "/r", "--name='a").command(flags, 0, "x", "/s/job.txt")


def test_gpus_are_those_that_the_environment_allows(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 0\necho 1\necho 2\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert backends.local_gpus() == ["0", "1", "2"]
    smi.write_text("#!/bin/sh\necho 'Driver/library version mismatch'\nexit 18\n")
    with pytest.raises(UserError, match=r"nvidia-smi ends with 18 .Driver/library version mism"):
        backends.local_gpus()
    smi.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backends.local_gpus() == []  # no driver
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7,-1,3")
    assert backends.local_gpus() == ["5", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert backends.local_gpus() == [] and backends.share([], 3) == ()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert backends.local_gpus() == []


def test_a_trial_of_several_processes_gets_the_gpus_of_its_slot_and_no_platform(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    two = Backend(Kind.local, str(ROOT), processes=2, gpus=(("4", "5"), ("6", "7")))
    env = two.environment(1)
    assert env["CUDA_VISIBLE_DEVICES"] == "6,7" and "JAX_PLATFORMS" not in env
    # launch/local.py finds out by itself what it runs on.
    assert not any("platform" in word for word in two.command(["--config=a.py"], 1, "x", "j"))
    assert not two.problem(2)
    few = Backend(Kind.local, str(ROOT), processes=2, gpus=(("4",), ("5",)))
    assert "--processes=2 of a trial on 1 GPU(s) of its slot; lower" in few.problem(2)


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        ("step 1\nerror: no such folder\nbye\n", "error: no such folder"),
        ("error: the config has 2 problem(s):\n  - a\n  - b\n",
         "error: the config has 2 problem(s): - a - b"),
        ('Traceback (most recent call last):\n  File "x"\nValueError: bad\n', "ValueError: bad"),
        ("jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: out\n\n",
         "jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: out"),
        ("only this\n", "only this"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_last_error_of_a_log(printed, error):
    assert keeper.last_error(printed) == error


def test_out_that_is_something_else_is_refused_in_a_sentence(checkout):
    for options in ((), ("--status",), ("--dry-run",)):
        checkout.out.write_text("notes")
        code, text = checkout.here(*options)
        assert code == 2 and f"--out {checkout.out} cannot be read as a folder" in text, text
        checkout.out.unlink()
        checkout.out.mkdir()
        (checkout.out / "sweep.json").write_text('{"method": "grid", "parameters": {}}')
        code, text = checkout.here(*options)
        assert code == 2 and "sweep.json was not written by this launch/sweep.py" in text, text
        (checkout.out / "sweep.json").rename(checkout.out / "config.json")
        code, text = checkout.here(*options)
        told = "holds no sweep" if options == ("--status",) else "other files (there is 'config.j"
        assert code == 2 and told in text, text
        assert [path.name for path in checkout.out.iterdir()] == ["config.json"]
        (checkout.out / "config.json").unlink()
        checkout.out.rmdir()


def test_a_long_error_keeps_its_beginning_and_its_end():
    """Whether a workdir is in use stands behind its path."""
    found = keeper.last_error(f"error: /{'long/' * 80}w {IN_USE} process 7: stop it\n")
    assert found.startswith("error: /long/") and f"w {IN_USE} process 7: stop it" in found
    assert len(found) < 320
