"""Denoising networks, their losses and whole sampling runs against PyTorch and diffusers."""

import math
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import denoisers
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import original
import pytest
import torch
from denoisers import CHANNELS, SIZE, Case
from diffusers.schedulers import scheduling_ddpm
from etils import epath

from dcae_jax import tree
from dcae_jax.convert import diffusion_from_torch, diffusion_to_torch, verify
from dcae_jax.convert.names import Layout
from dcae_jax.convert.releases import Family
from dcae_jax.diffusion.process import Kind, ProcessConfig, Space
from dcae_jax.diffusion.samplers import (
    AncestralConfig,
    DDIMConfig,
    DPM2MConfig,
    EulerConfig,
    SamplerConfig,
)

# Relative to the largest value: what the issue of parity asks for.
VALUES, GRADIENTS, SAMPLES, LOSSES = 1e-5, 1e-4, 1e-4, 1e-6
PROCESSES = {
    Family.uvit: ProcessConfig(),
    Family.dit: ProcessConfig(kind=Kind.ddpm, learn_variance=True),
    Family.usit: ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v),
    Family.sit: ProcessConfig(kind=Kind.flow, predict=Space.v, loss_space=Space.v),
}
SHAPE = (denoisers.BATCH, SIZE, SIZE, CHANNELS)
WHERE = f"{SIZE} x {SIZE} latents"


@pytest.fixture(scope="module", params=denoisers.NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The network in PyTorch, and what `import` makes of the file that PyTorch has saved."""
    return denoisers.build(request.param, tmp_path_factory.mktemp("saved") / "model")


def times(case: Case) -> np.ndarray:
    """Network times of the case's process, one an example."""
    found = {Family.uvit: (1.0, 517.0, 1000.0), Family.dit: (0.0, 517.0, 999.0)}
    return np.array(found.get(case.found.described.family, (0.0, 0.3, 1.0)), np.float32)


# ----------------------------------------------------------------------------------- the networks


def test_outputs(compare: Any, case: Case) -> None:
    x, t = original.normal(f"{case.name} x", *SHAPE), times(case)
    compare(case.name, WHERE, VALUES, output=(case.ours(x, t), case.theirs(x, t)))


def test_gradients(compare: Any, case: Case) -> None:
    """By the latent and by every parameter."""
    x, t = original.normal(f"{case.name} x", *SHAPE), times(case)
    dy = original.normal(f"{case.name} dy", *case.theirs(x, t).shape)
    dx, theirs = denoisers.their_gradients(case, x, t, dy)
    our_dx, ours = denoisers.our_gradients(case, x, t, dy)
    compare(case.name, WHERE, GRADIENTS, **{"input gradient": (our_dx, dx)})
    for found in (ours, theirs):  # no effect: it moves all attention weights of a query alike
        scale = max(np.abs(g).max() for g in found.values())
        for key in [k for k in found if k.endswith("attn1.to_k.bias")]:
            assert np.abs(found.pop(key)).max() <= 1e-5 * scale, key
    compare.tree(case.name, WHERE, GRADIENTS, "parameter gradients", ours, theirs)


def test_one_percent_of_any_leaf_is_noticed(case: Case) -> None:
    x, t = original.normal(f"{case.name} x", *SHAPE), times(case)
    expected = case.theirs(x, t)
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(case.variables).items()}
    unseen = {}
    for path, leaf in leaves.items():
        changed = tree.unflatten({**leaves, path: leaf * np.float32(1.01)})
        ours = np.asarray(denoisers.applied(case.cfg, changed, x, t))
        if (error := original.relative_error(ours, expected)) <= VALUES:
            unseen[path] = error
    assert not unseen, f"{case.name}: 1 % more of these goes unseen (with the error): {unseen}"


def test_import_and_export_return_the_same_bits(case: Case, tmp_path: Path) -> None:
    """Of every tensor; diffusers loads its own again and computes the same."""
    export = diffusion_to_torch.ExportDiffusion(
        case.found.described, case.variables, case.found.layout, case.name, case.found.dtypes
    )
    out = tmp_path / "out"
    diffusion_to_torch.write(export, epath.Path(out))
    again = diffusion_from_torch.from_torch
    with again.open_source(str(out)) as opened:
        real, _ = again.stripped(opened.tensors.infos, diffusion_from_torch.ROOTS,
                                 diffusion_from_torch.PREFIXES)  # fmt: skip
        after = {key: opened.tensors.read(name) for key, name in real.items()}
    assert after.keys() == case.state.keys()
    for key, tensor in case.state.items():
        # A constant, not a weight; PyTorch's sines and numpy's differ in the last bit.
        if key == "pos_embed" and case.found.layout is Layout.dit:
            assert np.abs(after[key] - tensor.numpy()).max() <= 2e-6
        else:
            assert np.array_equal(after[key], tensor.numpy()), key
    if case.found.layout is Layout.diffusers:
        model = diffusers.DiTTransformer2DModel.from_pretrained(out, low_cpu_mem_usage=False)
        x, t = original.normal(f"{case.name} x", *SHAPE), times(case)
        with torch.no_grad():
            labels = torch.from_numpy(denoisers.LABELS).long()
            output = model.eval()(original.nchw(x), torch.from_numpy(t), labels).sample
        assert np.array_equal(original.nhwc(output), case.theirs(x, t))


DITS = [("DiT, diffusers", Layout.diffusers), ("DiT", Layout.dit), ("DiT", Layout.official),
        ("SiT", Layout.dit)]  # fmt: skip


@pytest.mark.parametrize(("name", "layout"), DITS, ids=str)
def test_promise_6_what_is_exported_loads_in_pytorch_and_agrees(
    compare: Any, name: str, layout: Layout, tmp_path: Path
) -> None:
    """As `export --verify` does it."""
    case, out = denoisers.build(name, tmp_path / "model"), epath.Path(tmp_path / "out")
    export = diffusion_to_torch.ExportDiffusion(case.found.described, case.variables, layout, name)
    diffusion_to_torch.write(export, out)
    error = verify.verify_diffusion(out, export)
    verify.check_diffusion(out, error)
    compare.report(f"{name}, exported", layout.value, VALUES, {"output": error})


def test_the_lines_of_the_readme_run_without_dcae_jax(tmp_path: Path) -> None:
    case = denoisers.build("DiT, diffusers", tmp_path / "model")
    export = diffusion_to_torch.ExportDiffusion(
        case.found.described, case.variables, Layout.diffusers, "a test"
    )
    diffusion_to_torch.write(export, epath.Path(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*)```", text, re.S)[1]
    done = subprocess.run(
        [os.sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True,
        timeout=300, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    found = re.findall(r"relative error (\S+)", done.stdout)
    assert found and float(found[0]) < VALUES, done.stdout + done.stderr[-2000:]


# -------------------------------------------------------------------------------- the training loss


def betas(family: Family) -> torch.Tensor:
    """beta_1 ... beta_1000, as the papers give them."""
    if family is Family.uvit:
        return torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


def wide(x: torch.Tensor) -> torch.Tensor:
    """One number an example, for NCHW."""
    return x.reshape(-1, 1, 1, 1)


def mean(x: torch.Tensor) -> torch.Tensor:
    """Of each example."""
    return x.flatten(1).mean(1)


def vp_loss(case: Case, x0: torch.Tensor, eps: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of epsilon; with the bound of a learned variance where the network has that."""
    family = case.found.described.family
    alphas = torch.cumprod(1 - betas(family), 0)
    product = wide(alphas[index])
    x = product.sqrt() * x0 + (1 - product).sqrt() * eps
    shift = 1 if family is Family.uvit else 0  # U-ViT counts from 1
    output = case.torch(x.float(), (index + shift).float()).double()
    loss = mean((output[:, :CHANNELS] - eps) ** 2)
    if family is Family.uvit:
        return loss
    return loss + bound(x0, x, output, index)


def bound(
    x0: torch.Tensor, x: torch.Tensor, output: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Bits per number, by PyTorch's own KL divergence (improved DDPM, equations 3 to 7 and 15)."""
    beta = betas(Family.dit)
    bars = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    least = beta * (1 - before) / (1 - bars)
    least[0] = least[1]  # q(x_0 | x_1, x_0) is certain; the original repeats the next one

    def of(table: torch.Tensor) -> torch.Tensor:
        return wide(table[index])

    def center(x0: torch.Tensor) -> torch.Tensor:
        kept = of((1 - beta).sqrt() * (1 - before) / (1 - bars)) * x
        return of(before.sqrt() * beta / (1 - bars)) * x0 + kept

    eps, mix = output.chunk(2, 1)
    guess = (x - of(1 - bars).sqrt() * eps) / of(bars).sqrt()
    share = (mix + 1) / 2
    log_variance = share * of(beta.log()) + (1 - share) * of(least.log())
    theirs = torch.distributions.Normal(center(guess), (log_variance / 2).exp())
    true = torch.distributions.Normal(center(x0), of(least).sqrt().expand_as(x))
    kl = torch.distributions.kl_divergence(true, theirs)
    return mean(torch.where(wide(index) == 0, -binned(theirs, x0), kl)) / math.log(2)


def binned(normal: torch.distributions.Normal, x: torch.Tensor) -> torch.Tensor:
    """log of the mass in a bin of 2/255 (DDPM, equation 13), by the originals' tanh for the CDF."""

    def cdf(edge: torch.Tensor) -> torch.Tensor:
        z = (edge - normal.loc) / normal.scale
        return (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2

    high = torch.where(x > 0.999, 1.0, cdf(x + 1 / 255))
    low = torch.where(x < -0.999, 0.0, cdf(x - 1 / 255))
    return (high - low).clamp(min=1e-12).log()


def flow_loss(case: Case, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Of the velocity data - noise; the network is told how much is data."""
    x = wide(1 - t) * x0 + wide(t) * eps
    output = case.torch(x.float(), (1 - t).float()).double()
    return mean((output - (x0 - eps)) ** 2)


def losses(case: Case, index: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(ours, theirs) from the same data, noise and times, one number an example."""
    process = PROCESSES[case.found.described.family].build()
    t = ((np.array(index) + 1) / 1000).astype(np.float32)
    x0, eps = (original.normal(f"{case.name} {n}", *SHAPE) for n in ("x0", "eps"))
    with torch.no_grad():
        data, noise = (original.nchw(v).double() for v in (x0, eps))
        if process.cfg.is_flow:
            theirs = flow_loss(case, data, noise, torch.from_numpy(t).double())
        else:
            theirs = vp_loss(case, data, noise, torch.tensor(index))

    @jax.jit
    def loss(x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        x_t, told = process.diffuse(x0, eps, t), process.network_time(t)
        output = case.cfg.build().apply(case.variables, x_t, told, denoisers.cond())
        return process.loss(output, x0, eps, x_t, t)

    return np.asarray(loss(x0, eps, t)), theirs.numpy()


@pytest.mark.parametrize("index", [(1, 400, 999), (37, 750, 998)], ids=str)
def test_training_loss(compare: Any, case: Case, index: tuple[int, ...]) -> None:
    where = f"steps {', '.join(str(i + 1) for i in index)}"
    compare(case.name, where, LOSSES, **{"training loss": losses(case, index)})


def test_training_loss_of_the_first_step(compare: Any, case: Case) -> None:
    """There a learned variance is that of data in bins of 2/255, of the width of its deviation.

    The mass of a bin is a difference of two numbers near 1, which float32 knows to 1e-7 only.
    """
    learned = case.found.described.family is Family.dit
    limit = 1e-4 if learned else LOSSES
    compare(case.name, "step 1", limit, **{"training loss": losses(case, (0, 0, 0))})


# ------------------------------------------------------------------------------ whole sampling runs

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = 20


def our_run(case: Case, sampler: SamplerConfig, x1: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """From x1, with this noise for the steps."""
    process = PROCESSES[case.found.described.family].build()

    def network(x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        return case.cfg.build().apply(case.variables, x, t, cond)

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        denoise = process.denoiser(network)
        given = jnp.asarray(noise)
        found = sampler.build(process).run(
            lambda x, t: denoise(x, t, denoisers.cond()), x, lambda k: given[k], len(noise)
        )
        return found.x0

    return np.asarray(run(jnp.asarray(x1)))


def their_run(
    case: Case, scheduler: Any, x1: np.ndarray, step: Callable[..., torch.Tensor]
) -> np.ndarray:
    """diffusers' loop; `step` (output, scheduler's time, x) takes one."""
    uvit, x = case.found.described.family is Family.uvit, original.nchw(x1)
    with torch.no_grad():
        for i in scheduler.timesteps:
            output = case.torch(x, torch.full((len(x),), float(i) + uvit))
            x = step(output, i, x)
    return original.nhwc(x)


def noises(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(x1, the noise of the steps)."""
    x1 = original.normal(f"{case.name} x1", *SHAPE)
    return x1, np.stack([original.normal(f"{case.name} z{i}", *SHAPE) for i in range(STEPS)])


def discrete(case: Case) -> dict[str, Any]:
    """The process as diffusers' schedulers take it; skips flows."""
    family = case.found.described.family
    if family.flow:
        pytest.skip("a flow has none of these")
    betas = SCALED if family is Family.uvit else LINEAR
    return {**betas, "num_train_timesteps": 1000, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_run(compare: Any, case: Case, eta: float) -> None:
    scheduler = diffusers.DDIMScheduler(**discrete(case), clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(STEPS)
    x1, noise = noises(case)
    given = iter(noise)

    def step(output: torch.Tensor, i: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        z, eps = original.nchw(next(given)), output[:, :CHANNELS]
        extra = {"eta": eta, "variance_noise": z} if eta else {}
        return scheduler.step(eps, i, x, **extra).prev_sample

    theirs = their_run(case, scheduler, x1, step)
    ours = our_run(case, DDIMConfig(eta=eta), x1, noise)
    compare(case.name, f"DDIM, eta {eta:g}, {STEPS} steps", SAMPLES, sample=(ours, theirs))


def test_multistep_run(compare: Any, case: Case) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **discrete(case), algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(STEPS)
    x1, noise = noises(case)

    def step(output: torch.Tensor, i: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return scheduler.step(output[:, :CHANNELS], i, x).prev_sample

    theirs = their_run(case, scheduler, x1, step)
    ours = our_run(case, DPM2MConfig(), x1, noise)
    compare(case.name, f"DPM-Solver++ 2M, {STEPS} steps", SAMPLES, sample=(ours, theirs))


@pytest.fixture
def given_noise(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """DDPMScheduler draws its noise itself: it gets ours."""
    drawn: Iterator[np.ndarray] = iter(noises(case)[1])
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda *_, **__: original.nchw(next(drawn))
    )


def test_ancestral_run(compare: Any, case: Case, given_noise: None) -> None:
    """Respaced, with the learned variance of DiT and the posterior's of U-ViT."""
    learned = case.found.described.family is Family.dit
    kind = "learned_range" if learned else "fixed_small"
    scheduler = diffusers.DDPMScheduler(**discrete(case), clip_sample=False, variance_type=kind)
    kept = [round(k * 999 / (STEPS - 1)) for k in range(STEPS)]
    scheduler.set_timesteps(timesteps=kept[::-1])
    x1, noise = noises(case)

    def step(output: torch.Tensor, i: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return scheduler.step(output, int(i), x).prev_sample

    theirs = their_run(case, scheduler, x1, step)
    ours = our_run(case, AncestralConfig(), x1, noise)
    compare(case.name, f"DDPM, {kind}, {STEPS} steps", SAMPLES, sample=(ours, theirs))


def test_flow_run(compare: Any, case: Case) -> None:
    """Euler's steps, which diffusers takes along noise - data."""
    if not case.found.described.family.flow:
        pytest.skip("only flows")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / STEPS for k in range(STEPS)])
    x1, noise = noises(case)
    sigmas = iter(scheduler.sigmas)
    x = original.nchw(x1)
    with torch.no_grad():
        for i in scheduler.timesteps:
            output = case.torch(x, torch.full((len(x),), 1 - float(next(sigmas))))
            x = scheduler.step(-output, i, x).prev_sample
    ours = our_run(case, EulerConfig(), x1, noise)
    compare(case.name, f"Euler, {STEPS} steps", SAMPLES, sample=(ours, original.nhwc(x)))
