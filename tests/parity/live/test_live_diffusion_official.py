"""The official samplers and the official loss of a learned variance, where the package is at hand.

The official networks are among those of test_live_diffusion.py then.
"""

from pathlib import Path
from typing import Any

import denoisers
import numpy as np
import official_diffusion
import original
import pytest
import test_live_diffusion as live
import torch
from denoisers import CHANNELS

from dcae_jax.convert.releases import Family
from dcae_jax.diffusion.samplers import AncestralConfig, DPMFastConfig

pytestmark = pytest.mark.skipif(
    not official_diffusion.is_here(),
    reason="no dc_gen with timm, einops, torchdiffeq, scipy: see official_diffusion.py",
)


@pytest.mark.parametrize("calls", [30, 31, 32])
def test_singlestep_run_of_order_3(compare: Any, calls: int, tmp_path: Path) -> None:
    """As published for UViT; the numbers of calls end in different orders."""
    case = denoisers.build("official UViT", tmp_path / "model")
    solver = official_diffusion.module("uvit_sampler.dpm_solver_pp")
    schedule = solver.NoiseScheduleVP(schedule="discrete", betas=live.betas(Family.uvit).float())
    x1, noise = live.noises(case)

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return case.torch(x, 1000 * t.reshape(-1).expand(len(x)))

    with torch.no_grad():
        run = solver.DPM_Solver(model, schedule, predict_x0=True, thresholding=False)
        theirs = run.sample(original.nchw(x1), steps=calls, eps=1 / 1000, T=1.0)
    ours = live.our_run(case, DPMFastConfig(), x1, np.zeros((calls, *noise.shape[1:]), np.float32))
    sample = (ours, original.nhwc(theirs))
    compare(case.name, f"singlestep, {calls} calls", live.SAMPLES, sample=sample)


def test_respaced_ancestral_run(
    compare: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As published for DiT, with fewer steps, and the noise of each given."""
    case = denoisers.build("official DiT", tmp_path / "model")
    x1, noise = live.noises(case)
    drawn = iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda _: original.nchw(next(drawn)))
    diffusion = official_diffusion.module("dit_sampler").create_diffusion(str(live.STEPS))
    start = original.nchw(x1)
    theirs = diffusion.p_sample_loop(
        lambda x, i: case.torch(x, i.float()), tuple(start.shape), noise=start,
        clip_denoised=False, device="cpu",
    )  # fmt: skip
    ours = live.our_run(case, AncestralConfig(), x1, noise)
    sample = (ours, original.nhwc(theirs))
    compare(case.name, f"official DDPM, {live.STEPS} steps", live.SAMPLES, sample=sample)


@pytest.mark.parametrize("index", [(1, 400, 999), (37, 750, 998)], ids=str)
def test_training_loss_of_a_learned_variance(
    compare: Any, index: tuple[int, ...], tmp_path: Path
) -> None:
    """The official loss, and the one that test_live_diffusion.py writes out for networks without.

    The official one computes in float32, where the mean's x0 is a difference over alpha = 0.0064.
    """
    case = denoisers.build("official DiT", tmp_path / "model")
    x0, eps = (original.normal(f"{case.name} {n}", *live.SHAPE) for n in ("x0", "eps"))
    diffusion = official_diffusion.module("dit_sampler").create_diffusion("")
    with torch.no_grad():
        terms = diffusion.training_losses(
            lambda x, i: case.torch(x, i.float()), original.nchw(x0), torch.tensor(index),
            noise=original.nchw(eps),
        )  # fmt: skip
    official = terms["loss"].numpy()
    ours, written_out = live.losses(case, index)
    where = f"steps {', '.join(str(i + 1) for i in index)}"
    pairs = {"official loss": (ours, official), "written out": (written_out, official)}
    compare(case.name, where, live.LOSSES, **pairs)
    assert CHANNELS == x0.shape[-1]
