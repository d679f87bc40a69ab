"""The documents say what is true: paths, tests, targets, and the walk of one image.

`python tests/test_docs.py` writes the line numbers of WORKSPACE.md's table anew.
"""

import ast
import pathlib
import re
import subprocess

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ("README.md", "WORKSPACE.md", "CONTRIBUTING.md", "CHANGELOG.md")
REFERENCE = re.compile(r"`([\w/]+\.py):(\d+)` `([\w.]+)`")


def definitions(path):
    """Qualified name -> line of every function and class of a file."""
    found = {}

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = child.lineno
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse((ROOT / path).read_text()), "")
    return found


def text(name):
    return (ROOT / name).read_text()


def code(name):
    """What a document shows as code: fenced blocks and `spans`."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text(name), re.S | re.M)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text(name), flags=re.S | re.M))
    return blocks, spans


def tracked():
    """Files of the repository: in git, or new and not ignored; outside a checkout, the sources."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    return [p for p in ROOT.rglob("*") if p.is_file() and ".venv" not in p.parts]


@pytest.mark.parametrize("name", DOCS)
def test_paths_that_documents_name_exist(name):
    blocks, spans = code(name)
    kinds = r"py|sh|md|txt|toml|html|npz|png|svg"
    pattern = rf"(?<![\w./:$~-])((?:[\w.-]+/)*[\w.-]+\.(?:{kinds}))(?![\w/])"
    found = {p for part in [*blocks, *spans] for p in re.findall(pattern, part)}
    found |= set(re.findall(r"\]\((?!https?:)([^)#\s]+)", text(name)))  # links and pictures
    folders = {s for s in spans if re.fullmatch(r"[\w./-]+/", s)}
    made = ("runs/", "my_", "labels.txt", "report.html", "validation_labels.txt", "packed/")
    missing = [
        p for p in sorted(found | folders)
        if not p.startswith(made) and not (ROOT / p).exists()
        and not any(q.name == p for q in (ROOT / "dcae_jax").rglob("*"))
        and p.removesuffix("/") not in WORKDIR
    ]  # fmt: skip
    assert not missing, f"{name} names files that do not exist: {missing}"


# What a run writes, as documents call it.
WORKDIR = {
    "metrics", "checkpoints", "checkpoints_damaged", "images", "tensorboard", "profile",
    "train", "test", "validation", "runs/demo", "eval", "parity.npz", "grid.png", "samples.npz",
    "parts",
}  # fmt: skip


@pytest.mark.parametrize("name", DOCS)
def test_tests_that_documents_name_exist(name):
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        found |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.M)) | {path.stem}
    named = set(re.findall(r"\b(test_\w+)\b", text(name)))
    assert named <= found, f"{name}: {sorted(named - found)}"


@pytest.mark.parametrize("name", DOCS)
def test_make_targets_that_documents_name_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.M))
    blocks, spans = code(name)
    named = {m for part in [*blocks, *spans] for m in re.findall(r"\bmake ([a-z-]+)", part)}
    assert named <= targets, f"{name}: make {sorted(named - targets)}"


def test_every_module_and_target_is_documented():
    page = text("WORKSPACE.md")
    files = [p.relative_to(ROOT).as_posix() for p in (ROOT / "dcae_jax").rglob("*.py")]
    named = set(re.findall(r"`([\w/.]+)`", page))
    missing = [p for p in files if not p.endswith("__init__.py") and p not in named]
    assert not missing, f"WORKSPACE.md's map lacks {missing}"
    targets = set(re.findall(r"^([a-z-]+):.*## ", text("Makefile"), re.M))
    assert targets - {"setup", "clean"} <= set(re.findall(r"`make ([a-z-]+)`", page))


def test_commands_that_documents_show_exist():
    commands = {p.stem.replace("_", "-") for p in (ROOT / "dcae_jax/cli").glob("[a-z]*.py")}
    for name in DOCS:
        named = set(re.findall(r"-m dcae_jax ([a-z][a-z-]*)", text(name)))
        assert named <= commands, f"{name}: {sorted(named - commands)}"


def test_config_fields_that_the_readme_shows_exist():
    """Every --config.x.y of the README is a field of a config that it could mean."""
    from dcae_jax import flags
    from dcae_jax.errors import UserError

    paths = sorted((ROOT / "configs").glob("*.py"))
    others = ("paper_", "modern_", "md_", "demo_diffusion", "lmd")  # they have no phases
    phased = [p for p in paths if not p.stem.startswith(others)]
    cfgs = [flags.load(f"{p}:phase3" if p in phased else str(p)) for p in paths]
    cfgs += [flags.load(f"{ROOT}/configs/modern_dit.py:s,f32,{x}") for x in ("online", "fid")]
    named = set(re.findall(r"--config\.([\w.\[\]]+)", text("README.md")))
    assert named

    def known(path):
        for cfg in cfgs:
            try:
                flags.check_field(cfg, path)
                return True
            except (UserError, IndexError):  # another config has fewer evaluators
                continue
        return False

    assert all(known(path.rstrip(".")) for path in named), [p for p in named if not known(p)]


def test_no_machine_paths_or_registries_in_any_file():
    """Nothing of the machine it was written on: absolute paths of people, hosts of registries."""
    homes = "|".join(("root", "home/(?!someone)\\w+", "Users/\\w+", "work", "mnt", "opt"))
    pattern = re.compile(
        rf"""(?<![\w.$}}~/-])/(?:{homes})/|(?:index-url|extra-index|trusted-host|find-links)"""
        r"|https?://[\w.-]+(?::\d+)?/[\w./-]*simple\b"
    )
    found = []
    for path in tracked():
        if path.suffix in (".npz", ".pth", ".png", ".jpg") or path == pathlib.Path(__file__):
            continue
        for i, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{i}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
    assert pattern.search("see /" + "home/anna/x") and not pattern.search("https://a.org/home/x")


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_constraints_pin_every_requirement_by_version_alone(version):
    lines = [
        line for line in text(f"constraints-{version}.txt").splitlines()
        if line and not line.startswith("#")
    ]  # fmt: skip
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "name==version, no URL"
    pins = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in text(file).splitlines():
            name = re.split(r"[\[>=<#\s]", line)[0]
            assert not name or re.sub(r"[-_.]+", "-", name).lower() in pins, f"{file}: {line}"


def test_extras_repeat_the_development_requirements():
    import tomllib

    project = tomllib.loads(text("pyproject.toml"))["project"]
    listed = {ln for ln in text("requirements-dev.txt").splitlines() if ln and ln[0] != "#"}
    assert set(project["optional-dependencies"]["dev"]) == listed
    assert {"tpu", "cuda", "dev"} <= set(project["optional-dependencies"])


# --------------------------------------------------------------------------------- follow one image


def table():
    """(hop, path, line, qualified name) of WORKSPACE.md's table."""
    section = text("WORKSPACE.md").split("## Follow one image")[1].split("\n## ")[0]
    rows = []
    for line in section.splitlines():
        if hop := re.match(r"\| (\d+) \|", line):
            rows += [(int(hop[1]), p, int(n), name) for p, n, name in REFERENCE.findall(line)]
    return rows


def relocated(page):
    """WORKSPACE.md with the lines where the named definitions are now."""

    def line(match):
        path, _, name = match.groups()
        return f"`{path}:{definitions(path)[name]}` `{name}`"

    return REFERENCE.sub(line, page)


def test_promise_9_table_points_at_the_definitions():
    rows = table()
    assert {hop for hop, *_ in rows} == set(range(11))
    for _, path, number, name in rows:
        known = definitions(path)
        assert name in known, f"{path} has no {name}"
        assert number == known[name], (
            f"{name} is at {path}:{known[name]}; run `python tests/test_docs.py`"
        )


def find_crop(image, crop):
    """(y, x) where `crop` lies in `image`, by its first row; None if nowhere."""
    size = len(crop)
    for y in range(len(image) - size + 1):
        windows = np.lib.stride_tricks.sliding_window_view(image[y], (size, 3))[:, 0]
        for x in np.flatnonzero((windows == crop[0]).all((1, 2))):
            if (image[y : y + size, x : x + size] == crop).all():
                return y, int(x)
    return None


def test_follow_one_image(tmp_path):
    """Row 3 of step 2, from its record to the parameters that it moved, hop by hop."""
    import jax
    import jax.numpy as jnp
    import tiny

    from dcae_jax import config, sharding, step
    from dcae_jax.data import pipeline, transforms
    from dcae_jax.data.pipeline import DataConfig, Transform
    from dcae_jax.data.sources import PhotosConfig, PhotosSource
    from dcae_jax.tasks.base import Variables

    # 0: a resolved config
    cfg = tiny.run(batch=16, resolution=32)
    cfg.data = DataConfig(
        source=PhotosConfig(cache_dir=str(tmp_path)), resolution=32, flip=False, threads=1,
        transform=Transform.random_crop,
    )  # fmt: skip
    cfg.microbatches = 2
    config.validate(config.resolve(cfg), 8)

    # 1: position 2 * 16 + 3 says which record
    row, k = 3, 2
    parts = pipeline._parts(cfg.data)
    part, index = pipeline._training_order(parts, cfg.seed)[k * cfg.batch + row]
    source = parts[part].source
    record = source[index]
    assert isinstance(source, PhotosSource) and isinstance(record.image, bytes)

    # 2: decoded, then a crop of it: what the pipeline gives is found in the photograph
    pixels = transforms.decode(record.image, record.name)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3

    # 3: the batch of step 2, and the rows of the second of two processes
    with pipeline.batches(cfg.data, batch=16, seed=cfg.seed, start_step=k) as it:
        local = next(it)
    assert local["image"].shape == (16, 32, 32, 3) and local["image"].dtype == np.uint8
    assert find_crop(pixels, local["image"][row]) is not None, record.name
    half = pipeline.Shard(0, 2)
    with pipeline.batches(cfg.data, batch=16, seed=cfg.seed, start_step=k, shard=half) as it:
        np.testing.assert_array_equal(next(it)["image"], local["image"][:8])

    # 4: one global array, two rows on each of the eight devices
    cfg.task.model.dtype = type(cfg.task.model.dtype).bfloat16
    trainer = tiny.Trainer(cfg, devices=8)
    with jax.set_mesh(trainer.mesh):
        batch = sharding.put_batch(local, trainer.mesh)
        assert batch["image"].dtype == jnp.uint8 and batch["image"].shape == (16, 32, 32, 3)
        assert {s.data.shape for s in batch["image"].addressable_shards} == {(2, 32, 32, 3)}

        # 5: floats in [-1, 1]
        inputs = trainer.task.prepare(jax.random.key(0), batch, jnp.int32(k), ())
        image = inputs.examples["image"]
        assert image.dtype == jnp.float32
        np.testing.assert_allclose(
            np.asarray(image[row]), local["image"][row] / 127.5 - 1, atol=1e-6
        )  # one rounding of values up to 1 in float32
        np.testing.assert_allclose(np.asarray(inputs.examples["weight"]), 1 / 16)

        # 6 and 7: two microbatches add up to the loss of the whole batch
        variables = Variables(trainer.state.params, trainer.state.stats, {})
        grads, metrics, _ = jax.jit(
            lambda v, i: step.accumulate(trainer.task, v, i, cfg.microbatches)
        )(variables, inputs)
        whole = jax.jit(lambda v, i: trainer.task.objectives[0].loss(v, i, None))(variables, inputs)
        assert whole.terms["rec"].shape == () and set(grads["ae"]) == {"rec"}
        # bfloat16 activations: each microbatch rounds for itself, 2^-8 at most.
        np.testing.assert_allclose(metrics["loss"], whole.terms["rec"], rtol=4e-3)

        # 8: the latent, computed in bfloat16, and a float32 picture
        apply = trainer.task.model.apply
        z = apply({"params": variables.params["ae"]}, image, method="encode")
        assert z.shape == (16, 8, 8, 4)
        y = trainer.task.predict(variables, batch)
        assert y.shape == image.shape and y.dtype == jnp.float32

        # 9: the step moves every parameter and its average; all of them float32
        before = jax.device_get((trainer.state.params, trainer.state.ema))
        state, metrics = trainer._step(trainer.state, {}, batch)
    after = jax.device_get((state.params, state.ema))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(after))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved)) and int(state.step) == 1

    # 10: metrics are separate outputs on the device, fetched when the next step already runs
    assert all(isinstance(v, jax.Array) and v.shape == () for v in metrics.values())
    assert float(metrics["nonfinite"]) == 0


if __name__ == "__main__":
    path = ROOT / "WORKSPACE.md"
    path.write_text(relocated(path.read_text()))
    print("line numbers written")
