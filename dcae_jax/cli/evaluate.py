"""Scores that can be cited: rFID, FID, PSNR, SSIM, LPIPS, KID, IS, ... with their protocol.

Of an autoencoder, at one resolution or several:

  python -m dcae_jax evaluate --from runs/demo/phase3 --out scores
  python -m dcae_jax evaluate --from imported/f64c128 --images imagenet/val --resolution 256,512 \\
      --metrics psnr,ssim,lpips,rfid --data-name imagenet-val --out scores

of a diffusion model, whose samples are drawn into OUT/samples first (with the options of `sample`,
whose folder that is; --samples scores such a folder as it is):

  python -m dcae_jax evaluate --from runs/usit_h --reference train512.npz --cfg 1.2 --out scores
  python -m dcae_jax evaluate --from runs/usit_h --n 10000 --protocol adm \\
      --reference VIRTUAL_imagenet512.npz --metrics gfid,sfid,is,precision,recall --out scores
  python -m dcae_jax evaluate --samples drawn --reference train512.npz --out scores

of two sets of images, each a folder or an npz with arr_0 uint8[n, h, w, 3]; PSNR, SSIM and LPIPS
compare images of one name:

  python -m dcae_jax evaluate --images samples/images --against imagenet/val --resolution 512 \\
      --metrics fid,kid,precision,recall --out scores
  python -m dcae_jax evaluate --images samples.npz --reference VIRTUAL_imagenet512.npz \\
      --protocol adm --metrics fid,sfid,is,precision,recall --out scores

and statistics of a data set as a reference for others (mu, sigma; mu_s, sigma_s for sFID):

  python -m dcae_jax evaluate --images imagenet/train --resolution 512 --write-reference ref.npz

Protocols: dcae (default) is that of DC-AE's authors: pytorch-fid's network and resize, for IS
torch-fidelity's.  adm is that of ADM's evaluator: the graph's own resize everywhere.  rFID compares
with the originals themselves unless --reference names other statistics.  Classes of samples: dcae
draws them at random (torch.randint, as --seed says), adm has all in turn.

OUT/metrics.json holds the scores with all that decides them, OUT/grid-*.png shows some images. Kill
the command and run it again, and it goes on where it was: features of every 512 images are kept in
OUT/parts until the end.  Several processes (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
JAX_PROCESS_ID; Slurm; TPU pods) share them; OUT must then be one folder for all.  The numbers of
images count exactly on any number of devices, and a score does not depend on --batch.
"""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from dcae_jax.cli import _evaluate_folder, _options, _sample_job
from dcae_jax.cli._trained import say

if TYPE_CHECKING:
    from dcae_jax.cli._evaluate_job import Job
    from dcae_jax.evals.parts import Work

_METRICS = "psnr,ssim,ssim-border,ms-ssim,lpips,rfid,sfid,kid,is,precision,recall,latent-rms"


def main(argv: list[str]) -> int:
    """Entry point of `python -m dcae_jax evaluate`."""
    args, overrides = _parser().parse_known_args(argv)
    _options.refuse_unknown(overrides)
    from dcae_jax import backend

    backend.join(argv)
    backend.compile_cache("auto")
    return _options.in_all_processes(lambda: _run(args, overrides))


def _parser() -> argparse.ArgumentParser:
    parser = _options.parser("evaluate", __doc__)
    add = parser.add_argument
    add("--from", dest="source", metavar="SOURCE", help=_options.FROM)
    add("--out", metavar="DIR", help="folder, may be gs://; one of the same scores is continued")
    add("--images", metavar="DIR", help="folder of images (or an npz, without --from); default: "
        "the held-out images of the run itself, or those of --config=FILE")  # fmt: skip
    add("--against", metavar="DIR_OR_NPZ", help="what --images are compared with")
    add("--reference", metavar="NPZ", help="statistics that FID and its like are compared with: "
        "mu and sigma of pytorch-fid, DC-AE or --write-reference, or ADM's reference batch",
    )  # fmt: skip
    add("--write-reference", metavar="NPZ", help="write the statistics of --images, no scores")
    add("--metrics", metavar="LIST", help=f"of {_METRICS}; default: psnr,ssim,lpips,rfid and "
        "latent-rms of an autoencoder, gfid and is of samples, fid of two sets")  # fmt: skip
    add("--protocol", choices=("dcae", "adm"), default="dcae", help="see above")
    add("--resolution", metavar="R", help="of the centre crops, one or several: 256,512; default: "
        "that of the data; --images: 256 for an autoencoder, else as they are")  # fmt: skip
    add("--split", help="default: what the run's evaluators look at; of a folder validation/ or "
        "test/ if it has one, else all of it")  # fmt: skip
    add("--n", type=int, metavar="N", help="images, spread over the data; default: all. "
        "With --against it limits --images alone, unless pairs are compared (psnr, ssim, lpips): "
        "then both. Samples; default: 50000")  # fmt: skip
    add("--data-name", metavar="NAME", help="what scores call the data, e.g. imagenet-val")
    add("--batch", type=int, metavar="B",
        help="images at once on a process's devices (default: 16 on each)")  # fmt: skip
    add("--nets", metavar="DIR", help="folder of the frozen networks; default: where import-net "
        "puts them")  # fmt: skip
    add("--skip-bad", action="store_true", help="leave images out that cannot be used, instead of "
        "stopping: the scores say how many")  # fmt: skip
    add("--keep-parts", action="store_true", help="keep the features, in OUT/parts, when all is "
        "done: scores of other tools can be computed of them")  # fmt: skip
    add("--min-size", type=int, metavar="PX", help="leave images out whose shorter side is below; "
        "default: that of the data")  # fmt: skip
    add("--samples", metavar="DIR", help="a folder of `sample`, to be scored")
    add("--labels", choices=("random", "balanced"), help="the classes of samples; default: see "
        "above")  # fmt: skip
    add("--seed", type=int, metavar="S", help="of classes and noise of samples; default: 0")
    _sample_job.add_sampling(parser)
    add("--variant", metavar="NAME", help="the release, where a bare file leaves it open")
    _options.add_weights(parser)
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the activations of what is evaluated; default: float32, without TF32")  # fmt: skip
    return parser


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    """The whole command on one of its processes."""
    from dcae_jax import distributed

    begin = time.monotonic()
    job = _job(args, overrides)
    with _evaluate_folder.claimed(job):
        if _is_finished(job):
            return
        if job.prepare is not None:
            job.prepare()
        _compute(job)
        distributed.barrier("features computed")
        if distributed.is_main():
            _finish(job, time.monotonic() - begin)
        distributed.barrier("finished")


def _job(args: argparse.Namespace, overrides: list[str]) -> "Job":
    """What is asked for, by the kind of what is evaluated."""
    from dcae_jax import checkpoint
    from dcae_jax.cli import _evaluate_autoencoder, _evaluate_generation, _evaluate_images
    from dcae_jax.convert import from_torch
    from dcae_jax.errors import UserError

    if not (args.out or args.write_reference):
        raise UserError("--out DIR is missing: the folder for the scores")
    if args.samples:
        if args.source or overrides:
            raise UserError("--samples is scored as it is, without --from and --config")
        return _evaluate_generation.folder_job(args)
    if args.source is None:
        _evaluate_generation.refuse_drawing(args, "nothing is drawn without --from RUN")
        if args.images is None:
            raise UserError("nothing to evaluate: give --from, or --images with --against")
        if overrides:
            raise UserError("--config is for --from; sets of images are folders or npz files")
        kind = _evaluate_images.reference_job if args.write_reference else _evaluate_images.job
        return kind(args)
    if args.against or args.write_reference:
        raise UserError("--against and --write-reference are for --images alone, without --from")
    path = checkpoint.absolute(args.source)
    from_torch.require(args.source, also="a workdir, ")
    meta = checkpoint.source_meta(args.source, "--from") if checkpoint.has_steps(path) else None
    if meta is not None and not _is_autoencoder(meta):
        if overrides:
            raise UserError("--config is for data of autoencoders; samples need none")
        return _evaluate_generation.job(args)
    _evaluate_generation.refuse_drawing(args, "of an autoencoder nothing is drawn")
    return _evaluate_autoencoder.job(args, overrides, meta)


def _is_autoencoder(meta: dict[str, Any]) -> bool:
    from dcae_jax import config
    from dcae_jax.tasks.autoencode import AutoencodeConfig

    return isinstance(config.from_json(meta["config"]).task, AutoencodeConfig)


def _is_finished(job: "Job") -> bool:
    """Whether the scores are there already, which is then told; the first process looks."""
    import numpy as np

    from dcae_jax import distributed

    done = np.zeros(1, np.uint64)
    if distributed.is_main():
        _evaluate_folder.check(job)
        record = _evaluate_folder.finished(job)
        if record is not None:
            say(f"{job.out} is finished already:\n{_evaluate_folder.table(record)}")
            done[0] = 1
    return bool(distributed.total(done)[0])


def _compute(job: "Job") -> None:
    """This process's share of the parts that are not there yet."""
    import jax

    from dcae_jax.evals import parts

    missing = [(work, _missing(job, work)) for work in job.works()]
    if total := sum(work.parts() - len(those) for work, those in missing):
        say(f"{total} part(s) there already")
    _evaluate_folder.check_space(job, [(work, len(those)) for work, those in missing])
    mine = [(w, those[jax.process_index() :: jax.process_count()]) for w, those in missing]
    images = sum(len(work.span(part)) for work, those in mine for part in those)
    if images:
        say(f"{images} image(s); the first ones wait for programs that are compiled")
    with _bar(images) as bar:
        for work, those in mine:
            parts.compute(job.out, work, those, job.skip_bad, bar.update)


def _finish(job: "Job", seconds: float) -> None:
    from dcae_jax.cli import _evaluate_images

    if job.write_reference is None:
        _evaluate_folder.finish(job, seconds)
    else:
        _evaluate_images.write_reference(job)


def _missing(job: "Job", work: "Work") -> list[int]:
    """The parts that are not there, the same on all processes: the first one looks."""
    import numpy as np

    from dcae_jax import distributed
    from dcae_jax.evals import parts

    mask = np.zeros(work.parts(), np.uint64)
    if distributed.is_main():
        mask[:] = parts.there(job.out, work)
    return np.flatnonzero(distributed.total(mask) == 0).tolist()


def _bar(total: int) -> Any:
    """Progress of this process's own part, on the first one; rare lines where nobody watches."""
    import jax
    from tqdm import tqdm

    from dcae_jax import distributed

    part = "" if jax.process_count() == 1 else f" (process 1 of {jax.process_count()})"
    return tqdm(
        total=total, unit="img", desc=f"evaluating{part}", disable=not distributed.is_main(),
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )  # fmt: skip
