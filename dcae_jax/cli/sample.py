"""Draw samples of a trained diffusion model and decode them: PNGs, a grid, an npz for evaluators.

Sample i is a function of (weights, sampler, guidance, class, seed, i) alone: any batch size and any
number of devices and processes give the same pictures (to rounding).  Kill the command and run it
again, and it goes on where it was; a larger --n adds samples to a folder.  Examples:

  python -m dcae_jax sample --from runs/uvit_s --out seen
  python -m dcae_jax sample --from runs/uvit_s --out dogs --classes 207,250-260 --n 64 --cfg 3
  python -m dcae_jax sample --from runs/usit_h --out fid --n 50000 --classes random --npz
  python -m dcae_jax sample --from runs/usit_h --out fine --sampler heun --steps 50 --cfg 1.3 \\
      --cfg-interval 0.1 0.7
  python -m dcae_jax sample --from runs/usit_h --out auto --cfg 2 \\
      --weak runs/usit_h/checkpoints/50000

What is not given is that of the run's own grids (GenerateConfig in its evals), else what is
published for its process; the command says which.  Samplers and their options (--sampler-option):

  ddpm      steps, variance=posterior|beta|learned      discrete processes
  ddim      steps, eta, end                             any
  euler     steps, end                                  any
  heun      steps, end                                  any
  dpm_fast  steps (= calls of the network), end         discrete processes
  dpm_2m    steps, end                                  any
  dopri5    rtol, atol, max_steps, end                  any; chooses its own steps

OUT/images/000000.png ... are the samples and nothing else: a folder for torch-fidelity, clean-fid.
OUT/grid.png shows some, OUT/sample.json says how all were made, and with --npz OUT/samples.npz
holds arr_0 uint8[n, h, w, 3] (what ADM's evaluator reads) and arr_1 int64[n], the classes.
Several processes (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; Slurm; TPU pods)
share the samples; OUT must then be one folder for all of them.
"""

import argparse

from dcae_jax.cli import _options, _sample_draw, _sample_folder, _sample_job
from dcae_jax.cli._sample_draw import A_DEVICE


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax sample`."""
    args = _parser().parse_args(argv)
    from dcae_jax import backend

    backend.join(argv)
    backend.compile_cache("auto")
    return _options.in_all_processes(
        lambda: _sample_draw.fill(args, _sample_job.job_of(args), args.npz)
    )


def _parser() -> argparse.ArgumentParser:
    parser = _options.parser("sample", __doc__)
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="RUN",
        help="workdir of a diffusion run, or one step directory of it")  # fmt: skip
    add("--out", required=True, metavar="DIR",
        help="folder, may be gs://; one of the same samples is continued")  # fmt: skip
    add("--n", type=int, default=64, help="samples (default: 64)")
    add("--classes", default="all", metavar="LIST",
        help="numbers, ranges, names: 207,360 or 0-9,dog; sample i has class i modulo their count. "
        "all (default): every class in turn, so they are balanced (FID is lower by about 0.1 than "
        "with random ones). random: the class of each sample is drawn from all by --seed, the very "
        "classes of torch.randint on the CPU (DC-AE's evaluator: --seed 0 --n 50000)")  # fmt: skip
    add("--seed", type=int, metavar="S", help="default: that of the run")
    add("--params", choices=("ema", "raw"), default="ema", help="average (default) or raw weights")
    _sample_job.add_sampling(parser)
    add("--batch", type=int, metavar="B",
        help=f"samples at once on a process's devices (default: {A_DEVICE} on each)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"),
        help="of activations of network and decoder; default: that of their configs")  # fmt: skip
    add("--npz", action="store_true", help=f"also OUT/{_sample_folder.NPZ}")
    return parser
