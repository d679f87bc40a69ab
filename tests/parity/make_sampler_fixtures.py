"""Writes samplers.npz: losses and whole sampling runs of the PyTorch originals and of diffusers.

Needs a virtual environment of its own, apart from the one of the tests, and two repositories:
    pip install torch==2.13.0 diffusers==0.42.1 numpy
    git clone https://github.com/facebookresearch/DiT ../DiT
    git clone https://github.com/baofff/U-ViT ../U-ViT
    python tests/parity/make_sampler_fixtures.py ../DiT ../U-ViT

Noise comes from a numpy seed on both sides and the "networks" are formulas: only results are
stored.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SHAPE = (2, 3, 4, 2)  # b h w c


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(x: Any, u: Any, sin: Any) -> Any:
    """A formula that stands for a trained epsilon network; u = n / 1000 says how much is noise."""
    return u * x + 0.3 * (1.0 - u) * sin(3.0 * x)


def variance(x: Any, sin: Any) -> Any:
    """What it says of its variance; between -1 and 1 most of the time."""
    return 1.2 * sin(5.0 * x + 1.0)


def steps_noise(n: int) -> np.ndarray:
    """The noise of n steps."""
    return normal(7, n, *SHAPE)


LOSS_INDICES = (0, 1, 2, 400, 998, 999)


def loss_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x0, eps, indices): one example per index; some x0 lie outside of [-1, 1]."""
    shape = (len(LOSS_INDICES), *SHAPE[1:])
    return 0.8 * normal(8, *shape), normal(9, *shape), np.array(LOSS_INDICES)


def _to_torch(x: np.ndarray) -> Any:
    """NHWC to NCHW."""
    import torch

    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def _to_numpy(x: Any) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


def make_dit(root: Path) -> dict[str, np.ndarray]:
    """Loss and its parts; 250 respaced steps with learned range variance."""
    import torch

    sys.path.insert(0, str(root))
    from diffusion import create_diffusion

    def model(x: Any, i: Any) -> Any:
        u = ((i.float() + 1) / 1000).reshape(-1, 1, 1, 1)
        return torch.cat([network(x, u, torch.sin), variance(x, torch.sin)], 1)

    x0, eps, indices = loss_inputs()
    terms = create_diffusion("").training_losses(
        model, _to_torch(x0), torch.from_numpy(indices), noise=_to_torch(eps)
    )
    found = {f"dit_{k}": terms[k].numpy() for k in ("loss", "mse", "vb")}
    for steps in (250, 10):
        drawn = iter(steps_noise(steps))
        original, torch.randn_like = torch.randn_like, lambda _, d=drawn: _to_torch(next(d))
        x1 = _to_torch(normal(6, *SHAPE))
        end = create_diffusion(str(steps)).p_sample_loop(
            model, tuple(x1.shape), noise=x1, clip_denoised=False, device="cpu"
        )
        torch.randn_like = original
        found[f"dit_sample_{steps}"] = _to_numpy(end)
    return found


def uvit_betas() -> np.ndarray:
    """beta_1 ... beta_1000 as the U-ViT repository computes them."""
    import torch

    return (torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2).numpy()


def make_uvit(root: Path) -> dict[str, np.ndarray]:
    """Singlestep "fast" of order 3; 30 to 32 calls end in different orders."""
    import torch

    spec = importlib.util.spec_from_file_location("dpm_solver_pp", root / "dpm_solver_pp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    schedule = module.NoiseScheduleVP(schedule="discrete", betas=torch.tensor(uvit_betas()).float())

    def model(x: Any, t: Any) -> Any:
        return network(x, t.reshape(-1, 1, 1, 1), torch.sin)

    times = torch.tensor([0.001, 0.0335, 0.5, 0.77777, 1.0])
    found = {
        "uvit_alpha": schedule.marginal_alpha(times).numpy(),
        "uvit_lambda": schedule.marginal_lambda(times).numpy(),
    }
    for steps in (30, 31, 32):
        solver = module.DPM_Solver(model, schedule, predict_x0=True, thresholding=False)
        end = solver.sample(_to_torch(normal(6, *SHAPE)), steps=steps, eps=1 / 1000, T=1.0)
        found[f"uvit_fast_{steps}"] = _to_numpy(end)
    return found


def make_diffusers() -> dict[str, np.ndarray]:
    """Whole runs of the schedulers where the conventions coincide: trailing times, alpha_0 = 1."""
    import torch
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    betas = {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "num_train_timesteps": 1000, "timestep_spacing": "trailing",
    }  # fmt: skip

    def run(scheduler: Any, steps: int, **options: Any) -> np.ndarray:
        scheduler.set_timesteps(steps)
        x = _to_torch(normal(6, *SHAPE))
        for i, z in zip(scheduler.timesteps, steps_noise(steps), strict=True):
            eps = network(x, (i + 1) / 1000, torch.sin)
            extra = {"variance_noise": _to_torch(z)} | options if options else {}
            x = scheduler.step(eps, i, x, **extra).prev_sample
        return _to_numpy(x)

    plain = {"clip_sample": False, "set_alpha_to_one": True}
    solver = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
    return {
        "ddim_0": run(DDIMScheduler(**betas, **plain), 20),
        "ddim_0.7": run(DDIMScheduler(**betas, **plain), 20, eta=0.7),
        "ddim_1": run(DDIMScheduler(**betas, **plain), 20, eta=1.0),
        "dpm_2m": run(DPMSolverMultistepScheduler(**betas, **solver), 20),
        **make_ddpm(),
    }


def make_ddpm() -> dict[str, np.ndarray]:
    """One step of DDPMScheduler for each variance, from index 600 to 560."""
    import torch
    from diffusers import DDPMScheduler

    found = {}
    for kind in ("fixed_small", "fixed_large", "learned_range"):
        scheduler = DDPMScheduler(
            beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False,
            variance_type=kind,
        )  # fmt: skip
        scheduler.set_timesteps(timesteps=[600, 560])
        x = _to_torch(normal(6, *SHAPE))
        output = network(x, 0.601, torch.sin)
        if kind == "learned_range":
            output = torch.cat([output, variance(x, torch.sin)], 1)
        found[f"ddpm_{kind}"] = _to_numpy(_with_noise(scheduler, output, 600, x))
    return found


def _with_noise(scheduler: Any, output: Any, i: int, x: Any) -> Any:
    """One step whose noise is the first of `steps_noise`."""
    from diffusers.schedulers import scheduling_ddpm

    original = scheduling_ddpm.randn_tensor
    scheduling_ddpm.randn_tensor = lambda *_, **__: _to_torch(steps_noise(1)[0])
    end = scheduler.step(output, i, x).prev_sample
    scheduling_ddpm.randn_tensor = original
    return end


if __name__ == "__main__":
    dit, uvit = map(Path, sys.argv[1:])
    np.savez_compressed(
        HERE / "samplers.npz", **make_dit(dit), **make_uvit(uvit), **make_diffusers()
    )
    print("samplers.npz", (HERE / "samplers.npz").stat().st_size, "bytes")
