"""The demo's small DC-AE through the three phases, on a folder of your own images.

Command:   launch/three_phases.sh configs/folder.py runs/mine --config.data.source.path=DIR
           python main.py --config=configs/folder.py:phase1 --config.data.source.path=DIR \\
               --workdir=runs/mine/phase1
Hardware:  2 CPU cores, no accelerator
Cost:      that of configs/demo.py, plus the decoding of your images
Expected:  not known: it depends on the images
Metric:    PSNR and SSIM on held-out images, at 128 and 256 px

DIR holds train/ and test/, or images of which a twentieth is held out by a hash of their names
(--config.data.source.holdout); in subfolders or not.  At 256 px those below 256 px are left out.
The path is given once: training and evaluation share one source (recipes.use_source).

Stated by the paper: as in configs/demo.py.  Chosen here: all else.  For a model of full size change
the data of configs/dcae_f32c32.py in the same way: see README, "Your own data".
"""

from configs import demo
from dcae_jax import recipes
from dcae_jax.config import RunConfig
from dcae_jax.data.pipeline import Transform
from dcae_jax.data.sources import FolderConfig


def get_config(arg: str = "phase1") -> RunConfig:
    """The run of one phase: phase1, phase2 or phase3."""
    cfg = recipes.use_source(demo.get_config(arg), FolderConfig(path="", holdout=0.05))
    cfg.name = cfg.name.replace("demo", "folder")
    cfg.data.transform = Transform.random_resized_crop
    cfg.data.min_size = demo.HIGH if cfg.data.resolution >= demo.HIGH else 0
    for evaluator in cfg.evals:
        evaluator.data.transform = Transform.center_crop
        evaluator.n, evaluator.baselines = 16, False  # PCA needs 128 training images
    return cfg
